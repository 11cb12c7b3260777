"""How kernels are launched: pure functions of shapes and of the device, fixed for a given input.

The number of programs depends on the padded batch alone, never on lengths, which only the device
knows. So a captured CUDA graph fits every later batch of its size.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from vllm_leank.kernels.batch import MAX_DECODE_QUERIES
from vllm_leank.kernels.codecs import codec_of
from vllm_leank.kernels.codecs.codec import Requests

from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.selection import SEGMENT
from vllm_leank.core.window import GRANULE

FEW_HEADS = 128
"""Requests times KV heads up to which a decode launch is cut into one wave of equal programs. With
more, shares of one wave would be uneven, and more waves end together."""

COUNTED_REQUESTS = 128, 256
"""Requests up to which each program of decode adds up what all of them read, so that a long one
among short ones has more programs; fewer or more of them at once. Of still more requests none has
more than in a batch of equal ones."""

LEAST_PROGRAMS = 16
"""Programs per request at least, where requests are few."""

SPARE = 4
"""How many times as many programs one of many requests has, if it may have so many, as work in a
batch of equal requests. They are for long requests among short ones."""

MOST_PROGRAMS = 8192
"""Programs of a launch of many requests up to which requests have some to spare: each takes memory
for results, whether it works or not."""

COMBINED = 16, 32, 128
"""Splits of a head that are combined at once: for few programs of a request, for more, and, where
requests are so few that heads have more splits each, all of them at most."""

COMBINE_PARTS = 4
"""Parts of a head's channels that are combined apart where heads have many splits: there are few
heads then, and one multiprocessor each would take longer."""

SPLIT_BYTES = 1 << 15, 1 << 17
"""Bytes that a program should read at least, for few and for many requests."""

COMPACT_PROGRAMS = 1024, 32768
"""Programs of a compaction launch at most, unless there are more requests and heads: in a step of
few tokens each, where a prompt seldom ends, and in other steps, where idle programs cost little."""


PIECE_QUERIES = 256
"""Queries that read the same unpacked far tokens, at least. With more, `extend` has more tokens
left that some of them see and others do not; with fewer, FlashAttention has less to share."""

TMA_CAPABILITIES = 9, 10
"""Major compute capabilities whose tiles, but K of codes, are loaded through descriptors."""


@dataclass(frozen=True)
class Device:
    """What launches depend on.

    Attributes:
        tma: whether tiles are loaded by the tensor memory accelerator of Hopper and of large
            Blackwell GPUs, through tensor descriptors, or through plain pointers. Capability 12 has
            it as well, but too little shared memory for the pipelines of decode.
        multiprocessors: how many there are.
    """

    tma: bool
    multiprocessors: int = 1

    @classmethod
    def of(cls, device: torch.device) -> "Device":
        """The properties of a device; the interpreter's stand in where there is no GPU."""
        if device.type != "cuda":
            return cls(tma=False)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        properties = torch.cuda.get_device_properties(device)
        return cls(
            tma=properties.major in TMA_CAPABILITIES and not interpreted,
            multiprocessors=properties.multi_processor_count,
        )


class DecodeLaunch(NamedTuple):
    """Launch of the decode kernel.

    Attributes:
        programs: programs per request, shared out over the KV heads.
        wave: parts into which all that is read is cut; about as many programs work.
        few: whether requests are so few that all is cut into one wave, and a table says which heads
            programs are for. Of many requests programs find that out.
        tile: archived tokens of a loop iteration; divides the archive block.
        tma: see `Device`.
        split_bytes: bytes that a program should read at least.
        rows: power of two up to which a batch's requests are counted, to cut what they read into
            `wave` equal parts; 0 if they are not.
        combined: splits of a head that are combined at once; a power of two.
        parts: of a head's channels, which are combined apart; a power of two.
        warps, stages, window_stages, window_tile, registers, window_cost: see `DecodeShape`.
    """

    programs: int
    wave: int
    few: bool
    tile: int
    tma: bool
    split_bytes: int
    rows: int
    combined: int
    parts: int
    warps: int
    stages: int
    window_stages: int
    window_tile: int
    registers: int | None
    window_cost: int

    @property
    def prepared(self) -> "DecodeLaunch":
        """The same without what calls pass: launches in which this is equal share kernels, and are
        prepared once. A table is for one number of programs.
        """
        return self if self.few else self._replace(programs=0, wave=0)


@dataclass(frozen=True)
class ExtendLaunch:
    """Launch of the extend kernel.

    Attributes:
        rows: queries times query heads of a KV head that a program takes; a power of two.
        tile: archived tokens of a loop iteration; divides the archive block.
        tma: see `Device`.
        warps: warps of a program.
        stages: depth of the software pipelines.
    """

    rows: int
    tile: int
    tma: bool
    warps: int
    stages: int

    def piece(self, group: int) -> int:
        """Queries of a piece, for `group` query heads per KV head: those of whole programs."""
        queries = self.rows // group
        return -(-PIECE_QUERIES // queries) * queries


def tile_tokens(
    layout: CacheLayout, selects: bool = False, requests: Requests = Requests.FEW
) -> int:
    """Tokens of an archive tile: a power of two that divides the page, and where queries select
    what they read, a segment.
    """
    block = layout.archive_block
    most = SEGMENT if selects else block & -block
    return min(most, codec_of(layout.archive_format).decode_shape(layout, requests).tile)


def programs_of_few(num_reqs: int, num_kv_heads: int, wave: int) -> int:
    """Programs per request of a batch of few; the same up to the next power of two. Together they
    have two waves, working or not, and one request has one.
    """
    rows = 1 << max(num_reqs - 1, 0).bit_length()
    return max(min(2, rows) * wave // rows, LEAST_PROGRAMS, num_kv_heads)


def programs_of_any_few(num_kv_heads: int, wave: int) -> set[int]:
    """What `programs_of_few` gives for any batch of few."""
    most = max(FEW_HEADS // num_kv_heads, 1)
    return {programs_of_few(i, num_kv_heads, wave) for i in range(1, most + 1)}


def whole_waves(num_heads: int, wave: int) -> int:
    """`wave`, or where heads of all requests, which have whole numbers of programs, would leave
    more than a tenth of it to nobody, twice as many if that leaves less.
    """

    def taken(most: int) -> float:
        return most // num_heads * num_heads / most

    return wave if taken(wave) > 0.9 else max((wave, 2 * wave), key=taken)


def programs_of_many(num_reqs: int, num_kv_heads: int, wave: int, counted: bool) -> int:
    """Programs per request of a batch of many: as many as parts of equal requests need, or more
    where it is `counted` what all requests read.
    """
    parts = max(wave // (num_reqs * num_kv_heads), 1) * num_kv_heads
    # Heads of less than a part have a program as well.
    needed = parts + num_kv_heads - 1
    return max(needed, min(SPARE * parts, MOST_PROGRAMS // num_reqs)) if counted else needed


def combined_splits(programs: int, num_kv_heads: int) -> int:
    """Splits of a head that are combined at once, a power of two, for so many programs of a
    request. One load of all takes less time than several, one after the other.
    """
    few, more, most = COMBINED
    if programs <= more:
        return few
    splits = -(-programs // num_kv_heads)
    return min(max(1 << (splits - 1).bit_length(), more), most)


@cache
def choose_decode(
    num_reqs: int, layout: CacheLayout, device: Device, selects: bool = False
) -> DecodeLaunch:
    """Launch for a batch of `num_reqs` rows, padding included; `selects`: queries select what they
    read.
    """
    few, many = SPLIT_BYTES
    num_kv_heads, num_heads = len(layout.profiles), num_reqs * len(layout.profiles)
    is_few = num_heads <= FEW_HEADS
    rows = next((most for most in COUNTED_REQUESTS if num_reqs <= most), 0)
    requests = (Requests.ONE if num_reqs == 1 else Requests.FEW) if is_few else Requests.MANY
    # A segment is as long as the tiles of few requests.
    shape = codec_of(layout.archive_format).decode_shape(layout, requests, short_tiles=selects)
    if is_few:
        wave = shape.wave
        programs = programs_of_few(num_reqs, num_kv_heads, wave)
        combined = combined_splits(programs, num_kv_heads)
    else:
        wave = whole_waves(num_heads, shape.wave)
        programs = programs_of_many(num_reqs, num_kv_heads, wave, bool(rows))
        combined = COMBINED[0]
    return DecodeLaunch(
        programs=programs,
        wave=wave,
        few=is_few,
        tile=tile_tokens(layout, selects, requests),
        tma=device.tma,
        split_bytes=few if is_few else many,
        rows=rows,
        combined=combined,
        parts=COMBINE_PARTS if combined > COMBINED[1] else 1,
        # The sums over V of a larger head are more than a warp can hold.
        warps=max(shape.warps, layout.head_dim // 128),
        stages=shape.stages,
        window_stages=shape.window_stages,
        window_tile=shape.window_tile,
        registers=shape.registers,
        window_cost=shape.window_cost,
    )


def decode_kinds(
    most_reqs: int, layout: CacheLayout, device: Device, selects: bool = False
) -> list[int]:
    """Numbers of requests up to `most_reqs`, the first of each whose launch has kernels of its own,
    or is prepared for itself.
    """
    found: dict[DecodeLaunch, int] = {}
    for num_reqs in range(1, most_reqs + 1):
        found.setdefault(choose_decode(num_reqs, layout, device, selects).prepared, num_reqs)
    return list(found.values())


EXTEND_SMALL = 64, 32, 4, 2
"""Rows, tile, warps and stages of extend, for less shared memory than Hopper has, or for heads of
more than 128 channels."""


def choose_extend(group: int, layout: CacheLayout, device: Device) -> ExtendLaunch:
    """Launch for `group` query heads per KV head."""
    fits = device.tma and layout.head_dim <= 128
    codec = codec_of(layout.archive_format)
    rows, tile, warps, stages = codec.extend_shape if fits else EXTEND_SMALL
    block = layout.archive_block
    # Granules whose tokens alternate are read together: longer tiles, of fewer rows.
    together = GRANULE * layout.archive_format.together
    rows, tile = rows * tile // max(tile, together), max(tile, together)
    return ExtendLaunch(
        rows=max(rows, 1 << (group - 1).bit_length()),
        tile=min(block & -block, tile),
        tma=device.tma,
        warps=warps,
        stages=stages,
    )


def compact_programs(num_reqs: int, num_kv_heads: int, max_query_len: int) -> int:
    """Programs per request and KV head of compaction. A prompt has thousands of steps of 32 tokens,
    any other request one or none.
    """
    decode, prefill = COMPACT_PROGRAMS
    most = decode if max_query_len <= MAX_DECODE_QUERIES else prefill
    return max(min(most // (num_reqs * num_kv_heads), 64), 1)
