"""One request of a million tokens, in the pool of a server: what kernels write there and read.

The pool is that of one of four ranks with Llama-3.1-8B's shape and 2 bits, with the room that the
whole prompt takes, so that places in it pass 2^31 and 2^32, of bytes and of elements, many times.
Pages are in random order. The reference reads the same pages, or writes its own in small pools.

One process has to run the whole file: with workers of xdist `--dist loadscope`, as the Makefile has
it. In others each worker would fill a pool of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cache_builder import relative_rms, rounding
from shapes.bits_mask import random_bits
from vllm_leank.kernels import gpu, reference, select
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.decode import decode
from vllm_leank.kernels.decode_each import SELECTING_AT_ONCE
from vllm_leank.kernels.scratch import Scratch

from vllm_leank.core.options import Options
from vllm_leank.core.pages import LEAST_BLOCK, CacheLayout, pages
from vllm_leank.core.selection import SEGMENT, Selection
from vllm_leank.core.window import GRANULE, Window
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.settings import Settings, plan_settings
from vllm_leank.serving.flash import attend_pruned

pytestmark = pytest.mark.gpu

MODEL = Path(__file__).parents[1] / "benchmarks/shapes/llama-3.1-8b"
RANKS, RANK, LAYER = 4, 3, 31
"""The last layer's pages lie last in each block."""

TOKENS, PROMPT = 1 << 20, (1 << 20) - 400
SELECTION = Selection.of(0.1)
GROUP, DTYPE, DEVICE = 4, torch.float16, "cuda"
ROUNDED = 6e-4
"""Of weights and outputs, to fp16, where scores are the same."""
FREE = 60 << 30
"""Bytes that the pool, its tokens and what the reference makes of them need."""


@dataclass
class Million:
    """The request, once its prompt was stored and compacted.

    Attributes:
        cache: the layer's pages, views of the pool.
        window_table: `[1, pages]`.
        archive_table: `[1, pages]`.
        key: `[TOKENS, num_kv_heads, head_dim]`.
        value: like `key`.
    """

    cache: LayerCache
    window_table: torch.Tensor
    archive_table: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def batch(self, before: int, after: int, prompt: int = PROMPT) -> Batch:
        """A step that computes the tokens from `before` to `after`."""
        starts = torch.tensor([0, after - before], dtype=torch.int32)
        token = torch.arange(before, after, device=DEVICE)
        page = self.window_table[0, token // LEAST_BLOCK].long()

        def int32(number: int) -> torch.Tensor:
            return torch.tensor([number], dtype=torch.int32, device=DEVICE)

        return Batch(
            query_start_loc=starts.to(DEVICE),
            query_start_loc_cpu=starts,
            seq_lens=int32(after),
            exact_until=int32(prompt),
            window_table=self.window_table,
            archive_table=self.archive_table,
            slots=page * LEAST_BLOCK + token % LEAST_BLOCK,
            in_prompt=torch.tensor([before < prompt]),
            max_query_len=after - before,
            max_seq_len=after,
        )

    def queries(self, count: int) -> torch.Tensor:
        """Wide ones: attention far from uniform shows a wrong key."""
        _, heads, head_dim = self.key.shape
        return 3 * torch.randn(count, heads * GROUP, head_dim, dtype=DTYPE, device=DEVICE)

    def rounding(self, query: torch.Tensor, once: int) -> float:
        """See `cache_builder.rounding`; of one token in a thousand."""
        return rounding(query, self.key[::1024], self.scale, once)

    @property
    def scale(self) -> float:
        return float(self.key.shape[-1] ** -0.5)


def planned() -> Settings:
    mask = random_bits(Checkpoint.open(str(MODEL)), 2)
    return plan_settings(mask, Options(sink=64, recent=256, pages=0.1), DTYPE.itemsize, RANKS)


@pytest.fixture(scope="module")
def million() -> Iterator[Million]:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < FREE:
        pytest.skip(f"{free / 2**30:.0f} GiB of the GPU are free, and these need {FREE >> 30}")
    torch.manual_seed(0)
    settings = planned()
    plan = settings.plan
    # Kernels for the profiles of this layer alone: fewer to compile.
    layout = replace(plan.layer(LAYER, RANK), variants=())
    counts = pages(TOKENS, LEAST_BLOCK), pages(TOKENS, layout.archive_block)
    blocks = sum(counts) + 1
    # All bits set are NaN in every dtype; block 0 is nobody's.
    pool = torch.full((blocks, plan.block_bytes), 0xFF, dtype=torch.uint8, device=DEVICE)
    rows = (1 + torch.randperm(blocks - 1, device=DEVICE).int())[None].split(counts, dim=1)
    window = pool[:, LAYER * layout.window_page_bytes :][:, : layout.window_page_bytes].view(DTYPE)
    archive = pool[:, plan.archive_offset(LAYER, RANK) :][:, : layout.archive_page_bytes]
    cache = cache_of(settings, layout, window, archive)
    shape = TOKENS, len(layout.profiles), layout.head_dim
    key, value = (torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in "kv")
    request = Million(cache, *(row.contiguous() for row in rows), key, value)
    step = request.batch(0, PROMPT)
    gpu.store(key[:PROMPT], value[:PROMPT], cache, step)
    gpu.compact(cache, step)
    assert pool.numel() > 1 << 35
    yield request
    del request, cache, window, archive, pool, key, value
    torch.cuda.empty_cache()


def cache_of(
    settings: Settings, layout: CacheLayout, window: torch.Tensor, archive: torch.Tensor
) -> LayerCache:
    """Of window pages `[blocks, items]` and archive pages."""
    heads = settings.plan.rank_heads(RANK)
    return LayerCache(
        window_pages=window.unflatten(1, (len(heads), LEAST_BLOCK, 2 * layout.head_dim)),
        archive_pages=archive,
        layout=layout,
        heads=layer_channels(*settings.mask.layer(LAYER, heads)).to(torch.device(DEVICE)).heads,
        window=settings.window,
    )


def whole_pages_of(tokens: torch.Tensor) -> torch.Tensor:
    """`[tokens, num_kv_heads, head_dim]` as `[pages, num_kv_heads, 32, head_dim]`."""
    whole = tokens[: len(tokens) // LEAST_BLOCK * LEAST_BLOCK]
    return whole.unflatten(0, (-1, LEAST_BLOCK)).transpose(1, 2)


def test_every_token_is_stored_in_its_place(million):
    head_dim = million.key.shape[-1]
    key, value = (whole_pages_of(part[:PROMPT]) for part in (million.key, million.value))
    rows = million.window_table[0, : len(key)].long()
    for i in range(0, len(rows), 1 << 12):
        some = slice(i, i + (1 << 12))
        found = million.cache.window_pages[rows[some]]
        assert torch.equal(found[..., :head_dim], key[some])
        assert torch.equal(found[..., head_dim:], value[some])


def test_every_granule_is_packed_as_the_reference_packs_it(million):
    """But for scales of V whose last bit hangs on the order of a sum, and codes under them."""
    cache, layout, block = million.cache, million.cache.layout, million.cache.layout.archive_block
    boundary = cache.window.boundary(PROMPT)
    small_window = torch.cat([whole_pages_of(p[:PROMPT]) for p in (million.key, million.value)], -1)
    small = replace(
        cache,
        window_pages=small_window.contiguous(),
        archive_pages=torch.full(
            (pages(boundary, block), layout.archive_page_bytes), 0xFF,
            dtype=torch.uint8, device=DEVICE,
        ),
    )  # fmt: skip
    in_order = [
        torch.arange(len(one), dtype=torch.int32, device=DEVICE)[None]
        for one in (small.window_pages, small.archive_pages)
    ]
    step = million.batch(0, PROMPT)
    reference.compact(small, replace(step, window_table=in_order[0], archive_table=in_order[1]))
    token = torch.arange(cache.window.sink, boundary, GRANULE, device=DEVICE)
    page, granule = token // block, token % block // GRANULE
    places = million.archive_table[0, page].long(), granule
    for ours, theirs in zip(cache.head_pages, small.head_pages, strict=True):
        found, expected = ours.read(*places), theirs.read(page, granule)
        assert torch.equal(found.key, expected.key)
        scales = [one.side.contiguous().view(torch.int16).int() for one in (found, expected)]
        apart = (scales[0] - scales[1]).abs()
        assert apart.max() <= 1
        assert apart.sum() < len(token)  # one of 32 at most
        assert not ((found.value != expected.value).any(-1) & (apart == 0)).any()


def found_segments(million, query, cache, step):
    """What `select` finds for one query: `[1, num_kv_heads, segments, 2]`, as many as it writes."""
    found = select.select(query, cache, step)
    return found[:, :, : cache.selection.count(far_segments(cache, step.max_seq_len))]


def far_segments(cache, length):
    return pages(cache.window.boundary(length), SEGMENT) - cache.window.sink // SEGMENT


def hide_by(found: torch.Tensor):
    """What stands for the reference's own selection: the segments that kernels have found."""

    def hide(queries, key, part, channels, cache):
        head = next(i for i, one in enumerate(cache.heads) if one is channels)
        granules = torch.arange(len(part.granules), device=DEVICE)
        token = (cache.window.sink + GRANULE * granules).repeat_interleave(GRANULE)
        return ~torch.isin(token // SEGMENT, found[0, head, :, 1])[None, None]

    return hide


def expected_of(million, query, cache, batch):
    output = torch.empty_like(query, dtype=torch.float32)
    reference.attend(query.float(), output, cache, batch, million.scale)
    return output


@pytest.mark.parametrize("selection", [None, SELECTION], ids=["all", "a tenth"])
def test_tokens_are_decoded_at_the_end_of_a_million(million, monkeypatch, selection):
    """While a granule more is compacted, behind all others."""
    cache = replace(million.cache, selection=selection)
    boundary = cache.window.boundary(PROMPT)
    for position in range(PROMPT, PROMPT + 34):
        step = million.batch(position, position + 1)
        new = slice(position, position + 1)
        gpu.update(million.key[new], million.value[new], cache, step)
    assert cache.window.boundary(PROMPT + 34) > boundary
    query = million.queries(1)
    output = torch.full_like(query, float("nan"))
    decode(query, output, cache, step, million.scale)
    if selection is not None:
        found = found_segments(million, query, cache, step)
        monkeypatch.setattr(reference, "hide_unselected", hide_by(found))
    # Queries times the distances of codes; weights and outputs.
    tolerance = million.rounding(query, once=2)
    assert relative_rms(output, expected_of(million, query, cache, step)) < tolerance


def test_the_best_of_all_segments_are_found(million):
    cache = replace(million.cache, selection=SELECTION)
    step, query = million.batch(PROMPT, PROMPT + 1), million.queries(1)
    found = found_segments(million, query, cache, step)[0]
    boundary, sink = cache.window.boundary(PROMPT + 1), cache.window.sink
    segments = far_segments(cache, PROMPT + 1)
    assert sink % SEGMENT == 0
    assert found.shape[1] == SELECTION.count(segments) > 1600
    block = cache.layout.archive_block
    assert (found[..., 1].diff() > 0).all()
    page = found[..., 1].long() * SEGMENT // block
    assert torch.equal(found[..., 0], million.archive_table[0, page])
    token = torch.arange(sink, boundary, GRANULE, device=DEVICE)
    places = million.archive_table[0, token // block].long(), token % block // GRANULE
    for head, (of_head, channels) in enumerate(zip(cache.head_pages, cache.heads, strict=True)):
        lead = next(count for count in channels.profile.k if count)
        key, _ = cache.codec.decode(of_head.read(*places), channels)
        queries = query[0, head * GROUP : (head + 1) * GROUP, channels.k.order[:lead]].float()
        products = queries @ key[..., :lead].flatten(0, 1).T
        scores = (products - products.amax(-1, keepdim=True)).amax(0).unflatten(0, (-1, GRANULE))
        scores = torch.nn.functional.pad(scores.amax(-1), (0, len(scores) % 2), value=-torch.inf)
        scores = scores.unflatten(0, (-1, 2)).amax(-1)
        chosen = torch.zeros(segments, dtype=torch.bool, device=DEVICE)
        chosen[found[head, :, 1].long() - sink // SEGMENT] = True
        unit = (scores.max() - scores.min()) / 65535
        assert scores[chosen].min() > scores[~chosen].max() - 2 * unit


def test_a_chunk_of_a_prompt_reads_a_million_tokens(million):
    """Far tokens are unpacked part by part: their scratch is smaller."""
    window = Window(64, 256, exact=False)
    before, after = PROMPT + 40, PROMPT + 40 + 96
    layout, heads = million.cache.layout, GROUP * million.key.shape[1]
    far = window.boundary(after) - window.sink
    scratch = Scratch.allocate(layout, heads, far, 96, DTYPE, torch.device(DEVICE))
    assert scratch.results is not None
    cache = replace(million.cache, window=window, scratch=scratch)
    catch_up = million.batch(PROMPT, before, prompt=0)
    step = million.batch(before, after, prompt=0)
    for batch, new in ((catch_up, slice(PROMPT, before)), (step, slice(before, after))):
        gpu.store(million.key[new], million.value[new], cache, batch)
        gpu.compact(cache, batch)
    query = million.queries(96)
    output = torch.full_like(query, float("nan"))
    attend_pruned(query, output, cache, step, million.scale)
    last = million.batch(after - 4, after, prompt=0)
    # K that is unpacked; V, weights, and outputs: with each part, and with what is dense.
    tolerance = million.rounding(query[-4:], once=3 + pages(far, scratch.regions(1, far).tokens))
    assert relative_rms(output[-4:], expected_of(million, query[-4:], cache, last)) < tolerance


def test_answers_that_are_computed_again_take_little_memory(million):
    """Of each query the tables of a million tokens, and scores of all segments."""
    cache = replace(million.cache, selection=SELECTION)
    count = 8 * SELECTING_AT_ONCE
    before = TOKENS - count - 16
    prompt, after = before + 8, before + count
    step = million.batch(before, after, prompt=prompt)
    gpu.store(million.key[before:after], million.value[before:after], cache, step)
    gpu.compact(cache, step)
    query = million.queries(count)
    output = torch.full_like(query, float("nan"))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    gpu.decode_each(query, output, cache, step, million.scale)
    most = SELECTING_AT_ONCE * million.window_table.shape[1] * 4
    assert torch.cuda.max_memory_allocated() - held < 8 * most
    assert torch.cuda.memory_allocated() - held < most
    assert output[:8].isnan().all()
    alone = torch.full_like(query[-1:], float("nan"))
    decode(query[-1:], alone, cache, million.batch(after - 1, after, prompt), million.scale)
    assert relative_rms(output[-1:], alone) < ROUNDED
