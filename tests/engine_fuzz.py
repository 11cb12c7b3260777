"""Random traffic through a real engine, every token checked against the oracle.

An `Arena` is an engine with a chunk size, an archive format and a cache drawn from its seed, mostly
too small for its requests; in those of odd seeds prompts are read pruned. Scenarios follow each
other in it: requests with shared prompts arrive at any step, some are aborted, all others run to
their end. Memory that nobody may read is NaN: before each scenario, and from the moment it is
freed.

A failure names the seeds, by which `play(SEED, model, [SCENARIO])` replays it, and the smallest
scenario found that fails too.
"""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from engines import engine
from format_samples import format_of, mask_for, rounds
from oracle import Oracle
from speculation import watch
from vllm import SamplingParams

from vllm_leank.core.selection import Selection

SINK, RECENT = 32, 64
MAX_LENGTH = 512
TIE = 1e-5
"""Logits that rounding may put in either order: sums in another order differ by some 1e-6."""
ROUNDED_TIE = 1e-2
"""The same where the archive's format rounds: now and then to the other neighbour."""

KEPT = ([0, 32, 16, 48], [64, 16], [0, 0, 32])
EDGES = (1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 191, 192, 193, 256, 300)


@dataclass(frozen=True)
class Arrival:
    """A request: steps to wait for it after the one before, and steps until its abort, if any."""

    prompt: tuple[int, ...]
    max_tokens: int
    wait: int
    abort: int | None = None

    def smaller(self) -> "Iterator[Arrival]":
        """The same with less of everything."""
        if self.abort is not None:
            yield replace(self, abort=None)
        if self.wait:
            yield replace(self, wait=0)
        for tokens in {1, self.max_tokens // 2, self.max_tokens - 32} - {self.max_tokens}:
            if tokens > 0:
                yield replace(self, max_tokens=tokens)
        for length in {1, len(self.prompt) // 2, len(self.prompt) - 32} - {len(self.prompt)}:
            if length > 0:
                yield replace(self, prompt=self.prompt[:length])

    def __str__(self) -> str:
        abort = "" if self.abort is None else f", aborted after {self.abort} steps"
        prompt = f"{len(self.prompt)} tokens {list(self.prompt[:4])}..."
        return f"after {self.wait} steps: {prompt}, {self.max_tokens} new{abort}"


Scenario = tuple[Arrival, ...]


def smaller(scenario: Scenario) -> Iterator[Scenario]:
    """The scenario without one request, or with a smaller one."""
    for index in range(len(scenario)):
        yield scenario[:index] + scenario[index + 1 :]
    for index, arrival in enumerate(scenario):
        for less in arrival.smaller():
            yield (*scenario[:index], less, *scenario[index + 1 :])


def shrink(scenario: Scenario, fails, tries=60) -> Scenario:
    """The smallest scenario found for which `fails` holds, in at most so many tries."""
    while True:
        for candidate in smaller(scenario):
            tries -= 1
            if tries < 0:
                return scenario
            if candidate and fails(candidate):
                scenario = candidate
                break
        else:
            return scenario


class Arena:
    """One engine, and the oracle of its mask."""

    def __init__(self, seed, running, oracle):
        self.seed, self.running, self.oracle = seed, running, oracle
        self.tie = ROUNDED_TIE if rounds(oracle.archive_format) else TIE
        chance = random.Random(seed)
        self.documents = [[chance.randrange(512) for _ in range(320)] for _ in range(3)]
        self.names = 0
        self.counts = {"finished": 0, "aborted": 0, "tokens": 0}

    def scenarios(self, seeds):
        for seed in seeds:
            self.scenario(seed)

    def scenario(self, seed):
        """Draw and run a scenario; if it fails, look for a small one that fails."""
        scenario = self.draw(random.Random(f"{self.seed} {seed}"))
        try:
            self.run(scenario)
        except AssertionError as error:
            small = shrink(scenario, self.fails) if self.fails(scenario) else scenario
            lines = "".join(f"\n  {arrival}" for arrival in small)
            raise AssertionError(f"seeds {self.seed}, {seed}: {error}; scenario:{lines}") from error

    def fails(self, scenario):
        """Whether a scenario fails from an empty prefix cache."""
        assert self.running.llm.reset_prefix_cache()
        try:
            self.run(scenario)
        except AssertionError:
            return True
        return False

    def run(self, scenario):
        """A scenario, from its first arrival to an empty engine."""
        self.running.poison(self.running.block_pool.blocks)
        llm_engine = self.running.llm.llm_engine
        arrivals, answers, aborts = list(reversed(scenario)), {}, {}
        sent, aborted, wait = {}, set(), scenario[0].wait
        while arrivals or llm_engine.has_unfinished_requests():
            while arrivals and (wait <= 0 or not llm_engine.has_unfinished_requests()):
                arrival = arrivals.pop()
                wait = arrivals[-1].wait if arrivals else 0
                self.names += 1
                name = str(self.names)
                params = SamplingParams(
                    max_tokens=arrival.max_tokens, temperature=0, ignore_eos=True, detokenize=False
                )
                llm_engine.add_request(name, {"prompt_token_ids": list(arrival.prompt)}, params)
                sent[name], aborts[name] = arrival, arrival.abort
            for output in llm_engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
                if output.finished:
                    aborts[output.request_id] = None
            wait -= 1
            for name, left in aborts.items():
                if left == 0:
                    aborted.add(name)
                    llm_engine.abort_request([name])
                aborts[name] = left - 1 if left else None
        pool = self.running.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks have leaked"
        for name, arrival in sent.items():
            self.check(arrival, answers.get(name, []), whole=name not in aborted)
        self.counts["finished"] += len(sent) - len(aborted)
        self.counts["aborted"] += len(aborted)

    def draw(self, chance) -> Scenario:
        """Requests whose prompts may share their beginnings with others."""
        busy = chance.choice((0.1, 0.9))
        return tuple(self.draw_one(chance, busy) for _ in range(chance.randint(3, 10)))

    def draw_one(self, chance, busy) -> Arrival:
        edges = EDGES if chance.random() < 0.5 else EDGES[-6:]
        prompt = chance.choice(self.documents)[: chance.choice(edges)]
        if chance.random() < 0.4:
            prompt = prompt + [chance.randrange(512) for _ in range(chance.randint(1, 50))]
        wait = 0 if chance.random() < busy else chance.randint(1, 20)
        abort = chance.randint(1, 150) if chance.random() < 0.15 else None
        return Arrival(tuple(prompt), chance.choice((1, 33, 70, 140, 140, 140)), wait, abort)

    def check(self, arrival, answer, whole):
        """The answer is what the oracle would say, and as long as was asked for: nothing but an
        abort and the longest length ends one.
        """
        prompt = list(arrival.prompt)
        length = min(arrival.max_tokens, MAX_LENGTH - len(prompt))
        assert len(answer) == length or (not whole and len(answer) < length), (
            f"a prompt of {len(prompt)} tokens gets {len(answer)} tokens, not {length}"
        )
        if not answer:
            return
        exact_until = self.running.window.exact_until(len(prompt))
        logits = self.oracle.logits(prompt + answer[:-1], exact_until)[len(prompt) - 1 :]
        best = logits.max(-1)
        behind = best.values - logits[range(len(answer)), answer]
        assert behind.max() < self.tie, (
            f"a prompt of {len(prompt)} tokens gets {answer}, not {best.indices.tolist()}"
        )
        self.counts["tokens"] += len(answer)


@contextmanager
def arena(seed, model, speculation=None, pages=None):
    """An engine drawn from a seed, with vLLM's `speculative_config` and leank's option `pages` if
    given.
    """
    chance = random.Random(seed)
    chosen = format_of(seed)
    mask = mask_for(chosen, model, chance.choice(KEPT), seed)
    chunk = chance.choice((32, 50, 128, 512))
    options = {
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": 8,
        "enable_prefix_caching": chance.random() < 0.7,
        "max_num_batched_tokens": chunk,
        "speculative_config": speculation,
    }
    # Room for one request of full length, for a little more, or for all.
    options["num_gpu_blocks_override"] = chance.choice((26, 32, 250))
    options["prefill"] = "pruned" if seed % 2 else "exact"
    options["pages"] = pages
    selection = None if pages is None else Selection.of(pages)
    with engine(model, mask, sink=SINK, recent=RECENT, **options) as running:
        running.poison_freed_blocks()
        recent = running.window.recent
        oracle = Oracle(model, mask, SINK, recent, archive_format=chosen, selection=selection)
        yield Arena(seed, running, oracle)


def play(seed, model, scenarios, speculation=None):
    """Scenarios of one arena, by their seeds; counts of what happened and what became of drafts."""
    with arena(seed, model, speculation) as engine:
        preempted, drafts = engine.running.watch_preemptions(), watch(engine.running)
        engine.scenarios(scenarios)
        counts = Counter(engine.counts) + drafts
        counts["preempted"] = len(preempted)
    print(f"arena {seed}: {dict(counts)}")
    return counts
