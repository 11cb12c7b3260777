"""Compares a model's answers under a mask with those of full attention: `leank verify`.

Both read the same prompt as when served, with full attention (unless the window says that prompts
are read pruned), and then the same continuation, token by token what the engine would compute: with
far K and V as they are, and as the engine's archive gives them back. What differs between the two
distributions of each next token is the doing of the mask and the archive's format.

It runs in transformers (`simulate.py`), so it judges the mask and not the engine.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.served_archive import ServedArchive
from vllm_leank.offline.simulate import Archive, SimulatedArchive

ROWS = 64
"""Next-token distributions compared at once: bounds the memory of large vocabularies."""


@dataclass(frozen=True)
class Comparison:
    """What one sample shows; see `Summary` for several.

    `kl` is the divergence of leank's distribution from the dense one, summed over `positions`, in
    nats; `agree` counts the positions where both have the same most likely token. `dense_right` and
    `leank_right` tell whether greedy decoding would write the sample's answer, None without one.
    """

    source: str
    prompt_tokens: int
    positions: int
    agree: int
    kl: float
    dense_right: bool | None
    leank_right: bool | None


@dataclass(frozen=True)
class Summary:
    """Comparisons together; every position counts the same.

    `kept` is the share of the answers that dense attention gets right which leank gets right as
    well, None where there are none.
    """

    samples: int
    positions: int
    top1: float
    kl: float
    answers: int
    dense_right: int
    leank_right: int
    kept: float | None

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> "Summary":
        """The summary of at least one comparison."""
        positions = sum(one.positions for one in comparisons)
        asked = [one for one in comparisons if one.dense_right is not None]
        dense = [one for one in asked if one.dense_right]
        return cls(
            samples=len(comparisons),
            positions=positions,
            top1=sum(one.agree for one in comparisons) / positions,
            kl=sum(one.kl for one in comparisons) / positions,
            answers=len(asked),
            dense_right=len(dense),
            leank_right=sum(bool(one.leank_right) for one in asked),
            kept=sum(bool(one.leank_right) for one in dense) / len(dense) if dense else None,
        )


@dataclass(frozen=True)
class Length:
    """The summary of samples of about one length: the fewest and most tokens they have."""

    least: int
    most: int
    summary: Summary


def by_length(comparisons: Sequence[Comparison]) -> list[Length]:
    """Short samples, then long ones: those of more than half the tokens of the longest. Only long
    ones where there are no others. What rounding costs may grow with the far tokens.
    """
    sizes = [one.prompt_tokens + one.positions for one in comparisons]
    found = []
    for is_long in (False, True):
        part = [i for i, size in enumerate(sizes) if (2 * size > max(sizes)) == is_long]
        if part:
            tokens = [sizes[i] for i in part]
            summary = Summary.of([comparisons[i] for i in part])
            found.append(Length(min(tokens), max(tokens), summary))
    return found


@dataclass(frozen=True)
class Thresholds:
    """What a mask must reach to pass.

    Raises:
        UserError: a threshold is out of range.
    """

    top1: float
    kl: float
    answers: float

    def __post_init__(self) -> None:
        for name, share in (("--min-top1", self.top1), ("--min-answers", self.answers)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} is {share}; it must lie between 0 and 1")
        if not self.kl >= 0:
            raise UserError(f"--max-kl is {self.kl}; it must be 0 or more")

    def judge(self, summary: Summary) -> dict[str, bool | None]:
        """Whether each of `top1`, `kl` and `answers` is reached; None: nothing to judge by.

        What is not a number reaches nothing.
        """
        return {
            "top1": summary.top1 >= self.top1,
            "kl": summary.kl <= self.kl,
            "answers": None if summary.kept is None else summary.kept >= self.answers,
        }


class Verifier:
    """Compares samples under a mask with full attention.

    Far tokens are stored in the format that `archive_dtype` and the mask decide. Prompts are
    computed `chunk` tokens at a time. A sample without an answer is continued with what
    the model itself writes, `tokens` at most.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        mask: Mask,
        window: Window,
        *,
        archive_dtype: str = NATIVE.name,
        tokens: int = 32,
        chunk: int = 1024,
    ):
        self.model = model
        self.tokens = tokens
        self.chunk = chunk
        self.geometry = mask.geometry
        self._archive = ServedArchive(mask, archive_dtype)
        self.archive_format = self._archive.archive_format
        self._simulated = SimulatedArchive(window)
        self._hooked: set[int] = set()

    def compare(self, samples: Iterable[tuple[str, Sample]]) -> Iterator[Comparison]:
        """One comparison per named sample.

        Raises:
            UserError: the model's attention is not what masks are for, or gives no numbers.
        """
        for source, sample in samples:
            with torch.inference_mode(), hooked_attention(self.model, self._attend):
                comparison = self._compare(source, sample)
            yield comparison

    def _compare(self, source: str, sample: Sample) -> Comparison:
        cache = other = DynamicCache()
        first = other_first = self._read(sample.prompt, cache, None)
        answer = sample.answer or self._write(first, cache)
        if not self._simulated.window.exact:
            other = DynamicCache()
            other_first = self._read(sample.prompt, other, self._archive)
        # Dense is the same computation, so that nothing but the archive differs.
        dense = self._logits(answer, cache, _as_it_is)
        pruned = self._logits(answer, other, self._archive)
        kl, agree = divergence(dense, pruned)
        right: list[bool | None] = [None, None]
        if sample.answer:
            expected = torch.tensor(answer, device=dense.device)
            right = [
                bool((torch.cat([token, logits[:-1].argmax(-1)]) == expected).all())
                for token, logits in ((first, dense), (other_first, pruned))
            ]
        return Comparison(source, len(sample.prompt), len(answer), agree, kl, *right)

    def _read(
        self, prompt: list[int], cache: DynamicCache, archive: Archive | None
    ) -> torch.Tensor:
        """Fill the cache with a prompt; the most likely token after it, `[1]`."""
        self._use(archive)
        for at in range(0, len(prompt), self.chunk):
            logits = self._forward(prompt[at : at + self.chunk], cache, logits_to_keep=1)
        L, H, D = self.geometry.num_layers, self.geometry.num_kv_heads, self.geometry.head_dim
        shapes = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]
        if self._hooked != set(range(L)) or shapes != [(H, D)] * L:
            raise UserError(
                f"the model's attention is not what its config says ({self.geometry}), or does not "
                "go through transformers' AttentionInterface, so the mask cannot be tried on it"
            )
        return logits[-1:].argmax(-1)

    def _write(self, first: torch.Tensor, cache: DynamicCache) -> list[int]:
        """What the model writes, greedily and dense; the cache is as it was before."""
        self._use(None)
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        written = [int(first)]
        while len(written) < self.tokens and written[-1] not in ends:
            written.append(int(self._forward(written[-1:], cache).argmax(-1)))
        if len(written) > 1:
            cache.crop(1 - len(written))
        return written

    def _logits(self, answer: list[int], cache: DynamicCache, archive: Archive) -> torch.Tensor:
        """Logits `[T, vocabulary]` after each token of `answer`; the cache is as it was before."""
        self._use(archive)
        logits = self._forward(answer, cache)
        cache.crop(-len(answer))
        return logits

    def _forward(self, ids: list[int], cache: DynamicCache, **options: Any) -> torch.Tensor:
        tokens = torch.tensor([ids], device=self.model.device)
        return self.model(tokens, past_key_values=cache, use_cache=True, **options).logits[0]

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor | None:
        self._hooked.add(layer)
        if self._simulated.archive is None:
            return None
        return self._simulated(layer, query, key, value, attention_mask, scaling)

    def _use(self, archive: Archive | None) -> None:
        """What queries read of far tokens from now on; None leaves attention as it is."""
        self._simulated.archive = archive
        self._simulated.blind = self._archive.blind if archive is self._archive else None


def _as_it_is(
    layer: int, first: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return key, value


def divergence(dense: torch.Tensor, pruned: torch.Tensor) -> tuple[float, int]:
    """KL(dense || pruned) of rows of logits in nats, summed, and rows with the same maximum."""
    kl, agree = 0.0, 0
    for left, right in zip(dense.split(ROWS), pruned.split(ROWS), strict=True):
        p, q = left.float().log_softmax(-1), right.float().log_softmax(-1)
        if not (p.isfinite().all() and q.isfinite().all()):
            raise UserError("the model's logits are not finite; try another --dtype")
        kl += float((p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
    return max(kl, 0.0), agree
