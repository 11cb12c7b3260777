"""How kernels are launched: pure functions of shapes and of the device, fixed for a given input.

The number of programs depends on the padded batch alone, never on lengths, which only the device
knows. So a captured CUDA graph fits every later batch of its size.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace

import torch

from vllm_leank.layout import CacheLayout

TILE_BYTES = 128
"""Bytes of a row of a V tile, which sets the tokens of a tile: 64 in 16 bits, 128 in 8."""

WAVES = 8
"""Programs per multiprocessor that a decode launch aims at; two or three run at a time."""

REQUEST_PROGRAMS = 64, 512
"""Programs per request at least and at most: many requests of unequal length need fine shares."""

SPLIT_BYTES = 1 << 15, 1 << 17
"""Bytes that a program should read at least: for one request, and for so many that they fill the
GPU without being split finely."""

EXTEND_COLUMNS = 64
"""Queries times query heads of a KV head that a program of the extend kernel takes."""

COMPACT_PROGRAMS = 1024
"""Programs of a compaction launch at most, unless there are more requests and heads."""


@dataclass(frozen=True)
class Device:
    """What launches depend on.

    Attributes:
        multiprocessors: their number.
        tma: whether tiles are loaded by the tensor memory accelerator of Hopper and later GPUs,
            through tensor descriptors, or through plain pointers.
    """

    multiprocessors: int
    tma: bool

    @classmethod
    def of(cls, device: torch.device) -> "Device":
        """The properties of a device; the interpreter's stand in where there is no GPU."""
        if device.type != "cuda":
            return cls(multiprocessors=4, tma=False)
        properties = torch.cuda.get_device_properties(device)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return cls(properties.multi_processor_count, properties.major >= 9 and not interpreted)


@dataclass(frozen=True)
class DecodeLaunch:
    """Launch of the decode kernel.

    Attributes:
        programs: programs per request, shared out over the KV heads.
        tile: archived tokens of a loop iteration; divides the archive block.
        tma: see `Device`.
        split_bytes: bytes that a program should read at least.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    programs: int
    tile: int
    tma: bool
    split_bytes: int
    warps: int = 4
    stages: int = 3


def tile_tokens(layout: CacheLayout) -> int:
    """Tokens of an archive tile: a power of two that divides the page."""
    block = layout.archive_block
    return min(block & -block, TILE_BYTES // layout.archive_itemsize)


def decode_programs(num_reqs: int, num_kv_heads: int, device: Device) -> int:
    """Programs per request; the same for batches up to the next power of two."""
    rows = 1 << max(num_reqs - 1, 0).bit_length()
    programs = WAVES * device.multiprocessors // rows
    least, most = REQUEST_PROGRAMS
    return max(min(programs, most), least, num_kv_heads)


def decode_programs_of_all(num_kv_heads: int, device: Device) -> set[int]:
    """What `decode_programs` gives for any batch."""
    return {decode_programs(1 << i, num_kv_heads, device) for i in range(20)}


@lru_cache(maxsize=None)
def choose_decode(num_reqs: int, layout: CacheLayout, device: Device) -> DecodeLaunch:
    """Launch for a batch of `num_reqs` rows, padding included."""
    least, most = SPLIT_BYTES
    return DecodeLaunch(
        split_bytes=min(least * num_reqs, most),
        programs=decode_programs(num_reqs, len(layout.kept), device),
        tile=tile_tokens(layout),
        tma=device.tma,
    )


def share_programs(costs: Sequence[float], programs: int) -> list[int]:
    """Programs for each head, at least one, so that the largest share of work is smallest."""
    counts = [1] * len(costs)
    heap = [(-cost, head) for head, cost in enumerate(costs)]
    heapify(heap)
    for _ in range(programs - len(costs)):
        head = heap[0][1]
        counts[head] += 1
        heapreplace(heap, (-costs[head] / counts[head], head))
    return counts


def compact_programs(num_reqs: int, num_kv_heads: int) -> int:
    """Programs per request and KV head of compaction: a prompt's is long, most others empty."""
    return max(min(COMPACT_PROGRAMS // (num_reqs * num_kv_heads), 64), 1)
