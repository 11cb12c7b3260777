"""What the prefix cache gets and gives where prompts are read exactly: pages of prompts, and not of
answers; and what responses say of it. For vLLM 0.32 and 0.33.

Goes when a cache spec can say which pages are not to be found.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request


_PROMPTS_ONLY = "_leank_prompts_only"


def share_prompts_only(block_pool: "BlockPool") -> None:
    """Keep answers out of the prefix cache of `block_pool`, in all groups of layers: of a request
    only the pages of its prompt, less the last token's, are offered and found.
    """
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    setattr(block_pool, _PROMPTS_ONLY, True)
    if "_leank_hooked" in KVCacheCoordinator.__dict__:
        return
    cache_blocks = KVCacheCoordinator.cache_blocks
    get_computed_blocks = KVCacheManager.get_computed_blocks

    @functools.wraps(cache_blocks)
    def cache_prompt_blocks(self: Any, request: "Request", num_computed_tokens: int) -> None:
        if hasattr(self.block_pool, _PROMPTS_ONLY):
            if request.num_computed_tokens >= request.num_prompt_tokens:
                return  # the step that completed the prompt has offered all there is
            num_computed_tokens = min(num_computed_tokens, request.num_prompt_tokens - 1)
        cache_blocks(self, request, num_computed_tokens)

    @functools.wraps(get_computed_blocks)
    def get_prompt_blocks(self: Any, request: "Request", *args: Any, **kwargs: Any) -> Any:
        # 0.33 gives the longest hit as well.
        if not hasattr(self.block_pool, _PROMPTS_ONLY):
            return get_computed_blocks(self, request, *args, **kwargs)
        with _hashes_of_prompt(request, self.block_pool.hash_block_size):
            return get_computed_blocks(self, request, *args, **kwargs)

    KVCacheCoordinator.cache_blocks = cache_prompt_blocks
    KVCacheManager.get_computed_blocks = get_prompt_blocks
    KVCacheCoordinator._leank_hooked = True


def count_without_archive(archive_manager: type) -> None:
    """Leave pages of an `archive_manager` out of what responses say was cached: there are fewer of
    them, as they hold far tokens alone.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    if "_leank_hooked" in KVCacheManager.__dict__:
        return
    estimate_cached_tokens = KVCacheManager.estimate_cached_tokens

    @functools.wraps(estimate_cached_tokens)
    def count_dense_tokens(self: Any, request: "Request") -> int:
        managers = self.coordinator.single_type_managers
        if not any(isinstance(one, archive_manager) for one in managers):
            return estimate_cached_tokens(self, request)
        groups = zip(managers, self.get_blocks(request.request_id).blocks, strict=True)
        return min(
            max((block.block_hash_num_tokens or 0 for block in blocks), default=0)
            for manager, blocks in groups
            if not isinstance(manager, archive_manager)
        )

    KVCacheManager.estimate_cached_tokens = count_dense_tokens
    KVCacheManager._leank_hooked = True


@contextmanager
def _hashes_of_prompt(request: "Request", block_size: int) -> Iterator[None]:
    """Have vLLM look up a prompt alone. A preempted request asks with the tokens that it has
    generated; within this it has the hashes of its prompt only, less the last token. Afterwards it
    has all again: they are vLLM's, which adds to them as answers grow.
    """
    hashes = request.block_hashes
    if request.num_tokens > request.num_prompt_tokens:
        request.block_hashes = hashes[: (request.num_prompt_tokens - 1) // block_size]
    try:
        yield
    finally:
        request.block_hashes = hashes
