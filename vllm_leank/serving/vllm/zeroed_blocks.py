"""New blocks of sliding layers are zeroed on CPU, too. For vLLM 0.32 and 0.33.

Goes when `CPUModelRunner._zero_block_ids` zeroes the blocks of all attention layers, as the GPU's
runner does.
"""

import functools
from typing import Any

from vllm_leank.serving.vllm.backend_name import is_selected


def zero_sliding_blocks() -> None:
    """Have vLLM's CPU runner zero the blocks that its scheduler names in sliding layers: it does so
    in layers with full attention alone.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if "_leank_hooked" in CPUModelRunner.__dict__:
        return
    zero = CPUModelRunner._zero_block_ids

    @functools.wraps(zero)
    def zero_block_ids(self: Any, block_ids: list[int]) -> None:
        zero(self, block_ids)
        if not is_selected(self.vllm_config):
            return
        for layer in self.compilation_config.static_forward_context.values():
            if getattr(layer, "sliding_window", None):
                layer.kv_cache[block_ids] = 0

    CPUModelRunner._zero_block_ids = zero_block_ids
    CPUModelRunner._leank_hooked = True
