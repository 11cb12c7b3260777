"""Texts that archives are judged on: of the kinds that calibration sees, and of others."""

from collections.abc import Mapping

from real.unseen_texts import unseen_prompts
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.builtin_prompts import Named, builtin_prompts

SEEN, UNSEEN = "kinds seen", "kinds unseen"


def judged_samples(
    checkpoint: Checkpoint,
    texts: Mapping[str, str],
    length: int,
    seen: int,
    unseen: int,
    seed: int,
) -> tuple[list[tuple[str, Named]], list[str]]:
    """Samples of one length, with the groups of their kinds: `seen` of kinds that calibration sees,
    and `unseen` of each kind of `texts`. Also says which kinds are left out, a sentence each.
    """
    samples = [
        (SEEN, named)
        for named in builtin_prompts(
            checkpoint, seen, min_tokens=length, max_tokens=length, seed=seed, held_out=True
        )
    ]
    left_out = []
    for kind, text in texts.items():
        found = unseen_prompts(checkpoint, kind, text, unseen, length, seed)
        if not found:
            left_out.append(f"{kind}: no text of {length:,} tokens here, left out")
        samples += [(UNSEEN, named) for named in found]
    return samples, left_out
