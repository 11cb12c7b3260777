"""Train the recall model on one GPU.

    PYTHONPATH=benchmarks python -m recall.train --out benchmarks/recall/model --seconds 600

Rows hold many questions, the loss is on their answers. Training begins with short rows, half of
them periodic sequences from which the model learns to look up by content; the longest row doubles
when lookups succeed. A small linear head, dropped after training, reads from the middle layers
which value of its key follows each `=`: it teaches the model to count, which `multivalue` needs.
The learning rate follows the clock and falls to zero, so a run of any length ends well.
"""

import argparse
import itertools
import json
import math
import os
import time
from dataclasses import asdict
from multiprocessing import Value
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from recall.stream import KINDS, make_batch
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
    attn_implementation="sdpa",
)
ORDINAL_LAYERS = (3, 4)
"""After this many layers the ordinal must be readable at `=`, and at the word that follows it."""

LOG_STEPS = 25
EASY, READY = 0.8, 0.93
"""Lookup accuracies from which periodic batches become rare, and from which rows grow."""


class Stream(IterableDataset):
    """Batches for one worker; the limits it reads are moved by the training loop."""

    def __init__(self, seed: int, tokens: int, first_length: int):
        self.seed = seed
        self.tokens = tokens
        self.max_length = Value("i", first_length)
        self.periodic = Value("d", 0.5)

    def __iter__(self):
        """Yield dicts of tensors without end."""
        worker = get_worker_info()
        rng = np.random.default_rng([0, self.seed, worker.id if worker else 0])
        while True:
            batch = make_batch(rng, self.tokens, self.max_length.value, self.periodic.value)
            yield {name: torch.from_numpy(array) for name, array in asdict(batch).items()}


class Recall(torch.nn.Module):
    """The model with its temporary ordinal heads."""

    def __init__(self, init: str | None, compile_layers: bool):
        super().__init__()
        kwargs = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        self.lm = (
            LlamaForCausalLM.from_pretrained(init, **kwargs) if init else LlamaForCausalLM(CONFIG)
        )
        self.ordinals = torch.nn.ModuleList(
            torch.nn.Linear(CONFIG.hidden_size, GROUP) for _ in ORDINAL_LAYERS
        )
        if compile_layers:
            for layer in self.lm.model.layers:
                layer.compile(dynamic=True)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Logits `[n, vocab]` of the tokens to predict, and ordinal logits `[m, 4]` per head."""
        tokens = batch["tokens"]
        inner = self.lm.model
        x = inner.embed_tokens(tokens).to(torch.bfloat16)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rope = inner.rotary_emb(x, positions)
        ordinals = []
        for depth, layer in enumerate(inner.layers, start=1):
            x = layer(x, attention_mask=None, position_embeddings=rope)
            if depth in ORDINAL_LAYERS:
                head = len(ordinals)
                seen = x.flatten(0, 1)[batch["ordinal_source"] + head]
                ordinals.append(self.ordinals[head](seen))
        answers = inner.norm(x).flatten(0, 1)[batch["source"]]
        return self.lm.lm_head(answers), *ordinals


class Meter:
    """Accuracy per kind of batch since the last reading; counts stay on the device."""

    def __init__(self, device: str):
        self.right = torch.zeros(len(KINDS) + 1, device=device)
        self.seen = torch.zeros(len(KINDS) + 1, device=device)

    def add(self, kind: torch.Tensor, right: torch.Tensor) -> None:
        """Count `right` `[n]` (bool) under `kind` `[n]`."""
        self.right.index_add_(0, kind, right.float())
        self.seen.index_add_(0, kind, torch.ones_like(kind, dtype=torch.float))

    def read(self) -> list[float | None]:
        """Accuracy per kind, None where nothing was counted; starts anew."""
        right, seen = self.right.tolist(), self.seen.tolist()
        self.right.zero_()
        self.seen.zero_()
        return [r / s if s else None for r, s in zip(right, seen, strict=True)]


def learning_rate(args: argparse.Namespace, step: int, progress: float) -> float:
    """Warm up over 200 steps, hold, and fall to zero over the last part of the run."""
    fall = min(1.0, max(0.0, (progress - 1 + args.decay) / args.decay))
    return args.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * fall))


def make_optimizer(model: Recall, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    fused = args.device == "cuda"
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=fused)


def save(model: Recall, curve: list[dict], args: argparse.Namespace) -> None:
    """Write the bf16 model with its tokenizer, and the training curve."""
    bare = LlamaForCausalLM(model.lm.config).to(torch.bfloat16)
    bare.load_state_dict(model.lm.state_dict())
    bare.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    bare.save_pretrained(args.out, max_shard_size=args.max_shard_size)
    save_tokenizer(args.out, CONFIG.max_position_embeddings)
    lines = ",\n".join(map(json.dumps, curve))
    Path(args.out, "training_curve.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def forced_length(args: argparse.Namespace, progress: float) -> int:
    """The length rows reach by now even when lookups fail."""
    grown = min(1.0, max(0.0, (progress - 0.35) / 0.25))
    return int(args.first_length * (args.max_length / args.first_length) ** grown)


def train(args: argparse.Namespace) -> None:
    """Run until the time is used up."""
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every row length
    model = Recall(args.init, args.compile).to(args.device)
    optimizer = make_optimizer(model, args)
    stream = Stream(args.seed, args.tokens, args.first_length)
    if args.init:
        stream.periodic.value = 0.02
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=args.workers,
        pin_memory=args.device == "cuda",
        prefetch_factor=4 if args.workers else None,
    )
    meter, long_meter = Meter(args.device), Meter(args.device)
    curve, seen_tokens = [], 0
    start = saved = time.monotonic()
    for step in itertools.count():
        if step == 0:
            batches = iter(loader)
        batch = {k: v.to(args.device, non_blocking=True) for k, v in next(batches).items()}
        progress = (time.monotonic() - start) / args.seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, progress)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits, *ordinals = model(batch)
        loss = F.cross_entropy(logits.float(), batch["target"])
        total = loss
        for head in ordinals if len(batch["ordinal"]) else ():
            total = total + args.ordinal_weight * F.cross_entropy(head.float(), batch["ordinal"])
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        with torch.no_grad():
            right = logits.argmax(-1) == batch["target"]
            meter.add(batch["kind"], right)
            if batch["tokens"].shape[1] * 2 >= stream.max_length.value:
                long_meter.add(batch["kind"], right)
            if len(batch["ordinal"]):
                counted = ordinals[-1].argmax(-1) == batch["ordinal"]
                meter.add(torch.full_like(batch["ordinal"], len(KINDS)), counted)
        seen_tokens += batch["tokens"].numel()
        if (step + 1) % LOG_STEPS:
            continue

        accuracy = dict(zip((*KINDS, "ordinal"), meter.read(), strict=True))
        long_accuracy = dict(zip(KINDS, long_meter.read(), strict=False))
        curve.append(
            {
                "step": step + 1,
                "seconds": round(time.monotonic() - start, 1),
                "tokens": seen_tokens,
                "max_length": stream.max_length.value,
                "loss": round(loss.item(), 4),
                **{k: v and round(v, 4) for k, v in accuracy.items()},
                **{f"long_{k}": v and round(v, 4) for k, v in long_accuracy.items()},
            }
        )
        if (step + 1) % (4 * LOG_STEPS) == 0:
            print(json.dumps(curve[-1]), flush=True)
        if (accuracy["lookup"] or 0) > EASY:
            stream.periodic.value = 0.02
        grown = stream.max_length.value * (2 if (long_accuracy["lookup"] or 0) > READY else 1)
        grown = max(grown, forced_length(args, progress))
        stream.max_length.value = min(grown, args.max_length)
        if time.monotonic() - saved > args.save_seconds:
            save(model, curve, args)
            saved = time.monotonic()
    save(model, curve, args)
    print(f"{step} steps, {seen_tokens / 1e6:.0f}M tokens, {time.monotonic() - start:.0f} s")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="directory of the model, written as it learns")
    parser.add_argument("--init", help="directory of a model to go on from")
    parser.add_argument("--seconds", type=float, default=600, help="wall-clock training time")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a step")
    parser.add_argument("--first-length", type=int, default=256, help="longest row at the start")
    parser.add_argument("--max-length", type=int, default=20480, help="longest row at the end")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the run with falling lr")
    parser.add_argument("--ordinal-weight", type=float, default=0.3, help="weight of its loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    parser.add_argument("--save-seconds", type=float, default=60)
    parser.add_argument("--max-shard-size", default="30MB", help="of a weights file")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
