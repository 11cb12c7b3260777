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
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines.once_per_prompt import OncePerPrompt
from baselines.unrounded import Unrounded
from rich.console import Console
from rich.progress import track

from real.caches import THEIRS, Variant, load_masks, others, served_mask
from real.greedy import greedy_answer, stop_tokens
from real.questions import Question, cells_of, load_questions
from real.served import DENSE, visible_gpus
from real.study_table import add, scores_of, show
from vllm_leank.bench.results import describe_mask, header, save_results
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import DTYPES, Checkpoint
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.context import Context, logits_after, read_prompt
from vllm_leank.offline.plain_attention import plain_attention
from vllm_leank.offline.simulate import SimulatedArchive

WHAT = "points of a real model with simulated KV caches"

SAME = "what", "model", "dtype", "window", "masks", "questions_sha256"
"""What must not have changed where results are added to others."""

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


def variants_of(
    groups: Sequence[str], masks: dict[str, Mask], geometry: Geometry, window: Window
) -> list[Variant]:
    """Dense attention, masks' archives, and groups of other caches.

    Raises:
        UserError: a group is unknown.
    """
    if unknown := set(groups) - set(THEIRS):
        raise UserError(f"--variants has {sorted(unknown)}; allowed: {', '.join(THEIRS)}")
    size = Unrounded().token_bytes(geometry)
    variants = [Variant(DENSE, full_attention, size, 0)]
    variants += [_rounded_once(name, mask) for name, mask in masks.items()]
    for group in groups:
        variants += others(group, geometry, window)
    return variants


def _rounded_once(name: str, mask: Mask) -> Variant:
    """A mask's archive, with its own window."""
    window = Window(mask.sink, mask.recent)
    one = served_mask(f"leank {name}", mask, window)
    assert isinstance(one.hook, SimulatedArchive)
    assert one.hook.archive is not None
    archive = OncePerPrompt(one.hook.archive)
    hook = SimulatedArchive(window, archive, one.hook.blind)
    return replace(one, hook=hook, begin=lambda model, context, prompt: archive.forget())


@dataclass
class Asker:
    """A model that answers with each cache; the first is the dense one."""

    checkpoint: Checkpoint
    model: transformers.PreTrainedModel
    variants: Sequence[Variant]

    def __post_init__(self) -> None:
        self._context = Context(self.checkpoint.geometry)
        self._stop = stop_tokens(self.checkpoint, self.model)

    @torch.inference_mode()
    def answers(self, prompt: Sequence[int], max_tokens: int) -> dict[str, list[int]]:
        """Greedy answers by name. The first token, which follows from the prompt alone, is the same
        in all.

        Raises:
            UserError: so long an answer would have far tokens of its own, rounded as guessed.
        """
        for one in self.variants:
            if one.mask is not None and max_tokens > one.mask.recent:
                raise UserError(
                    f"an answer of {max_tokens} tokens does not fit into the last "
                    f"{one.mask.recent}, which {one.name} keeps as they are"
                )
        model, context = self.model, self._context
        read_prompt(model, context, prompt[:-1], CHUNK)
        logits = logits_after(model, context, prompt[-1:], full_attention)
        context.advance(1)
        for one in self.variants:
            if one.begin is not None:
                one.begin(model, context, prompt)
        first = int(logits[-1].argmax())
        found: dict[str, list[int]] = {}
        for one in self.variants:
            like = found.get(DENSE, ())
            found[one.name] = greedy_answer(
                model, context, prompt, first, one.hook, max_tokens, self._stop, like
            )
        return found

    def scores(self, question: Question) -> dict[str, float]:
        """Scores of all caches, from 0 to 1."""
        tokenizer = self.checkpoint.tokenizer
        prompt = self.checkpoint.encode_rest(question.prompt)
        return {
            name: round(question.score(tokenizer.decode(ids, skip_special_tokens=True)), 4)
            for name, ids in self.answers(prompt, question.max_tokens).items()
        }


_asker: Asker | None = None
"""Of a process of the pool."""


def _load(args: argparse.Namespace, devices: Any) -> None:
    """Begin a process of the pool."""
    global _asker
    checkpoint = Checkpoint.open(args.model)
    model = checkpoint.load(args.dtype, devices.get())
    masks = load_masks(args.masks, checkpoint)
    window = Window(args.sink, args.recent)
    variants = variants_of(_groups(args), masks, checkpoint.geometry, window)
    _asker = Asker(checkpoint, model, variants)


def _ask(question: Question) -> dict[str, float]:
    assert _asker is not None
    return _asker.scores(question)


def _groups(args: argparse.Namespace) -> list[str]:
    return args.variants.split(",") if args.variants else []


def unasked(questions: Sequence[Question], count: int | None, result: dict[str, Any]) -> list[int]:
    """Places of the questions that were not asked yet: the first of each task and length, then the
    second of each, ...
    """
    places = {id(question): place for place, question in enumerate(questions)}
    cells = cells_of(questions, count)
    scores = scores_of(result)
    return [
        places[id(cell[number])]
        for number in range(max(map(len, cells.values())))
        for name, cell in cells.items()
        if len(scores.get(name, ())) <= number < len(cell)
    ]


def earlier_results(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """What a run that was stopped has left, or `fresh`.

    Raises:
        UserError: it was another run.
    """
    if not path.exists():
        return fresh
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = {name: found[name] for name in SAME}
        names = [one["variant"] for one in found["variants"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: no results of this study: {error}") from error
    changed = [name for name in SAME if same[name] != fresh[name]]
    if names != [one["variant"] for one in fresh["variants"]]:
        changed.append("variants")
    if changed:
        raise UserError(f"{path}: made with another {', '.join(changed)}; move it away")
    return found


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Ask what is left, and write the results after each question.

    Raises:
        UserError: an option or file cannot be used.
    """
    questions, digest = load_questions(args.questions)
    checkpoint = Checkpoint.open(args.model)
    window, masks = Window(args.sink, args.recent), load_masks(args.masks, checkpoint)
    variants = variants_of(_groups(args), masks, checkpoint.geometry, window)
    fresh = {
        **header(WHAT, args.commit, "python -m real.simulated_study"),
        "model": checkpoint.id,
        "dtype": args.dtype,
        "window": {"sink": window.sink, "recent": window.recent},
        "masks": {name: describe_mask(mask) for name, mask in masks.items()},
        "questions_sha256": digest,
        "variants": [
            {"variant": one.name, "token_bytes": one.token_bytes, "cells": []} for one in variants
        ],
    }
    results = earlier_results(args.out, fresh)
    by_name = {one["variant"]: one for one in results["variants"]}
    left = [questions[place] for place in unasked(questions, args.count, by_name[DENSE])]
    for question, scores in zip(left, _all_scores(args, left), strict=True):
        for name, score in scores.items():
            add(question.task, question.length, {"scores": [score]}, by_name[name])
        save_results(results, args.out)
    return results


def _all_scores(
    args: argparse.Namespace, questions: Sequence[Question]
) -> Iterator[dict[str, float]]:
    """Scores of one question after the other, of as many processes as there should be."""
    spawn = get_context("spawn")  # CUDA does not survive a fork
    devices = [f"cuda:{gpu}" for gpu in range(len(visible_gpus()))] or ["cpu"]
    waiting = spawn.Queue()
    for number in range(args.workers * len(devices)):
        waiting.put(devices[number % len(devices)])
    with ProcessPoolExecutor(
        args.workers * len(devices), spawn, initializer=_load, initargs=(args, waiting)
    ) as pool:
        answers = pool.map(_ask, questions)
        yield from track(answers, "questions", total=len(questions), console=CONSOLE)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", required=True, help="directory of the model")
    add("--questions", type=Path, required=True, help="file of questions.py")
    add("--variants", default="kivi,kitty,think", help="groups of caches, with commas")
    add("--masks", type=Path, nargs="*", default=[], help="files of masks")
    add("--count", type=int, help="of each task and length; default: all")
    add("--workers", type=int, default=1, help="processes on each GPU, or on the CPU")
    add("--sink", type=int, default=64, help="of ThinK; masks say theirs")
    add("--recent", type=int, default=256, help="of ThinK")
    add("--dtype", default="auto", choices=DTYPES)
    add("--out", type=Path, required=True, help="JSON file of the results")
    add("--commit", help="of the code measured; asked of git when not given")
    return options


def main() -> None:
    """Ask, and show the table."""
    try:
        show(study(parser().parse_args()))
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
