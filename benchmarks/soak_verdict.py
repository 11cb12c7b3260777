"""Whether what `soak.py` saw is a fault."""

import math
from pathlib import Path
from typing import Any

from vllm_leank.bench.results import load_results
from vllm_leank.errors import UserError

KIND = "a server under mixed load"
"""What results files say they are."""

CHANCE = 0.01
"""A larger share of changed answers than plain vLLM's is a fault where it is less likely by chance
alone than this."""


def plain_answers(path: Path, tie: float) -> dict[str, Any]:
    """What plain vLLM's answers differed by, from its results.

    Raises:
        UserError: the file is no such results, or another difference counted as a tie.
    """
    answers = load_results(path, KIND).get("answers")
    if not isinstance(answers, dict) or not answers.get("compared"):
        raise UserError(f"{path}: has no answers that were compared")
    if answers["tie"] != tie:
        raise UserError(f"{path}: its tie is {answers['tie']}, not {tie}; give both the same --tie")
    return answers


def chance_of_more(ours: dict[str, Any], plain: dict[str, Any]) -> float:
    """How likely it is that, of all answers that changed, so many or more are ours, were it equally
    likely for each answer (Fisher's exact test, one-sided).
    """
    total, changed = (ours[name] + plain[name] for name in ("compared", "changed"))
    ways = sum(
        math.comb(ours["compared"], count) * math.comb(plain["compared"], changed - count)
        for count in range(ours["changed"], changed + 1)
    )
    return ways / math.comb(total, changed)


def failed(results: dict[str, Any], allow_changed: bool = False) -> bool:
    """Whether anything went wrong."""
    if any(results[name] for name in ("failed", "probes_changed")):
        return True
    if any(results["usage_in_pauses"]):
        return True
    if allow_changed:
        return False
    if "chance_of_more_changed" in results:
        return results["chance_of_more_changed"] < CHANCE
    return results["answers"]["changed"] > 0
