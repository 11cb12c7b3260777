r"""Streaming heads of a real model: found in two ways, composed into masks, and what that costs.

    PYTHONPATH=benchmarks python -m real.streaming_study --model models/qwen-1.5b --out streaming \
        --lengths 8192,30000

Ways are `fisher`, what `leank mask calibrate --streaming` goes by, and `duo`, DuoAttention's
optimisation. Each gives every head a number; the lowest become streaming heads. From each way and
share comes a mask of `--bits` and one that prunes `--ratio` of K. Told are the share of bytes saved
and what fits in decode, as `leank plan` computes it, and the KL divergence to full attention, as
`kl.py` measures it. All is in the folder OUT: heads_WAY.json and heads_WAY.tsv (for `leank mask
compose --streaming`), masks/*.yaml (for `study.py --variants`), study.json. A run that was stopped
goes on; with other settings give another folder.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from baselines.duo_attention import RATE, REG

from real.caches import served_mask
from real.judged_texts import judged_samples
from real.kl import CONSOLE, add_samples, judge, row_of
from real.option_numbers import numbers
from real.streaming_costs import BY, DUO, FISHER, Costs, Scores
from real.streaming_report import ITEMSIZE, described, show
from real.unseen_texts import digest_of, unseen_texts
from vllm_leank.bench.results import header, save_results
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.compose import lowest_heads
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.calibrate_bits import pruned_mask
from vllm_leank.offline.mask_request import BitsRequest, MaskRequest
from vllm_leank.offline.streaming import StreamingHeads, streaming_heads
from vllm_leank.offline.weigh_layers import handed_out


@dataclass(frozen=True)
class Job:
    """A mask of the study: how it is made, and what it is called."""

    kind: str
    amount: float
    way: str | None = None
    share: float = 0.0

    @property
    def name(self) -> str:
        """Of its file and row."""
        plain = f"{self.kind}_{self.amount:g}"
        return plain if self.way is None else f"{plain}_{self.way}_{self.share:g}"


@dataclass
class Study:
    """The command's work; what is loaded and measured is so when it is first needed."""

    args: argparse.Namespace

    def __post_init__(self) -> None:
        args = self.args
        self.ways = args.ways.split(",")
        if unknown := set(self.ways) - BY.keys():
            raise UserError(f"--ways has {sorted(unknown)}; allowed: {', '.join(BY)}")
        self.shares = numbers(args.shares, float)
        self.lengths = numbers(args.lengths, int)
        self.window = Window(args.sink, args.recent)
        self.checkpoint = Checkpoint.open(args.model)
        self.costs = Costs(self.checkpoint, self.window, args)
        layers = len(self.checkpoint.geometry.layers)
        self.texts = unseen_texts(args.texts) if args.unseen else {}
        self.weights = dict(_weights_of(path, layers) for path in args.weights_of or ())

    def jobs(self) -> Iterator[Job]:
        """The masks, those without streaming heads first."""
        kinds = [("bits", bits) for bits in numbers(self.args.bits, float)]
        kinds += [("pruned", self.args.ratio)]
        for kind, amount in kinds:
            yield Job(kind, amount)
        for share in self.shares:
            for way in self.ways:
                for kind, amount in kinds:
                    yield Job(kind, amount, way, share)

    def make_masks(self, found: dict[str, Scores]) -> dict[str, Path]:
        """The files of all masks, by their names; made where they are missing."""
        folder = self.args.out / "masks"
        folder.mkdir(parents=True, exist_ok=True)
        paths = {}
        for job in self.jobs():
            paths[job.name] = folder / f"{job.name}.yaml"
            if not paths[job.name].exists():
                save_mask(self._mask(job, found), paths[job.name])
        return paths

    def _mask(self, job: Job, found: dict[str, Scores]) -> Mask:
        streaming: StreamingHeads | None = None
        if job.way is not None:
            streaming = streaming_heads(found[FISHER], job.share, found[job.way], BY[job.way])
        measured = replace(self.costs.measured, streaming=streaming)
        if job.kind == "pruned":
            request = MaskRequest(self.checkpoint, job.amount, 32, self.window, job.share)
            return pruned_mask(request, measured)
        weights = self.weights.get(job.amount, np.ones(len(measured.k_losses[0])))
        asked = BitsRequest(self.checkpoint, job.amount, self.window, job.share)
        return handed_out(asked, measured, weights)[0]

    def run(self) -> dict[str, Any]:
        """Do what is not done yet, and give the results.

        Raises:
            UserError: the model or an option cannot be used.
        """
        args, start = self.args, time.monotonic()
        args.out.mkdir(parents=True, exist_ok=True)
        self._check_same()
        path = args.out / "study.json"
        ways = list(dict.fromkeys([FISHER, *self.ways]))  # all are told of by Fisher's losses
        heads = {way: self.costs.of_heads(way) for way in ways}
        found = {way: np.array(told["scores"]) for way, told in heads.items()}
        masks = self.make_masks(found)
        results = self._begun(path, heads, found)
        for job in self.jobs():
            if job.name not in results["masks"]:
                mask = load_mask(masks[job.name])
                results["masks"][job.name] = described(
                    self.checkpoint, mask, job.way, job.share, args.gpu_memory, args.tokens
                )
        dense = results["dense_token_bytes"]
        for length in self.lengths:
            missing = [
                job.name for job in self.jobs()
                if str(length) not in results["masks"][job.name]["kl"]
            ]  # fmt: skip
            if not missing:
                continue
            samples, left_out = judged_samples(
                self.checkpoint, self.texts, length, args.judged, args.unseen, args.seed
            )
            for line in left_out:
                CONSOLE.print(line)
            results["skipped"][str(length)] = left_out
            variants = [served_mask(name, load_mask(masks[name]), self.window) for name in missing]
            judged = judge(self.costs.model, self.window, samples, variants)
            for one in variants:
                row = row_of(one, judged[one.name], dense, length)
                results["masks"][one.name]["kl"][str(length)] = row
            results["seconds"] = round(results["seconds"] + time.monotonic() - start, 1)
            start = time.monotonic()
            save_results(results, path)
        save_results(results, path)
        return results

    def _check_same(self) -> None:
        """Refuse a folder of a run with other settings than those that may grow."""
        names = ("sink", "recent", "seed", "dtype", "prompts", "max_tokens", "judged", "unseen")
        names += ("steps", "rate", "reg", "train_tokens", "gpu_memory", "tokens")
        settings = {name: getattr(self.args, name) for name in names}
        weights = {f"{bits:g}": list(map(float, found)) for bits, found in self.weights.items()}
        settings |= {"model": self.checkpoint.id, "weights": weights}
        settings |= {"unseen_sha256": digest_of(self.texts)}
        path = self.args.out / "settings.json"
        if not path.exists():
            save_results(settings, path)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in settings.items() if before.get(name) != value]:
            raise UserError(
                f"{path}: the run that began here had other {', '.join(changed)}; give another "
                "--out"
            )

    def _begun(self, path: Path, heads: dict[str, Any], found: dict[str, Scores]) -> dict[str, Any]:
        """What a run that was stopped has left, or none yet."""
        # Ways and shares may have been added.
        told = {
            "heads": {
                way: {name: value for name, value in one.items() if name != "scores"}
                | {"file": f"heads_{way}.json"}
                for way, one in heads.items()
            },
            "in_common": {
                f"{share:g}": self._in_common(found, share)
                for share in self.shares
                if len(found) > 1
            },
        }
        if path.exists():
            left: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return left | {name: left[name] | new for name, new in told.items()}
        geometry = self.checkpoint.geometry
        return {
            **header(
                "streaming heads: KL to full attention in nats per token, teacher-forced, bytes "
                "and capacity",
                self.args.commit,
                "python -m real.streaming_study",
            ),
            "model": self.checkpoint.id,
            "dtype": self.args.dtype,
            "window": {"sink": self.window.sink, "recent": self.window.recent},
            **told,
            "dense_token_bytes": round(2 * ITEMSIZE * float(np.prod(geometry.shape))),
            "capacity": {"gpu_memory": self.args.gpu_memory, "tokens": self.args.tokens},
            "skipped": {},
            "masks": {},
            "seconds": 0.0,
        }  # fmt: skip

    @staticmethod
    def _in_common(found: dict[str, Scores], share: float) -> dict[str, int]:
        """How many heads both ways choose, and how many each."""
        first, second = (lowest_heads(scores, share) for scores in list(found.values())[:2])
        return {"both": int((first & second).sum()), "each": int(first.sum())}


def _weights_of(path: Path, layers: int) -> tuple[float, np.ndarray]:
    """Bits of a mask, and the weights of so many layers that it was made with.

    Raises:
        UserError: it has none.
    """
    told = load_mask(path).provenance
    if len(told.get("layer_weights", ())) != layers or "bits" not in told:
        raise UserError(f"{path}: its provenance has no layer_weights of {layers} layers")
    return float(told["bits"]), np.array(told["layer_weights"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True, help="folder of the results")
    options.add_argument("--ways", default=f"{FISHER},{DUO}", help="with commas")
    options.add_argument("--shares", default="0.25,0.5,0.65", help="of heads, with commas")
    options.add_argument("--bits", default="4,2", help="of the other heads, with commas")
    options.add_argument("--ratio", type=float, default=0.7, help="of K pruned in other heads")
    options.add_argument(
        "--weights-of", type=Path, nargs="*", metavar="MASK",
        help="calibrated masks whose weights of layers are taken for masks of as many bits",
    )  # fmt: skip
    options.add_argument("--steps", type=int, default=300, help="of the optimisation; paper: 2000")
    options.add_argument("--rate", type=float, default=RATE, help="learning rate")
    options.add_argument("--reg", type=float, default=REG, help="weight of the mean alpha")
    options.add_argument("--train-tokens", type=int, default=8192, help="of its longest sample")
    options.add_argument("--gpu-memory", default="141GiB", help="that requests shall fit into")
    options.add_argument("--tokens", type=int, default=32768, help="of these requests")
    add_samples(options)
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Find heads, make masks, judge them, print the table."""
    args = parser().parse_args(words)
    try:
        show(Study(args).run())
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
