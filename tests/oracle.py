"""The same model in transformers with a plain masked attention: what the engine has to agree with.

Written from the definition alone and sharing no code with the package, the boundary included, but
for how archive formats round:

* a query at position t < `exact_until` reads every key 0..t as it is;
* any other query reads keys `[0, sink)` and `[boundary(t + 1), t]` as they are, and the far keys
  between them only in the channels that the mask keeps, at unchanged scale. A KV head that keeps no
  channel does not see far keys at all: neither their score nor their V;
* what is read of far keys and their V was rounded as the archive's format does, by its codec. What
  that has to be for each format is tested beside the codecs, in `test_archive_pages.py`. Where
  codes depend on a mask's statistics, `archive_definition.py` says what they are.

Nothing is evicted and nothing is packed. All K and V stay dense, and what a query may read is
decided by its position each time it asks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import NATIVE, ArchiveFormat

GRANULE = 32
"""Tokens by which the boundary moves."""

Archive = Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]]

QUERY_CHUNK = 256
"""Queries scored at once: bounds the memory of a long sequence."""


def boundary(length: int, sink: int, recent: int) -> int:
    """First position after the far tokens, once `length` tokens are there.

    Starts at `sink` and moves up by whole steps as long as `recent` tokens stay behind it.
    """
    edge = sink
    while edge + GRANULE <= length - recent:
        edge += GRANULE
    return edge


@dataclass(frozen=True)
class Rule:
    """What decides which keys a query reads: `keep` is `[layers, KV heads, head_dim]`, bool.

    `archive` gives, of a layer's KV head and its K and V `[tokens, head_dim]`, what far tokens have
    of them; without one the codec of `archive_format` does.
    """

    keep: Tensor
    sink: int
    recent: int
    exact_until: int
    archive_format: ArchiveFormat = NATIVE
    archive: Archive | None = None


def visibility(queries: range, num_keys: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Two masks `[queries, num_keys]`: the keys read dense, and the far keys read pruned."""
    dense = torch.zeros(len(queries), num_keys, dtype=torch.bool, device=rule.keep.device)
    far = torch.zeros_like(dense)
    for row, t in enumerate(queries):
        dense[row, : t + 1] = True
        if t >= rule.exact_until:
            end = boundary(t + 1, rule.sink, rule.recent)
            far[row, rule.sink : end] = True
            dense[row, rule.sink : end] = False
    return dense, far


def archived(key: Tensor, value: Tensor, keep: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """K and V `[tokens, head_dim]` of one head as the archive gives them back, in the wider dtype:
    rounded from the sink on, and K 0 in channels that are not kept.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    far_key, far_value = (key * keep).to(dtype), value.to(dtype, copy=True)
    far = slice(rule.sink, None)
    if keep.any():
        bits = np.where(keep.cpu()[None], 16, 0).astype(np.uint8)
        (channels,) = layer_channels(bits, np.full_like(bits, 16)).to(key.device).heads
        rounded = codec_of(rule.archive_format).round(key[far], value[far], channels)
        far_key[far], far_value[far] = (part.to(dtype) for part in rounded)
    return far_key, far_value


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int, rule: Rule
) -> Tensor:
    """Attention of one layer and one sequence, computed in float32 or wider.

    `query` is `[query heads, T, head_dim]`, `key` and `value` are `[KV heads, S, head_dim]`; the
    queries stand at the last T of the S positions. Returns `[query heads, T, head_dim]`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[0] // key.shape[0]
    num_queries, num_keys = query.shape[1], key.shape[1]
    first = num_keys - num_queries
    output = torch.empty_like(query)
    heads = [archived(*head, rule) for head in zip(key, value, rule.keep[layer], strict=True)]
    if rule.archive is not None:
        pairs = enumerate(zip(key, value, strict=True))
        heads = [rule.archive(layer, head, *pair) for head, pair in pairs]
        heads = [tuple(part.to(dtype) for part in pair) for pair in heads]
    for start in range(0, num_queries, QUERY_CHUNK):
        rows = range(start, min(start + QUERY_CHUNK, num_queries))
        positions = range(first + rows.start, first + rows.stop)
        dense, far = visibility(positions, num_keys, rule)
        for kv_head in range(key.shape[0]):
            keep = rule.keep[layer, kv_head]
            k, v = key[kv_head].to(dtype), value[kv_head].to(dtype)
            k_pruned, v_far = heads[kv_head]
            hidden = ~dense if not keep.any() else ~(dense | far)
            for head in range(kv_head * group, (kv_head + 1) * group):
                q = query[head, rows.start : rows.stop].to(dtype)
                scores = torch.where(far, q @ k_pruned.T, q @ k.T) * scaling
                weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
                attended = (weights * ~far) @ v + (weights * far) @ v_far
                output[head, rows.start : rows.stop] = attended
    return output


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    oracle_rule: Rule,
    **_: Any,
) -> tuple[Tensor, None]:
    """Adapt `masked_attention` to transformers: batch of one, heads before tokens in, after out."""
    # No mask function goes with this attention, so transformers leaves masking to it.
    assert attention_mask is None
    assert query.shape[0] == 1
    output = masked_attention(query[0], key[0], value[0], scaling, module.layer_idx, oracle_rule)
    return output.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register("leank_oracle", _attention)


class Oracle:
    """Logits and greedy tokens of a model whose far tokens are pruned by a mask.

    Args:
        model: a directory that transformers loads, or a loaded causal LM. Outside the calls a
            loaded model keeps its own attention.
        keep: bool, `[layers, KV heads, head_dim]`: the K channels that far tokens keep.
        sink: first tokens that stay dense.
        recent: least number of last tokens that stay dense.
        dtype: of weights, activations and cache.
        archive_format: how far tokens are stored.
        archive: see `Rule`.
        device: where it computes; results are on the host.

    Raises:
        ValueError: if the shape of `keep` is not the model's, or no token would stay dense.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        keep: np.ndarray,
        sink: int,
        recent: int,
        dtype: torch.dtype = torch.float32,
        archive_format: ArchiveFormat = NATIVE,
        archive: Archive | None = None,
        device: str = "cpu",
    ) -> None:
        if isinstance(model, (str, Path)):
            model = AutoModelForCausalLM.from_pretrained(model)
        self.model: PreTrainedModel = model.to(device, dtype).eval()
        config = model.config
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        shape = (config.num_hidden_layers, config.num_key_value_heads, head_dim)
        if keep.shape != shape:
            raise ValueError(f"keep has shape {keep.shape}, the model needs {shape}")
        if sink + recent < 1:
            raise ValueError("sink and recent are both 0: a query needs one dense token")
        self.keep = torch.from_numpy(keep.astype(bool)).to(device)
        self.sink = sink
        self.recent = recent
        self.archive_format, self.archive = archive_format, archive

    def logits(self, token_ids: Sequence[int], exact_until: int) -> Tensor:
        """Next-token logits at every position, `[T, vocabulary]` in float32 (one forward)."""
        return self._forward(token_ids, self._rule(exact_until))

    def position_logprobs(self, token_ids: Sequence[int], exact_until: int) -> Tensor:
        """Log-probability of every token but the first, `[T - 1]`: entry i is of token i + 1."""
        logprobs = self.logits(token_ids, exact_until)[:-1].log_softmax(dim=-1)
        return logprobs.gather(1, torch.tensor(token_ids[1:]).unsqueeze(1)).squeeze(1)

    def greedy(
        self, prompt_ids: Sequence[int], num_tokens: int, exact_until: int | None = None
    ) -> tuple[list[int], Tensor]:
        """Continue a prompt with the most likely token, `num_tokens` times.

        `exact_until` is the length of the prompt unless given. Returns the new tokens and the
        logits `[num_tokens, vocabulary]` they were taken from. The cache holds dense K and V.
        """
        rule = self._rule(len(prompt_ids) if exact_until is None else exact_until)
        cache = DynamicCache()
        tokens: list[int] = []
        rows: list[Tensor] = []
        feed = list(prompt_ids)
        for _ in range(num_tokens):
            rows.append(self._forward(feed, rule, cache)[-1])
            tokens.append(int(rows[-1].argmax()))
            feed = tokens[-1:]
        return tokens, torch.stack(rows)

    def _rule(self, exact_until: int) -> Rule:
        return Rule(
            self.keep, self.sink, self.recent, exact_until, self.archive_format, self.archive
        )

    @torch.inference_mode()
    def _forward(self, token_ids: Sequence[int], rule: Rule, cache: Any = None) -> Tensor:
        with _attention_of(self.model, "leank_oracle"):
            output = self.model(
                torch.tensor([list(token_ids)], device=self.keep.device),
                past_key_values=cache,
                use_cache=cache is not None,
                oracle_rule=rule,
            )
        logits: Tensor = output.logits[0].float().cpu()
        return logits


@contextmanager
def _attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model use the named attention, and the one it had afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
