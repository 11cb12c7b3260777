"""Puts a running server under a mixed load for minutes and looks for anything that goes wrong.

    vllm serve MODEL --attention-backend leank ...
    python benchmarks/soak.py --minutes 8 --pid SERVER_PID --out results.json

Prompts are random token ids of every length up to --prompt-tokens, some with a common beginning;
some clients hang up on the way. Among them are the same --watched requests over and over. Before
the load each of these is answered alone, with nothing of it in the prefix cache. Under load their
answers must be the same up to ties: log-probabilities move by no more than --tie, and at the first
other token the quiet run found its own more likely by no more than that. On a GPU the size of a
batch changes what is rounded, and now and then plain vLLM's answers change by more than that as
well. So put plain vLLM under the same load with --allow-changed, before or at the same time, and
give its results as --plain. They are read at the end. Then a soak fails if a larger share of its
answers changed than of plain vLLM's, by more than chance; without, if any did. After each round of
requests one more is sent alone, always the same, and before it no block of the KV cache may be in
use.

Results are written after every round. Exits with 1 if an answer changed, a request failed, or a
block was left in use. With --tokens-only for servers that were started with that flag, which need
no tokenizer. Preemptions need a small pool: start the server with --num-gpu-blocks-override or
--kv-cache-memory-bytes, enough for a few of the longest requests. `poisoned_server.py` serves in
memory that is NaN where nobody may read.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from server_metrics import ASKED, FOUND, PREEMPTIONS, RUNNING, USAGE, metric
from soak_client import Answer, Server, compare
from soak_requests import Prompts, Watched
from soak_verdict import KIND, chance_of_more, failed, plain_answers

from vllm_leank.bench.results import header, save_results
from vllm_leank.errors import UserError

COUNTERS = {
    "preemptions": PREEMPTIONS,
    "prompt_tokens_asked": ASKED,
    "prompt_tokens_found": FOUND,
}
"""Our names of the server's counters; what was found was in the prefix cache."""

WATCHED_SHARE = 0.25
"""Of all requests, those whose answers are known."""

FAILURES = httpx.HTTPError, ValueError, KeyError
"""What asking raises where a server does not answer as it should."""

GRACE = 120
"""Seconds after its minutes at which the program ends, whatever it waits for."""


def resident_mib(pid: int | None) -> int | None:
    """Resident memory of a process and those that it started, in MiB."""
    if pid is None:
        return None
    parent = psutil.Process(pid)
    family = [parent, *parent.children(recursive=True)]
    return sum(process.memory_info().rss for process in family) >> 20


class Soak:
    """The load on a server, and what came of it.

    Args:
        server: where to.
        args: the command line.
        write: takes what is known after each round.
    """

    def __init__(
        self,
        server: Server,
        args: argparse.Namespace,
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        self.server, self.args, self.write = server, args, write
        self.rng = random.Random(args.seed)
        lengths = args.prompt_tokens, args.output_tokens
        self.prompts = Prompts(self.rng, args.vocabulary, *lengths)
        self.probe = self.prompts.ids(min(1000, args.prompt_tokens))
        self.watched = Watched(self.prompts, args.watched)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.peaks = {"running": 0.0, "usage": 0.0}
        self.pauses: list[dict[str, Any]] = []
        self.gate = asyncio.Semaphore(args.concurrency)
        self.begin = time.monotonic()
        self.until = self.begin + 60 * args.minutes
        self.model = self.before = ""
        self.told: dict[str, Any] = {}

    async def run(self) -> None:
        """Ask alone, then in rounds until the time or the requests are over."""
        server, args = self.server, self.args
        self.model = await server.ready()
        self.told = {"model": self.model, "vllm": await server.version()}
        self.before = await server.metrics()
        await self.watched.ask_alone(self.alone, until=self.begin + 30 * args.minutes)
        await self.pause()
        started, first = time.monotonic(), 0
        while first < args.requests and time.monotonic() < self.until:
            numbers = range(first, min(first + args.round, args.requests))
            with tqdm(total=len(numbers), desc="requests", unit="", file=sys.stderr) as progress:
                await asyncio.gather(*(self.one(number, progress.update) for number in numbers))
            await self.pause()
            self.write(await self.found(time.monotonic() - started))
            first = numbers.stop

    async def alone(self, name: str, prompt: list[int], tokens: int) -> Answer | None:
        """The answer to a request, with nothing of it in the prefix cache; None if it failed."""
        try:
            return await self.server.generate(self.model, prompt, tokens, salt=name)
        except FAILURES as error:
            self.faults.append(f"{name}: {type(error).__name__}: {error}")
            return None

    async def one(self, number: int, done: Callable[[], object]) -> None:
        """A request of the load."""
        rng, watched = self.rng, self.watched
        known = None
        if watched.requests and rng.random() < WATCHED_SHARE:
            known = rng.randrange(len(watched.requests))
            prompt, tokens = watched.requests[known]
        else:
            prompt, tokens = self.prompts.draw(shared=0.3)
        leaves = rng.random() < self.args.hang_up
        wait = rng.uniform(0.01, 2) if leaves else None
        async with self.gate:
            if time.monotonic() > self.until:
                return
            try:
                asked = self.server.generate(self.model, prompt, tokens, top=known is not None)
                answer = await asyncio.wait_for(asked, wait)
                self.counts["served"] += 1
                if known is not None:
                    watched.add(known, answer)
            except TimeoutError:
                self.counts["hung up"] += 1
            except FAILURES as error:
                self.faults.append(f"request {number}: {type(error).__name__}: {error}")
            done()
            if number % 20 == 0:
                for name, gauge in (("running", RUNNING), ("usage", USAGE)):
                    self.peaks[name] = max(self.peaks[name], await self.server.gauge(gauge) or 0)

    async def pause(self) -> None:
        """See what the server holds when nothing runs, and what it then answers to the probe."""
        for _ in range(50):
            # Requests whose clients have left end with the engine's next steps.
            if not await self.server.gauge(RUNNING):
                break
            await asyncio.sleep(0.2)
        usage = await self.server.gauge(USAGE)
        answer = await self.alone(f"probe {len(self.pauses)}", self.probe, 64)
        self.pauses.append(
            {"usage": usage, "resident_mib": resident_mib(self.args.pid), "answer": answer}
        )

    async def found(self, seconds: float) -> dict[str, Any]:
        """All that is known by now, `seconds` after the load began."""
        args, after = self.args, await self.server.metrics()
        counters = {
            name: (metric(after, of) or 0) - (metric(self.before, of) or 0)
            for name, of in COUNTERS.items()
        }
        probes = [one["answer"] for one in self.pauses]
        first = probes[0]
        same = [None not in (first, one) and compare(first, one).gap is None for one in probes]
        return self.told | {
            "seconds": round(seconds, 1),
            "served": self.counts["served"],
            "hung_up": self.counts["hung up"],
            "failed": len(self.faults),
            "faults": self.faults[:20],
            "answers": self.watched.found(args.tie),
            "probes": len(probes),
            "probes_changed": same.count(False),
            **counters,
            "peak": self.peaks,
            "usage_in_pauses": [one["usage"] for one in self.pauses],
            "resident_mib_in_pauses": [one["resident_mib"] for one in self.pauses],
        }


def main() -> int:
    """Run the load, print and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base-url", default="http://localhost:8000")
    add("--tokens-only", action="store_true", help="the server was started with this flag")
    add("--minutes", type=float, default=20, help="that all may take")
    add("--requests", type=int, default=sys.maxsize, help="at most so many")
    add("--concurrency", type=int, default=64, help="requests at once")
    add("--watched", type=int, default=64, help="requests whose answers are compared")
    add("--tie", type=float, default=0.5, help="of log-probabilities: what rounding can make")
    add("--plain", type=Path, help="results of plain vLLM under the same load; read at the end")
    add("--allow-changed", action="store_true", help="answers that changed are no fault")
    add("--prompt-tokens", type=int, default=4096, help="longest prompt")
    add("--output-tokens", type=int, default=128, help="longest answer")
    add("--vocabulary", type=int, default=4096, help="token ids are below this")
    add("--hang-up", type=float, default=0.05, help="share of clients that leave early")
    add("--round", type=int, default=250, help="requests from pause to pause")
    add("--seed", type=int, default=0)
    add("--pid", type=int, help="of the server on this machine, for its memory")
    add("--commit", help="of the code measured; asked of git when not given")
    add("--out", type=Path, required=True, help="write the results here, as JSON")
    args = parser.parse_args()
    results = header(KIND, args.commit, "python benchmarks/soak.py")

    def write(found: dict[str, Any]) -> None:
        results.update(found)
        save_results(results, args.out)

    soak = Soak(Server(args.base_url, args.tokens_only), args, write)
    limit = 60 * args.minutes + GRACE
    try:
        asyncio.run(asyncio.wait_for(soak.run(), limit))
    except TimeoutError:
        print(f"cut off after {limit:.0f} s; {args.out} has the rounds before", file=sys.stderr)
        return 1
    except (httpx.HTTPError, OSError) as error:
        print(f"the server does not answer: {error!r}", file=sys.stderr)
        return 1
    if "answers" not in results:
        print("no round was done: --minutes is too short", file=sys.stderr)
        return 1
    if args.plain:
        plain = plain_answers(args.plain, args.tie)
        chance = chance_of_more(results["answers"], plain)
        write({"plain_answers": plain, "chance_of_more_changed": chance})
    print(json.dumps(results, indent=1))
    return int(failed(results, args.allow_changed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
