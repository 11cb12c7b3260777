"""The examples that need no server, `LLM(...)` and Docker; others are in `test_serve.py`."""

import importlib.util
import json
import re

import pytest
import yaml
from engines import engine
from recall.demo import MODEL
from vllm.engine.arg_utils import EngineArgs

from vllm_leank.mask.lookup import find_masks


@pytest.mark.engine
def test_offline(repo, monkeypatch, capsys):
    """Its arguments make a config, and its prompt gets the right answer."""
    spec = importlib.util.spec_from_file_location("offline", repo / "examples/offline.py")
    offline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(offline)
    (mask,) = find_masks(str(MODEL))
    window = {"sink": mask.sink, "recent": mask.recent}
    made = []

    with engine(
        MODEL, mask.path, max_model_len=2048, skip_tokenizer_init=False, **window
    ) as running:

        def make(**arguments):
            made.append(EngineArgs(**arguments).create_engine_config())
            return running.llm

        monkeypatch.setattr(offline, "LLM", make)
        assert offline.main() == "mava vife tawa maju ."
    (config,) = made
    assert config.attention_config.backend.name == "LEANK"
    assert "mava vife tawa maju ." in capsys.readouterr().out


@pytest.fixture
def docker(repo):
    return repo / "examples/docker"


def test_the_image_copies_what_a_build_needs(repo, docker):
    text = (docker / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    assert all((repo / name).exists() for name in copied)
    assert {"setup.py", "vllm_leank", "kernels", "masks", "README.md"} <= set(copied)
    (version,) = re.findall(r"^ARG VLLM=v(\S+)$", text, re.MULTILINE)
    from vllm_leank.serving.vllm.versions import unsupported_vllm

    assert unsupported_vllm(version) is None
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0]) == ["leank", "serve"]


def test_compose_mounts_what_is_there(docker):
    services = yaml.safe_load((docker / "compose.yaml").read_text())["services"]
    build = services["leank"]["build"]
    assert (docker / build["context"] / build["dockerfile"]).samefile(docker / "Dockerfile")
    mounts = {}
    for service in services.values():
        for volume in service["volumes"]:
            if volume.startswith("."):
                source, target = volume.removesuffix(":ro").split(":")
                mounts[target] = docker / source
    assert all(path.is_file() for path in mounts.values())
    (targets,) = yaml.safe_load(mounts["/etc/prometheus/prometheus.yml"].read_text())[
        "scrape_configs"
    ]
    assert targets["static_configs"] == [{"targets": ["leank:8000"]}]
    provisioning = [
        yaml.safe_load(path.read_text()) for name, path in mounts.items() if "provis" in name
    ]
    (source,) = next(one["datasources"] for one in provisioning if "datasources" in one)
    assert source["type"] == "prometheus"
    assert source["url"].split("/")[2].split(":")[0] in services
    (provider,) = next(one["providers"] for one in provisioning if "providers" in one)
    (dashboard,) = [
        path for name, path in mounts.items() if name.startswith(provider["options"]["path"])
    ]
    uid = json.loads(dashboard.read_text())["uid"]
    assert f"/d/{uid}." in (docker / "compose.yaml").read_text()
