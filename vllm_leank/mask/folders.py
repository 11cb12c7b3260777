"""Where masks lie that no option names: the user's own folder, and the package's."""

import importlib.resources
import os
from pathlib import Path

from vllm_leank.errors import UserError


def user_folder() -> Path:
    """The user's folder of masks, which may not exist: `$XDG_DATA_HOME/vllm-leank/masks`.

    Raises:
        UserError: nothing says where the user's folders are.
    """
    data = os.environ.get("XDG_DATA_HOME", "")
    # Relative paths are to be ignored, says the XDG specification.
    if not os.path.isabs(data):
        try:
            data = str(Path.home() / ".local" / "share")
        except RuntimeError as error:
            raise UserError("the user has no home directory: set HOME or XDG_DATA_HOME") from error
    return Path(data, "vllm-leank", "masks")


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
