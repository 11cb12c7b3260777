"""Makes a mask without training, from the energy of q and K per channel over sample prompts.

A channel's part of an attention logit is `q_c * k_c`. Its mean square, taking q and k as
independent, is `E[q_c^2] * E[k_c^2]`: the score that ThinK (arXiv 2407.21018) gives the channels of
one prompt, here averaged over many, since the importance of channels hardly depends on the prompt
(LeanK, arXiv 2508.02215).

Heads are compared by the share of a channel in its head's total. The totals themselves (squared
logits) say little about what a head is worth: on the model in `benchmarks/recall`, a global
threshold on them takes every channel from a layer whose logits are small, and with 70% of K pruned
exact recall fell from 20 of 20 answers to 3 (2K tokens); by shares, it fell to 19.
"""

import datetime
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from rich.console import Console
from rich.progress import track

from vllm_leank.attention_hook import hooked_attention
from vllm_leank.errors import UserError
from vllm_leank.geometry import Geometry
from vllm_leank.mask import Mask
from vllm_leank.prompts import read_prompts
from vllm_leank.select_channels import select_channels
from vllm_leank.version import __version__

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EnergyMeter:
    """An attention hook that adds up q^2 and K^2, float64 `[L, H, D]` on the model's device.

    q is summed over the query heads of a KV head's group and over the last `query_tokens` tokens of
    each prompt (None: all).
    """

    geometry: Geometry
    query_tokens: int | None
    device: torch.device

    def __post_init__(self) -> None:
        shape = (self.geometry.num_layers, self.geometry.num_kv_heads, self.geometry.head_dim)
        self.q_sum = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.k_sum = torch.zeros_like(self.q_sum)
        self.q_count = torch.zeros(shape[0], dtype=torch.int64)
        self.k_count = torch.zeros_like(self.q_count)

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> None:
        """Add one layer's q `[B, num_heads, T, D]` and K `[B, H, T, D]`."""
        _, H, D = self.q_sum.shape
        if layer >= self.q_sum.shape[0] or key.shape[1] != H or key.shape[-1] != D:
            raise UserError(
                f"attention layer {layer} has {key.shape[1]} KV heads of {key.shape[-1]}, "
                f"unlike the model's config ({self.geometry})"
            )
        if self.query_tokens is not None:
            query = query[:, :, -self.query_tokens :]
        grouped = query.unflatten(1, (H, -1))  # [B, H, group, T, D]
        self.q_sum[layer] += grouped.float().square().sum(dim=(0, 2, 3), dtype=torch.float64)
        self.k_sum[layer] += key.float().square().sum(dim=(0, 2), dtype=torch.float64)
        self.q_count[layer] += grouped.numel() // (H * D)
        self.k_count[layer] += key.numel() // (H * D)

    def scores(self) -> npt.NDArray[np.float64]:
        """`E[q_c^2] * E[k_c^2]`, `[L, H, D]`.

        Raises:
            UserError: a layer was never observed, or the sums are not finite.
        """
        if not bool((self.k_count > 0).all()):
            layers = torch.nonzero(self.k_count == 0).flatten().tolist()
            raise UserError(f"layers {layers} have no attention that can be observed")
        q_mean = self.q_sum.cpu() / self.q_count[:, None, None]
        k_mean = self.k_sum.cpu() / self.k_count[:, None, None]
        scores: npt.NDArray[np.float64] = (q_mean * k_mean).numpy()
        if not np.isfinite(scores).all():
            raise UserError("q or K has values that are not finite; try another dtype")
        return scores


def head_shares(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each channel's share of its head's total, `[L, H, D]`; 0 in a head without energy."""
    totals = scores.sum(axis=-1, keepdims=True)
    return np.divide(scores, totals, out=np.zeros_like(scores), where=totals > 0)


def measure_scores(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    query_tokens: int | None = None,
) -> npt.NDArray[np.float64]:
    """Channel scores `E[q_c^2] * E[k_c^2]`, float64 `[L, H, D]`, over prompts of token ids.

    Raises:
        UserError: the model's attention is of a kind that cannot be observed or is not supported.
    """
    meter = EnergyMeter(Geometry.from_hf_config(model.config), query_tokens, model.device)
    # The decoder without its head: logits of a long prompt would be larger than the model.
    decoder = model.base_model
    with torch.inference_mode(), hooked_attention(model, meter):
        for ids in track(prompts, "calibrating", console=Console(stderr=True)):
            decoder(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return meter.scores()


def calibrate(
    model_path: str,
    data: Path,
    *,
    ratio: float,
    align: int = 32,
    sink: int = 64,
    recent: int = 256,
    max_prompts: int = 64,
    max_tokens: int = 8192,
    query_tokens: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    model_id: str | None = None,
) -> Mask:
    """A mask for a transformers checkpoint that prunes `ratio` of its K channels.

    `data` is a JSONL file of prompts (`read_prompts`). `device` defaults to the GPU, where there is
    one. `model_id` is what the mask is found by, by default the name of the checkpoint.

    Raises:
        UserError: the model or the data cannot be used, or an argument is out of range.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"ratio is {ratio}; it must lie between 0 (keep all) and 1 (prune all)")
    device = _checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not Path(model_path).is_dir() and model_path.startswith(("/", ".", "~")):
        raise UserError(f"{model_path}: no such directory")
    model_id = model_id or _default_model_id(model_path)
    config = _loaded(transformers.AutoConfig, model_path).get_text_config()
    geometry = Geometry.from_hf_config(config)
    # Reports a bad align, window or model id before the work, not after it.
    Mask.full(geometry, model=model_id, align=align, sink=sink, recent=recent)

    # Prompts of token ids need no tokenizer.
    tokenizer = functools.cache(lambda: _loaded(transformers.AutoTokenizer, model_path))
    prompts = read_prompts(
        data,
        lambda text: tokenizer().encode(text),
        vocab_size=config.vocab_size,
        max_prompts=max_prompts,
        max_tokens=min(max_tokens, getattr(config, "max_position_embeddings", max_tokens)),
    )
    model = _loaded(transformers.AutoModelForCausalLM, model_path, dtype=dtype)
    model = model.to(device).eval()
    shares = head_shares(measure_scores(model, prompts, query_tokens))
    keep = select_channels(shares, ratio, align)
    return Mask.from_keep(
        keep,
        geometry,
        model=model_id,
        align=align,
        sink=sink,
        recent=recent,
        provenance={
            "method": "calibrate",
            "score": "share of E[q^2]*E[k^2] in the head, after RoPE",
            "ratio": float(ratio),
            "achieved": round(1 - float(keep.mean()), 6),
            "data": data.name,
            "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
            "prompts": len(prompts),
            "tokens": sum(len(ids) for ids in prompts),
            "query_tokens": query_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "vllm_leank": __version__,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
        },
    )


def _default_model_id(model_path: str) -> str:
    path = Path(model_path)
    return path.resolve().name if path.is_dir() else model_path


def _checked_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {error}") from error
    return device


def _loaded(kind: Any, model_path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(model_path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{model_path}: cannot be loaded by transformers: {error}") from error
