"""Cache specs of the two groups: how vLLM sizes, places and counts archive and window pages."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_leank.core.pages import pages
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.window import Window

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class LeanKSpec(FullAttentionSpec):
    """What the specs of both groups share: the window rule, and merging that keeps it.

    `FullAttentionSpec.merge` would rebuild the spec from its own fields alone.
    """

    exact: ClassVar[bool] = True
    sink: int
    recent: int

    @property
    def window(self) -> Window:
        """The dense window."""
        return Window(self.sink, self.recent, self.exact)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The one spec that all layers of a group share.

        Raises:
            AssertionError: the specs differ (vLLM takes this for a "no").
        """
        assert all(spec == specs[0] for spec in specs), "leank specs of one group differ"
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class ArchiveSpec(LeanKSpec):
    """Pages of pruned tokens. A request needs them for its archived tokens only. They need no slot
    mapping: compaction writes them from the block table.
    """

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Bytes of one request of `max_model_len` tokens."""
        tokens = self.window.archived(vllm_config.model_config.max_model_len)
        return pages(tokens, self.block_size) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class WindowSpec(LeanKSpec):
    """Pages of dense tokens, all heads. During prefill they hold the whole prompt, so a request of
    `max_model_len` tokens is counted in full (`FullAttentionSpec.max_memory_usage_bytes`).
    """


@dataclass(frozen=True, kw_only=True)
class PrunedArchiveSpec(ArchiveSpec):
    """The archive where prompts are read pruned."""

    exact: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class PrunedWindowSpec(WindowSpec):
    """The window where prompts are read pruned: a prompt's pages are freed while it is computed.

    `in_flight` tokens, at most, are scheduled and not yet computed; archive pages have
    `archive_block` tokens.
    """

    exact: ClassVar[bool] = False
    in_flight: int
    archive_block: int

    def most_blocks(self, length: int) -> int:
        """Blocks that a request of `length` tokens holds at most."""
        return pages(self.window.most_dense(length, self.in_flight), self.block_size)

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Bytes of one request of `max_model_len` tokens."""
        return self.most_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes


def archive_spec(plan: CachePlan, window: Window, dtype: torch.dtype) -> ArchiveSpec:
    """Spec of a stage's archive, for a model of this dtype.

    Beside sliding layers it says that it holds bytes: vLLM then zeroes blocks when they are given
    to other layers, which must not take codes for numbers.
    """
    if plan.sliding is not None:
        dtype = torch.uint8
    spec = ArchiveSpec if window.exact else PrunedArchiveSpec
    return spec(
        num_kv_heads=len(plan.rank_heads()),
        head_size=plan.head_dim,
        head_size_v=plan.head_dim,
        dtype=dtype,
        sink=window.sink,
        recent=window.recent,
        block_size=plan.archive_block,
        num_head_slots=1,
        state_content_bytes=plan.stage_token_bytes,
    )


def window_spec(
    base: FullAttentionSpec, plan: CachePlan, window: Window, in_flight: int
) -> WindowSpec:
    """Spec of a layer's window; vLLM computes `in_flight` tokens of a request at once, at most."""
    fields: dict[str, Any] = {
        "num_kv_heads": base.num_kv_heads,
        "head_size": base.head_size,
        "head_size_v": base.head_size_v,
        "dtype": base.dtype,
        "sink": window.sink,
        "recent": window.recent,
        "block_size": plan.window_block,
    }
    if window.exact:
        return WindowSpec(**fields)
    return PrunedWindowSpec(**fields, in_flight=in_flight, archive_block=plan.archive_block)
