"""Streaming heads as DuoAttention finds them (arXiv 2410.10819), for masks to be compared with.

Each KV head has one number, alpha, from 0 to 1. Its output is `alpha * full + (1 - alpha) *
streaming`, where streaming attention reads sink and recent tokens alone. Alphas begin at 1 and are
learned by distillation: the final hidden states of answers shall stay those of full attention,
while a regulariser pulls all alphas down. Weights are frozen, and the samples ask for passkeys that
stand somewhere in a long text. Heads whose alphas end lowest are the streaming ones.

Written from the paper. What differs: prompts are read with full attention, as they are when a mask
is served, so alphas mix the answer's queries alone; and losses are means, of squares over tokens
and channels and of alphas over heads.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.learn.data import Source
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.stages import Progress, Stage, run_stage
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.local_texts import Texts, prose
from vllm_leank.offline.needles import Generated
from vllm_leank.offline.tasks import NOISE, PLACES, Exercise, essay_pieces

STEPS, RATE, REG = 2000, 0.02, 0.05
"""The paper's: steps, learning rate and weight of the regulariser."""

KEYS, WORDS = 10, 16
"""Passkeys of a sample, and words of each."""

TEXT = 1 << 20
"""Characters of prose that passkeys stand in."""


class Mixer(Distiller):
    """A distiller whose factors, fp32 `[L, H]`, are the alphas of heads."""

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        factors: torch.Tensor | None,
        blind: torch.Tensor | None,
        scaling: float | None,
        sink_scores: torch.Tensor | None,
    ) -> torch.Tensor:
        """Full attention `[1, T, num_heads, D]`, with `factors` mixed with streaming attention."""

        def attend(blind: torch.Tensor | None) -> torch.Tensor:
            rest = (None, blind, scaling, sink_scores)
            return super(Mixer, self).attention(layer, query.float(), keys, values, *rest)

        full = attend(None)
        if factors is not None:
            streaming = attend(torch.ones(len(factors), dtype=torch.bool, device=query.device))
            alpha = factors.repeat_interleave(query.shape[1] // len(factors))[:, None]
            full = alpha * full + (1 - alpha) * streaming
        return full.to(query.dtype)


def learned_alphas(
    model: transformers.PreTrainedModel,
    source: Source,
    window: Window,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    reg: float = REG,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Alphas of a model's heads; `Progress.scores` ranks those that end alike as well. Freezes the
    model's weights, and calls `on_step` after each step.

    Raises:
        UserError: the model's attention cannot be changed, or a loss is not finite.
    """
    L, H, _ = Geometry.from_hf_config(model.config).shape
    progress = Progress.start(torch.ones(L, H, device=model.device))
    stage = Stage(steps, rate, reg)
    run_stage(stage, progress, Mixer(model, window), source, on_step=lambda: on_step(progress))
    return progress


def passkey_samples(
    checkpoint: Checkpoint, min_tokens: int, max_tokens: int, seed: int = 0
) -> Source:
    """Passkeys within prose of this machine, as samples of a number of tokens."""
    pieces, text = Texts(prose(), held_out=False), ""
    if len(pieces):
        documents = pieces.pieces(np.random.default_rng(seed))
        while len(text) < TEXT:
            text += next(documents)
    filler = essay_pieces(text) or list(NOISE)
    return Generated(
        (lambda rng, size: passkeys(rng, size, filler),),
        checkpoint.encode,
        checkpoint.encode_rest,
        min_tokens,
        max_tokens,
        seed,
    )


def passkeys(rng: np.random.Generator, size: int, filler: Sequence[str]) -> Exercise:
    """`size` pieces of filler, from a random one on, among them passkeys, all asked for."""
    keys = [", ".join(map(str, rng.choice(PLACES, WORDS))) for _ in range(KEYS)]
    start = int(rng.integers(len(filler)))
    pieces = [filler[(start + i) % len(filler)] for i in range(size)]
    places = np.sort(rng.integers(size + 1, size=KEYS))
    for number in reversed(range(KEYS)):
        pieces.insert(places[number], f"Passkey {number + 1} is: {keys[number]}. ")
    answer = "".join(f" Passkey {i + 1} is: {key}." for i, key in enumerate(keys))
    return Exercise("".join(pieces).rstrip() + "\n\nAll passkeys of this text, in order:", answer)
