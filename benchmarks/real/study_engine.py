"""One engine that is asked; `study.py` runs it in a process of its own.

python -m real.study_engine RUN
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from real.answers import add_answers, scores_of, tell_run
from real.earlier import earlier_results
from real.int4_rows import launch_with_rows
from real.questions import Cell, Question, cells_of, load_questions
from vllm_leank.bench.machine import machine
from vllm_leank.bench.results import save_results
from vllm_leank.errors import UserError

WHAT = "points of a real model"

SAME = "model", "engine_args", "mask", "questions_sha256"
"""What must not have changed where results are added to others."""

UNTOLD = "questions", "results", "int4_rows"
"""What results do not repeat: places of files, and what the command says of each run."""


def results_of(run: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a run that was stopped, or asked fewer questions, has left; or none yet.

    Raises:
        UserError: it was another run.
    """
    fresh = {name: run[name] for name in run if name not in UNTOLD}
    return earlier_results(path, fresh | {"what": WHAT, "cells": []}, SAME)


def unasked(
    cells: Mapping[Cell, Sequence[Question]], results: dict[str, Any]
) -> dict[Cell, Sequence[Question]]:
    """The questions of each task and length that come after those asked, where there are any."""
    asked = scores_of(results)
    left = {name: questions[len(asked.get(name, ())) :] for name, questions in cells.items()}
    return {name: questions for name, questions in left.items() if questions}


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
        results = results_of(run, path)
    except UserError as error:
        sys.exit(f"error: {error}")
    left = unasked(cells_of(questions, run["count"]), results)
    if not left:
        return
    if rows := run["int4_rows"]:
        launch_with_rows(rows)
    llm = LLM(**run["engine_args"])
    tell_run(run | {"machine": machine()}, results, bool(results["cells"]))
    for (task, length), asked in left.items():
        answers = ask(llm, asked)
        add_answers(results, task, length, answers)
        save_results(results, path)
        print(f"{task}, {length}: {sum(answers['scores'])} of {len(asked)}", flush=True)


if __name__ == "__main__":
    main()
