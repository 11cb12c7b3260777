"""Files that are written in one step."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one, the new one, and never a part.

    Raises:
        OSError: it cannot be written; the old file, if any, is as it was.
    """
    # Not tempfile: that makes files only their owner can read. Without the file's own name, which
    # may be as long as names can be, and without a process id: containers give out the same ones.
    part = path.with_name(f".leank-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
