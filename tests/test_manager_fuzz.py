"""Random histories of the block managers, and that the histories find planted faults."""

import os

import pytest
from manager_fuzz import History
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_leank import managers
from vllm_leank.window import STEP, Window

EVENTS = 150
SEEDS = int(os.environ.get("LEANK_FUZZ_SEEDS", "24"))
"""More than a test run needs: 700 seeds are 100,000 events and take some minutes."""


def play(seeds):
    """Play histories; how often each kind of event happened."""
    counts = {}
    for seed in seeds:
        history = History(seed)
        history.run(EVENTS)
        for name, count in history.counts.items():
            counts[name] = counts.get(name, 0) + count
    return counts


def test_every_read_finds_what_was_written_for_it():
    counts = play(range(SEEDS))
    # The histories are worth something: each kind of event happened, often.
    assert min(counts.values()) >= SEEDS, counts


def frees_a_page_too_many(monkeypatch):
    free = Window.free_tokens

    def early(self, processed, exact_until):
        tokens = free(self, processed, exact_until)
        return range(tokens.start, tokens.stop + STEP, STEP) if tokens else tokens

    monkeypatch.setattr(Window, "free_tokens", early)


def frees_the_prompt_while_it_is_computed(monkeypatch):
    monkeypatch.setattr(
        Window,
        "free_tokens",
        lambda self, processed, exact_until: range(self.sink, self.boundary(processed), STEP),
    )


def archives_a_page_too_few(monkeypatch):
    archived = Window.archived
    monkeypatch.setattr(
        Window, "archived", lambda self, length: max(archived(self, length) - STEP, 0)
    )


def finds_answers_in_the_prefix_cache(monkeypatch):
    monkeypatch.setattr(
        managers.ExactWindowManager, "cache_blocks", FullAttentionManager.cache_blocks
    )


def looks_up_answers_after_a_preemption(monkeypatch):
    monkeypatch.setattr(managers, "limit_block_hashes", lambda request, count: None)


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
        frees_the_prompt_while_it_is_computed,
        archives_a_page_too_few,
        finds_answers_in_the_prefix_cache,
        looks_up_answers_after_a_preemption,
        shares_the_page_in_which_the_prompt_ends,
        leaks_when_a_request_ends,
    ],
)
def test_a_planted_fault_is_found(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        play(range(40))
