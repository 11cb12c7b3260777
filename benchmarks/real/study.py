r"""Points that a real model gets with each KV cache, through vLLM's own engine.

    PYTHONPATH=benchmarks python -m real.study --model models/qwen-1.5b --out study \
        --questions questions.jsonl.gz --variants dense,4bit.yaml,2bit.yaml,turboquant_4bit_nc

A variant is `dense`, a mask's file, or a `--kv-cache-dtype` of vLLM. Each has an engine of its own,
one at a time on each GPU, and a file of results, OUT/NAME.json, which grows with every task and
length: what was stopped goes on where it was. `study_table.py` makes a table and a picture of them.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from real.questions import load_questions
from real.served import check_words, run_side_by_side, served
from vllm_leank.bench.machine import head_commit
from vllm_leank.bench.serve import parse_engine_args
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint

CONSOLE = Console(stderr=True, highlight=False)


def study(args: argparse.Namespace) -> list[str]:
    """Ask every variant; gives what failed.

    Raises:
        UserError: an argument cannot be used.
    """
    questions, digest = load_questions(args.questions)
    words = args.variants.split(",")
    check_words(words)
    checkpoint = Checkpoint.open(args.model)
    variants = [served(word, checkpoint) for word in words]
    longest = max(one.length for one in questions)
    folder: Path = args.out
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "model": str(checkpoint.path),
        # A chat template's own tokens may come on top of RULER's count.
        "max_model_len": checkpoint.max_tokens(longest + 512),
        "enable_prefix_caching": False,
    } | parse_engine_args(args.engine_args)
    runs = []
    for one in variants:
        run = {
            "variant": one.name,
            "model": checkpoint.id,
            "command": shlex.join(["python", "-m", "real.study", *sys.argv[1:]]),
            "commit": args.commit or head_commit(),
            "engine_args": common | one.engine_args,
            "token_bytes": one.token_bytes,
            "exact_tokens": one.exact_tokens,
            "questions": str(args.questions.resolve()),
            "questions_sha256": digest,
            "count": args.count,
            "results": str((folder / f"{one.name}.json").resolve()),
        }
        path = folder / f"{one.name}.run"
        path.write_text(json.dumps(run), encoding="utf-8")
        runs.append(path)
    CONSOLE.print(f"{len(runs)} engines, {len(questions):,} questions each; logs: {folder}/*.log")
    logs = [path.with_suffix(".log") for path in runs]
    return run_side_by_side("real.study_engine", runs, logs)


def main() -> None:
    """Ask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--questions", type=Path, required=True, help="file of questions.py")
    parser.add_argument("--variants", default="dense", help="with commas")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--count", type=int, help="of each task and length; default: all")
    parser.add_argument("--engine-args", metavar="JSON", help="more arguments of every engine")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    try:
        failed = study(parser.parse_args())
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
