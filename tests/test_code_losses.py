"""What channels lose with codes of so many bits, against a direct computation."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import wide_llama

from vllm_leank.core.window import Window
from vllm_leank.offline.code_losses import BITS, FarLosses, Known, code_losses
from vllm_leank.offline.statistics import ChannelStatistics

WINDOW = Window(sink=32, recent=32)


@pytest.fixture(scope="module")
def known():
    """Of two layers with two heads of 16 channels."""
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=(2, 2, 2, 16)), rng.uniform(0.5, 2, (2, 2, 2, 16))
    statistics = ChannelStatistics(
        k_mean=mean[0], k_scale=scale[0], k_square=scale[0],
        v_mean=mean[1], v_scale=scale[1], v_square=scale[1], before_rope=False,
    )  # fmt: skip
    return Known(statistics, {bits: scale[0] * (1 + bits / 100) for bits in BITS if bits})


def test_errors_that_tokens_share_cost_more(known):
    """Gradients that are all 1: what tokens have in common adds up before the square is taken."""
    hook = FarLosses(context=None, window=WINDOW, places=range(0), known=known)
    mean = torch.tensor(known.statistics.k_mean[1], dtype=torch.float32)[:, None]
    signs = torch.tensor([1.0, -1.0]).repeat(25)[:, None]
    ones = torch.ones(2, 50, 16)
    together, alone = hook.of_key(1, mean + 0.5 * ones, ones)[BITS.index(0)]
    torch.testing.assert_close(alone, torch.full((2, 16), 50 * 0.25))
    torch.testing.assert_close(together, torch.full((2, 16), (50 * 0.5) ** 2))
    together, alone = hook.of_key(1, mean + 0.5 * signs * ones, ones)[BITS.index(0)]
    torch.testing.assert_close(alone, torch.full((2, 16), 50 * 0.25))
    assert together.max() < 1e-6


def test_more_bits_leave_less(known):
    generator = torch.Generator().manual_seed(0)
    far = torch.randn(2, 400, 16, generator=generator)
    for of, mean in ((known.key_errors, "k_mean"), (known.value_errors, "v_mean")):
        errors = [of(0, far, bits).square().mean() for bits in (0, 2, 4, 8)]
        for worse, better in pairwise(errors):
            assert better < 0.5 * worse
        expected = getattr(known.statistics, mean)[0][:, None] - far.double().numpy()
        np.testing.assert_allclose(of(0, far, 0).numpy(), expected, atol=1e-5)


def test_losses_are_means_over_prompts_and_tell_heads_apart(known):
    """Values of one head do not reach the output: whatever is lost of them costs nothing."""
    model = wide_llama()
    with torch.no_grad():
        # Query heads 2 and 3 of the second layer, which read its second KV head.
        model.model.layers[1].self_attn.o_proj.weight[:, 32:] = 0
    prompts = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)).tolist()
               for n in (300, 340)]  # fmt: skip
    both = code_losses(model, prompts, WINDOW, known, seed=1)
    for losses in both:
        assert set(losses) == set(BITS)
        for loss in losses.values():
            assert loss.shape == (2, 2, 16)
            assert not loss[1, 1].any()
            assert (loss[0] > 0).all()
        assert losses[8].sum() < 0.1 * losses[2].sum() < 0.1 * losses[0].sum()
    first, second = (code_losses(model, [ids], WINDOW, known, seed=1) for ids in prompts)
    again = code_losses(model, prompts[:1], WINDOW, known, seed=1)
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(one[bits], other[bits]) for bits in BITS)
    assert both[0][0].sum() < first[0][0].sum() + second[0][0].sum()
