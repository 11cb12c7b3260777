"""How long prompts may be, for the memory of GPUs."""

from collections.abc import Sequence

import torch

from vllm_leank.offline.verify.plan import COMPARED
from vllm_leank.offline.verify.reader import Reader

COPIES = 4
"""Copies of a layer's K and V in fp32 while what follows a prompt is compared."""

SCORES = 3
"""Attention scores of the compared tokens that exist at once."""

FREE = 0.8
"""Share of the free memory that may be counted on."""


def fitting(lengths: Sequence[int], reader: Reader) -> Sequence[int]:
    """The lengths, descending, that the model's GPUs have free memory for, layers being spread
    evenly over them; at least the last. All on a CPU.
    """
    devices = {weight.device for weight in reader.model.parameters()}
    if any(device.type != "cuda" for device in devices):
        return lengths
    free = FREE * sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    fits = [length for length in lengths if length * token_bytes(reader) <= free]
    return fits or lengths[-1:]


def token_bytes(reader: Reader) -> int:
    """Bytes of memory for each token of a prompt."""
    geometry, model = reader.geometry, reader.model
    numbers = 2 * geometry.num_kv_heads * geometry.head_dim
    contexts = 1 if reader.window.exact else 2
    cache = contexts * geometry.num_layers * numbers * model.dtype.itemsize
    scores = SCORES * COMPARED * model.config.get_text_config().num_attention_heads
    return cache + 4 * (COPIES * numbers + scores)
