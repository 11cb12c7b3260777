"""Plots of findings, as SVG that can stand inside a page."""

import io
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from vllm_leank.mask.pictures import new_figure
from vllm_leank.offline.verify.findings import Findings
from vllm_leank.offline.verify.plan import COMPARED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR = 1e-6
"""Nats per token below which nothing is told apart."""


def kl_by_position(findings: Findings) -> str:
    """KL of texts over the length at which they were compared, with the mean and its interval."""
    figure = new_figure(9, 4)
    axes = figure.subplots()
    lines = defaultdict(list)
    for one in findings.texts:
        lines[one.source, one.unit].append((one.prompt_tokens + COMPARED, max(one.kl, FLOOR)))
    kinds = list(dict.fromkeys(kind for kind, _ in lines))
    named = set()
    for (kind, _), points in lines.items():
        lengths, losses = zip(*points, strict=True)
        label = None if kind in named else kind
        named.add(kind)
        color = f"C{kinds.index(kind)}"
        axes.plot(lengths, losses, marker=".", linewidth=0.7, alpha=0.6, color=color, label=label)
    groups = findings.lengths
    x = sorted({one.prompt_tokens + COMPARED for one in findings.texts})
    # Without an interval, one of no width.
    estimates = [
        (kl.value if kl.low is None else kl.low, kl.value, kl.value if kl.high is None else kl.high)
        for kl in (group.kl for group in groups)
    ]
    low, means, high = np.maximum(np.array(estimates).T, FLOOR)
    spread = np.abs([means - low, high - means])
    axes.errorbar(x, means, spread, color="black", capsize=4, linewidth=2, label="mean, 95%")
    limit = max(findings.thresholds.kl, FLOOR)
    axes.axhline(limit, color="C3", linestyle="--", label="asked: below")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [f"{length:,}" for length in x])
    axes.set(xlabel="tokens before and with what is compared", ylabel="KL, nats per token")
    axes.legend(fontsize="small")
    return _svg(figure)


def kl_by_layer(findings: Findings) -> str:
    """KL when one layer alone is archived, and the bits that it has."""
    figure = new_figure(9, 4)
    axes = figure.subplots()
    kl = findings.layer_kl
    layers = findings.setting.served.mask.geometry.layers
    axes.bar(layers, kl, color="C0", label="KL, this layer alone")
    axes.set(xlabel="layer", ylabel="KL, nats per token")
    bits = axes.twinx()
    bits.plot(layers, findings.layer_bits, color="C1", marker=".", linewidth=1, label="bits")
    bits.set(ylabel="bits per element of K and V", ylim=(0, None))
    figure.legend(loc="outside upper right", ncols=2, fontsize="small")
    return _svg(figure)


def _svg(figure: "Figure") -> str:
    """A figure without the head of a file of its own; text stays text."""
    import matplotlib

    buffer = io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": "leank"}
    with matplotlib.rc_context(options):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
