"""Brings mask files that others publish: read as strictly as any, and kept as they are."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from vllm_leank.errors import UserError
from vllm_leank.mask.file import MAX_BYTES, read_mask_bytes

SECONDS = 30
"""That a server may be silent."""


def check_source(source: str) -> None:
    """Refuse what is neither an address nor a file, such as a model's id.

    Raises:
        UserError: it is neither, or the address is not https.
    """
    if "://" in source:
        _check_https(source)
    elif not _is_file(source):
        raise UserError(
            f"{source}: no such file; give the path of a mask file, or an https address of one"
        )


def fetch(source: str) -> bytes:
    """The bytes of a mask file, from an https address or a path.

    Raises:
        UserError: it cannot be read, is too large, or the address is not https.
    """
    if "://" not in source:
        return read_mask_bytes(Path(source))
    _check_https(source)
    opener = urllib.request.build_opener(_OnlyHttps())
    try:
        with opener.open(source, timeout=SECONDS) as reply:
            data: bytes = reply.read(MAX_BYTES + 1)
            missing = reply.length if len(data) <= MAX_BYTES else 0
    except urllib.error.HTTPError as error:
        raise UserError(f"{source}: the server says {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{source}: cannot be read: {reason}") from error
    if missing:  # the connection was closed; nothing else says so
        raise UserError(f"{source}: the server sent {len(data)} of {len(data) + missing} bytes")
    if len(data) > MAX_BYTES:
        raise UserError(f"{source}: larger than {MAX_BYTES} bytes, the limit for mask files")
    return data


def check_digest(source: str, data: bytes, expected: str | None) -> str:
    """The sha256 of what was read, which must be `expected` where that is given.

    Raises:
        UserError: it is another, or `expected` is no sha256.
    """
    found = hashlib.sha256(data).hexdigest()
    if expected is None:
        return found
    if not re.fullmatch(r"[0-9a-fA-F]{64}", expected):
        raise UserError(f"--sha256 is {expected!r}; it must be 64 hexadecimal digits")
    if found != expected.lower():
        raise UserError(f"{source}: its sha256 is {found}, not {expected.lower()}; nothing is kept")
    return found


def name_of(source: str) -> str:
    """The file's name, with the ending that servers look for: the last part of a path or address.

    Raises:
        UserError: there is none that ends in .yaml.
    """
    path = unquote(urlsplit(source).path) if "://" in source else source
    name = Path(path).name
    if not re.fullmatch(r"[\w.-]+\.ya?ml", name):
        raise UserError(f"{source}: does not end in the name of a .yaml file; name it with --out")
    return str(Path(name).with_suffix(".yaml"))


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _check_https(address: str) -> None:
    try:
        scheme = urlsplit(address).scheme
    except ValueError as error:
        raise UserError(f"{address}: no address: {error}") from error
    if scheme != "https":
        raise UserError(f"{address}: masks are read from https addresses and paths only")


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows no redirection to anything else."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
