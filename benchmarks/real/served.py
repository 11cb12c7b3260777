"""Engines that real models are asked in: dense, with a mask, or with a cache of vLLM's own."""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from baselines.ends_whole import ENDS, whole_layers, whole_name
from baselines.rounded_cache import MODEL_BYTES
from rich.console import Console

from real.caches import mask_token_bytes, vllm_caches
from vllm_leank.bench.machine import head_commit
from vllm_leank.bench.results import describe_mask
from vllm_leank.bench.serve import parse_engine_args
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask

DENSE = "dense"

CONSOLE = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Served:
    """An engine.

    Attributes:
        name: what tables call it, and its results' file.
        engine_args: vLLM's arguments in which it differs.
        token_bytes: bytes over all layers of a far token, with all scales; None where that is not
            known.
        exact_tokens: tokens of a request that stay as they were.
        mask: what identifies its mask, if it has one.
    """

    name: str
    engine_args: dict[str, Any]
    token_bytes: float | None
    exact_tokens: int = 0
    mask: dict[str, Any] | None = None


def served(word: str, checkpoint: Checkpoint) -> Served:
    """What a word of `--variants` stands for: `dense`, a mask's file, one with `@` and the leank
    option `pages`, or a `kv_cache_dtype`, or one with `@ends`, where some layers stay as they are.

    Raises:
        UserError: the file is no mask, or there is no such word.
    """
    geometry = checkpoint.geometry
    dense = 2.0 * MODEL_BYTES * math.prod(geometry.shape)
    if word == DENSE:
        return Served(DENSE, {}, dense)
    name, _, pages = word.partition("@")
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        mask = load_mask(path)
        options: dict[str, Any] = {"mask": str(path.resolve())}
        if pages:
            options["pages"] = json.loads(pages)
        leank = {"leank": options}
        arguments = {"attention_backend": "leank", "additional_config": leank}
        name = f"{path.stem}_pages_{pages}" if pages else path.stem
        size, exact = mask_token_bytes(mask), mask.sink + mask.recent
        return Served(name, arguments, size, exact, describe_mask(mask))
    num_layers = len(geometry.layers)
    known = {cache.name.removeprefix("vLLM "): cache for cache in vllm_caches(num_layers)}
    arguments: dict[str, Any] = {"kv_cache_dtype": name}
    if pages == ENDS:
        whole = whole_layers(num_layers)
        arguments["kv_cache_dtype_skip_layers"] = list(map(str, whole))
        word, name = whole_name(name, len(whole)), f"{name}_{ENDS}"
    elif pages:
        raise UserError(f"--variants has {word}; vLLM's caches have @{ENDS} alone")
    size = known[word].token_bytes(geometry) if word in known else None
    return Served(f"vllm_{name}", arguments, size)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all studies of engines have."""
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument(
        "--variants",
        default=DENSE,
        help="dense, masks' files, MASK@PAGES, kv_cache_dtypes, or such a one with @ends: the "
        "first and last two layers stay as they are; all with commas",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--engine-args", metavar="JSON", help="more arguments of every engine")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")


def run_variants(
    args: argparse.Namespace,
    module: str,
    engine: str,
    tokens: int,
    engine_args: dict[str, Any],
    more: dict[str, Any],
) -> list[str]:
    """Run `python -m ENGINE` for each variant, one at a time on each GPU, or on the CPU; see
    `add_options` for `args`. Each gets a file that says what to do, and has a log.

    Args:
        args: the command line.
        module: the study, which was started with it.
        engine: the module to run.
        tokens: most that a request has, without what a chat template adds.
        engine_args: vLLM's arguments of all engines.
        more: what else a run's file says.

    Returns:
        What failed, a sentence each: one engine that does not start stops no other.

    Raises:
        UserError: an option cannot be used.
    """
    words = args.variants.split(",")
    check_words(words)
    checkpoint = Checkpoint.open(args.model)
    common = {
        "model": str(checkpoint.path),
        "max_model_len": checkpoint.max_tokens(tokens + 512),
        **engine_args,
        **parse_engine_args(args.engine_args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for word in words:
        one = served(word, checkpoint)
        run = {
            "variant": one.name,
            "model": checkpoint.id,
            "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
            "commit": args.commit or head_commit(),
            "engine_args": common | one.engine_args,
            "token_bytes": one.token_bytes,
            "exact_tokens": one.exact_tokens,
            "mask": one.mask,
            "results": str((args.out / f"{one.name}.json").resolve()),
        }
        path = args.out / f"{one.name}.run"
        path.write_text(json.dumps(run | more), encoding="utf-8")
        runs.append(path)
    CONSOLE.print(f"{len(runs)} engines; logs: {args.out}/*.log")
    return _run_side_by_side(engine, runs)


def visible_gpus() -> list[str]:
    """What names each GPU in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(gpu) for gpu in range(count)]


def _run_side_by_side(engine: str, runs: Sequence[Path]) -> list[str]:
    """Gives what failed."""
    free: Queue[dict[str, str]] = Queue()
    for gpu in visible_gpus():
        free.put({"CUDA_VISIBLE_DEVICES": gpu})
    if free.empty():
        free.put({})  # the CPU

    def run(path: Path) -> str | None:
        place = free.get()
        log = path.with_suffix(".log")
        try:
            with log.open("w", encoding="utf-8") as file:
                done = subprocess.run(
                    [sys.executable, "-m", engine, path],
                    env=os.environ | place, stdout=file, stderr=subprocess.STDOUT, check=False,
                )  # fmt: skip
        finally:
            free.put(place)
        return f"{path.stem}: exit code {done.returncode}; see {log}" if done.returncode else None

    with ThreadPoolExecutor(free.qsize()) as pool:
        return [said for said in pool.map(run, runs) if said]


def check_words(words: Sequence[str]) -> None:
    """Refuse names that stand for the same results.

    Raises:
        UserError: some do.
    """
    stems = [Path(file).stem + pages for file, _, pages in (word.partition("@") for word in words)]
    if twice := {one for one in stems if stems.count(one) > 1}:
        raise UserError(f"--variants names {', '.join(sorted(twice))} twice; rename the file")
