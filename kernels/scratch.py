"""Room for far tokens that are unpacked before many queries read them.

Queries of a prompt chunk read the same far tokens, and `extend` would unpack them again for every
few of them. So they are unpacked once, to plain K and V in pages that FlashAttention takes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.window import Window

SCRATCH_BYTES = 1 << 27
"""Most bytes of K and V: 32,768 tokens of 8 KV heads of 128 channels."""

PAGE_TOKENS = {64: 192, 96: 144, 128: 176, 256: 80}
"""Tokens of a page by the size of heads: those that FlashAttention 3 reads at once where no token
is masked, which it then does by its fastest way. Others read pages of any multiple of 16."""

OTHER_PAGE_TOKENS = 128

UNPACKED_QUERIES = 64
"""Queries of a request from which on far tokens are unpacked for all of them: for fewer, `extend`
unpacks them as it reads them."""

UNPACKED_TOKENS = 1024
"""Far tokens of a request from which on they are unpacked: `extend` reads fewer in less time than
more launches take."""


class Regions(NamedTuple):
    """How requests share the scratch.

    Attributes:
        requests: requests that have room at once.
        tokens: room of each; a multiple of a page.
    """

    requests: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Scratch:
    """Far tokens of some requests in one layer, as plain K and V. Layers use it in turn.

    What no token was unpacked to holds anything. FlashAttention reads whole pages, so those of a
    request are filled with zeros to their end; pages of blind heads are never written, and what was
    computed of them must not be read.

    Attributes:
        pages: `[2, num_kv_heads, tokens, head_dim]`, K and V, of the model's dtype.
        page: tokens of a page.
        results: `[most tokens of a step, num_heads, head_dim]`, for what queries find in a part of
            a context that has no room as a whole; None: none is so long.
    """

    pages: torch.Tensor
    page: int
    results: torch.Tensor | None

    @classmethod
    def allocate(
        cls,
        layout: CacheLayout,
        query_heads: int,
        far: int,
        step: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Scratch":
        """For contexts of at most `far` far tokens, or for parts of them.

        Args:
            layout: of any of the layers.
            query_heads: of a layer.
            far: most far tokens of a request.
            step: most tokens of a step.
            dtype: of the model.
            device: of the pages.
        """
        heads, head_dim = len(layout.profiles), layout.head_dim
        page = PAGE_TOKENS.get(head_dim, OTHER_PAGE_TOKENS)
        room = SCRATCH_BYTES // (2 * heads * head_dim * dtype.itemsize)
        tokens = min(max(room // page, 1), -(-far // page)) * page
        results = None
        if far > tokens:
            results = torch.empty((step, query_heads, head_dim), dtype=dtype, device=device)
        pages = torch.empty((2, heads, tokens, head_dim), dtype=dtype, device=device)
        return cls(pages, page, results)

    @property
    def key(self) -> torch.Tensor:
        """`[pages, page, num_kv_heads, head_dim]`."""
        return self._paged(0)

    @property
    def value(self) -> torch.Tensor:
        """Like `key`."""
        return self._paged(1)

    def _paged(self, kind: int) -> torch.Tensor:
        return self.pages[kind].unflatten(1, (-1, self.page)).permute(1, 2, 0, 3)

    def regions(self, requests: int, far: int) -> Regions:
        """How so many requests of at most `far` far tokens share it: as many of them at once as
        have room as a whole, or one, part by part.
        """
        tokens, needed = self.pages.shape[2], -(-far // self.page) * self.page
        if needed > tokens:
            return Regions(1, tokens)
        return Regions(min(requests, tokens // needed), needed)


def needs_scratch(layout: CacheLayout, window: Window, longest: int) -> bool:
    """Whether far tokens are ever unpacked for prompts: these are read pruned, may be long enough,
    and the format's tiles take work to read.

    Args:
        layout: of any of the layers.
        window: the dense window.
        longest: most tokens of a request.
    """
    far = window.boundary(longest) - window.sink
    if window.exact or not layout.variants or far < UNPACKED_TOKENS:
        return False
    return codec_of(layout.archive_format).tiles.unpack is not None
