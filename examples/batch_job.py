"""Answer a file of prompts through a server, many at once, and go on where a run was cut off.

    python examples/batch_job.py prompts.jsonl answers.jsonl [http://localhost:8000]

A line of the input is {"id": ..., "prompt": "..."}, one of the output {"id": ..., "text": "..."}.
Long prompts with the same beginning share their cache, so put them one behind the other.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

AT_ONCE = 64
"""Requests under way; the server runs as many of them as fit, which leank makes more."""


def main(source: str, target: str, url: str = "http://localhost:8000") -> int:
    """Answer the prompts that have no answer yet; gives their number."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)
    model = next(iter(client.models.list())).id

    def ask(line: dict) -> dict:
        done = client.completions.create(
            model=model, prompt=line["prompt"], max_tokens=64, temperature=0
        )
        return {"id": line["id"], "text": done.choices[0].text}

    answers = Path(target)
    known = {one["id"] for one in read(answers)} if answers.exists() else set()
    asked = [one for one in read(Path(source)) if one["id"] not in known]
    with ThreadPoolExecutor(AT_ONCE) as pool, answers.open("a", encoding="utf-8") as file:
        for answer in pool.map(ask, asked):
            print(json.dumps(answer), file=file, flush=True)
    print(f"{target}: {len(asked)} answers more")
    return len(asked)


def read(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


if __name__ == "__main__":
    main(*sys.argv[1:])
