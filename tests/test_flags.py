"""The table of flags: nothing that vLLM's own parser takes is missing, and what it refuses is."""

import json
from collections import Counter

import pytest
from mask_samples import full_mask, random_mask
from mixed_models import save_mixed
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_leank.mask.file import save_mask
from vllm_leank.serving import flags
from vllm_leank.serving.serve_line import examine

load_general_plugins()


def flags_of_vllm():
    commands = FlexibleArgumentParser().add_subparsers()
    actions = ServeSubcommand().subparser_init(commands)._actions
    names = [action.option_strings for action in actions if action.option_strings]
    return {next(name for name in one if name.startswith("--")) for one in names}


def test_every_flag_of_vllm_serve_is_in_the_table():
    missing = flags_of_vllm() - set(flags.all_flags())
    assert not missing, "say in vllm_leank/serving/flags.py what becomes of these"


def test_the_table_has_each_flag_once():
    assert [flag for flag, count in Counter(flags.all_flags()).items() if count > 1] == []


def test_the_page_is_made_from_the_table(repo):
    page = (repo / "docs/flags.md").read_text(encoding="utf-8")
    assert page == flags.flags_page(), "run python -m vllm_leank.serving.flags > docs/flags.md"


@pytest.fixture
def options(tiny_llama_dir, tmp_path):
    save_mask(random_mask(tiny_llama_dir, [32, 0]), tmp_path / "mask.yaml")
    return {"leank": {"mask": str(tmp_path / "mask.yaml")}}


TRANSFER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
GIVEN = {
    "--block-size": ("32", {"block_size": 32}),
    "--prefix-match-unit": ("32", {"prefix_match_unit": 32}),
    "--kv-transfer-config": (json.dumps(TRANSFER), {"kv_transfer_config": TRANSFER}),
    "--kv-offloading-size": ("1", {"kv_offloading_size": 1.0}),
    "--disable-hybrid-kv-cache-manager": (None, {"disable_hybrid_kv_cache_manager": True}),
    "--diffusion-config": ('{"canvas_length": 8}', {"diffusion_config": {"canvas_length": 8}}),
}
"""What is given for a flag on a command line, and to `EngineArgs`."""
NOT_HERE = {
    "--decode-context-parallel-size": {"parallel_config.decode_context_parallel_size": 2},
    "--prefill-context-parallel-size": {"parallel_config.prefill_context_parallel_size": 2},
    "--enable-dbo": {"parallel_config.enable_dbo": True},
    "--ubatch-size": {"parallel_config.ubatch_size": 2},
    "--enable-return-routed-experts": {"aux_output_config.enable_return_routed_experts": True},
}
"""Flags that vLLM itself does not let pass on one CPU: what they set."""


def test_every_refused_flag_is_tried():
    assert {one.flag for one in flags.REFUSED} == GIVEN.keys() | NOT_HERE.keys()


@pytest.mark.parametrize("flag", GIVEN)
def test_a_refused_flag_is_named_by_doctor_and_at_startup(tiny_llama_dir, options, flag):
    value, argument = GIVEN[flag]
    (reason,) = (one.reason for one in flags.REFUSED if one.flag == flag)
    assert flag in reason
    chosen = ["--attention-backend", "leank", "--skip-tokenizer-init"]
    chosen += [
        "--additional-config",
        json.dumps(options),
        flag,
        *([] if value is None else [value]),
    ]
    assert reason in examine(["serve", str(tiny_llama_dir), *chosen]).reasons
    engine = EngineArgs(
        model=str(tiny_llama_dir),
        attention_backend="leank",
        skip_tokenizer_init=True,
        additional_config=options,
        **argument,
    )
    with pytest.raises(ValueError, match="leank cannot serve this: ") as refusal:
        engine.create_engine_config()
    assert reason in str(refusal.value)


@pytest.mark.parametrize("flag", NOT_HERE)
def test_what_vllm_does_not_let_pass_here(tiny_llama_dir, options, flag):
    config = EngineArgs(
        model=str(tiny_llama_dir),
        attention_backend="leank",
        skip_tokenizer_init=True,
        additional_config=options,
    ).create_engine_config()
    assert list(flags.refused_flags(config)) == []
    for path, value in NOT_HERE[flag].items():
        part, name = path.split(".")
        setattr(getattr(config, part), name, value)
    (reason,) = flags.refused_flags(config)
    assert flag in reason


def with_interval(model, options, interval):
    line = ["serve", str(model), "--attention-backend", "leank", "--skip-tokenizer-init"]
    line += ["--additional-config", json.dumps(options)]
    return examine([*line, "--prefix-cache-retention-interval", str(interval)]).reasons


def test_an_interval_of_pages_is_for_sliding_layers(tiny_llama_dir, options):
    (reason,) = with_interval(tiny_llama_dir, options, 960)
    assert reason.startswith("--prefix-cache-retention-interval is 960; it is for models with slid")
    assert with_interval(tiny_llama_dir, options, 0) == ()


def test_an_interval_of_pages_fits_the_masks(tmp_path):
    model = save_mixed("gemma3_text", tmp_path)
    save_mask(full_mask(model), tmp_path / "mask.yaml")
    options = {"leank": {"mask": str(tmp_path / "mask.yaml")}}
    (reason,) = with_interval(model, options, 1000)
    assert reason.startswith("--prefix-cache-retention-interval is 1000; with this mask it must be")
    fits = int(reason.rsplit(" ", 1)[1])
    assert with_interval(model, options, 3 * fits) == ()
