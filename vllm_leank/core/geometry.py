"""What a mask must share with the model it is used on: served layers, attention shape and RoPE."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_leank.core.hf_config import fields_of, head_size, kv_heads, required
from vllm_leank.core.layers import (
    FULL,
    describe_layers,
    full_layers,
    layer_kinds,
    layers_without_rope,
)
from vllm_leank.errors import UserError

_OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""RoPE settings without effect on text, which vLLM drops where Qwen3.5 sees no images."""

# RoPE type names of older checkpoints, and what they are called today.
_ROPE_TYPE_ALIASES = {"su": "longrope", "mrope": "default"}


@dataclass(frozen=True)
class Geometry:
    """Shape and RoPE of a decoder's full attention.

    `num_layers` are the model's, and `served_layers` those of them that have full attention, which
    a mask is for; None, if all have. `rope_theta` is None where none of them has RoPE;
    `layers_without_rope` are those without where others have it. `rope_scaling` is brought into one
    spelling, so that equal settings compare equal: the legacy key `type` becomes `rope_type`, and
    what changes nothing for text (type `default`, None values, a partial rotary factor of 1, which
    channels turn by which side of an image) is dropped; None is left when nothing remains.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float | None
    rope_scaling: dict[str, Any] | None
    served_layers: tuple[int, ...] | None = None
    layers_without_rope: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.served_layers is not None:
            layers = tuple(self.served_layers)
            # Files say how many layers there are: nothing that long is made.
            every = len(layers) == self.num_layers and layers == tuple(range(len(layers)))
            object.__setattr__(self, "served_layers", None if every else layers)
        object.__setattr__(self, "layers_without_rope", tuple(self.layers_without_rope))
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
            UserError: a needed field is missing, or no layer has full attention.
        """
        get = fields_of(config)
        required(get, "num_attention_heads")
        if not (head_dim := head_size(get)):
            required(get, "hidden_size")
        rope = _full_attention_rope(get("rope_parameters") or get("rope_scaling") or {})
        scaling = dict(rope)
        theta = scaling.pop("rope_theta", None)
        partial = get("partial_rotary_factor")
        if partial is not None:
            scaling.setdefault("partial_rotary_factor", partial)
        kinds = layer_kinds(config)
        if not (served := full_layers(kinds)):
            raise UserError(
                f"no layer of the model has full attention ({describe_layers(kinds)}); leank "
                "prunes what such layers keep, as that alone grows with the context"
            )
        theta = theta if theta is not None else get("rope_theta")
        if (unturned := layers_without_rope(config)) == served:
            theta, scaling, unturned = None, {}, ()
        return cls(
            num_layers=len(kinds),
            num_kv_heads=kv_heads(get),
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            served_layers=served,
            layers_without_rope=unturned,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers that a mask is for; elsewhere they are numbered from 0."""
        return tuple(range(self.num_layers)) if self.served_layers is None else self.served_layers

    @property
    def has_rope(self) -> list[bool]:
        """Whether q and K are turned, for each layer that a mask is for."""
        without = self.layers_without_rope
        return [self.rope_theta is not None and layer not in without for layer in self.layers]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Served layers, KV heads and channels: `[L, H, D]` of what is said of each channel."""
        return len(self.layers), self.num_kv_heads, self.head_dim

    def __str__(self) -> str:
        rope = "no RoPE"
        if self.rope_theta is not None:
            kind = (self.rope_scaling or {}).get("rope_type", "default")
            rope = f"RoPE of type {kind} with theta {self.rope_theta:,.10g}"
        if self.layers_without_rope:
            rope += f" in all but {len(self.layers_without_rope)} of them"
        heads = f"{self.num_kv_heads} KV heads of {self.head_dim} channels"
        served = len(self.layers)
        layers = f"{served} layers"
        if self.served_layers is not None:
            layers = f"{self.num_layers} layers, {served} of them with full attention,"
        return f"{layers} of {heads}, {rope}"

    def mismatch(self, other: "Geometry") -> str | None:
        """Name the first field in which `other` differs, with both values; None if they agree."""
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine == others:
                continue
            if field.name == "served_layers":
                mine, others = self.layers, other.layers
            if isinstance(mine, tuple):
                mine, others = list(mine), list(others)
            return f"{field.name} is {mine}, not {others}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, in file order; lists of layers only where there are any."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("served_layers", "layers_without_rope"):
            if layers := values.pop(name):
                values[name] = list(layers)
        return values


def _canonical_rope_scaling(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    rest = {
        key: value
        for key, value in sorted(scaling.items())
        if value is not None and key not in _OF_IMAGES
    }
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


def _full_attention_rope(rope: Mapping[str, Any]) -> Mapping[str, Any]:
    """The RoPE settings of full-attention layers, where settings are given by kind of layer."""
    if rope and all(isinstance(value, Mapping) or value is None for value in rope.values()):
        return rope.get(FULL) or {}
    return rope
