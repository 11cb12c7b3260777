"""What leank makes of the generation architectures that vLLM 0.32 knows: `docs/models.md`.

`python tests/architectures.py` writes the page. Run it when vLLM knows another architecture, after
looking at what kind of attention that has.
"""

from pathlib import Path

from vllm.model_executor.models import registry

VLLM = "0.32"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"

TESTED = {
    "LlamaForCausalLM": ("all layers", "most engine tests; real models on GPUs"),
    "Qwen2ForCausalLM": ("all layers", "real models on GPUs"),
    "Gemma3ForCausalLM": ("full attention, on CPU", "`tests/test_engine_sliding.py`"),
    "Cohere2ForCausalLM": ("full attention, on CPU", "`tests/test_engine_sliding.py`"),
    "MistralForCausalLM": ("full attention, on CPU", "`tests/test_engine_sliding.py`"),
    "Exaone4ForCausalLM": ("full attention, on CPU", "`tests/test_engine_sliding.py`"),
}
"""Layers that are served, and where that is tested."""

REFUSED = {
    "multi-head latent attention (MLA)": (
        "AXK1 DeepseekV2 DeepseekV3 DeepseekV32 DeepseekV4 Glm4MoeLite GlmMoeDsa LongcatFlash "
        "LongcatFlashNgram MistralLarge3 PanguUltraMoE SarvamMLA"
    ),
    "state-space or linear-attention layers beside full attention": (
        "BailingMoeV2_5 BailingMoeV3 FalconH1 GraniteMoeHybrid Jamba KimiLinear Lfm2 Lfm2Moe "
        "NemotronH NemotronHPuzzle OlmoHybrid Qwen3Next Qwen3_5 Qwen3_5Moe Qwen4Exp Zamba2"
    ),
    "no full attention": "FalconMamba Mamba Mamba2",
    "attention sinks as parameters": "GptOss",
    "ALiBi": "Bloom Step1",
    "a logits soft cap": "Gemma2 VaultGemma",
    "layers that share their K and V": "Gemma3n Gemma4",
    "chunked attention": "Llama4",
}
"""Why, and names without `ForCausalLM`."""

NOT_LOOKED_AT = (
    "Glm5Next HYV4 MiniMaxM3Sparse Inkling HrmText MuseGlimmer Laguna Rnj1 MiMoV2 MiMoV2Flash "
    "GraniteSWA GraniteMoeSWA PanguProMoEV2"
)
"""The same; their layers are checked one by one when the model is loaded."""


_TEXT = """# Models

What leank makes of the architectures that vLLM {vllm} knows, written by `tests/architectures.py`.
What counts is a model's config, which may differ from others of its architecture:
`leank doctor -- vllm serve MODEL ...` tells what would be served, or every reason not to.

## Tested

Against plain vLLM with a mask that keeps all, and against the definition with one that does not. Of
models with sliding layers those with full attention are served, on CPU only: on a GPU that was
never tried, and is refused.

| architecture | layers served | tested in |
|---|---|---|
{tested}

## Taken

Every layer with full attention is served, and sliding layers beside them stay vLLM's. What leank
cannot do (ALiBi, soft caps, sinks, shared K and V, other heads than the config says) ends startup,
here too. No test runs them.

{taken}

## Refused

| why | architectures |
|---|---|
{refused}

## Not looked at

Their attention is special, or their code is new. A layer that asks for more than leank can do ends
startup.

{special}

## Multimodal

The text part is checked like a text model, and prompts of text alone are served where that is;
others have not been tried. Models that read images with bidirectional attention, such as Gemma 3,
need `--language-model-only`.

{multimodal}
"""


def full_name(short: str) -> str:
    """A name of vLLM's registry."""
    return f"{short}ForCausalLM"


def names() -> tuple[list[str], list[str]]:
    """Architectures of text models and of multimodal ones that generate text."""
    through_transformers = {
        name for name, (_, kind) in registry._TRANSFORMERS_SUPPORTED_MODELS.items()
        if "MultiModal" not in kind
    }  # fmt: skip
    text = set(registry._TEXT_GENERATION_MODELS) | through_transformers
    other = set(registry._TRANSFORMERS_SUPPORTED_MODELS) - through_transformers
    return sorted(text), sorted(other | set(registry._MULTIMODAL_MODELS))


def page() -> str:
    """The page's text."""
    text, multimodal = names()
    refused = {full_name(one): why for why, some in REFUSED.items() for one in some.split()}
    special = {full_name(one) for one in NOT_LOOKED_AT.split()}
    named = refused.keys() | special | TESTED.keys()
    assert named <= set(text), f"vLLM does not know {sorted(named - set(text))}"
    tested = [f"| `{name}` | {layers} | {where} |" for name, (layers, where) in TESTED.items()]
    reasons = [
        f"| {why} | {_list(map(full_name, some.split()))} |" for why, some in REFUSED.items()
    ]
    return _TEXT.format(
        vllm=VLLM,
        tested="\n".join(tested),
        taken=_list(one for one in text if one not in named),
        refused="\n".join(reasons),
        special=_list(sorted(special)),
        multimodal=_list(multimodal),
    )


def _list(some) -> str:
    return ", ".join(f"`{name}`" for name in some)


if __name__ == "__main__":
    PAGE.write_text(page())
