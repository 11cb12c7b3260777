"""Compiles the attention kernels for GPUs that are not here, as they would be launched there.

    python tests/compile_kernels.py CAPABILITY-HEAD_DIM-ARCHIVE_FORMAT[+KIND]...

`+pages`: of queries that select what they read. `+states`: of a model with states, whose window
pages are longer. `+many`: of many requests, packed heads of 128 channels with about 2 bits, which
take long tiles; `+bits`: these with more.

Prints a line of JSON for each: case, kernel, bytes of shared memory, bytes of stack, into which
registers spill (null where nothing can tell), and whether their number is capped. What the
interpreter takes and the compiler or the launcher does not shows here, and what no multiprocessor
could hold.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from archive_definition import CODED, EIGHT, PACKED
from cache_builder import CacheBuilder
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_leank.kernels import decode, decode_each, extend, launch, merge, select, store, unpack
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.scratch import Scratch, needs_scratch

from vllm_leank.core.formats import ArchiveFormat, known_formats
from vllm_leank.core.profile import Profile
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window

KEPT = {64: (0, 48), 128: (0, 96), 256: (0, 240)}
"""Kept channels of a layer's heads, by head size: chunks of several widths."""

MIXED = {64: CODED[64][0:2], 128: CODED[128][0:3:2], 256: CODED[256][1:2]}
"""Heads of a packed archive, by head size: those of 128 have many bits, others few; some have
channels of every class."""

TWO_BITS = CODED[128][1], Profile(k4=64, k2=64, v2=64)
"""Heads of 128 channels."""

OPTIONS = ("num_warps", "launch_pdl", "maxnreg", "enable_fp_fusion")
TYPES = {
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
}


def type_of(value: Any) -> Any:
    """Triton's name of an argument's type; of a tuple, those of its parts."""
    if isinstance(value, tuple):
        types = tuple(map(type_of, value))
        assert not any(str(one).startswith("tensordesc") for one in types), (
            "Triton 3.6 launches no descriptors within a tuple"
        )
        return types
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def signature(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict, dict]:
    """Types, constants and attributes of a launch, as Triton's own launcher finds them."""
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[name], constants[index,] = "constexpr", value
            continue
        types[name] = type_of(value)
        for i, one in enumerate(value if isinstance(value, tuple) else (value,)):
            aligned = not parameter.do_not_specialize_on_alignment
            if not isinstance(one, torch.Tensor):
                aligned &= isinstance(one, int) and one % 16 == 0
                aligned &= not parameter.do_not_specialize
            if aligned:
                path = (index, i) if isinstance(value, tuple) else (index,)
                attributes[path] = [["tt.divisibility", 16]]
    return types, constants, attributes


Tell = Callable[[str, int, int | None, bool], None]
"""Takes a kernel's name, bytes of shared memory, and of stack, and whether registers are capped."""


class Recorder:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any, capability: int, tell: Tell) -> None:
        self._kernel = kernel
        self._capability = capability
        self._tell = tell

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = [parameter.name for parameter in self._kernel.params]
        types, constants, attributes = signature(
            self._kernel, dict(zip(names, args, strict=False)) | kwargs
        )
        source = ASTSource(self._kernel, types, constants, attributes)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", self._capability, 32),
            options=options,
        )
        if hasattr(driver, "make_launcher"):
            # Some versions of Triton write a launcher in C for each kernel, which may fail as well.
            descriptors = getattr(compiled.metadata, "tensordesc_meta", None)
            driver.make_launcher(source.constants, dict(source.signature), descriptors)
        self._tell(
            self._kernel.__name__,
            compiled.metadata.shared,
            stack_bytes(compiled.asm["cubin"]),
            options.get("maxnreg") is not None,
        )


def stack_bytes(cubin: bytes) -> int | None:
    """Bytes of a thread's stack; None where there is no `cuobjdump` to read them."""
    tool = Path(triton.knobs.nvidia.cuobjdump.path)
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


KERNELS = (
    (decode, "decode_kernel"),
    (decode, "combine_kernel"),
    (extend, "_extend_kernel"),
    (merge, "_merge_kernel"),
    (unpack, "_unpack_kernel"),
    (store, "_update_kernel"),
    (select, "_score_kernel"),
    (select, "_pick_kernel"),
)


@contextmanager
def compiled_for(capability: int, tell: Tell) -> Iterator[None]:
    """Within it launches are compilations."""
    device = launch.Device(tma=capability // 10 in launch.TMA_CAPABILITIES)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch.Device, "of", return_value=device))
        for module, name in KERNELS:
            stand_in = Recorder(getattr(module, name), capability, tell)
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


def tell_of(case: str, kernel: str, shared: int, stack: int | None, capped: bool) -> None:
    """Print what a kernel takes."""
    line = {"case": case, "kernel": kernel, "shared": shared, "stack": stack, "capped": capped}
    print(json.dumps(line), flush=True)


def compile_all(capability: int, head_dim: int, archive_format: ArchiveFormat) -> None:
    """Compile a decode step and a prompt that is read pruned, where the format has it with far
    tokens unpacked; with attention sinks for heads of 64, which gpt-oss has.
    """
    tell = partial(tell_of, f"{capability}-{head_dim}-{archive_format.name}")
    window = Window(128, 768, exact=False)
    block = 128 // archive_format.itemsize(2)
    heads = MIXED[head_dim] if archive_format == PACKED else KEPT[head_dim]
    builder = CacheBuilder(
        heads, head_dim, 4, window, block, torch.bfloat16, archive_format, sinks=head_dim == 64
    )
    request = builder.add(0, 1100)
    with compiled_for(capability, tell):
        unpacks = needs_scratch(builder.cache.layout, window, longest=1 << 15)
        for tokens, attend in (
            (1000, extend_unpacked if unpacks else extend.extend), (1, decode.decode)
        ):  # fmt: skip
            step = builder.step([(request, tokens)])
            output = torch.empty_like(step.query)
            attend(step.query, output, builder.cache, step.batch, builder.scale)


DECODE: dict[str, dict[str, Any]] = {
    "pages": {"selection": Selection(share=1 << 13, least=4)},
    "states": {"window_block": 128},
    "many": {},
    "bits": {},
    "profiles": {},
    "few": {},
}
"""What makes decode steps of a kind different."""


def compile_decode(
    capability: int, head_dim: int, archive_format: ArchiveFormat, kind: str
) -> None:
    """Compile a decode step of a kind, and what is stored in it. Beside states there are no other
    steps: their prompts are read exactly.
    """
    tell = partial(tell_of, f"{capability}-{head_dim}-{archive_format.name}+{kind}")
    heads = MIXED[head_dim] if archive_format == PACKED else KEPT[head_dim]
    heads = {"profiles": EIGHT, "few": EIGHT}.get(kind, heads)
    if kind == "many" and archive_format == PACKED and head_dim == 128:
        heads = TWO_BITS
    few_heads = 0 if kind in ("many", "bits") else launch.FEW_HEADS
    builder = CacheBuilder(
        heads,
        head_dim,
        6 if heads is EIGHT else 4,
        Window(64, 256),
        128,
        torch.bfloat16,
        archive_format,
        **DECODE[kind],
    )
    requests = [builder.add(1000, 1001) for _ in range(2 if kind == "few" else 1)]
    builder.step([(request, 1000) for request in requests])
    step = builder.step([(request, 1) for request in requests])
    with mock.patch.object(launch, "FEW_HEADS", few_heads), compiled_for(capability, tell):
        store.update(step.key, step.value, builder.cache, step.batch)
        output = torch.empty_like(step.query)
        decode.decode(step.query, output, builder.cache, step.batch, builder.scale)
        if kind == "pages":
            decode_each.decode_each(step.query, output, builder.cache, step.batch, builder.scale)


def extend_unpacked(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> None:
    """Unpack far tokens and read the rest: by what `extend` is without, and an end."""
    tokens, heads, _ = output.shape
    room = Scratch.allocate(cache.layout, heads, tokens, 0, output.dtype, output.device)
    cache = replace(cache, scratch=room)
    unpack.unpack(cache, batch, room.regions(1, tokens), 0)
    lse = torch.empty(heads, tokens)
    merge.merge(output, lse, output, lse, cache)
    extend.extend(query, output, cache, batch, scale, lse)


if __name__ == "__main__":
    by_name = {one.name: one for one in known_formats()}
    for case in sys.argv[1:]:
        capability, head_dim, kind = case.split("-")
        name, _, step = kind.partition("+")
        given = int(capability), int(head_dim), by_name[name]
        if step:
            compile_decode(*given, step)
        else:
            compile_all(*given)
