"""Caches that archives are compared with: what they round, which tokens, and their bytes."""

import pytest
import torch
from baselines.ends_whole import EndsWhole, whole_layers
from baselines.group_rounding import round_groups
from baselines.kitty import Kitty
from baselines.kivi import Kivi
from baselines.rounded_cache import CacheHook, RoundedCache
from baselines.unrounded import Unrounded
from baselines.vllm_fp8 import VllmFp8
from baselines.vllm_int4 import VllmInt4
from baselines.vllm_turboquant import VllmTurboQuant
from real.caches import vllm_caches

from vllm_leank.core.geometry import Geometry
from vllm_leank.offline.plain_attention import plain_attention

SHAPE = Geometry(28, 2, 128, 1e6, None)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


class Halved(RoundedCache):
    """Halves K and quarters V, of the tokens that KIVI would round."""

    name = "halved"
    sink = 32
    residual = 128

    def layer_bytes(self, geometry, layer):
        return 1.0

    def round(self, layer, key, value):
        return key / 2, value / 4


@pytest.mark.parametrize("length", [20, 40, 100, 288, 289, 420])
def test_queries_read_the_rounded_tokens_of_their_position(length):
    queries = 20
    query, key, value = (
        random(1, 4, queries, 64),
        random(1, 2, length, 64),
        random(1, 2, length, 64),
    )
    found = CacheHook(Halved())(0, query, key, value, None, None, None)
    for i in range(queries):
        at = length - queries + i
        k, v = key[:, :, : at + 1].clone(), value[:, :, : at + 1].clone()
        # One by one, as a cache that is filled up goes on.
        end = 32
        while end + 128 <= at:
            end += 128
        k[:, :, 32:end] /= 2
        v[:, :, 32 : max(32, at - 128)] /= 4
        k, v = (one.repeat_interleave(2, dim=1) for one in (k, v))
        weights = (query[:, :, i : i + 1] @ k.mT * 64**-0.5).softmax(-1)
        torch.testing.assert_close(found[:, i], (weights @ v)[:, :, 0])


@pytest.mark.parametrize("cache", [Kivi, Kitty, Unrounded])
def test_what_is_kept_is_read_as_if_rounded_anew(cache):
    """Also where tokens that were guessed wrongly had filled up a page."""
    made = [cache(2) if cache is Kivi else cache() for _ in range(2)]
    once, anew = CacheHook(made[0], once=True), CacheHook(made[1])
    rounded = [watch_rounding(one) for one in made]
    keys = random(1, 2, 460, 64)
    values = keys.flip(2)
    for known, queries in ((300, 1), (370, 60), (380, 30), (420, 40), (459, 1)):
        end = known + queries
        # Behind what is known stand guesses, which are others each time.
        key, value = keys[:, :, :end].clone(), values[:, :, :end].clone()
        key[:, :, known + 1 :], value[:, :, known + 1 :] = random(2, 1, 2, queries - 1, 64)
        query = random(1, 4, queries, 64)
        found, expected = (hook(0, query, key, value, None, None, None) for hook in (once, anew))
        torch.testing.assert_close(found, expected)
    # Each token once, and a few with the guesses behind them.
    assert sum(rounded[0]) < 460 + 5 * 128
    assert sum(rounded[1]) > 3 * 460
    once.forget()
    other = once(0, query, key * 2, value, None, None, None)
    torch.testing.assert_close(other, anew(0, query, key * 2, value, None, None, None))


def watch_rounding(cache):
    """Tokens that a cache rounds at a time, from now on."""
    rounded, rounding = [], cache.round

    def watch(layer, key, value):
        rounded.append(key.shape[2])
        return rounding(layer, key, value)

    cache.round = watch
    return rounded


def test_sinks_of_the_model_take_their_share():
    query, key, value = random(1, 4, 5, 64), random(1, 2, 300, 64), random(1, 2, 300, 64).flip(2)
    sinks = random(4)
    found = CacheHook(Unrounded())(0, query, key, value, None, None, sinks)
    torch.testing.assert_close(found, plain_attention(query, key, value, None, None, sinks))
    without = plain_attention(query, key, value, None, None, None)
    assert (found - without).abs().max() > 1e-3


def test_groups_keep_their_ends_and_lose_half_a_step():
    x = random(3, 64)
    for bits in (2, 4):
        groups, back = (one.unflatten(-1, (2, 32)) for one in (x, round_groups(x, 32, bits)))
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        error = (groups - back).abs()
        assert (error.amax(-1) < 0.52 * step).all()
        assert (error.amax(-1) > 0.3 * step).all()
        for end in (groups.argmin(-1, True), groups.argmax(-1, True)):
            assert (error.gather(-1, end)[..., 0] < 0.01 * step).all()


def test_kitty_gives_the_largest_channels_of_a_page_more_bits():
    key, value = random(1, 2, 300, 64), random(1, 2, 300, 64)
    key[:, :, :128, 7] *= 5
    key[:, :, 128:256, 9] *= 5
    keys, _ = Kitty().round(0, key, value)
    torch.testing.assert_close(keys[:, :, 256:], key[:, :, 256:])
    first, second = (
        (keys - key)[:, :, part].square().sum(2) / key[:, :, part].square().sum(2)
        for part in (slice(128), slice(128, 256))
    )
    assert (first[..., 7] < 0.1 * first.median()).all()
    assert (second[..., 9] < 0.1 * second.median()).all()


@pytest.mark.parametrize(
    ("cache", "token_bytes", "worst"),
    [
        (Unrounded(), 28 * 1024, 0),
        (VllmFp8(), 28 * 512, 0.002),
        (VllmInt4(), 28 * 2 * 2 * (64 + 4), 0.02),
        (EndsWhole(VllmFp8(), 28), 4 * 1024 + 24 * 512, 0.002),
        (VllmTurboQuant("turboquant_k8v4"), 28 * 2 * (128 + 68), 0.02),
        (VllmTurboQuant("turboquant_4bit_nc"), 28 * 2 * (66 + 68), 0.02),
        (VllmTurboQuant("turboquant_3bit_nc"), 28 * 2 * (50 + 52), 0.08),
        (Kivi(4), 28 * 2 * 2 * (64 + 16), 0.01),
        (Kivi(2), 28 * 2 * 2 * (32 + 16), 0.2),
        (Kitty(), 28 * 2 * (36 + 5 + 36), 0.4),
    ],
    ids=lambda one: getattr(one, "name", None),
)
def test_bytes_and_errors(cache, token_bytes, worst):
    assert cache.token_bytes(SHAPE) == token_bytes
    key, value = random(1, 2, 256, 128), random(1, 2, 256, 128) * 3
    for whole, back in zip((key, value), cache.round(5, key, value), strict=True):
        error = float((back - whole).square().mean() / whole.square().mean())
        assert worst / 50 <= error <= worst if worst else error == 0


def test_turboquant_leaves_the_outer_layers():
    assert whole_layers(28) == [0, 1, 26, 27]
    assert [whole_layers(layers) for layers in (1, 3)] == [[], [0, 2]]
    named = {cache.name: cache for cache in vllm_caches(28)}
    assert list(named)[2:4] == [
        "vLLM fp8, 4 layers whole", "vLLM int4_per_token_head, 4 layers whole"
    ]  # fmt: skip
    cache = named["vLLM turboquant_3bit_nc"]
    key, value = random(1, 2, 32, 128), random(1, 2, 32, 128)
    for layer in range(28):
        is_same = torch.equal(cache.round(layer, key, value)[0], key)
        assert is_same == (layer in (0, 1, 26, 27))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int4_is_what_vllm_stores(dtype):
    from vllm.v1.attention.ops import int4_per_token_head as ops

    tokens, heads, width = 48, 2, 128
    scale = random(width).abs().cuda() * 3
    key = ((random(tokens, heads, width).cuda() + 1) * scale).to(dtype)
    value = random(tokens, heads, width).cuda().to(dtype)
    caches = [torch.zeros(3, 16, heads, width // 2, dtype=torch.uint8).cuda() for _ in range(2)]
    steps = [torch.zeros(3, 16, heads).cuda() for _ in range(2)]
    ops.reshape_and_cache_int4(
        key,
        value,
        *caches,
        torch.arange(tokens).cuda(),
        k_scale_cache=steps[0],
        v_scale_cache=steps[1],
    )
    rounded = VllmInt4().round(0, key.transpose(0, 1)[None], value.transpose(0, 1)[None])
    for found, cache, step in zip(rounded, caches, steps, strict=True):
        packed, bits = cache.flatten(0, 1), step.flatten(0, 1).view(torch.int32)[..., None]
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float()
        stored = (codes - (bits & 15)) * (bits & -16).view(torch.float32)
        expected = ops.single_rht(stored, inverse=True) / width
        # A code may fall to the other side where products are fused.
        close = torch.isclose(found[0].transpose(0, 1), expected, atol=1e-3, rtol=1e-2)
        assert close.float().mean() > 0.98
