"""Whether a tokenizer has tokens for a text."""

from collections.abc import Callable, Sequence

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint

MOST_UNKNOWN = 0.02
"""Share of a text's tokens that may stand for words that the tokenizer does not know."""


MOST_OF_A_PROMPT = 0.5
"""The same of a user's own text, which may well have rare words."""


def reader(
    checkpoint: Checkpoint, encode: Callable[[str], list[int]]
) -> Callable[[str], list[int]]:
    """`encode`, which refuses a user's text that is hardly more than unknown tokens.

    What it gives raises UserError: there is no tokenizer, or it does not know the text's words.
    """

    def read(text: str) -> list[int]:
        ids = encode(text)
        unknown = checkpoint.tokenizer.unk_token_id
        if unknown is not None and ids.count(unknown) > MOST_OF_A_PROMPT * len(ids):
            raise UserError(
                f"the tokenizer of {checkpoint.path} does not know its words: "
                f"{ids.count(unknown):,} of {len(ids):,} tokens are the unknown one"
            )
        return ids

    return read


def check_known(checkpoint: Checkpoint, ids: Sequence[int], most: float = MOST_UNKNOWN) -> None:
    """Refuse token ids of a text that a tokenizer of few words cannot tell from others.

    Raises:
        UserError: more than a share of `most` stands for unknown words, or there is no tokenizer.
    """
    unknown = checkpoint.tokenizer.unk_token_id
    if unknown is not None and list(ids).count(unknown) > most * len(ids):
        raise UserError(f"the tokenizer of {checkpoint.path} has no tokens for their words")
