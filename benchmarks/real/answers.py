"""What a study's results keep of answers: scores by task and length, and who asked."""

from typing import Any

from real.questions import Cell

RUN = "command", "commit", "machine", "count"
"""What may differ between runs that add to the same results: all that asked something are told."""


def scores_of(result: dict[str, Any]) -> dict[Cell, list[float]]:
    """Scores by task and length."""
    return {(cell["task"], cell["length"]): cell["scores"] for cell in result["cells"]}


def add_answers(result: dict[str, Any], task: str, length: int, answers: dict[str, Any]) -> None:
    """Add answers, lists or sums by name, to a result's cell of their task and length, or as a
    new one.
    """
    for cell in result["cells"]:
        if (cell["task"], cell["length"]) == (task, length):
            cell.update({name: cell[name] + answers[name] for name in answers})
            return
    result["cells"].append({"task": task, "length": length} | answers)


def tell_run(run: dict[str, Any], results: dict[str, Any], has_answers: bool) -> None:
    """Say which run the results are of, and of those before, where they were told otherwise."""
    now = {name: run[name] for name in RUN}
    told = {name: results[name] for name in RUN if name in results}
    if has_answers and told != now:
        results["earlier"] = [*results.get("earlier", []), told]
    results.update(now)
