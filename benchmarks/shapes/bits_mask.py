"""Writes masks of random bits for a shape, to measure speed and memory with: no model is needed.

    python benchmarks/shapes/bits_mask.py benchmarks/shapes/llama-3.1-8b --bits 2 --out mask.yaml

Heads have profiles as calibration gives them, whose mean is the number of bits that is asked for.
"""

import argparse
from pathlib import Path

import numpy as np

from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.statistics import Statistics

PROFILES = {
    4: [{"k": {4: 1.0}, "v": {4: 1.0}}],
    2: [
        {"k": {4: 0.5, 2: 0.5}, "v": {2: 0.5}},
        {"k": {4: 0.25, 2: 0.5}, "v": {2: 1.0}},
        {"k": {2: 1.0}, "v": {2: 1.0}},
    ],
    1: [{"k": {2: 0.5}, "v": {2: 0.5}}, {"k": {4: 0.5}, "v": {}}, {"k": {2: 1.0}, "v": {}}],
}
"""Shares of a head's channels by class, heads in turn."""


def random_bits(checkpoint: Checkpoint, mean: int) -> Mask:
    """A mask of random bits, `mean` per number."""
    geometry = checkpoint.geometry
    rng = np.random.default_rng(0)
    shape = geometry.shape
    bits = {kind: np.zeros(shape, np.uint8) for kind in "kv"}
    for layer in range(shape[0]):
        for head in range(shape[1]):
            profile = PROFILES[mean][(layer + head) % len(PROFILES[mean])]
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
    parser.add_argument("--bits", type=int, choices=sorted(PROFILES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    mask = random_bits(Checkpoint.open(args.model), args.bits)
    save_mask(mask, args.out)
    print(f"{args.out}: {mask.bits:.2f} bits per number")


if __name__ == "__main__":
    main()
