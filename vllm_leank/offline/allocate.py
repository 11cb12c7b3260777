"""Hands out bits to channels, most where a bit saves most, over all layers and heads, K and V.

What a channel costs with 8, 4, 2 and no bits is given (`code_losses` measures it). Each head gets
a *profile*: how many channels of its K and of its V have 8, 4 and 2 bits. Its dearest channels take
the most bits. Kernels are compiled per profile, so all heads share a few.

With a price per bit (a Lagrange multiplier), each head takes the profile where cost and price
together are least, and the best few profiles are found greedily: first the one that serves all
heads best, then the one that adds most, and last, each is exchanged for a better one while there
is any. The price is the lowest at which the bits stay within the budget; what is left of it goes to
the heads where it saves most.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_leank.core.formats.packed import CODE_CLASSES as CLASSES
from vllm_leank.core.formats.packed import LEFT, class_counts
from vllm_leank.errors import UserError
from vllm_leank.mask.bits import MAX_PROFILES, BitsArray

Array = npt.NDArray[np.float64]

Losses = Mapping[int, Array]
"""What channels `[..., D]` cost with so many bits: with none, and with those of each class."""

_ROUNDS = 50
"""Halvings of the range of prices."""

_EXCHANGES = 4
"""Rounds in which each profile may be exchanged for a better one."""


@dataclass(frozen=True)
class Allocation:
    """Bits of each channel of K and V, uint8 `[L, H, D]`, and their mean over all elements."""

    k_bits: BitsArray
    v_bits: BitsArray

    @property
    def mean_bits(self) -> float:
        """Bits per element of K and V together."""
        return float((self.k_bits.mean() + self.v_bits.mean()) / 2)


def allocate(
    k_losses: Losses,
    v_losses: Losses,
    bits: float,
    max_profiles: int = MAX_PROFILES,
    blind: npt.NDArray[np.bool_] | None = None,
) -> Allocation:
    """Bits for channels with these losses `[L, H, D]`, at most `bits` per element in the mean.

    Heads where `blind` (`[L, H]`) get none, and `bits` is the mean over the others, of which there
    must be some. Equal costs give equal bits, whatever the machine.

    Raises:
        UserError: `bits` is out of range, or costs are not finite.
    """
    if not 0 < bits <= CLASSES[0]:
        raise UserError(f"bits is {bits}; it must lie above 0 and be {CLASSES[0]} at most")
    both = k_losses, v_losses
    if not all(np.isfinite(loss).all() for losses in both for loss in losses.values()):
        raise UserError("the costs of channels are not finite")
    L, H, D = k_losses[0].shape
    seeing = np.ones((L, H), bool) if blind is None else ~blind
    if not seeing.all():
        max_profiles -= 1  # that of blind heads
    sides = [{kind: loss[seeing] for kind, loss in losses.items()} for losses in both]
    widths = class_widths(D)
    width_bits = widths @ np.array(CLASSES)
    costs = [side_costs(side, widths) for side in sides]  # [heads, widths] each
    pairs = useful_pairs(costs, width_bits)
    total = costs[0][:, pairs[:, 0]] + costs[1][:, pairs[:, 1]]  # [heads, pairs]
    sizes = width_bits[pairs].sum(axis=1)  # [pairs]
    chosen = choose(total, sizes, int(bits * 2 * seeing.sum() * D), max_profiles)
    k_bits, v_bits = np.zeros((2, L, H, D), np.uint8)
    for i, of_side in enumerate((k_bits, v_bits)):
        of_side[seeing] = spread(sides[i][0], widths[pairs[chosen, i]])
    return Allocation(k_bits, v_bits)


def class_widths(head_dim: int) -> npt.NDArray[np.int64]:
    """All numbers of channels of each class that a head can have, `[n, classes]`."""
    counts = map(class_counts, CLASSES)
    return np.array([row for row in itertools.product(*counts) if sum(row) <= head_dim])


def by_variance(cost: Array) -> Losses:
    """Losses of channels that are normally distributed, from what it costs to know their means
    alone.
    """
    return {0: cost} | {kind: cost * share for kind, share in LEFT.items()}


def left_of(losses: Losses, bits: BitsArray) -> Array:
    """What channels `[L, H, D]` cost that have these bits."""
    return np.choose(
        np.searchsorted(sorted(losses), bits), [losses[kind] for kind in sorted(losses)]
    )


def side_costs(losses: Losses, widths: npt.NDArray[np.int64]) -> Array:
    """What each head's K or V costs with each widths, `[heads, n]`: the dearest get most bits."""
    down = dearest_first(losses[0])
    ends = widths.cumsum(axis=-1)

    def sums(kind: int) -> Array:
        ordered = np.take_along_axis(losses[kind], down, axis=-1)
        return np.concatenate([np.zeros((len(down), 1)), ordered.cumsum(axis=-1)], axis=-1)

    without = sums(0)
    left = without[:, -1:] - without[:, ends[:, -1]]
    for i, kind in enumerate(CLASSES):
        of_class = sums(kind)
        left = left + of_class[:, ends[:, i]] - of_class[:, ends[:, i] - widths[:, i]]
    return left


def dearest_first(cost: Array) -> npt.NDArray[np.int64]:
    """The channels `[..., D]` of each head in the order in which they get bits."""
    return np.argsort(-cost, axis=-1, kind="stable")


def useful_pairs(costs: list[Array], width_bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Pairs of widths of K and V that may be worth something, `[n, 2]`.

    Left out are widths that some head's others beat at every price; heads of 256 channels have so
    many that all pairs would not fit.
    """
    lists = []
    for cost in costs:
        useful = {int(width_bits.argmin())}
        for head in cost:
            useful.update(_hull(head, width_bits))
        lists.append(sorted(useful))
    return np.array(list(itertools.product(*lists)))


def choose(
    cost: Array, sizes: npt.NDArray[np.int64], budget: int, max_profiles: int
) -> npt.NDArray[np.int64]:
    """A profile for each head, `[heads]`, few in all and within `budget` bits at little `cost`.

    `cost` is `[heads, profiles]`; `sizes` are the bits of a head with each profile.
    """
    heads = np.arange(len(cost))
    highest = float(cost.max())
    price = _price(
        lambda at: _bits(cost, sizes, _profiles(cost, sizes, at, max_profiles), at), highest, budget
    )
    profiles = _profiles(cost, sizes, price, max_profiles)
    price = _price(lambda at: _bits(cost, sizes, profiles, at), highest, budget)
    rows = cost[:, profiles]
    picked = (rows + price * sizes[profiles]).argmin(axis=1)
    left = budget - int(sizes[profiles][picked].sum())
    while True:
        gain = rows[heads, picked][:, None] - rows  # [heads, profiles chosen]
        more = sizes[profiles][None, :] - sizes[profiles][picked][:, None]
        fits = (more > 0) & (more <= left) & (gain > 0)
        if not fits.any():
            return np.asarray(profiles[picked])
        rate = np.where(fits, gain / np.maximum(more, 1), -1.0)
        head, profile = np.unravel_index(rate.argmax(), rate.shape)
        left -= int(more[head, profile])
        picked[head] = profile


def _price(bits_at: Callable[[float], int], highest: float, budget: int) -> float:
    """The lowest price at which `bits_at` stays within the budget.

    At the highest, a bit costs as much as a head, so that nobody wants any.
    """
    high = math.log(max(highest, 1e-250))
    low = high - 50
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if bits_at(math.exp(middle)) > budget else (low, middle)
    return math.exp(high)


def _bits(
    cost: Array, sizes: npt.NDArray[np.int64], profiles: npt.NDArray[np.int64], price: float
) -> int:
    """Bits of all heads where each takes the best of the profiles at a price."""
    picked = (cost[:, profiles] + price * sizes[profiles]).argmin(axis=1)
    return int(sizes[profiles][picked].sum())


def _profiles(
    cost: Array, sizes: npt.NDArray[np.int64], price: float, max_profiles: int
) -> npt.NDArray[np.int64]:
    """The best few profiles at a price."""
    priced = cost + price * sizes
    profiles: list[int] = []
    best = np.full(len(cost), np.inf)
    while len(profiles) < max_profiles:
        sums = np.minimum(best[:, None], priced).sum(axis=0)
        pick = int(sums.argmin())
        if profiles and not sums[pick] < best.sum():
            break
        profiles.append(pick)
        best = np.minimum(best, priced[:, pick])
    for _ in range(_EXCHANGES):
        before = list(profiles)
        for i in range(len(profiles)):
            others = profiles[:i] + profiles[i + 1 :]
            rest = priced[:, others].min(axis=1) if others else np.full(len(cost), np.inf)
            sums = np.minimum(rest[:, None], priced).sum(axis=0)
            pick = int(sums.argmin())
            if sums[pick] < sums[profiles[i]]:
                profiles[i] = pick
        if profiles == before:
            break
    return np.array(sorted(set(profiles)))


def _hull(cost: Array, sizes: npt.NDArray[np.int64]) -> list[int]:
    """Indices of the points that are cheapest at some price: the lower convex hull."""
    hull: list[int] = []
    for i in np.lexsort((cost, sizes)):
        if hull and cost[i] >= cost[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (cost[a] - cost[b]) * (sizes[i] - sizes[b]) > (cost[b] - cost[i]) * (
                sizes[b] - sizes[a]
            ):
                break
            hull.pop()
        hull.append(int(i))
    return hull


def spread(cost: Array, widths: npt.NDArray[np.int64]) -> BitsArray:
    """Bits `[heads, D]` of channels with these costs, where heads have these class widths."""
    rank = np.argsort(dearest_first(cost), axis=-1)
    bits = np.zeros(cost.shape, np.uint8)
    ends = widths.cumsum(axis=-1)
    for i in reversed(range(len(CLASSES))):
        bits[rank < ends[:, i : i + 1]] = CLASSES[i]
    return bits
