"""Compiles the attention kernels for GPUs that are not here, as they would be launched there.

    python tests/compile_kernels.py CAPABILITY HEAD_DIM

Prints a line of JSON for each: kernel, archive, bytes of shared memory. What the interpreter takes
and the compiler does not shows here, and what no multiprocessor could hold.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from cache_builder import CacheBuilder
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_leank.kernels import decode, extend, launch

from vllm_leank.core.formats import ArchiveFormat, known_formats
from vllm_leank.core.formats.whole import WholeChannels
from vllm_leank.core.window import Window

KEPT = {128: (0, 32, 96), 256: (0, 240)}
"""Kept channels of a layer's heads, by head size."""

OPTIONS = ("num_warps", "launch_pdl", "maxnreg")
TYPES = {
    torch.int32: "i32",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
}


def type_of(value: Any) -> Any:
    """Triton's name of an argument's type; of a tuple, those of its parts."""
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
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
        if parameter.is_constexpr:
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


class Recorder:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any, capability: int, tell: Callable[[str, int], None]) -> None:
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
        compiled = triton.compile(
            ASTSource(self._kernel, types, constants, attributes),
            target=GPUTarget("cuda", self._capability, 32),
            options=options,
        )
        self._tell(self._kernel.__name__, compiled.metadata.shared)


def compile_all(capability: int, head_dim: int, archive_format: ArchiveFormat) -> None:
    """Compile a decode step and a prompt that is read pruned."""

    def tell(kernel: str, shared: int) -> None:
        line = {"kernel": kernel, "archive": archive_format.name, "shared": shared}
        print(json.dumps(line), flush=True)

    window = Window(128, 768, exact=False)
    block = 128 // archive_format.itemsize(2)
    builder = CacheBuilder(
        KEPT[head_dim], head_dim, 4, window, block, torch.bfloat16, archive_format
    )
    request = builder.add(0, 1100)
    device = launch.Device(tma=capability // 10 in launch.TMA_CAPABILITIES)
    stand_in = partial(Recorder, capability=capability, tell=tell)
    with (
        mock.patch.object(launch.Device, "of", return_value=device),
        mock.patch.object(decode, "_decode_kernel", stand_in(decode._decode_kernel)),
        mock.patch.object(decode, "_combine_kernel", stand_in(decode._combine_kernel)),
        mock.patch.object(extend, "_extend_kernel", stand_in(extend._extend_kernel)),
    ):
        for tokens, attend in ((1000, extend.extend), (1, decode.decode)):
            step = builder.step([(request, tokens)])
            output = torch.empty_like(step.query)
            attend(step.query, output, builder.cache, step.batch, builder.scale)


if __name__ == "__main__":
    capability, head_dim = map(int, sys.argv[1:])
    for archive_format in known_formats():
        if not isinstance(archive_format, WholeChannels):
            continue  # there are no kernels for codes yet
        if divmod(capability, 10) >= archive_format.capability:
            compile_all(capability, head_dim, archive_format)
