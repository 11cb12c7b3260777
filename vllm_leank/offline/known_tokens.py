"""Whether a tokenizer has tokens for a text."""

from collections.abc import Sequence

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint

MOST_UNKNOWN = 0.02
"""Share of a text's tokens that may stand for words that the tokenizer does not know."""


def check_known(checkpoint: Checkpoint, ids: Sequence[int], most: float = MOST_UNKNOWN) -> None:
    """Refuse token ids of a text that a tokenizer of few words cannot tell from others.

    Raises:
        UserError: more than a share of `most` stands for unknown words, or there is no tokenizer.
    """
    unknown = checkpoint.tokenizer.unk_token_id
    if unknown is not None and list(ids).count(unknown) > most * len(ids):
        raise UserError(f"the tokenizer of {checkpoint.path} has no tokens for their words")
