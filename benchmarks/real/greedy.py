"""Greedy answers under a simulated cache, in transformers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import transformers

from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.attention_hook import AttentionHook, hooked_attention
from vllm_leank.offline.context import AfterContext, Context, logits

GUESS = 32
"""Most tokens of an answer that are guessed at once."""


class Guesses:
    """What may follow two tokens: that which followed them in a text, where they stood last."""

    def __init__(self, text: Sequence[int]):
        self._text = list(text)
        self._after = {pair: place for place, pair in enumerate(pairwise(text), 2)}

    def __call__(self, before: int, last: int, most: int) -> list[int]:
        """Up to `most` tokens; none where the two never stood together."""
        place = self._after.get((before, last), len(self._text))
        return self._text[place : place + most]


def greedy_answer(
    model: transformers.PreTrainedModel,
    context: Context,
    begun: tuple[int, int],
    hook: AttentionHook,
    max_tokens: int,
    stop: Sequence[int],
    guesses: Guesses,
) -> list[int]:
    """The answer to a prompt, up to the first token of `stop`, without it. `begun` are the last
    token of the prompt and the first of the answer.

    The context has read the prompt, and has no more than that when this is done. Tokens that are
    guessed are computed at once, and kept while they are what the model would have said: answers
    cost less, and differ where rounding turns a tie alone. After a guess the next is of at most
    four tokens, and four for each that was right.
    """
    start, said = context.mark(), list(begun)  # with one token of the prompt before the answer
    # States behind a part of a guess could not be had.
    most = GUESS if context.states is None else 0
    with torch.no_grad(), hooked_attention(model, AfterContext(context, hook), context=context):
        while len(said) <= max_tokens and said[-1] not in stop:
            guess = guesses(said[-2], said[-1], min(most, max_tokens - len(said)))
            found = logits(model, context, [said[-1], *guess]).argmax(-1).tolist()
            right = 0
            while right < len(guess) and guess[right] == found[right] and guess[right] not in stop:
                right += 1
            if guess:
                most = min(GUESS, 4 * (right + 1))
            said += found[: right + 1]
            context.advance(right + 1)
    context.cut(start)
    return before_stop(said[1:], stop)


def before_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    """The tokens before the first of `stop`."""
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))]


def stop_tokens(checkpoint: Checkpoint, model: transformers.PreTrainedModel) -> list[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    found = checkpoint.tokenizer.eos_token_id if found is None else found
    return found if isinstance(found, list) else [] if found is None else [found]
