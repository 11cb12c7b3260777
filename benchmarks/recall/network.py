"""The network that is trained: a small Llama and the heads that only training needs."""

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from recall.tasks import GROUP
from recall.text import save_tokenizer
from recall.vocab import BOS, EOS, PAD, VOCAB_SIZE

CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    tie_word_embeddings=False,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
ORDINAL_LAYERS = (3, 4)
"""After this many layers the ordinal must be readable at `=`, and at the word that follows it."""


class Recall(torch.nn.Module):
    """The language model `lm`, fresh or read from `init`, and its temporary ordinal heads."""

    def __init__(self, init: str | None = None, compile_layers: bool = False):
        super().__init__()
        self.lm = (
            LlamaForCausalLM.from_pretrained(init, dtype=torch.float32)
            if init
            else LlamaForCausalLM(CONFIG)
        )
        self.ordinals = torch.nn.ModuleList(
            torch.nn.Linear(self.lm.config.hidden_size, GROUP) for _ in ORDINAL_LAYERS
        )
        if compile_layers:
            for layer in self.lm.model.layers:
                layer.compile(dynamic=True)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Logits `[n, vocab]` of the tokens to predict, and ordinal logits `[m, 4]` per head.

        `batch` holds the fields of `recall.stream.Batch`. The residual stream is bf16, as it will
        be when the model is served.
        """
        tokens = batch["tokens"]
        inner = self.lm.model
        x = inner.embed_tokens(tokens).to(torch.bfloat16)  # [B, L, hidden]
        rope = inner.rotary_emb(x, torch.arange(tokens.shape[1], device=tokens.device)[None])
        ordinals = []
        for depth, layer in enumerate(inner.layers, start=1):
            x = layer(x, attention_mask=None, position_embeddings=rope)
            if depth in ORDINAL_LAYERS:
                shift = len(ordinals)
                seen = x.flatten(0, 1)[batch["ordinal_source"] + shift]  # [m, hidden]
                ordinals.append(self.ordinals[shift](seen))
        answers = inner.norm(x).flatten(0, 1)[batch["source"]]  # [n, hidden]
        return self.lm.lm_head(answers), *ordinals

    def save(self, directory: str | Path, max_shard_size: str) -> None:
        """Write the language model in bf16, ready to serve, with its tokenizer."""
        bare = LlamaForCausalLM(self.lm.config).to(torch.bfloat16)
        bare.load_state_dict(self.lm.state_dict())
        bare.generation_config = GenerationConfig(
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
        )
        bare.save_pretrained(directory, max_shard_size=max_shard_size)
        save_tokenizer(directory, self.lm.config.max_position_embeddings)
