"""Where masks lie that no option names: the user's own folder, and the package's."""

import importlib.resources
import os
from pathlib import Path

from vllm_leank.errors import UserError


def user_folder() -> Path:
    """The user's folder of masks, which may not exist: `$XDG_DATA_HOME/vllm-leank/masks`."""
    data = os.environ.get("XDG_DATA_HOME", "")
    # Relative paths are to be ignored, says the XDG specification.
    root = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return root / "vllm-leank" / "masks"


def make_user_folder() -> Path:
    """The user's folder of masks, made where it does not exist.

    Raises:
        UserError: it cannot be made.
    """
    folder = user_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); set XDG_DATA_HOME to another place"
        ) from error
    return folder


def package_folder() -> Path:
    """The folder of masks that come with the package."""
    return Path(str(importlib.resources.files("vllm_leank.masks")))
