"""Adding an archive format is adding a file: this one adds a toy, and no other file knows of it.

The toy has whole numbers of a byte, whatever the values are. It comes before all others.
"""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import triton
import triton.language as tl
from archive_definition import plan_of
from cache_builder import CacheBuilder, relative_rms
from engines import engine
from format_samples import head_for
from mask_samples import random_mask
from oracle import Oracle
from prometheus_client import REGISTRY
from test_engine_answers import KEPT, SINK, all_logprobs, prompts_of
from test_kernels import KERNELS, serve
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm_leank.kernels import fold_columns, fold_rows, reference, whole_store
from vllm_leank.kernels.channels import HeadChannels
from vllm_leank.kernels.codecs import codec_of
from vllm_leank.kernels.codecs.codec import Codec, Stored
from vllm_leank.kernels.codecs.tiles import Tiles

from vllm_leank.core import formats
from vllm_leank.core.formats import NATIVE
from vllm_leank.core.formats.whole import WholeChannels
from vllm_leank.core.window import Window
from vllm_leank.mask.settings import choose_format
from vllm_leank.serving.report import report
from vllm_leank.serving.settings import load_settings


@dataclass(frozen=True)
class Toy(WholeChannels):
    """A byte for each number."""

    name: ClassVar[str] = "toy"
    archive: ClassVar[str] = "toy archive"
    codec: ClassVar[str] = f"{__name__}:ToyCodec"

    def itemsize(self, model: int) -> int:
        return 1


@triton.jit
def encode_tile(x):
    """Whole numbers."""
    return tl.clamp(tl.floor(x.to(tl.float32) + 0.5), -128.0, 127.0)


class ToyCodec(Codec):
    """Rounds to the nearest whole number."""

    tiles = Tiles(
        fold_columns.fold_archive, fold_rows.fold_archive, whole_store.compact, encode_tile
    )

    def dtype(self, model: torch.dtype) -> torch.dtype:
        return torch.int8

    def encode(self, key: torch.Tensor, value: torch.Tensor, head: HeadChannels) -> Stored:
        stored = (
            (part.float() + 0.5).floor().clamp(-128, 127).to(torch.int8)
            for part in (key[..., head.k.stored], value)
        )
        return Stored(*stored, side=key.new_empty((len(key), 0), dtype=torch.uint8))

    def decode(self, stored: Stored, head: HeadChannels) -> tuple[torch.Tensor, torch.Tensor]:
        return stored.key.float(), stored.value.float()


@pytest.fixture
def toy(monkeypatch):
    """The toy format, known until the test ends."""
    one = Toy()
    monkeypatch.setattr(formats, "_FORMATS", {one.name: one, **formats._FORMATS})
    return one


def test_masks_and_plans_know_it(toy, tiny_llama_dir):
    assert choose_format(random_mask(tiny_llama_dir, KEPT)) == toy
    # 48 + 128 numbers of a byte.
    assert plan_of([[48, 0]], 128, 2, archive_format=toy).archive_token_bytes == 176


def test_it_is_unknown_without_its_file(tiny_llama_dir):
    assert choose_format(random_mask(tiny_llama_dir, KEPT)) == NATIVE


def test_leank_plan_counts_its_bytes(toy, leank, repo):
    arguments = ("--kv-cache-memory", "1GiB", "--max-model-len", 8256)
    code, out, _ = leank("plan", "--model", repo / "benchmarks/recall/model", *arguments, "--json")
    assert code == 0
    engines = {one["name"]: one for one in json.loads(out)["engines"]}
    assert engines["leank"]["far_token_bytes"] == 1216


@pytest.mark.parametrize(
    ("kernels", "dtype", "tolerance"),
    [
        (reference, torch.float32, 1e-6),
        (KERNELS, torch.float16, 4e-4),
    ],
    ids=["reference", "triton"],
)
@pytest.mark.usefixtures("few_programs")
def test_kernels_read_what_they_wrote(toy, kernels, dtype, tolerance):
    builder = CacheBuilder((48, 0, 128), 128, 2, Window(32, 64), 64, dtype, toy)
    for step in serve(builder):
        output = builder.run(step, kernels)
        assert relative_rms(output, step.expected) < tolerance


@pytest.mark.engine
@pytest.mark.parametrize("prefill", ["exact", pytest.param("pruned", marks=pytest.mark.long)])
def test_an_engine_serves_it(toy, tiny_llama_dir, prefill):
    """The logits are those of the definition; the log and the metrics say what serves."""
    mask = random_mask(tiny_llama_dir, KEPT)
    (prompt,) = prompts_of([500])
    with engine(tiny_llama_dir, mask, prefill=prefill, max_logprobs=512) as leank:
        leank.memory.fill_(torch.nan)
        tokens, logprobs, _ = all_logprobs(leank.llm, prompt, 100)
        config, window = leank.llm.llm_engine.vllm_config, leank.window
        settings = load_settings(config)
        labels = info_labels(config)

    assert settings.plan.archive_format == toy
    assert any("toy archive pages of" in line for line in report(settings, 1000, 8192))
    assert labels["archive_format"] == "toy"

    def error(archive_format):
        oracle = Oracle(
            tiny_llama_dir, mask.keep, SINK, window.recent, archive_format=archive_format
        )
        logits = oracle.logits(prompt + tokens[:-1], window.exact_until(len(prompt)))
        expected = logits.log_softmax(-1)[len(prompt) - 1 :]
        return (logprobs - expected).square().mean().sqrt()

    # Sums in another order may round a number to the other neighbour; that is all.
    assert error(toy) < 1e-3
    assert error(NATIVE) > 5 * error(toy)


def info_labels(config):
    """Labels of the metric that says what serves."""
    PrometheusStatLogger(config).log_engine_initialized()
    found = [
        sample.labels
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:leank_mask_info"
    ]
    unregister_vllm_metrics()
    return found[0]


def test_its_rounding_by_hand(toy):
    given = torch.tensor([[0.4, 0.6, -1.7, 1.0, 130.0, -130.0]])
    rounded, _ = codec_of(toy).round(given, given, head_for(toy, 6, 6))
    assert rounded.tolist() == [[0, 1, -2, 1, 127, -128]]


def test_fp8_is_what_vllm_calls_its_own_cache(repo):
    """Where plans and benchmarks compare with it, and in vLLM's flags; no format is left that knows
    the word.
    """
    folders = ("vllm_leank", "kernels", "masks", "benchmarks", ".ci")
    files = [path for folder in folders for path in (repo / folder).rglob("*") if path.is_file()]
    files += [path for path in repo.iterdir() if path.is_file()]
    known = set()
    for path in files:
        name = path.relative_to(repo).as_posix()
        # Numbers of masks are letters, too.
        prose = path.suffix in (".md", ".yaml") or path.name in ("LICENSE", ".git")
        if prose or name.startswith(("benchmarks/results/", "benchmarks/baselines/")):
            continue
        if b"fp8" in path.read_bytes().lower() and path.suffix != ".pyc":
            known.add(name)
    assert known == {
        "benchmarks/real/caches.py",
        "benchmarks/reproduce.sh",
        "vllm_leank/core/capacity.py",
        "vllm_leank/serving/flags.py",
    }
