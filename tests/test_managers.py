"""Which blocks a request holds and shares, with vLLM's own block pool and coordinator."""

from dataclasses import replace

import pytest
from archive_definition import plan_of
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.request import Request
from vllm_cache import cache_configs, vllm_config

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.core.window import Window
from vllm_leank.serving.scheduler.managers import ArchiveManager
from vllm_leank.serving.scheduler.specs import WindowSpec

ARCHIVE, WINDOW = 0, 1
MAX_LENGTH = 16384


def expected_boundary(length, window):
    edge = window.sink
    while edge + 32 + window.recent <= length:
        edge += 32
    return edge


class Server:
    """The scheduler's part in a cache: chunks of prompts, decode steps, preemption."""

    def __init__(
        self, window, block=64, num_blocks=2048, caching=True, max_length=MAX_LENGTH,
        archive_format=NATIVE, window_block=LEAST_BLOCK,
    ):  # fmt: skip
        self.window, self.block = window, block
        plan = plan_of([[64, 0], [64, 32]], 128, 2, archive_format=archive_format)
        self.plan = replace(plan, archive_block=block, window_block=window_block)
        memory = self.plan.block_bytes * num_blocks
        config = generate_scheduler_kv_cache_config(
            cache_configs(self.plan, window, memory, max_length)
        )
        options = vllm_config(max_length)
        options.cache_config.enable_prefix_caching = caching
        self.granule, hash_block = resolve_kv_cache_block_sizes(config, options)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(hash_block, sha256)
        self.manager = KVCacheManager(
            config, max_length, self.granule, hash_block, enable_caching=caching
        )

    @property
    def free(self):
        return self.manager.block_pool.get_num_free_blocks()

    def request(self, name, prompt):
        params = SamplingParams(max_tokens=MAX_LENGTH)
        return Request(name, list(prompt), params, None, block_hasher=self._hasher)

    def start(self, request, chunk):
        """Schedule a waiting request; return how many tokens it found in the prefix cache."""
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        chunk = min(chunk, request.num_tokens - hit)
        assert self.manager.allocate_slots(request, chunk, hit, blocks) is not None
        request.num_computed_tokens = hit + chunk
        return hit

    def step(self, request, tokens):
        """Schedule a running request."""
        assert self.manager.allocate_slots(request, tokens) is not None
        request.num_computed_tokens += tokens

    def prefill(self, request, chunk=512):
        """Compute all tokens the request has; return the prefix cache hit."""
        hit = self.start(request, chunk)
        while left := request.num_tokens - request.num_computed_tokens:
            self.step(request, min(chunk, left))
        return hit

    def decode(self, request, tokens):
        for token in tokens:
            request.append_output_token_ids(token)
            self.step(request, 1)

    def preempt(self, request):
        self.manager.free(request)
        request.num_computed_tokens = 0

    def table(self, request, group):
        return self.manager.get_blocks(request.request_id).blocks[group]

    def held(self, request, group):
        """Positions in the block table at which the request holds a block."""
        return {i for i, block in enumerate(self.table(request, group)) if not block.is_null}

    def check(self, request, processed):
        """Blocks after the step that began with `processed` tokens follow the definition."""
        after, prompt = request.num_computed_tokens, request.num_prompt_tokens
        archived = expected_boundary(after, self.window)
        pages = -(-archived // self.block) if archived > self.window.sink else 0
        assert self.held(request, ARCHIVE) == set(range(pages))
        size = self.plan.window_block
        dense = set(range(-(-after // size)))
        if processed >= prompt:
            sink, edge = self.window.sink, expected_boundary(processed, self.window)
            dense -= {page for page in dense if sink <= page * size and (page + 1) * size <= edge}
        assert self.held(request, WINDOW) == dense


WINDOWS = [Window(0, 32), Window(32, 64), Window(64, 256), Window(64, 100)]


@pytest.mark.parametrize("caching", [True, False], ids=["prefix caching", "no prefix caching"])
@pytest.mark.parametrize("block", [32, 64, 96])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    ("prompt", "chunk"), [(1, 512), (31, 512), (640, 100), (1000, 512), (1020, 1000)]
)
def test_a_request_holds_what_the_rule_says_at_every_step(prompt, chunk, window, block, caching):
    server = Server(window, block, caching=caching)
    free = server.free
    request = server.request("a", range(prompt))
    server.start(request, chunk)
    server.check(request, 0)
    while left := prompt - request.num_computed_tokens:
        processed = request.num_computed_tokens
        server.step(request, min(chunk, left))
        server.check(request, processed)
    for token in range(400):
        server.decode(request, [token])
        server.check(request, request.num_computed_tokens - 1)
    assert server.free == free - len(server.held(request, 0)) - len(server.held(request, 1))
    server.manager.free(request)
    assert server.free == free


@pytest.mark.parametrize("window_block", [64, 96, 160])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("prompt", "chunk"), [(31, 512), (640, 100)])
def test_longer_window_pages_are_held_while_any_of_them_is_read(
    prompt, chunk, window, window_block
):
    """Without prefix caching, as layers with states exclude it."""
    server = Server(window, caching=False, window_block=window_block)
    free = server.free
    request = server.request("a", range(prompt))
    server.prefill(request, chunk)
    server.check(request, 0)
    assert free - server.free == server.plan.blocks_in_prefill(window, prompt)
    for token in range(400):
        server.decode(request, [token])
        server.check(request, request.num_computed_tokens - 1)
    server.manager.free(request)
    assert server.free == free


@pytest.mark.parametrize("block", [32, 64, 96])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_blocks_at_8192_tokens_are_the_plans(window, block):
    server = Server(window, block)
    free = server.free
    request = server.request("a", range(8192))
    server.prefill(request)
    assert free - server.free == server.plan.blocks_in_prefill(window, 8192)
    server.decode(request, [1])
    # The step adds a token and its page, and takes the archive page it may need.
    assert free - server.free == server.plan.blocks_in_decode(window, 8192) + 1 + (
        -(-expected_boundary(8193, window) // block) - -(-expected_boundary(8192, window) // block)
    )


def test_blocks_of_steps_still_running_are_kept():
    """With asynchronous scheduling, later steps are planned before earlier ones have finished."""
    server = Server(Window(32, 64))
    request = server.request("a", range(640))
    server.prefill(request)
    request.append_output_token_ids(1)
    request.num_in_flight_tokens = 640
    server.step(request, 1)
    assert server.held(request, WINDOW) == set(range(21))
    request.append_output_token_ids(2)
    request.num_in_flight_tokens = 1
    server.step(request, 1)
    server.check(request, 640)


@pytest.mark.parametrize("block", [32, 64, 96])
@pytest.mark.parametrize("prompt", [63, 64, 65, 192, 576, 577, 1000])
def test_an_equal_prompt_shares_whole_pages_of_the_prompt_only(prompt, block):
    server = Server(Window(64, 256), block)
    free = server.free
    first = server.request("a", range(prompt))
    assert server.prefill(first) == 0
    second = server.request("b", range(prompt))
    hit = server.prefill(second)
    assert hit == (prompt - 1) // server.granule * server.granule
    pages = hit // 32
    assert server.table(first, WINDOW)[:pages] == server.table(second, WINDOW)[:pages]
    assert all(block.ref_cnt == 2 for block in server.table(first, WINDOW)[:pages])
    ids = [[b.block_id for b in server.table(r, ARCHIVE)] for r in (first, second)]
    shared = min(full_pages(server, first), hit // block)
    assert ids[0][:shared] == ids[1][:shared]
    assert set(ids[0][shared:]).isdisjoint(ids[1][shared:])

    server.decode(first, range(100))
    server.check(first, prompt + 99)
    assert all(not block.is_null and block.ref_cnt for block in server.table(second, WINDOW))
    assert server.held(second, WINDOW) == set(range(-(-prompt // 32)))
    server.manager.free(first)
    assert all(block.ref_cnt == 1 for block in server.table(second, WINDOW))
    server.decode(second, range(100))
    server.check(second, prompt + 99)
    server.manager.free(second)
    assert server.free == free


def test_answers_have_nothing_to_offer(monkeypatch):
    """Nor is it looked for: a step visits every request."""
    server = Server(Window(64, 256))
    request = server.request("a", range(1000))
    server.prefill(request)
    managers = server.manager.coordinator.single_type_managers
    offered = []
    for manager in managers:
        monkeypatch.setattr(manager, "cache_blocks", lambda one, *_, **__: offered.append(one))
    server.decode(request, range(100))
    assert not offered
    other = server.request("b", range(2000, 3000))
    server.prefill(other)
    assert offered.count(other) >= len(managers)


def test_a_last_token_that_comes_alone_offers_the_pages_that_it_fills():
    server = Server(Window(64, 256), block=32)
    first, second = (server.request(name, range(576)) for name in "ab")
    server.prefill(first, chunk=575)
    assert server.prefill(second) == 544
    pages, shared = (
        [block.block_id for block in server.table(one, ARCHIVE)] for one in (first, second)
    )
    assert len(pages) == full_pages(server, first) == 10
    assert pages == shared


@pytest.mark.parametrize("prompt", [100, 576, 1000])
def test_generated_tokens_are_never_found_in_the_prefix_cache(prompt):
    server = Server(Window(64, 256))
    first = server.request("a", range(prompt))
    server.prefill(first)
    server.decode(first, range(5000, 5500))
    server.manager.free(first)
    follow_up = server.request("b", [*range(prompt), *range(5000, 5500), *range(100)])
    assert server.prefill(follow_up) == (prompt - 1) // 64 * 64
    assert server.table(follow_up, ARCHIVE)


@pytest.mark.parametrize("prompt", [100, 1000])
@pytest.mark.parametrize("processed", [0, 20, 400])
def test_a_preempted_request_starts_again_and_holds_the_same(prompt, processed):
    server = Server(Window(64, 256))
    free = server.free
    request = server.request("a", range(prompt))
    server.prefill(request)
    server.decode(request, range(processed))
    server.preempt(request)
    assert server.free == free
    hit = server.prefill(request, chunk=100)
    assert hit == (prompt - 1) // 64 * 64
    server.decode(request, [1])
    server.check(request, prompt + processed)
    server.manager.free(request)
    assert server.free == free


@pytest.mark.parametrize("prompt", [64, 128, 576])
def test_a_preempted_request_computes_the_end_of_its_prompt_again(prompt):
    """The step that completes the prompt fills the archive, so it must not be skipped."""
    server = Server(Window(64, 256))
    request = server.request("a", range(prompt))
    server.prefill(request)
    server.decode(request, range(100))
    server.preempt(request)
    assert server.prefill(request) < prompt


def test_a_preempted_request_does_not_take_its_answer_from_anothers_prompt():
    """Keys of an answer come from the pruned archive, those of a prompt from exact prefill."""
    server = Server(Window(64, 256))
    request = server.request("a", range(500))
    server.prefill(request)
    server.decode(request, range(5000, 5300))
    follow_up = server.request("b", [*range(500), *range(5000, 5300), *range(100)])
    server.prefill(follow_up)
    server.preempt(request)
    assert server.prefill(request) < 500


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("block", "prompt"), [(64, 288), (64, 1000), (256, 500), (256, 4000)])
def test_responses_say_how_much_of_a_prompt_was_cached(block, prompt, exact):
    """Archive pages, of which there are fewer, take nothing from it."""
    server = Server(Window(64, 256, exact=exact), block)
    request = server.request("a", range(prompt))
    server.prefill(request)
    told = server.manager.estimate_cached_tokens(request)
    longer = server.request("b", range(prompt + 50))
    assert told >= server.prefill(longer) >= told // block * block > 0


def test_tokens_that_were_taken_up_are_not_counted_as_compacted():
    server = Server(Window(64, 256, exact=False), 64)
    server.prefill(server.request("a", range(1003)))
    archive = next(
        one for one in server.manager.coordinator.single_type_managers
        if isinstance(one, ArchiveManager)
    )  # fmt: skip
    assert archive.compacted == 672
    found = server.prefill(server.request("b", range(1003)))
    assert found == 960
    assert archive.compacted == 672 + 32


@pytest.mark.parametrize("exact", [True, False])
def test_a_request_keeps_the_hashes_of_all_its_blocks(exact):
    """They are vLLM's, which adds to them: the look-up of a prompt alone takes none away."""
    server = Server(Window(64, 256, exact=exact))
    request = server.request("a", range(512))
    counts = []
    for act in (server.prefill, lambda it: server.decode(it, range(100)), server.preempt):
        act(request)
        counts.append(len(request.block_hashes))
    server.prefill(request)
    counts.append(len(request.block_hashes))
    block = server.manager.block_pool.hash_block_size
    assert counts == [512 // block, *[612 // block] * 3]


def full_pages(server, request):
    """Archive pages that the prompt fills."""
    boundary = expected_boundary(request.num_prompt_tokens, server.window)
    return boundary // server.block if boundary > server.window.sink else 0


@pytest.mark.parametrize("block", [32, 64, 96])
@pytest.mark.parametrize("longer", [-230, -95, -33, -1, 0, 1, 40, 300])
@pytest.mark.parametrize("prompt", [96, 240, 1000, 1008])
def test_running_requests_share_the_archive_of_their_common_beginning(prompt, longer, block):
    server = Server(Window(32, 64), block)
    free = server.free
    first = server.request("a", range(prompt))
    server.prefill(first)
    server.decode(first, range(100))
    second = server.request(
        "b", [*range(prompt + min(longer, 0)), *range(7000, 7000 + max(longer, 0))] or [1]
    )
    hit = server.prefill(second)
    one, other = (server.table(request, ARCHIVE) for request in (first, second))
    shared = min(full_pages(server, first), full_pages(server, second), hit // block)
    assert [a is b for a, b in zip(one, other, strict=False)] == [
        index < shared for index in range(min(len(one), len(other)))
    ]
    server.decode(second, range(200))
    server.manager.free(first)
    server.check(second, second.num_prompt_tokens + 199)
    assert all(block.ref_cnt == 1 for block in server.table(second, ARCHIVE))
    server.manager.free(second)
    assert server.free == free


@pytest.mark.parametrize("block", [32, 64, 96])
def test_archive_pages_are_forgotten_with_the_last_request_that_holds_them(block):
    server = Server(Window(32, 64), block)
    first = server.request("a", range(1000))
    server.prefill(first)
    server.decode(first, range(100))
    pages = list(server.table(first, ARCHIVE))
    assert [page.block_hash is not None for page in pages] == [
        index < full_pages(server, first) for index in range(len(pages))
    ]
    server.manager.free(first)
    assert all(page.block_hash is None for page in pages)


@pytest.mark.parametrize("prompt", [240, 1000])
def test_a_preempted_request_shares_no_page_that_holds_its_answer(prompt):
    server = Server(Window(32, 64), 64)
    request, other = (server.request(name, range(prompt)) for name in "ab")
    for one in (request, other):
        server.prefill(one)
        server.decode(one, range(5000, 5300))
    server.preempt(request)
    server.prefill(request)
    tables = [server.table(one, ARCHIVE) for one in (request, other)]
    shared = sum(a is b for a, b in zip(*tables, strict=True))
    assert shared == full_pages(server, request)
    server.decode(request, [1])
    server.check(request, prompt + 300)


@pytest.mark.parametrize("prompt", [240, 1000])
def test_a_prompt_shares_no_page_that_holds_the_answer_of_a_preempted_request(prompt):
    """It would compact its own tokens, read exactly, into the other's answer."""
    server = Server(Window(32, 64), 64)
    request = server.request("a", range(prompt))
    server.prefill(request)
    server.decode(request, range(5000, 5300))
    server.preempt(request)
    server.prefill(request)
    longer = server.request("b", [*range(prompt), *range(5000, 5300), *range(100)])
    server.prefill(longer)
    pages = zip(server.table(request, ARCHIVE), server.table(longer, ARCHIVE), strict=False)
    assert sum(a is b for a, b in pages) == full_pages(server, request)


@pytest.mark.parametrize("found", [640, 960])
def test_an_attempt_to_start_leaves_nothing_behind(found):
    """A request found a prefix and no room for the rest; when it starts, the prefix is gone."""
    window = Window(64, 256, exact=False)
    servers = tried, untried = Server(window), Server(window)
    tried.manager.coordinator.remove_skipped_blocks("a", found, num_prompt_tokens=1000)
    requests = [server.request("a", range(1000)) for server in servers]
    for server, request in zip(servers, requests, strict=True):
        server.start(request, 100)
    while left := 1000 - requests[0].num_computed_tokens:
        for server, request in zip(servers, requests, strict=True):
            server.step(request, min(100, left))
        assert tried.held(requests[0], WINDOW) == untried.held(requests[1], WINDOW)
    assert len(untried.held(requests[1], WINDOW)) < 1000 // LEAST_BLOCK // 2


def test_more_than_two_groups_are_refused():
    server = Server(Window(64, 256))
    pool = server.manager.block_pool
    for group in server.manager.coordinator.single_type_managers:
        with pytest.raises(RuntimeError, match="more than two groups"):
            type(group)(
                group.kv_cache_spec,
                block_pool=pool,
                enable_caching=True,
                kv_cache_group_id=2,
                scheduler_block_size=64,
            )
    assert isinstance(server.manager.coordinator.single_type_managers[1].kv_cache_spec, WindowSpec)
