"""RoPE as a function of the position: to turn K back to position 0, and forward again.

RoPE turns pairs of channels `(i, i + r / 2)` of the first `r` channels by an angle that grows with
the position. The mean of K before that hardly depends on positions, so an archive keeps it and
turns it to where it is needed. Constant factors that some types put on K (YaRN's) are left in K:
what is turned back and forward again by the same angles keeps them.
"""

import inspect
import sys
from dataclasses import dataclass

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm_leank.core.geometry import Geometry

_LENGTH_FREE = ("linear", "llama3", "yarn")
"""Types, besides the default one, whose angles do not depend on a request's length."""


@dataclass(frozen=True)
class Rotation:
    """Angles per position of the pairs, fp64 `[r / 2]`; none: a model without RoPE."""

    frequencies: torch.Tensor

    def tables(self, positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, fp32 `[T, head_dim]`, of each channel's angle at `positions` `[T]`."""
        half = self.frequencies.to(positions.device)
        rest = half.new_zeros(head_dim - 2 * len(half))
        angles = positions.double()[:, None] * torch.cat([half, half, rest])
        return angles.cos().float(), angles.sin().float()

    def partner(self, x: torch.Tensor) -> torch.Tensor:
        """The other channel of each pair, negative for the first half; 0 where nothing turns."""
        half = len(self.frequencies)
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([-second, first, torch.zeros_like(rest)], dim=-1)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`x` `[..., T or 1, D]` turned from position 0 to `positions` `[T]`."""
        cos, sin = self.tables(positions, x.shape[-1])
        return x * cos + self.partner(x) * sin

    def back(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`x` `[..., T, D]` turned from `positions` `[T]` to position 0."""
        cos, sin = self.tables(positions, x.shape[-1])
        return x * cos - self.partner(x) * sin


NO_ROTATION = Rotation(torch.zeros(0, dtype=torch.float64))


def rotation_of(geometry: Geometry) -> Rotation | None:
    """The rotation that a geometry's settings name; None for types that this module cannot turn.

    It cannot turn by angles that depend on the length of a request or on more than one position.
    """
    if geometry.rope_theta is None:
        return NO_ROTATION
    scaling = dict(geometry.rope_scaling or {})
    rope_type = scaling.pop("rope_type", "default")
    rotary = int(geometry.head_dim * scaling.get("partial_rotary_factor", 1))
    if rotary % 2:
        return None
    if rope_type == "default":
        if scaling.keys() - {"partial_rotary_factor"}:
            return None
        exponents = torch.arange(0, rotary, 2, dtype=torch.int64).float() / rotary
        return Rotation((1 / geometry.rope_theta**exponents).double())
    if rope_type not in _LENGTH_FREE:
        return None
    config = transformers.PretrainedConfig()
    config.head_dim = geometry.head_dim
    # Some versions look at these even where head_dim is given.
    config.hidden_size, config.num_attention_heads = geometry.head_dim, 1
    config.rope_theta = geometry.rope_theta
    config.partial_rotary_factor = scaling.get("partial_rotary_factor", 1.0)
    config.rope_parameters = {
        "rope_type": rope_type,
        "rope_theta": geometry.rope_theta,
        **scaling,
    }
    config.max_position_embeddings = scaling.get("original_max_position_embeddings", 0)
    config.standardize_rope_params = lambda: None
    try:
        frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    except (KeyError, AttributeError, TypeError):
        return None
    return Rotation(frequencies.double())


def rotation_of_model(model: transformers.PreTrainedModel) -> Rotation | None:
    """The rotation of a model, None where it is not known for sure, or not all layers have it.

    Configs do not tell which channels are paired, so the model's own code is asked to turn a vector
    and the answers are compared.
    """
    geometry = Geometry.from_hf_config(model.config)
    rotation = None if geometry.layers_without_rope else rotation_of(geometry)
    if rotation is None or rotation is NO_ROTATION:
        return rotation
    decoder = model.base_model
    turn = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if turn is None or "cos" not in inspect.signature(turn).parameters:
        return None
    positions = torch.tensor([0, 1, 77, 1000], device=model.device)
    x = torch.linspace(-1, 1, geometry.head_dim, device=model.device).expand(1, 1, 4, -1)
    try:
        cos, sin = (one.to(x.device) for one in decoder.rotary_emb(x, positions[None]))
        theirs = turn(x, x, cos, sin)[1][0, 0]
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return None
    ours = rotation.forward(x[0, 0], positions)
    # Position 0 shows a factor on K, which ours leaves out.
    factor = theirs[0].norm() / ours[0].norm()
    same = theirs.shape == ours.shape and torch.allclose(theirs, ours * factor, atol=1e-3)
    return rotation if same else None
