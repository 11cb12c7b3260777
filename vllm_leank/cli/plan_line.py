"""The line that `leank plan` ends with."""

import json
import shlex
from typing import Any

from vllm_leank.core.capacity import BATCHED_TOKENS, UTILIZATION
from vllm_leank.core.other_layers import NO_PREFIX_CACHING, STATES


def serve_line(facts: dict[str, Any], mask: str | None, utilization: float = UTILIZATION) -> str:
    """The line that serves what was planned, to copy."""
    words = ["leank", "serve", facts["model"]]
    if facts["mask"] is None:
        words += ["--bits", f"{facts['bits_asked']:g}"]
    words += ["--max-model-len", str(facts["max_model_len"])]
    if facts["hf_overrides"]:
        words += ["--hf-overrides", json.dumps(facts["hf_overrides"])]
    if facts["tensor_parallel_size"] > 1:
        words += ["--tensor-parallel-size", str(facts["tensor_parallel_size"])]
    if facts["other_layers"] == STATES:
        words.append(NO_PREFIX_CACHING)
    if utilization != UTILIZATION:
        words += ["--gpu-memory-utilization", f"{utilization:g}"]
    if facts["max_num_batched_tokens"] != BATCHED_TOKENS:
        words += ["--max-num-batched-tokens", str(facts["max_num_batched_tokens"])]
    options = {"mask": mask} | facts["options"]
    if facts["kv_bytes_given"]:
        words += ["--kv-cache-memory-bytes", str(facts["kv_bytes_given"])]
    if given := {name: value for name, value in options.items() if value is not None}:
        words += ["--additional-config", json.dumps({"leank": given})]
    return shlex.join(words)
