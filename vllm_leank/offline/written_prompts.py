"""Text that a model writes itself from short openings: calibration without any data.

What a model writes is near to what it will read and write when it is served, in any language and
on any subject that it knows.
"""

from collections.abc import Sequence

import torch
import transformers

from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.builtin_prompts import ANSWER, Named
from vllm_leank.offline.prompts import Sample

OPENINGS: Sequence[str] = (
    "Chapter 1\n\n",
    "Il y a longtemps, dans un petit village,",
    "#include <stdio.h>\n\n",
    "Вчера вечером",
    "The history of",
    "从前有一个",
    "import React from 'react';\n\n",
    "En un lugar",
    "Theorem 1. Let",
    "Sehr geehrte Damen und Herren,\n\n",
    "use std::collections::HashMap;\n\n",
    "Q: ",
)
"""How texts begin: prose, code and letters in several languages."""


@torch.inference_mode()
def written_prompts(
    model: transformers.PreTrainedModel,
    checkpoint: Checkpoint,
    count: int,
    *,
    tokens: int,
    seed: int = 0,
) -> list[Named]:
    """`count` texts of `tokens` tokens, each drawn from the model's own distribution."""
    prompts: list[Named] = []
    for i in range(count):
        opening = checkpoint.encode(OPENINGS[i % len(OPENINGS)])
        # Drawing is seeded, and leaves other random numbers as they were.
        with torch.random.fork_rng():
            torch.manual_seed(seed + i)
            ids = model.generate(
                torch.tensor([opening], device=model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=tokens - len(opening),
                max_new_tokens=tokens - len(opening),
            )[0].tolist()
        prompts.append(("written", Sample(ids[:-ANSWER], ids[-ANSWER:])))
    return prompts
