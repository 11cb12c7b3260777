"""Which room of the package may import which, and that nothing imports in a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOMS = {
    "core": set(),
    "mask": {"core"},
    "kernels": {"core"},
    "offline": {"core", "mask", "kernels"},
    "learn": {"core", "mask", "offline"},
    "bench": {"core", "mask", "kernels"},
    "serving": {"core", "mask", "kernels"},
    "cli": {"core", "mask", "kernels", "offline", "learn", "bench", "serving"},
}
"""What each room may import besides itself and the package's `errors` and `version`."""

SERVING_IN_CLI = {"vllm_leank.cli.doctor", "vllm_leank.cli.serve"}
"""Commands that look at a server's side. All others must work without vLLM."""

OF_VLLM = {"bench", "serving", "cli"}
"""Rooms that may import vLLM."""

COMMON = {"vllm_leank", "vllm_leank.errors", "vllm_leank.version"}


def module_files(repo: Path) -> dict[str, Path]:
    """Every module of the package by name, as it is called once installed."""
    files = {}
    for folder, package in (("vllm_leank", "vllm_leank"), ("kernels", "vllm_leank.kernels")):
        for path in sorted((repo / folder).rglob("*.py")):
            parts = path.relative_to(repo / folder).with_suffix("").parts
            files[".".join((package, *parts)).removesuffix(".__init__")] = path
    return files


def imports_of(path: Path, known: set[str]) -> Iterator[str]:
    """Modules that a file imports, at any depth; `from package import module` is the module's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else str(node.module)


@pytest.fixture(scope="module")
def imports(repo: Path) -> dict[str, set[str]]:
    files = module_files(repo)
    return {name: set(imports_of(path, set(files))) for name, path in files.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def faults(imports: dict[str, set[str]]) -> list[str]:
    """What breaks the directions."""
    found = []
    for name, imported in imports.items():
        if name in COMMON:
            continue
        if room(name) not in ROOMS:
            found.append(f"{name} stands in no room")
            continue
        for other in sorted(imported):
            if other.partition(".")[0] == "vllm" and room(name) not in OF_VLLM:
                found.append(f"{name} imports {other}")
            if other.partition(".")[0] != "vllm_leank" or other in COMMON:
                continue
            inside = room(other) == room(name)
            if not inside and room(other) not in ROOMS[room(name)]:
                found.append(f"{name} imports {other}")
            if room(name) == "cli" and room(other) == "serving" and name not in SERVING_IN_CLI:
                found.append(f"{name} imports {other}")
    return found


def test_rooms_import_what_they_may(imports):
    assert faults(imports) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("vllm_leank.core.window", "vllm_leank.mask.file"),
        ("vllm_leank.core.window", "vllm.config"),
        ("vllm_leank.mask.file", "vllm_leank.offline.verify"),
        ("vllm_leank.kernels.decode", "vllm_leank.serving.impl"),
        ("vllm_leank.offline.verify", "vllm_leank.learn.run"),
        ("vllm_leank.cli.plan", "vllm_leank.serving.settings"),
        ("vllm_leank.stray", "vllm_leank.core.window"),
    ],
)
def test_one_wrong_import_is_found(imports, module, imported):
    assert faults({**imports, module: {*imports.get(module, ()), imported}})


def test_nothing_imports_in_a_circle(imports):
    graph = {name: imported & imports.keys() - {name} for name, imported in imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_is_long(repo):
    """A file has one job, and fits on a few screens."""
    long = {
        name: count
        for name, path in module_files(repo).items()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 300
    }
    assert long == {}
