"""What one prompt shows, and several together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_leank.offline.divergence import Divergence
from vllm_leank.offline.intervals import LEAST, Estimate, ratio_estimate, share_estimate

SHOWN = 120
"""Tokens of a prompt's end that are kept to be looked at."""


@dataclass(frozen=True)
class Comparison:
    """What comes after one prompt, dense and with leank.

    Attributes:
        source: the kind of the text, or the name of its file.
        unit: says which prompts have a context in common.
        prompt_tokens: how long the prompt is.
        before: token ids of the prompt's end.
        tokens: the T token ids that follow the prompt.
        found: what differs after each of them.
        dense_right: whether greedy decoding would write `tokens` with full attention, None where
            they are no answer.
        leank_right: the same with leank.
    """

    source: str
    unit: Hashable
    prompt_tokens: int
    before: Sequence[int]
    tokens: Sequence[int]
    found: Divergence
    dense_right: bool | None = None
    leank_right: bool | None = None

    @property
    def context(self) -> Hashable:
        """The same for prompts that have their context in common, and so are no two samples."""
        return self.source, self.unit

    @classmethod
    def of(
        cls,
        source: str,
        unit: Hashable,
        prompt: Sequence[int],
        tokens: Sequence[int],
        found: Divergence,
        right: tuple[bool | None, bool | None] = (None, None),
    ) -> "Comparison":
        """The comparison after a whole prompt."""
        return cls(source, unit, len(prompt), prompt[-SHOWN:], tokens, found, *right)

    @property
    def kl(self) -> float:
        """Mean KL in nats per token."""
        return self.found.total / len(self.tokens)

    def as_dict(self) -> dict[str, Any]:
        """In short, for JSON."""
        return {
            "source": self.source,
            "prompt_tokens": self.prompt_tokens,
            "positions": len(self.tokens),
            "agree": self.found.agree,
            "kl": self.found.total,
            "dense_right": self.dense_right,
            "leank_right": self.leank_right,
        }


def right_answers(
    answer: Sequence[int], firsts: tuple[int, int], found: Divergence
) -> tuple[bool, bool]:
    """Whether greedy decoding would write `answer`, dense and with leank.

    `firsts` are the most likely tokens before it, and `found` is what comes after its tokens.
    """
    dense, leank = (
        list(answer) == [first, *tops.tolist()][: len(answer)]
        for first, tops in zip(firsts, (found.dense_top, found.other_top), strict=True)
    )
    return dense, leank


@dataclass(frozen=True)
class Group:
    """Comparisons that are judged together; every token counts the same.

    `top1` is the share of tokens with the same most likely token, `kl` nats per token.
    """

    name: str
    samples: int
    positions: int
    top1: Estimate
    kl: Estimate

    @classmethod
    def of(cls, name: str, comparisons: Sequence[Comparison]) -> "Group":
        """The group of at least one comparison; intervals take what has a context in common as one
        sample. Where all agree, bootstrap has no width: the share's is Wilson's then.
        """
        sums: dict[Hashable, list[float]] = {}
        for one in comparisons:
            unit = sums.setdefault(one.context, [0.0, 0.0, 0.0])
            for i, number in enumerate((one.found.total, one.found.agree, len(one.tokens))):
                unit[i] += number
        kl, agree, tokens = zip(*sums.values(), strict=True)
        same = share_estimate if len(sums) >= LEAST else ratio_estimate
        return cls(
            name,
            len(comparisons),
            int(sum(tokens)),
            same(agree, tokens),
            ratio_estimate(kl, tokens),
        )
