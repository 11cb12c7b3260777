"""The gauges that leank adds to vLLM's metrics."""

import pytest
from mask_samples import random_mask
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_leank.mask.file import save_mask
from vllm_leank.serving.settings import load_settings

load_general_plugins()


@pytest.fixture
def publish(tiny_llama_dir, tmp_path):
    """Give a function that starts vLLM's metrics for a server with engines of 1,000 blocks."""
    mask = random_mask(tiny_llama_dir, [32, 0])
    save_mask(mask, tmp_path / "mask.yaml")

    def start(backend="leank", engines=1, **options):
        given = {"leank": {"mask": str(tmp_path / "mask.yaml"), **options}}
        config = EngineArgs(
            model=str(tiny_llama_dir),
            served_model_name="tiny",
            attention_backend=backend,
            additional_config=given if backend else {},
            skip_tokenizer_init=True,
            max_model_len=8192,
        ).create_engine_config()
        # As vLLM's client of several engines sets it: to the blocks of all.
        config.cache_config.num_gpu_blocks = 1000 * engines
        PrometheusStatLogger(config, list(range(engines))).log_engine_initialized()
        return config

    yield start
    unregister_vllm_metrics()


def samples():
    return [
        sample
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith("vllm:leank_")
    ]


def value(name, **labels):
    return REGISTRY.get_sample_value(f"vllm:leank_{name}", {"model_name": "tiny", **labels})


def test_settings_are_a_few_words_in_vllms_own_metric(publish):
    """vLLM makes a label of everything that its cache config has, a whole mask too."""
    settings = load_settings(publish())
    (label,) = [
        sample.labels["_leank_settings"]
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:cache_config_info"
    ]
    assert label == f"mask of tests/tiny, sha256 {settings.mask.sha256[:12]}"


def test_gauges_of_a_server(publish):
    settings = load_settings(publish())
    plan, window = settings.plan, settings.window
    (info,) = [sample for sample in samples() if sample.name == "vllm:leank_mask_info"]
    assert info.value == 1
    assert info.labels == {
        "model_name": "tiny",
        "mask": "tests/tiny",
        "sha256": settings.mask.sha256,
        "method": "random",
        "k_kept": "0.2500",
        "v_kept": "0.5000",
        "sink": "64",
        "recent": "256",
        "archive_format": "auto",
        "prefill": "exact",
    }
    assert value("cache_bytes", engine="0") == 1000 * plan.block_bytes
    assert value("far_token_bytes", cache="leank") == plan.archive_token_bytes
    assert value("far_token_bytes", cache="dense") == plan.dense_token_bytes
    for phase, blocks in [
        ("decode", plan.blocks_in_decode(window, 8192)),
        ("prefill", plan.blocks_in_prefill(window, 8192)),
    ]:
        assert value("request_capacity", cache="leank", phase=phase, engine="0") == 1000 / blocks
    # One prompt that is computed, and all others decode.
    first, each = plan.blocks_in_prefill(window, 8192), plan.blocks_in_decode(window, 8192)
    both = value("request_capacity", cache="leank", phase="both", engine="0")
    assert both == pytest.approx(1 + (1000 - first) / each)
    assert value("request_capacity", cache="dense", phase="decode", engine="0") > 0


def test_each_data_parallel_engine_has_its_own_cache(publish):
    """What one engine has, not the sum of all, as vLLM's config says it."""
    settings = load_settings(publish(engines=2))
    blocks = settings.plan.blocks_in_decode(settings.window, 8192)
    for engine in "01":
        assert value("cache_bytes", engine=engine) == 1000 * settings.plan.block_bytes
        fit = value("request_capacity", cache="leank", phase="decode", engine=engine)
        assert fit == 1000 / blocks


def test_a_second_server_replaces_the_gauges_of_the_first(publish):
    publish()
    first = len(samples())
    publish(prefill="pruned")
    assert len(samples()) == first
    (info,) = [sample for sample in samples() if sample.name == "vllm:leank_mask_info"]
    assert info.labels["prefill"] == "pruned"


def test_plain_vllm_has_no_such_gauges(publish):
    publish()
    publish(backend=None)
    assert samples() == []
