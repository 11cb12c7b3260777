"""The archives that `kl.py` calibrates, and all groups of what it compares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import transformers
from baselines.directions import (
    DirectionArchive,
    Directions,
    best_directions,
    measure_directions,
)
from baselines.rounded_cache import MODEL_BYTES
from baselines.sensitivities import Sensitivities, sensitivities
from baselines.uniform_energy import uniform_energy

from real.caches import OTHERS, RATIO, Variant, caches_of_group, served_mask
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.bits import BitsArray
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.select_channels import select_channels
from vllm_leank.offline.allocate import Allocation, allocate, by_variance
from vllm_leank.offline.archive import StaticArchive
from vllm_leank.offline.calibrate_bits import Measured, measure, pruned_mask
from vllm_leank.offline.calibration_prompts import CalibrationPrompts
from vllm_leank.offline.context import Context, read_prompt
from vllm_leank.offline.mask_request import BitsRequest, MaskRequest
from vllm_leank.offline.rope import NO_ROTATION, Rotation, rotation_of_model
from vllm_leank.offline.served_archive import ServedArchive
from vllm_leank.offline.simulate import SimulatedArchive
from vllm_leank.offline.statistics import ChannelStatistics, StatisticsMeter
from vllm_leank.offline.weigh_layers import weighed_mask

ALIGN = 32


@dataclass(frozen=True)
class Archives:
    """leank's archives for a model, calibrated once, on `prompts`, when the first is asked for."""

    checkpoint: Checkpoint
    model: transformers.PreTrainedModel
    window: Window
    prompts: CalibrationPrompts
    seed: int
    _found: dict[bool, Directions] = field(default_factory=dict)
    _masks: dict[float, Mask] = field(default_factory=dict)

    @cached_property
    def measured(self) -> Measured:
        """What `leank mask calibrate` measures."""
        return measure(self.model, self.prompts, self.window, self.seed)

    @cached_property
    def _sensitivities(self) -> Sensitivities:
        """Of single channels."""
        return sensitivities(self.model, self.prompts.ids, self.window, seed=self.seed)

    def packed(self, bits: float) -> Variant:
        """What `leank mask calibrate --bits` makes."""
        return served_mask(f"leank packed, {bits:g} bits", self._mask_of_bits(bits), self.window)

    def packed_seen_as_one(self, bits: float) -> Variant:
        """The same, and heads without bits see all far tokens as one."""
        return self._as_one(self.packed(bits), self._mask_of_bits(bits))

    def _mask_of_bits(self, bits: float) -> Mask:
        if bits not in self._masks:
            request = BitsRequest(self.checkpoint, bits, self.window)
            self._masks[bits] = weighed_mask(request, self.measured, self.model, self.prompts.ids)
        return self._masks[bits]

    def pruned(self) -> Variant:
        """What `leank mask calibrate --ratio` makes: channels that are not kept read as means."""
        return served_mask("leank 70% pruned, means", self._pruned_mask, self.window)

    def pruned_seen_as_one(self) -> Variant:
        """The same, and heads without channels see all far tokens as one."""
        return self._as_one(self.pruned(), self._pruned_mask)

    def with_zeros(self) -> Variant:
        """Channels that are not kept read as 0, and chosen by what that costs, as LeanK has it."""
        cost = self._sensitivities.key * self.measured.statistics.k_square
        mask = self._pruning.mask(cost, self.measured.provenance)
        return served_mask("leank 70% pruned, zeros", mask, self.window)

    @property
    def _pruning(self) -> MaskRequest:
        return MaskRequest(self.checkpoint, RATIO, ALIGN, self.window)

    @cached_property
    def _pruned_mask(self) -> Mask:
        return pruned_mask(self._pruning, self.measured)

    def _as_one(self, variant: Variant, mask: Mask) -> Variant:
        """A variant whose blind heads see far tokens, all as the means of K and V: so many equal
        tokens are one whose logit is larger by the logarithm of their number.
        """
        archive = MeansOfBlind(ServedArchive(mask), self.measured.statistics)
        name = f"{variant.name}, heads without any see one token"
        return replace(variant, name=name, hook=SimulatedArchive(self.window, archive), mask=None)

    def uniform_bits(self, bits: int) -> Variant:
        """As many bits for each channel of K and V, a class of codes."""
        chosen = Allocation(*(np.full(self.checkpoint.geometry.shape, bits, np.uint8),) * 2)
        request = BitsRequest(self.checkpoint, bits, self.window)
        mask = request.mask(chosen, self.measured.for_codes(chosen), self.measured.told())
        return served_mask(f"{bits} bits everywhere", mask, self.window)

    def uniform_pruned(self) -> Variant:
        """Pruned, with means, as many channels in each head: those that cost most."""
        keep = uniform_energy(self.measured.k_losses[0], RATIO)
        k_bits = np.where(keep, 16, 0).astype(np.uint8)
        name = f"{RATIO:.0%} of K pruned, as many in each head"
        return self._of_channels(name, k_bits, self.measured.statistics, None)

    def with_all_values(self) -> Variant:
        """Pruned, with means, and V of all heads, so that no head is blind."""
        return self._with_values("means", self.measured.statistics, None)

    def with_turned_means(self) -> Variant:
        """The same with means of K before RoPE, turned to the middle of each page of 128 tokens.

        Means after RoPE where it is not known how the model turns K.
        """
        rotation = rotation_of_model(self.model)
        meter = StatisticsMeter(self.checkpoint.geometry, rotation)
        context = Context(self.checkpoint.geometry)
        for ids in self.prompts.ids:
            read_prompt(self.model, context, ids, 4096)
            far = slice(self.window.sink, self.window.boundary(len(ids)))
            for layer in range(len(self.checkpoint.geometry.layers)):
                key, value = context.key(layer)[:, :, far], context.value(layer)[:, :, far]
                meter(layer, self.window.sink, key, value)
        return self._with_values("means before RoPE", meter.statistics(), rotation)

    def low_rank(self, before_rope: bool) -> Variant:
        """As many numbers of K as 1.5x leaves, along the best directions; V as it is."""
        found = self._directions(before_rope)
        k_bits = best_directions(found.cost, 1 / 3)
        return self._along(found, k_bits, np.full_like(k_bits, 16), "a third of the directions")

    def direction_bits(self, bits: float, before_rope: bool) -> Variant:
        """Bits per direction of K and per channel of V, in one budget; V scaled per token."""
        found = self._directions(before_rope)
        chosen = allocate(by_variance(found.cost), self.measured.v_losses, bits)
        return self._along(found, chosen.k_bits, chosen.v_bits, f"{bits:g} bits")

    def _directions(self, before_rope: bool) -> Directions:
        if before_rope not in self._found:
            rotation = rotation_of_model(self.model) if before_rope else NO_ROTATION
            if rotation is None:
                raise UserError("it is not known how the model turns K")
            self._found[before_rope] = measure_directions(
                self.model, self.prompts.ids, self.window, rotation, self.seed
            )
        return self._found[before_rope]

    def _along(self, found: Directions, k_bits: BitsArray, v_bits: BitsArray, name: str) -> Variant:
        values = StaticArchive(k_bits, v_bits, self.measured.statistics, None, v_token_scale=True)
        scales = ((v_bits > 0) & (v_bits < 16)).any(-1).sum() * MODEL_BYTES
        blind = torch.tensor(~(k_bits.any(-1) | v_bits.any(-1)))
        when = "after" if found.rotation is NO_ROTATION else "before"
        return Variant(
            f"directions {when} RoPE, {name}",
            SimulatedArchive(self.window, DirectionArchive(found, k_bits, values), blind),
            float(k_bits.sum() + v_bits.sum()) / 8 + float(scales),
            self.window.sink + self.window.recent,
            {"blind_heads": int(blind.sum())},
        )

    def _with_values(
        self, means: str, statistics: ChannelStatistics, rotation: Rotation | None
    ) -> Variant:
        """What no engine has: kept channels of K, means of the others, and V of all heads."""
        costs = self._sensitivities.key * statistics.k_scale**2
        k_bits = np.where(select_channels(costs, RATIO, ALIGN), 16, 0).astype(np.uint8)
        name = f"leank 70% pruned, {means}, V of all heads"
        return self._of_channels(name, k_bits, statistics, rotation)

    def _of_channels(
        self, name: str, k_bits: BitsArray, statistics: ChannelStatistics, rotation: Rotation | None
    ) -> Variant:
        archive = StaticArchive(k_bits, np.full_like(k_bits, 16), statistics, rotation)
        return Variant(
            name,
            SimulatedArchive(self.window, archive),
            float((k_bits > 0).sum() + k_bits.size) * MODEL_BYTES,
            self.window.sink + self.window.recent,
            {"before_rope": statistics.before_rope},
        )


@dataclass(frozen=True)
class MeansOfBlind:
    """A mask's archive, but for heads that store nothing, whose far K and V are their means."""

    served: ServedArchive
    statistics: ChannelStatistics

    def __call__(
        self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[B, H, T, D]` of the tokens from `first` on, in fp32."""
        blind = self.served.blind[layer]
        found = self.served(layer, first, key, value)
        for far, mean in zip(found, (self.statistics.k_mean, self.statistics.v_mean), strict=True):
            means = torch.tensor(mean[layer], dtype=far.dtype, device=far.device)[:, None]
            far[:, blind] = means[blind.to(far.device)].expand(-1, far.shape[2], -1)
        return found


def variants_of(
    archives: Archives, bits: Sequence[float], groups: Sequence[str]
) -> Iterator[Variant]:
    """The variants of the named `groups`, those of `GROUPS`; caches of others come last."""
    for group in groups:
        if group == "packed":
            yield from (archives.packed(one) for one in bits)
        elif group == "pruned":
            yield archives.pruned()
            yield archives.with_zeros()
            yield archives.with_all_values()
        elif group == "one":
            yield archives.pruned_seen_as_one()
            yield from (archives.packed_seen_as_one(one) for one in bits)
        elif group == "uniform":
            yield archives.uniform_pruned()
            yield from (archives.uniform_bits(one) for one in (4, 2))
        elif group == "turned":
            yield archives.with_turned_means()
        elif group == "directions":
            for before_rope in (False, True):
                yield archives.low_rank(before_rope)
                yield from (archives.direction_bits(one, before_rope) for one in bits)
    for group in groups:
        if group in OTHERS:
            yield from caches_of_group(group, archives.checkpoint.geometry, archives.window)


GROUPS = "packed", "pruned", "one", "uniform", "turned", "directions", *OTHERS
