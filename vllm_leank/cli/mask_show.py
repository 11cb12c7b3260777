"""What `leank mask show` says of a mask: as plain values, and as tables."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_leank.errors import printable, printable_lines
from vllm_leank.mask.bits import profiles_of
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import dense_bytes, stored_bytes


def summary(mask: Mask) -> dict[str, Any]:
    """Everything `show` shows; bytes are of one far token over all layers."""
    dense = dense_bytes(mask)
    kept = stored_bytes(mask)
    counts = Counter(mask.kept_counts.reshape(-1).tolist())
    return {
        "path": None if mask.path is None else str(mask.path),
        "sha256": mask.sha256,
        "format": mask.format,
        "model": mask.model,
        "geometry": mask.geometry.as_dict(),
        "align": mask.align,
        "window": {"sink": mask.sink, "recent": mask.recent},
        "bits": {
            "mean": mask.bits,
            "k": float(mask.k_bits.mean()),
            "v": float(mask.v_bits.mean()),
        },
        "bits_by_layer": {
            "k": mask.k_bits.mean(axis=(1, 2)).tolist(),
            "v": mask.v_bits.mean(axis=(1, 2)).tolist(),
        },
        "profiles": profiles_of(mask.k_bits, mask.v_bits) if mask.is_packed else None,
        "heads_by_kept": {str(kept): counts[kept] for kept in sorted(counts)},
        "k_kept": mask.k_kept,
        "v_kept": mask.v_kept,
        "far_token_bytes_bf16": {"dense": dense, "kept": kept},
        "far_bytes_share": mask.far_bytes_share,
        "speed_bound": dense / kept if kept else None,
        "kept_by_layer": mask.kept_counts.tolist(),
        "provenance": mask.provenance,
        "evaluation": mask.evaluation,
    }


def print_tables(mask: Mask) -> None:
    """Print what the mask is for, what it saves, and each layer."""
    shown = summary(mask)
    dense, kept = shown["far_token_bytes_bf16"].values()
    facts = Table(title=f"mask for {mask.model}", title_justify="left", show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row(
        "layers x KV heads x head_dim",
        " x ".join(map(str, mask.geometry.shape)),
    )
    if mask.geometry.served_layers is not None:
        served = ", ".join(map(str, mask.geometry.layers))
        facts.add_row("layers served", f"{served}, of {mask.geometry.num_layers}")
    scaling = mask.geometry.rope_scaling
    kind = "no scaling" if scaling is None else f"scaling {scaling}"
    rope = (
        "none" if mask.geometry.rope_theta is None else f"theta {mask.geometry.rope_theta}, {kind}"
    )
    if mask.geometry.layers_without_rope:
        rope += f", none in layers {', '.join(map(str, mask.geometry.layers_without_rope))}"
    facts.add_row("RoPE", _plain(rope))
    facts.add_row("dense tokens", f"first {mask.sink}, last {mask.recent}")
    for name, text in (_bits_facts(shown) if mask.is_packed else _keep_facts(shown)).items():
        facts.add_row(name, text)
    facts.add_row("bytes per far token (bf16)", f"{kept:,} of {dense:,} ({kept / dense:.1%})")
    bound = "none" if shown["speed_bound"] is None else f"{shown['speed_bound']:.2f}x"
    facts.add_row("bound on attention speed", bound)
    for key, value in {**mask.provenance, "sha256": mask.sha256}.items():
        facts.add_row(Text(printable(key)), _plain(value))

    console = Console()
    console.print(facts)
    console.print(_bits_table(mask) if mask.is_packed else _keep_table(mask))
    if mask.evaluation:
        console.print(_evaluation_table(mask.evaluation))


def _keep_facts(shown: dict[str, Any]) -> dict[str, str]:
    heads = {
        f"heads keeping {count}": str(number) for count, number in shown["heads_by_kept"].items()
    }
    return heads | {"K kept": f"{shown['k_kept']:.2%}", "V kept": f"{shown['v_kept']:.2%}"}


def _bits_facts(shown: dict[str, Any]) -> dict[str, str]:
    bits = shown["bits"]
    profiles = [
        ", ".join(
            f"{name.upper()} " + " + ".join(f"{count} of {kind}" for kind, count in part.items())
            for name, part in profile.items()
        )
        for profile in shown["profiles"]
    ]
    return {
        "bits per element": f"{bits['mean']:.2f} (K {bits['k']:.2f}, V {bits['v']:.2f})",
        "channels by bits": "\n".join(profiles),
    }


def _keep_table(mask: Mask) -> Table:
    table = Table(title="channels kept", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("per KV head")
    table.add_column("K kept", justify="right")
    for layer, counts in zip(mask.geometry.layers, mask.kept_counts, strict=True):
        share = counts.sum() / (mask.geometry.num_kv_heads * mask.geometry.head_dim)
        table.add_row(str(layer), " ".join(f"{count:3d}" for count in counts), f"{share:.1%}")
    return table


def _bits_table(mask: Mask) -> Table:
    table = Table(title="mean bits", title_justify="left")
    for name in ("layer", "K", "V", "K per KV head", "V per KV head"):
        table.add_column(name, justify="right")
    rows = zip(mask.geometry.layers, mask.k_bits, mask.v_bits, strict=True)
    for layer, k_bits, v_bits in rows:
        table.add_row(
            str(layer),
            f"{k_bits.mean():.2f}",
            f"{v_bits.mean():.2f}",
            *(" ".join(f"{head:4.1f}" for head in bits.mean(-1)) for bits in (k_bits, v_bits)),
        )
    return table


def _evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """What the file says the mask was measured, or is expected, to do."""
    table = Table(title="evaluation, as the file has it", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in evaluation.items():
        table.add_row(Text(printable(key)), _plain(value))
    return table


def _plain(value: Any) -> Text:
    """A value of a file as it stands there: no markup, and nothing that steers a terminal."""
    return Text(printable_lines(str(value)))
