"""Kinds of text that calibration does not see: natural languages and programming languages.

    PYTHONPATH=benchmarks python -m real.unseen_texts --out texts

They are what a machine happens to have: messages of its programs in other languages, Perl's
library, headers of torch. `kl.py` reads them from the machine itself, or from the folder that this
writes, for machines that have none and for runs that are to read the same.
"""

import argparse
import gettext
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.builtin_prompts import ANSWER, Named
from vllm_leank.offline.prompts import Sample

CHARACTERS = 1 << 20
"""Most of a kind."""

CHARACTERS_PER_TOKEN = 8
"""More than texts have."""

LANGUAGES = {"french": "fr", "russian": "ru", "chinese": "zh_CN"}


def unseen_texts(folder: Path | None = None) -> dict[str, str]:
    """Texts by kind: those of the machine, empty where it has none, or `KIND.txt` of a folder."""
    if folder is not None:
        return {
            path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))
        }
    pieces = {kind: _messages(code) for kind, code in LANGUAGES.items()}
    pieces["perl"] = _files(["/usr/share/perl", "/usr/share/perl5", "/usr/lib"], ".pm", r"/perl")
    pieces["c++"] = _files([str(Path(torch.__file__).parent / "include")], ".h")
    return {kind: _joined(texts) for kind, texts in pieces.items()}


def digest_of(texts: dict[str, str]) -> str:
    """A sha256 of the texts."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def unseen_prompts(
    checkpoint: Checkpoint, kind: str, text: str, count: int, length: int, seed: int
) -> list[Named]:
    """`count` samples of `length` tokens, each from another place of a text; none where the text is
    shorter.
    """
    rng = np.random.default_rng(seed)
    starts = [match.end() for match in re.finditer("\n", text)] or [0]
    prompts: list[Named] = []
    for place in rng.choice(starts, count, replace=len(starts) < count):
        turned = text[place:] + text[:place]
        ids = checkpoint.encode(turned[: CHARACTERS_PER_TOKEN * length])[:length]
        if len(ids) == length:
            answer = min(ANSWER, length // 2)
            prompts.append((kind, Sample(ids[:-answer], ids[-answer:])))
    return prompts


def _messages(code: str) -> Iterator[str]:
    """What the programs of this machine say in a language."""
    for path in sorted(Path("/usr/share/locale", code, "LC_MESSAGES").glob("*.mo")):
        if path.name.startswith("iso_"):
            continue  # lists of names
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        texts = [text for key, text in catalog.items() if key and len(text) > 60]
        yield "\n".join(texts) + "\n\n"


def _files(roots: list[str], suffix: str, within: str = "") -> Iterator[str]:
    """Files of some size below some folders whose paths match."""
    found = (sorted(Path(root).rglob(f"*{suffix}")) for root in roots)
    for path in itertools.chain.from_iterable(found):
        if re.search(within, path.as_posix()) and 2000 < path.stat().st_size < 60000:
            yield path.read_text(encoding="utf-8", errors="replace") + "\n\n"


def _joined(pieces: Iterator[str]) -> str:
    """Pieces one after the other, as many as give `CHARACTERS`; each of them once."""
    text, seen = "", set()
    for piece in pieces:
        if piece not in seen:
            seen.add(piece)
            text += piece
        if len(text) >= CHARACTERS:
            break
    return text[:CHARACTERS]


def main() -> None:
    """Write each kind as a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the texts")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for kind, text in unseen_texts().items():
        if text:
            (out / f"{kind}.txt").write_text(text, encoding="utf-8")
        print(f"{kind}: {len(text):,} characters" if text else f"{kind}: not on this machine")


if __name__ == "__main__":
    main()
