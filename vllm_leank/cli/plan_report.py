"""What `leank plan` prints."""

import json
from typing import Any

from vllm_leank.cli.sizes import readable
from vllm_leank.core.capacity import Capacity


def print_plan(capacities: dict[str, Capacity], facts: dict[str, Any], as_json: bool) -> None:
    """Print what fits, and the line to serve with, unless nothing would start by it."""
    from vllm_leank.cli.capacity_table import (
        capacity_json,
        capacity_table,
        what_a_step_reads,
        what_does_not_fit,
        what_fits_with_leank_alone,
    )

    if as_json:
        print(json.dumps(facts | {"engines": capacity_json(capacities)}, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_sentence(facts), markup=False, soft_wrap=True)
    if not facts["model_read"]:
        console.print(
            "without MODEL: states that layers keep beside attention, as Falcon-H1's do, are not "
            "counted",
            soft_wrap=True,
        )
    console.print(capacity_table(capacities, facts["max_model_len"]))
    weights = facts.get("weight_bytes", 0) // facts["tensor_parallel_size"]
    console.print(what_a_step_reads(capacities, weights), soft_wrap=True)
    if "while_computed" in facts:
        console.print(f"leank: {facts['while_computed']}", soft_wrap=True)
    if alone := what_fits_with_leank_alone(capacities):
        console.print(alone, soft_wrap=True)
    longest = facts["longest_request"]
    if too_long := what_does_not_fit(capacities):
        console.print(too_long, soft_wrap=True)
    elif longest is not None and longest < facts["max_model_len"]:
        console.print(
            f"vLLM would refuse this: the model's config has requests of up to {longest:,} tokens. "
            "For longer ones give both --hf-overrides with max_position_embeddings and "
            "rope_parameters (YaRN, say)",
            soft_wrap=True,
        )
    else:
        console.print("to serve it:")
        console.print(f"  {facts['serve']}", markup=False, soft_wrap=True)


def _sentence(facts: dict[str, Any]) -> str:
    pool = readable(facts["pool_bytes"])
    where = f" on each of {facts['tensor_parallel_size']} GPUs"
    where = where if facts["tensor_parallel_size"] > 1 else ""
    window = "sink {sink}, recent {recent}".format(**facts["window"])
    if facts["mask"] is None:
        window = f"no mask, {facts['bits']:.2f} bits per number, {window}"
    if facts["prefill"] == "pruned":
        step = facts["max_num_batched_tokens"]
        window += f", prompts read pruned with --max-num-batched-tokens {step}"
    how = ""
    if "gpu_bytes" in facts:
        names = ("gpu_bytes", "weight_bytes", "other_bytes")
        gpu, weights, other = (readable(facts[name]) for name in names)
        how = f" (estimated: {gpu} GPU, {weights} of weights, {other} beside)"
    return f"{facts['model']}, {window}: cache of {pool}{where}{how}"
