"""The loss of LeanK in its plain form: the whole sample runs twice, with gradients the second time.

What `vllm_leank.learn.distillation` computes with one pass over the context. Its gradients and its
time are compared with this one's.
"""

import torch
from transformers import PreTrainedModel

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.context import Context
from vllm_leank.offline.far_attention import far_attention
from vllm_leank.offline.plain_attention import plain_attention
from vllm_leank.offline.prompts import Sample


def two_pass_loss(
    model: PreTrainedModel,
    window: Window,
    sample: Sample,
    factors: torch.Tensor,
    blind: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared difference of the answer's final hidden states, as `Distiller.loss` computes it."""
    prompt, answer = len(sample.prompt), len(sample.answer)
    empty = Context(Geometry.from_hf_config(model.config))
    tokens = torch.tensor([sample.prompt + sample.answer], device=model.device)

    def teacher(layer, query, key, value, attention_mask, scaling, sink_scores):
        return plain_attention(query, key, value, None, scaling, sink_scores)

    def student(layer, query, key, value, attention_mask, scaling, sink_scores):
        read = (part[:, :, :prompt] for part in (query, key, value))
        scaled = far_attention(
            query[:, :, prompt:],
            [key],
            [value],
            window,
            factors[layer],
            None if blind is None else blind[layer],
            scaling,
            sink_scores,
        )
        full = plain_attention(*read, None, scaling, sink_scores)
        return torch.cat([full, scaled], dim=1)

    hidden = []
    for hook, grad in ((teacher, False), (student, True)):
        with torch.set_grad_enabled(grad), hooked_attention(model, hook, context=empty):
            output = model.base_model(input_ids=tokens, use_cache=False)
        hidden.append(output.last_hidden_state[:, -answer:].float())
    return (hidden[1] - hidden[0]).square().mean()
