"""Plants each of the `faults` in a copy of the package, and runs the tests that should fail.

    .venv/bin/python tests/mutations.py [--only WORDS]

A fault that its tests do not notice is a gap in the tests. On a machine without a GPU, faults that
only a GPU's tests can show are left out. Takes some minutes; the test run plants others in process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from faults import FAULTS

ROOT = Path(__file__).parents[1]


def passes(tests: str, package: Path) -> bool:
    """Whether tests pass with the package in this folder.

    Raises:
        RuntimeError: they could not be run.
    """
    names = [str(ROOT / "tests" / name) for name in tests.split()]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *names],
        # Found there before the editable installation; the root, with its `kernels/`, stays away.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode > 1:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def main() -> int:
    """Plant each fault, print what became of it, and say whether all were noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="faults whose name has these words")
    args = parser.parse_args()
    chosen = [one for one in FAULTS if args.only in one.name]
    possible = [one for one in chosen if torch.cuda.is_available() or not one.gpu]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        build = ["setup.py", "--quiet", "build_py", "--build-lib", folder]
        subprocess.run([sys.executable, *build], cwd=ROOT, check=True)
        package = Path(folder) / "vllm_leank"
        for tests in sorted({one.tests for one in possible}):
            if not passes(tests, package.parent):
                raise SystemExit(f"{tests} fail without a fault")
        print("The tests pass without a fault.", flush=True)
        for fault in chosen:
            if fault not in possible:
                print(f"needs a GPU  {fault.name}")
                continue
            file = package / fault.module
            text = file.read_text(encoding="utf-8")
            if text.count(fault.old) != 1:
                raise SystemExit(f"{fault.name}: {fault.module} has changed")
            file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
            noticed = not passes(fault.tests, package.parent)
            file.write_text(text, encoding="utf-8")
            missed += not noticed
            print(f"{'noticed' if noticed else 'NOT NOTICED'}  {fault.name}", flush=True)
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
