"""What tells one model from another, by its weights and config."""

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import transformers

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by the bytes of a number."""

_OF_THE_PLACE = "_name_or_path", "transformers_version"
"""What a config has that says nothing of the model."""


def fingerprint(model: "transformers.PreTrainedModel") -> str:
    """A sha256 of a model's config and of the sums of its weights' bits. These are whole numbers,
    so that every device and order of adding finds the same.
    """
    config = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in _OF_THE_PLACE
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weights in sorted(model.state_dict().items()):
        total = weights.contiguous().view(_BITS[weights.element_size()]).sum(dtype=torch.int64)
        digest.update(f"{name} {tuple(weights.shape)} {int(total)}\n".encode())
    return digest.hexdigest()
