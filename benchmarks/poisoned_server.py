"""`vllm serve` with leank on one GPU, or a CPU, where memory that nobody may read is NaN.

    python benchmarks/poisoned_server.py MODEL --attention-backend leank ...

The whole cache is NaN at first, then each block when it is freed (but for those that the prefix
cache keeps), and again when a request gets it. Takes the flags of `vllm serve`. For a check of
`soak.py` itself, `--spoil 20` first plants a fault: every twentieth time that a request gets
blocks, one that is in use is overwritten with another.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from poison import LOGGER, cache_memory, poison_freed_blocks, poison_new_blocks, spoil_blocks

from vllm_leank.serving.vllm.backend_name import is_selected

SPOIL = "LEANK_SPOIL_BLOCKS"
"""Tells the engine's process of `--spoil`."""


def poison_engines() -> None:
    """Poison the memory of every engine that this process makes from now on."""
    from vllm.v1.engine.core import EngineCore

    make = EngineCore.__init__

    def make_poisoned(core: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        make(core, config, *args, **kwargs)
        if config.parallel_config.world_size > 1 or not is_selected(config):
            raise ValueError("poisoned_server.py: for --attention-backend leank on one GPU alone")
        memory, pool = cache_memory(config), core.scheduler.kv_cache_manager.block_pool
        memory.fill_(math.nan)
        poison_freed_blocks(pool, memory)
        poison_new_blocks(pool, memory)
        if every := int(os.environ.get(SPOIL, 0)):
            spoil_blocks(pool, memory, every)
        LOGGER.info("%d blocks are NaN, and will be when they are free", len(memory))

    EngineCore.__init__ = make_poisoned


def main() -> None:
    """Become `vllm serve`."""
    words = sys.argv[1:]
    if words[:1] == ["--spoil"]:
        os.environ[SPOIL] = words[1]
        words = words[2:]
    sys.argv = ["vllm", "serve", *words, "--distributed-executor-backend", "uni"]
    from vllm.entrypoints.cli.main import main as vllm
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # There vLLM gives the worker a process of its own, but for this.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    vllm()


if __name__ in ("__main__", "__mp_main__"):
    # The engine's process, which is spawned, imports this file as __mp_main__.
    poison_engines()
if __name__ == "__main__":
    main()
