"""Sample prompts, with or without answers, from a JSONL file."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_leank.errors import UserError, shortened

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

Tokenize = Callable[[str], list[int]]

MAX_LINE = 8 << 20
"""Bytes of a line: more than a million token ids."""
MAX_FILE = 4 << 30
"""Bytes of a file."""


class Sample(NamedTuple):
    """Token ids of a prompt and of the answer that continues it."""

    prompt: list[int]
    answer: list[int]


def read_samples(
    path: Path,
    tokenize: Tokenize,
    tokenize_answer: Tokenize,
    *,
    vocab_size: int,
    max_tokens: int,
    max_samples: int | None = None,
    room: int | None = None,
    digest: "Hash | None" = None,
) -> list[Sample]:
    """Prompts with their answers; a prompt is cut at its start to `max_tokens` with the answer, as
    questions stand at its end.

    A line is `{"prompt_token_ids": [1, 2, ...]}` or `{"prompt": "text"}`, with `"answer_token_ids"`
    or `"answer"` as well; other keys are not looked at, and blank lines are skipped.
    `tokenize_answer` gives the tokens of a text that continues another. Only the first
    `max_samples` are read (None: all). `digest` is fed with the whole file, which is read once.

    With `room`, lines may lack an answer: it is empty then, and the prompt leaves that many tokens.

    Raises:
        UserError: the file cannot be read, has a bad line (no answer, say), or no prompt.
    """
    samples: list[Sample] = []
    for number, line in _lines(path, digest):
        if len(samples) == max_samples:
            if digest is None:
                break
            continue
        try:
            value = _object(line)
            prompt = _token_ids(value, "prompt", tokenize, vocab_size)
            answer: list[int] = []
            if room is None or "answer" in value or "answer_token_ids" in value:
                answer = _token_ids(value, "answer", tokenize_answer, vocab_size)
            rest = len(answer) or room or 0
            if rest >= max_tokens:
                has = f"has {rest} tokens" if answer else f"is to have {rest} tokens"
                raise UserError(f"the answer {has}; with its prompt it may have {max_tokens}")
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        samples.append(Sample(prompt[rest - max_tokens :], answer))
    if not samples:
        raise UserError(f"{path}: has no prompts")
    return samples


def _lines(path: Path, digest: "Hash | None") -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers (from 1); `digest` gets all of them."""
    size = 0
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                data = file.readline(MAX_LINE + 1)
                if not data:
                    return
                size += len(data)
                if len(data) > MAX_LINE:
                    raise UserError(f"{path}, line {number}: longer than {MAX_LINE} bytes")
                if size > MAX_FILE:
                    raise UserError(f"{path}: larger than {MAX_FILE} bytes, the limit for prompts")
                if digest is not None:
                    digest.update(data)
                if line := data.decode().strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise UserError("not JSON that can be read: nested too deep") from error
    except ValueError as error:  # of Python itself
        raise UserError("has a number of thousands of digits") from error
    if not isinstance(value, dict):
        raise UserError("must be an object")
    return value


def _token_ids(value: dict[str, Any], name: str, tokenize: Tokenize, vocab_size: int) -> list[int]:
    """Ids of `name` or `name`_token_ids, whichever the line has."""
    name_ids = f"{name}_token_ids"
    if (name in value) == (name_ids in value):
        raise UserError(f'must have one of "{name_ids}" and "{name}"')
    if name in value:
        if not isinstance(value[name], str):
            raise UserError(f'"{name}" must be text')
        try:
            value[name].encode()
        except UnicodeEncodeError as error:
            raise UserError(f'"{name}" has half of a surrogate pair, which is no text') from error
        ids = tokenize(value[name])
    else:
        ids = value[name_ids]
        if not isinstance(ids, list):
            raise UserError(f'"{name_ids}" must be a list of token ids')
    if not ids:
        raise UserError(f"the {name} is empty")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(
                f"{shortened(token)} is no token id; the vocabulary is 0..{vocab_size - 1}"
            )
    return ids
