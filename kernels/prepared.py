"""What a layer or a step prepares once and uses again."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")


class Prepares:
    """Keeps what was prepared for it, as long as it lives."""

    def prepared(self, prepare: Callable[..., T], *facts: Any) -> T:
        """`prepare(self, *facts)`, made once for these facts. So what is made can depend on nothing
        else, and a step that brings other facts gets something else.

        Args:
            prepare: a function of a module.
            facts: hashable, and cheap to hash: it is done at each call.
        """
        key = prepare, facts
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = prepare(self, *facts)
        return found

    @cached_property
    def _prepared(self) -> dict[Any, Any]:
        return {}
