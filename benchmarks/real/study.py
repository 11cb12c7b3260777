r"""Points that a real model gets with each KV cache, through vLLM's own engine.

    PYTHONPATH=benchmarks python -m real.study --model models/qwen-1.5b --out study \
        --questions questions.jsonl.gz --variants dense,4bit.yaml,2bit.yaml,turboquant_4bit_nc

A variant is `dense`, a mask's file, or a `--kv-cache-dtype` of vLLM. Each has an engine of its own,
one at a time on each GPU, and a file of results, OUT/NAME.json, which grows with every task and
length: what was stopped goes on where it was. `study_table.py` makes a table of them, and
`study_picture.py` a picture.
"""

import argparse
import sys
from pathlib import Path

from real.questions import load_questions
from real.served import add_options, run_variants
from vllm_leank.errors import UserError


def study(args: argparse.Namespace) -> list[str]:
    """Ask every variant; gives what failed.

    Raises:
        UserError: an argument cannot be used.
    """
    questions, digest = load_questions(args.questions)
    return run_variants(
        args,
        "real.study",
        "real.study_engine",
        max(one.length for one in questions),
        {"enable_prefix_caching": False},
        {
            "questions": str(args.questions.resolve()),
            "questions_sha256": digest,
            "count": args.count,
            "int4_rows": args.int4_rows,
        },
    )


def main() -> None:
    """Ask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--questions", type=Path, required=True, help="file of questions.py")
    parser.add_argument("--count", type=int, help="of each task and length; default: all")
    parser.add_argument(
        "--int4-rows",
        type=int,
        choices=(32, 64, 128),
        help="rows of queries of a program of vLLM's int4_per_token_head; default: its 16",
    )
    try:
        failed = study(parser.parse_args())
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
