"""Launches kernels, or only compiles what would be launched.

Every launch of the package goes through `launch`, so that `compiling` turns a dry run of a step
into the compilation of its kernels.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

_compiling = False


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """`kernel[grid](*args, **kwargs)`, or within `compiling` its compilation alone."""
    if _compiling:
        kernel.warmup(*args, grid=grid, **kwargs)
    else:
        kernel[grid](*args, **kwargs)


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
