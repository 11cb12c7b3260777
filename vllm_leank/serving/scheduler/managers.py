"""Who holds which blocks: the scheduler's managers of the archive and the window group.

Those that begin with Exact serve where prompts are read with full attention; `pruned_managers` has
those for prompts that are read as answers are.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.serving.scheduler.specs import LeanKSpec
from vllm_leank.serving.scheduler.usage import Usage
from vllm_leank.serving.vllm.prompt_pages import count_without_archive, share_prompts_only
from vllm_leank.serving.vllm.statistics import hook_statistics


class LeanKManager(FullAttentionManager):
    """What the managers of both groups share: the window rule, and that there are two groups.

    Raises:
        RuntimeError: vLLM split the layers in a way that would waste most of the memory.
    """

    def __init__(self, kv_cache_spec: LeanKSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._window = kv_cache_spec.window
        self._record_new_block_ids &= self._reads_unwritten
        # The managers of one coordinator have the same pool.
        groups = self.block_pool.__dict__.setdefault("_leank_groups", {})
        groups[self.kv_cache_group_id] = self.block_size
        if len(groups) > 2:
            raise RuntimeError(
                "vLLM split leank's cache into more than two groups, which would waste most of it; "
                "please report this with the mask file and the model's config"
            )

    @property
    def _reads_unwritten(self) -> bool:
        """Whether attention loads slots that were never written, so that blocks must be zeroed."""
        return False


class ArchiveManager(LeanKManager):
    """Gives a request archive pages for its archived tokens, not for the dense ones.

    vLLM asks for every request in every step, and with a hundred of them the host may take longer
    for a step than the device. Most need no page: their boundaries say so at once.

    Attributes:
        compacted: tokens that were given a place in the archive so far, for `/metrics`.
    """

    def __init__(self, kv_cache_spec: LeanKSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.compacted = 0
        self._boundaries: dict[str, int] = {}
        # Here, since there are managers in the scheduler's process alone.
        hook_statistics(ArchiveManager, Usage)
        count_without_archive(ArchiveManager)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **kwargs: Any,
    ) -> int:
        """Blocks that `num_tokens` tokens need beyond those held; see the base class."""
        if self._holds_enough(request_id, num_tokens):
            return 0
        return super().get_num_blocks_to_allocate(
            request_id,
            self._window.archived(num_tokens),
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            **kwargs,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate what `num_tokens` tokens need; see the base class."""
        if self._holds_enough(request_id, num_tokens):
            return []
        before = self._boundaries.get(request_id, self._window.sink)
        boundary = max(before, self._window.boundary(num_tokens_main_model))
        self._boundaries[request_id] = boundary
        self.compacted += boundary - before
        return super().allocate_new_blocks(
            request_id, self._window.archived(num_tokens), num_tokens_main_model
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request that ends or is preempted; see the base class."""
        self._boundaries.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _holds_enough(self, request_id: str, num_tokens: int) -> bool:
        """Whether a request's boundary is where it was when it last got pages."""
        boundary = self._boundaries.get(request_id)
        return boundary is not None and num_tokens < self._window.moves_at(boundary)

    def _offer(self, request: Request, tokens: int) -> None:
        """Offer the pages that the first `tokens` archive slots of a request fill to others."""
        blocks = self.req_to_blocks[request.request_id]
        held = self.num_cached_block.get(request.request_id, 0)
        full = min(tokens // self.block_size, len(blocks))
        if held >= full:
            return
        self.block_pool.cache_full_blocks(
            request,
            blocks,
            held,
            full,
            self.block_size,
            self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = full


class ExactArchiveManager(ArchiveManager):
    """Lets requests with the same beginning share archive pages while one of them runs.

    Each of these fills the shared pages itself, in the step that completes its prompt and before it
    reads them. All write the same, since prompts are computed exactly, but for rounding where a
    prompt was computed twice.
    """

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: LeanKSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Pages of running requests that begin with the same prompt, as many as there are.

        They never limit a hit, as a prompt is read from dense pages: its length is that of the
        dense pages. It is no longer than that, since vLLM takes the longest hit of all groups for a
        prefix that prompts share, and has sliding layers keep their pages at its end. The page in
        which compaction of the prompt ends is not among those found, since what lies behind the end
        is this request's own.
        """
        # All but the last token may be found; a request that starts again asks with its answer,
        # but comes with hashes of its prompt alone.
        prompt = min(max_length + 1, len(block_hashes) * block_pool.hash_block_size)
        blocks, _ = super().find_longest_cache_hit(
            block_hashes,
            kv_cache_spec.window.archived(prompt),
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )
        return blocks, cls._dense_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kwargs["alignment_tokens"]
        )

    @staticmethod
    def _dense_hit(
        block_hashes: BlockHashList,
        max_length: int,
        archive_groups: Sequence[int],
        block_pool: BlockPool,
        alignment: int,
    ) -> int:
        """Tokens whose dense pages are in the prefix cache: a multiple of `alignment`."""
        ((group, block),) = (
            (group, block)
            for group, block in block_pool._leank_groups.items()
            if group not in archive_groups
        )
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, block)
        pages = min(max_length // block, len(hashes))
        absent = (
            page for page in range(pages) if not block_pool.get_cached_block(hashes[page], [group])
        )
        return next(absent, pages) * block // alignment * alignment

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Let others share the pages that compaction of the request's prompt fills."""
        self._offer(request, self._window.archived(request.num_prompt_tokens))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request that ends or is preempted; see the base class.

        Pages that nobody else shares are not kept for later prompts: without the dense pages, which
        were freed long before, they would only take room from others.
        """
        blocks = super().pop_blocks_for_free(request_id)
        self.block_pool.evict_blocks(
            {block.block_id for block in blocks if block.block_hash and block.ref_cnt == 1}
        )
        return blocks


class WindowManager(LeanKManager):
    """Frees the dense middle of a request: where prompts are read exactly, once its prompt is
    done.
    """

    def __init__(self, kv_cache_spec: LeanKSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # Tokens of a request before which no more of its pages are free.
        self._frees_at: dict[str, int] = {}

    @property
    def _reads_unwritten(self) -> bool:
        """FlashAttention 3 loads longer pages by whole tiles, and a weight of 0 is no help against
        a NaN in V where no token is yet. vLLM zeroes blocks beside states, which come with them.
        """
        return self.block_size > LEAST_BLOCK

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the blocks that no later query reads.

        Args:
            request_id: the request.
            processed_computed_tokens: tokens whose step has finished.
            num_prompt_tokens: prompt length; nothing is freed while it is unknown.
        """
        least = self._frees_at.get(request_id, 0)
        if num_prompt_tokens is None or processed_computed_tokens < least:
            return
        exact_until = self._window.exact_until(num_prompt_tokens)
        free = self._window.free_pages(processed_computed_tokens, exact_until, self.block_size)
        self._remove_blocks_in_range(request_id, free.start, free.stop)
        if request_id in self.req_to_blocks:  # one that waits holds none yet
            self._frees_at[request_id] = self._window.frees_at(
                processed_computed_tokens, exact_until
            )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request that ends or is preempted; see the base class."""
        self._frees_at.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class ExactWindowManager(WindowManager):
    """Lets others share the dense pages of a request's prompt, less its last token.

    Pages of generated tokens are never offered to the prefix cache: their K and V were computed
    with the pruned archive, so a prompt that contains the same text must compute its own. A hit
    therefore never changes an answer. So it is with the pages of other layers, which follow from
    these: `share_prompts_only` is for all groups.

    Should a request be preempted and start again, it finds no more there than that, even if
    somebody else's prompt begins with its prompt and its answer: the step that completes the prompt
    fills the archive and is never skipped.
    """

    def __init__(self, kv_cache_spec: LeanKSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        share_prompts_only(self.block_pool)
