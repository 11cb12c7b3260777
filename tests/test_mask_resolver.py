"""Which mask a model gets, and what is said when there is none."""

import os
import re
import socket
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
from mask_samples import bits_mask

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.checks import check_model_id
from vllm_leank.mask.configs import is_path
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.lookup import find_masks, list_masks, mask_of_bits, resolve_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.names import model_name

SHORT = Geometry(2, 2, 64, 1e6, None)
LONG = Geometry(2, 2, 64, 1e6, {"rope_type": "yarn", "factor": 4.0})
OTHER = Geometry(2, 2, 96, 1e6, None)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (SHORT, "2 layers of 2 KV heads of 64 channels, RoPE of type default with theta 1,000,000"),
        (LONG, "2 layers of 2 KV heads of 64 channels, RoPE of type yarn with theta 1,000,000"),
        (Geometry(32, 8, 128, None, None), "32 layers of 8 KV heads of 128 channels, no RoPE"),
    ],
)
def test_a_geometry_in_words(geometry, words):
    assert str(geometry) == words


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "masks"
    for name, model, geometry in [
        ("org/short.yaml", "Org/Model-7B", SHORT),
        ("org/long.yaml", "Org/Model-7B", LONG),
        ("other.yaml", "else/Model-8B", OTHER),
    ]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        save_mask(Mask.full(geometry, model=model), root / name)
    (root / "README.md").write_text("not a mask")
    return root


def resolved(folder, model, geometry, option=None):
    return resolve_mask(option, model, geometry, folder=folder).path.relative_to(folder).as_posix()


def test_context_ranges_of_one_model_are_told_apart_by_geometry(folder):
    assert resolved(folder, "Org/Model-7B", SHORT) == "org/short.yaml"
    assert resolved(folder, "org/model-7b", LONG) == "org/long.yaml"


@pytest.mark.parametrize(
    ("directory", "found"),
    [
        ("elsewhere/Model-7B", True),
        ("elsewhere/model-7b/", True),
        ("Model-7B/model", True),
        ("models--org--Model-7B/snapshots/0123", True),
        ("models--fork--Model-7B/snapshots/0123", False),
        ("Model-7B/checkpoint-100", False),
        ("my-Model-7B", False),
    ],
)
def test_local_directories(folder, tmp_path, monkeypatch, directory, found):
    (tmp_path / directory).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in (directory, os.path.join(str(tmp_path), directory)):
        if found:
            assert resolved(folder, model, SHORT) == "org/short.yaml"
        else:
            assert find_masks(model, folder) == []


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("my model", "my-model"),
        ("m\u00f6del (2)", "m-del-2"),
        ("a" * 120, "a" * 96),
    ],
)
def test_directories_have_names_that_ids_may_have(tmp_path, monkeypatch, directory, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / directory).mkdir()
    assert model_name(directory) == name
    check_model_id(name)


@pytest.mark.parametrize("directory", ["/", "/model", "\u6a21\u578b"])
def test_a_folder_whose_name_says_nothing_is_called_after_its_config(
    tmp_path, monkeypatch, directory
):
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(Path, "read_bytes", lambda path: contents[str(path)])
    config = os.path.join(os.path.abspath(directory), "config.json")
    names = set()
    for number in range(2):
        contents = {config: b"%d" % number}
        names.add(model_name(directory))
        check_model_id(model_name(directory))
    assert len(names) == 2
    assert all(re.fullmatch(r"model-[0-9a-f]{8}", name) for name in names)


def test_a_name_without_organisation_is_no_hub_id(folder):
    assert find_masks("Model-7B", folder) == []
    assert find_masks("fork/Model-7B", folder) == []


def test_unknown_model(folder):
    with pytest.raises(MaskError, match="no mask for a/b") as caught:
        resolve_mask(None, "a/b", SHORT, folder=folder)
    message = str(caught.value)
    assert f"({SHORT}) is there: none has that model id\n" in message
    assert '--mask of leank or by "mask" in --additional-config of vllm serve' in message
    assert "  leank mask calibrate a/b --bits 2\n" in message
    for command in ("import", "learn"):
        (line,) = (line for line in message.splitlines() if f"leank mask {command} " in line)
        assert line.endswith("--model a/b --out mask.yaml")


def test_known_model_with_another_geometry(folder):
    with pytest.raises(MaskError, match="no mask for else/model-8b") as caught:
        resolve_mask(None, "else/model-8b", SHORT, folder=folder)
    assert f"{folder / 'other.yaml'}: head_dim is 96, not 64" in str(caught.value)


def test_several_fitting_masks(folder):
    save_mask(Mask.full(SHORT, model="org/model-7b"), folder / "second.yaml")
    with pytest.raises(MaskError, match="several masks fit") as caught:
        resolve_mask(None, "org/model-7b", SHORT, folder=folder)
    assert "short.yaml" in str(caught.value)
    assert "second.yaml; name a mask file, by --mask" in str(caught.value)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's folder, empty, beside a package whose only mask is for org/model-7b."""
    package = tmp_path / "package"
    package.mkdir()
    save_mask(Mask.full(SHORT, model="org/model-7b"), package / "bundled.yaml")
    monkeypatch.setattr("vllm_leank.mask.lookup.package_folder", lambda: package)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = tmp_path / "data" / "vllm-leank" / "masks"
    folder.mkdir(parents=True)
    return folder


def test_a_user_without_home_directory_is_told(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="no home directory: set HOME or XDG_DATA_HOME"):
        find_masks("org/model-7b")


def test_the_users_masks_win(own):
    assert resolve_mask(None, "org/model-7b", SHORT).path.name == "bundled.yaml"
    save_mask(Mask.full(LONG, model="org/model-7b"), own / "long.yaml")
    assert resolve_mask(None, "org/model-7b", SHORT).path.name == "bundled.yaml"
    save_mask(Mask.full(SHORT, model="org/model-7b"), own / "mine.yaml")
    assert resolve_mask(None, "org/model-7b", SHORT).path == own / "mine.yaml"
    assert resolve_mask(None, "org/model-7b", LONG).path == own / "long.yaml"
    save_mask(Mask.full(SHORT, model="org/model-7b"), own / "second.yaml")
    with pytest.raises(MaskError, match="several masks fit") as caught:
        resolve_mask(None, "org/model-7b", SHORT)
    assert f"{own / 'mine.yaml'}, {own / 'second.yaml'}; name a mask file" in str(caught.value)
    assert '"mask" in --additional-config' in str(caught.value)


def test_of_the_packages_masks_the_most_careful_one_wins(own, tmp_path):
    package = tmp_path / "package"
    few, some = (bits_mask(SHORT, bits, "org/model-7b") for bits in (2, 4))
    save_mask(few, package / "a_few.yaml")
    assert resolve_mask(None, "org/model-7b", SHORT).path == package / "a_few.yaml"
    save_mask(some, package / "some.yaml")
    assert resolve_mask(None, "org/model-7b", SHORT).path == package / "some.yaml"
    save_mask(few, own / "few.yaml")
    assert resolve_mask(None, "org/model-7b", SHORT).path == own / "few.yaml"


def test_where_masks_were_looked_for(own):
    with pytest.raises(MaskError, match="no mask for a/b") as caught:
        resolve_mask(None, "a/b", SHORT)
    assert f"comes with the package or lies in {own}: none has that model id" in str(caught.value)


def test_option_names_a_file(folder, monkeypatch):
    path = str(folder / "org" / "short.yaml")
    assert resolved(folder, "any/model", SHORT, path) == "org/short.yaml"
    monkeypatch.setenv("HOME", str(folder))
    assert resolved(folder, "any/model", SHORT, "~/org/short.yaml") == "org/short.yaml"
    with pytest.raises(MaskError, match="No such file"):
        resolve_mask(str(folder / "none.yaml"), "Org/Model-7B", SHORT, folder=folder)


def test_option_with_another_geometry_names_field_values_and_file(folder):
    path = folder / "org" / "long.yaml"
    with pytest.raises(MaskError, match="rope_scaling is") as caught:
        resolve_mask(str(path), "Org/Model-7B", SHORT, folder=folder)
    message = str(caught.value)
    assert str(path) in message
    assert "'yarn'" in message
    assert "not None" in message


def test_a_broken_file_in_the_folder_is_named_only_where_nothing_else_fits(folder):
    (folder / "broken.yaml").write_text("format: leank-mask/9\n")
    assert resolved(folder, "Org/Model-7B", SHORT) == "org/short.yaml"
    with pytest.raises(MaskError, match="no mask for a/b") as caught:
        resolve_mask(None, "a/b", SHORT, folder=folder)
    broken = f"{folder / 'broken.yaml'}, line 1: format: is 'leank-mask/9'"
    assert f"cannot be read:\n  {broken}" in str(caught.value)
    with pytest.raises(MaskError, match="leank-mask/9"):
        resolve_mask(str(folder / "broken.yaml"), "Org/Model-7B", SHORT)


def test_masks_of_the_package_are_valid_and_unambiguous(repo):
    masks = list_masks()
    assert len(masks) == len(list((repo / "masks").rglob("*.yaml")))
    for mask in masks:
        of_model = [one for one in masks if one.model == mask.model]
        found = resolve_mask(None, mask.model, mask.geometry)
        assert found.path in [one.path for one in of_model]
        care = max((one.is_packed, one.bits) for one in of_model)
        assert (found.is_packed, found.bits) == care
        if mask.is_packed:
            named = mask_of_bits(mask.model, mask.geometry, mask.provenance["bits"])
            assert named.path == mask.path


def test_a_hub_that_does_not_answer_is_not_asked_for_half_a_minute(monkeypatch, tmp_path):
    from vllm_leank.mask.hub import PROXIES, work_offline_without_a_hub

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(hub, "ENDPOINT", address)
        work_offline_without_a_hub.cache_clear()
        work_offline_without_a_hub()
        assert hub.HF_HUB_OFFLINE
        free.listen()
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        work_offline_without_a_hub.cache_clear()
        work_offline_without_a_hub()
        assert not hub.HF_HUB_OFFLINE
    work_offline_without_a_hub.cache_clear()


@pytest.mark.parametrize(
    "path", ["./none", "/none/x", "a/b/c", "tests/none-such", "none/", "x.json"]
)
def test_paths_to_nothing_are_no_hub_ids(path, repo, monkeypatch):
    monkeypatch.chdir(repo)
    assert is_path(path)
    with pytest.raises(UserError, match="no such directory"):
        Checkpoint.open(path)


@pytest.mark.parametrize("name", ["org/name", "name", "Qwen/Qwen2.5-7B"])
def test_hub_ids_are_no_paths(name, repo, monkeypatch):
    monkeypatch.chdir(repo)
    assert not is_path(name)
