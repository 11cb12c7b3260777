"""Texts that lie on every machine with Python: its library's sources, help texts, licences."""

import functools
import importlib.metadata
import importlib.util
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

Document = tuple[str, Callable[[], str]]
"""A name that is the same whenever it is asked, and how to get the text."""

_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
_LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


class Texts:
    """Documents one after the other, from any of them on, for ever; a quarter is held out."""

    def __init__(self, documents: Sequence[Document], held_out: bool):
        self.documents = sorted(
            (one for one in documents if (zlib.crc32(one[0].encode()) % 4 == 3) == held_out),
            key=lambda one: one[0],
        )

    def __len__(self) -> int:
        return len(self.documents)

    def pieces(self, rng: np.random.Generator) -> Iterator[str]:
        """Whole documents, in an order of `rng`."""
        while True:
            for i in rng.permutation(len(self.documents)):
                yield self.documents[i][1]() + "\n\n"


@functools.cache
def library_sources() -> Sequence[Document]:
    """The source files of Python's library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY & set(path.relative_to(root).parts) and path.stat().st_size > 2000
    ]
    return [(path.relative_to(root).as_posix(), functools.partial(_text, path)) for path in files]


@functools.cache
def prose() -> Sequence[Document]:
    """Python's help texts, and licences and descriptions of installed packages."""
    return [*_help_texts(), *_package_texts()]


def _help_texts() -> list[Document]:
    """What Python's `help()` knows of the language."""
    if importlib.util.find_spec("pydoc_data") is None:
        return []
    from pydoc_data.topics import topics

    return [(f"help/{name}", functools.partial(str, text)) for name, text in topics.items()]


def _package_texts() -> list[Document]:
    """Licences and descriptions of the packages that are installed. Each text once, as many have
    the same licence, and what is held out must not be read under another name.
    """
    found: dict[str, Document] = {}
    packages = sorted(importlib.metadata.distributions(), key=lambda package: package.name or "")
    for package in packages:
        name = package.name
        text = _description(package)
        found.setdefault(text, (f"{name}/description", functools.partial(str, text)))
        for file in package.files or []:
            if file.name.upper().startswith(_LICENCES) and file.suffix in ("", ".txt", ".md"):
                text = _text(Path(str(file.locate())))
                found.setdefault(text, (f"{name}/{file.name}", functools.partial(str, text)))
    return list(found.values())


def _description(package: importlib.metadata.Distribution) -> str:
    return (package.read_text("METADATA") or "").partition("\n\n")[2]


def _text(path: Path) -> str:
    """The text of a file, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
