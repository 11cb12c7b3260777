"""What a step changes must not change the kernels that were prepared for it."""

from dataclasses import replace

import pytest
import torch
import triton
from archive_definition import CODED, PACKED
from cache_builder import CacheBuilder, relative_rms
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from vllm_leank.kernels import decode, extend, launcher, merge, store, unpack
from vllm_leank.kernels.launcher import Launch, _Slot
from vllm_leank.kernels.scratch import Scratch

from vllm_leank.core.window import Window

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
LAYER = (
    "q_ptr", "output_ptr", "partial_ptr", "written_ptr", "lse_ptr", "key_ptr", "value_ptr",
    "other_ptr", "other_lse_ptr", "new_lse_ptr",
)  # fmt: skip
"""Tensors of a layer, not of the step: the only ones whose alignment may choose a kernel."""


KEPT, WINDOW = (0, 32, 96), Window(128, 256, exact=False)


def compiled(kernel):
    """The kernel for the compiler, also where the interpreter has taken Triton's place."""
    return kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)


def kind(launch, values):
    """All that Triton chooses a compilation by."""
    kernel = compiled(launch._kernel)
    arguments = launch._arguments(values)
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    options = {name: arguments.pop(name) for name in [*arguments] if name not in kernel.arg_names}
    _, specialisation, options = bind(**arguments, **options)
    return specialisation, options


def moved(value, items):
    """The same elsewhere in memory, `items` beyond an aligned address; of a number another one."""
    if not isinstance(value, torch.Tensor):
        return items
    place = torch.empty(value.numel() + 64, dtype=value.dtype, device=value.device)
    return place[items : items + value.numel()].view(value.shape).copy_(value)


@pytest.fixture(scope="module")
def launches():
    """The launches of every kind of step, with what they passed."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", lambda self, grid, *values: found.append((self, values)))
        build = CacheBuilder(KEPT, 128, 4, WINDOW, dtype=torch.float16)
        request = build.add(0, 401)
        for tokens in (400, 1):
            step = build.step([(request, tokens)])
            output = torch.empty_like(step.query)
            if tokens == 1:
                store.update(step.key, step.value, build.cache, step.batch)
                decode.decode(step.query, output, build.cache, step.batch, build.scale)
            else:
                store.store(step.key, step.value, build.cache, step.batch)
                store.compact(build.cache, step.batch)
                extend.extend(step.query, output, build.cache, step.batch, build.scale)
        build = CacheBuilder(CODED[128][:3], 128, 4, WINDOW, 128, torch.float16, PACKED)
        room = Scratch.allocate(build.cache.layout, 12, 400, 0, torch.float16, torch.device("cpu"))
        cache = replace(build.cache, scratch=room)
        step = build.step([(build.add(0, 400), 400)])
        output, lse = torch.empty_like(step.query), torch.empty(12, 400)
        unpack.unpack(cache, step.batch, room.regions(1, 400), 0)
        merge.merge(output, lse, output, lse, cache)
        extend.extend(step.query, output, cache, step.batch, build.scale, lse)
    names = [launch._kernel.fn.__name__ for launch, _ in found]
    assert names == [
        *["_update_kernel"] * 2, "_extend_kernel", "_update_kernel", "decode_kernel",
        "combine_kernel", "_unpack_kernel", "_merge_kernel", "_extend_kernel",
    ]  # fmt: skip
    return found


def test_what_a_step_changes_chooses_no_other_kernel(launches):
    for launch, values in launches:
        expected = kind(launch, values)
        parameters = {one.name: one for one in compiled(launch._kernel).params}
        for i, name in enumerate(launch._changing):
            slot = _Slot.of(parameters[name], values[i], 0)
            assert (slot.unaligned > 0) == (name in LAYER)
            for items in (64,) if slot.unaligned else (1, 15, 16, 64):
                changed = [*values[:i], moved(values[i], items), *values[i + 1 :]]
                assert kind(launch, changed) == expected, name


def test_what_does_not_fit_is_seen(launches):
    """Alignment and dtype are what Triton looks at; where it would choose another kernel, so does
    the launch.
    """
    for launch, values in launches:
        if launch._changing[0] in LAYER and len(values[0]):
            slot = _Slot.of(compiled(launch._kernel).params[0], values[0], 0)
            other = moved(values[0], 1)
            assert other.data_ptr() & slot.unaligned
            assert kind(launch, (other, *values[1:])) != kind(launch, values)


def test_numbers_that_kernels_are_specialised_for_cannot_change():
    @triton.jit
    def kernel(number):
        pass

    parameter = compiled(kernel).params[0]
    with pytest.raises(ValueError, match="number changes from call to call: do_not_specialize"):
        _Slot.of(parameter, 5, 0)


@pytest.mark.gpu
def test_later_launches_do_what_the_first_did(monkeypatch):
    """The first goes Triton's ordinary way, later ones past it, unless something does not fit."""
    past = []
    direct = launcher._Direct.launch

    def spy(self, grid, values):
        past.append(direct(self, grid, values))
        return past[-1]

    monkeypatch.setattr(launcher._Direct, "launch", spy)
    build = CacheBuilder(KEPT, 128, 4, WINDOW, dtype=torch.bfloat16, device="cuda")
    request = build.add(0, 701)
    first, step = build.step([(request, 700)]), build.step([(request, 1)])
    store.store(first.key, first.value, build.cache, first.batch)
    store.compact(build.cache, first.batch)

    def attend(query, batch):
        output = torch.full_like(query, float("nan"))
        store.update(step.key, step.value, build.cache, batch)
        decode.decode(query, output, build.cache, batch, build.scale)
        return output

    expected = attend(step.query, step.batch)
    assert relative_rms(expected, step.expected) < 3e-3
    assert not past
    tensors = "seq_lens", "exact_until", "window_table", "archive_table", "slots"
    elsewhere = replace(
        step.batch, **{name: moved(getattr(step.batch, name), 1) for name in tensors}
    )
    is_checked = triton.__version__.startswith(launcher.DIRECT)
    for query, batch, fits in [
        (step.query, step.batch, True),
        (step.query.clone(), elsewhere, True),
        (moved(step.query, 1), step.batch, False),
        (step.query, step.batch, True),
    ]:
        past.clear()
        assert torch.equal(attend(query, batch), expected)
        assert past == ([True, fits, True] if is_checked else [])
