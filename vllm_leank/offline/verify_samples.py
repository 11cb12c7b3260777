"""What `leank verify` asks: a user's prompts, and generated needles.

Samples come with the name of where they are from.
"""

from collections.abc import Sequence
from pathlib import Path

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.needles import Generated, least_tokens
from vllm_leank.offline.prompts import Sample, read_samples
from vllm_leank.offline.tasks import multivalue, retrieval

Named = tuple[str, Sample]

_TASKS = {"needle among keys": retrieval, "four needles": multivalue}


def file_samples(
    path: Path,
    checkpoint: Checkpoint,
    window: Window,
    *,
    max_samples: int,
    max_tokens: int,
    room: int,
) -> tuple[list[Named], int]:
    """The first prompts of a JSONL file, with answers or without, and how many were too short.

    Too short are those that have no far tokens even when the answer, or `room` tokens, are written.

    Raises:
        UserError: the file cannot be used.
    """
    samples = read_samples(
        path,
        checkpoint.encode,
        checkpoint.encode_rest,
        vocab_size=checkpoint.config.vocab_size,
        max_tokens=checkpoint.max_tokens(max_tokens),
        max_samples=max_samples,
        room=room,
    )
    least = least_tokens(window)
    far = [one for one in samples if len(one.prompt) + (len(one.answer) or room) >= least]
    return [(path.name, one) for one in far], len(samples) - len(far)


def needle_samples(
    checkpoint: Checkpoint, window: Window, *, count: int, max_tokens: int, seed: int
) -> list[Named]:
    """`count` haystacks in the model's own tokens, from a quarter of `max_tokens` on.

    Raises:
        UserError: there is no tokenizer, it has no tokens for such text, or `max_tokens` is too
            small for far tokens.
    """
    least, longest = least_tokens(window), checkpoint.max_tokens(max_tokens)
    if longest < least:
        raise UserError(
            f"needles of {longest} tokens would have no far tokens; with sink {window.sink} and "
            f"recent {window.recent} they need {least}"
        )
    source = Generated(
        list(_TASKS.values()),
        checkpoint.encode,
        checkpoint.encode_rest,
        max(least, longest // 4),
        longest,
        seed,
    )
    names = list(_TASKS)
    samples = [(names[number % len(names)], source(number)) for number in range(count)]
    _check_written(samples, checkpoint)
    return samples


def _check_written(samples: Sequence[Named], checkpoint: Checkpoint) -> None:
    """Refuse needles that a tokenizer of few words cannot tell apart."""
    unknown = checkpoint.tokenizer.unk_token_id
    if unknown is not None and any(
        unknown in one.prompt or unknown in one.answer for _, one in samples
    ):
        raise UserError(f"the tokenizer of {checkpoint.path} has no tokens for their words")
