"""Writes plain values as the YAML text of a mask file."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_ON_ONE_LINE = ("geometry", "window")


def dump_document(document: Mapping[str, Any]) -> str:
    """The text of a file with these keys, in their order."""
    return "".join(_block(key, value) for key, value in document.items())


def _block(key: str, value: Any) -> str:
    if key == "layers":
        return "layers:\n" + "".join(_layer(*layer) for layer in enumerate(value))
    if key == "profiles":
        return "profiles:\n" + "".join(f"  - {_yaml(profile, flow=True)}" for profile in value)
    if key in _ON_ONE_LINE:
        return f"{key}: {_yaml(value, flow=True)}"
    return _yaml({key: value})


def _layer(number: int, heads: Sequence[str | Mapping[str, str]]) -> str:
    """Heads that are one text each stand on one line, others below each other."""
    if isinstance(heads[0], str):
        return "  - [" + ", ".join(f'"{head}"' for head in heads) + "]\n"
    text = f"  - # layer {number}\n"
    for head in heads:
        assert not isinstance(head, str)
        lines = [f'{name}: "{value}"\n' for name, value in head.items()]
        text += "    - " + "      ".join(lines)
    return text


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        # An object that occurs twice is written twice: the reader takes no anchors.
        return True


def _yaml(value: dict[str, Any], *, flow: bool = False) -> str:
    # Without allow_unicode: PyYAML writes a raw U+0085 and reads it back as a blank.
    return yaml.dump(
        value,
        Dumper=_PlainDumper,
        sort_keys=False,
        default_flow_style=flow,
        width=10**6 if flow else 100,
    )
