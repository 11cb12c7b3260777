"""Random histories of a scheduler over the real block managers, with a memory that remembers.

A `History` does what a scheduler and a worker do: requests with shared prompts arrive, are computed
in chunks of any size, decode, are preempted when the pool is full or at random, are aborted, and
finish; steps may be planned before earlier ones have run, or have drafts, of which some are
rejected. Instead of keys, pages hold the identity of the token that was written there: a hash of
all tokens up to it and, for an answer's token, of the prompt's length, since its key depends on
both. Every read that the definition allows a query is checked against the identity that belongs
there.

A failure names the seed and the event; `History(seed).run(events)` replays it.
"""

import random
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from format_samples import format_of
from test_managers import ARCHIVE, WINDOW, Server

from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.core.window import GRANULE, Window

WINDOWS = (Window(0, 32), Window(32, 64), Window(64, 100))
EDGES = (1, 31, 32, 33, 63, 64, 65, 95, 96, 127, 128, 129, 160, 192, 256, 257, 300)
CHUNKS = (1, 17, 32, 33, 64, 100, 512)
DRAFTS = 6


@dataclass
class Live:
    """A request, and what the worker knows of it."""

    request: object
    answer: int
    epoch: int = 0
    rows: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))

    @property
    def computed(self):
        return self.request.num_computed_tokens

    @property
    def in_prefill(self):
        """Whether tokens that are already known are still to be computed."""
        return self.computed < self.request.num_tokens


@dataclass
class Work:
    """A request's part in a step, as it was when the step was planned."""

    live: Live
    epoch: int
    start: int
    count: int
    rows: tuple[list[int], list[int]]
    drafts: list[int]


def next_token(request, length):
    """The token that a request samples when it has so many."""
    return (7 * length + len(request.request_id)) % 50


class History:
    """A scheduler, a worker and their memory; `lag` steps are planned ahead. The pool is drawn from
    the seed, too, if its size is not given.
    """

    def __init__(self, seed, num_blocks=None):
        self.seed = seed
        self.random = random.Random(seed)
        self.window = self.random.choice(WINDOWS)
        block = self.random.choice((32, 64, 96))
        if self.random.random() < 0.5:
            self.window = replace(self.window, exact=False)
        # Beside states window pages may be longer. Nothing is cached there, and nothing pruned.
        beside_states = self.window.exact and self.random.random() < 0.4
        self.window_block = self.random.choice((64, 96, 128)) if beside_states else LEAST_BLOCK
        self.lag = self.random.choice((0, 1))
        self.drafts = DRAFTS if self.lag == 0 and seed % 3 else 0
        # Few blocks, so that requests are preempted.
        few = self.random.choice((40, 60, 120))
        self.server = Server(
            self.window, block, num_blocks or few, max_length=512, archive_format=format_of(seed),
            caching=not beside_states, window_block=self.window_block,
        )  # fmt: skip
        pool = self.server.manager.block_pool
        self.pool_size = self.server.free
        self.memory = (
            np.full((pool.num_gpu_blocks, block), -1, np.int64),
            np.full((pool.num_gpu_blocks, self.window_block), -1, np.int64),
        )
        self.block = block
        self.documents = [[self.random.randrange(50) for _ in range(320)] for _ in range(3)]
        self.waiting, self.running = deque(), []
        self.answered = deque(maxlen=4)  # prompts with answers, which conversations go on from
        self.planned = deque()
        self.names = 0
        kinds = ("preempted", "hits", "finished", "compacted", "rolled back")
        self.counts = dict.fromkeys(kinds, 0)

    def run(self, events):
        """Play a number of events, then drain; everything is checked after each."""
        for event in range(events):
            (act,) = self.random.choices(
                (self.arrive, self.step, self.preempt_one, self.abort_one), (3, 20, 1, 1)
            )
            self.play(event, act)
        while self.running or self.waiting or self.planned:
            if not self.play("the end", self.step) and not self.planned:
                break
        for live in [*self.running, *self.waiting]:
            self.server.manager.free(live.request)
        assert self.server.free == self.pool_size, f"seed {self.seed}: blocks have leaked"

    def play(self, event, act):
        try:
            done = act()
            self.check_pool()
        except (AssertionError, IndexError) as error:
            raise AssertionError(f"seed {self.seed}, event {event}: {error}") from error
        return done

    # What the scheduler does.

    def arrive(self):
        if len(self.waiting) > 4:
            return
        if self.answered and self.random.random() < 0.3:
            prompt = self.random.choice(self.answered)
        else:
            prompt = self.random.choice(self.documents)[: self.random.choice(EDGES)]
        if self.random.random() < 0.3:
            prompt = [
                *prompt,
                *(self.random.randrange(50) for _ in range(self.random.randrange(40))),
            ]
        self.names += 1
        request = self.server.request(str(self.names), prompt)
        self.waiting.append(Live(request, answer=self.random.choice((1, 5, 40, 120))))

    def step(self):
        """Plan a step, and let the worker run the one whose turn it is."""
        budget, works, preempted = self.random.choice(CHUNKS), [], False
        for live in list(self.running):
            if live not in self.running or not budget:
                continue
            count = self.due(live, budget)
            if not count:
                continue
            while self.server.manager.allocate_slots(live.request, count) is None:
                preempted = True
                victim = self.running[-1]
                self.preempt(victim)
                works = [work for work in works if work.live is not victim]
                if victim is live:
                    break
            else:
                works.append(self.plan(live, count))
                budget -= count
        while self.waiting and budget and not preempted:
            live = self.waiting[0]
            blocks, hit, _ = self.server.manager.get_computed_blocks(live.request)
            count = min(budget, live.request.num_tokens - hit)
            if self.server.manager.allocate_slots(live.request, count, hit, blocks) is None:
                break
            self.counts["hits"] += hit > 0
            self.running.append(self.waiting.popleft())
            live.request.num_computed_tokens = hit
            live.rows = ([], [])
            works.append(self.plan(live, count))
            budget -= count
        if works:
            self.planned.append(works)
        self.check_planned()
        if self.planned and (len(self.planned) > self.lag or not works):
            self.execute(self.planned.popleft())
        return bool(works)

    def due(self, live, budget):
        """Tokens to plan for a running request: known ones, or the one being sampled."""
        if live.in_prefill:
            known = live.request.num_tokens - live.computed
            drafts = 0
            if self.drafts and known == 1 and live.request.num_output_tokens:
                drafts = self.random.randint(0, self.drafts)
            return min(budget, known + drafts)
        sampled = live.request.num_output_tokens + (live.computed - live.request.num_tokens + 1)
        ahead = live.computed - live.request.num_tokens
        return int(
            ahead < self.lag and sampled < live.answer and live.request.num_output_tokens > 0
        )

    def plan(self, live, count):
        request = live.request
        work_start = live.computed
        request.num_computed_tokens += count
        request.num_in_flight_tokens += count
        for group in (ARCHIVE, WINDOW):
            # The worker only ever appends to its tables.
            table = self.server.table(request, group)
            live.rows[group].extend(block.block_id for block in table[len(live.rows[group]) :])
        drafts = range(request.num_tokens, request.num_computed_tokens) if self.drafts else ()
        right = self.random.randint(0, len(drafts)) if drafts else 0
        return Work(
            live,
            live.epoch,
            work_start,
            count,
            tuple(list(row) for row in live.rows),
            [next_token(request, at) if i < right else -at for i, at in enumerate(drafts)],
        )

    def preempt_one(self):
        if self.running:
            self.preempt(self.random.choice(self.running))

    def preempt(self, live):
        self.running.remove(live)
        self.server.preempt(live.request)
        live.request.num_in_flight_tokens = 0
        live.epoch += 1
        self.waiting.appendleft(live)
        self.counts["preempted"] += 1

    def abort_one(self):
        if self.running and self.random.random() < 0.3:
            self.finish(self.random.choice(self.running))

    def finish(self, live):
        self.running.remove(live)
        self.server.manager.free(live.request)
        live.epoch += 1
        self.counts["finished"] += 1
        if live.request.num_tokens <= max(EDGES):
            self.answered.append(list(live.request.all_token_ids))

    # What the worker does.

    def execute(self, works):
        for work in works:
            positions = np.arange(work.start, work.start + work.count)
            self.write(work, WINDOW, positions)
        for work in works:
            for token in self.compaction(work):
                positions = np.arange(token, token + GRANULE)
                self.expect(work, WINDOW, positions, "compaction reads")
                self.write(work, ARCHIVE, positions)
                self.counts["compacted"] += 1
        for work in works:
            for read in self.reads(work):
                self.expect(work, *read)
        for work in works:
            self.sample(work)

    def compaction(self, work):
        exact_until = self.window.exact_until(work.live.request.num_prompt_tokens)
        return self.window.compaction(work.start, work.start + work.count, exact_until)

    def reads(self, work):
        """Every cell that some query of the step reads: of which group, tokens, and for what."""
        exact_until = self.window.exact_until(work.live.request.num_prompt_tokens)
        first, last = work.start, work.start + work.count - 1
        if first < exact_until:
            yield WINDOW, np.arange(min(last, exact_until - 1) + 1), "exact prefill reads"
        first = max(first, exact_until)
        if first <= last:
            oldest, newest = self.window.boundary(first + 1), self.window.boundary(last + 1)
            sink = self.window.sink
            yield WINDOW, np.arange(min(sink, last + 1)), "a query reads the sink"
            yield WINDOW, np.arange(oldest, last + 1), "a query reads the window"
            yield ARCHIVE, np.arange(sink, newest), "a query reads the archive"

    def sample(self, work):
        live, request = work.live, work.live.request
        if work.epoch != live.epoch:
            return
        request.num_in_flight_tokens -= work.count
        if work.start + work.count < request.num_tokens:
            return
        scheduled = live.computed
        for draft in [*work.drafts, None]:
            token = next_token(request, request.num_tokens)
            request.append_output_token_ids(token)
            if token != draft or request.num_output_tokens >= live.answer:
                break
        if work.drafts:
            request.num_computed_tokens = request.num_tokens - 1
            boundary = self.window.boundary
            self.counts["rolled back"] += boundary(scheduled) > boundary(live.computed)
        self.server.manager.cache_blocks(request, min(live.computed, request.num_tokens))
        if request.num_output_tokens >= live.answer:
            self.finish(live)

    # The memory.

    def page(self, group):
        """Tokens of a group's pages."""
        return self.block if group == ARCHIVE else self.window_block

    def cells(self, work, group, positions):
        size = self.page(group)
        row = np.asarray(work.rows[group])
        return self.memory[group][row[positions // size], positions % size]

    def write(self, work, group, positions):
        size = self.page(group)
        row = np.asarray(work.rows[group])
        self.memory[group][row[positions // size], positions % size] = self.identity(
            work, positions
        )

    def identity(self, work, positions):
        """What belongs where a request's tokens are kept."""
        request = work.live.request
        tokens = [*request.all_token_ids, *work.drafts]
        exact_until = self.window.exact_until(request.num_prompt_tokens)
        chain = np.empty(max(positions, default=-1) + 1, np.int64)
        value = 17
        for i in range(len(chain)):
            token = tokens[i] if i < len(tokens) else -i  # sampled ahead, thrown away later
            value = hash((value, token, exact_until if i >= exact_until else 0))
            chain[i] = value
        return chain[positions]

    def expect(self, work, group, positions, what):
        if len(positions) and not np.array_equal(
            self.cells(work, group, positions), self.identity(work, positions)
        ):
            wrong = positions[self.cells(work, group, positions) != self.identity(work, positions)]
            raise AssertionError(
                f"{what} something else at tokens {wrong[:5]} of request "
                f"{work.live.request.request_id}, which computes {work.count} from {work.start} "
                f"(prompt {work.live.request.num_prompt_tokens}, {self.window})"
            )

    def check_pool(self):
        """Every block is free or held, by as many as it says; no block has two uses."""
        holders, uses = {}, {}
        for live in self.running:
            for group in (ARCHIVE, WINDOW):
                for index, block in enumerate(self.server.table(live.request, group)):
                    if not block.is_null:
                        holders[block.block_id] = holders.get(block.block_id, 0) + 1
                        uses.setdefault(block.block_id, set()).add((group, index))
        blocks = self.server.manager.block_pool.blocks
        for block_id, count in holders.items():
            assert blocks[block_id].ref_cnt == count, f"block {block_id} has {count} holders"
            assert len(uses[block_id]) == 1, f"block {block_id} has two uses: {uses[block_id]}"
        held = len(holders)
        assert self.server.free == self.pool_size - held, "blocks are neither held nor free"

    def check_planned(self):
        """Blocks that a planned step reads are still the request's."""
        for work in (work for works in self.planned for work in works):
            if work.epoch != work.live.epoch:
                continue
            compacted = WINDOW, np.asarray(self.compaction(work), int), "compaction reads"
            for group, positions, what in [*self.reads(work), compacted]:
                table = self.server.table(work.live.request, group)
                for page in np.unique(positions // self.page(group)):
                    assert table[page].block_id == work.rows[group][page], (
                        f"{what} page {page} of request {work.live.request.request_id}, which was "
                        f"freed since the step from {work.start} was planned ({self.window})"
                    )
