"""Serve the bundled model with leank and ask it, over HTTP, for a needle in a long haystack.

    python benchmarks/recall/demo.py

Starts `vllm serve` on a free port, waits for it, asks one question through the OpenAI client, says
whether the answer is right and how much cache it took against dense, and stops the server. Exits
with 1 if the answer is wrong and 2 if the server did not start.
"""

import argparse
import contextlib
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from recall.tasks import make_sample
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.page_sizes import plan_cache
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.lookup import resolve_mask
from vllm_leank.offline.server import address, free_port, started

MODEL = Path(__file__).with_name("model")
START_SECONDS = 600
SERVE = ("vllm", "serve", str(MODEL), "--attention-backend", "leank")

console = Console(highlight=False)


def main() -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of prompt and answer")
    parser.add_argument("--task", default="multikey", help="single, multikey, multivalue, tracking")
    parser.add_argument("--seed", type=int, default=0, help="which haystack")
    args = parser.parse_args()

    sample = make_sample(args.task, args.length, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = tokenizer.decode(sample.prompt_token_ids[1:])  # the server adds the first token
    expected = tokenizer.decode(sample.answer_token_ids, skip_special_tokens=True)

    try:
        with server(max_model_len=args.length + 64) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            began = time.monotonic()
            completion = client.completions.create(
                model="recall",
                prompt=prompt,
                max_tokens=len(sample.answer_token_ids),
                temperature=0,
            )
            seconds = time.monotonic() - began
    except UserError as error:
        console.print(f"[red]{error}")
        return 2

    answer = completion.choices[0].text.strip()
    tokens = completion.usage.prompt_tokens
    right = answer == expected
    words = prompt.split()
    table = Table.grid(padding=(0, 2))
    table.add_row("haystack", f"{tokens:,} tokens: {' '.join(words[:12])} ...")
    table.add_row("question", f"... [bold]{' '.join(words[-4:])}")
    table.add_row("answer", f"[bold]{answer}[/] ({seconds:.1f} s)")
    table.add_row("expected", f"{expected} -> {'[green]right' if right else '[red]wrong'}")
    table.add_row("cache", cache_line(args.length))
    console.print(table)
    return 0 if right else 1


@contextlib.contextmanager
def server(max_model_len: int, line: Sequence[str] = SERVE) -> Iterator[str]:
    """Run a line that serves the bundled model and give its address; stopped on the way out.

    Raises:
        UserError: it does not start; what it said last is on the console.
    """
    port = free_port()
    program = line[0] if line[0] == "sh" else str(Path(sys.executable).with_name(line[0]))
    command = [
        *(program, *line[1:]),
        *("--served-model-name", "recall", "--max-model-len", str(max_model_len)),
        *(*address(port), "--max-num-seqs", "8"),
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    console.print(f"$ {to_copy(command, environment)}", style="dim", markup=False, soft_wrap=True)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log, contextlib.ExitStack() as stack:
        run = started(command, port, log=log, environment=environment, seconds=START_SECONDS)
        try:
            with console.status("starting the server ..."):
                url = stack.enter_context(run)
        except UserError:
            said = Path(log.name).read_text(errors="replace").splitlines()
            console.print("\n".join(said[-30:]), markup=False, soft_wrap=True)
            raise
        for line in _report(Path(log.name)):
            console.print(f"[dim]{line}", soft_wrap=True)
        yield url


def to_copy(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A line for a shell that does the same."""
    return " ".join(
        [f"{name}={value}" for name, value in environment.items()] + [shlex.join(command)]
    )


def _report(log: Path) -> list[str]:
    """Lines of leank's startup report in the server's log."""
    return re.findall(r"\] (leank \w+: .*)", log.read_text(errors="replace"))


def cache_line(length: int) -> str:
    """Cache that a request of `length` tokens holds while it generates, against dense."""
    config = AutoConfig.from_pretrained(MODEL)
    mask = resolve_mask(None, str(MODEL), Geometry.from_hf_config(config))
    window = Window(mask.sink, mask.recent)
    plan = plan_cache(mask.profiles, mask.geometry.head_dim, config.dtype.itemsize)
    held = plan.blocks_in_decode(window, length) * plan.block_bytes
    dense = length * plan.dense_token_bytes
    return f"{held / 2**20:.1f} MiB against {dense / 2**20:.1f} MiB dense ({held / dense:.0%})"


if __name__ == "__main__":
    sys.exit(main())
