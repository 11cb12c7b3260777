"""NaN in cache blocks that nobody may read: whoever reads them anyway answers nonsense.

For engines with leank whose scheduler and worker share a process, as they do on one GPU. Their
blocks are written in the order in which steps are launched, on the stream that these run on. So a
step in flight still finds what it was planned with.
"""

import logging
import math
import random
from collections.abc import Iterable
from typing import Any

import torch

LOGGER = logging.getLogger("vllm.leank.poison")
"""In the server's log."""


def cache_memory(vllm_config: Any) -> torch.Tensor:
    """The whole cache of an engine in the model's dtype, `[num_blocks, items of a block]`."""
    layers = vllm_config.compilation_config.static_forward_context
    pages = next(layer.kv_cache for name, layer in layers.items() if name.endswith(".attn"))
    raw = torch.tensor([], dtype=pages.dtype, device=pages.device).set_(pages.untyped_storage())
    return raw.view(pages.shape[0], -1)


def poison(memory: torch.Tensor, blocks: Iterable[Any]) -> list[int]:
    """NaN in those of the blocks that are free and not in the prefix cache; their ids."""
    ids = [
        block.block_id
        for block in blocks
        if block.ref_cnt == 0 and block.block_hash is None and not block.is_null
    ]
    memory[ids] = math.nan
    return ids


def poison_freed_blocks(pool: Any, memory: torch.Tensor) -> list[int]:
    """NaN in blocks the moment they go back to the pool, from now on; their ids."""
    free_blocks = pool.free_blocks
    freed: list[int] = []

    def free(blocks: Iterable[Any]) -> None:
        blocks = list(blocks)
        free_blocks(blocks)
        freed.extend(poison(memory, blocks))

    pool.free_blocks = free
    return freed


def poison_new_blocks(pool: Any, memory: torch.Tensor) -> list[int]:
    """NaN in blocks the moment a request gets them, from now on; their ids. Those of a prefix hit
    stay as they are.
    """
    get_new_blocks = pool.get_new_blocks
    given: list[int] = []

    def get(*args: Any, **kwargs: Any) -> list[Any]:
        blocks: list[Any] = get_new_blocks(*args, **kwargs)
        ids = [block.block_id for block in blocks]
        memory[ids] = math.nan
        given.extend(ids)
        return blocks

    pool.get_new_blocks = get
    return given


def spoil_blocks(pool: Any, memory: torch.Tensor, every: int) -> None:
    """A fault: each `every`-th time that a request gets blocks, one that is held has the bytes of
    another.
    """
    get_new_blocks, calls = pool.get_new_blocks, 0

    def get(*args: Any, **kwargs: Any) -> list[Any]:
        nonlocal calls
        calls += 1
        held = [block.block_id for block in pool.blocks if block.ref_cnt and not block.is_null]
        if calls % every == 0 and len(held) > 1:
            spoiled, other = random.sample(held, 2)
            memory[spoiled] = memory[other]
            LOGGER.info("block %d, which is in use, got the bytes of block %d", spoiled, other)
        blocks: list[Any] = get_new_blocks(*args, **kwargs)
        return blocks

    pool.get_new_blocks = get
