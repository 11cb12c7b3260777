"""Fixtures and the environment that all tests share."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Set before any library reads them; vLLM's engine processes inherit them.
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Masks that the user has made must not be found; a test that wants some names a folder of its own.
os.environ["XDG_DATA_HOME"] = os.path.join(tempfile.gettempdir(), "vllm-leank-tests-no-data")
# Idle threads of OpenMP spin: on a busy machine they slow small models down twentyfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # An engine that runs eagerly has a compiler for two functions of its sampler alone, which costs
    # each process seven seconds.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Before anything imports Triton: its kernels run in the interpreter then.
    os.environ["TRITON_INTERPRET"] = "1"
    import fast_interpreter

    fast_interpreter.install()

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the source tree."""
    return REPO


@pytest.fixture
def leank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `leank ARGS` in this process; gives exit code, stdout, stderr."""
    from vllm_leank import cli

    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["leank", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give a function that saves a small random Llama in float32 and returns its directory.

    The directory has no tokenizer: prompts are token ids, engines need `skip_tokenizer_init`. Equal
    arguments give the same directory. The weights are drawn wide, so that attention is far from
    uniform and a wrong key or channel shows in the logits.
    """
    made: dict[tuple[int, ...], Path] = {}

    def make(
        *, head_dim: int = 64, layers: int = 2, kv_heads: int = 2, group: int = 2, seed: int = 0
    ) -> Path:
        key = (head_dim, layers, kv_heads, group, seed)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny-llama")
            _save_llama(made[key], *key)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_llama: Callable[..., Path]) -> Path:
    """Two layers, two KV heads of 64 channels, two query heads on each."""
    return tiny_llama()


@pytest.fixture
def mask_file(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A mask for that model, in which every other head is blind."""
    from mask_samples import random_mask

    from vllm_leank.mask.file import save_mask

    path = tmp_path / "mask.yaml"
    save_mask(random_mask(tiny_llama_dir, [32, 0]), path)
    return path


@pytest.fixture(scope="session")
def with_tokenizer(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer of bytes, under a name of its own."""
    from byte_tokenizer import copy_with_bytes

    return copy_with_bytes(tiny_llama_dir, tmp_path_factory.mktemp("models") / "Tiny-1B")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of masks, which does not exist."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "vllm-leank" / "masks"


def _save_llama(
    directory: Path, head_dim: int, layers: int, kv_heads: int, group: int, seed: int
) -> None:
    # Imported here: tests that need no model should not pay for transformers.
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=16384,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and let the long files come first: those that are
    left for the end should keep two processes busy alike.
    """
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of vLLM's two model runners: a parameter of `gpu_engines.runners`."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", request.param)


@pytest.fixture(scope="module")
def few_programs() -> Iterator[None]:
    """In the interpreter, which runs programs one after the other: for each head some that find
    nothing to do, not hundreds. Those of compaction take several steps of 32 tokens in turn.
    """
    from vllm_leank.kernels import launch

    if GPU:
        yield
        return
    launch.choose_decode.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "programs_of_few", lambda reqs, heads, wave: max(16, heads))
        patch.setattr(launch, "whole_waves", lambda heads, wave: 3 * heads)
        patch.setattr(launch, "COMPACT_PROGRAMS", (12, 12))
        yield
    launch.choose_decode.cache_clear()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.gpu)], ids=["pointers", "tma"])
def tma(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to load tiles, other than K of codes."""
    from vllm_leank.kernels import launch

    if GPU:
        find = launch.Device.of

        def of(device: object) -> object:
            return dataclasses.replace(find(device), tma=request.param)

        monkeypatch.setattr(launch.Device, "of", of)
    return request.param
