"""Configs and tokenizers that are not what they should be end in a sentence, and soon."""

import json
import shutil
import subprocess
import sys

import pytest

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.needles import fit

CHANGES = {
    "many layers": {"num_hidden_layers": 10**9},
    "no number that is": {"num_hidden_layers": 10**20},
    "fewer than none": {"num_hidden_layers": -1},
    "half a layer": {"num_hidden_layers": 2.5},
    "text for a number": {"head_dim": "x"},
    "a number as text": {"num_key_value_heads": "2"},
    "text for a mapping": {"rope_parameters": "abc"},
    "a number for a list": {"layer_types": 5},
    "a number for names": {"architectures": 5},
    "a number for a config": {"text_config": 5},
    "a list for a name": {"model_type": [1]},
}


@pytest.fixture
def changed(tiny_llama_dir, tmp_path):
    """The folder of a model whose config is changed, or replaced by a text."""
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "model")

    def change(what):
        file = folder / "config.json"
        if not isinstance(what, str):
            what = json.dumps(json.loads(file.read_text()) | what)
        file.write_text(what)
        return str(folder)

    return change


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_configs(changed, change):
    with pytest.raises(UserError):
        Checkpoint.open(changed(change))


def test_a_config_without_end(changed):
    with pytest.raises(UserError):
        Checkpoint.open(changed("[" * 200_000))


def test_a_config_that_is_right_needs_no_hub(tiny_llama_dir):
    """What says what is wrong takes a tenth of a second, and is imported when something is."""
    code = (
        "import sys; from vllm_leank.mask.checkpoint import Checkpoint\n"
        f"Checkpoint.open({str(tiny_llama_dir)!r})\n"
        "print({'huggingface_hub', 'transformers', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_overrides(tiny_llama_dir):
    path = str(tiny_llama_dir)
    with pytest.raises(UserError, match="num_hidden_layers"):
        Checkpoint.open(path, overrides={"num_hidden_layers": "x"})
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    with pytest.raises(UserError, match="replaces the model's rope_theta by nothing"):
        Checkpoint.open(path, overrides={"rope_parameters": yarn})
    named = {"rope_parameters": yarn | {"rope_theta": 1e6}}
    assert Checkpoint.open(path, overrides=named).geometry.rope_theta == 1e6


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_slides_only_where_its_config_says_so(tmp_path, kind):
    """All of them have a `sliding_window`; what transformers makes of it decides."""
    import transformers

    shape = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 99,
    }  # fmt: skip
    config = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind](**shape)
    file = tmp_path / "config.json"
    told = json.loads(config.to_json_string(use_diff=False)) | {"sliding_window": 4096}
    told = {name: told[name] for name in told if name not in ("use_sliding_window", "layer_types")}
    file.write_text(json.dumps(told))
    assert Checkpoint.open(str(tmp_path)).geometry.layers == (0, 1)


def test_texts_that_grow_without_tokens():
    with pytest.raises(UserError, match="longer ones have no more tokens"):
        fit(lambda size: "x" * size, lambda made: 1, 500)


def test_a_tokenizer_that_raises_is_one_sentence(tiny_llama_dir, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    words = Tokenizer(models.WordLevel({"a": 0}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(folder)
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(UserError, match="its tokenizer cannot read a text"):
        checkpoint.encode("b")
    with pytest.raises(UserError, match="its chat template takes no question: no"):
        checkpoint.encode_question("a")
