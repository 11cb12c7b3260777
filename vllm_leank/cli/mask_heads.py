"""`leank mask heads`: guess which heads matter, without training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_leank.cli.options import Device, Dtype, ModelArgument, ModelOption, Overrides, one_model
from vllm_leank.cli.outputs import check_new
from vllm_leank.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def heads(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    *,
    data: Annotated[
        Path, typer.Option(help='JSONL, lines {"prompt_token_ids": [...]} or {"prompt": "..."}.')
    ],
    top: Annotated[int, typer.Option(min=1, help="Heads to list.")] = 20,
    max_prompts: Annotated[int, typer.Option(min=1, help="Prompts to use, the first ones.")] = 16,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longer prompts are cut to their last tokens.")
    ] = 8192,
    dtype: Dtype = "auto",
    device: Device = None,
    hf_overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write 1 - share per head as a table that `leank mask compose --streaming` takes.",
            show_default="none",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all heads as JSON.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Rank heads by their high-frequency share, the least important first.

    It is the share of a head's energy, E[q^2] E[k^2] summed over channels, in the faster half of
    its RoPE pairs. Those blur over long distances, so a head that lives on them can hardly look
    far. A guess without training: compare with masks that are learned or calibrated.
    """
    model = one_model(model, model_option, "leank mask heads MODEL --data prompts.jsonl")
    if out is not None:
        check_new(out, overwrite)
    import numpy as np

    from vllm_leank.core.window import Window
    from vllm_leank.mask.checkpoint import Checkpoint
    from vllm_leank.mask.rope_pairs import high_frequency_share
    from vllm_leank.offline.calibrate import measure_heads
    from vllm_leank.offline.calibration_prompts import calibration_prompts

    checkpoint = Checkpoint.open(model, overrides=hf_overrides)
    window = Window(64, 256)  # energies do not depend on it
    limit = checkpoint.max_tokens(max_tokens)
    prompts = calibration_prompts(checkpoint, data, window, max_tokens=limit, count=max_prompts)
    measured = measure_heads(checkpoint.load(dtype, device), prompts.ids, window)
    shares = high_frequency_share(measured.energy, checkpoint.geometry)
    ranked = [
        (float(shares[row, head]), checkpoint.geometry.layers[row], head)
        for row, head in np.ndindex(*shares.shape)
    ]
    ranked.sort(key=lambda entry: -entry[0])
    if out is not None:
        _write_table(out, 1 - shares)
    if as_json:
        found = [{"layer": layer, "head": head, "share": share} for share, layer, head in ranked]
        print(json.dumps(found))
    else:
        _print_table(ranked, top)


def _write_table(out: Path, values: "npt.NDArray[np.float64]") -> None:
    from vllm_leank.core.atomic import write_atomically

    lines = ("\t".join(f"{value:.6f}" for value in row) + "\n" for row in values)
    try:
        write_atomically(out, "".join(lines).encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error


def _print_table(ranked: list[tuple[float, int, int]], top: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="heads by high-frequency share", title_justify="left")
    for name in ("layer", "KV head", "share"):
        table.add_column(name, justify="right")
    for share, layer, head in ranked[:top]:
        table.add_row(str(layer), str(head), f"{share:.1%}")
    console = Console()
    console.print(table)
    if len(ranked) > top:
        console.print(f"{len(ranked) - top} more heads, down to {ranked[-1][0]:.1%}")
