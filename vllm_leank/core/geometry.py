"""What a mask must share with the model it is used on: attention shape and RoPE."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_leank.errors import UserError

# RoPE type names of older checkpoints, and what they are called today.
_ROPE_TYPE_ALIASES = {"su": "longrope", "mrope": "default"}


@dataclass(frozen=True)
class Geometry:
    """Shape and RoPE of a decoder's attention.

    `rope_theta` is None for models without RoPE. `rope_scaling` is brought into one spelling, so
    that equal settings compare equal: the legacy key `type` becomes `rope_type`, and what changes
    nothing (type `default`, None values, a partial rotary factor of 1) is dropped; None is left
    when nothing remains.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float | None
    rope_scaling: dict[str, Any] | None

    def __post_init__(self) -> None:
        theta = self.rope_theta
        object.__setattr__(self, "rope_theta", None if theta is None else float(theta))
        scaling = _canonical_rope_scaling(self.rope_scaling or {})
        object.__setattr__(self, "rope_scaling", scaling)

    @classmethod
    def from_hf_config(cls, config: Any) -> "Geometry":
        """Geometry of a transformers config (an object, or the mapping of a `config.json`).

        Knows `rope_parameters` (transformers 5) and the older `rope_theta` with `rope_scaling`, a
        missing `head_dim` (hidden size over heads) and missing `num_key_value_heads` (multi-head
        attention), and takes the text part of a multimodal config.

        Raises:
            UserError: a needed field is missing, or layers differ in their RoPE settings.
        """
        get = _getter(_text_config(config))
        num_heads = _required(get, "num_attention_heads")
        head_dim = get("head_dim") or _required(get, "hidden_size") // num_heads
        rope = get("rope_parameters") or get("rope_scaling") or {}
        if rope and all(isinstance(value, Mapping) for value in rope.values()):
            raise UserError(
                "the model's layers have different RoPE settings "
                f"({', '.join(rope)}); one setting for all layers is supported"
            )
        scaling = dict(rope)
        theta = scaling.pop("rope_theta", None)
        partial = get("partial_rotary_factor")
        if partial is not None:
            scaling.setdefault("partial_rotary_factor", partial)
        return cls(
            num_layers=_required(get, "num_hidden_layers"),
            num_kv_heads=get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            rope_theta=theta if theta is not None else get("rope_theta"),
            rope_scaling=scaling,
        )

    def __str__(self) -> str:
        rope = "no RoPE"
        if self.rope_theta is not None:
            kind = (self.rope_scaling or {}).get("rope_type", "default")
            rope = f"RoPE of type {kind} with theta {self.rope_theta:,.10g}"
        heads = f"{self.num_kv_heads} KV heads of {self.head_dim} channels"
        return f"{self.num_layers} layers of {heads}, {rope}"

    def mismatch(self, other: "Geometry") -> str | None:
        """Name the first field in which `other` differs, with both values; None if they agree."""
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine != others:
                return f"{field.name} is {mine}, not {others}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, in file order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _canonical_rope_scaling(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    rest = {key: value for key, value in sorted(scaling.items()) if value is not None}
    legacy_type = rest.pop("type", "default")
    rope_type = rest.pop("rope_type", legacy_type)
    if isinstance(rope_type, str):
        rope_type = _ROPE_TYPE_ALIASES.get(rope_type, rope_type)
    if rest.get("partial_rotary_factor") == 1:
        del rest["partial_rotary_factor"]
    if rope_type == "default":
        # Without scaling the trained length has no effect; some configs carry it all the same.
        rest.pop("original_max_position_embeddings", None)
        if not rest:
            return None
    return {"rope_type": rope_type, **rest}


def _text_config(config: Any) -> Any:
    if isinstance(config, Mapping):
        return config.get("text_config") or config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _getter(config: Any) -> Any:
    if isinstance(config, Mapping):
        return config.get
    return lambda name: getattr(config, name, None)


def _required(get: Any, name: str) -> int:
    value = get(name)
    if value is None:
        raise UserError(f"the model's config has no {name}")
    return int(value)
