"""K by directions of its own instead of by channels: low rank, and bits per direction.

A head's K is turned into coordinates along fixed directions, of which some are stored. The best
directions for an error e of cost `e' M e / 2`, where M is the expected outer product of the
gradients of log probabilities by far K (the whole Fisher matrix of a head, of which
`offline.fisher` takes the diagonal), are found by a symmetric eigenproblem: with `M = L L'` and C
the covariance of K, the eigenvectors U of `L' C L` give coordinates `U' L' (k - mean)` whose
variances are their costs. Directions are the same for all requests, so they take no memory per
token. Queries shape M, so directions know them.

K after RoPE turns with the position, which spreads it over more directions. Before RoPE it is
turned back first, gradients too; a cache of this kind has to turn what it reads forward again, and
no kernel here does that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.mask.bits import BitsArray
from vllm_leank.offline.archive import StaticArchive
from vllm_leank.offline.fisher import DRAWS, FarSquares, far_gradients, observe_far
from vllm_leank.offline.quantise import round_trip
from vllm_leank.offline.rope import Rotation

Array = npt.NDArray[np.float64]

DAMPING = 1e-3
"""Of a head's mean sensitivity, added to that of every direction: a few prompts see no gradient
along some."""


@dataclass(frozen=True)
class Directions:
    """Coordinates of K, for all layers and heads, float64.

    Attributes:
        mean: `[L, H, D]`, of K, turned back where there is a rotation.
        forth: `[L, H, D, D]`, rows that give coordinates of K less its mean.
        back: `[L, H, D, D]`, the inverse.
        cost: `[L, H, D]`, the variances of coordinates, the largest first: also what it costs to
            know a coordinate's mean alone.
        rotation: how K is turned back; `NO_ROTATION`: not at all.
    """

    mean: Array
    forth: Array
    back: Array
    cost: Array
    rotation: Rotation


def measure_directions(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    window: Window,
    rotation: Rotation,
    seed: int = 0,
) -> Directions:
    """Directions for far K of prompts of token ids; with `rotation`, of K turned back by it.

    Raises:
        UserError: as `far_gradients`.
    """
    moments = _Moments(Geometry.from_hf_config(model.config), rotation)

    class FarProducts(FarSquares):
        def of_key(self, layer: int, far: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(self.places.start, self.places.stop, device=gradient.device)
            turned = rotation.back(gradient, positions)
            return turned.mT @ turned

    passes = 0
    observe_far(model, prompts, window, moments)
    for products in far_gradients(model, prompts, window, FarProducts, seed=seed):
        for layer, (of_key, _) in products.sums.items():
            moments.gradients[layer] += of_key.double().cpu().numpy()
        passes += DRAWS
    return moments.directions(passes)


@dataclass
class _Moments:
    """Sums over far tokens: of K, of its products, and of the products of gradients."""

    geometry: Geometry
    rotation: Rotation
    count: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        L, H, D = self.geometry.shape
        self.count = np.zeros(L, np.int64)
        self.first, self.products = np.zeros((L, H, D)), np.zeros((L, H, D, D))
        self.gradients = np.zeros((L, H, D, D))

    def __call__(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add K `[1, H, T, D]` of the tokens from position `first` on, after RoPE."""
        positions = torch.arange(first, first + key.shape[2], device=key.device)
        k = self.rotation.back(key[0].float(), positions).double()
        self.count[layer] += k.shape[1]
        self.first[layer] += k.sum(dim=1).cpu().numpy()
        self.products[layer] += (k.mT @ k).cpu().numpy()

    def directions(self, passes: int) -> Directions:
        D = self.geometry.head_dim
        mean = self.first / self.count[:, None, None]
        products = self.products / self.count[:, None, None, None]
        covariance = products - mean[..., :, None] * mean[..., None, :]
        metric = self.gradients / passes
        level = np.trace(metric, axis1=-2, axis2=-1)[..., None, None] / D
        # A head that no gradient reaches costs nothing, whatever its directions are.
        level = np.where(level > 0, level, 1e-30)
        root = np.linalg.cholesky(metric + DAMPING * level * np.eye(D))
        cost, vectors = np.linalg.eigh(root.mT @ covariance @ root)
        cost, vectors = cost[..., ::-1].clip(0), vectors[..., ::-1]
        forth = vectors.mT @ root.mT
        back = np.linalg.inv(root).mT @ vectors
        return Directions(mean, forth, back, cost, self.rotation)


@dataclass(frozen=True)
class DirectionArchive:
    """An archive of K's coordinates with so many bits each, uint8 `[L, H, D]`, 16: as they are.

    `values` is the archive that V is stored in.
    """

    directions: Directions
    bits: BitsArray
    values: StaticArchive

    def __call__(
        self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[B, H, T, D]` of the tokens from `first` on, as the archive gives them back."""
        found = self.directions
        positions = torch.arange(first, first + key.shape[2], device=key.device)

        def of(numbers: Array) -> torch.Tensor:
            return torch.tensor(numbers[layer], dtype=torch.float32, device=key.device)

        mean = of(found.mean)[:, None]
        rest = found.rotation.back(key.float(), positions) - mean
        scale = of(np.sqrt(found.cost).clip(1e-30))[:, None]
        stored = rest @ of(found.forth).mT / scale
        bits = torch.tensor(self.bits[layer], device=key.device)[:, None]
        read = (round_trip(stored, bits) * scale) @ of(found.back).mT + mean
        far_key = found.rotation.forward(read, positions).to(key.dtype)
        return far_key, self.values.value(layer, value)


def best_directions(cost: Array, share: float) -> BitsArray:
    """16 bits for the dearest `share` of all coordinates `[L, H, D]`, 0 for the others."""
    count = round(share * cost.size)
    bits = np.zeros(cost.size, np.uint8)
    bits[np.argsort(-cost, axis=None, kind="stable")[:count]] = 16
    return bits.reshape(cost.shape)
