"""What studies of the recall model share: how much it still answers with pruned far tokens.

Prompts are read with dense attention. Answer tokens read the keys from `sink` to their boundary in
the kept channels only; where a head keeps none, they do not see those keys. As in
`recall.evaluate`, an answer counts when all its tokens are the most likely ones.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from baselines.think import ThinK
from transformers import DynamicCache, LlamaForCausalLM

from recall.evaluate import BATCH_TOKENS
from recall.tasks import TASKS, make_sample
from vllm_leank.core.window import Window
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.simulate import SimulatedPruning

SEEDS = {"train": 1000, "eval": 0}
"""First seed of a split: calibration uses the first ones of `train`."""


def calibration_prompts(count: int = 24) -> list[list[int]]:
    """What masks are calibrated on: prompts with their answers, from the training split."""
    prompts = []
    for seed in range(count):
        task, length = list(TASKS)[seed % 4], (1024, 2048, 4096)[seed // 4 % 3]
        sample = make_sample(task, length, seed, "train")
        prompts.append(sample.prompt_token_ids + sample.answer_token_ids)
    return prompts


@torch.inference_mode()
def count_exact(
    model: LlamaForCausalLM,
    masks: Mapping[str, torch.Tensor | float | None],
    window: Window,
    cell: tuple[str, str, int],
    count: int,
) -> dict[str, int]:
    """Exact answers per mask of `count` samples of a cell: split, task, length.

    A mask is bool `[L, H, D]`, None for dense attention, or the ratio that ThinK prunes. The
    prompts are read once. Their first answer token needs no pruned key.
    """
    split, task, length = cell
    exact = dict.fromkeys(masks, 0)
    pruning, think = SimulatedPruning(window), ThinK()
    size = max(1, BATCH_TOKENS // length)
    seeds = range(SEEDS[split], SEEDS[split] + count)
    for first in range(0, count, size):
        samples = [make_sample(task, length, s, split) for s in seeds[first : first + size]]
        prompts = torch.tensor([s.prompt_token_ids for s in samples], device=model.device)
        answers = torch.tensor([s.answer_token_ids for s in samples], device=model.device)
        cache = DynamicCache()
        with hooked_attention(model, think):
            start = model(prompts, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        for name, mask in masks.items():
            pruning.keep = think.keep(mask) if isinstance(mask, float) else mask
            with hooked_attention(model, pruning):
                rest = model(answers[:, :-1], past_key_values=cache).logits.argmax(-1)
            cache.crop(1 - answers.shape[1])
            right = torch.cat([start, rest], dim=1) == answers
            exact[name] += int(right.all(1).sum())
    return exact


def kept_shares(keep: np.ndarray) -> dict[str, object]:
    """What a mask keeps: channels per head, share of K and of V."""
    counts = keep.sum(-1)
    return {
        "kept": counts.tolist(),
        "k_kept": round(float(keep.mean()), 4),
        "v_kept": round(float((counts > 0).mean()), 4),
    }


def report(cells: Iterable[dict[str, object]], names: Iterable[str]) -> None:
    """Print the accuracy of each mask in % over each row of cells."""
    for cell in cells:
        parts = (f"{name}: {100 * cell['exact'][name] / cell['n']:.1f}" for name in names)
        print(cell["split"], cell["task"], cell["length"], ", ".join(parts), flush=True)
