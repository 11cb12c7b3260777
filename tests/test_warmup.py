"""No kernel is compiled while a request waits: whatever number of queries a step has, startup has
compiled what it launches.
"""

from dataclasses import replace

import pytest
import torch
from archive_definition import CODED, PACKED
from cache_builder import CacheBuilder
from test_launcher import kind
from vllm_leank.kernels import decode_each, gpu, warmup
from vllm_leank.kernels.launcher import Launch

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window

MOST = 300
LONGEST = 4096
CPU = torch.device("cpu")


@pytest.fixture
def launched(monkeypatch):
    """All that compilations are chosen by, of launches since the last look."""
    found = set()

    def launch(self, grid, *values):
        found.add((self._kernel.fn.__name__, *map(str, kind(self, values))))

    monkeypatch.setattr(Launch, "__call__", launch)

    def look():
        seen = set(found)
        found.clear()
        return seen

    return look


@pytest.mark.parametrize("selection", [None, Selection.of(0.1)], ids=["all", "selects"])
@pytest.mark.parametrize(
    ("archive_format", "heads"),
    [(PACKED, CODED[128]), (PACKED, CODED[128][:3]), (NATIVE, (32, 64)), (NATIVE, 5 * (32, 64))],
    ids=["codes", "codes of 3 heads", "whole", "whole of 10 heads"],
)
def test_startup_compiles_what_any_number_of_queries_launches(
    launched, archive_format, heads, selection
):
    window, dtype = Window(64, 256), torch.float16
    builder = CacheBuilder(heads, 128, 4, window, 128, dtype, archive_format, num_blocks=4)
    cache, query_heads = builder.cache, 4 * len(heads)
    attention = warmup.Attention(
        cache.layout, window, query_heads, dtype, MOST, LONGEST, selection=selection
    )
    warmup._dry_run(attention, warmup._layer_cache(attention, CPU))
    compiled = launched()
    assert {"decode_kernel", "combine_kernel"} <= {name for name, *_ in compiled}

    cache = replace(cache, selection=selection)
    width = -(-LONGEST // cache.layout.archive_block)

    def tokens(count):
        return torch.empty((count, query_heads, 128), dtype=dtype)

    for count in (*range(1, 20), 33, 42, 43, 63, 64, 65, 100, 150, 256, 257, MOST):
        batch = warmup._batch(count, 1, CPU, width)
        gpu.decode_requests(tokens(count), tokens(count), cache, batch, builder.scale)
        assert launched() <= compiled, count
    if selection is not None:
        for count in (*range(1, 20), 100, decode_each.SELECTING_AT_ONCE, 300):
            again = warmup._batch(1, count, CPU, width)
            gpu.decode_each(tokens(count), tokens(count), cache, again, builder.scale)
            assert launched() <= compiled, count
