r"""Whether distillation betters the means and scales of a mask of bits, on a real model.

    leank mask calibrate models/smollm2 --bits 2 --dtype float32 --out 2bit.yaml
    PYTHONPATH=benchmarks python -m real.codes_study --model models/smollm2 --mask 2bit.yaml \
        --dtype float32 --out codes_study.json

Bits stay where they are. Means and logarithms of scales of K and V are trained by Adam on what is
asked of them at the end, the KL divergence to full attention over the last tokens of built-in
prompts (`baselines/trained_codes.py`). K and V of all prompts are kept in memory, so that a step is
a pass of the last tokens alone. The best of a run is taken by the KL of other prompts, before
training included. It is judged beside the mask that was given, as `kl.py` judges masks, on its
texts.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from baselines.trained_codes import TrainedCodes
from rich.console import Console

from real.caches import served_mask
from real.judged_texts import SEEN, judged_samples
from real.kl import judge
from real.option_numbers import numbers
from real.unseen_texts import unseen_texts
from vllm_leank.bench.results import describe_mask, header, save_results
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import DTYPES, Checkpoint
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.attention_hook import AttentionHook, hooked_attention
from vllm_leank.offline.builtin_prompts import Named
from vllm_leank.offline.calibration_prompts import built_in_samples
from vllm_leank.offline.context import Context, logits, read_prompt
from vllm_leank.offline.known_tokens import reader
from vllm_leank.offline.prompts import Sample, read_samples
from vllm_leank.offline.simulate import SimulatedArchive

LAST = 64
"""Tokens of a prompt whose distributions are compared."""

CHECKS = 6
"""How often the KL of other prompts is asked after the first time, in a run."""

CONSOLE = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Read:
    """A prompt that was read with full attention, its last tokens, and log probabilities after each
    of them, fp32 `[T, vocabulary]`.
    """

    context: Context
    last: list[int]
    expected: torch.Tensor


@dataclass(frozen=True)
class Trainer:
    """A model, and prompts that were read by it, to train on and to choose the best by."""

    model: transformers.PreTrainedModel
    window: Window
    training: Sequence[Read]
    held_out: Sequence[Read]

    @classmethod
    def read(
        cls,
        model: transformers.PreTrainedModel,
        window: Window,
        prompts: Sequence[list[int]],
        held_out: int,
    ) -> "Trainer":
        """Read all `prompts`, of which the last `held_out` are not trained on."""
        found = []
        for number, ids in enumerate(prompts, start=1):
            context = Context(Geometry.from_hf_config(model.config))
            read_prompt(model, context, ids[:-LAST], 4096)
            with torch.no_grad():
                expected = _logits(model, context, ids[-LAST:], SimulatedArchive(window))
            found.append(Read(context, ids[-LAST:], expected.float().log_softmax(-1)))
            CONSOLE.print(f"read prompt {number} of {len(prompts)}")
        return cls(model.requires_grad_(False), window, found[:-held_out], found[-held_out:])

    def kl(self, one: Read, codes: TrainedCodes, blind: torch.Tensor) -> torch.Tensor:
        """Mean over the last tokens of a prompt, in nats."""
        hook = SimulatedArchive(self.window, codes, blind)
        found = _logits(self.model, one.context, one.last, hook).float().log_softmax(-1)
        return (one.expected.exp() * (one.expected - found)).sum(-1).mean()

    def run(self, mask: Mask, steps: int, rate: float, seed: int) -> tuple[Mask, dict[str, Any]]:
        """The best mask of so many steps from `mask`, and how it went."""
        codes = TrainedCodes(mask, self.model.device)
        blind = torch.tensor(~(mask.k_bits.any(-1) | mask.v_bits.any(-1)))
        parameters = [codes.shifts, codes.stretches]
        optimizer = torch.optim.Adam(parameters, lr=rate)
        order = np.random.default_rng(seed)
        losses: list[float] = []
        checks: list[tuple[int, float]] = []
        best = mask.statistics

        def check() -> None:
            nonlocal best
            with torch.no_grad():
                found = float(np.mean([float(self.kl(one, codes, blind)) for one in self.held_out]))
            if checks and found < min(loss for _, loss in checks):
                best = codes.statistics()
            checks.append((len(losses), round(found, 6)))
            CONSOLE.print(f"rate {rate:g}: step {len(losses)}, held out {found:.5f}")

        check()
        places: list[int] = []
        while len(losses) < steps:
            places = places or list(order.permutation(len(self.training)))
            optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - len(losses) / steps))
            loss = self.kl(self.training[places.pop()], codes, blind)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(float(loss.detach()), 6))
            if len(losses) % max(1, steps // CHECKS) == 0 or len(losses) == steps:
                check()
        kept = min(checks, key=lambda one: one[1])[0]
        told = {"rate": rate, "losses": losses, "held_out": checks, "kept_step": kept}
        made = {**mask.provenance, "trained": {"rate": rate, "steps": kept}}
        return replace(mask, statistics=best, provenance=made, path=None, sha256=""), told


def _logits(
    model: transformers.PreTrainedModel, context: Context, ids: Sequence[int], hook: AttentionHook
) -> torch.Tensor:
    """Logits `[T, vocabulary]` after a context under `hook`; gradients reach new K and V, too."""

    def attend(
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        sink_scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        keys = torch.cat([context.key(layer), key], dim=2)
        values = torch.cat([context.value(layer), value], dim=2)
        return hook(layer, query, keys, values, attention_mask, scaling, sink_scores)

    with hooked_attention(model, attend, context=context):
        return logits(model, context, ids)


def read_texts(
    checkpoint: Checkpoint, window: Window, args: argparse.Namespace
) -> tuple[list[list[int]], dict[str, list[tuple[str, Named]]]]:
    """Prompts to train on and to choose the best by, and what is judged, by its length or as data.

    Raises:
        UserError: a file cannot be used, or has too few prompts.
    """
    count = args.prompts + args.held_out
    if args.data is not None:
        samples = read_samples(
            args.data,
            reader(checkpoint, checkpoint.encode),
            reader(checkpoint, checkpoint.encode_rest),
            vocab_size=checkpoint.config.vocab_size,
            max_samples=count + args.judged,
            max_tokens=args.max_tokens,
            room=0,
        )
        prompts = [sample.prompt + sample.answer for sample in samples]
        if len(prompts) < count + args.judged:
            raise UserError(f"{args.data}: has {len(prompts)} prompts, not {count + args.judged}")
        last = [(SEEN, ("data", Sample(ids[:-LAST], ids[-LAST:]))) for ids in prompts[count:]]
        return prompts[:count], {"data": last}
    named = built_in_samples(checkpoint, window, args.max_tokens, count, args.seed)
    texts = unseen_texts(args.texts) if args.unseen else {}
    judged = {
        str(length): judged_samples(checkpoint, texts, length, args.judged, args.unseen, args.seed)[
            0
        ]
        for length in numbers(args.lengths, int)
    }
    return [sample.prompt + sample.answer for _, sample in named], judged


def study(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Train at each rate, judge what came of it; `write` gets the results after each of both.

    Raises:
        UserError: the model, the mask or an option cannot be used.
    """
    start = time.monotonic()
    mask = load_mask(args.mask)
    if not mask.is_packed:
        raise UserError(f"{args.mask}: has no channels of 2, 4 or 8 bits")
    window = Window(mask.sink, mask.recent)
    checkpoint = Checkpoint.open(args.model)
    device = checkpoint.place(args.device, args.dtype)
    model = checkpoint.load(args.dtype, device)
    prompts, judged = read_texts(checkpoint, window, args)
    trainer = Trainer.read(model, window, prompts, args.held_out)
    results: dict[str, Any] = {
        **header(
            "KL to full attention in nats per token of masks of bits, before and after means and "
            "scales are trained by distillation",
            args.commit,
            "python -m real.codes_study",
        ),
        "model": checkpoint.id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "window": {"sink": window.sink, "recent": window.recent},
        "mask": {**describe_mask(mask), "bits": mask.bits, "calibration": mask.provenance},
        "training": {
            "prompts": args.prompts,
            "held_out": args.held_out,
            "max_tokens": args.max_tokens,
            "last_tokens": LAST,
            "data": "built-in" if args.data is None else args.data.name,
        },
        "runs": [],
        "kl": {},
    }
    variants = [served_mask("given", mask, window)]
    for rate in numbers(args.rates, float):
        found, told = trainer.run(mask, args.steps, rate, args.seed)
        variants.append(served_mask(f"trained at {rate:g}", found, window))
        results["runs"].append(told)
        write(results)
        if args.masks:
            args.masks.mkdir(parents=True, exist_ok=True)
            save_mask(found, args.masks / f"trained_{rate:g}.yaml", overwrite=True)
    for name, samples in judged.items():
        for variant, judged_here in judge(model, window, samples, variants).items():
            found_here = {kind: one.means() for kind, one in judged_here.items()}
            results["kl"].setdefault(variant, {})[name] = found_here
        results["seconds"] = round(time.monotonic() - start, 1)
        write(results)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--mask", type=Path, required=True, help="of bits, as leank calibrates it")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--masks", type=Path, help="folder for the masks that come of it")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--rates", default="0.003", help="of Adam, a run each, with commas")
    parser.add_argument("--prompts", type=int, default=24, help="to train on")
    parser.add_argument("--held-out", type=int, default=8, help="others, to choose the best by")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of the longest of these")
    parser.add_argument(
        "--data",
        type=Path,
        help="JSONL of prompts instead of built-in texts: first those to train "
        "on, then those held out, then those to judge by",
    )
    parser.add_argument("--lengths", default="2048", help="of judged texts, with commas")
    parser.add_argument("--judged", type=int, default=8, help="texts of kinds seen, per length")
    parser.add_argument("--unseen", type=int, default=2, help="texts of each kind unseen")
    parser.add_argument("--texts", type=Path, help="folder that unseen_texts.py wrote")
    parser.add_argument("--device", help="cpu or cuda; by default the GPU")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()

    def write(results: dict[str, Any]) -> None:
        save_results(results, args.out)

    try:
        study(args, write)
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
