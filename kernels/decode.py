"""Decode attention: one query per request over its sink, archived and recent tokens. Programs each
take a share of the tokens of one KV head; a second launch combines their results.
"""

from typing import NamedTuple

import torch
import triton
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.combine import combine_kernel
from vllm_leank.kernels.common import LOG2_E
from vllm_leank.kernels.decode_kernel import decode_kernel
from vllm_leank.kernels.launch import DecodeLaunch, choose_decode
from vllm_leank.kernels.launcher import Launch
from vllm_leank.kernels.select import select

from vllm_leank.core.selection import Selection


def decode(
    query: torch.Tensor,
    output: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
    after_prompt: bool = False,
) -> None:
    """Attention of one query per request; see `reference.attend`.

    Args:
        query: `[num_reqs or more, num_heads, head_dim]`, after RoPE; row i is the last token of
            request i.
        output: like `query`; rows of padded requests (length 0) are set to zero.
        cache: the layer's pages.
        batch: the step's requests.
        scale: factor of the QK product.
        after_prompt: whether queries of prompts are left out, and their outputs as they are.
    """
    rows, *heads = query.shape
    num_reqs = min(rows, batch.num_reqs)
    shape = cache.prepared(_shape, num_reqs)
    # Where segments are selected, a list of them stands for the archive's table.
    far, selection = batch.archive_table, cache.selection
    if selection is not None:
        far = select(query, cache, batch)
    launches = cache.prepared(
        _launches, shape.prepared, *heads, query.stride(), output.stride(),
        batch.window_table.stride(0), far.stride()[:2], scale, selection, after_prompt,
    )  # fmt: skip
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        # A graph needs memory of its own, which stays its own when the batch is gone.
        partial, lse = _scratch(batch, num_reqs, shape.programs, *launches.scratch)
    else:
        partial, lse = batch.prepared(_scratch, num_reqs, shape.programs, *launches.scratch)
    attend_to = query, output, partial, lse, batch.window_table, far
    share = batch.seq_lens, batch.exact_until, shape.wave
    launches.attend((num_reqs, shape.programs, 1), *attend_to, *share)
    launches.combine(
        (num_reqs, heads[0], shape.parts), output, partial, lse, *share, shape.programs
    )


def _shape(cache: LayerCache, num_reqs: int) -> DecodeLaunch:
    selects = cache.selection is not None
    return choose_decode(num_reqs, cache.layout, cache.tables.device, selects)


def _scratch(
    batch: Batch, num_reqs: int, programs: int, group: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What programs leave to be combined: outputs, and logarithms of the sums of weights. Layers
    take the same, one after the other.
    """
    shape = num_reqs, programs, group, head_dim
    partial = torch.empty(shape, dtype=torch.float32, device=batch.seq_lens.device)
    return partial, torch.empty_like(partial[..., 0])


class _Launches(NamedTuple):
    """The two launches of a layer, and the shape of a program's scratch memory."""

    attend: Launch
    combine: Launch
    scratch: tuple[int, int]


def _launches(
    cache: LayerCache,
    shape: DecodeLaunch,
    num_heads: int,
    head_dim: int,
    query_strides: tuple[int, ...],
    output_strides: tuple[int, ...],
    window_stride: int,
    far_strides: tuple[int, int],
    scale: float,
    selection: Selection | None,
    after_prompt: bool,
) -> _Launches:
    layout, window, tables = cache.layout, cache.window, cache.tables
    num_kv_heads = len(layout.profiles)
    group = num_heads // num_kv_heads
    columns = max(triton.next_power_of_2(group), 8)
    padded_dim = triton.next_power_of_2(head_dim)
    work = tables.work(shape)
    archive, side = cache.archive_pages, cache.side
    # A launch that may have nothing to do waits for nothing, so nobody may wait for it alone.
    overlaps = shape.tma and not after_prompt
    shared = {
        "work_ptr": work.programs,
        "archive_units": tables.archive_units,
        "split_units": shape.split_bytes // 256,
        "sink_scores_ptr": cache.sink_scores,
        "stride_o_token": output_strides[0],
        "stride_o_head": output_strides[1],
        "SINK": window.sink,
        "RECENT": window.recent,
        "H": num_kv_heads,
        "G": group,
        "D": head_dim,
        "TILE": shape.tile,
        "UNIT_TILE": tables.tile,
        "DENSE_UNITS": 32 * 2 * head_dim * layout.itemsize // 256,
        "WINDOW_COST": shape.window_cost,
        "ROWS": shape.rows,
        "FEW": shape.few,
        "SELECTION": None if selection is None else (selection.share, selection.least),
        "AFTER_PROMPT": after_prompt,
        "PDL": overlaps,
        "launch_pdl": overlaps,
    }
    share = ("seq_lens_ptr", "exact_until_ptr", "wave")
    attend = Launch(
        decode_kernel,
        ("q_ptr", "output_ptr", "partial_ptr", "lse_ptr", "window_table_ptr", "archive_table_ptr",
         *share),
        **shared,
        **cache.descriptor_arguments(shape.tile, shape.window_tile, shape.tma),
        window_ptr=cache.window_pages, archive_ptr=archive, side_ptr=side,
        order_ptr=tables.order,
        numbers_ptr=tables.numbers,
        scale_log2=scale * LOG2_E.value,
        stride_q_token=query_strides[0], stride_q_head=query_strides[1],
        stride_window_page=cache.window_pages.stride(0),
        stride_archive_page=archive.stride(0), stride_side=side.stride(0),
        stride_window_table=window_stride, stride_archive_table=far_strides[0],
        stride_selected=far_strides[1],
        VARIANTS=tables.variants,
        D_PAD=padded_dim,
        G_PAD=columns,
        ALIKE=2 if 2 * group <= columns and not cache.codec.whole_channels else 1,
        BLOCK=layout.archive_block,
        TILES=cache.codec.tiles,
        TMA=shape.tma,
        STAGES=shape.stages,
        WINDOW_STAGES=shape.window_stages,
        WINDOW_TILE=shape.window_tile,
        WINDOW_BLOCK=layout.window_block,
        num_warps=shape.warps,
        maxnreg=shape.registers,
    )  # fmt: skip
    combine = Launch(
        combine_kernel,
        ("output_ptr", "partial_ptr", "lse_ptr", *share, "programs"),
        **shared,
        heads_ptr=work.heads,
        SPLITS=shape.combined,
        PART=padded_dim // shape.parts,
    )
    return _Launches(attend, combine, (group, head_dim))
