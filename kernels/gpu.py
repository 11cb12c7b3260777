"""What a step on a GPU launches."""

from vllm_leank.kernels.decode_each import decode_each, decode_requests
from vllm_leank.kernels.extend import extend, piece_queries
from vllm_leank.kernels.merge import merge
from vllm_leank.kernels.store import compact, store, update
from vllm_leank.kernels.unpack import unpack

__all__ = [
    "compact",
    "decode_each",
    "decode_requests",
    "extend",
    "merge",
    "piece_queries",
    "store",
    "unpack",
    "update",
]
