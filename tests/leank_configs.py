"""Configs of vLLM with leank, for tests of what startup says of them."""

from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

load_general_plugins()  # as the command line does before it reads an option

SLIDING_WINDOW = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 128,
}


def config_of(model, options, **args):
    args = {"attention_backend": "leank", "skip_tokenizer_init": True} | args
    additional = {"leank": options} if options is not None else {}
    return EngineArgs(model=str(model), additional_config=additional, **args).create_engine_config()
