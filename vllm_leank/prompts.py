"""Sample prompts from a JSONL file."""

import json
from collections.abc import Callable
from pathlib import Path

from vllm_leank.errors import UserError


def read_prompts(
    path: Path,
    tokenize: Callable[[str], list[int]],
    *,
    vocab_size: int,
    max_prompts: int,
    max_tokens: int,
) -> list[list[int]]:
    """Token ids of the first `max_prompts` prompts, each cut to its last `max_tokens` tokens.

    A line is `{"prompt_token_ids": [1, 2, ...]}` or `{"prompt": "text"}`; other keys (answers, say)
    are not looked at, and blank lines are skipped. The end of a prompt is kept because questions
    stand there.

    Raises:
        UserError: the file cannot be read, has a bad line, or no prompt.
    """
    prompts: list[list[int]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if len(prompts) == max_prompts:
                    break
                if line.strip():
                    try:
                        ids = _token_ids(line, tokenize, vocab_size)
                    except UserError as error:
                        raise UserError(f"{path}, line {number}: {error}") from error
                    prompts.append(ids[-max_tokens:])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    if not prompts:
        raise UserError(f"{path}: has no prompts")
    return prompts


def _token_ids(line: str, tokenize: Callable[[str], list[int]], vocab_size: int) -> list[int]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(value, dict) or ("prompt" in value) == ("prompt_token_ids" in value):
        raise UserError('must be an object with one of "prompt_token_ids" and "prompt"')
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise UserError('"prompt" must be text')
        ids = tokenize(value["prompt"])
    else:
        ids = value["prompt_token_ids"]
        if not isinstance(ids, list):
            raise UserError('"prompt_token_ids" must be a list of token ids')
    if not ids:
        raise UserError("the prompt is empty")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(f"{token!r} is no token id; the vocabulary is 0..{vocab_size - 1}")
    return ids
