"""One engine under load: what `leank bench serve` runs in a process of its own.

    python -P -m vllm_leank.bench.engine_run RUN.json RESULT.json

Prompts are random token ids, all different, so nothing is shared and every prompt is computed. A
few of them go first, one at a time, if any are wanted: time to first token. Then all the others at
once, with more tokens to generate than can be waited for; when the engine holds as many as it can
and has decoded for some steps without computing a prompt, the rest is aborted.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_leank.bench.steady import SteadyState, Step
from vllm_leank.errors import UserError

WARMUP_TOKENS = 16
"""Tokens that each of the first two prompts generates, one prompt after the other: what the first
takes longer, it waits for something that should have been made at startup."""


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Attributes:
        engine_args: vLLM's engine arguments.
        prompt_tokens: tokens of each prompt.
        steady_steps: decode steps that are measured.
        num_prompts: prompts that are submitted at once.
        lone_prompts: prompts that are submitted one by one, after two more to warm up; 0: none, and
            nothing is known of first tokens.
        seed: of the prompts.
        limit_s: seconds that are waited for steady decoding.
    """

    engine_args: dict[str, Any]
    prompt_tokens: int
    steady_steps: int
    num_prompts: int
    lone_prompts: int
    seed: int
    limit_s: float


class _Recorder(StatLoggerBase):
    """Passes what the engine reports of its steps on."""

    def __init__(self) -> None:
        self.state = SteadyState()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None or iteration_stats is None:
            return
        self.state.add(
            Step(
                time=time.perf_counter(),
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs,
                prompt_tokens=iteration_stats.num_prompt_tokens,
                new_tokens=iteration_stats.num_generation_tokens,
                preempted=iteration_stats.num_preempted_reqs,
                latencies=tuple(iteration_stats.inter_token_latencies_iter),
            )
        )

    def log_engine_initialized(self) -> None:
        pass


class _Load:
    """An engine and the prompts it gets."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recorder = _Recorder()
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(**run.engine_args),
            usage_context=UsageContext.LLM_CLASS,
            stat_loggers=[lambda *_, **__: self.recorder],
        )
        self.config = self.engine.vllm_config
        self._rng = np.random.default_rng(run.seed)
        self._count = 0

    def submit(self, max_tokens: int) -> str:
        """Add a request with a new prompt; returns its id."""
        vocabulary = self.config.model_config.get_vocab_size()
        prompt = self._rng.integers(0, vocabulary, self.run.prompt_tokens).tolist()
        self._count += 1
        return self.engine.add_request(
            str(self._count),
            {"prompt_token_ids": prompt},
            SamplingParams(
                max_tokens=max_tokens,
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            ),
        )

    def lone_s(self, max_tokens: int = 1) -> tuple[float, float]:
        """Seconds that a lone prompt takes to its first token, and to its last."""
        begin = time.perf_counter()
        self.submit(max_tokens)
        first = None
        while self.engine.has_unfinished_requests():
            if self.engine.step() and first is None:
                first = time.perf_counter() - begin
        assert first is not None
        return first, time.perf_counter() - begin

    def fill(self) -> SteadyState:
        """Submit all prompts and decode until the state is steady for long enough."""
        state = self.recorder.state = SteadyState()
        room = self.config.model_config.max_model_len - self.run.prompt_tokens
        requests = [self.submit(room) for _ in range(self.run.num_prompts)]
        deadline = time.perf_counter() + self.run.limit_s
        while self.engine.has_unfinished_requests() and time.perf_counter() < deadline:
            self.engine.step()
            if state.settled(self.run.steady_steps):
                break
        self.engine.abort_request(requests)
        return state


def measure(run: Run) -> dict[str, Any]:
    """Run an engine and give its figures.

    Raises:
        UserError: it never decoded steadily.
    """
    begin = time.perf_counter()
    load = _Load(run)
    started = time.perf_counter()
    whole = [load.lone_s(WARMUP_TOKENS) for _ in range(2 if run.lone_prompts else 0)]
    first_tokens = [load.lone_s()[0] for _ in range(run.lone_prompts)]
    filling = time.perf_counter()
    state = load.fill()
    done = time.perf_counter()
    load.engine.engine_core.shutdown()
    stretch = state.best
    if not stretch.steps:
        raise UserError(
            "the engine never had all running requests decode at once; give --time-limit or "
            "--max-model-len more room"
        )
    scheduler, cache = load.config.scheduler_config, load.config.cache_config
    return {
        "device_type": load.config.device_config.device_type,
        "concurrent": stretch.running,
        "peak_running": state.peak,
        "waiting": stretch.steps[-1].waiting,
        "preempted": state.preempted,
        "decode": {
            "steps": len(stretch.steps),
            "seconds": stretch.seconds,
            "tokens_per_s": stretch.tokens_per_s,
            "tpot_p50_ms": stretch.latency_ms(50),
            "tpot_p99_ms": stretch.latency_ms(99),
        },
        "requests_s": {
            name: {"first_token": first, "total": total, "tokens": WARMUP_TOKENS}
            for name, (first, total) in zip(("first", "second"), whole, strict=False)
        },
        "ttft_s": {
            "median": statistics.median(first_tokens) if first_tokens else None,
            "all": first_tokens,
        },
        "seconds": {
            "start": started - begin,
            "until_full": stretch.begin - filling,
            "all_prompts": done - filling,
            "total": done - begin,
        },
        "engine": {
            "num_gpu_blocks": cache.num_gpu_blocks,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "async_scheduling": scheduler.async_scheduling,
        },
    }


def main() -> None:
    """Read the run, write its figures, or the message of what the user can change."""
    source, target = map(Path, sys.argv[1:])
    run = Run(**json.loads(source.read_text(encoding="utf-8")))
    try:
        result = measure(run)
    except UserError as error:
        result = {"error": str(error)}
    target.write_text(json.dumps(result | {"run": asdict(run)}), encoding="utf-8")


if __name__ == "__main__":
    main()
