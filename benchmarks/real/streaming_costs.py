"""What a real model's channels and heads cost, heads asked in two ways."""

import argparse
import json
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import transformers
from baselines.duo_attention import learned_alphas, passkey_samples

from real.kl import CONSOLE
from vllm_leank.bench.results import save_results
from vllm_leank.core.window import Window
from vllm_leank.learn.stages import Progress
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.calibrate_bits import Measured, measure
from vllm_leank.offline.calibration_prompts import (
    CalibrationPrompts,
    calibration_prompts,
    longest_prompt,
)
from vllm_leank.offline.streaming import BY_OUTPUT, head_losses

FISHER, DUO = "fisher", "duo"

BY = {FISHER: BY_OUTPUT, DUO: "DuoAttention's alphas, learned by distillation on passkeys"}

Scores = np.ndarray


@dataclass
class Costs:
    """The model, which is loaded and read when that is first needed, and what was measured."""

    checkpoint: Checkpoint
    window: Window
    args: argparse.Namespace

    @cached_property
    def model(self) -> transformers.PreTrainedModel:
        """On its device."""
        device = self.checkpoint.place(self.args.device, self.args.dtype)
        return self.checkpoint.load(self.args.dtype, device)

    @cached_property
    def prompts(self) -> CalibrationPrompts:
        """What `leank mask calibrate` reads."""
        args = self.args
        longest = longest_prompt(self.checkpoint, args.max_tokens, str(self.model.device))
        return calibration_prompts(
            self.checkpoint, None, self.window,
            max_tokens=longest, count=args.prompts, seed=args.seed,
        )  # fmt: skip

    @cached_property
    def measured(self) -> Measured:
        """What channels cost."""
        return measure(self.model, self.prompts, self.window, self.args.seed)

    def of_heads(self, way: str) -> dict[str, Any]:
        """What a way says of each head, from its file or found now."""
        path = self.args.out / f"heads_{way}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        start = time.monotonic()
        if way == FISHER:
            losses = head_losses(self.model, self.prompts.ids, self.window, seed=self.args.seed)
            values, detail = losses / losses.max(), {"prompts": self.prompts.provenance}
            scores = losses
        else:
            progress = self._optimised()
            scores, values = progress.scores(), progress.factors.double().cpu().numpy()
            detail = self._training() | {
                "losses": [round(loss, 6) for loss in progress.losses],
                "mean_alphas": [round(mean, 4) for mean in progress.means],
            }
        found = {
            "model": self.checkpoint.id,
            "by": BY[way],
            **detail,
            "seconds": round(time.monotonic() - start, 1),
            "scores": scores.tolist(),
        }
        lines = ("\t".join(f"{value:.9f}" for value in row) + "\n" for row in values.clip(0, 1))
        path.with_suffix(".tsv").write_text("".join(lines), encoding="utf-8")
        save_results(found, path)
        return found

    def _training(self) -> dict[str, Any]:
        args = self.args
        names = ("steps", "rate", "reg", "train_tokens")
        return {name: getattr(args, name) for name in names}

    def _optimised(self) -> Progress:
        args, start = self.args, time.monotonic()

        def on_step(progress: Progress) -> None:
            if progress.step % 20 == 0 or progress.step == args.steps:
                CONSOLE.print(
                    f"duo: step {progress.step}, loss {np.mean(progress.losses[-20:]):.5f}, mean "
                    f"alpha {progress.means[-1]:.3f}, {time.monotonic() - start:.0f} s"
                )

        low, high = args.train_tokens // 2, args.train_tokens
        source = passkey_samples(self.checkpoint, low, high, args.seed)
        return learned_alphas(
            self.model, source, self.window,
            steps=args.steps, rate=args.rate, reg=args.reg, on_step=on_step,
        )  # fmt: skip
