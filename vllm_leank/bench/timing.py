"""Times of kernels on the GPU, and the rate at which it can read memory."""

import gc
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
import triton.testing

READ_BYTES = 4 << 30
"""What the read limit is measured on."""

L2_SIZES = 4
"""Calls that are timed one after the other read this many times the L2 cache together."""

MAX_COPIES = 64
"""Copies of a case's pages at most."""


def copies_needed(read_bytes: int, device: torch.device) -> int:
    """Copies of a case's pages that make sure that each call finds none of its own in L2, as
    in a model, where a layer's pages are read once a step.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_COPIES, -(-L2_SIZES * l2 // read_bytes)))


def graph_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Milliseconds of a call, median over replays of a CUDA graph that holds them all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    milliseconds = eager_ms(graph.replay) / len(calls)
    graph.reset()
    return milliseconds


def eager_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call that is launched from Python, median."""
    return float(triton.testing.do_bench(call, return_mode="median"))


def read_limit(device: torch.device) -> float:
    """Bytes per second of a kernel that does nothing but read: the best of several."""
    fastest = min(eager_ms(read) for read in _readers(device))
    release()
    return READ_BYTES / fastest * 1e3


def _readers(device: torch.device) -> list[Callable[[], object]]:
    """Calls that read `READ_BYTES`: PyTorch's sum, and programs of several sizes."""
    data = torch.ones(READ_BYTES // 4, device=device)
    partial = torch.empty(READ_BYTES // 4 // 4096, device=device)

    def reader(block: int, steps: int, warps: int) -> Callable[[], object]:
        grid = (data.numel() // (block * steps),)
        return lambda: _read_kernel[grid](data, partial, BLOCK=block, STEPS=steps, num_warps=warps)

    return [data.sum, reader(4096, 1, 4), reader(4096, 4, 4), reader(8192, 4, 8)]


def release() -> None:
    """Give memory that nothing refers to any more back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(data_ptr, partial_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    i_program = tl.program_id(0)
    first = i_program.to(tl.int64) * (BLOCK * STEPS)
    o_item = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        total += tl.load(data_ptr + first + step * BLOCK + o_item)
    tl.store(partial_ptr + i_program, tl.sum(total))
