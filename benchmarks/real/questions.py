"""What `study.py` asks: RULER's synthetic tasks as `leank eval ruler` has them, and questions about
real text.

    PYTHONPATH=benchmarks python -m real.questions --model models/qwen-1.5b --out questions.jsonl.gz

They are written once, as text in the model's chat template, so that every cache is asked the same
and a machine without lm_eval can ask them. Needs `pip install 'lm_eval[ruler]'`. The length of a
question counts the tokens of its prompt and of its answer, as in RULER.
"""

import argparse
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from real.text_questions import TEXT_TASKS, text_questions
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.ruler import SYNTHETIC

MOST_BYTES = 1 << 30
"""Of a file of questions, unpacked."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        task: what it is one of.
        length: tokens that prompt and answer may have together.
        prompt: text, with all that the chat template adds.
        references: strings that a right answer contains.
        max_tokens: of the answer.
    """

    task: str
    length: int
    prompt: str
    references: tuple[str, ...]
    max_tokens: int

    def score(self, answer: str) -> float:
        """The share of the references that the answer has, whatever the case: RULER's measure."""
        said = answer.lower()
        return sum(one.lower() in said for one in self.references) / len(self.references)


def save_questions(questions: Sequence[Question], path: Path) -> None:
    """Write a line of JSON each, packed by gzip."""
    text = "".join(json.dumps(asdict(one)) + "\n" for one in questions)
    # No time in it: the same questions are the same file.
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load_questions(path: Path) -> tuple[list[Question], str]:
    """The questions of a file, and its sha256.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    try:
        packed = path.read_bytes()
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UserError(f"{path}: more than {MOST_BYTES >> 20} MiB of questions")
        lines = [json.loads(line) for line in text.decode().splitlines()]
        questions = [Question(**line | {"references": tuple(line["references"])}) for line in lines]
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: no file of questions: {error}") from error
    if not questions:
        raise UserError(f"{path}: no questions")
    return questions, hashlib.sha256(packed).hexdigest()


Cell = tuple[str, int]
"""A task and a length."""


def cells_of(questions: Sequence[Question], count: int | None) -> dict[Cell, list[Question]]:
    """The first `count` questions of each task and length, shortest lengths first."""
    key = lambda one: (one.length, one.task)  # noqa: E731
    return {
        (task, length): list(group)[:count]
        for (length, task), group in groupby(sorted(questions, key=key), key)
    }


def make_questions(
    checkpoint: Checkpoint, tasks: Sequence[str], lengths: Sequence[int], count: int, seed: int
) -> Iterator[Question]:
    """`count` questions of each task and length.

    Raises:
        UserError: a task is unknown, or lm_eval is missing.
    """
    if unknown := set(tasks) - {*SYNTHETIC, *TEXT_TASKS}:
        known = ", ".join((*SYNTHETIC, *TEXT_TASKS))
        raise UserError(f"--tasks has {', '.join(sorted(unknown))}; allowed: {known}")
    ruler = [task for task in tasks if task in SYNTHETIC]
    for length in lengths:
        if ruler:
            from real.ruler_questions import ruler_questions

            for task, prompt, references, max_tokens in ruler_questions(
                checkpoint, ruler, length, count
            ):
                yield Question(task, length, prompt, references, max_tokens)
        for task in tasks:
            if task in TEXT_TASKS:
                for prompt, reference, max_tokens in text_questions(
                    checkpoint, task, length, count, seed
                ):
                    yield Question(task, length, prompt, (reference,), max_tokens)


def main() -> None:
    """Write the questions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--out", type=Path, required=True, help="file, as questions.jsonl.gz")
    parser.add_argument("--tasks", default=",".join((*SYNTHETIC, *TEXT_TASKS)), help="with commas")
    parser.add_argument("--lengths", default="4096,8192,16384,32256", help="with commas")
    parser.add_argument("--count", type=int, default=50, help="of each task and length")
    parser.add_argument("--seed", type=int, default=0, help="of questions about real text")
    args = parser.parse_args()
    try:
        lengths = [int(one) for one in args.lengths.split(",")]
        checkpoint = Checkpoint.open(args.model)
        tasks = args.tasks.split(",")
        questions = list(make_questions(checkpoint, tasks, lengths, args.count, args.seed))
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    save_questions(questions, args.out)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {len(questions):,} questions, {size:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
