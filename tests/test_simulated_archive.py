"""Queries read exactly their far tokens from the archive, whatever the chunk they come in."""

import pytest
import torch

from vllm_leank.core.window import Window
from vllm_leank.offline.simulate import SimulatedArchive

WINDOW = Window(sink=32, recent=32)


def halved(layer, first, key, value):
    assert first == 32
    return key * 0.5, value * 0.25


def expected(query, key, value, first):
    """One query after the other."""
    rows = []
    for i in range(query.shape[2]):
        end = first + i + 1
        k, v = key[:, :, :end].clone(), value[:, :, :end].clone()
        far = slice(32, max(32, WINDOW.boundary(end)))
        k[:, :, far] *= 0.5
        v[:, :, far] *= 0.25
        k, v = (one.repeat_interleave(2, dim=1) for one in (k, v))
        weights = (query[:, :, i : i + 1] @ k.transpose(-1, -2) * 16**-0.5).softmax(-1)
        rows.append(weights @ v)
    return torch.cat(rows, dim=2).transpose(1, 2)


@pytest.mark.parametrize(("length", "queries"), [(200, 1), (200, 90), (96, 40), (60, 20), (20, 20)])
def test_far_tokens_come_from_the_archive(length, queries):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, length, 16, generator=generator)
    found = SimulatedArchive(WINDOW, halved)(0, query, key, value, None, None, None)
    torch.testing.assert_close(found, expected(query, key, value, length - queries))
    dense = SimulatedArchive(WINDOW)(0, query, key, value, None, None, None)
    far = WINDOW.boundary(length) > 32
    assert torch.allclose(dense, found) != far


def test_blind_heads_see_no_far_tokens():
    query, key, value = torch.randn(1, 4, 3, 16), *torch.randn(2, 1, 2, 200, 16)
    blind = torch.tensor([[False, True]])
    found = SimulatedArchive(WINDOW, halved, blind)(0, query, key, value, None, None, None)
    seeing = SimulatedArchive(WINDOW, halved)(0, query, key, value, None, None, None)
    torch.testing.assert_close(found[:, :, :2], seeing[:, :, :2])
    loud = key.clone()
    loud[:, :, 32 : WINDOW.boundary(198)] *= 9
    louder = SimulatedArchive(WINDOW, halved, blind)(0, query, loud, value, None, None, None)
    torch.testing.assert_close(louder[:, :, 2:], found[:, :, 2:])
    assert not torch.allclose(louder[:, :, :2], found[:, :, :2])
