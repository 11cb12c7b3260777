"""A `vllm serve` line, read by vLLM's own parser, and the same line with leank selected."""

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

from vllm_leank.core.options import KEY, Options, parse_options
from vllm_leank.core.other_layers import NO_PREFIX_CACHING, STATES, other_layers
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.configs import is_path
from vllm_leank.serving.vllm.backend_name import BACKEND

if TYPE_CHECKING:
    import argparse

    from vllm.config import ModelConfig

_OPTIONS = re.compile(r"--additional[-_]config(?:\.[^=]*)?(=.*)?", re.DOTALL)
"""The flag in all its spellings: whole, or by key as in `--additional-config.leank.sink`."""

_UTILIZATION = re.compile("--gpu[-_]memory[-_]utilization")
"""The flag in both its spellings, where it may say what is the default."""

CPU_CACHE = "4G"
"""Bytes of a cache in a CPU's memory, as vLLM's flags take them."""


class ParserError(RuntimeError):
    """What vLLM's parser says of a line that it does not read."""


@dataclass(frozen=True)
class Line:
    """A `vllm serve` line.

    Attributes:
        words: what follows `vllm serve`.
        parsed: the flags, with those of a `--config` file.
        model: the model as vLLM would serve it, with overrides of its config.
    """

    words: tuple[str, ...]
    parsed: "argparse.Namespace"
    model: "ModelConfig"

    @property
    def options(self) -> Options:
        """The leank options that the line has.

        Raises:
            OptionError: they are not right.
        """
        return parse_options(self.parsed.additional_config)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint that would be served: this revision of it, with overrides of its config.

        Raises:
            UserError: its config lacks what a mask needs.
        """
        given = {
            "revision": self.parsed.revision,
            "trust_remote_code": self.parsed.trust_remote_code,
            "token": self.parsed.hf_token,
        }
        return Checkpoint.open(
            self.model.model,
            hub={name: value for name, value in given.items() if value},
            override=self.model.hf_config if self.parsed.hf_overrides else None,
            tokenizer_path=self.parsed.tokenizer,
        )

    def with_leank(self, **options: str) -> list[str]:
        """The words, with leank selected and its `options` beside those that the line has.

        Raises:
            UserError: the line selects another backend, or its options are no mapping.
        """
        words = list(self.words)
        backend = self.parsed.attention_backend or self.parsed.attention_config.backend
        if backend is None:
            words += ["--attention-backend", BACKEND.lower()]
        elif (name := str(getattr(backend, "name", backend))).upper() != BACKEND:
            raise UserError(
                f"leank serves with --attention-backend leank, but {name} is asked for: remove "
                "that, or start vllm serve itself"
            )
        if not options:
            return words
        given = self.parsed.additional_config
        if not isinstance(given, Mapping):
            raise UserError(f"--additional-config is {given!r}, but must be a JSON object")
        merged = {**given, KEY: {**given.get(KEY, {}), **options}}
        return [*_without_options(words), "--additional-config", json.dumps(merged)]


def cpu_cache(line: Line) -> list[str]:
    """The flag for a cache of `CPU_CACHE`, where nothing says how much a CPU's may take: vLLM would
    ask for 92% of the machine's memory, and not start where less is free.
    """
    import vllm.envs as envs
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    told = envs.VLLM_CPU_KVCACHE_SPACE or line.parsed.kv_cache_memory_bytes
    # A file of --config may say it as well.
    told = told or line.parsed.gpu_memory_utilization != EngineArgs.gpu_memory_utilization
    told = told or any(_UTILIZATION.match(word) for word in line.words)
    return [] if told or not current_platform.is_cpu() else ["--kv-cache-memory-bytes", CPU_CACHE]


def no_prefix_cache(line: Line) -> list[str]:
    """The flag that a model needs whose layers keep states, where nothing says whether there is a
    prefix cache: vLLM would have one, which leank refuses.
    """
    if line.parsed.enable_prefix_caching is not None:
        return []
    return [NO_PREFIX_CACHING] if other_layers(line.model.hf_text_config) == STATES else []


def read_line(arguments: Sequence[str]) -> Line:
    """Read a line as vLLM does, up to its model's config; see `parse_words` for `arguments`.

    Raises:
        UserError: vLLM would refuse it, or it names no model.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    words = tuple(serve_words(arguments))
    try:
        parsed = parse_words(words)
        if parsed.model_tag is None and "--config" not in words:
            raise UserError("name a model: leank serve MODEL --bits 2")
        model = AsyncEngineArgs.from_cli_args(parsed).create_model_config()
    except Exception as error:
        raise UserError(reason_of(error)) from error
    return Line(words, parsed, model)


def serve_words(arguments: Sequence[str]) -> list[str]:
    """What follows `vllm serve` in a line, which may begin with it."""
    line = list(arguments)
    for word in ("vllm", "serve"):
        if line[:1] == [word]:
            line.pop(0)
    return line


def parse_words(words: Sequence[str]) -> "argparse.Namespace":
    """The namespace that vLLM's own command makes of what follows `vllm serve`.

    Raises:
        UserError: it is no `vllm serve` line, or its model is a path to nothing.
        ParserError: vLLM's parser refuses it.
        Exception: vLLM refuses what was parsed.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    first = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if first[:2] == ["leank", "serve"]:
        raise UserError(
            "this is a line of `leank serve`: run it with --dry-run, and it says what it would "
            "serve, or what vLLM or leank would refuse"
        )
    if len(first) > 1:
        raise UserError(
            f"expected `vllm serve MODEL` and flags, but `{' '.join(first)}` is no MODEL"
        )
    load_general_plugins()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = parser.parse_args(["serve", *words])
    except SystemExit as ended:
        if not ended.code:
            raise
        message = errors.getvalue().strip().rpartition("error: ")[2]
        message = re.sub("<function loads at 0x[0-9a-f]+>", "JSON", message)
        raise ParserError(message) from None
    command.validate(parsed)
    parsed.model = parsed.model_tag or parsed.model
    if is_path(parsed.model) and not Path(parsed.model).exists():
        raise UserError(f"{parsed.model}: no such directory")
    return parsed


def cause_of(error: Exception) -> Exception:
    """What a check raised, where pydantic has wrapped it."""
    import pydantic

    if isinstance(error, pydantic.ValidationError):
        wrapped = error.errors()[0].get("ctx", {}).get("error")
        return wrapped if isinstance(wrapped, Exception) else error
    return error


def reason_of(error: Exception) -> str:
    """Why vLLM, or leank, refuses a line.

    Raises:
        Exception: `error` itself, where it is no refusal but a fault of leank.
    """
    cause = cause_of(error)
    if isinstance(cause, UserError):
        return str(cause)
    if _is_fault(cause):
        raise cause
    reason = str(cause)
    if not isinstance(cause, (ValueError, RuntimeError, OSError)):
        reason = f"{type(cause).__name__}: {reason}"
    return f"vLLM refuses it: {reason or type(cause).__name__}"


def _is_fault(error: Exception) -> bool:
    """Whether leank's code raised what it never means to, or something below it did."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    packages = [name.partition(".")[0] for name in frames]
    innermost = [name for name in packages if name in ("vllm", "vllm_leank")][-1:]
    return innermost == ["vllm_leank"] and not isinstance(error, RuntimeError)


def _without_options(words: Sequence[str]) -> Iterator[str]:
    """Words without `--additional-config` and its value, in whatever spelling."""
    rest = iter(words)
    for word in rest:
        if match := _OPTIONS.fullmatch(word):
            if match[1] is None:
                next(rest, None)
        else:
            yield word
