"""Files that are written in one step."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one, the new one, and never a part.

    Raises:
        OSError: it cannot be written; the old file, if any, is as it was.
    """
    # Not tempfile: that makes files only their owner can read.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
