r"""Points of caches that no engine here has: simulated in transformers.

    PYTHONPATH=benchmarks python -m real.simulated_study --model models/qwen-1.5b \
        --questions questions.jsonl.gz --variants kivi,kitty,think --masks 2bit.yaml --out sim.json

Asks what `study.py` asks. A prompt is read with full attention; then each cache gives its greedy
answer, with K and V of tokens that it has rounded as it gives them back, and full attention gives
its own (`dense`). Archives of masks are read as engines read them, so those that both studies ask
tell how far this one is from an engine. It says nothing of speed.

The first question of each task and length comes first, then the second of each: a run that was
stopped has asked about as many of each, and goes on where it was.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines.unrounded import Unrounded
from rich.console import Console
from rich.progress import track

from real.answers import add_answers, scores_of, tell_run
from real.caches import OTHERS, Variant, caches_of_group, check_groups, load_masks, served_mask
from real.earlier import earlier_results
from real.greedy import Guesses, greedy_answer, stop_tokens
from real.questions import Question, cells_of, load_questions
from real.served import DENSE
from real.study_table import show
from vllm_leank.bench.results import describe_mask, header, save_results
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import DTYPES, Checkpoint
from vllm_leank.offline.context import Context, logits_after, read_prompt
from vllm_leank.offline.plain_attention import plain_attention

WHAT = "points of a real model with simulated KV caches"

SAME = "model", "window", "masks", "questions_sha256"
"""What must not have changed where results are added to others, nor may the model's dtype."""

CHUNK = 4096
"""Tokens of a prompt that are computed at once."""

CONSOLE = Console(stderr=True, highlight=False)


def full_attention(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    """An attention hook that reads everything as it is."""
    return plain_attention(query, key, value, None, scaling, sink_scores)


@dataclass(frozen=True)
class Caches:
    """What is asked: dense attention first, then masks' archives, and other caches.

    Attributes:
        checkpoint: the model's.
        variants: one for each cache; masks have their own windows.
        masks: what is told of each, by name.
    """

    checkpoint: Checkpoint
    variants: Sequence[Variant]
    masks: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Caches":
        """What the command line names.

        Raises:
            UserError: a model, group or file cannot be used.
        """
        groups = args.variants.split(",") if args.variants else []
        check_groups(groups, OTHERS)
        checkpoint = Checkpoint.open(args.model)
        masks = load_masks(args.masks, checkpoint)
        geometry = checkpoint.geometry
        variants = [Variant(DENSE, full_attention, Unrounded().token_bytes(geometry), 0)]
        for name, mask in masks.items():
            window = Window(mask.sink, mask.recent)
            variants.append(served_mask(f"leank {name}", mask, window, once=True))
        for group in groups:
            variants += caches_of_group(group, geometry, Window(args.sink, args.recent), once=True)
        told = {name: describe_mask(mask) for name, mask in masks.items()}
        return cls(checkpoint, variants, told)

    def check(self, questions: Sequence[Question]) -> None:
        """Refuse answers so long that guessed tokens could become far, and be rounded, before it
        is known whether they are right.

        Raises:
            UserError: an answer may be longer than what a mask keeps as it is.
        """
        longest = max(one.max_tokens for one in questions)
        for one in self.variants:
            if one.mask is not None and longest > one.mask.recent:
                raise UserError(
                    f"an answer of {longest} tokens does not fit into the last {one.mask.recent}, "
                    f"which {one.name} keeps as they are"
                )


@dataclass
class Asker:
    """A model that answers with each cache."""

    model: transformers.PreTrainedModel
    caches: Caches

    def __post_init__(self) -> None:
        self._context = Context(self.caches.checkpoint.geometry)
        self._stop = stop_tokens(self.caches.checkpoint, self.model)

    @torch.inference_mode()
    def answers(self, prompt: Sequence[int], max_tokens: int) -> dict[str, list[int]]:
        """Greedy answers by name. The first token, which follows from the prompt alone, is the same
        in all.
        """
        model, context = self.model, self._context
        read_prompt(model, context, prompt[:-1], CHUNK)
        logits = logits_after(model, context, prompt[-1:], full_attention)
        context.advance(1)
        for one in self.caches.variants:
            if one.begin is not None:
                one.begin(model, context, prompt)
        begun = prompt[-1], int(logits[-1].argmax())
        guesses, found = Guesses(prompt), {}
        for one in self.caches.variants:
            found[one.name] = greedy_answer(
                model, context, begun, one.hook, max_tokens, self._stop, guesses
            )
            if one.end is not None:
                one.end()
            if one.name == DENSE:  # what others may well say, too
                guesses = Guesses([*prompt, *found[DENSE]])
        return found

    def scores(self, question: Question) -> dict[str, float]:
        """Scores of all caches, from 0 to 1."""
        checkpoint = self.caches.checkpoint
        prompt = checkpoint.encode_rest(question.prompt)
        return {
            name: round(
                question.score(checkpoint.tokenizer.decode(ids, skip_special_tokens=True)), 4
            )
            for name, ids in self.answers(prompt, question.max_tokens).items()
        }


_asker: Asker | None = None
"""The one of this process, where it is of the pool."""


def _load(args: argparse.Namespace, devices: Any) -> None:
    """What a process of the pool begins with: the model, on the next of the devices."""
    global _asker
    caches = Caches.of(args)
    _asker = Asker(caches.checkpoint.load(args.dtype, devices.get()), caches)


def _ask(question: Question) -> tuple[dict[str, float], str]:
    """Scores, and the model's dtype."""
    assert _asker is not None
    return _asker.scores(question), str(_asker.model.dtype).removeprefix("torch.")


def in_order(
    questions: Sequence[Question], count: int | None, result: dict[str, Any]
) -> list[Question]:
    """The questions that a result lacks: the first of each task and length, then the second of
    each, up to `count`.
    """
    cells, scores = cells_of(questions, count), scores_of(result)
    return [
        cell[number]
        for number in range(max(map(len, cells.values())))
        for name, cell in cells.items()
        if len(scores.get(name, ())) <= number < len(cell)
    ]


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Ask what is left, and write the results after each question.

    Raises:
        UserError: an option or file cannot be used.
    """
    questions, digest = load_questions(args.questions)
    caches = Caches.of(args)
    caches.check(questions)
    fresh = {
        **header(WHAT, args.commit, "python -m real.simulated_study"),
        "count": args.count,
        "model": caches.checkpoint.id,
        "dtype": None,
        "window": {"sink": args.sink, "recent": args.recent},
        "masks": caches.masks,
        "questions_sha256": digest,
        "variants": [
            {"variant": one.name, "token_bytes": one.token_bytes, "cells": []}
            for one in caches.variants
        ],
    }
    results = earlier_results(args.out, fresh, SAME)
    if [one["variant"] for one in results["variants"]] != [one.name for one in caches.variants]:
        raise UserError(f"{args.out}: made with other variants; move it away")
    by_name = {one["variant"]: one for one in results["variants"]}
    left = in_order(questions, args.count, by_name[DENSE])
    if left:
        tell_run(fresh, results, has_answers=results["dtype"] is not None)
    for question, (scores, dtype) in zip(left, _all_scores(args, left), strict=True):
        if results["dtype"] not in (None, dtype):
            raise UserError(f"{args.out}: made with another dtype, {results['dtype']}")
        results["dtype"] = dtype
        for name, score in scores.items():
            add_answers(by_name[name], question.task, question.length, {"scores": [score]})
        save_results(results, args.out)
    return results


def _all_scores(
    args: argparse.Namespace, questions: Sequence[Question]
) -> Iterator[tuple[dict[str, float], str]]:
    """What `_ask` gives for one question after the other, in as many processes as there should be.

    Raises:
        UserError: a process ended.
    """
    if not questions:
        return
    spawn = get_context("spawn")  # CUDA does not survive a fork
    devices = [f"cuda:{gpu}" for gpu in range(torch.cuda.device_count())] or ["cpu"]
    waiting = spawn.Queue()
    for number in range(args.workers * len(devices)):
        waiting.put(devices[number % len(devices)])
    pool = ProcessPoolExecutor(
        args.workers * len(devices), spawn, initializer=_load, initargs=(args, waiting)
    )
    try:
        answers = pool.map(_ask, questions)
        yield from track(answers, "questions", total=len(questions), console=CONSOLE)
    except BrokenProcessPool as error:
        raise UserError(
            "a process ended; what it said is above. Fewer --workers need less memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = options.add_argument
    option("--model", required=True, help="directory of the model")
    option("--questions", type=Path, required=True, help="file of questions.py")
    option("--variants", default="kivi,kitty,think", help="groups of caches, with commas")
    option("--masks", type=Path, nargs="*", default=[], help="files of masks")
    option("--count", type=int, help="of each task and length; default: all")
    option("--workers", type=int, default=1, help="processes on each GPU, or on the CPU")
    option("--sink", type=int, default=64, help="of ThinK; masks say theirs")
    option("--recent", type=int, default=256, help="of ThinK")
    option("--dtype", default="auto", choices=DTYPES)
    option("--out", type=Path, required=True, help="JSON file of the results")
    option("--commit", help="of the code measured; asked of git when not given")
    return options


def main() -> None:
    """Ask, and show the table."""
    try:
        show(study(parser().parse_args()))
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # A run that is stopped ends its processes, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    main()
