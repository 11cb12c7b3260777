"""Several workers: heads or layers split among processes, equal tokens."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from archive_definition import plan_of
from engines import engine
from mask_samples import coded_mask
from recall.demo import MODEL
from recall.tasks import TASKS, make_sample
from test_engine_answers import assert_same
from vllm.v1.executor import multiproc_executor

from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.lookup import find_masks

LIMITS = {"max_model_len": 1200, "max_num_seqs": 8, "max_num_batched_tokens": 512}
every_split = pytest.mark.skipif(
    not os.environ.get("LEANK_PARALLEL"), reason="takes minutes: set LEANK_PARALLEL=1"
)

# vLLM's CPU runner makes the tensors that a later stage receives only when it warms up for
# compilation, so that pipelines need a mode that compiles; this one calls the model as it is.
PIPELINE = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager", "cudagraph_mode": "NONE"},
}


def answers(mask=None, tasks=tuple(TASKS), lengths=(200, 700), **arguments):
    """Tokens and log-probabilities: 90 tokens are at least two compactions."""
    mask = mask or find_masks(str(MODEL))[0].path
    samples = [make_sample(task, length, 0) for task in tasks for length in lengths]
    prompts = [one.prompt_token_ids for one in samples]
    with engine(MODEL, mask, sink=32, recent=64, **LIMITS, **arguments) as running:
        return running.generate(prompts, 90)


@pytest.fixture
def split(monkeypatch):
    """Give a function that answers with several workers."""
    # One core each is not there to be bound to on every machine.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")

    def answer(*mask, **arguments):
        return answers(*mask, distributed_executor_backend="mp", **arguments)

    return answer


@pytest.fixture
def forked(monkeypatch):
    """Workers are copies of this process, not new ones: each of those imports vLLM."""
    monkeypatch.setattr(
        multiproc_executor, "get_mp_context", lambda: multiprocessing.get_context("fork")
    )
    # Threads are not copied: a worker that takes itself to have several waits for them for ever.
    # Not `torch.set_num_threads`, which does nothing once vLLM has had a worker in this process.
    threads = torch.get_num_threads()
    torch._C.set_num_threads(1)
    yield
    torch._C.set_num_threads(threads)


@pytest.mark.engine
@pytest.mark.long
def test_two_ranks_answer_like_one(split):
    assert_same(split(tensor_parallel_size=2), answers(), 1e-3)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("tasks", "lengths"),
    [
        pytest.param(("multikey",), (500,), id="few"),
        pytest.param(tuple(TASKS), (200, 700), id="all", marks=pytest.mark.long),
    ],
)
def test_two_ranks_share_heads_of_codes(split, forked, tmp_path, tasks, lengths):
    """Of different profiles, in pages of equal size."""
    save_mask(coded_mask(MODEL), tmp_path / "m.yaml")
    asked = tmp_path / "m.yaml", tasks, lengths
    assert_same(split(*asked, tensor_parallel_size=2), answers(*asked), 5e-3)


@pytest.mark.engine
@every_split
def test_two_stages_answer_like_one(split, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert_same(split(**PIPELINE), answers(), 1e-3)


@pytest.mark.engine
@every_split
def test_prefix_hits_and_preemption_on_two_ranks(split):
    """A pool of little more than one request, and prompts that share their beginnings."""
    tight = {"enable_prefix_caching": True, "num_gpu_blocks_override": 60}
    assert_same(split(tensor_parallel_size=2, **tight), answers(), 1e-3)


RAY_PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_id):
        return int(device_id)

def register():
    return "ray_platform.RayCpuPlatform"
"""
"""vLLM's CPU platform lacks one thing for Ray: what its devices are called there."""


@pytest.mark.engine
@every_split
def test_two_ranks_in_ray_answer_like_one(tmp_path):
    """In a process of its own, and in Ray's: the platform comes as a plugin, as vLLM has them."""
    pytest.importorskip("ray", reason="needs ray: pip install ray")
    (tmp_path / "ray_platform.py").write_text(RAY_PLATFORM)
    entry_points = "[vllm.platform_plugins]\nray_cpu = ray_platform:register\n"
    (tmp_path / "ray_platform-1.dist-info").mkdir()
    (tmp_path / "ray_platform-1.dist-info/METADATA").write_text("Name: ray-platform\nVersion: 1\n")
    (tmp_path / "ray_platform-1.dist-info/entry_points.txt").write_text(entry_points)
    script = f"""
import json, sys
import ray
sys.path[:0] = {sys.path!r}
from test_parallel import answers
if __name__ == "__main__":
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=100 << 20)
    found = answers(tensor_parallel_size=2, distributed_executor_backend="ray")
    print("answers", json.dumps(found))
"""
    (tmp_path / "run.py").write_text(script)
    added = {"PYTHONPATH": str(tmp_path), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py"],
        capture_output=True,
        text=True,
        env=os.environ | added,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (one for one in done.stdout.splitlines() if one.startswith("answers "))
    found = [tuple(one) for one in json.loads(line.removeprefix("answers "))]
    assert "RayWorkerProc" in done.stdout + done.stderr
    assert_same(found, answers(), 1e-3)


@pytest.mark.parametrize(("tp_size", "empty"), [(1, 0.0), (2, 0.007), (4, 0.0767), (8, 0.15)])
def test_equal_pages_leave_little_empty(leank, repo, tmp_path, tp_size, empty):
    """Share of all ranks' archive pages that holds nothing; at most 4% on two ranks."""
    source = repo.parent / "shared/official-masks/llama3.1-8b-instruct.pth"
    if not source.is_file():
        pytest.skip("the official mask is not here")
    model = repo / "benchmarks/shapes/llama-3.1-8b"
    assert leank("mask", "import", source, "--model", model, "--out", tmp_path / "m.yaml")[0] == 0
    kept = load_mask(tmp_path / "m.yaml").kept_counts.tolist()
    plan = plan_of(kept, 128, 2, tp_size)
    needed = sum(
        plan.archive_format.token_bytes(profile, 2) for layer in plan.profiles for profile in layer
    )
    assert 1 - needed / (plan.archive_token_bytes * tp_size) == pytest.approx(empty, abs=1e-3)
    assert tp_size != 2 or empty <= 0.04
