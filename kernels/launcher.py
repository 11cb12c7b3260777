"""Launches kernels, or only compiles what would be launched.

Every launch of the package is a `Launch`: it is prepared once for a layer, with all that stays, and
then called in each step with what changes. `compiling` turns a dry run of a step into the
compilation of its kernels.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

_compiling = False

DIRECT = ("3.6.",)
"""Versions of Triton whose compiled kernels are called directly, see `_Direct`. What it uses is not
public; with others each launch goes the ordinary way, which takes the host longer."""

Grid = tuple[int, int, int]


class Launch:
    """A kernel with all of its arguments that stay.

    The first call goes the ordinary way: Triton looks at every argument, and compiles a kernel for
    what it sees. Later calls go past that to the same kernel. It fits as long as tensors keep their
    dtypes and alignments, and numbers are not specialised for, which is checked; where it does not
    fit, the call goes the ordinary way again.

    Args:
        kernel: made by `triton.jit`.
        changing: names of parameters that calls pass, in the order in which they do.
        fixed: all other parameters by name, and launch options. Tensors among them stay in place.

    Raises:
        ValueError: a call passes a number that Triton specialises kernels for.
    """

    def __init__(self, kernel: Any, changing: Sequence[str], **fixed: Any) -> None:
        self._kernel, self._changing, self._fixed = kernel, changing, fixed
        self._direct: _Direct | None = None

    def __call__(self, grid: Grid, *values: Any) -> None:
        if _compiling:
            self._kernel.warmup(grid=grid, **self._arguments(values))
        elif self._direct is None:
            changing = dict(zip(self._changing, values, strict=True))
            compiled = self._kernel[grid](**self._fixed, **changing)
            self._direct = _Direct.of(self._kernel, compiled, self._fixed, changing)
        elif not self._direct.launch(grid, values):
            self._kernel[grid](**self._arguments(values))

    def _arguments(self, values: Sequence[Any]) -> dict[str, Any]:
        return self._fixed | dict(zip(self._changing, values, strict=True))


class _Direct:
    """A compiled kernel and its arguments as Triton's launcher in C takes them: addresses instead
    of tensors, and tensor descriptors encoded, which Triton would do anew at every launch.

    Not public are `CudaLauncher`, what it calls, and the order in which it passes arguments on
    (`triton/backends/nvidia/driver.py` of the versions in `DIRECT`).
    """

    def __init__(self, kernel: Any, compiled: Any, fixed: dict[str, Any], changing: dict[str, Any]):
        from triton.backends.nvidia.driver import make_tensordesc_arg

        run, driver = compiled.run, triton.runtime.driver.active
        self._launcher, metas = _c_launcher(run.launch)
        device = driver.get_current_device()
        self._stream = partial(driver.get_current_stream, device)
        no_scratch = no_metadata = no_hook = None
        self._arguments = [
            0, 0, 0, 0, compiled.function, run.launch_cooperative_grid, run.launch_pdl,
            no_scratch, no_scratch, compiled.packed_metadata, no_metadata, no_hook, no_hook,
        ]  # fmt: skip
        slots = {}
        for parameter in kernel.params:
            if parameter.name in changing:
                slots[parameter.name] = _Slot.of(
                    parameter, changing[parameter.name], len(self._arguments)
                )
            value: Any = None if parameter.is_constexpr else fixed.get(parameter.name)
            if isinstance(value, TensorDescriptor):
                self._arguments += make_tensordesc_arg(value, next(metas))
            elif isinstance(value, torch.Tensor):
                self._arguments.append(value.data_ptr())
            else:
                self._arguments.append(value)
        self._slots = [slots[name] for name in changing]

    @classmethod
    def of(
        cls, kernel: Any, compiled: Any, fixed: dict[str, Any], changing: dict[str, Any]
    ) -> "_Direct | None":
        """For what a launch with these arguments was compiled to; None where only the ordinary way
        is left: in the interpreter, with other versions of Triton, and for kernels that need
        memory beside their arguments.
        """
        run: Any = getattr(compiled, "run", None)
        if not triton.__version__.startswith(DIRECT) or type(run).__name__ != "CudaLauncher":
            return None
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        direct = cls(kernel, compiled, fixed, changing)
        return direct if direct._take(changing.values()) is not None else None

    def launch(self, grid: Grid, values: Sequence[Any]) -> bool:
        """Launch the kernel with these values, unless they do not fit, or someone wants to be told
        of launches.
        """
        runtime = triton.knobs.runtime
        for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            if getattr(hook, "calls", hook):
                return False
        arguments = self._take(values)
        if arguments is None:
            return False
        arguments[:4] = *grid, self._stream()
        self._launcher(*arguments)
        return True

    def _take(self, values: Iterable[Any]) -> list[Any] | None:
        """The arguments with these values in their places; None if the kernel does not fit them."""
        arguments = self._arguments.copy()
        for value, (place, dtype, unaligned) in zip(values, self._slots, strict=True):
            if dtype is None:
                arguments[place] = value
                continue
            address = value.data_ptr()
            if value.dtype is not dtype or address & unaligned:
                return None
            arguments[place] = address
        return arguments


class _Slot(NamedTuple):
    """Where a changing argument goes, and what the compiled kernel takes for granted of it.

    Attributes:
        place: among the launcher's arguments.
        dtype: of a tensor; None for a number.
        unaligned: bits that a tensor's address must not have.
    """

    place: int
    dtype: torch.dtype | None
    unaligned: int

    @classmethod
    def of(cls, parameter: Any, value: Any, place: int) -> "_Slot":
        """For a parameter of a kernel, and a value that it has got."""
        if isinstance(value, torch.Tensor):
            free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            return cls(place, value.dtype, 0 if free else 15)
        if not parameter.do_not_specialize:
            raise ValueError(f"{parameter.name} changes from call to call: do_not_specialize it")
        return cls(place, None, 0)


def _c_launcher(launch: Any) -> tuple[Any, Iterator[Any]]:
    """Triton's launcher in C, and how it wants each descriptor encoded. For kernels with
    descriptors `launch` is a function around it.
    """
    if inspect.isbuiltin(launch):
        return launch, iter(())
    around = inspect.getclosurevars(launch).nonlocals
    return around["launcher"], iter(around["tensordesc_meta"])


@contextmanager
def compiling(executor: Executor) -> Iterator[list[Any]]:
    """Within the context nothing is launched, and kernels are compiled by `executor`, as many at
    once as it has workers. At its end all are compiled and loaded, so that a launch has nothing
    left to do but to launch.

    Yields:
        The compilations that were begun, each once.
    """
    from triton.runtime._async_compile import AsyncCompileMode

    global _compiling
    _compiling = True
    try:
        with AsyncCompileMode(executor) as mode:
            yield mode.raw_futures
        list(executor.map(_load, mode.future_kernels.values()))
    finally:
        _compiling = False


def _load(compilation: Any) -> None:
    """Have a kernel's launcher built, by a C compiler where it is not cached, and its code loaded
    on the thread's device: else the first launch would do both.
    """
    _ = compilation.result().run
