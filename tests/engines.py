"""Real vLLM engines, in this process, for tests that look inside."""

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

# Before vLLM is imported: the engine runs in this process, where tests can look at its pages.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import pytest
import torch
from poison import cache_memory, poison, poison_freed_blocks, poison_new_blocks
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.triton_utils import dispatcher

from vllm_leank.core.plan import CachePlan
from vllm_leank.core.window import Window
from vllm_leank.mask.file import Mask, save_mask
from vllm_leank.serving.settings import load_settings

CACHE_BYTES = 1 << 27
"""Cache of an engine, unless a test asks for more: it is filled with zeros at every start."""


@dataclass(frozen=True)
class Engine:
    """A running engine and what tests look at in it."""

    llm: LLM

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def block_pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def plan(self) -> CachePlan:
        return load_settings(self.llm.llm_engine.vllm_config).plan

    @property
    def window(self) -> Window:
        return load_settings(self.llm.llm_engine.vllm_config).window

    @property
    def memory(self) -> torch.Tensor:
        """The whole cache in the model's dtype, `[num_blocks, items of a block]`."""
        return cache_memory(self.llm.llm_engine.vllm_config)

    def poison(self, blocks: Iterable[Any]) -> list[int]:
        """NaN in those of the blocks that are free and not in the prefix cache; their ids."""
        return poison(self.memory, blocks)

    def poison_freed_blocks(self) -> list[int]:
        """NaN in blocks the moment they go back to the pool, from now on; their ids."""
        return poison_freed_blocks(self.block_pool, self.memory)

    def poison_new_blocks(self) -> list[int]:
        """NaN in blocks the moment a request gets them, from now on; their ids."""
        return poison_new_blocks(self.block_pool, self.memory)

    def watch_hits(self, of_preempted: bool = False) -> list[int]:
        """Tokens that requests found in the prefix cache, from now on: all of them, or those that
        had been preempted.
        """
        hits: list[int] = []
        lookup = self.scheduler.kv_cache_manager.get_computed_blocks

        def watch(request: Any, *args: Any, **kwargs: Any) -> Any:
            found = lookup(request, *args, **kwargs)
            if not of_preempted or request.num_preemptions:
                hits.append(found[1])
            return found

        self.scheduler.kv_cache_manager.get_computed_blocks = watch
        return hits

    def watch_preemptions(self) -> list[int]:
        """Output tokens that requests had when they were preempted, from now on."""
        preempted: list[int] = []
        preempt = self.scheduler._preempt_request

        def count(request: Any, *args: Any, **kwargs: Any) -> Any:
            preempted.append(request.num_output_tokens)
            return preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = count
        return preempted

    def watch_blocks_held(self) -> list[tuple[int, int]]:
        """A request's computed tokens and all blocks held, when it has got blocks, from now on."""
        held: list[tuple[int, int]] = []
        manager, pool = self.scheduler.kv_cache_manager, self.block_pool
        allocate = manager.allocate_slots

        def watch(request: Any, *args: Any, **kwargs: Any) -> Any:
            found = allocate(request, *args, **kwargs)
            taken = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            held.append((request.num_computed_tokens, taken))
            return found

        manager.allocate_slots = watch
        return held

    def watch_steps_in_flight(self) -> list[int]:
        """Tokens of its requests in flight whenever the scheduler asks for blocks, from now on."""
        in_flight: list[int] = []
        manager = self.scheduler.kv_cache_manager
        allocate = manager.allocate_slots

        def count(request: Any, *args: Any, **kwargs: Any) -> Any:
            in_flight.append(request.num_in_flight_tokens)
            return allocate(request, *args, **kwargs)

        manager.allocate_slots = count
        return in_flight

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, **params: Any
    ) -> list[tuple[list[int], list[float]]]:
        """Greedy tokens and their log-probabilities, for prompts submitted at once."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(
                max_tokens=max_tokens,
                temperature=0,
                logprobs=0,
                ignore_eos=True,
                detokenize=False,
                **params,
            ),
            use_tqdm=False,
        )
        return [
            (
                list(output.outputs[0].token_ids),
                [next(iter(top.values())).logprob for top in output.outputs[0].logprobs],
            )
            for output in outputs
        ]


@contextmanager
def planned_ahead() -> Iterator[None]:
    """Engines on CPU that plan a step while the one before is in flight: with vLLM's asynchronous
    scheduler, which vLLM's CPU platform turns off. The runner's copies to the host, which it waits
    for, are finished at once there.
    """
    load_general_plugins()
    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_update_config(cls: Any, config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "check_and_update_config", classmethod(check_and_update_config))
        for name in ("Event", "Stream", "current_stream", "stream"):
            patch.setattr(torch.cuda, name, MagicMock())
        yield


# What is loaded by now lives as long as the process: collections need not look at it.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)

_register_kernels = dispatcher.register_kernels
_replaced: set[str] = set()


def _replace_kernels(overrides: Mapping[str, Callable[..., Any]]) -> None:
    """Replace the kernels that have not been replaced in this process."""
    new = {name: override for name, override in overrides.items() if name not in _replaced}
    if new:
        _register_kernels(new)
        _replaced.update(new)


@contextmanager
def _quickly() -> Iterator[None]:
    """Start or end an engine without what costs most of it on CPU: vLLM collects garbage eight
    times, half a second each where so much is loaded, and at every start looks through all modules
    for kernels to replace, which the first engine of a process has done for good.
    """
    if torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "freeze", "unfreeze"):
            patch.setattr(gc, name, lambda *_: 0)
        patch.setattr(dispatcher, "register_kernels", _replace_kernels)
        yield


@contextmanager
def engine(
    model: Path,
    mask: Mask | Path | None = None,
    *,
    sink: int = 32,
    recent: int = 64,
    prefill: str = "exact",
    pages: float | None = None,
    **args: Any,
) -> Iterator[Engine]:
    """An engine on CPU in fp32: with leank and the mask, or, without a mask, plain vLLM."""
    if mask is not None:
        if isinstance(mask, Mask):
            path = Path(model) / f"{mask.sha256}.yaml"
            save_mask(mask, path, overwrite=True)
            mask = path
        options = {"mask": str(mask), "sink": sink, "recent": recent, "prefill": prefill}
        if pages is not None:
            options["pages"] = pages
        args |= {"attention_backend": "leank", "additional_config": {"leank": options}}
    defaults = {
        "dtype": "float32",
        "max_model_len": 8192,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "seed": 0,
    }
    with _quickly():
        llm = LLM(str(model), **(defaults | args))
    try:
        yield Engine(llm)
    finally:
        with _quickly():
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
        gc.collect()
