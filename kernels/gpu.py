"""What a step on a GPU launches."""

from vllm_leank.kernels.decode import decode
from vllm_leank.kernels.extend import extend
from vllm_leank.kernels.store import compact, store, update

__all__ = ["compact", "decode", "extend", "store", "update"]
