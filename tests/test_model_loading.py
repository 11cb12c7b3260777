"""Models that cannot be loaded, or not as a whole: refused in a line, before anything is made."""

import json
import shutil

import pytest


@pytest.fixture
def model(tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refusal(leank, model, tmp_path):
    def refused():
        data = tmp_path / "prompts.jsonl"
        data.write_text(json.dumps({"prompt_token_ids": list(range(400))}))
        asked = ["--bits", 2, "--sink", 32, "--recent", 32, "--data", data, "--device", "cpu"]
        code, _, err = leank("mask", "calibrate", model, *asked, "--out", tmp_path / "m.yaml")
        assert code == 2
        assert "Traceback" not in err
        assert not (tmp_path / "m.yaml").exists()
        return " ".join(err.split())

    return refused


def change(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_are_missing_are_not_drawn_by_chance(model, refusal):
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    change(model, num_hidden_layers=layers + 1)
    found = refusal()
    assert f"of its weights are missing, such as model.layers.{layers}." in found
    assert "fetch the model again" in found


def test_half_of_a_file_of_weights(model, refusal):
    (weights,) = model.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "its weights cannot be read" in refusal()


def test_weights_of_another_shape(model, refusal):
    hidden = json.loads((model / "config.json").read_text())["intermediate_size"]
    change(model, intermediate_size=2 * hidden)
    assert "are not of the shapes that its config says" in refusal()


def test_a_folder_without_a_config(model, refusal):
    (model / "config.json").unlink()
    assert "has no config.json, so it is no model" in refusal()
