"""One engine that writes long answers; `long_text.py` runs it in a process of its own.

python -m real.long_engine RUN
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from real.long_text import summary
from vllm_leank.bench.machine import machine
from vllm_leank.bench.results import save_results


def answers(llm: LLM, texts: list[str], params: list[SamplingParams]) -> list[list[int]]:
    """Tokens after each text, in the chat template where there is one."""
    if llm.get_tokenizer().chat_template:
        chats: Any = [[{"role": "user", "content": text}] for text in texts]
        outputs = llm.chat(chats, params, use_tqdm=False)
    else:
        outputs = llm.generate(texts, params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


def main() -> None:
    """Write greedily and by chance."""
    run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llm = LLM(**run["engine_args"])
    ways = {"greedy": 0.0, f"temperature {run['temperature']:g}": run["temperature"]}
    results = {name: value for name, value in run.items() if name != "results"}
    results |= {"machine": machine(), "ways": {}}
    for way, temperature in ways.items():
        # With one seed for all, every answer would draw the same random numbers.
        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=run["tokens"],
                seed=run["seed"] + number,
                detokenize=False,
            )
            for number in range(len(run["prompts"]))
        ]
        results["ways"][way] = summary(answers(llm, run["prompts"], params))
        save_results(results, Path(run["results"]))


if __name__ == "__main__":
    main()
