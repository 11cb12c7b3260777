"""What of a request the prefix cache may find again. For vLLM 0.32 and 0.33.

Goes when a cache spec can say that some of its tokens are not to be found.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


def limit_block_hashes(request: "Request", count: int) -> None:
    """Keep the first `count` block hashes of a request, and have it make no more.

    They are what vLLM looks up in the prefix cache when a preempted request starts again, with the
    tokens it has generated. Goes when a cache spec can say that these are not to be found.
    """
    assert hasattr(request, "_block_hasher"), "vLLM renamed Request._block_hasher"
    request._block_hasher = None
    del request.block_hashes[count:]
