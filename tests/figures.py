"""Rows of tables in the README and docs, made of what `benchmarks/results` has."""

import json
from functools import cache
from pathlib import Path

REPO = Path(__file__).parents[1]
RESULTS = REPO / "benchmarks" / "results"


@cache
def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def line(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def text_of(page):
    return (REPO / page).read_text()
