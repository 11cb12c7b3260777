"""A checkpoint of transformers whose parts are loaded when they are needed.

So are torch and transformers, which take seconds: many commands need a model's shape alone.
"""

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.served_models import Attention
from vllm_leank.errors import UserError
from vllm_leank.mask.configs import overridden, text_config, understood, whole_config
from vllm_leank.mask.loading import load_part, load_weights
from vllm_leank.mask.names import model_name
from vllm_leank.mask.plain_config import count_weights, plain_config

if TYPE_CHECKING:
    import transformers

ALL_GPUS = "auto"
"""The device that stands for all GPUs together."""

WEIGHTS_SHARE = 0.8
"""Most of a GPU's free memory that weights may take: the rest is for what is computed."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Checkpoint:
    """A directory or hub id, with what masks need to know of it.

    Attributes:
        path: the directory or hub id.
        id: what a mask for it is found by.
        geometry: shape and RoPE of its attention.
        plain: its config, where it could be read without transformers.
        hub: options of transformers' `from_pretrained` for all its parts, such as `revision`.
        override: the whole config to build the model with, instead of the checkpoint's own.
        tokenizer_path: where the tokenizer is, if not at `path`.
    """

    path: str
    id: str
    geometry: Geometry
    plain: Mapping[str, Any] | None = field(default=None, repr=False)
    hub: Mapping[str, Any] = field(default_factory=dict, repr=False)
    override: Any = field(default=None, repr=False)
    tokenizer_path: str | None = None

    @classmethod
    def open(
        cls,
        path: str,
        model_id: str | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        hub: Mapping[str, Any] | None = None,
        override: Any = None,
        tokenizer_path: str | None = None,
    ) -> "Checkpoint":
        """Read the config only; `model_id` is by default the hub id or the directory's name.

        `path` may be that of a `config.json`, where there are no weights to load. `overrides` are
        what vLLM's `--hf-overrides` has, `override` is the whole config instead.

        Raises:
            UserError: there is no such checkpoint, its config lacks what a mask needs, or leank
                would not serve it.
        """
        hub, path = dict(hub or {}), _folder(path)
        if overrides:
            override = overridden(path, hub, overrides)
        plain = None if hub or override is not None else plain_config(path)
        with understood(path):
            if plain is not None:
                config: Any = plain
            elif override is None:
                config = text_config(path, hub)
            else:
                config = override.get_text_config()
            reasons = "; ".join(Attention.of(config).refusals())
        if reasons:
            raise UserError(f"{path}: leank cannot serve this model: {reasons}")
        name = model_id or model_name(path)
        with understood(path):
            geometry = Geometry.from_hf_config(config)
        return cls(path, name, geometry, plain, hub, override, tokenizer_path)

    @functools.cached_property
    def config(self) -> Any:
        """The text part of the config, as transformers reads it."""
        if self.override is not None:
            return self.override.get_text_config()
        return text_config(self.path, self.hub)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            UserError: there is none, or it cannot be loaded.
        """
        import transformers

        path = self.tokenizer_path or self.path
        return load_part(transformers.AutoTokenizer, path, "its tokenizer ", **self.hub)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, after the tokens that begin a sequence."""
        return self._encode(text)

    def encode_rest(self, text: str) -> list[int]:
        """Token ids of a text that continues another."""
        return self._encode(text, add_special_tokens=False)

    def encode_question(self, text: str) -> list[int]:
        """Token ids of what a user asks, in the chat template, or plainly where there is none."""
        if not self.tokenizer.chat_template:
            return self.encode(text)
        import jinja2

        messages = [{"role": "user", "content": text}]
        try:
            asked = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self.path}: its chat template takes no question: {error}") from error
        return self.encode_rest(asked)

    def _encode(self, text: str, **options: Any) -> list[int]:
        tokenizer = self.tokenizer
        try:
            ids: list[int] = tokenizer.encode(text, verbose=False, **options)
        except Exception as error:  # tokenizers raise nothing else
            raise UserError(f"{self.path}: its tokenizer cannot read a text: {error}") from error
        return ids

    def max_tokens(self, limit: int) -> int:
        """`limit`, or the longest context of the model if that is shorter."""
        return min(limit, getattr(self.config, "max_position_embeddings", None) or limit)

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the model's weights with numbers of `itemsize` bytes; reads the config only.

        Raises:
            UserError: the weights are quantised, or transformers does not know the model.
        """
        config = self.plain or self.config.to_dict()
        if config.get("quantization_config"):
            raise UserError(f"{self.path}: is quantised, so its config does not tell its size")
        if self.plain is not None:
            return count_weights(self.plain) * itemsize
        import torch

        whole = self._whole_config()
        try:
            with torch.device("meta"):
                model = _class_of(whole).from_config(whole)
        except (ValueError, ImportError) as error:
            raise UserError(f"{self.path}: transformers cannot build this model: {error}") from None
        return sum(weight.numel() for weight in model.parameters()) * itemsize

    def load(
        self, dtype: str = "auto", device: str | None = None
    ) -> "transformers.PreTrainedModel":
        """The model, for evaluation; `device` is by default the GPU, where there is one. `auto` is
        the dtype of its weights, but float32 on a CPU: most take ten times as long with 16 bits.

        With `ALL_GPUS` its layers are spread over all GPUs.

        Raises:
            UserError: the dtype is not one of `DTYPES`, or the model cannot be loaded.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype}; allowed: {', '.join(DTYPES)}")
        import torch

        device = usable_device(device)
        if device == ALL_GPUS:
            return self._spread(dtype)
        model = self._weights("float32" if (dtype, device) == ("auto", "cpu") else dtype)
        try:
            return model.to(device).eval()
        except torch.OutOfMemoryError as error:
            raise UserError(f"{self.path}: its weights do not fit on {device}") from error

    def place(self, device: str | None, dtype: str = "auto") -> str:
        """Where to load the model: `usable_device(device)`, but `ALL_GPUS` where it is not said
        which GPU, one is too small and there are more.

        Raises:
            UserError: nothing can be computed there.
        """
        import torch

        device = usable_device(device)
        if device != "cuda" or torch.cuda.device_count() < 2 or dtype not in DTYPES:
            return device
        if getattr(self.config, "quantization_config", None):
            return device
        numbers = getattr(self.config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
        weights = self.weight_bytes((numbers or torch.float32).itemsize)
        return device if weights < WEIGHTS_SHARE * torch.cuda.mem_get_info()[0] else ALL_GPUS

    def _spread(self, dtype: str) -> "transformers.PreTrainedModel":
        """The model with its layers on all GPUs, about as much on each.

        Raises:
            UserError: accelerate is missing, or the GPUs together are too small.
        """
        if importlib.util.find_spec("accelerate") is None:
            raise UserError(
                "to spread a model over several GPUs the package accelerate is needed; run: pip "
                "install accelerate"
            )
        import torch

        model = self._weights(dtype, device_map="balanced")
        if left_over := _off_gpus(model.hf_device_map):
            raise UserError(
                f"{self.path}: does not fit on the {torch.cuda.device_count()} GPUs here: nothing "
                f"is left for {', '.join(left_over)}"
            )
        return model.eval()

    def _weights(self, dtype: str, **more: Any) -> "transformers.PreTrainedModel":
        """The model, with the config that overrides its own, if there is one."""
        given = {} if self.override is None else {"config": self.override}
        kind = _class_of(self._whole_config())
        return load_weights(kind, self.path, dtype=dtype, **given, **self.hub, **more)

    def _whole_config(self) -> Any:
        """The config, not of its text part alone."""
        return whole_config(self.path, self.hub) if self.override is None else self.override


def _class_of(config: Any) -> Any:
    """What loads a model that generates text: of some that see images, transformers calls it by
    what they do with these.
    """
    import transformers

    is_text = config.get_text_config() is config
    if is_text or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def _folder(path: str) -> str:
    """The directory of a `config.json` that is named itself; else the path as it is."""
    named = Path(path)
    return str(named.parent) if named.name == "config.json" and named.is_file() else path


def _off_gpus(places: dict[str, int | str]) -> list[str]:
    """The parts of a model that a device map puts elsewhere than on GPUs."""
    return [name for name, place in places.items() if place in ("cpu", "disk")]


def usable_device(device: str | None) -> str:
    """`device`, or the GPU if there is one, else the CPU; `ALL_GPUS` where there are any.

    Raises:
        UserError: nothing can be computed there.
    """
    import torch

    if device == ALL_GPUS:
        if not torch.cuda.is_available():
            raise UserError(f"device {ALL_GPUS!r} means all GPUs, and torch sees none")
        return device
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {error}") from error
    return device
