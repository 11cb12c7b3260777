"""What vLLM can do beside attention, with leank: answers as by plain vLLM, or a refusal."""

import json
import shutil

import pytest
import torch
from engines import engine
from mask_samples import full_mask, random_mask
from recall.demo import MODEL
from recall.tasks import make_sample
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from vllm_leank.mask.file import save_mask

pytestmark = pytest.mark.engine

LIMITS = {"max_model_len": 700, "max_num_seqs": 8, "max_num_batched_tokens": 256}
PROMPTS = [make_sample("multikey", n, n).prompt_token_ids for n in (60, 200, 420)]


def assert_as_plain(answers, path, model=MODEL, **arguments):
    """`answers(running)` is the same with a full mask as without leank; gives it."""
    save_mask(full_mask(MODEL), path / "full.yaml")
    with engine(model, **LIMITS | arguments) as plain:
        expected = answers(plain)
    with engine(model, path / "full.yaml", **LIMITS | arguments) as leank:
        assert answers(leank) == expected
    return expected


def generate(running, prompts=None, lora=None, **params):
    """Greedy tokens: 50 are at least one compaction."""
    params = {"max_tokens": 50, "temperature": 0, "ignore_eos": True} | params
    prompts = prompts or [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = running.llm.generate(
        prompts, SamplingParams(**params), lora_request=lora, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def save_adapter(path):
    """A random LoRA adapter of all attention projections, strong enough to change answers."""
    config = json.loads((MODEL / "config.json").read_text())
    hidden, size = config["hidden_size"], config["head_dim"]
    query, kv = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    shapes = {"q_proj": (query, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            tensors[prefix + "A.weight"] = torch.randn(8, columns, generator=draw) / columns**0.5
            tensors[prefix + "B.weight"] = torch.randn(rows, 8, generator=draw) / 2
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(shapes)}
    (path / "adapter_config.json").write_text(json.dumps(adapter))


def test_lora_adapters(tmp_path):
    save_adapter(tmp_path / "adapter")
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    without, with_adapter = assert_as_plain(
        lambda running: [generate(running), generate(running, lora=adapter)],
        tmp_path,
        enable_lora=True,
        max_lora_rank=8,
    )
    assert without != with_adapter


def test_quantised_weights(tmp_path, monkeypatch):
    """Weights and activations in 8-bit integers, as compressed-tensors stores them."""
    # Where the CPU has AMX, vLLM takes a kernel for these that refuses activations in fp32.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors |= {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}
    save_file(tensors, file, metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": "channel", "dynamic": False},
                "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            }
        },
    }
    (model / "config.json").write_text(json.dumps(config))
    assert_as_plain(generate, tmp_path, model)


def test_prompts_as_embeddings(tmp_path):
    (weights,) = MODEL.glob("*.safetensors")
    table = load_file(weights)["model.embed_tokens.weight"].float()
    embedded = [{"prompt_embeds": table[torch.tensor(prompt)]} for prompt in PROMPTS]
    assert_as_plain(
        lambda running: generate(running, embedded), tmp_path, enable_prompt_embeds=True
    )


def test_structured_outputs(tmp_path):
    words = StructuredOutputsParams(regex=r"( ?[a-z]{4}){60} \.")
    answers = assert_as_plain(
        lambda running: generate(running, structured_outputs=words, ignore_eos=False),
        tmp_path,
        skip_tokenizer_init=False,
    )
    assert all(len(answer) > 40 for answer in answers)


def test_salts_keep_prompts_apart_and_evicted_pages_are_not_found(tiny_llama_dir):
    """Salted prompts find pages of their own salt; what others have overwritten is computed."""
    mask = random_mask(tiny_llama_dir, [32, 0])
    prompts = [[7 * i % 512 for i in range(n, n + 300)] for n in range(2)]

    def hits(running, prompt, salt=None):
        salted = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)
        (output,) = running.llm.generate([salted], params, use_tqdm=False)
        return output.num_cached_tokens, list(output.outputs[0].token_ids)

    with engine(
        tiny_llama_dir, mask, enable_prefix_caching=True, max_model_len=512,
        num_gpu_blocks_override=26,
    ) as leank:  # fmt: skip
        cold, answer = hits(leank, prompts[0])
        warm, again = hits(leank, prompts[0])
        assert (cold, again) == (0, answer)
        assert warm >= 256
        assert hits(leank, prompts[0], "a") == (0, answer)
        assert hits(leank, prompts[0], "b") == (0, answer)
        assert hits(leank, prompts[0], "b") == (warm, answer)
        # The pool has room for one request of this length: others have taken the pages.
        _, other = hits(leank, prompts[1])
        assert hits(leank, prompts[0], "a") == (0, answer)
        assert hits(leank, prompts[1])[1] == other


def test_streaming_input_is_refused(tiny_llama_dir):
    """A prompt that goes on after its answer has begun."""
    with engine(tiny_llama_dir, random_mask(tiny_llama_dir, [32, 0])) as leank:
        process = leank.llm.llm_engine.input_processor.process_inputs
        prompt, params = {"prompt_token_ids": [5, 6, 7]}, SamplingParams(detokenize=False)
        assert process("whole", prompt, params, ("generate",)).prompt_token_ids == [5, 6, 7]
        with pytest.raises(
            VLLMValidationError, match="cannot serve streaming input: send the whole prompt"
        ):
            process("streamed", prompt, params, ("generate",), resumable=True)
