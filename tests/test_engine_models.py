"""Models of today that leank serves whole: plain vLLM and the oracle agree."""

import pytest
from test_engine_answers import long_but
from test_engine_sliding import assert_served
from tiny_models import MODELS, class_kept, load_tiny, save_tiny, skip_without_torchvision

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("model_type", long_but(MODELS, "paddleocr_vl"))
def test_architectures(model_type, tmp_path):
    """Experts, layers without RoPE beside others, and text for a model that sees images, whose
    positions have three numbers.
    """
    skip_without_torchvision(model_type)
    model = save_tiny(model_type, tmp_path)
    text_alone = {"language_model_only": True} if "text_config" in MODELS[model_type] else {}
    loaded = load_tiny(model)
    with class_kept(loaded):
        assert_served(model, loaded, **text_alone)
