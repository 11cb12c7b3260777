"""Parts of a model as transformers loads them, with errors that say what to do."""

from pathlib import Path
from typing import Any

from vllm_leank.errors import UserError
from vllm_leank.mask.hub import work_offline_without_a_hub


def is_malformed(error: Exception) -> bool:
    """Whether reading a malformed config ends in such an error."""
    # Takes a tenth of a second, and most configs are as they should be.
    from huggingface_hub.errors import StrictDataclassError

    plain = ValueError, TypeError, AttributeError, LookupError, RecursionError
    return isinstance(error, (*plain, StrictDataclassError))


def load_part(kind: Any, path: str, what: str = "", **options: Any) -> Any:
    """`kind.from_pretrained(path)`, where `kind` is a class of transformers; errors call it `what`.

    Raises:
        UserError: it cannot be loaded.
    """
    if not Path(path).is_dir():
        work_offline_without_a_hub()
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:
        if not (isinstance(error, (OSError, ImportError)) or is_malformed(error)):
            raise
        # What follows is every model that there is.
        why = str(error).partition("\nModel type should be one of")[0]
        raise UserError(f"{path}: {what}cannot be loaded by transformers: {why}") from error


def load_weights(kind: Any, path: str, **options: Any) -> Any:
    """A model with its weights.

    Raises:
        UserError: it cannot be loaded, or some of its weights are not there: transformers would
            draw them by chance, and whatever is made of such a model is worth nothing.
    """
    import torch
    from safetensors import SafetensorError

    try:
        model, found = load_part(kind, path, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: its weights cannot be read, or are not of the shapes that its config says; "
            f"fetch both again ({why})"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{path}: {len(missing)} of its weights are missing, such as {missing[0]}; fetch the "
            "model again, or correct its config.json"
        )
    return model
