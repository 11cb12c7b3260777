r"""What it costs to read the best far tokens alone, and what better or worse choices would cost.

    PYTHONPATH=benchmarks python -m real.selection_study --model models/qwen-1.5b \
        --masks 4bit.yaml 2bit.yaml --out selection.json \
        --questions questions.jsonl.gz --tasks niah_multikey_2,ruler_vt,code --answers 20

Far tokens are read as they are (bf16), or as an engine's archive gives them back, and chosen

* by the `lead` of K, as engines with the option `pages` choose: the channels with most bits. Where
  they are read as they are, which no engine selects, by all channels;
* by `exact` weights of full attention, the most that any choice can find;
* by chance (`random`);
* or not at all (`all`).

Measured are the KL to full attention over the last tokens of `kl.py`'s texts, each of which chooses
for itself; the share of the far tokens' attention that was found; and points of answers. All of it
is simulated in transformers and says nothing of speed. Each text and question is written when it is
done, and a run that was stopped goes on.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baselines.far_tokens import Coded, Store, unrounded
from baselines.selected_reading import ALL, EVERYTHING, WAYS, Choice
from rich.console import Console
from rich.progress import track

from real.caches import load_masks
from real.earlier import check_same, earlier_results
from real.greedy import stop_tokens
from real.judged_texts import judged_samples
from real.option_numbers import numbers
from real.questions import Question, cells_of, load_questions
from real.selection_cells import Simulated
from real.selection_table import rows_of, show
from real.unseen_texts import digest_of, unseen_texts
from vllm_leank.bench.results import describe_mask, header, save_results
from vllm_leank.core.selection import (
    DENSE_LAYERS,
    FEWEST_TOKENS,
    LEAST_TOKENS,
    SEGMENT,
    Selection,
)
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import ALL_GPUS, DTYPES, Checkpoint

WHAT = "KL to full attention, attention found and points where the best far tokens are read alone"

SAME = "model", "dtype", "window", "masks", "bf16", "shares", "least", "seed"
"""What must not have changed where results are added to others."""

OF_ANSWERS = "questions_sha256", "answer_tokens"
"""Nor this where there are answers."""

OF_TEXTS = "judged", "unseen", "unseen_sha256"
"""Nor this where there are texts: they are numbered together, so some would be judged twice."""

CONSOLE = Console(stderr=True, highlight=False)


def choices_of(shares: Sequence[float], least: int) -> dict[str, Choice]:
    """All choices by name: each way with each share of far tokens, but at least so many of them.

    Raises:
        UserError: a share or number cannot be.
    """
    if least < FEWEST_TOKENS or least % SEGMENT:
        raise UserError(
            f"--least is {least}; it must be at least {FEWEST_TOKENS}, and a multiple of {SEGMENT}"
        )
    choices = {ALL: Choice(ALL)}
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"--shares has {share}; a share is above 0 and up to 1")
        selection = replace(Selection.of(share) or EVERYTHING, least=least // SEGMENT)
        choices |= {f"{way} {share:g}": Choice(way, selection) for way in WAYS}
    return choices


@dataclass
class Study:
    """The command's work, and what it has found so far."""

    args: argparse.Namespace
    results: dict[str, Any]
    checkpoint: Checkpoint
    simulated: Simulated
    texts: dict[str, str]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Study":
        """With the model loaded, and what an earlier run has left.

        Raises:
            UserError: an option or file cannot be used.
        """
        shares, window = numbers(args.shares, float), Window(args.sink, args.recent)
        choices = choices_of(shares, args.least)
        checkpoint = Checkpoint.open(args.model)
        stores: dict[str, Store] = {} if args.no_bf16 else {"bf16": unrounded}
        masks = load_masks(args.masks, checkpoint)
        stores |= {name: Coded(mask) for name, mask in masks.items()}
        device = checkpoint.place(args.device, args.dtype)
        if device == ALL_GPUS:
            raise UserError(f"{args.model}: this study runs on one GPU; give --device cuda or cpu")
        model = checkpoint.load(args.dtype, device)
        questions = args.questions and load_questions(args.questions)[1]
        texts = unseen_texts(args.texts) if args.unseen and args.judged else {}
        fresh = {
            **header(WHAT, args.commit, "python -m real.selection_study"),
            "model": checkpoint.id,
            "dtype": str(model.dtype).removeprefix("torch."),
            "window": {"sink": window.sink, "recent": window.recent},
            "masks": {name: describe_mask(mask) for name, mask in masks.items()},
            "shares": shares,
            "least": args.least,
            "segment": SEGMENT,
            "dense_layers": DENSE_LAYERS,
            "seed": args.seed,
            "bf16": not args.no_bf16,
            "judged": args.judged,
            "unseen": args.unseen,
            "unseen_sha256": digest_of(texts),
            "questions_sha256": questions,
            "answer_tokens": args.answer_tokens,
            "skipped": [],
            "texts": [],
            "answers": [],
        }
        simulated = Simulated(model, window, stores, choices, args.seed)
        return cls(args, _earlier(args.out, fresh), checkpoint, simulated, texts)

    def judge_texts(self) -> None:
        """KL and attention found, length by length."""
        args = self.args
        key = "length", "group", "kind", "number"
        done = {tuple(cell[name] for name in key) for cell in self.results["texts"]}
        for length in numbers(args.lengths, int):
            samples, left_out = judged_samples(
                self.checkpoint, self.texts, length, args.judged, args.unseen, args.seed
            )
            for line in set(left_out) - set(self.results["skipped"]):
                CONSOLE.print(line)
                self.results["skipped"].append(line)
            cells = [
                ((length, group, kind, number), sample)
                for number, (group, (kind, sample)) in enumerate(samples)
            ]
            left = [cell for cell in cells if cell[0] not in done]
            for cell, sample in track(left, f"texts of {length:,} tokens", console=CONSOLE):
                start = time.monotonic()
                rows = self.simulated.judge(sample)
                self._write(
                    "texts",
                    dict(zip(key, cell, strict=True)) | {"tokens": len(sample.answer)},
                    rows,
                    start,
                )

    def ask(self) -> None:
        """Points: the first question of each task and length, then the second of each, ..."""
        args = self.args
        questions, _ = load_questions(args.questions)
        lengths = args.asked_lengths and numbers(args.asked_lengths, int)
        tasks = args.tasks and args.tasks.split(",")
        cells = cells_of(
            [
                one for one in questions
                if (not lengths or one.length in lengths) and (not tasks or one.task in tasks)
            ],
            args.answers,
        )  # fmt: skip
        if not cells:
            raise UserError(f"{args.questions}: has no questions of these tasks and lengths")
        done = {(one["task"], one["length"], one["number"]) for one in self.results["answers"]}
        left = [
            (number, cell[number])
            for number in range(args.answers)
            for cell in cells.values()
            if number < len(cell) and (cell[number].task, cell[number].length, number) not in done
        ]
        for number, question in track(left, "questions", console=CONSOLE):
            start = time.monotonic()
            place = {"task": question.task, "length": question.length, "number": number}
            self._write("answers", place, self._scores(question), start)

    def _scores(self, question: Question) -> dict[str, float]:
        """Of all rows."""
        tokenizer = self.checkpoint.tokenizer
        most = min(question.max_tokens, self.args.answer_tokens or question.max_tokens)
        prompt = self.checkpoint.encode_rest(question.prompt)
        stop = stop_tokens(self.checkpoint, self.simulated.model)
        answers = self.simulated.answer(prompt, most, stop)
        return {
            name: round(question.score(tokenizer.decode(ids, skip_special_tokens=True)), 4)
            for name, ids in answers.items()
        }

    def _write(self, kind: str, place: dict[str, Any], rows: dict[str, Any], start: float) -> None:
        """Add a text or a question to the results, and write them."""
        seconds = round(time.monotonic() - start, 2)
        self.results[kind].append(place | {"seconds": seconds, "rows": rows})
        self.results["rows"] = rows_of(self.results)
        if self.args.out:
            save_results(self.results, self.args.out)


def _earlier(path: Path | None, fresh: dict[str, Any]) -> dict[str, Any]:
    """What a run that was stopped has left, or `fresh`.

    Raises:
        UserError: it was another run.
    """
    if path is None:
        return fresh
    found = earlier_results(path, fresh, SAME)
    for names, is_there, is_asked in (
        (OF_ANSWERS, found["answers"], fresh["questions_sha256"]),
        (OF_TEXTS, found["texts"], fresh["judged"]),
    ):
        if not is_there:
            found |= {name: fresh[name] for name in names}
        if is_asked:
            check_same(path, found, fresh, names)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", required=True, help="directory of the model")
    add("--masks", type=Path, nargs="*", default=[], help="files of masks of bits")
    add("--no-bf16", action="store_true", help="do not read far tokens as they are")
    add("--shares", default="0.1,0.25", help="of far tokens that are read, with commas")
    add("--least", type=int, default=LEAST_TOKENS, help="far tokens that are read at least")
    add("--lengths", default="16384,32000", help="of judged texts, with commas")
    add("--judged", type=int, default=8, help="texts of kinds seen, per length; 0: no texts")
    add("--unseen", type=int, default=2, help="texts of each kind unseen")
    add("--texts", type=Path, help="folder that unseen_texts.py wrote")
    add("--answers", type=int, default=0, help="questions of each task and length")
    add("--questions", type=Path, help="file of questions.py")
    add("--tasks", help="of the questions, with commas; default: all")
    add("--answer-tokens", type=int, help="most of an answer; default: what its question says")
    add("--asked-lengths", help="of the questions, with commas; default: all")
    add("--sink", type=int, default=64)
    add("--recent", type=int, default=256)
    add("--device", help="cpu, cuda, cuda:1; by default the GPU")
    add("--dtype", default="auto", choices=DTYPES)
    add("--seed", type=int, default=0, help="of texts, and of choices by chance")
    add("--out", type=Path, help="JSON file of the results")
    add("--commit", help="of the code measured; asked of git when not given")
    return options


def main() -> None:
    """Judge, ask, and show the table."""
    args = parser().parse_args()
    try:
        if args.answers and not args.questions:
            raise UserError("--answers asks questions; name their file with --questions")
        study = Study.of(args)
        if args.judged:
            study.judge_texts()
        if args.answers:
            study.ask()
        if "rows" in study.results:
            show(study.results)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
