"""Everything that one run of `leank verify` found."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_leank.mask.settings import Settings
from vllm_leank.offline.verify.comparison import Comparison, Group
from vllm_leank.offline.verify.plan import COMPARED
from vllm_leank.offline.verify.texts import LayerLoss
from vllm_leank.offline.verify.verdict import (
    Answers,
    Check,
    Outcome,
    Thresholds,
    judge,
    outcome,
)


@dataclass(frozen=True)
class Setting:
    """What was compared, and on what."""

    model: str
    served: Settings
    dtype: str
    device: str


@dataclass(frozen=True)
class Findings:
    """Comparisons of a run, and what follows from them.

    Attributes:
        setting: what was compared.
        thresholds: what is asked for.
        texts: built-in texts, each at several lengths.
        data: a user's prompts.
        needles: generated questions.
        layers: losses of single layers, one for each text that was looked at.
        notes: what the user should know besides.
        seconds: how long it took.
    """

    setting: Setting
    thresholds: Thresholds
    texts: Sequence[Comparison]
    data: Sequence[Comparison]
    needles: Sequence[Comparison]
    layers: Sequence[LayerLoss]
    notes: Sequence[str]
    seconds: float

    @property
    def lengths(self) -> list[Group]:
        """Texts by their length, ascending."""
        found: dict[int, list[Comparison]] = defaultdict(list)
        for one in self.texts:
            found[one.prompt_tokens + COMPARED].append(one)
        return [Group.of(f"{n:,} tokens", found[n]) for n in sorted(found)]

    @property
    def groups(self) -> list[Group]:
        """What is judged: texts at the short and at the longest length, the user's prompts, and
        the needles that dense attention gets right.
        """
        groups = self.lengths
        groups = [groups[0], groups[-1]] if len(groups) > 1 else groups
        if self.data:
            groups.append(Group.of(self.data[0].source, self.data))
        if known := [one for one in self.needles if one.dense_right]:
            groups.append(Group.of("needles", known))
        return groups

    @property
    def answers(self) -> Answers:
        """Answers to needles and to the user's prompts together."""
        return Answers.of([*self.data, *self.needles])

    @property
    def answers_by_kind(self) -> dict[str, list[Comparison]]:
        """Questions with known answers, by kind and length of their context."""
        found: dict[str, list[Comparison]] = defaultdict(list)
        for one in (*self.data, *self.needles):
            if one.dense_right is not None:
                found[one.source].append(one)
        return dict(found)

    @property
    def checks(self) -> list[Check]:
        """Every figure against what is asked of it."""
        return judge(self.groups, self.answers, self.thresholds)

    @property
    def outcome(self) -> Outcome:
        """What is said in the end."""
        return outcome(self.checks)

    @property
    def layer_kl(self) -> npt.NDArray[np.float64]:
        """KL per token of each layer alone, `[L]`; empty where none was looked at."""
        if not self.layers:
            return np.zeros(0)
        total = sum((one.alone for one in self.layers), np.zeros(len(self.layers[0].alone)))
        return total / self.layer_tokens

    @property
    def layer_tokens(self) -> int:
        """Tokens on which layers were looked at."""
        return sum(one.tokens for one in self.layers)

    @property
    def layers_together(self) -> float:
        """KL per token of all layers, over the same tokens."""
        return sum(one.together for one in self.layers) / self.layer_tokens

    @property
    def layer_bits(self) -> npt.NDArray[np.float64]:
        """Mean bits per element of K and V, `[L]`."""
        mask = self.setting.served.mask
        bits: npt.NDArray[np.float64] = (
            mask.k_bits.mean(axis=(1, 2)) + mask.v_bits.mean(axis=(1, 2))
        ) / 2
        return bits

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        setting = self.setting
        mask, window = setting.served.mask, setting.served.window
        selection = setting.served.selection
        layers = [
            {"layer": layer, "kl": round(float(kl), 7), "bits": round(float(bits), 3)}
            for layer, kl, bits in zip(
                mask.geometry.layers, self.layer_kl, self.layer_bits, strict=False
            )
        ]
        return {
            "outcome": self.outcome.name.lower(),
            "exit_code": self.outcome.value,
            "model": setting.model,
            "mask": {
                "path": str(mask.path),
                "sha256": mask.sha256,
                "k_kept": mask.k_kept,
                "bits": mask.bits,
            },
            "window": {"sink": window.sink, "recent": window.recent},
            "prefill": "exact" if window.exact else "pruned",
            "segments": None if selection is None else asdict(selection),
            "archive_format": setting.served.plan.archive_format.name,
            "dtype": setting.dtype,
            "device": setting.device,
            "groups": [asdict(group) for group in self.groups],
            "lengths": [asdict(group) for group in self.lengths],
            "answers": asdict(self.answers) | {"judged": self.answers.judged},
            "layers": layers,
            "thresholds": asdict(self.thresholds),
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
            "each": [one.as_dict() for one in (*self.texts, *self.data, *self.needles)],
            "seconds": round(self.seconds, 1),
        }
