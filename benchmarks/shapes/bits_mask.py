"""Writes masks of random bits for a shape, to measure speed and memory with: no model is needed.

    python benchmarks/shapes/bits_mask.py benchmarks/shapes/llama-3.1-8b --bits 2 --out mask.yaml

Heads have profiles whose mean is the number of bits that is asked for, or those of a mask that was
calibrated for a model with heads of the same size.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.statistics import Statistics

Shares = Mapping[str, Mapping[int, float]]
"""Of a head's channels of K and of V that have so many bits."""

PROFILES: dict[int, list[Shares]] = {
    4: [{"k": {4: 1.0}, "v": {4: 1.0}}],
    2: [
        {"k": {4: 0.5, 2: 0.5}, "v": {2: 0.5}},
        {"k": {4: 0.25, 2: 0.5}, "v": {2: 1.0}},
        {"k": {2: 1.0}, "v": {2: 1.0}},
    ],
    1: [{"k": {2: 0.5}, "v": {2: 0.5}}, {"k": {4: 0.5}, "v": {}}, {"k": {2: 1.0}, "v": {}}],
}
"""Heads in turn, by the mean of bits."""


def profiles_of(mask: Mask) -> list[Shares]:
    """The profiles of a mask's heads in turn, each as often as the mask has it."""
    bits = {"k": mask.k_bits, "v": mask.v_bits}
    return [
        {
            kind: {one: float((of[place] == one).mean()) for one in (8, 4, 2)}
            for kind, of in bits.items()
        }
        for place in np.ndindex(mask.k_bits.shape[:2])
    ]


def random_bits(checkpoint: Checkpoint, mean: int) -> Mask:
    """A mask of random bits, `mean` per number."""
    return random_mask(checkpoint, PROFILES[mean])


def random_mask(checkpoint: Checkpoint, profiles: Sequence[Shares]) -> Mask:
    """A mask of random bits whose heads have these profiles in turn."""
    geometry = checkpoint.geometry
    rng = np.random.default_rng(0)
    shape = geometry.shape
    bits = {kind: np.zeros(shape, np.uint8) for kind in "kv"}
    for layer in range(shape[0]):
        for head in range(shape[1]):
            profile = profiles[(layer + head) % len(profiles)]
            for kind in "kv":
                order, first = rng.permutation(shape[2]), 0
                for one, share in profile[kind].items():
                    count = int(share * shape[2])
                    bits[kind][layer, head, order[first : first + count]] = one
                    first += count

    def numbers(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, shape).astype(np.float16)

    means = numbers(-0.3, 0.3), numbers(-0.3, 0.3)
    statistics = Statistics(means[0], numbers(0.5, 1.5), means[1], numbers(0.5, 1.5))
    return Mask.from_bits(
        bits["k"],
        bits["v"],
        geometry,
        model=checkpoint.id,
        provenance={"method": "random bits"},
        statistics=statistics,
        sink=128,
        recent=768,
    )


def main() -> None:
    """Write the mask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--bits", type=int, choices=sorted(PROFILES))
    which.add_argument("--like", type=Path, help="mask of bits whose heads' profiles are taken")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    profiles = PROFILES[args.bits] if args.bits else profiles_of(load_mask(args.like))
    mask = random_mask(Checkpoint.open(args.model), profiles)
    save_mask(mask, args.out)
    print(f"{args.out}: {mask.bits:.2f} bits per number")


if __name__ == "__main__":
    main()
