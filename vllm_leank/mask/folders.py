"""Where masks lie that no option names: the user's own folder, and the package's."""

import importlib.resources
import os
from pathlib import Path


def user_folder() -> Path:
    """The user's folder of masks, which may not exist: `$XDG_DATA_HOME/vllm-leank/masks`."""
    data = os.environ.get("XDG_DATA_HOME", "")
    # Relative paths are to be ignored, says the XDG specification.
    root = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return root / "vllm-leank" / "masks"


def package_folder() -> Path:
    """The folder of masks that come with the package."""
    return Path(str(importlib.resources.files("vllm_leank.masks")))
