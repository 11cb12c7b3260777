"""Puts a running server under a mixed load for minutes and looks for anything that goes wrong.

    vllm serve MODEL --attention-backend leank ...
    python benchmarks/soak.py --requests 2000 --pid SERVER_PID --out results.json

Prompts are random token ids of every length up to --prompt-tokens, some with a common beginning;
some clients hang up on the way. After each round of requests one more is sent alone, always the
same: it must get the answer that it got before the first round, and before it no block of the KV
cache may be in use. Exits with 1 if that is not so, or a request failed. With --tokens-only for
servers that were started with that flag, which need no tokenizer.
"""

import argparse
import asyncio
import json
import random
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from recall.evaluate import head_commit

PREFIXES = 4
"""Common beginnings of prompts."""

RUNNING, USAGE = "vllm:num_requests_running", "vllm:kv_cache_usage_perc"


class Server:
    """What is asked of a server.

    Args:
        url: where it is.
        tokens_only: whether it takes and gives token ids alone.
    """

    def __init__(self, url: str, tokens_only: bool) -> None:
        self._tokens_only = tokens_only
        # Servers close connections that are idle for 5 seconds. A client that keeps them as long,
        # as httpx does, now and then sends a request just then, and reads an error.
        limits = httpx.Limits(keepalive_expiry=2)
        self._client = httpx.AsyncClient(base_url=url, timeout=600, limits=limits)

    async def version(self) -> str:
        """Of its vLLM."""
        reply = (await self._client.get("/version")).raise_for_status()
        return str(reply.json()["version"])

    async def ready(self) -> str:
        """The name of its model."""
        models = (await self._client.get("/v1/models")).raise_for_status().json()
        return str(models["data"][0]["id"])

    async def generate(
        self, model: str, prompt: list[int], tokens: int, salt: str | None = None
    ) -> list[int]:
        """Exactly `tokens` greedy tokens; prefixes are shared among requests with the same salt."""
        params = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = {"model": model} | ({"cache_salt": salt} if salt else {})
        if self._tokens_only:
            path = "/inference/v1/generate"
            body |= {"token_ids": prompt, "sampling_params": params}
        else:
            path = "/v1/completions"
            body |= {"prompt": prompt, "return_token_ids": True} | params
        reply = (await self._client.post(path, json=body)).raise_for_status()
        answer: list[int] = reply.json()["choices"][0]["token_ids"]
        if len(answer) != tokens:
            raise ValueError(f"{len(answer)} tokens instead of {tokens}")
        return answer

    async def gauge(self, name: str) -> float | None:
        """The sum of a metric's samples; None where the server has no such metric."""
        text = (await self._client.get("/metrics")).raise_for_status().text
        samples = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]
        return sum(samples) if samples else None


def resident_mib(pid: int | None) -> int | None:
    """Resident memory of a process and those that it started, in MiB."""
    if pid is None:
        return None
    parent = psutil.Process(pid)
    family = [parent, *parent.children(recursive=True)]
    return sum(process.memory_info().rss for process in family) >> 20


async def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Run the load; counts, probes and what the server holds before and after."""
    model = await server.ready()
    rng = random.Random(args.seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(10, args.vocabulary) for _ in range(count)]

    probe = ids(min(1000, args.prompt_tokens))
    prefixes = [ids(args.prompt_tokens // 2) for _ in range(PREFIXES)]
    counts: Counter[str] = Counter()
    faults: list[str] = []
    peaks = {"running": 0.0, "usage": 0.0}
    gate = asyncio.Semaphore(args.concurrency)
    progress = tqdm(total=args.requests, desc="requests", unit="", file=sys.stderr)

    async def one(number: int) -> None:
        length = int(args.prompt_tokens ** rng.uniform(0.3, 1))
        prompt = ids(max(length, 1))
        if rng.random() < 0.3:
            prompt = (rng.choice(prefixes)[:length] + prompt)[: args.prompt_tokens]
        tokens, leaves = rng.randint(1, args.output_tokens), rng.random() < args.hang_up
        wait = rng.uniform(0.01, 2) if leaves else None
        async with gate:
            try:
                await asyncio.wait_for(server.generate(model, prompt, tokens), wait)
                counts["served"] += 1
            except TimeoutError:
                counts["hung up"] += 1
            except (httpx.HTTPError, ValueError, KeyError) as error:
                faults.append(f"request {number}: {type(error).__name__}: {error}")
            progress.update()
            if number % 20 == 0:
                for name, metric in (("running", RUNNING), ("usage", USAGE)):
                    peaks[name] = max(peaks[name], await server.gauge(metric) or 0)

    async def pause(number: int) -> dict[str, Any]:
        """What the server holds when nothing runs, and what it then answers to the probe."""
        for _ in range(50):
            # Requests whose clients have left end with the engine's next steps.
            if not await server.gauge(RUNNING):
                break
            await asyncio.sleep(0.2)
        held = {"usage": await server.gauge(USAGE), "resident_mib": resident_mib(args.pid)}
        return held | {"answer": await server.generate(model, probe, 64, f"probe {number}")}

    pauses = [await pause(0)]
    begin = time.monotonic()
    for first in range(0, args.requests, args.round):
        numbers = range(first, min(first + args.round, args.requests))
        await asyncio.gather(*(one(number) for number in numbers))
        pauses.append(await pause(numbers.stop))
    progress.close()
    return {
        "model": model,
        "vllm": await server.version(),
        "seconds": round(time.monotonic() - begin, 1),
        "served": counts["served"],
        "hung_up": counts["hung up"],
        "failed": len(faults),
        "faults": faults[:20],
        "probes": len(pauses),
        "probes_changed": sum(one["answer"] != pauses[0]["answer"] for one in pauses),
        "preemptions": await server.gauge("vllm:num_preemptions_total"),
        "peak": peaks,
        "usage_in_pauses": [one["usage"] for one in pauses],
        "resident_mib_in_pauses": [one["resident_mib"] for one in pauses],
    }


def main() -> int:
    """Run the load, print and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base-url", default="http://localhost:8000")
    add("--tokens-only", action="store_true", help="the server was started with this flag")
    add("--requests", type=int, default=2000)
    add("--concurrency", type=int, default=64, help="requests at once")
    add("--prompt-tokens", type=int, default=4096, help="longest prompt")
    add("--output-tokens", type=int, default=128, help="longest answer")
    add("--vocabulary", type=int, default=4096, help="token ids are below this")
    add("--hang-up", type=float, default=0.05, help="share of clients that leave early")
    add("--round", type=int, default=250, help="requests from pause to pause")
    add("--seed", type=int, default=0)
    add("--pid", type=int, help="of the server on this machine, for its memory")
    add("--device", default="", help="what the server runs on, for the results")
    add("--commit", help="of the code measured; asked of git when not given")
    add("--out", type=Path, help="write the results here, as JSON")
    args = parser.parse_args()
    found = asyncio.run(soak(Server(args.base_url, args.tokens_only), args))
    result = {
        "what": "a server under mixed load",
        "command": shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
        "commit": args.commit or head_commit(),
        "device": args.device,
    } | found
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if found["failed"] or found["probes_changed"] or any(found["usage_in_pauses"]) else 0


if __name__ == "__main__":
    sys.exit(main())
