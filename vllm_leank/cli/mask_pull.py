"""`leank mask pull`: a mask that somebody published."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_leank.cli.outputs import check_new, report_mask, say, tell_of_others
from vllm_leank.errors import UserError


def pull(
    source: Annotated[
        str, typer.Argument(metavar="FILE|URL", help="A path, or an address of https.")
    ],
    sha256: Annotated[
        str | None,
        typer.Option(help="What the file's must be.", show_default="any, which is then shown"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to keep it.", show_default="the user's folder, by its name"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Keep a mask that somebody published where servers find it.

    The file is read as strictly as any mask, and kept byte by byte.
    """
    from vllm_leank.core.atomic import write_atomically
    from vllm_leank.mask.file import parse_mask_bytes
    from vllm_leank.mask.folders import make_user_folder
    from vllm_leank.mask.pull import check_digest, check_source, fetch, name_of

    check_source(source)
    target = make_user_folder() / name_of(source) if out is None else out
    check_new(target, overwrite)
    data = fetch(source)
    digest = check_digest(source, data, sha256)
    mask = parse_mask_bytes(data, Path(source))
    try:
        write_atomically(target, data)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from error
    say(f"{mask.model}: {mask.geometry}; sha256 {digest}")
    report_mask(target, mask)
    tell_of_others(target, mask)
