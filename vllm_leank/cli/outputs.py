"""What commands say and write, alike in all of them."""

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_leank.errors import UserError, shortened

if TYPE_CHECKING:
    from vllm_leank.mask.mask import Mask


def say(text: str) -> None:
    """Tell the user on stderr what is being done."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def place_name(device: str) -> str:
    """What a device is called in a sentence."""
    from vllm_leank.mask.checkpoint import ALL_GPUS

    return "all GPUs" if device == ALL_GPUS else device


def quiet_vllm() -> None:
    """Keep vLLM's log from between a command's own lines, unless its level was chosen.

    vLLM reads this when it is imported, so it must be said before.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def check_new(out: Path, overwrite: bool) -> None:
    """Refuse what could not be written, before the work and not after it.

    A link is replaced itself, not what it leads to.

    Raises:
        UserError: it could not be written.
    """
    if os.path.isdir(out):  # not Path's, which raises where it may not look
        raise UserError(f"{out}: is a directory; name a file, as in {out / 'NAME'}")
    try:
        mode = out.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:
        raise UserError(
            f"{shortened(str(out))}: cannot be written: {error.strerror}; choose another name"
        ) from error
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise UserError(f"{out}: is a device, pipe or socket, not a file; choose another name")
    if mode is not None and not overwrite:
        link = f" as a link to {os.readlink(out)}" if stat.S_ISLNK(mode) else ""
        raise UserError(f"{out}: exists already{link}; choose another name or give --overwrite")
    folder = out.absolute().parent
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: no files can be written here")


def check_apart(**outputs: Path | None) -> None:
    """Refuse two options that name the same file to write, of which one would be lost.

    Raises:
        UserError: there are such.
    """
    seen: dict[str, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        other = seen.setdefault(os.path.realpath(path), name)
        if other != name:
            raise UserError(
                f"{path}: --{other} and --{name} would write the same file; give one of them "
                "another name"
            )


def report_mask(out: Path, mask: "Mask", ratio: float | None = None) -> None:
    """Say what was written; `ratio` is the share of K that was to be pruned, in heads that were
    not to be streaming.
    """
    heads = ""
    if "streaming" in mask.provenance:
        sees = mask.k_bits.any(-1) | mask.v_bits.any(-1)
        heads = f"; {sees.size - int(sees.sum())} of {sees.size} heads see no far tokens"
    if mask.is_packed:
        from vllm_leank.mask.settings import dense_bytes, stored_bytes

        smaller = f"{dense_bytes(mask) / stored_bytes(mask):.1f}x smaller than dense"
        print(f"{out}: {mask.bits:.2f} bits per element, {smaller}, scales included{heads}")
        return
    asked = "" if ratio is None else f" ({ratio:.2%} asked{' of the others' if heads else ''})"
    print(
        f"{out}: {1 - mask.k_kept:.2%} of K pruned{asked}, "
        f"{mask.far_bytes_share:.1%} of a far token's bytes left{heads}"
    )


def tell_of_others(out: Path, mask: "Mask") -> None:
    """Say that a server has to choose, where the user has other masks of the model."""
    from vllm_leank.mask.folders import user_folder
    from vllm_leank.mask.lookup import find_masks, preferred

    if not out.is_relative_to(user_folder()):
        return
    fitting = [one for one in find_masks(mask.model) if one.geometry == mask.geometry]
    others = [str(one.path) for one in preferred(fitting) if one.path != out]
    if others:
        say(
            f"{mask.model} has other masks, too: {', '.join(others)}. Remove them, or tell servers "
            'which to use: "mask" in --additional-config'
        )
