"""Greedy answers under a simulated cache, in transformers."""

from collections.abc import Sequence
from itertools import pairwise

import transformers

from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.attention_hook import AttentionHook
from vllm_leank.offline.context import Context, logits_after

GUESS = 32
"""Most tokens of an answer that are guessed at once."""


def greedy_answer(
    model: transformers.PreTrainedModel,
    context: Context,
    prompt: Sequence[int],
    first: int,
    hook: AttentionHook,
    max_tokens: int,
    stop: Sequence[int],
    like: Sequence[int] = (),
) -> list[int]:
    """The answer to a prompt, of which `first` is the first token, up to the first token of `stop`,
    without it.

    The context has read the prompt, and has no more than that when this is done. What followed the
    last two tokens elsewhere in the prompt, or in `like`, the answer with another cache, is guessed
    to follow here, too. Guessed tokens are computed at once, and kept while they are what the model
    would have said: answers cost less, and differ where rounding turns a tie alone.
    """
    start, answer = context.mark(), [first]
    text = [*prompt, *like]
    after = {pair: place for place, pair in enumerate(pairwise(text), 2)}  # the last one counts
    while len(answer) < max_tokens and answer[-1] not in stop:
        before = answer[-2] if len(answer) > 1 else prompt[-1]
        place = after.get((before, answer[-1]), len(text))
        guess = text[place : place + min(GUESS, max_tokens - 1 - len(answer))]
        if context.states is not None:
            guess = []  # states behind a part of a guess could not be had
        said = logits_after(model, context, [answer[-1], *guess], hook).argmax(-1).tolist()
        right = 0
        while right < len(guess) and guess[right] == said[right] and guess[right] not in stop:
            right += 1
        answer += said[: right + 1]
        context.advance(right + 1)
    context.cut(start)
    return before_stop(answer, stop)


def before_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    """The tokens before the first of `stop`."""
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))]


def stop_tokens(checkpoint: Checkpoint, model: transformers.PreTrainedModel) -> list[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    found = checkpoint.tokenizer.eos_token_id if found is None else found
    return found if isinstance(found, list) else [] if found is None else [found]
