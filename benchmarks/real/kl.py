"""What archives do to a real model's answers: KL divergence to full attention, per kind of archive.

    python benchmarks/real/kl.py --model models/qwen-0.5b --lengths 3000 --out kl.json

Calibrates on built-in prompts and judges on others (texts that calibration does not see). Each is
read with full attention; then its last tokens are given one by one (teacher forcing), once with
full attention and once with far K and V as an archive gives them back. Archives are simulated, so
this says nothing of speed or of the engine.
"""

import argparse
import json
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_leank.bench.machine import head_commit, machine
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import DTYPES, Checkpoint, usable_device
from vllm_leank.mask.select_channels import select_channels
from vllm_leank.offline.allocate import allocate
from vllm_leank.offline.archive import StaticArchive
from vllm_leank.offline.attention_hook import AttentionHook
from vllm_leank.offline.builtin_prompts import Named, builtin_prompts
from vllm_leank.offline.calibrate import measure_heads
from vllm_leank.offline.context import Context, logits_after, read_prompt
from vllm_leank.offline.divergence import divergence
from vllm_leank.offline.fisher import QUERIES, sensitivities
from vllm_leank.offline.rope import rotation_of_model
from vllm_leank.offline.simulate import SimulatedArchive, SimulatedPruning
from vllm_leank.offline.statistics import StatisticsMeter
from vllm_leank.offline.written_prompts import written_prompts

RATIO, ALIGN = 0.7, 32


@dataclass(frozen=True)
class Variant:
    """An archive, with the bits of an element of far K and V, without scales of tokens."""

    name: str
    bits: float
    hook: AttentionHook


def pruned(name: str, window: Window, keep: np.ndarray) -> Variant:
    """Channels that are not kept read as 0; heads that keep none do not see far tokens."""
    hook = SimulatedPruning(window)
    hook.keep = torch.tensor(keep)
    of_v = keep.any(-1).mean()
    return Variant(name, float(8 * (keep.mean() + of_v)), hook)


def variants(
    model: transformers.PreTrainedModel,
    window: Window,
    prompts: Sequence[Sequence[int]],
    bits: Sequence[float],
) -> tuple[list[Variant], dict[str, Any]]:
    """All archives, calibrated on `prompts`, and what is worth telling of the calibration."""
    rotation = rotation_of_model(model)
    geometry = Geometry.from_hf_config(model.config)
    meter = StatisticsMeter(geometry, rotation)
    after_rope = StatisticsMeter(geometry, None)

    def observe(layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        meter(layer, first, key, value)
        after_rope(layer, first, key, value)

    start = time.monotonic()
    fisher = sensitivities(model, prompts, window, observe=observe)
    seconds = time.monotonic() - start
    seen = meter.statistics()
    energy = measure_heads(model, prompts, window, QUERIES).scores()
    whole = np.full(fisher.key.shape, 16, np.uint8)

    def archive(
        name: str, k_bits: np.ndarray, v_bits: np.ndarray, served: bool = False, **options: Any
    ) -> Variant:
        options = {"statistics": seen, "rotation": rotation} | options
        blind = None
        if served:
            blind = torch.tensor(~(k_bits.any(-1) | v_bits.any(-1)))
        hook = SimulatedArchive(window, StaticArchive(k_bits, v_bits, **options), blind)
        return Variant(name, float((k_bits.mean() + v_bits.mean()) / 2), hook)

    by_square = select_channels(fisher.key * seen.k_square, RATIO, ALIGN)
    by_rest = np.where(select_channels(fisher.key * seen.k_scale**2, RATIO, ALIGN), whole, 0)
    four = np.full_like(whole, 4)
    fixed = after_rope.statistics()
    static = {"statistics": fixed, "rotation": None}
    found = [
        pruned("70% pruned by energy, zeros", window, select_channels(energy, RATIO, ALIGN)),
        pruned("70% pruned by Fisher, zeros", window, by_square),
        archive("70% pruned by Fisher, static mean", by_rest, whole, **static),
        archive("70% pruned by Fisher, mean before RoPE", by_rest, whole),
        archive("4 bits everywhere", four, four),
    ]
    costs = (fisher.key * seen.k_scale**2, fisher.value * seen.v_scale**2)
    static_costs = (fisher.key * fixed.k_scale**2, costs[1])
    blind_heads = {}
    for budget in bits:
        chosen = allocate(*costs, budget)
        both = (chosen.k_bits, chosen.v_bits)
        found.append(archive(f"{budget:g} bits", *both))
        found.append(archive(f"{budget:g} bits, V scaled per token", *both, v_token_scale=True))
        name = f"{budget:g} bits, V scaled per token, static mean"
        chosen = allocate(*static_costs, budget)
        both = (chosen.k_bits, chosen.v_bits)
        blind = int((~(both[0].any(-1) | both[1].any(-1))).sum())
        blind_heads[f"{budget:g}"] = blind
        found.append(archive(name, *both, v_token_scale=True, **static))
        if blind:
            options = {"v_token_scale": True, "served": True} | static
            found.append(archive(f"{name}, blind heads", *both, **options))
    return found, {
        "before_rope": seen.before_rope,
        "heads_without_bits": blind_heads,
        "sensitivities_seconds": round(seconds, 1),
    }


@torch.inference_mode()
def judge(
    model: transformers.PreTrainedModel,
    window: Window,
    samples: Sequence[Named],
    archives: Sequence[Variant],
) -> dict[str, dict[str, dict[str, float]]]:
    """KL per token and share of equal most likely tokens, per variant and kind of sample."""
    context = Context(Geometry.from_hf_config(model.config))
    sums: dict[str, dict[str, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(3)))
    dense = SimulatedArchive(window)
    for kind, sample in track(samples, "judging", console=Console(stderr=True)):
        read_prompt(model, context, sample.prompt, 4096)
        expected = logits_after(model, context, sample.answer, dense)
        for one in archives:
            found = divergence(expected, logits_after(model, context, sample.answer, one.hook))
            for name in (kind, "all"):
                sums[one.name][name] += (found.total, found.agree, len(sample.answer))
    return {
        name: {
            kind: {"kl": round(kl / count, 6), "top1": round(agree / count, 4)}
            for kind, (kl, agree, count) in kinds.items()
        }
        for name, kinds in sums.items()
    }


def show(results: dict[str, Any]) -> None:
    """Print the table of KLs."""
    table = Table("archive", "x", *(f"{length:,} tokens" for length in results["lengths"]))
    for row in results["archives"]:
        cells = [f"{row['lengths'][str(n)]['all']['kl']:.4f}" for n in results["lengths"]]
        table.add_row(row["name"], f"{row['x']:.1f}", *cells)
    Console().print(table)


def main() -> None:
    """Calibrate, judge, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--lengths", default="8192", help="of judged prompts, with commas")
    parser.add_argument("--prompts", type=int, default=16, help="to calibrate on")
    parser.add_argument("--written", type=int, default=0, help="more, that the model writes")
    parser.add_argument("--judged", type=int, default=8, help="prompts of each length")
    parser.add_argument("--bits", default="4,2,1", help="per element, with commas")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--device", help="cuda, cpu; by default the GPU if there is one")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()
    try:
        results = run(args)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    show(results)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The results of one command."""
    lengths = [int(length) for length in args.lengths.split(",")]
    window = Window(args.sink, args.recent)
    checkpoint = Checkpoint.open(args.model)
    model = checkpoint.load(args.dtype, usable_device(args.device))
    named = builtin_prompts(
        checkpoint,
        args.prompts,
        min_tokens=min(lengths) // 2,
        max_tokens=max(lengths),
        seed=args.seed,
    )
    named += written_prompts(model, checkpoint, args.written, tokens=min(lengths), seed=args.seed)
    prompts = [sample.prompt + sample.answer for _, sample in named]
    archives, calibration = variants(
        model, window, prompts, [float(bits) for bits in args.bits.split(",")]
    )
    judged = {}
    for length in lengths:
        samples = builtin_prompts(
            checkpoint,
            args.judged,
            min_tokens=length,
            max_tokens=length,
            seed=args.seed,
            held_out=True,
        )
        judged[str(length)] = judge(model, window, samples, archives)
    return {
        "what": "KL to full attention in nats per token, teacher-forced, archives simulated",
        "command": shlex.join(["python", "benchmarks/real/kl.py", *sys.argv[1:]]),
        "commit": args.commit or head_commit(),
        "machine": machine(),
        "model": checkpoint.id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "window": {"sink": window.sink, "recent": window.recent},
        "calibration": {
            "prompts": len(prompts),
            "tokens": sum(map(len, prompts)),
            "longest": max(map(len, prompts)),
            **calibration,
        },
        "lengths": lengths,
        "judged": args.judged,
        "archives": [
            {
                "name": one.name,
                "bits": round(one.bits, 4),
                "x": round(16 / one.bits, 2),
                "lengths": {length: rows[one.name] for length, rows in judged.items()},
            }
            for one in archives
        ],
    }


if __name__ == "__main__":
    main()
