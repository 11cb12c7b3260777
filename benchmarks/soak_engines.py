"""Runs `soak.py` on servers of one model, one after the other: plain vLLM, and leank.

    python benchmarks/soak_engines.py --model MODEL --variants dense,mask.yaml,nan:mask.yaml \
        --minutes 24 --out FOLDER

A variant is `dense`, a mask's file, or `nan:` and a mask's file: then memory that nobody may read
is NaN (`poisoned_server.py`). `fault:` and a mask's file is a check of the soak itself: blocks in
use are overwritten now and then, and it must fail. The others may change no larger share of their
answers than `dense`, so it comes first, or runs at the same time elsewhere: then its results are
given as --plain. Give all a small pool, for preemptions: with
--engine-args '{"kv_cache_memory_bytes": 536870912}' a model of 1.5B. Each leaves its results and
its server's log in FOLDER. Exits with 1 if a soak did not end as it must; FOLDER/verdicts.json says
which.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from engine_server import CONSOLE, VLLM, engine_server, leave_in_order
from real.served import DENSE, check_words, served
from soak import GRACE
from stand_in_tokenizer import tokenizer_for

from vllm_leank.bench.results import header, save_results
from vllm_leank.bench.serve import parse_engine_args
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint

HERE = Path(__file__).parent
POISONED = ("-P", str(HERE / "poisoned_server.py"))
FAULT = "fault"
PROGRAMS = {"nan": POISONED, FAULT: (*POISONED, "--spoil", "20")}
"""What Python is started with, by the beginning of a variant's word."""

STOP = 20
"""Seconds that a server may take to stop."""


def _name(word: str) -> str:
    """Of a variant's files."""
    kind, _, mask = word.rpartition(":")
    return "_".join(filter(None, (kind, Path(mask).name)))


def _level(mask: str, args: argparse.Namespace) -> list[str]:
    """Options that say what changed answers are compared with."""
    if mask == DENSE:
        return ["--allow-changed"]
    plain = args.plain or args.out / f"{DENSE}.json"
    return ["--plain", str(plain)] if args.plain or plain.exists() else []


def soak(word: str, args: argparse.Namespace, until: float) -> str:
    """Start a server, put it under load until about the clock shows `until`; what came of it.

    Raises:
        UserError: the server does not start.
    """
    kind, _, mask = word.rpartition(":")
    one = served(mask, args.checkpoint)
    name = Path(_name(word)).stem
    out = args.out / f"{name}.json"
    engine_args = {"tokenizer": args.tokenizer} | one.engine_args | args.engine_args
    server = engine_server(
        args.model,
        engine_args,
        log=args.out / f"{name}.log",
        seconds=until - time.monotonic(),
        program=PROGRAMS.get(kind, VLLM),
    )
    with server as (url, _):
        level = _level(mask, args)
        minutes = (until - time.monotonic() - STOP) / 60
        command = [
            *(sys.executable, "-P", str(HERE / "soak.py"), "--base-url", url),
            *("--minutes", f"{minutes:.2f}", "--out", str(out)),
            *level,
            *(("--commit", args.commit) if args.commit else ()),
            *shlex.split(args.soak),
        ]
        CONSOLE.print(f"$ {shlex.join(command)}")
        try:
            done = subprocess.run(command, stdout=2, timeout=60 * minutes + GRACE + 30, check=False)
        except subprocess.TimeoutExpired:
            return f"{name}: hung"
    verdict = "failed" if done.returncode else "passed"
    if kind == FAULT and out.exists():
        verdict = "fault found" if done.returncode else "fault not found"
    return f"{name}: {verdict}"


def main() -> int:
    """Soak all of them."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of the model")
    add("--variants", default=DENSE, help="dense, masks' files, nan:MASK, fault:MASK; with commas")
    add("--minutes", type=float, default=24, help="that all may take")
    add("--engine-args", metavar="JSON", help="more arguments of every engine")
    add("--plain", type=Path, help="results of `dense`; read when a soak ends")
    add("--soak", default="", metavar="WORDS", help="options of soak.py")
    add("--commit", help="of the code measured; asked of git when not given")
    add("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    until = begin + 60 * args.minutes
    leave_in_order(60 * args.minutes + 2 * GRACE)
    words = args.variants.split(",")
    check_words([_name(word) for word in words])
    args.engine_args = {"enable_prefix_caching": True} | parse_engine_args(args.engine_args)
    args.checkpoint = Checkpoint.open(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    results = header("soaks", args.commit, "python benchmarks/soak_engines.py")
    verdicts = results["verdicts"] = []
    with tempfile.TemporaryDirectory() as folder:
        args.tokenizer = str(tokenizer_for(Path(args.checkpoint.path), Path(folder)))
        for index, word in enumerate(words):
            now = time.monotonic()
            try:
                verdict = soak(word, args, now + (until - now) / (len(words) - index))
            except UserError as error:
                verdict = f"{word}: {error}"
            CONSOLE.print(verdict)
            verdicts.append(verdict)
            save_results(results, args.out / "verdicts.json")
    return 0 if all(one.endswith((": passed", ": fault found")) for one in verdicts) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
