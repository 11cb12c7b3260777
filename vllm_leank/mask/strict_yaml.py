"""A strict reader for small YAML files people write by hand.

It takes the plain part of YAML (mappings with string keys, lists, scalars) and refuses the rest:
anchors, aliases, tags, merge keys, several documents, duplicate keys and deep nesting. Each value
comes with the line it stands on, so that whoever checks the values can name the line.
"""

import math
from typing import Any

import yaml

from vllm_leank.errors import printable

_BaseLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_TEXT = 100_000
"""Characters of one value."""
MAX_NUMBERS = 10_000
"""Numbers of a file: slower to read than text, which holds what masks have much of."""
MAX_NUMBER = 100
"""Characters of a number. Longer ones are slow to read, and no number that anybody means."""

Loc = tuple[str | int, ...]


class YamlError(ValueError):
    """What is wrong, and the line (from 1) and key where it is."""

    def __init__(self, reason: str, line: int | None = None, loc: Loc = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.loc = loc


def read_strict_yaml(text: str) -> tuple[Any, dict[Loc, int]]:
    """Read `text` as one plain YAML document.

    Returns the value (dicts, lists, str, int, float, bool, None; timestamps stay text) and the line
    of every key and list item, by its path: `{("layers", 3, 1): 17, ...}`; `()` is the document.

    Raises:
        YamlError: the text is not YAML, or uses more than the plain part of it.
    """
    try:
        return _Reader(text).document()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1 if isinstance(error.position, int) else None
        raise YamlError(f"not YAML: {error.reason}", line) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"not YAML: {error.problem}", mark.line + 1 if mark else None) from error


class _Reader:
    """One pass over the parser's events; building nodes first would already expand aliases."""

    def __init__(self, text: str) -> None:
        self.loader = _BaseLoader(text)
        self.lines: dict[Loc, int] = {}
        self.values = 0
        self.numbers = 0

    def document(self) -> tuple[Any, dict[Loc, int]]:
        self.loader.get_event()  # StreamStart
        if self.loader.check_event(yaml.StreamEndEvent):
            raise YamlError("the file is empty", 1)
        self.loader.get_event()  # DocumentStart
        value = self.node(self.loader.get_event(), ())
        self.loader.get_event()  # DocumentEnd
        if not self.loader.check_event(yaml.StreamEndEvent):
            line = self.loader.peek_event().start_mark.line + 1
            raise YamlError("a second YAML document starts here", line)
        return value, self.lines

    def node(self, event: Any, loc: Loc) -> Any:
        """The value that begins with a node's event."""
        line = event.start_mark.line + 1
        self.lines.setdefault(loc, line)
        self.values += 1
        if self.values > MAX_VALUES:
            raise YamlError(f"more than {MAX_VALUES:,} values", line, loc[:1])
        if len(loc) > MAX_DEPTH:
            raise YamlError(f"nested deeper than {MAX_DEPTH} levels", line, loc[:2])
        if isinstance(event, yaml.AliasEvent):
            raise YamlError(f"alias *{event.anchor}: aliases are not allowed", line, loc)
        if event.anchor is not None:
            raise YamlError(f"anchor &{event.anchor}: anchors are not allowed", line, loc)
        # A quoted scalar carries the tag "!" from some parsers: that one is only the quotes.
        if event.tag not in (None, "!"):
            raise YamlError(f"tag {printable(event.tag)}: tags are not allowed", line, loc)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(loc)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(loc)
        return self.scalar(event, line, loc)

    def mapping(self, loc: Loc) -> dict[str, Any]:
        value: dict[str, Any] = {}
        while not isinstance(event := self.loader.get_event(), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            key = self.node(event, (*loc, "(key)"))
            del self.lines[(*loc, "(key)")]
            if not isinstance(key, str):
                raise YamlError(f"key {str(key)[:40]}: keys must be plain text", line, loc)
            if key in value:
                first = self.lines[(*loc, key)]
                raise YamlError(f"duplicate key, first on line {first}", line, (*loc, key))
            self.lines[(*loc, key)] = line
            value[key] = self.node(self.loader.get_event(), (*loc, key))
        return value

    def sequence(self, loc: Loc) -> list[Any]:
        value: list[Any] = []
        while not isinstance(event := self.loader.get_event(), yaml.SequenceEndEvent):
            value.append(self.node(event, (*loc, len(value))))
        return value

    def scalar(self, event: yaml.ScalarEvent, line: int, loc: Loc) -> Any:
        if len(event.value) > MAX_TEXT:
            reason = f"text of {len(event.value):,} characters; at most {MAX_TEXT:,} are read"
            raise YamlError(reason, line, loc)
        tag = self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        kind = tag.removeprefix("tag:yaml.org,2002:")
        if kind in ("str", "timestamp"):
            return event.value
        if kind not in ("null", "bool", "int", "float"):
            raise YamlError(f"{event.value!r} is not allowed here", line, loc)
        if kind in ("int", "float"):
            _check_number(event.value, line, loc)
            self.numbers += 1
            if self.numbers > MAX_NUMBERS:
                raise YamlError(f"more than {MAX_NUMBERS:,} numbers", line, loc[:1])
        node = yaml.ScalarNode(tag, event.value)
        try:
            value = self.loader.construct_object(node)
        except ValueError as error:
            raise YamlError(f"{event.value[:40]!r} is not a number", line, loc) from error
        if isinstance(value, float) and not math.isfinite(value):
            raise YamlError(f"{event.value!r}: numbers must be finite", line, loc)
        return value


def _check_number(text: str, line: int, loc: Loc) -> None:
    """Refuse what would take long to read, and `12:30`, which YAML reads as a number to base 60."""
    if len(text) > MAX_NUMBER:
        reason = f"has {len(text):,} characters; numbers have at most {MAX_NUMBER}"
        raise YamlError(f"'{text[:20]}...' {reason}", line, loc)
    if ":" in text:
        raise YamlError(f"{text!r} is a number to base 60; quote it if it is text", line, loc)
