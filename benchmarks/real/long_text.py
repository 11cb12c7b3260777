r"""Whether long answers go round in circles: 200 prompts, thousands of tokens, greedy and sampled.

    PYTHONPATH=benchmarks python -m real.long_text --model models/qwen-1.5b --out long \
        --variants dense,4bit.yaml,2bit.yaml

Caches of few bits are known to send models into loops. Each variant writes on from the same short
prompts and stops where it likes; told are the lengths, how many answers end in a loop (their last
tokens are one run of at most 64, again and again) and how much of the text was said before (4-grams
of tokens that occurred earlier in the answer), beside dense's own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from real.served import DENSE, add_options, run_variants
from vllm_leank.errors import UserError
from vllm_leank.offline.intervals import ratio_estimate, wilson

TOPICS = (
    "a lighthouse keeper", "the history of bread", "how rivers change", "a chess tournament",
    "the first railways", "a village school", "bees and their hives", "an old clockmaker",
    "the night sky in winter", "a voyage round the world", "a mountain rescue", "the art of glass",
    "how volcanoes erupt", "a market in autumn", "the invention of printing", "a family of bakers",
    "whales and their songs", "a retired detective", "the tides of the sea", "a journey by balloon",
    "a hospital at night", "the history of salt", "how forests grow", "an orchestra on tour",
    "the first telephones", "a harbour town", "ants and their colonies", "a young inventor",
    "the moons of Jupiter", "a walk across a desert", "a library in a storm", "the history of tea",
    "how glaciers move", "a football season", "the building of bridges", "a small theatre",
    "birds that migrate", "a letter from abroad", "the weather in spring", "a sailing race",
)  # fmt: skip
FORMS = (
    "Write a long story about {}.",
    "Write a detailed essay on {}.",
    "Explain {} to a student, chapter by chapter.",
    "Write a dialogue of many pages about {}.",
    "Write a Python program of several modules that simulates {}, with comments.",
)
"""One prompt of each topic and form: 200."""

LOOP = 192
"""Tokens at an answer's end that are one run again and again, if it ends in a loop."""

PERIOD = 64
"""Tokens of that run, at most."""


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last `LOOP` tokens repeat a run of at most `PERIOD`."""
    end = tokens[-LOOP:]
    return len(end) == LOOP and any(
        end[period:] == end[:-period] for period in range(1, PERIOD + 1)
    )


def said_before(tokens: Sequence[int], n: int = 4) -> float:
    """The share of runs of `n` tokens that occurred earlier."""
    runs = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def summary(answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What is told of the answers of one variant in one way."""
    loops = sum(map(ends_in_loop, answers))
    repeated = ratio_estimate([said_before(one) for one in answers], [1.0] * len(answers))
    low, high = wilson(loops, len(answers))
    return {
        "answers": len(answers),
        "mean_tokens": round(sum(map(len, answers)) / len(answers), 1),
        "loops": loops,
        "loops_interval": [round(low, 4), round(high, 4)],
        "said_before": round(repeated.value, 4),
        "said_before_interval": [repeated.low, repeated.high],
    }


def prompts() -> list[str]:
    """What is asked for."""
    return [form.format(topic) for topic in TOPICS for form in FORMS]


def write(args: argparse.Namespace) -> list[str]:
    """Let every variant write; gives what failed.

    Raises:
        UserError: an argument cannot be used.
    """
    return run_variants(
        args,
        "real.long_text",
        "real.long_engine",
        args.tokens,
        {"seed": args.seed},
        {
            "what": "long answers of a real model",
            "tokens": args.tokens,
            "temperature": args.temperature,
            "seed": args.seed,
            "prompts": prompts()[: args.count],
        },
    )


def show(folder: Path) -> None:
    """Print what the variants in a folder did, dense first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    table = Table("", "way", "mean tokens", "loops", "said before")
    for one in sorted(found, key=lambda one: (one["variant"] != DENSE, one["variant"])):
        for way, told in one["ways"].items():
            table.add_row(
                one["variant"], way, f"{told['mean_tokens']:,.0f}",
                f"{told['loops']} of {told['answers']}", f"{told['said_before']:.1%}",
            )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    """Write and show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=4000, help="of an answer, at most")
    parser.add_argument("--count", type=int, help="of prompts; default: all 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="of sampled answers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        failed = write(args)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    show(args.out)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
