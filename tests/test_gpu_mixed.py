"""Engines on a GPU with models in which only some layers have full attention: sliding windows,
attention sinks, and layers that keep states, which stay vLLM's, beside leank's pages.

Run each test in a process of its own, as those of `test_gpu_engine.py`; if several at once, with
caches of their own (`VLLM_CACHE_ROOT`, `TORCHINDUCTOR_CACHE_DIR`, `TRITON_CACHE_DIR`), or they find
each other's half-made graphs, and gpt-oss answers wrongly in plain vLLM, too.
"""

import numpy as np
import pytest
import torch
from archive_definition import PACKED
from engines import engine
from gpu_engines import (
    ON_GPU,
    RECENT,
    SINK,
    V1,
    V2,
    assert_same_up_to_ties,
    mean_error,
    runners,
)
from mask_samples import coded_mask, full_mask
from mixed_models import MODELS as MIXED
from mixed_models import save_mixed
from oracle import Oracle
from state_models import DELTA_NETS, FULL, STATE, save_state
from state_models import MODELS as WITH_STATES
from test_engine_answers import prompts_of
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

LIMITS = {
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 1 << 30,
}

PROMPTS = prompts_of([300, 33, 1100, 700, 1500])
"""Most are longer than the dense window and any sliding one, and are read in chunks."""

SHORT = prompts_of([21], seed=1)
"""With its answer, shorter than what archives begin with."""

TOKENS = 80


ALL_EXPERTS = {"num_experts_per_tok": 4}
"""Where two are as good, rounding would choose."""

WITH_EXPERTS = {"layers_block_type": [STATE, FULL, "mlp", STATE, "moe", FULL, STATE, STATE]}
"""vLLM's CPU build does not run those of Nemotron H."""

FIELDS = {
    "gpt_oss": ALL_EXPERTS,
    "qwen3_next": ALL_EXPERTS,
    "nemotron_h": ALL_EXPERTS | WITH_EXPERTS,
}

DELTA_NET_FLAGS = {"gdn_prefill_backend": "triton", "mamba_ssm_cache_dtype": "float32"}
"""FlashInfer would compile kernels first, and states in bf16 make most of the noise."""

DTYPES = {"qwen3_next": "float16"}
"""In bf16 FlashAttention's log-probabilities of this one are 0.07 nats off the model's in fp32, in
the mean: more than half of what a tie allows."""


def save_in_bf16(model_type, folder):
    """Save a tiny random model whose weights a GPU holds as they are."""
    if model_type in WITH_STATES:
        save_state(model_type, folder, **FIELDS.get(model_type, {}))
    else:
        save_mixed(model_type, folder, **MIXED[model_type] | FIELDS.get(model_type, {}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("runner", "model_type"),
    runners(
        (V2, "gemma3_text"),
        (V2, "gpt_oss"),
        (V2, "granitemoehybrid"),
        (V2, "lfm2"),
        (V2, "qwen3_next"),
        (V2, "qwen3_5_text"),
        (V2, "nemotron_h"),
        (V1, "gemma3_text"),
        (V1, "granitemoehybrid"),
        (V1, "qwen3_next"),
    ),
    indirect=["runner"],
)
def test_architectures(runner, model_type, tmp_path):
    """With all channels the answers are FlashAttention's, and as near the model in fp32. With
    random codes they are near the definition, and far from the model without them. Prefix hits,
    where they are served, change nothing. A request alone that is shorter than a sliding window is
    answered as the model does.
    """
    model = save_in_bf16(model_type, tmp_path)
    mask, cached = coded_mask(model), model_type not in WITH_STATES
    arguments = ON_GPU | LIMITS | (DELTA_NET_FLAGS if model_type in DELTA_NETS else {})
    arguments |= {"dtype": DTYPES.get(model_type, "bfloat16")}
    with engine(model, attention_backend="FLASH_ATTN", **arguments) as plain:
        flash = plain.generate(PROMPTS, TOKENS)
    arguments |= {"sink": SINK, "recent": RECENT, "enable_prefix_caching": cached}
    answers, short = [], []
    for one in (full_mask(model), mask):
        with engine(model, one, **arguments) as leank:
            short.append(leank.generate(SHORT, TOKENS))
            hits = leank.watch_hits()
            answers.append(leank.generate(PROMPTS, TOKENS))
            if cached:
                answers.append(leank.generate(PROMPTS, TOKENS))
                assert any(hits)
    half = len(answers) // 2
    dense = Oracle(model, np.ones_like(mask.keep), SINK, RECENT)
    packed = Oracle(model, mask, SINK, RECENT, archive_format=PACKED)
    noise = mean_error(flash, PROMPTS, dense)
    assert all(mean_error(given, SHORT, dense) < 2 * noise for given in short)
    for given in answers[:half]:
        assert_same_up_to_ties(flash, given)
        assert mean_error(given, PROMPTS, dense) < 1.5 * noise
    for given in answers[half:]:
        # A number at the edge of two codes may take the other one in bf16.
        error = mean_error(given, PROMPTS, packed)
        assert error < 2 * noise
        # It matters what the archive keeps, in models with much noise as well.
        assert mean_error(given, PROMPTS, dense) > 2 * error
