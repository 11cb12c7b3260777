"""Random histories of the block managers, and that the histories find planted faults."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from format_samples import format_of
from manager_fuzz import History
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from vllm_leank.core.formats import known_formats
from vllm_leank.core.window import GRANULE, Window
from vllm_leank.serving.scheduler import managers
from vllm_leank.serving.vllm import prompt_pages

EVENTS = 150
SEEDS = int(os.environ.get("LEANK_FUZZ_SEEDS", "24"))
"""More than a test run needs: 700 seeds are 100,000 events and take some minutes."""


def play(seeds, num_blocks=None):
    """Play histories; how often each kind of event happened."""
    counts = {}
    for seed in seeds:
        history = History(seed, num_blocks)
        history.run(EVENTS)
        for name, count in history.counts.items():
            counts[name] = counts.get(name, 0) + count
    return counts


@pytest.mark.parametrize("seeds", [8, pytest.param(SEEDS, marks=pytest.mark.long)])
def test_every_read_finds_what_was_written_for_it(seeds):
    counts = play(range(seeds))
    # The histories are worth something: each kind of event happened, often.
    assert min(counts.values()) >= seeds, counts


def test_every_archive_format_is_played():
    assert {format_of(seed) for seed in range(SEEDS)} == set(known_formats())


def frees_a_page_too_many(monkeypatch):
    free = Window.free_tokens

    def early(self, processed, exact_until):
        tokens = free(self, processed, exact_until)
        return range(tokens.start, tokens.stop + GRANULE, GRANULE) if tokens else tokens

    monkeypatch.setattr(Window, "free_tokens", early)


def frees_the_prompt_while_it_is_computed(monkeypatch):
    monkeypatch.setattr(
        Window,
        "free_tokens",
        lambda self, processed, exact_until: range(self.sink, self.boundary(processed), GRANULE),
    )


def forgets_steps_in_flight(monkeypatch):
    none = property(lambda self: 0, lambda self, count: None)
    monkeypatch.setattr(Request, "num_in_flight_tokens", none, raising=False)


def forgets_that_drafts_were_rejected(monkeypatch):
    """Takes a step that has finished for one that left all its tokens."""
    allocate_slots, scheduled = KVCacheManager.allocate_slots, {}

    def allocate(self, request, tokens, *args, **kwargs):
        computed = request.num_computed_tokens
        rejected = max(scheduled.get(request.request_id, 0) - computed, 0) if computed else 0
        request.num_in_flight_tokens -= rejected
        blocks = allocate_slots(self, request, tokens, *args, **kwargs)
        request.num_in_flight_tokens += rejected
        if blocks is not None:
            scheduled[request.request_id] = computed + tokens
        return blocks

    monkeypatch.setattr(KVCacheManager, "allocate_slots", allocate)


def hands_out_a_block_in_use_when_the_pool_is_full(monkeypatch):
    get_new_blocks = BlockPool.get_new_blocks

    def get(self, count):
        blocks = get_new_blocks(self, count)
        mine = {block.block_id for block in blocks}
        used = [b for b in self.blocks if b.ref_cnt and not b.is_null and b.block_id not in mine]
        if blocks and used and not self.get_num_free_blocks():
            self.free_blocks([blocks.pop()])
            blocks.append(used[0])
            used[0].ref_cnt += 1
        return blocks

    monkeypatch.setattr(BlockPool, "get_new_blocks", get)


def archives_a_page_too_few(monkeypatch):
    archived = Window.archived
    monkeypatch.setattr(
        Window, "archived", lambda self, length: max(archived(self, length) - GRANULE, 0)
    )


def finds_answers_in_the_prefix_cache(monkeypatch):
    prompt_pages.share_prompts_only(SimpleNamespace())  # which hooks, if nobody has yet
    offer_all = KVCacheCoordinator.cache_blocks.__wrapped__
    monkeypatch.setattr(KVCacheCoordinator, "cache_blocks", offer_all)


def looks_up_answers_after_a_preemption(monkeypatch):
    monkeypatch.setattr(prompt_pages, "_hashes_of_prompt", lambda *_: nullcontext())


def shares_the_page_in_which_the_prompt_ends(monkeypatch):
    archived = Window.archived

    def offer(self, request, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(
                Window,
                "archived",
                lambda window, length: (
                    -(-archived(window, length) // self.block_size) * self.block_size
                ),
            )
            cache_blocks(self, request, *args, **kwargs)

    cache_blocks = managers.ExactArchiveManager.cache_blocks
    monkeypatch.setattr(managers.ExactArchiveManager, "cache_blocks", offer)


def leaks_when_a_request_ends(monkeypatch):
    free = managers.WindowManager.free

    def leak(self, request_id):
        blocks = self.req_to_blocks.get(request_id, [])
        if len(blocks) > 3 and not blocks[-1].is_null:
            blocks.pop()
        free(self, request_id)

    monkeypatch.setattr(managers.WindowManager, "free", leak)


@pytest.mark.parametrize(
    "fault",
    [
        frees_a_page_too_many,
        archives_a_page_too_few,
        leaks_when_a_request_ends,
        *(
            pytest.param(fault, marks=pytest.mark.long)
            for fault in (
                frees_the_prompt_while_it_is_computed,
                forgets_steps_in_flight,
                forgets_that_drafts_were_rejected,
                finds_answers_in_the_prefix_cache,
                looks_up_answers_after_a_preemption,
                shares_the_page_in_which_the_prompt_ends,
            )
        ),
    ],
)
def test_a_planted_fault_is_found(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        play(range(40))


@pytest.mark.long
@pytest.mark.parametrize("seeds", [10])
def test_a_fault_of_a_full_pool_is_found_in_small_pools_alone(monkeypatch, seeds):
    hands_out_a_block_in_use_when_the_pool_is_full(monkeypatch)
    play(range(seeds), num_blocks=2048)
    with pytest.raises(AssertionError, match="seed"):
        play(range(40))
