"""KV caches that are compared, with the bytes of a token: archives of masks, and others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from baselines.ends_whole import EndsWhole
from baselines.kitty import Kitty
from baselines.kivi import Kivi
from baselines.once_per_prompt import OncePerPrompt
from baselines.rounded_cache import MODEL_BYTES, CacheHook, RoundedCache
from baselines.think import PrunedByThinK
from baselines.unrounded import Unrounded
from baselines.vllm_fp8 import VllmFp8

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.pages import archive_token_bytes
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import choose_format
from vllm_leank.offline.attention_hook import AttentionHook
from vllm_leank.offline.context import Context
from vllm_leank.offline.served_archive import ServedArchive
from vllm_leank.offline.simulate import SimulatedArchive

RATIO = 0.7
"""Share of the K channels that is pruned."""

TURBOQUANT = "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"

OTHERS = "think", "vllm", "kivi", "kitty", "floor"
"""Groups of caches that are not leank's, and need nothing but the model's shape."""


@dataclass(frozen=True)
class Variant:
    """An archive or cache.

    Attributes:
        name: what tables call it.
        hook: attention that reads it.
        token_bytes: bytes over all layers of a token that it stores, with all scales.
        exact_tokens: tokens of a request that are not in it but as they were; a few more come and
            go with the request's length.
        detail: what else is worth telling.
        begin: called for each prompt with the model, the context that has read it, and the prompt;
            None: there is nothing to do.
        end: to be called when a prompt's answer is done, where far tokens are rounded once.
        mask: the mask whose archive it is, if it is one's.
    """

    name: str
    hook: AttentionHook
    token_bytes: float
    exact_tokens: int
    detail: dict[str, Any] = field(default_factory=dict)
    begin: Callable[[transformers.PreTrainedModel, Context, Sequence[int]], None] | None = None
    end: Callable[[], None] | None = None
    mask: Mask | None = None


def load_masks(paths: Sequence[Path], checkpoint: Checkpoint) -> dict[str, Mask]:
    """Masks of a model by the names of their files.

    Raises:
        UserError: a file is no mask, or of another model, or has the name of another.
    """
    masks: dict[str, Mask] = {}
    for path in paths:
        if path.stem in masks:
            raise UserError(f"--masks names {path.stem} twice; rename the file")
        masks[path.stem] = load_mask(path)
    for name, mask in masks.items():
        if mask.geometry.shape != checkpoint.geometry.shape:
            raise UserError(f"mask {name}: made for another model, {mask.model}")
    return masks


def served_mask(name: str, mask: Mask, window: Window, once: bool = False) -> Variant:
    """A mask's archive, as engines store and read it. Where `once`, a prompt's far tokens are
    rounded once and kept, for answers that are computed token by token.
    """
    served = ServedArchive(mask)
    kept = OncePerPrompt(served)
    return Variant(
        name,
        SimulatedArchive(window, kept if once else served, served.blind),
        mask_token_bytes(mask),
        window.sink + window.recent,
        {
            "format": served.archive_format.name,
            "sha256": mask.sha256,
            "bits": round(float(mask.k_bits.mean() + mask.v_bits.mean()) / 2, 4),
            "profiles": len({head for heads in mask.profiles for head in heads if head.stores}),
            "blind_heads": int(served.blind.sum()),
        },
        end=kept.forget if once else None,
        mask=mask,
    )


def mask_token_bytes(mask: Mask) -> float:
    """Bytes of a far token over all layers, with all scales."""
    form = choose_format(mask)
    return float(sum(archive_token_bytes(heads, MODEL_BYTES, form) for heads in mask.profiles))


def check_groups(groups: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse words of `--variants`.

    Raises:
        UserError: a group is unknown, or named twice.
    """
    if unknown := set(groups) - set(allowed):
        raise UserError(f"--variants has {sorted(unknown)}; allowed: {', '.join(allowed)}")
    if len(set(groups)) < len(groups):
        raise UserError("--variants names a group twice")


def caches_of_group(
    group: str, geometry: Geometry, window: Window, once: bool = False
) -> list[Variant]:
    """Those of a group of `OTHERS`. `window` is of what has none of its own; `once` is that of
    `served_mask`.
    """
    if group == "think":
        return [think(geometry, window)]
    caches: dict[str, Callable[[], list[RoundedCache]]] = {
        "vllm": lambda: vllm_caches(len(geometry.layers)),
        "kivi": lambda: [Kivi(4), Kivi(2)],
        "kitty": lambda: [Kitty()],
        "floor": lambda: [Unrounded()],
    }
    return [rounded_cache(cache, geometry, once) for cache in caches[group]()]


def rounded_cache(cache: RoundedCache, geometry: Geometry, once: bool) -> Variant:
    """A cache of somebody else."""
    hook = CacheHook(cache, once)
    return Variant(
        cache.name,
        hook,
        cache.token_bytes(geometry),
        cache.sink + cache.residual,
        end=hook.forget if once else None,
    )


def think(geometry: Geometry, window: Window) -> Variant:
    """ThinK: as many channels in each head, chosen for each prompt; the others read as 0."""
    layers, heads, dim = geometry.shape
    kept = round((1 - RATIO) * dim)
    hook = PrunedByThinK(window, RATIO)
    return Variant(
        f"ThinK, {RATIO:.0%} of K pruned",
        hook,
        float(layers * heads * (kept + dim) * MODEL_BYTES),
        window.sink + window.recent,
        begin=hook.begin,
    )


def vllm_caches(num_layers: int) -> list[RoundedCache]:
    """vLLM's own caches. Some are made of its code, which is imported here as it takes seconds."""
    from baselines.vllm_int4 import VllmInt4
    from baselines.vllm_turboquant import VllmTurboQuant

    whole = VllmFp8(), VllmInt4()
    presets = map(VllmTurboQuant, TURBOQUANT)
    return [
        *whole,
        *(EndsWhole(cache, num_layers) for cache in whole),
        *(EndsWhole(cache, num_layers, cache.name) for cache in presets),
    ]
