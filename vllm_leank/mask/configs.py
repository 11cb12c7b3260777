"""Configs of models as transformers reads them, with errors that say what to do."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.loading import is_malformed, load_part


def is_path(model: str) -> bool:
    """Whether a model is named by a path, whatever is there: it begins as no hub id does, has more
    parts than one, or its first part is a folder here.
    """
    begins = model.startswith(("/", ".", "~")) or model.endswith(("/", ".json"))
    folder, between, _ = model.partition("/")
    return begins or model.count("/") > 1 or (bool(between) and Path(folder).is_dir())


def text_config(path: str, hub: Mapping[str, Any]) -> Any:
    """The config of a text model, or of the text part of a multimodal one; `hub` has options of
    `from_pretrained`.

    Raises:
        UserError: there is no such checkpoint, or its config cannot be loaded.
    """
    return whole_config(path, hub).get_text_config()


def whole_config(path: str, hub: Mapping[str, Any]) -> Any:
    """The config of a model; see `text_config`."""
    if not Path(path).is_dir() and is_path(path):
        raise UserError(f"{path}: no such directory")
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise UserError(f"{path}: has no config.json, so it is no model")
    import transformers

    return load_part(transformers.AutoConfig, path, **hub)


@contextmanager
def understood(path: str) -> Iterator[None]:
    """Turn what reading a malformed config ends in into a sentence.

    Raises:
        UserError: the config is malformed, or says what cannot be.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_malformed(error):
            raise
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: its config cannot be understood ({why}); fetch config.json again, or correct "
            "--hf-overrides"
        ) from error


def overridden(path: str, hub: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The config of a model with what `--hf-overrides` changes.

    Raises:
        UserError: it cannot be loaded, or changed so.
    """
    config = whole_config(path, hub)
    with understood(path):
        had_rope = _has_rope(config.get_text_config())
        config.update(dict(overrides))
        has_rope = _has_rope(config.get_text_config())
    if had_rope and has_rope is False:
        raise UserError(
            f"{path}: --hf-overrides replaces the model's rope_theta by nothing: name it, too, in "
            "rope_parameters"
        )
    return config


def _has_rope(config: Any) -> bool | None:
    try:
        return Geometry.from_hf_config(config).rope_theta is not None
    except UserError:
        return None  # what is wrong is said where the geometry is needed
