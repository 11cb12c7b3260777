"""Greedy answers under a simulated cache, in transformers."""

from collections.abc import Sequence

import transformers

from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.attention_hook import AttentionHook
from vllm_leank.offline.context import Context, logits_after


def greedy_answer(
    model: transformers.PreTrainedModel,
    context: Context,
    first: int,
    hook: AttentionHook,
    max_tokens: int,
    stop: Sequence[int],
    draft: Sequence[int] = (),
) -> list[int]:
    """The answer that begins with the token `first`, up to the first token of `stop`, without it.

    It stands right after the context, which is as before afterwards. `draft` is what the answer may
    well be, the answer with another cache: its tokens are computed at once and kept while they are
    what the model would have said. So it makes answers cheaper, and no others.
    """
    start, answer = context.mark(), [first]
    while len(answer) < max_tokens and answer[-1] not in stop:
        # States of layers would be those behind the whole guess.
        guess = [] if context.states else list(draft[len(answer) : max_tokens - 1])
        logits = logits_after(model, context, [answer[-1], *guess], hook)
        said = logits.argmax(-1).tolist()
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
