"""RULER through lm_eval (EleutherAI's harness) against a running server, dense or leank.

lm_eval has the tasks; here are the arguments without which it measures something else: it would cut
prompts at 2,048 tokens, ask for 4,096 whatever the server can, give up after five minutes, and send
tokens without the one that begins a sequence.
"""

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_leank.errors import UserError

SYNTHETIC = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
"""Tasks that are made up; the other seven download essays and questions."""

SLACK = 256
"""Tokens beyond the length, more than a task generates: RULER counts the answer as part of it."""

_NEEDED = ("lm_eval", "aiohttp", "tenacity", "nltk", "wonderwords", "scipy")


@dataclass(frozen=True)
class Ruler:
    """What is asked of which server.

    Attributes:
        model: the name that the server gives the model.
        base_url: where its API is, as `http://localhost:8000` or with `/v1`.
        tokenizer: a directory or hub id; the model's own.
        tasks: names of lm_eval.
        concurrency: requests at once.
        timeout: seconds that an answer may take.
        limit: samples per task and length (None: all 500).
        out: folder for lm_eval's results (None: they are printed only).

    Raises:
        UserError: a name cannot be passed on.
    """

    model: str
    base_url: str
    tokenizer: str
    tasks: Sequence[str]
    concurrency: int
    timeout: int
    limit: int | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("model", "base_url", "tokenizer"):
            if "," in (value := getattr(self, name)):
                raise UserError(f"{value}: lm_eval takes no commas in {name}")

    @property
    def server(self) -> str:
        """Where the server is, whose API is in `/v1`."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def command(self, length: int) -> list[str]:
        """The command line for prompts of `length` tokens.

        One for each length: lm_eval's limit takes the first samples, which have the first length.
        """
        model_args = {
            "model": self.model,
            "base_url": f"{self.server}/v1/completions",
            "tokenizer": self.tokenizer,
            "tokenizer_backend": "huggingface",
            # As text: the server adds the token that begins a sequence, lm_eval would not.
            "tokenized_requests": False,
            "num_concurrent": self.concurrency,
            "max_length": length + SLACK,
            "timeout": self.timeout,
        }
        # -P: the working directory, which may be a checkout, is no place to import from.
        command = [sys.executable, "-P", "-m", "lm_eval", "--model", "local-completions"]
        command += ["--model_args", ",".join(f"{name}={it}" for name, it in model_args.items())]
        command += ["--tasks", ",".join(self.tasks)]
        command += ["--metadata", json.dumps({"max_seq_lengths": [length]})]
        if self.limit is not None:
            command += ["--limit", str(self.limit)]
        if self.out is not None:
            command += ["--output_path", str(self.out / str(length))]
        return command


def chosen_tasks(names: str) -> tuple[str, ...]:
    """Names separated by commas; `synthetic` and `all` stand for several.

    Raises:
        UserError: there are none.
    """
    groups = {"all": ("ruler",), "synthetic": SYNTHETIC}
    tasks = [task for name in names.split(",") for task in groups.get(name, (name,)) if task]
    if not tasks:
        raise UserError("--tasks names none; for example synthetic, all or ruler_vt,ruler_cwe")
    return tuple(dict.fromkeys(tasks))


def require_lm_eval() -> None:
    """Refuse to start where lm_eval, or what it needs for RULER, is missing.

    Raises:
        UserError: something is.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"RULER needs lm_eval; missing: {', '.join(missing)}. pip install 'lm_eval[api,ruler]'"
        )
