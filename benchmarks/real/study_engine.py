"""One engine that is asked; `study.py` runs it in a process of its own.

python -m real.study_engine RUN
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from real.questions import Question, cells_of, load_questions
from vllm_leank.bench.machine import machine
from vllm_leank.bench.results import save_results
from vllm_leank.errors import UserError

SAME = "model", "engine_args", "questions_sha256"
"""What must not have changed where results are added to others."""


def earlier_results(run: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a run that was stopped has left, or none yet.

    Raises:
        UserError: it was another run.
    """
    fresh = {name: run[name] for name in run if name not in ("questions", "results")}
    if not path.exists():
        return fresh | {"what": "points of a real model", "cells": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in SAME if found.get(name) != run[name]]:
        raise UserError(f"{path}: made with another {', '.join(changed)}; move it away")
    return found


def ask(llm: LLM, questions: Sequence[Question]) -> dict[str, Any]:
    """Scores of greedy answers to questions of one task and length, asked all at once, and the
    tokens and seconds that they took.
    """
    tokenizer = llm.get_tokenizer()
    prompts = [
        {"prompt_token_ids": tokenizer.encode(one.prompt, add_special_tokens=False)}
        for one in questions
    ]
    params = [SamplingParams(temperature=0, max_tokens=one.max_tokens) for one in questions]
    start = time.perf_counter()
    outputs = [one.outputs[0] for one in llm.generate(prompts, params, use_tqdm=False)]
    seconds = time.perf_counter() - start
    return {
        "scores": [
            round(one.score(answer.text), 4) for one, answer in zip(questions, outputs, strict=True)
        ],
        "prompt_tokens": sum(len(one["prompt_token_ids"]) for one in prompts),
        "answer_tokens": sum(len(answer.token_ids) for answer in outputs),
        "seconds": round(seconds, 3),
    }


def main() -> None:
    """Ask what was not asked yet."""
    run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    path = Path(run["results"])
    try:
        questions, _ = load_questions(Path(run["questions"]))
        results = earlier_results(run, path)
    except UserError as error:
        sys.exit(f"error: {error}")
    done = {(cell["task"], cell["length"]) for cell in results["cells"]}
    cells = cells_of(questions, run["count"])
    if done >= cells.keys():
        return
    llm = LLM(**run["engine_args"])
    results["machine"] = machine()
    for (task, length), asked in cells.items():
        if (task, length) not in done:
            results["cells"].append({"task": task, "length": length} | ask(llm, asked))
            save_results(results, path)
            print(f"{task}, {length}: {sum(results['cells'][-1]['scores'])}", flush=True)


if __name__ == "__main__":
    main()
