"""What is built, what gets installed, and which module may load which."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vllm_leank import __version__

ROOT = Path(__file__).parents[1]
PACKAGED = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"]
PACKAGES = ["vllm_leank", "kernels", "masks"]


def run(*command: object, cwd: Path) -> str:
    """Run a command and return its output; a failure shows all of it."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads: builds leave files where they run."""
    copy = tmp_path_factory.mktemp("source")
    for name in PACKAGED:
        shutil.copy(repo / name, copy / name)
    for name in PACKAGES:
        shutil.copytree(repo / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def installed_names(source: Path) -> set[str]:
    """Every file of the packages under the name it has to get once installed."""
    folders = {
        "vllm_leank": "vllm_leank",
        "kernels": "vllm_leank/kernels",
        "masks": "vllm_leank/masks",
    }
    return {
        f"{target}/{path.relative_to(source / folder).as_posix()}"
        for folder, target in folders.items()
        for path in (source / folder).rglob("*")
        if path.suffix in {".py", ".yaml", ".typed"}
    }


def build_wheel(tree: Path, out: Path) -> Path:
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", out, tree, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


def package_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path, source: Path) -> None:
    assert package_files(wheel) == installed_names(source)


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        fields = archive.read(metadata).decode().split("\n\n")[0].splitlines()
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert "Name: vllm-leank" in fields
    assert f"Version: {__version__}" in fields
    assert 'Requires-Dist: vllm<0.34,>=0.32.0; extra == "gpu"' in fields
    required = [f for f in fields if f.startswith("Requires-Dist: vllm") and "extra" not in f]
    assert not required, "vLLM's CPU build has another name"
    assert "[console_scripts]\nleank = vllm_leank.cli:main\n" in entry_points
    assert "[vllm.general_plugins]\nleank = vllm_leank.serving.plugin:register\n" in entry_points


@pytest.mark.parametrize("url", ["", "https://example.org/team/vllm-leank"])
def test_the_description_has_no_link_to_nowhere(source: Path, url: str, tmp_path: Path) -> None:
    """On a package index a link to a file of the repository leads nowhere unless it is absolute."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--long-description"],
        cwd=source,
        env=os.environ | {"VLLM_LEANK_URL": url},
        capture_output=True,
        text=True,
        check=True,
    )
    targets = re.findall(r"\]\(([^)]+)\)", done.stdout)
    assert all(target.startswith(("https://", "http://", "#")) for target in targets), targets
    ours = [target for target in targets if target.startswith(f"{url}/blob/")]
    files = [target.partition(f"{__version__}/")[2].partition("#")[0] for target in ours]
    assert (len(files) > 10) == bool(url)
    assert all((ROOT / name).exists() for name in files)


def test_classifiers_are_known(source: Path) -> None:
    shown = run(sys.executable, "setup.py", "--classifiers", cwd=source).splitlines()
    assert "Operating System :: POSIX :: Linux" in shown
    known = pytest.importorskip("trove_classifiers").classifiers
    assert set(shown) <= known


@pytest.mark.long
def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert (tree / "CHANGELOG.md").is_file()
    assert package_files(build_wheel(tree, tmp_path)) == package_files(wheel)


@pytest.mark.long
def test_editable_install_maps_packages_and_hides_the_tree(source: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    # The build needs setuptools: borrowed from this environment, as a plain path that reads no
    # .pth files, so that the project's own editable install here plays no part.
    here = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    Path(site.strip(), "borrowed.pth").write_text(f"{here}\n")
    pip = [sys.executable, "-m", "pip", "--python", python]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--ignore-installed"]
    run(*pip, "install", *options, "--editable", source, cwd=tmp_path)
    found = run(
        python,
        "-c",
        "import importlib.util as u, sys\n"
        "for name in ('vllm_leank', 'vllm_leank.kernels', 'vllm_leank.masks'):\n"
        "    print(u.find_spec(name).origin)\n"
        "print(u.find_spec('kernels') and u.find_spec('kernels').origin)\n"
        "print(sys.path)",
        cwd=tmp_path,
    ).splitlines()
    assert found[:3] == [str(source / name / "__init__.py") for name in PACKAGES]
    assert not found[3].startswith(str(source))
    assert str(source) not in found[4]


def test_kernels_of_this_run_is_not_our_folder(repo: Path) -> None:
    """Holds under plain `pytest`; `python -m pytest` puts the working directory on the path."""
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    ours = [place for place in places if place and Path(place).is_relative_to(repo)]
    site_packages = [place for place in ours if "site-packages" in Path(place).parts]
    assert ours == site_packages


def loaded_by(module: str, cwd: Path) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    return set(run(sys.executable, "-c", code, cwd=cwd).split())


def top_level(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["--help"],
        ["doctor"],
        ["plan", "--model", "MODEL", "--gpu-memory", "16GiB", "--max-model-len", "8192"],
        ["mask", "show", "leank/recall"],
        ["mask", "compose", "--model", "MODEL", "--out", "mask.yaml"],
    ],
    ids=lambda words: words[0],
)
def test_commands_that_load_nothing_slow(words: list[str], tmp_path: Path) -> None:
    """torch and transformers take seconds, vLLM ten: none is needed to look and to plan."""
    words = [str(ROOT / "benchmarks/recall/model") if one == "MODEL" else one for one in words]
    code = (
        "import atexit, sys\n"
        "from vllm_leank.cli import main\n"
        "atexit.register(lambda: print('loaded:', *sys.modules))\n"
        f"sys.argv = ['leank', *{words!r}]\n"
        "main()"
    )
    loaded = run(sys.executable, "-c", code, cwd=tmp_path).rpartition("loaded:")[2].split()
    assert not top_level(set(loaded)) & {"vllm", "triton", "torch", "transformers", "matplotlib"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("vllm_leank", {"vllm", "triton", "torch", "transformers", "numpy"}),
        ("vllm_leank.serving.plugin", {"vllm", "triton", "torch", "transformers", "numpy"}),
        ("vllm_leank.mask.file", {"vllm", "triton", "torch", "transformers"}),
        ("vllm_leank.core.window", {"vllm", "triton", "torch", "transformers"}),
        ("vllm_leank.core.plan", {"vllm", "triton", "torch", "transformers"}),
        ("vllm_leank.cli", {"vllm", "triton", "torch", "transformers"}),
    ],
)
def test_light_modules_load_nothing_heavy(module: str, forbidden: set[str], tmp_path: Path) -> None:
    assert not top_level(loaded_by(module, tmp_path)) & forbidden


def test_kernels_know_neither_vllm_nor_the_plugin(repo: Path, tmp_path: Path) -> None:
    """Of the package they may load the core, which knows neither as well."""
    names = [
        "vllm_leank.kernels" + ("" if path.stem == "__init__" else f".{path.stem}")
        for path in sorted((repo / "kernels").glob("*.py"))
    ]
    loaded = loaded_by(", ".join(names), tmp_path)
    assert "vllm" not in top_level(loaded)
    rooms = {name.split(".")[1] for name in loaded if name.startswith("vllm_leank.")}
    assert rooms <= {"kernels", "core", "version", "errors"}


def test_make_lets_python_keep_what_it_compiles(tmp_path):
    """Else each process of the tests compiles all that it imports."""
    asking = tmp_path / "Makefile"
    asking.write_text(f"include {ROOT}/Makefile\nask:\n\t@echo [$$PYTHONDONTWRITEBYTECODE]\n")
    line = ("env", "PYTHONDONTWRITEBYTECODE=1", "make", "--silent", "-f", asking, "ask")
    assert run(*line, cwd=tmp_path).split() == ["[]"]
