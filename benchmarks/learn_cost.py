"""What a step of `leank mask learn` costs: time and memory, also against the plain two-pass form.

    PYTHONPATH=benchmarks python -m learn_cost --tokens 98304 --out cost.json
    PYTHONPATH=benchmarks python -m learn_cost --two-pass --model benchmarks/recall/model \
        --dtype float32 --tokens 4096 8192

Without weights in the model's directory they are random: cost does not depend on them. With
`--two-pass` each length is also computed in the two-pass form, and its gradients are compared; that
keeps activations of the whole context, so lengths must be short.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from recall.evaluate import head_commit, machine
from two_pass import two_pass_loss

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.learn.distillation import Distiller
from vllm_leank.offline.prompts import Sample

GIB = 1 << 30


def load(path: str, dtype: str, device: str) -> transformers.PreTrainedModel:
    """The model in a directory, with random weights if it has only a config."""
    kind = transformers.AutoModelForCausalLM
    if any(Path(path).glob("*.safetensors")):
        return kind.from_pretrained(path, dtype=dtype).to(device).eval()
    config = transformers.AutoConfig.from_pretrained(path)
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_config(config, dtype=getattr(torch, dtype)).eval()


def measure(step: Callable[[], torch.Tensor], repeats: int, device: str) -> dict[str, object]:
    """Median seconds of `step` after a first one that is not counted, and peak memory."""
    on_gpu = device.startswith("cuda")
    seconds = []
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.monotonic()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begin)
    result: dict[str, object] = {
        "seconds": round(statistics.median(seconds[1:]), 4),
        "seconds_each": [round(value, 4) for value in seconds[1:]],
    }
    if on_gpu:
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    return result


def main() -> None:
    """Measure each length and write the results."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(here / "shapes/llama-3.1-8b"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 98304])
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--chunk", type=int, default=4096, help="prompt tokens computed at once")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--recent", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3, help="counted steps per length")
    parser.add_argument("--two-pass", action="store_true", help="compare with the two-pass form")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()

    model = load(args.model, args.dtype, args.device)
    geometry = Geometry.from_hf_config(model.config)
    window = Window(args.sink, args.recent)
    distiller = Distiller(model, window, args.chunk)
    shape = geometry.shape
    factors = torch.full(shape, 0.5, device=args.device, requires_grad=True)

    def gradient(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        factors.grad = None
        loss().backward()
        return factors.grad

    cells = []
    for tokens in args.tokens:
        ids = torch.randint(model.config.vocab_size, (tokens,)).tolist()
        sample = Sample(ids[: -args.answer], ids[-args.answer :])
        forms = {"shared": lambda sample=sample: distiller.loss(sample, factors)}
        if args.two_pass:
            forms["two_pass"] = lambda sample=sample: two_pass_loss(model, window, sample, factors)
        cell: dict[str, object] = {"tokens": tokens}
        for name, loss in forms.items():
            cell[name] = measure(lambda loss=loss: gradient(loss), args.repeats, args.device)
        if args.two_pass:
            one, two = (gradient(loss).double() for loss in forms.values())
            cell["gradient_error"] = float((one - two).norm() / two.norm())
            cell["time_ratio"] = round(cell["shared"]["seconds"] / cell["two_pass"]["seconds"], 4)
        cells.append(cell)
        print(json.dumps(cell), flush=True)
        save(args, model, cells)


def save(
    args: argparse.Namespace, model: transformers.PreTrainedModel, cells: list[dict[str, object]]
) -> None:
    """Write what has been measured, if a file was asked for."""
    result = {
        "what": "one step of learning: prompt, teacher, student, gradients of the factors",
        "machine": machine(args.device),
        "commit": args.commit or head_commit(),
        "command": shlex.join(["python", "-m", "learn_cost", *sys.argv[1:]]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": args.dtype,
        "answer_tokens": args.answer,
        "chunk": args.chunk,
        "window": {"sink": args.sink, "recent": args.recent},
        "cells": cells,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
