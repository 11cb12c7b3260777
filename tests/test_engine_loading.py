"""How vLLM loads weights, and tells layers of it: in other ways than by default, and in processes
that it spawns.
"""

import os
import subprocess
import sys

import pytest
import torch
from engines import engine
from mask_samples import random_mask
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import base_loader

from vllm_leank.serving.impl import LeanKImpl

pytestmark = pytest.mark.engine

PROMPT = [[7 + i % 50 for i in range(300)]]


def test_buffers_that_another_process_exported(tiny_llama_dir, monkeypatch):
    """`--load-format ipc_cache` gives layers all buffers of a preloaded model before it tells them
    of weights: they ask for pages all the same, and free the middle of a prompt.
    """
    mask = random_mask(tiny_llama_dir, [32, 0])
    with engine(tiny_llama_dir, mask) as leank:
        expected = leank.generate(PROMPT, 20)
    told = base_loader.process_weights_after_loading

    def with_buffers(model, *rest):
        for layer in model.modules():
            if type(layer) is Attention:
                layer.register_buffer("leank_channels", torch.zeros(2), persistent=False)
        told(model, *rest)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", with_buffers)
    with engine(tiny_llama_dir, mask, enable_prefix_caching=True) as leank:
        assert leank.generate(PROMPT, 20) == expected


def test_layers_that_are_not_told_of_weights_are_not_served(tiny_llama_dir, monkeypatch):
    """As with `--load-format tensorizer`, which is refused before."""
    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *_: None)
    with (
        pytest.raises(ValueError, match="with --load-format auto vLLM does not tell"),
        engine(tiny_llama_dir, random_mask(tiny_llama_dir, [32, 0])),
    ):
        pass


def test_models_that_bring_no_keys_are_refused():
    """While vLLM profiles memory, so at startup."""
    nothing = [None] * 5
    with pytest.raises(ValueError, match="layers read K and V that others stored"):
        LeanKImpl.forward(None, None, torch.zeros(1), *nothing)


def test_a_spawned_process_plans_states_as_leank_needs_them():
    """It meets leank when it unpickles a spec: nothing has checked the config there."""
    code = (
        "import vllm_leank.serving.scheduler\n"
        "try:\n from vllm.v1.core import kv_cache_planning as planner\n"
        "except ImportError:\n from vllm.v1.core import kv_cache_utils as planner\n"
        "assert planner._leank_hooked"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=os.environ)
