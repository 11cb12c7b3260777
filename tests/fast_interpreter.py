"""Triton's interpreter, without work that it does over and over: three quarters of a kernel's time.

For each call of a device function it looks through all of triton.language to put its own functions
in place, which they are already; whether integers overflow it finds out by a dozen operations of
its own; and of numpy's types it makes a table whenever it wants one.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from triton.language.core import pointer_type
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """Do each once."""
    _patch_once_a_launch()
    interpreter._get_np_dtype = _numpy_types(interpreter._get_np_dtype)
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _patch_once_a_launch() -> None:
    patch: Callable[[Any], Any] = interpreter._patch_lang
    # What is in place: one scope for functions that see `triton.language`, one for its own, which
    # see `triton.language.core`.
    scopes: dict[bool, Any] = {}

    def patch_once(fn: Any) -> Any:
        own = fn.__module__.startswith("triton.")
        if own not in scopes:
            scopes[own] = scope = patch(fn)
            restore = scope.restore

            def restore_all() -> None:
                scopes.clear()
                restore()

            scope.restore = restore_all
        return scopes[own]

    interpreter._patch_lang = patch_once


def _numpy_types(of: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    of_number = cache(of)

    def of_any(kind: Any) -> np.dtype:
        scalar = kind.scalar
        return of(scalar) if isinstance(scalar, pointer_type) else of_number(scalar)

    return of_any


_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(
    semantic: TritonSemantic, lhs: Any, rhs: Any, binary_op: Callable[..., Any]
) -> None:
    """Refuse sums and products of integers that do not fit into their type."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    left, right = (one.handle.data.astype(np.int64) for one in (lhs, rhs))
    result = _OPERATIONS[binary_op.__name__](left, right)
    fits = (result <= kind.get_int_max_value()) & (result >= kind.get_int_min_value())
    assert fits.all(), f"int{kind.int_bitwidth} overflow in {binary_op.__name__}"
