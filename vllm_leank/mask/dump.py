"""Writes plain values as the YAML text of a mask file."""

from collections.abc import Mapping
from typing import Any

import yaml

_ON_ONE_LINE = ("geometry", "window")


def dump_document(document: Mapping[str, Any]) -> str:
    """The text of a file with these keys, in their order. `layers` has a line per layer."""
    return "".join(_block(key, value) for key, value in document.items())


def _block(key: str, value: Any) -> str:
    if key == "layers":
        lines = ("  - [" + ", ".join(f'"{head}"' for head in heads) + "]\n" for heads in value)
        return "layers:\n" + "".join(lines)
    if key in _ON_ONE_LINE:
        return f"{key}: {_yaml(value, flow=True)}"
    return _yaml({key: value})


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
