"""What leank makes of the generation architectures that vLLM 0.32 knows: `docs/models.md`, and a
table in the README.

`python tests/architectures.py` writes both. Run it when vLLM knows another architecture, after
looking at what kind of attention that has.
"""

import textwrap
from pathlib import Path

from vllm.model_executor.models import registry

VLLM = "0.32"
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
README = ROOT / "README.md"

ALL = "all layers"
FULL = "full attention"
TEXT = "all layers, for text alone"

ENGINE = "`tests/test_engine_sliding.py`"
STATES_ENGINE = "`tests/test_engine_states.py`"
WHOLE_ENGINE = "`tests/test_engine_models.py`"

NEEDS_TORCHVISION = ", where torchvision is installed"

TESTED = {
    "LlamaForCausalLM": ("Llama 3.1, 3.2, 3.3", ALL, "most engine tests; real models on GPUs"),
    "Qwen2ForCausalLM": ("Qwen 2, 2.5", ALL, "real models on GPUs"),
    "Gemma3ForCausalLM": ("Gemma 3", FULL, ENGINE + "; the real 270M"),
    "Cohere2ForCausalLM": ("Command R7B, Command A", FULL, ENGINE),
    "MistralForCausalLM": ("Mistral, Ministral", FULL, ENGINE),
    "Exaone4ForCausalLM": ("EXAONE 4", FULL, ENGINE),
    "GptOssForCausalLM": ("gpt-oss", FULL, ENGINE),
    "GraniteSWAForCausalLM": ("Granite Swash", FULL, ENGINE),
    "GraniteMoeHybridForCausalLM": ("Granite 4 H", FULL, STATES_ENGINE),
    "FalconH1ForCausalLM": ("Falcon-H1", "attention", STATES_ENGINE),
    "Lfm2ForCausalLM": ("LFM2", FULL, STATES_ENGINE),
    "Lfm2MoeForCausalLM": ("LFM2 MoE", FULL, STATES_ENGINE),
    "NemotronHForCausalLM": ("Nemotron Nano 2, Nemotron 3", FULL, STATES_ENGINE),
    "Qwen3NextForCausalLM": ("Qwen3-Next", FULL, STATES_ENGINE),
    "Qwen3_5ForCausalLM": ("Qwen 3.5", FULL, STATES_ENGINE + NEEDS_TORCHVISION),
    "Qwen3_5MoeForCausalLM": ("Qwen 3.5 MoE", FULL, STATES_ENGINE + NEEDS_TORCHVISION),
    "Qwen3MoeForCausalLM": ("Qwen 3 30B-A3B, 235B-A22B", ALL, WHOLE_ENGINE),
    "SmolLM3ForCausalLM": ("SmolLM3", ALL, WHOLE_ENGINE),
    "PaddleOCRVLForConditionalGeneration": ("PaddleOCR-VL", TEXT, WHOLE_ENGINE),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen 2.5 VL", TEXT, WHOLE_ENGINE + NEEDS_TORCHVISION),
}
"""Models that have it, layers that are served, and where that is tested."""

EXAMPLES = {
    "ApertusForCausalLM": "Apertus",
    "ArceeForCausalLM": "AFM 4.5B",
    "CohereForCausalLM": "Command R",
    "Ernie4_5ForCausalLM": "ERNIE 4.5",
    "GlmForCausalLM": "GLM 4 9B",
    "Glm4ForCausalLM": "GLM 4 32B",
    "Glm4MoeForCausalLM": "GLM 4.5, 4.6",
    "GraniteForCausalLM": "Granite 3",
    "Olmo2ForCausalLM": "OLMo 2",
    "Olmo3ForCausalLM": "OLMo 3",
    "OlmoeForCausalLM": "OLMoE",
    "Phi3ForCausalLM": "Phi 3, Phi 4",
    "Qwen3ForCausalLM": "Qwen 3",
    "MixtralForCausalLM": "Mixtral",
    "SeedOssForCausalLM": "Seed-OSS",
}
"""Models that have one that is taken, though no test runs it."""

MASKS_FROM_ELSEWHERE = (
    "BailingMoeForCausalLM",
    "BailingMoeV2ForCausalLM",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "DeciLMForCausalLM",
    "DeepseekForCausalLM",
    "ExaoneForCausalLM",
    "ExaoneMoEForCausalLM",
    "HCXVisionV2ForCausalLM",
    "IQuestCoderForCausalLM",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "K2HorizonForCausalLM",
    "MiMoForCausalLM",
    "MiniCPMForCausalLM",
    "NanbeigeForCausalLM",
    "OrionForCausalLM",
    "PanguEmbeddedForCausalLM",
    "Param2MoEForCausalLM",
    "Plamo3ForCausalLM",
    "SarvamMoEForCausalLM",
    "SolarForCausalLM",
    "Step3TextForCausalLM",
    "Step3p5ForCausalLM",
    "TeleChat2ForCausalLM",
    "TeleChat3ForCausalLM",
    "TeleFLMForCausalLM",
)
"""Of those that are taken, what transformers has no code for."""

LATENT = "multi-head latent attention (MLA)"
HYBRID = "other state-space or linear-attention layers beside full attention"
NO_FULL = "no full attention"
ALIBI = "ALiBi"
SOFT_CAP = "a logits soft cap"
SHARED = "layers that share their K and V"
CHUNKED = "chunked attention"
HEAD_SIZES = "heads of 512 channels in layers with full attention, and of fewer in others"
VALUES = "heads with more channels of K than of V"
PREFIX = "prompts that are read both ways (prefix LM)"
RELATIVE = "layers of kinds of their own"

SAID_OF = {
    LATENT: "multi-head latent attention (MLA) is not supported",
    HYBRID: "state-space and linear-attention layers are not supported",
    NO_FULL: "state-space and linear-attention layers are not supported",
    ALIBI: "ALiBi is not supported",
    SOFT_CAP: "a logits soft cap is not supported",
    SHARED: "layers that share their K and V are not supported",
    CHUNKED: "layers with chunked_attention are not supported",
    HEAD_SIZES: "heads of 256 in sliding layers and 512 in full layers are not supported",
    VALUES: "heads with 192 channels of K and 128 of V are not supported",
    PREFIX: "prompts that are read both ways (prefix LM) are not supported",
    RELATIVE: "layers with hybrid, hybrid_sliding are not supported",
}
"""What refusals say."""

REFUSED = {
    "AXK1ForCausalLM": LATENT,
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "DeepseekV32ForCausalLM": LATENT,
    "DeepseekV4ForCausalLM": LATENT,
    "Glm4MoeLiteForCausalLM": LATENT,
    "GlmMoeDsaForCausalLM": LATENT,
    "LongcatFlashForCausalLM": LATENT,
    "LongcatFlashNgramForCausalLM": LATENT,
    "MistralLarge3ForCausalLM": LATENT,
    "HYV4ForCausalLM": LATENT,
    "KimiLinearForCausalLM": LATENT,
    "MiniCPM3ForCausalLM": LATENT,
    "PanguUltraMoEForCausalLM": LATENT,
    "SarvamMLAForCausalLM": LATENT,
    "BailingMoeV2_5ForCausalLM": HYBRID,
    "BailingMoeV3ForCausalLM": HYBRID,
    "JambaForCausalLM": HYBRID,
    "NemotronHPuzzleForCausalLM": HYBRID,
    "OlmoHybridForCausalLM": HYBRID,
    "Qwen4ExpForCausalLM": HYBRID,
    "Zamba2ForCausalLM": HYBRID,
    "FalconMambaForCausalLM": NO_FULL,
    "MambaForCausalLM": NO_FULL,
    "Mamba2ForCausalLM": NO_FULL,
    "BloomForCausalLM": ALIBI,
    "Step1ForCausalLM": ALIBI,
    "Gemma2ForCausalLM": SOFT_CAP,
    "VaultGemmaForCausalLM": SOFT_CAP,
    "Gemma3nForCausalLM": SHARED,
    "IQuestLoopCoderForCausalLM": SHARED,
    "Gemma4ForCausalLM": HEAD_SIZES,
    "Llama4ForCausalLM": CHUNKED,
    "MiMoV2FlashForCausalLM": VALUES,
    "MiMoV2ForCausalLM": VALUES,
    "HrmTextForCausalLM": PREFIX,
    "InklingForCausalLM": RELATIVE,
}
"""Why."""

NOT_LOOKED_AT = (
    "Glm5NextForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "InklingForConditionalGeneration",
    "LagunaForCausalLM",
    "MiniMaxM3SparseForCausalLM",
    "MuseGlimmerForCausalLM",
    "PanguProMoEV2ForCausalLM",
    "Rnj1ForCausalLM",
)
"""Their layers are checked one by one when the model is loaded."""


_PAGE = """# Models

What leank makes of the architectures that vLLM {vllm} knows, written by `tests/architectures.py`.
What counts is a model's config, which may differ from others of its architecture:
`leank doctor -- vllm serve MODEL ...` tells what would be served, or every reason not to.

## Tested

Against plain vLLM with a mask that keeps all, and against the definition with one that does not:
engines of tiny models with random weights on CPU, real models on GPUs. Of models with sliding
layers, or with layers that keep states, those with full attention are served. Tiny ones of Gemma 3,
gpt-oss, Granite 4 H, LFM2, Qwen3-Next, Qwen 3.5 and Nemotron H run on a GPU as well
(`tests/test_gpu_mixed.py`), the others on CPU alone. Some layers of Cohere2, EXAONE 4 and SmolLM3
have no RoPE; masks know which these are.

vLLM's CPU kernels for gated delta nets (Qwen3-Next, Qwen 3.5) compute in bfloat16 alone; engines on
CPU are tested with the same computation in fp32 in their place (`tests/delta_nets_in_fp32.py`). The
code of Qwen 3.5, for text as well, needs torchvision. Nemotron H is tested without experts, which
vLLM's CPU build does not run (`is_act_and_mul=False`).

The CPU kernel for RoPE of vLLM 0.32 is wrong for LFM2, with leank or without. It is used with
`--enforce-eager`: leave that out, or give `-cc.custom_ops='["-rotary_embedding"]'` as well.

{tested}

## Taken

Every layer with full attention is served, and sliding layers beside them stay vLLM's. What leank
cannot do (ALiBi, soft caps, shared K and V, other heads than the config says) ends startup,
here too. No test runs them.

{taken}

Masks are made with transformers, so one for an architecture that it does not have must come from
elsewhere: {elsewhere}.

## Refused

At startup, by `leank doctor`, and by every command that makes or plans with masks, in the same
words; `tests/test_served_models.py` compares what they say of all architectures.

| why | architectures |
|---|---|
{refused}

Of those with layers that keep states, Jamba has Mamba's first version, for which vLLM's CPU build
has no kernels (`selective_scan_fwd`), and OLMo Hybrid gated delta nets of its own, which vLLM runs
in Triton alone, so that no test here could run them. Zamba2 runs one attention in several places,
so that its layers' names in vLLM have two numbers. Qwen 4's code in vLLM is for GPUs alone. The
others are in no version of transformers.

Models with states need `--no-enable-prefix-caching`; `leank serve` adds it, and says so, unless
the line has something about prefix caching. Why, and what a large state costs, is in
[architecture.md](architecture.md#models-in-which-only-some-layers-have-full-attention).

Soft caps and heads of 512 channels would be served if the kernels did it at half of their usual
speed at least, which has not been tried. Scores go through a softmax that starts from their plain
products (`kernels/fold_columns.py`, `kernels/fold_rows.py`): a cap is a tanh for each of them,
before the softmax, and in exact prompts as well. A tile of 512 channels takes twice the shared
memory and registers of one of 256, the most that kernels are compiled for
(`core/pages.py`, `MAX_HEAD_DIM`), and with heads of two sizes pages of a block differ in size.
Serve these models without `--attention-backend leank`.

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

_START, _END = "<!-- models: written by tests/architectures.py -->\n", "<!-- end of models -->\n"

_OTHERS = """{taken} more architectures are taken, though no test runs them: those of {examples} and
others. {refused} are refused, for {reasons}. [docs/models.md](docs/models.md) lists them all.
"""


def names() -> tuple[list[str], list[str]]:
    """Architectures of text models and of multimodal ones that generate text."""
    through_transformers = {
        name for name, (_, kind) in registry._TRANSFORMERS_SUPPORTED_MODELS.items()
        if "MultiModal" not in kind
    }  # fmt: skip
    text = set(registry._TEXT_GENERATION_MODELS) | through_transformers
    other = set(registry._TRANSFORMERS_SUPPORTED_MODELS) - through_transformers
    return sorted(text), sorted(other | set(registry._MULTIMODAL_MODELS))


def taken() -> list[str]:
    """Text architectures of which nothing more is said."""
    text, multimodal = names()
    named = REFUSED.keys() | set(NOT_LOOKED_AT) | TESTED.keys()
    unknown = named - set(text) - set(multimodal)
    assert not unknown, f"vLLM does not know {sorted(unknown)}"
    found = [one for one in text if one not in named]
    assert EXAMPLES.keys() <= set(found), "examples are those of what is taken"
    return found


def page() -> str:
    """The page's text."""
    multimodal = [one for one in names()[1] if one not in TESTED]
    reasons: dict[str, list[str]] = {}
    for name, why in REFUSED.items():
        reasons.setdefault(why, []).append(name)
    return _PAGE.format(
        vllm=VLLM,
        tested=_tested(),
        taken=", ".join(
            f"`{one}` ({EXAMPLES[one]})" if one in EXAMPLES else f"`{one}`" for one in taken()
        ),
        elsewhere=_list(MASKS_FROM_ELSEWHERE),
        refused="\n".join(f"| {why} | {_list(some)} |" for why, some in reasons.items()),
        special=_list(NOT_LOOKED_AT),
        multimodal=_list(multimodal),
    )


def with_summary(readme: str) -> str:
    """The README with its table of models written anew."""
    before, rest = readme.split(_START)
    _, after = rest.split(_END)
    others = _OTHERS.format(
        taken=len(taken()),
        examples=", ".join(EXAMPLES.values()),
        refused=len(REFUSED),
        reasons=", ".join(dict.fromkeys(REFUSED.values())),
    )
    lines = textwrap.fill(others, 118, break_on_hyphens=False, break_long_words=False)
    return f"{before}{_START}\n{_tested()}\n\n{lines}\n\n{_END}{after}"


def _tested() -> str:
    rows = ["| architecture | such as | served | tested |", "|---|---|---|---|"]
    rows += [
        f"| `{name}` | {models} | {layers} | {where} |"
        for name, (models, layers, where) in TESTED.items()
    ]
    return "\n".join(rows)


def _list(some) -> str:
    return ", ".join(f"`{name}`" for name in some)


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(with_summary(README.read_text()))
