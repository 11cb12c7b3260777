"""Directions of K against a direct computation, on a tiny random model."""

import numpy as np
import pytest
import torch
from baselines.directions import DirectionArchive, best_directions, measure_directions
from baselines.sensitivities import sensitivities
from test_fisher import WINDOW, prompt, tiny

from vllm_leank.offline.archive import StaticArchive
from vllm_leank.offline.fisher import observe_far
from vllm_leank.offline.rope import NO_ROTATION, rotation_of_model
from vllm_leank.offline.statistics import ChannelStatistics

PROMPTS = [prompt(300), prompt(280, seed=1)]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module", params=[False, True])
def found(model, request):
    rotation = rotation_of_model(model) if request.param else NO_ROTATION
    return measure_directions(model, PROMPTS, WINDOW, rotation)


def test_they_know_what_the_diagonal_knows(model, found):
    """Coordinates of equal cost: the metric is the Fisher matrix, whose diagonal is known."""
    metric = found.forth.swapaxes(-1, -2) @ found.forth
    diagonal = np.diagonal(metric, axis1=-2, axis2=-1)
    known = sensitivities(model, PROMPTS, WINDOW).key
    if found.rotation is NO_ROTATION:
        assert diagonal == pytest.approx(known, rel=1e-4, abs=2e-3 * known.mean())
    # Turning leaves the sum of squares as it is.
    assert diagonal.sum(-1) == pytest.approx(known.sum(-1), rel=2e-3)


def test_coordinates_come_apart(model, found):
    """Far K in coordinates: no two go together, and variances are costs."""
    keys = {}

    def observe(layer, first, key, value):
        positions = torch.arange(first, first + key.shape[2])
        keys.setdefault(layer, []).append(found.rotation.back(key[0].float(), positions).clone())

    observe_far(model, PROMPTS, WINDOW, observe)
    for layer, parts in keys.items():
        k = torch.cat(parts, dim=1).double().numpy()
        z = np.einsum("hij,htj->hti", found.forth[layer], k - found.mean[layer][:, None])
        covariance = z.swapaxes(-1, -2) @ z / z.shape[1]
        expected = np.stack([np.diag(row) for row in found.cost[layer]])
        assert covariance == pytest.approx(expected, abs=1e-4 * expected.max())


def test_all_directions_give_keys_back(found):
    nothing = ChannelStatistics(*[np.zeros(found.cost.shape)] * 6, before_rope=False)
    values = StaticArchive(*[np.full(found.cost.shape, 16, np.uint8)] * 2, nothing, None)
    key, value = torch.randn(2, 1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    archive = DirectionArchive(found, best_directions(found.cost, 1.0), values)
    again, same = archive(1, 32, key, value)
    assert again == pytest.approx(key, abs=1e-3)
    assert torch.equal(same, value)
    few = DirectionArchive(found, best_directions(found.cost, 0.5), values)(1, 32, key, value)[0]
    assert (few - key).norm() > 0.1 * key.norm()
