"""Engines that real models are asked in: dense, with a mask, or with a cache of vLLM's own."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from baselines.rounded_cache import MODEL_BYTES

from real.variants import mask_token_bytes, vllm_caches
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask

DENSE = "dense"


@dataclass(frozen=True)
class Served:
    """An engine.

    Attributes:
        name: what tables call it, and its results' file.
        engine_args: vLLM's arguments in which it differs.
        token_bytes: bytes over all layers of a far token, with all scales; None where that is not
            known.
        exact_tokens: tokens of a request that stay as they were.
    """

    name: str
    engine_args: dict[str, Any]
    token_bytes: float | None
    exact_tokens: int = 0


def served(word: str, checkpoint: Checkpoint) -> Served:
    """What a word of `--variants` stands for: `dense`, a mask's file, or a `kv_cache_dtype`.

    Raises:
        UserError: the file is no mask.
    """
    geometry = checkpoint.geometry
    dense = 2.0 * MODEL_BYTES * math.prod(geometry.shape)
    if word == DENSE:
        return Served(DENSE, {}, dense)
    path = Path(word)
    if path.suffix in (".yaml", ".yml"):
        mask = load_mask(path)
        leank = {"leank": {"mask": str(path.resolve())}}
        arguments = {"attention_backend": "leank", "additional_config": leank}
        return Served(path.stem, arguments, mask_token_bytes(mask), mask.sink + mask.recent)
    known = {cache.name.removeprefix("vLLM "): cache for cache in vllm_caches(len(geometry.layers))}
    size = known[word].token_bytes(geometry) if word in known else None
    return Served(f"vllm_{word}", {"kv_cache_dtype": word}, size)


def gpus() -> int:
    """GPUs that there are."""
    import torch

    return torch.cuda.device_count()


def run_side_by_side(module: str, runs: Sequence[Path], logs: Sequence[Path]) -> list[str]:
    """Run `python -m MODULE RUN` for each run, one at a time on each GPU, or on the CPU.

    Gives what failed, a sentence each: one engine that does not start stops no other.
    """
    free: Queue[int | None] = Queue()
    for gpu in range(gpus()) or [None]:  # type: ignore[union-attr]
        free.put(gpu)

    def run(path: Path, log: Path) -> str | None:
        gpu = free.get()
        try:
            env = dict(os.environ)
            if gpu is not None:
                # Counted within what this process sees.
                seen = env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpus() else []
                env["CUDA_VISIBLE_DEVICES"] = (
                    seen[gpu] if gpu < len(seen) and seen[gpu] else str(gpu)
                )
            with log.open("w", encoding="utf-8") as file:
                done = subprocess.run(
                    [sys.executable, "-m", module, path],
                    env=env, stdout=file, stderr=subprocess.STDOUT, check=False,
                )  # fmt: skip
            if done.returncode:
                return f"{path.stem}: ended with exit code {done.returncode}; see {log}"
            return None
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(free.qsize()) as pool:
        return [said for said in pool.map(run, runs, logs) if said]


def check_words(words: Sequence[str]) -> None:
    """Refuse names that stand for the same results.

    Raises:
        UserError: some do.
    """
    stems = [Path(word).stem for word in words]
    if twice := {one for one in stems if stems.count(one) > 1}:
        raise UserError(f"--variants names {', '.join(sorted(twice))} twice; rename the file")
