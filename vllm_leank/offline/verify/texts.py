"""Texts that are read once and compared at several lengths, and a user's own prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.builtin_prompts import Named, builtin_prompts
from vllm_leank.offline.divergence import Divergence
from vllm_leank.offline.known_tokens import check_known, reader
from vllm_leank.offline.needles import least_tokens
from vllm_leank.offline.prompts import Sample, read_samples
from vllm_leank.offline.verify.comparison import Comparison, right_answers
from vllm_leank.offline.verify.plan import COMPARED
from vllm_leank.offline.verify.reader import Reader

Text = tuple[str, list[int]]
"""A kind and token ids."""


@dataclass(frozen=True)
class LayerLoss:
    """KL in nats over some tokens when one layer alone is archived, float64 `[L]`, and `together`,
    when all are.
    """

    alone: npt.NDArray[np.float64]
    together: float
    tokens: int


def texts(checkpoint: Checkpoint, count: int, tokens: int, seed: int) -> list[Text]:
    """`count` texts of `tokens` tokens that calibration does not read.

    Raises:
        UserError: there is no tokenizer, or it lacks tokens for such text.
    """
    named = builtin_prompts(
        checkpoint,
        count,
        min_tokens=tokens,
        max_tokens=tokens,
        seed=seed,
        held_out=True,
        questions=False,
    )
    found = [(kind, sample.prompt + sample.answer) for kind, sample in named]
    for _, ids in found:
        check_known(checkpoint, ids)
    return found


def compare_text(
    reader: Reader, text: Text, unit: int, lengths: Sequence[int]
) -> Iterator[Comparison]:
    """What follows each length of a text, less the tokens that are compared, ascending."""
    kind, ids = text
    reader.begin(len(ids))
    for length in lengths:
        end = length - COMPARED
        reader.read(ids[reader.length : end])
        found = reader.compare(ids[end:length])
        yield Comparison.of(kind, unit, ids[:end], ids[end:length], found)


def layer_loss(reader: Reader, text: Text, together: Divergence) -> LayerLoss:
    """What each layer alone does to the last tokens of a text, which has just been compared."""
    alone = [found.total for found in reader.compare_layers(text[1][-COMPARED:])]
    return LayerLoss(np.array(alone), together.total, COMPARED)


def file_samples(path: Path, checkpoint: Checkpoint, *, max_samples: int, room: int) -> list[Named]:
    """The first prompts of a JSONL file, with answers or without: `room` tokens will be written.

    Raises:
        UserError: the file cannot be used.
    """
    longest = checkpoint.max_tokens(1 << 31)
    samples = read_samples(
        path,
        reader(checkpoint, checkpoint.encode),
        reader(checkpoint, checkpoint.encode_rest),
        vocab_size=checkpoint.config.vocab_size,
        max_tokens=longest,
        max_samples=max_samples,
        room=room,
    )
    return [(path.name, one) for one in samples]


def far_samples(
    samples: Sequence[Named], window: Window, *, longest: int, room: int
) -> tuple[list[Named], list[str]]:
    """Samples cut at their start to `longest` tokens, without those that have no far tokens, and
    what to say about both.

    Raises:
        UserError: an answer leaves no room for its prompt.
    """
    kept, cut, short = [], 0, 0
    for name, (prompt, answer) in samples:
        rest = len(answer) or room
        if rest >= longest:
            raise UserError(
                f"{name}: an answer has {rest} tokens; with its prompt it may have {longest}: "
                "give a greater --max-tokens"
            )
        cut += len(prompt) + rest > longest
        prompt = prompt[rest - longest :]
        if len(prompt) + rest < least_tokens(window):
            short += 1
        else:
            kept.append((name, Sample(prompt, answer)))
    notes = []
    if cut:
        notes.append(f"{samples[0][0]}: {cut} prompts were cut to their last {longest:,} tokens")
    if short:
        notes.append(f"{samples[0][0]}: {short} prompts without far tokens were left out")
    return kept, notes


def compare_sample(reader: Reader, named: Named, unit: int, room: int) -> Comparison:
    """What follows a prompt: its answer, or what the model writes."""
    name, (prompt, answer) = named
    reader.begin(len(prompt) + (len(answer) or room))
    firsts = reader.read(prompt)
    tokens = answer or reader.write(firsts[0], room)
    found = reader.compare(tokens)
    right = right_answers(answer, firsts, found) if answer else (None, None)
    return Comparison.of(name, unit, prompt, tokens, found, right)
