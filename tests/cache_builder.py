"""A layer's cache as vLLM would hand it to kernels, made to hurt whoever reads what it must not.

Blocks are handed out in random order, and their pages lie apart. Whatever was not written is NaN,
what formats keep beside K and V included: fresh pages, page tails, block 0 and the pages of freed
blocks. Block tables only ever grow, so rows keep the ids of freed blocks.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from archive_definition import PACKED, profiles_for
from torch import Tensor
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.codecs import codec_of
from vllm_leank.kernels.codecs.codec import Stored

from vllm_leank.core.formats import NATIVE, ArchiveFormat
from vllm_leank.core.pages import LEAST_BLOCK, CacheLayout
from vllm_leank.core.profile import CLASSES, Profile
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import GRANULE, Window


@dataclass(eq=False)
class Request:
    """One request: all of its queries, keys and values, and its block table rows.

    Attributes:
        prompt: tokens of the prompt.
        query: `[length, num_heads, head_dim]`.
        key: `[length, num_kv_heads, head_dim]`.
        value: like `key`.
        expected: attention by definition, fp64, like `query`.
        computed: tokens computed so far.
        window_row: window page of each `window_block` tokens, freed ones included.
        archive_row: archive page of each `archive_block` tokens.
        freed: indices into `window_row` that were freed.
    """

    prompt: int
    query: Tensor
    key: Tensor
    value: Tensor
    expected: Tensor = field(init=False)
    computed: int = 0
    window_row: list[int] = field(default_factory=list)
    archive_row: list[int] = field(default_factory=list)
    freed: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.query)


@dataclass
class Step:
    """What a kernel gets in one step, `[num_tokens, ...]` with padding tokens at the end."""

    batch: Batch
    query: Tensor
    key: Tensor
    value: Tensor
    expected: Tensor
    """Of the tokens that are not padding, fp64."""


class CacheBuilder:
    """Pools, requests and steps of one layer.

    Args:
        kept: stored K channels of each KV head, from which `profiles_for` makes profiles, or the
            profile; which channels is random.
        head_dim: channels of a head.
        group: query heads of each KV head.
        window: the dense window.
        archive_block: tokens of an archive page, or more, where a format needs pairs of granules.
        dtype: of window pages, queries, keys and values.
        archive_format: how far tokens are stored.
        num_blocks: blocks of each pool.
        spare_bytes: bytes per token by which an archive page exceeds the layer's part; half of them
            lie before it.
        sinks: whether query heads have attention sinks.
        selection: how many segments queries read; None: all.
        means: whether there are statistics, so that what is not stored is read as its mean; codes
            need them.
        window_block: tokens of a window page.
        seed: of everything random.
        device: of all tensors.
    """

    def __init__(
        self,
        kept: tuple[int | Profile, ...],
        head_dim: int,
        group: int,
        window: Window,
        archive_block: int = 64,
        dtype: torch.dtype = torch.float32,
        archive_format: ArchiveFormat = NATIVE,
        num_blocks: int = 160,
        spare_bytes: int = 64,
        sinks: bool = False,
        means: bool = False,
        window_block: int = LEAST_BLOCK,
        selection: Selection | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._group, self._dtype, self._device = group, dtype, device
        self.scale = head_dim**-0.5
        profiles = tuple(
            one
            if isinstance(one, Profile)
            else profiles_for(archive_format, [[one]], head_dim)[0][0]
            for one in kept
        )
        together = GRANULE * archive_format.together
        archive_block = -(-archive_block // together) * together
        layout = CacheLayout(
            profiles, head_dim, dtype.itemsize, archive_block, archive_format,
            window_block=window_block,
        )  # fmt: skip
        bits, numbers = self._channels(layout, means or archive_format.name == PACKED.name)
        channels = layer_channels(bits["k"], bits["v"], numbers or None).to(device)
        offset = spare_bytes // 2 * archive_block

        def pages(offset: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
            # All bits set are NaN in every dtype.
            size = 2 * offset + num_bytes + 1024
            blocks = torch.full((num_blocks, size), 0xFF, dtype=torch.uint8)
            return blocks.to(device)[:, offset : offset + num_bytes].view(dtype)

        window_pages = pages(0, layout.window_page_bytes, dtype)
        codec = codec_of(archive_format)
        self.cache = LayerCache(
            window_pages=window_pages.unflatten(1, (len(kept), window_block, 2 * head_dim)),
            archive_pages=pages(offset, layout.archive_page_bytes, codec.dtype(dtype)),
            layout=layout,
            heads=channels.heads,
            window=window,
            sink_scores=self._sinks(len(kept) * group) if sinks else None,
            selection=selection,
        )
        self._free = list(range(1, num_blocks))

    def _sinks(self, num_heads: int) -> Tensor:
        """Between a share of hardly anything and one of almost all, by head."""
        scores = 8 * torch.rand(num_heads, generator=self._generator) - 1
        return scores.to(self._dtype).to(self._device)

    def _channels(self, layout: CacheLayout, statistics: bool) -> tuple[dict, dict]:
        """Bits of each channel, and means and scales, of K and V, `[num_kv_heads, head_dim]`."""
        shape = len(layout.profiles), layout.head_dim
        bits = {kind: np.zeros(shape, np.uint8) for kind in "kv"}
        for head, profile in enumerate(layout.profiles):
            for kind, counts in (("k", profile.k), ("v", profile.v)):
                stored = [one for one, n in zip(CLASSES, counts, strict=True) for _ in range(n)]
                chosen = self._random.sample(range(layout.head_dim), len(stored))
                bits[kind][head, chosen] = stored
        rng = np.random.default_rng(len(stored))
        numbers = {}
        for kind in "kv" if statistics else ():
            numbers[f"{kind}_mean"] = rng.normal(0, 0.3, shape).astype(np.float16)
            numbers[f"{kind}_scale"] = rng.uniform(0.5, 1.5, shape).astype(np.float16)
        return bits, numbers

    def add(self, prompt: int, length: int) -> Request:
        """A request with a prompt of `prompt` tokens, `length` tokens in all."""
        heads, head_dim = len(self.cache.heads), self.cache.layout.head_dim

        def draw(num_heads: int) -> Tensor:
            tokens = torch.randn(length, num_heads, head_dim, generator=self._generator)
            return tokens.to(self._dtype).to(self._device)

        # Wide queries: attention far from uniform shows a wrong key.
        request = Request(prompt, 3 * draw(heads * self._group), draw(heads), draw(heads))
        request.expected = self.expected(request)
        return request

    def share(self, other: Request, prompt: int, hit: int) -> Request:
        """The same tokens with another prompt length, `hit` of them found in the prefix cache."""
        copy = Request(prompt, other.query, other.key, other.value, computed=hit)
        copy.expected = self.expected(copy)
        copy.window_row = other.window_row[: hit // self.cache.layout.window_block]
        return copy

    def step(
        self, work: Iterable[tuple[Request, int]], padded_rows: int = 0, padded_tokens: int = 0
    ) -> Step:
        """Plan a step that computes some more tokens of each request."""
        work, block = list(work), self.cache.layout.window_block
        ranges = []
        for request, tokens in work:
            self._reclaim(request)
            ranges.append(range(request.computed, request.computed + tokens))
            request.computed += tokens
            assert request.computed <= len(request)
            archived = self.cache.window.archived(request.computed)
            self._grow(request.window_row, request.computed, block)
            self._grow(request.archive_row, archived, self.cache.layout.archive_block)

        starts = [0]
        for tokens in ranges:
            starts.append(starts[-1] + len(tokens))
        starts += [starts[-1]] * padded_rows
        empty = [0] * padded_rows
        slots = [
            request.window_row[t // block] * block + t % block
            for (request, _), tokens in zip(work, ranges, strict=True)
            for t in tokens
        ]
        batch = Batch(
            query_start_loc=self._int32(starts),
            query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
            seq_lens=self._int32([request.computed for request, _ in work] + empty),
            exact_until=self._int32([request.prompt for request, _ in work] + empty),
            window_table=self._table([request.window_row for request, _ in work], padded_rows),
            archive_table=self._table([request.archive_row for request, _ in work], padded_rows),
            slots=torch.tensor(slots + [-1] * padded_tokens, device=self._device),
            in_prompt=torch.tensor(
                [
                    tokens.start < request.prompt
                    for (request, _), tokens in zip(work, ranges, strict=True)
                ]
            ),
            max_query_len=max(map(len, ranges)),
            max_seq_len=max(request.computed for request, _ in work),
        )

        def gather(name: str) -> Tensor:
            parts = [
                getattr(request, name)[tokens.start : tokens.stop]
                for (request, _), tokens in zip(work, ranges, strict=True)
            ]
            padding = torch.full_like(parts[0][:1], float("nan")).expand(padded_tokens, -1, -1)
            return torch.cat([*parts, padding])

        real = starts[-1]
        return Step(
            batch, gather("query"), gather("key"), gather("value"), gather("expected")[:real]
        )

    def run(self, step: Step, kernels: ModuleType) -> Tensor:
        """Store, compact and attend; outputs of the tokens that are not padding."""
        output = torch.full_like(step.query, float("nan"))
        kernels.store(step.key, step.value, self.cache, step.batch)
        kernels.compact(self.cache, step.batch)
        kernels.attend(step.query, output, self.cache, step.batch, self.scale)
        return output[: len(step.expected)]

    def expected(self, request: Request) -> Tensor:
        """Attention of every query by definition, fp64 `[length, num_heads, head_dim]`."""
        length, sink = len(request), self.cache.window.sink
        rows = []
        for position in range(length):
            boundary = sink
            while position + 1 - (boundary + GRANULE) >= self.cache.window.recent:
                boundary += GRANULE
            exact = position < request.prompt
            rows.append(
                [t <= position and (exact or t < sink or t >= boundary) for t in range(length)]
            )
        dense = torch.tensor(rows, device=self._device)
        far = dense.new_ones(length, length).tril() & ~dense
        output = torch.empty_like(request.query, dtype=torch.float64)
        for head in range(output.shape[1]):
            kv_head = head // self._group
            q = request.query[:, head].double() * self.scale
            k, v = request.key[:, kv_head].double(), request.value[:, kv_head].double()
            scores = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device)
            scores = torch.where(dense, q @ k.T, scores)
            far_v = v
            if self.cache.layout.profiles[kv_head].stores:
                far_k, far_v = self.archived(request, kv_head)
                scores = torch.where(far, q @ far_k.T, scores)
                if self.cache.selection is not None:
                    left_out = far & ~self.selected(request, kv_head, far)
                    scores = scores.masked_fill(left_out, float("-inf"))
            if (sinks := self.cache.sink_scores) is not None:
                scores = torch.cat((scores, sinks[head].double().expand(length, 1)), dim=-1)
            weights = scores.softmax(-1)[:, :length]
            output[:, head] = (weights * dense) @ v + (weights * far) @ far_v
        return output

    def archived(self, request: Request, head: int) -> tuple[Tensor, Tensor]:
        """K and V of a head, fp64 `[length, head_dim]` each, as the archive's codec gives them back
        from the sink on.
        """
        sink = self.cache.window.sink
        far = [part[:, head].double().clone() for part in (request.key, request.value)]
        if len(request) > sink:
            rounded = self.cache.codec.round(
                request.key[sink:, head], request.value[sink:, head], self.cache.heads[head]
            )
            for whole, part in zip(far, rounded, strict=True):
                whole[sink:] = part.double()
        return far[0], far[1]

    def selected(self, request: Request, head: int, far: Tensor) -> Tensor:
        """Which of the far tokens `far` each query of a KV head reads, bool `[length, length]`."""
        channels, selection = self.cache.heads[head], self.cache.selection
        assert selection is not None
        form = self.cache.layout.archive_format
        lead = channels.k.order[: form.lead(channels.profile)]
        key, _ = self.archived(request, head)
        queries = request.query[:, head * self._group : (head + 1) * self._group].double()
        products = queries[..., lead] @ key[:, lead].T
        chosen = torch.zeros_like(far)
        for position, of_heads in enumerate(products):
            tokens = far[position].nonzero()[:, 0].tolist()
            if not tokens:
                continue
            behind = of_heads - of_heads[:, tokens].amax(-1, keepdim=True)
            best: dict[int, float] = {}
            for token, score in zip(tokens, behind.amax(0)[tokens].tolist(), strict=True):
                best[token // 64] = max(score, best.get(token // 64, score))
            # Scores that differ by less than a 65,535th of their range are alike.
            least, spread = min(best.values()), max(best.values())
            unit = max(spread - least, 1e-30) / 65535
            ranked = sorted(best, key=lambda s: (-((best[s] - least) // unit), s))
            for segment in ranked[: selection.count(len(best))]:
                chosen[position, 64 * segment : 64 * segment + 64] = True
        return far & chosen

    def archive_bytes(
        self, request: Request, slots: Iterable[int], empty: bool = False
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What belongs into archive slots: page, byte positions, and bytes, uint8.

        Of a token: K, V and what the format keeps beside them for its granule. Of an empty slot,
        what keeps the product with V finite: V of 0, unless any codes do, and the side bytes of a
        granule without a token.
        """
        layout, sink = self.cache.layout, self.cache.window.sink
        block = layout.archive_block

        def run(position: int, stride: int, content: Tensor) -> tuple[int, Tensor, Tensor]:
            item = content.element_size()
            first = torch.arange(len(content)) * stride + position
            positions = first[:, None] * item + torch.arange(item)
            return page, positions.flatten().to(self._device), content.view(torch.uint8)

        slots = list(slots)
        for head, part in enumerate(layout.heads):
            if part is None:
                continue
            stored = self._stored(request, head)
            codec = self.cache.codec
            for t in slots:
                page, slot = request.archive_row[t // block], t % block
                granule, row = divmod(t - sink, GRANULE)
                for chunk in part.k_chunks if not empty else ():
                    columns = stored.key[granule, row, chunk.first : chunk.first + chunk.width]
                    yield run(chunk.offset + slot * chunk.width, 1, columns)
                for chunk in part.v_chunks if not (empty and codec.any_codes) else ():
                    if empty:
                        v = stored.value.new_zeros(chunk.width)
                    else:
                        v = stored.value[granule, row, chunk.first : chunk.first + chunk.width]
                    yield run(chunk.offset + self._column(slot), block, v)
                side = codec.empty_side if empty else stored.side[granule]
                if len(side):
                    yield run(part.side_offset + slot // GRANULE * len(side), 1, side)

    def _column(self, slot: int) -> int:
        """Where the token of a slot stands in rows of V: as many granules as belong together take
        turns, token by token.
        """
        together = self.cache.layout.archive_format.together
        group, rest = divmod(slot, GRANULE * together)
        granule, token = divmod(rest, GRANULE)
        return group * GRANULE * together + token * together + granule

    def _stored(self, request: Request, head: int) -> Stored:
        """Whole granules of one head, from the sink on, as the format stores them."""
        sink = self.cache.window.sink
        whole = slice(sink, sink + (len(request) - sink) // GRANULE * GRANULE)
        key, value = (
            part[whole, head].unflatten(0, (-1, GRANULE)) for part in (request.key, request.value)
        )
        return self.cache.codec.encode(key, value, self.cache.heads[head])

    def _reclaim(self, request: Request) -> None:
        """Free what no later query reads, poison it, and let others have it."""
        block = self.cache.layout.window_block
        free = self.cache.window.free_tokens(request.computed, request.prompt)
        for index in range(len(request.window_row)):
            granules = range(index * block, (index + 1) * block, GRANULE)
            if index not in request.freed and all(token in free for token in granules):
                request.freed.add(index)
                self.cache.window_pages[request.window_row[index]] = float("nan")
                self._free.append(request.window_row[index])

    def _grow(self, row: list[int], tokens: int, block: int) -> None:
        while len(row) * block < tokens:
            row.append(self._free.pop(self._random.randrange(len(self._free))))

    def _table(self, rows: list[list[int]], padded_rows: int) -> Tensor:
        width = max(map(len, rows)) + 2
        return self._int32([row + [0] * (width - len(row)) for row in rows + [[]] * padded_rows])

    def _int32(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error against that of the expected values; NaN if any is NaN."""
    error = actual.double() - expected.double()
    return (error.square().mean().sqrt() / expected.double().square().mean().sqrt()).item()


def rounding(query: Tensor, key: Tensor, scale: float, once: int) -> float:
    """How far outputs may be off because numbers are rounded to fp16, as `relative_rms`: of queries
    `[n, num_heads, D]` over many tokens, with keys like `[tokens, num_kv_heads, D]`.

    An output is a sum over tokens in which V averages out. Errors of the tokens' weights are
    independent, so they average out as V does, and the output is off by as much as one weight.
    Rounding changes a number by 2^-11 of itself at most. `once` is how often a weight, its V or the
    output is rounded. Where q or K is rounded, too, so is each product of a score, and the score
    is off by 2^-11 of what scores spread (their standard deviation); its weight by the same.

    It is far from what a wrong page does: of a thousand pages one, about sqrt(2 / 1000).
    """
    heads = key.shape[1]
    products = query.float().unflatten(1, (heads, -1)) * key.float().std(0)[:, None] * scale
    variance = products.square().sum(-1).mean().item()
    return 2.0**-11 * (once + variance) ** 0.5
