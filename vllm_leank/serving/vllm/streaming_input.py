"""Refuses prompts that go on after their answer has begun. For vLLM 0.32 and 0.33.

Goes when a config flag tells of them, or when leank can serve them.
"""

import functools
from typing import Any

from vllm_leank.serving.vllm.backend_name import is_selected


def refuse_streaming_input() -> None:
    """Refuse, one by one, requests whose prompt goes on after its answer has begun (vLLM's
    streaming input): they turn answers, which read a pruned archive, into prompts.

    No config flag tells of them. Goes when one does, or when leank can serve them.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    if "_leank_hooked" in InputProcessor.__dict__:
        return
    process_inputs = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def process_whole_inputs(self: Any, *args: Any, resumable: bool = False, **kwargs: Any) -> Any:
        if resumable and is_selected(self.vllm_config):
            raise VLLMValidationError(
                "leank cannot serve streaming input: send the whole prompt in one request"
            )
        return process_inputs(self, *args, resumable=resumable, **kwargs)

    InputProcessor.process_inputs = process_whole_inputs
    InputProcessor._leank_hooked = True
