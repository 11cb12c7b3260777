"""Who holds and shares which blocks where prompts are read as answers are.

K and V of a token then depend on the tokens before it and on nothing else, whether it stands in a
prompt or in an answer. So pages of both can be shared, and a prefix can be taken up without its
dense middle: archive pages, the sink and the window before its end are all that is read again.
"""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.request import Request

from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.core.window import Window
from vllm_leank.serving.scheduler.managers import ArchiveManager, LeanKManager, WindowManager
from vllm_leank.serving.scheduler.specs import LeanKSpec, PrunedWindowSpec


class OffersAtOnce(LeanKManager):
    """Offers pages to the prefix cache as soon as they are full.

    vLLM counts what may be offered in the longest pages of all groups. Behind an archive page that
    is longer than what a request holds dense, window pages would be free before they count.
    """

    def __init__(self, kv_cache_spec: LeanKSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # Tokens of a request up to the end of the step at hand.
        self._computed: dict[str, int] = {}

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate what `num_tokens` tokens need; see the base class."""
        self._computed[request_id] = num_tokens_main_model
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request that ends or is preempted; see the base class."""
        self._computed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _computed_of(self, request: Request, num_tokens: int) -> int:
        """Tokens of a request that are computed after this step, without drafts, which may be taken
        back; `num_tokens` where that is not known.
        """
        return min(self._computed.get(request.request_id, num_tokens), request.num_tokens)


class PrunedArchiveManager(OffersAtOnce, ArchiveManager):
    """Offers archive pages to the prefix cache as soon as they are full.

    A prefix that is taken up has whole archive pages. What follows is compacted into pages of the
    request's own; shared ones are never written again.
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
        """The longest prefix whose archive is there; see the base class."""
        window, block = kv_cache_spec.window, kv_cache_spec.block_size
        blocks, found = super().find_longest_cache_hit(
            block_hashes,
            window.archived(max_length),
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )
        # What comes after these pages, as far as it needs no other.
        longest = window.moves_at(max(found, window.sink)) - 1
        length = window.prefix(min(longest, max_length), block)
        for pages in blocks:
            del pages[window.archived(length) // block :]
        return blocks, length

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
        pages = self._taken_up(new_computed_blocks, num_local_computed_tokens)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            pages,
            total_computed_tokens,
            len(pages) * self.block_size,
            num_tokens_main_model,
            **kwargs,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take up the pages of a prefix; see the base class."""
        pages = self._taken_up(new_computed_blocks, num_local_computed_tokens)
        # What was taken up was compacted before.
        self._boundaries[request_id] = self._window.boundary(num_local_computed_tokens)
        super().add_local_computed_blocks(
            request_id, pages, len(pages) * self.block_size, num_external_computed_tokens
        )

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer the pages that compaction of what was computed fills."""
        self._offer(request, self._window.archived(self._computed_of(request, num_tokens)))

    def _taken_up(self, blocks: Sequence[KVCacheBlock], length: int) -> Sequence[KVCacheBlock]:
        """Of the pages found, those of a prefix of `length` tokens: less window may be there."""
        return blocks[: self._window.archived(length) // self.block_size]


class PrunedWindowManager(OffersAtOnce, WindowManager):
    """Offers window pages to the prefix cache, and finds prefixes by those at their ends."""

    def __init__(self, kv_cache_spec: PrunedWindowSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # vLLM asks specs of its own sliding windows alone.
        self.max_admission_blocks_per_request = kv_cache_spec.most_blocks(sys.maxsize)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: PrunedWindowSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix whose sink and whose last tokens, from its boundary on, are there;
        null blocks stand for what is archived.
        """
        window = kv_cache_spec.window
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, LEAST_BLOCK)

        @cache
        def find(page: int) -> list[KVCacheBlock] | None:
            return block_pool.get_cached_block(hashes[page], kv_cache_group_ids)

        length = min(max_length, len(hashes) * LEAST_BLOCK)
        while length := window.prefix(length, kv_cache_spec.archive_block):
            dense = _dense_pages(window, length)
            missing = next((page for page in dense if find(page) is None), None)
            if missing is None:
                break
            # Shorter prefixes need that page, too, unless they end before it.
            length = missing * LEAST_BLOCK
        blocks = tuple(
            [block_pool.null_block] * (length // LEAST_BLOCK) for _ in kv_cache_group_ids
        )
        for page in _dense_pages(window, length):
            for table, block in zip(blocks, find(page) or (), strict=True):
                table[page] = block
        return blocks, length

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer all pages that are full."""
        super().cache_blocks(request, self._computed_of(request, num_tokens), *args, **kwargs)


def _dense_pages(window: Window, length: int) -> list[int]:
    """Window pages that are read behind a prefix of whole pages: its last ones, and its sink."""
    last = range(min(window.boundary(length), length) // LEAST_BLOCK, length // LEAST_BLOCK)
    return [*reversed(last), *range(min(window.sink, length) // LEAST_BLOCK)]
