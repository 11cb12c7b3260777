"""The attention backend that users choose, as vLLM sees it."""

from typing import TYPE_CHECKING

from vllm_leank.core.pages import MAX_HEAD_DIM
from vllm_leank.serving.page_backends import PagesBackend
from vllm_leank.serving.vllm.draft_model import is_draft

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImpl


class LeanKBackend(PagesBackend):
    """`--attention-backend leank`: pruned archive and dense window.

    What cannot be served is refused by `checks` when vLLM's config is made; what vLLM asks here,
    per attention layer, gives the same answers.
    """

    @staticmethod
    def get_name() -> str:
        return "LEANK"

    @staticmethod
    def get_impl_cls() -> "type[AttentionImpl]":
        from vllm.config import get_current_vllm_config

        if is_draft(get_current_vllm_config()):
            from vllm_leank.serving.draft_impl import DraftImpl

            return DraftImpl
        from vllm_leank.serving.impl import LeanKImpl

        return LeanKImpl

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 32 == 0 and head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        """True: `vllm.prompt_lengths` switches it on, for the prompt lengths alone."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False
