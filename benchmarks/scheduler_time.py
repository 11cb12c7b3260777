"""Times vLLM's scheduler in decode steps, with its own attention and with leank, on a CPU.

    python benchmarks/scheduler_time.py --out scheduler.json

The scheduler looks at every request in every step, so with many short steps it decides how fast an
engine is. Here the bundled recall model decodes as many requests as asked for; the model's own time
is not counted. `schedule` makes a step, `update` takes in what it said. Each engine has a process
of its own, and the engines take turns, several times.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vllm_leank.bench.results import header, save_results
from vllm_leank.errors import UserError

REPO = Path(__file__).parents[1]
MODEL = REPO / "benchmarks" / "recall" / "model"
MASK = REPO / "masks" / "leank" / "recall.yaml"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
BATCHED_TOKENS = 2048
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "leank": {
        "attention_backend": "leank",
        "additional_config": {"leank": {"mask": str(MASK)}},
    },
}
TIMED = {"schedule": "schedule", "update": "update_from_output"}
"""Of what is timed, the scheduler's method."""


def take_times(scheduler: object) -> dict[str, list[float]]:
    """Lists that get the milliseconds of each call from now on."""
    times: dict[str, list[float]] = {name: [] for name in TIMED}

    def timed(call: Callable[..., object], found: list[float]) -> Callable[..., object]:
        def wrapper(*args: Any, **kwargs: Any) -> object:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            found.append(1e3 * (time.perf_counter() - begin))
            return result

        return wrapper

    for name, method in TIMED.items():
        setattr(scheduler, method, timed(getattr(scheduler, method), times[name]))
    return times


def measure(name: str, requests: int, prompt_tokens: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a decode step of that many requests. For a process of its own."""
    os.environ |= ENVIRONMENT
    import numpy as np
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(
        model=str(MODEL),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_seqs=requests,
        max_num_batched_tokens=BATCHED_TOKENS,
        # Early requests decode until the last prompt is read.
        max_model_len=prompt_tokens + 2 * requests * -(-prompt_tokens // BATCHED_TOKENS) + steps,
        **ENGINES[name],
    )
    engine = LLMEngine.from_engine_args(args)
    config = engine.vllm_config.model_config
    random = np.random.default_rng(0)
    # Nobody finishes before all have decoded for long enough.
    params = SamplingParams(
        max_tokens=config.max_model_len - prompt_tokens, ignore_eos=True, detokenize=False
    )
    for one in range(requests):
        prompt = random.integers(0, config.get_vocab_size(), prompt_tokens).tolist()
        engine.add_request(str(one), {"prompt_token_ids": prompt}, params)
    scheduler = engine.engine_core.engine_core.scheduler
    while scheduler.waiting or any(
        request.num_computed_tokens < request.num_prompt_tokens for request in scheduler.running
    ):
        engine.step()
    times = take_times(scheduler)
    for _ in range(steps):
        engine.step()
    decoding = len(scheduler.running)
    engine.engine_core.shutdown()
    if decoding != requests:
        raise UserError(f"{decoding} of {requests} requests decoded at the end")
    return {f"{name}_ms": statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=[*ENGINES])
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 82, 194])
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    for requests in args.requests:
        for repeat in range(args.repeats):
            for name in args.engines:
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    found = pool.submit(
                        measure, name, requests, args.prompt_tokens, args.steps
                    ).result()
                rows.append({"engine": name, "requests": requests, "repeat": repeat, **found})
                print(rows[-1], flush=True)
    program = "python benchmarks/scheduler_time.py"
    results = header("scheduler's time in decode steps", args.commit, program)
    results |= {"prompt_tokens": args.prompt_tokens, "steps": args.steps, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_results(results, args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"scheduler_time: {error}")
