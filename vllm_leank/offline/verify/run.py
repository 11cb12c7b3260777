"""One run of `leank verify`: what is compared, within a time that is told before and kept."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.settings import Settings
from vllm_leank.offline.builtin_prompts import Named
from vllm_leank.offline.verify.asking import ask_haystack, ask_until
from vllm_leank.offline.verify.comparison import Comparison
from vllm_leank.offline.verify.findings import Findings, Setting
from vllm_leank.offline.verify.haystacks import QUESTIONS, haystack
from vllm_leank.offline.verify.material import Material, Request, find_material
from vllm_leank.offline.verify.memory import fitting
from vllm_leank.offline.verify.pace import Pace, measure_pace
from vllm_leank.offline.verify.plan import COMPARED, Plan, Work, choose_plan
from vllm_leank.offline.verify.reader import Reader
from vllm_leank.offline.verify.steps import Steps, duration
from vllm_leank.offline.verify.texts import (
    LayerLoss,
    compare_sample,
    compare_text,
    far_samples,
    layer_loss,
    texts,
)
from vllm_leank.offline.verify.verdict import Thresholds

TEXT_KINDS = 3
"""Kinds that built-in texts have."""


def verify_mask(
    checkpoint: Checkpoint,
    served: Settings,
    request: Request,
    thresholds: Thresholds,
    *,
    dtype: str,
    device: str,
) -> Findings:
    """What a mask and options, `served`, do to the answers of a model, which is loaded for it.

    Raises:
        UserError: nothing can be compared, or not within the time or memory that there is, or the
            model cannot be loaded, or its attention is not what masks are for.
    """
    material = find_material(checkpoint, served.window, request)
    if dtype == "auto" and device.startswith("cpu"):
        dtype = "float32"
    try:
        model = checkpoint.load(dtype, device)
        reader = Reader(model, served.mask, served.window, served.selection)
        with Steps(60 * request.minutes) as steps:
            reader.tick = steps.advance
            seen = Run(checkpoint, reader, request, material, steps).measure()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{checkpoint.path}: {device} has too little memory for it; a smaller --max-tokens "
            "needs less, and there is --device cpu"
        ) from error
    setting = Setting(
        checkpoint.path,
        served,
        str(model.dtype).removeprefix("torch."),
        device,
    )
    return Findings(
        setting,
        thresholds,
        seen.texts,
        seen.data,
        seen.needles,
        seen.layers,
        seen.notes,
        steps.spent,
    )


@dataclass
class Measured:
    """What a run has seen; see `Findings`."""

    texts: list[Comparison] = field(default_factory=list)
    data: list[Comparison] = field(default_factory=list)
    needles: list[Comparison] = field(default_factory=list)
    layers: list[LayerLoss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """Measures what can be compared of a request."""

    checkpoint: Checkpoint
    reader: Reader
    request: Request
    material: Material
    steps: Steps

    def measure(self) -> Measured:
        """All of it.

        Raises:
            UserError: there is too little time or nothing with far tokens, or the model's attention
                is not what masks are for.
        """
        seen = Measured(notes=list(self.material.notes))
        pace = self._pace()
        plan = self._plan(pace, seen)
        room = self.request.written
        samples, notes = far_samples(
            self.request.data, self.reader.window, longest=plan.longest, room=room
        )
        seen.notes += notes
        # What takes longer than it should must not take the time of what comes after it.
        scale = self.steps.left / plan.seconds
        begin = self.steps.spent
        if self.material.texts:
            self._texts(plan, seen, until=begin + scale * plan.texts)
        if samples:
            self._data(samples, seen, until=begin + scale * (plan.texts + plan.data))
        if self.material.kinds:
            self._needles(pace, plan, seen)
        if not (seen.texts or seen.data or seen.needles):
            raise UserError("; ".join(["nothing was compared", *seen.notes]))
        return seen

    def _pace(self) -> Pace:
        probe = self.material.probe
        self.steps.begin("measuring how fast the model runs here", len(probe) - COMPARED)
        return measure_pace(self.reader, probe[:-COMPARED], probe[-COMPARED:])

    def _plan(self, pace: Pace, seen: Measured) -> Plan:
        """What is going to be compared, which is told."""
        request, material = self.request, self.material
        work = Work(
            material.texts,
            TEXT_KINDS,
            request.needles if material.kinds else 0,
            [
                len(prompt) + (len(answer) or request.written)
                for _, (prompt, answer) in request.data
            ],
        )
        candidates = material.candidates
        if request.max_tokens is None:
            candidates = fitting(candidates, self.reader)
        plan = choose_plan(pace, self.reader.window, work, candidates, self.steps.left)
        if plan.longest < (most := material.candidates[0]):
            seen.notes.append(
                f"compared with up to {plan.longest:,} of the {most:,} tokens that the model "
                "takes: more needs more time or memory (--minutes, --max-tokens)"
            )
        if plan.work != work:
            seen.notes.append("fewer texts and needles than usual, for want of time (--minutes)")
        self.steps.say(_announcement(plan, request))
        return plan

    def _texts(self, plan: Plan, seen: Measured, until: float) -> None:
        count, longest = plan.work.texts, plan.longest
        self.steps.begin(f"reading {count} texts of {longest:,} tokens", count * longest)
        read = texts(self.checkpoint, count, longest, self.request.seed)
        looked_at: set[str] = set()
        for number, text in enumerate(read):
            if seen.texts and self.steps.spent * (number + 1) > until * number:
                seen.notes.append(f"{number} of {count} texts were compared: their time was up")
                break
            found = list(compare_text(self.reader, text, number, plan.lengths))
            seen.texts += found
            self.steps.advance(COMPARED)
            if text[0] not in looked_at and len(looked_at) < plan.layer_texts:
                looked_at.add(text[0])
                self.steps.tell(f"looking at the layers one by one, after text {number + 1}")
                seen.layers.append(layer_loss(self.reader, text, found[-1].found))
                self.steps.tell(f"reading {count} texts of {longest:,} tokens")

    def _data(self, samples: Sequence[Named], seen: Measured, until: float) -> None:
        name = samples[0][0]
        self.steps.begin(
            f"reading {len(samples)} prompts of {name}", sum(len(one.prompt) for _, one in samples)
        )
        for number, named in enumerate(samples):
            if seen.data and self.steps.spent > until:
                seen.notes.append(
                    f"{name}: {number} of {len(samples)} prompts were compared: their time was up"
                )
                break
            seen.data.append(compare_sample(self.reader, named, number, self.request.written))

    def _needles(self, pace: Pace, plan: Plan, seen: Measured) -> None:
        wanted = plan.work.needles
        self.steps.begin(f"asking until dense attention has {wanted} answers right", wanted)
        self.reader.tick = None
        numbers = itertools.count()

        def ask(kind: str, tokens: int) -> Sequence[Comparison]:
            self.steps.tell(f"asking, {kind}, {tokens:,} tokens")
            number = next(numbers)
            made = haystack(
                self.checkpoint, self.reader.window, kind, tokens, [self.request.seed, number]
            )
            found = list(ask_haystack(self.reader, made, number))
            self.steps.advance(sum(bool(one.dense_right) for one in found))
            return found

        def has_time(tokens: int) -> bool:
            asking = QUESTIONS * pace.comparing(tokens)
            return pace.reading(tokens) + asking < self.steps.left

        seen.needles += ask_until(
            ask,
            self.material.kinds,
            wanted=wanted,
            longest=plan.longest,
            shortest=self.material.shortest,
            has_time=has_time,
        )
        right = sum(bool(one.dense_right) for one in seen.needles)
        if right < wanted:
            why = "it finds too few even in short contexts"
            if not has_time(self.material.shortest):
                why = "the time was up"
            seen.notes.append(
                f"needles: dense attention has {right} of {len(seen.needles)} right, fewer than "
                f"{wanted}: {why}"
            )


def _announcement(plan: Plan, request: Request) -> str:
    """What is going to be done, and how long it takes."""
    parts, work = [], plan.work
    if work.texts:
        lengths = ", ".join(f"{length:,}" for length in plan.lengths)
        parts.append(f"{work.texts} texts at {lengths} tokens")
    if work.data:
        parts.append(f"{len(work.data)} prompts of {request.data[0][0]}")
    if work.needles:
        parts.append(
            f"questions about contexts of up to {plan.longest:,} tokens until dense attention has "
            f"{work.needles} right"
        )
    return (
        f"about {duration(plan.seconds)}, at most {duration(60 * request.minutes)} (--minutes): "
        + ", ".join(parts)
    )
