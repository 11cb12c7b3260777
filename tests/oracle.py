"""The same model in transformers with a plain masked attention: what the engine has to agree with.

Written from the definition alone and sharing no code with the package, the boundary included, but
for how archive formats round:

* a query at position t < `exact_until` reads every key 0..t as it is;
* any other query reads keys `[0, sink)` and `[boundary(t + 1), t]` as they are, and the far keys
  between them only in the channels that the mask keeps, at unchanged scale. A KV head that keeps no
  channel does not see far keys at all: neither their score nor their V;
* layers with another attention than full, by the model's config, slide: queries read the last keys;
  what is no attention stays what it is;
* where segments are selected, a far key is read if its segment of 64 tokens is among the best;
  as many as `Selection` says;
* an attention sink of a query head is one more score of each query, to which no V belongs;
* what is read of far keys and their V was rounded as the archive's format does, by its codec: also
  what stands for channels that are not stored, if the mask has statistics. What that has to be for
  each format is tested beside the codecs, in `test_archive_pages.py` and `test_packed_codes.py`.

Nothing is evicted and nothing is packed. All K and V stay dense, and what a query may read is
decided by its position each time it asks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from vllm_leank.kernels.channels import HeadChannels, layer_channels
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import NATIVE, ArchiveFormat
from vllm_leank.core.selection import Selection
from vllm_leank.mask.mask import Mask

FULL = ("full_attention", "hybrid")
"""Kinds of layers that a mask is for; hybrid ones keep a state as well."""

GRANULE = 32
"""Tokens by which the boundary moves."""

SEGMENT = 64
"""Far tokens that are selected together, by their positions."""

DENSE_LAYERS = 2
"""First layers that read all far tokens."""

QUERY_CHUNK = 256
"""Queries scored at once: bounds the memory of a long sequence."""

NO_SINK = torch.tensor(float("-inf"))
"""What a model without attention sinks has for one."""


def boundary(length: int, sink: int, recent: int) -> int:
    """First position after the far tokens, once `length` tokens are there.

    Starts at `sink` and moves up by whole steps as long as `recent` tokens stay behind it.
    """
    edge = sink
    while edge + GRANULE <= length - recent:
        edge += GRANULE
    return edge


Heads = dict[int, tuple[HeadChannels, ...]]


def full_layers(config: Any) -> list[int]:
    """Layers with full attention, which a mask is for."""
    kinds = getattr(config, "layer_types", None)
    layers = range(config.num_hidden_layers)
    return [layer for layer in layers if kinds is None or kinds[layer] in FULL]


def heads_of(
    mask: Mask | np.ndarray, layers: Sequence[int], device: torch.device | str = "cpu"
) -> Heads:
    """KV heads of the model's `layers`, which the mask has in this order: a mask, or
    `[layers, KV heads, head_dim]` bool that says which channels of K are kept, in 16 bits and with
    all of V; such heads know no means.
    """
    if isinstance(mask, Mask):
        heads = range(mask.geometry.num_kv_heads)
        of_mask = [mask.layer(index, heads) for index in range(len(layers))]
    else:
        k_bits = np.where(mask, 16, 0).astype(np.uint8)
        stores = mask.any(-1, keepdims=True)
        v_bits = np.broadcast_to(np.where(stores, 16, 0), mask.shape).astype(np.uint8)
        of_mask = list(zip(k_bits, v_bits, strict=True))
    return {
        layer: layer_channels(*channels).to(device).heads
        for layer, channels in zip(layers, of_mask, strict=True)
    }


@dataclass(frozen=True)
class Rule:
    """What decides which keys a query reads, and what it reads of far ones: `heads` are those of
    `heads_of`.
    """

    heads: Heads
    sink: int
    recent: int
    exact_until: int
    archive_format: ArchiveFormat = NATIVE
    selection: Selection | None = None


def visibility(
    queries: range, num_keys: int, rule: Rule, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Two masks `[queries, num_keys]`: the keys read dense, and the far keys read pruned."""
    dense = torch.zeros(len(queries), num_keys, dtype=torch.bool, device=device)
    far = torch.zeros_like(dense)
    for row, t in enumerate(queries):
        dense[row, : t + 1] = True
        if t >= rule.exact_until:
            end = boundary(t + 1, rule.sink, rule.recent)
            far[row, rule.sink : end] = True
            dense[row, rule.sink : end] = False
    return dense, far


def archived(key: Tensor, value: Tensor, head: HeadChannels, rule: Rule) -> tuple[Tensor, Tensor]:
    """K and V `[tokens, head_dim]` of one head as the archive gives them back, in the wider dtype:
    rounded from the sink on.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    far_key, far_value = key.to(dtype, copy=True), value.to(dtype, copy=True)
    if head.profile.stores and len(key) > rule.sink:
        rounded = codec_of(rule.archive_format).round(key[rule.sink :], value[rule.sink :], head)
        far_key[rule.sink :], far_value[rule.sink :] = (part.to(dtype) for part in rounded)
    return far_key, far_value


def selected(
    queries: Tensor, key: Tensor, far: Tensor, kv_head: int, layer: int, rule: Rule
) -> Tensor:
    """Which of the far keys `far`, `[queries, keys]`, are read: those of the segments of 64 tokens
    in which some query head comes closest to its own best: the best product of the first field's
    channels. `queries` are `[group, queries, head_dim]`, `key` is `[keys, head_dim]` as read back.
    """
    head = rule.heads[layer][kv_head]
    if not head.profile.kept:
        return far
    lead = head.k.order[: rule.archive_format.lead(head.profile)]
    products = queries.to(key)[..., lead] @ key[:, lead].T
    chosen = torch.zeros_like(far)
    for row, of_heads in enumerate(products.transpose(0, 1)):
        tokens = far[row].nonzero()[:, 0].tolist()
        if not tokens:
            continue
        behind = of_heads - of_heads[:, tokens].amax(-1, keepdim=True)
        best: dict[int, float] = {}
        for token, score in zip(tokens, behind.amax(0)[tokens].tolist(), strict=True):
            best[token // SEGMENT] = max(score, best.get(token // SEGMENT, score))
        # Scores that differ by less than a 65,535th of their range are alike.
        least, most = min(best.values()), max(best.values())
        unit = max(most - least, 1e-30) / 65535
        ranked = sorted(best, key=lambda segment: (-((best[segment] - least) // unit), segment))
        for segment in ranked[: rule.selection.count(len(best))]:
            chosen[row, segment * SEGMENT : (segment + 1) * SEGMENT] = True
    return far & chosen


def softmax(scores: Tensor, sinks: Tensor) -> Tensor:
    """Weights of keys, `[..., heads, T, S]`; `sinks` are `[heads]`, `-inf` where there is none."""
    column = sinks.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((column, scores), dim=-1).softmax(dim=-1)[..., 1:]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    layer: int,
    rule: Rule,
    sinks: Tensor = NO_SINK,
) -> Tensor:
    """Attention of one layer and one sequence, computed in float32 or wider.

    `query` is `[query heads, T, head_dim]`, `key` and `value` are `[KV heads, S, head_dim]`; the
    queries stand at the last T of the S positions; `sinks` are `[query heads]`. Returns
    `[query heads, T, head_dim]`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[0] // key.shape[0]
    num_queries, num_keys = query.shape[1], key.shape[1]
    first = num_keys - num_queries
    output = torch.empty_like(query)
    heads = rule.heads[layer]
    sinks = sinks.expand(len(query))
    read_back = [archived(*head, rule) for head in zip(key, value, heads, strict=True)]
    for start in range(0, num_queries, QUERY_CHUNK):
        rows = range(start, min(start + QUERY_CHUNK, num_queries))
        positions = range(first + rows.start, first + rows.stop)
        dense, far_of_all = visibility(positions, num_keys, rule, key.device)
        for kv_head in range(key.shape[0]):
            k, v = key[kv_head].to(dtype), value[kv_head].to(dtype)
            k_pruned, v_far = read_back[kv_head]
            far = far_of_all
            if rule.selection is not None and layer in list(rule.heads)[DENSE_LAYERS:]:
                group_queries = query[
                    kv_head * group : (kv_head + 1) * group, rows.start : rows.stop
                ]
                far = selected(group_queries, k_pruned, far, kv_head, layer, rule)
            hidden = ~(dense | far) if heads[kv_head].profile.stores else ~dense
            for head in range(kv_head * group, (kv_head + 1) * group):
                q = query[head, rows.start : rows.stop].to(dtype)
                scores = torch.where(far, q @ k_pruned.T, q @ k.T) * scaling
                scores = scores.masked_fill(hidden, float("-inf"))
                weights = softmax(scores[None], sinks[head : head + 1])[0]
                attended = (weights * ~far) @ v + (weights * far) @ v_far
                output[head, rows.start : rows.stop] = attended
    return output


def sliding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int,
    sinks: Tensor = NO_SINK,
) -> Tensor:
    """Attention of one sequence, each query over the last `window` keys; shapes as above."""
    group = query.shape[0] // key.shape[0]
    num_queries, num_keys = query.shape[1], key.shape[1]
    position = torch.arange(num_keys, device=key.device)
    age = position[num_keys - num_queries :, None] - position
    hidden = (age < 0) | (age >= window)
    scores = query.float() @ key.float().repeat_interleave(group, 0).transpose(1, 2) * scaling
    weights = softmax(scores.masked_fill(hidden, float("-inf")), sinks.expand(len(query)))
    return (weights @ value.float().repeat_interleave(group, 0)).to(query.dtype)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    oracle_rule: Rule,
    sliding_window: int | None = None,
    s_aux: Tensor = NO_SINK,
    **_: Any,
) -> tuple[Tensor, None]:
    """Adapt `masked_attention` to transformers: batch of one, heads before tokens in, after out."""
    # No mask function goes with this attention, so transformers leaves masking to it.
    assert attention_mask is None
    assert query.shape[0] == 1
    if module.layer_idx in oracle_rule.heads:
        output = masked_attention(
            query[0], key[0], value[0], scaling, module.layer_idx, oracle_rule, s_aux
        )
    else:
        output = sliding_attention(query[0], key[0], value[0], scaling, sliding_window, s_aux)
    return output.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register("leank_oracle", _attention)


class Oracle:
    """Logits and greedy tokens of a model whose far tokens are pruned by a mask.

    Args:
        model: a directory that transformers loads, or a loaded causal LM. Outside the calls a
            loaded model keeps its own attention.
        mask: what far tokens keep; see `heads_of`.
        sink: first tokens that stay dense.
        recent: least number of last tokens that stay dense.
        dtype: of weights, activations and cache.
        archive_format: how far tokens are stored.
        selection: how many segments of far tokens queries read; None: all.
        device: where it computes; results are on the host.

    Raises:
        ValueError: if the shape of `mask` is not the model's, or no token would stay dense.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        mask: Mask | np.ndarray,
        sink: int,
        recent: int,
        dtype: torch.dtype = torch.float32,
        archive_format: ArchiveFormat = NATIVE,
        selection: Selection | None = None,
        device: str = "cpu",
    ) -> None:
        if isinstance(model, (str, Path)):
            model = AutoModelForCausalLM.from_pretrained(model)
        self.model: PreTrainedModel = model.to(device, dtype).eval()
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        layers = full_layers(config)
        shape = (len(layers), config.num_key_value_heads, head_dim)
        given = mask.k_bits.shape if isinstance(mask, Mask) else mask.shape
        if given != shape:
            raise ValueError(f"the mask has shape {given}, the model needs {shape}")
        if sink + recent < 1:
            raise ValueError("sink and recent are both 0: a query needs one dense token")
        self.heads = heads_of(mask, layers, device)
        self.device = device
        self.sink = sink
        self.recent = recent
        self.archive_format = archive_format
        self.selection = selection

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
            self.heads, self.sink, self.recent, exact_until, self.archive_format, self.selection
        )

    @torch.inference_mode()
    def _forward(self, token_ids: Sequence[int], rule: Rule, cache: Any = None) -> Tensor:
        with _attention_of(self.model, "leank_oracle"):
            output = self.model(
                torch.tensor([list(token_ids)], device=self.device),
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
