"""Prompts that every machine has: what archives are calibrated on where no data is given.

Four kinds in turn: generated questions about a long context in the model's chat template, source
code of Python's own library, tables of generated records, and prose (Python's help texts, licences
and descriptions of installed packages). Calibration must see prompts as long as those that are
served, so lengths are spread up to the longest; the first prompt has it.
"""

from collections.abc import Iterator

import numpy as np

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.local_texts import Texts, library_sources, prose
from vllm_leank.offline.needles import UNREAD, Generated
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.tasks import multivalue, retrieval

Named = tuple[str, Sample]

ANSWER = 64
"""Tokens at the end of a text that count as its answer."""

_GOLDEN = 0.618034


def builtin_prompts(
    checkpoint: Checkpoint,
    count: int,
    *,
    min_tokens: int,
    max_tokens: int,
    seed: int = 0,
    held_out: bool = False,
    questions: bool = True,
) -> list[Named]:
    """`count` samples with the names of their kinds, of `min_tokens` to `max_tokens` at most.

    The texts of `held_out` samples are others, for judging what was calibrated. Without `questions`
    all are texts, as long as they may be.

    Raises:
        UserError: lengths leave no room for a question.
    """
    if not 0 < min_tokens <= max_tokens:
        raise UserError(
            f"the shortest prompt has {min_tokens} tokens; it must have at least 1, and at most "
            f"the longest's {max_tokens}"
        )
    texts = {
        "python": Texts(library_sources(), held_out),
        "tables": None,
        "prose": Texts(prose(), held_out),
    }
    # A Python without sources, say, has no text of that kind.
    kinds = [kind for kind, source in texts.items() if source is None or source]
    if questions:
        kinds.insert(0, "questions")
    prompts: list[Named] = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        length = round(max_tokens * (min_tokens / max_tokens) ** (i * _GOLDEN % 1))
        rng = np.random.default_rng([seed, i, held_out])
        if kind == "questions":
            sample = _question(checkpoint, i // len(kinds), length, int(rng.integers(1 << 31)))
        else:
            source = texts[kind]
            pieces = _tables(rng) if source is None else source.pieces(rng)
            sample = _text_sample(checkpoint, pieces, length)
        prompts.append((kind, sample))
    return prompts


def _question(checkpoint: Checkpoint, number: int, length: int, seed: int) -> Sample:
    """A generated task in the chat template, or as plain text where there is none."""
    tasks = (retrieval, multivalue)
    return Generated(
        tasks, checkpoint.encode_question, checkpoint.encode_rest, length, length, seed
    )(number)


def _text_sample(checkpoint: Checkpoint, pieces: Iterator[str], length: int) -> Sample:
    """A text cut to `length` tokens, of which the last are its answer."""
    text = ""
    ids: list[int] = []
    while len(ids) < length:
        before = len(text)
        while len(text) - before < 8 * (length - len(ids)):
            text += next(pieces)
        found = len(ids)
        ids = checkpoint.encode(text)
        if len(ids) <= found:
            raise UserError(UNREAD)
    ids = ids[:length]
    answer = min(ANSWER, length // 2)
    return Sample(ids[:-answer], ids[-answer:])


def _tables(rng: np.random.Generator) -> Iterator[str]:
    """Tables of made-up records, some as CSV and some with bars."""
    places = (
        "Lima",
        "Oslo",
        "Quito",
        "Turin",
        "Izmir",
        "Kyoto",
        "Perth",
        "Dakar",
        "Tampa",
        "Bergen",
    )
    goods = ("tea", "salt", "steel", "paper", "glass", "wool", "cocoa", "timber", "copper", "rice")
    while True:
        left, right, between = ("| ", " |\n", " | ") if rng.integers(2) else ("", "\n", ",")
        year = int(rng.integers(1960, 2030))
        rows = [["order", "date", "from", "to", "goods", "tons", "price"]]
        for number in range(int(rng.integers(20, 60))):
            start, end = rng.choice(len(places), size=2, replace=False)
            month, day = int(rng.integers(1, 13)), int(rng.integers(1, 29))
            rows.append(
                [
                    f"{int(rng.integers(1000, 9999))}-{number}",
                    f"{year}-{month:02}-{day:02}",
                    places[start],
                    places[end],
                    goods[rng.integers(len(goods))],
                    f"{rng.gamma(2, 40):.1f}",
                    f"{rng.gamma(3, 500):.2f}",
                ]
            )
        yield "".join(left + between.join(row) + right for row in rows) + "\n"
