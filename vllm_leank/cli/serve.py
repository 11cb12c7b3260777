"""`leank serve`: `vllm serve` with leank, and with a mask that is made where there is none."""

import itertools
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from vllm_leank.cli.options import RECENT, SINK
from vllm_leank.cli.outputs import check_new, place_name, quiet_vllm, report_mask, say
from vllm_leank.core.other_layers import STATES
from vllm_leank.errors import UserError
from vllm_leank.mask.folders import make_user_folder, user_folder
from vllm_leank.mask.names import file_name

if TYPE_CHECKING:
    from vllm_leank.mask.mask import Mask
    from vllm_leank.offline.mask_request import BitsRequest
    from vllm_leank.serving.line import Line


def serve(
    line: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [FLAG]",
            help="What follows vllm serve; `vllm serve --help=all` lists its flags.",
            show_default=False,
        ),
    ],
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per element of far K and V, 0.75 to 8: 2 makes far tokens about 7 times "
            "smaller than 16 bits, scales included. Where no mask of so many bits is found, one is "
            "made.",
            show_default="whatever mask is found",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Prompts for a new mask, a file as leank mask calibrate takes it.",
            show_default="built-in prompts",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many prompts to make a new mask from.", show_default="16, of --data 64"
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the line that would be run; start and make nothing."),
    ] = False,
) -> None:
    """Serve a model with leank, in one command: `vllm serve`, with a mask of --bits.

    A mask that is not there yet is calibrated first, as `leank mask calibrate` does it, which takes
    minutes and no data, and is kept for the next time. Whatever `leank doctor` would find is said
    before anything is made or started. Then this process becomes `vllm serve`.
    """
    environment = dict(os.environ)  # vLLM's; what is imported here adds to ours
    quiet_vllm()
    from vllm_leank.serving.environment import problems
    from vllm_leank.serving.line import cpu_cache, no_prefix_cache, read_line

    if found := problems():
        raise UserError("; ".join(found))
    asked = read_line(line)
    added = cpu_cache(asked)
    if uncached := no_prefix_cache(asked):
        say(f"leank has no prefix caching for models with {STATES}: adding {uncached[0]}")
        added += uncached
    given = {"--data": data, "--prompts": prompts}
    of_new = " and ".join(name for name, value in given.items() if value is not None)
    if bits is None:
        if of_new:
            raise UserError(f"{of_new}: for a mask that --bits makes; give --bits as well")
        words = [*asked.with_leank(), *added]
    else:
        wanted = _wanted(asked, bits)
        if wanted.request is None and of_new:
            say(f"{wanted.path}: is served as it is; {of_new}: for a new mask, not read")
        elif data is not None and not data.is_file():
            raise UserError(f"{data}: no such file; --data has the prompts for a new mask")
        words = [*asked.with_leank(mask=str(wanted.path)), *added]
        if wanted.request is not None:
            _judge_before(asked, wanted.request, added)
            if dry_run:
                say(f"{wanted.why}: one would be calibrated first")
                print(_shown(words))
                return
            _make(wanted, data, prompts)
    _judge(words)
    if dry_run:
        print(_shown(words))
        return
    say(f"$ {_shown(words)}")
    _become_vllm(words, environment)


@dataclass(frozen=True)
class _Wanted:
    """The mask to serve with.

    Attributes:
        path: its file, which may have to be made.
        request: what is to be made; None where the file is as it should be.
        why: why it is to be made.
        tokens: longest prompt to make it from.
        device: where to make it.
    """

    path: Path
    request: "BitsRequest | None" = None
    why: str = ""
    tokens: int = 0
    device: str = ""


def _wanted(asked: "Line", bits: float) -> _Wanted:
    """The mask of `bits` that is found, or what is to be made.

    Raises:
        UserError: `bits` is out of range or contradicts the line, or several masks fit.
    """
    from vllm_leank.mask.bits import check_bits_asked
    from vllm_leank.mask.lookup import mask_of_bits
    from vllm_leank.offline.calibration_prompts import least_prompt, longest_prompt
    from vllm_leank.offline.mask_request import BitsRequest, window_of
    from vllm_leank.serving.report import BEYOND

    check_bits_asked(bits)
    options = asked.options
    if options.mask is not None:
        raise UserError(
            f'--bits {bits:g} looks for a mask, and "mask" in --additional-config names one, '
            f"{options.mask}: give one of both"
        )
    checkpoint = asked.checkpoint()
    device = checkpoint.place(None)
    revision = checkpoint.hub.get("revision")
    found = mask_of_bits(checkpoint.path, checkpoint.geometry, bits, revision)
    tokens = min(longest_prompt(checkpoint, None, device), asked.model.max_model_len)
    if found is not None:
        assert found.path is not None
        most = _made_for(found)
        if most is None or tokens <= BEYOND * most:
            return _Wanted(found.path)
        path = found.path
        why = f"{path}: made from prompts of up to {most:,} tokens, and requests may be longer"
    else:
        path = _new_path(checkpoint.id, bits)
        why = f"no mask of {bits:g} bits for {checkpoint.id} is found"
    made_for = (SINK, RECENT) if found is None else (found.sink, found.recent)
    window = window_of(
        made_for[0] if options.sink is None else options.sink,
        made_for[1] if options.recent is None else options.recent,
    )
    request = BitsRequest(checkpoint, bits, window)
    return _Wanted(path, request, why, max(tokens, least_prompt(window)), device)


def _made_for(mask: "Mask") -> int | None:
    """Longest prompt that a mask was to be made from, in tokens; None where it is not known, or the
    mask must stay as it is: it is not the user's, or not from built-in prompts alone.
    """
    told = mask.provenance
    is_built_in = (told["method"], told.get("data")) == ("calibrate", "built-in")
    if not is_built_in or mask.path is None or not mask.path.is_relative_to(user_folder()):
        return None
    most = told.get("max_tokens", told.get("longest_prompt"))
    return most if isinstance(most, int) else None


def _new_path(model_id: str, bits: float) -> Path:
    """A file in the user's folder that does not exist."""
    path = user_folder() / file_name(model_id, bits)
    more = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], more) if not os.path.lexists(one))


def _judge_before(asked: "Line", request: "BitsRequest", added: list[str]) -> None:
    """Judge the line and what is added to it before there is a mask, with one of as many bits,
    alike in all heads.

    Raises:
        UserError: leank would not serve it.
    """
    from vllm_leank.mask.file import save_mask
    from vllm_leank.offline.even_bits import even_mask

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.yaml"
        save_mask(even_mask(request.checkpoint.id, request.checkpoint.geometry, request.bits), path)
        _judge([*asked.with_leank(mask=str(path)), *added])


def _judge(words: list[str]) -> None:
    """Raises: UserError: leank would not serve the line, for whatever `leank doctor` would say."""
    from vllm_leank.serving.serve_line import examine

    if reasons := examine(words).reasons:
        raise UserError(f"would not be served: {'; '.join(reasons)}")


def _make(wanted: _Wanted, data: Path | None, prompts: int | None) -> None:
    """Calibrate the mask, into its file.

    Raises:
        UserError: it cannot be made, or not be written.
    """
    from vllm_leank.cli.mask_calibrate import measured_mask
    from vllm_leank.mask.file import save_mask
    from vllm_leank.offline.calibration_prompts import calibration_prompts

    request = wanted.request
    assert request is not None
    make_user_folder()
    check_new(wanted.path, overwrite=True)
    read = calibration_prompts(
        request.checkpoint, data, request.window, max_tokens=wanted.tokens, count=prompts
    )
    say(
        f"{wanted.why}: calibrating one, once, on {read}, on {place_name(wanted.device)}. This "
        "takes minutes; how many is said after the first prompt"
    )
    mask = measured_mask(request, read, wanted.device)
    save_mask(mask, wanted.path, overwrite=True)
    report_mask(wanted.path, mask)


def _shown(words: list[str]) -> str:
    """The line as it would be typed."""
    return shlex.join(["vllm", "serve", *words])


def _become_vllm(words: list[str], environment: dict[str, str]) -> NoReturn:
    """Replace this process, and with it a calibrated model's memory, by this interpreter's vLLM."""
    sys.stdout.flush()
    sys.stderr.flush()
    # -P as for a script: modules are not looked for in the working directory.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", *words]
    os.execve(sys.executable, command, environment)
