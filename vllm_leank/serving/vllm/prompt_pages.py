"""Offers pages of prompts to the prefix cache, but not of answers. For vLLM 0.32 and 0.33.

Goes when a cache spec can say which pages are not to be found.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request


def share_prompts_only(window_manager: type) -> None:
    """Have a coordinator with a manager of this class offer the pages of prompts alone, less their
    last tokens, whatever the group of layers.

    A request then keeps no other block hashes: they are what vLLM looks up in the prefix cache when
    a preempted request starts again, with the tokens it has generated.
    """
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

    if "_leank_hooked" in KVCacheCoordinator.__dict__:
        return
    cache_blocks = KVCacheCoordinator.cache_blocks

    @functools.wraps(cache_blocks)
    def cache_prompt_blocks(self: Any, request: "Request", num_computed_tokens: int) -> None:
        if any(isinstance(one, window_manager) for one in self.single_type_managers):
            tokens = request.num_prompt_tokens - 1
            num_computed_tokens = min(num_computed_tokens, tokens)
            _keep_block_hashes(request, tokens // self.block_pool.hash_block_size)
        cache_blocks(self, request, num_computed_tokens)

    KVCacheCoordinator.cache_blocks = cache_prompt_blocks
    KVCacheCoordinator._leank_hooked = True


def _keep_block_hashes(request: "Request", count: int) -> None:
    """Keep the first `count` block hashes of a request, and have it make no more."""
    assert hasattr(request, "_block_hasher"), "vLLM renamed Request._block_hasher"
    request._block_hasher = None
    del request.block_hashes[count:]
