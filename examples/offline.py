"""Ask a model offline, with vLLM's own `LLM` and leank behind it.

    python examples/offline.py [MODEL]

The model must have a mask: `leank mask calibrate MODEL --bits 2` makes one. Without MODEL it is the
small bundled one, which knows nothing but how to look things up.
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

BUNDLED = Path(__file__).parents[1] / "benchmarks" / "recall" / "model"
PROMPT = "vaje = mava vife tawa maju . tite = fame nivi bima simi . " * 40 + "what is vaje ="


def main(model: str = str(BUNDLED)) -> str:
    """Print the answer to one prompt, and return it."""
    llm = LLM(
        model=model,
        attention_backend="leank",
        # What a server takes as --additional-config; all of it may be left out.
        additional_config={"leank": {"sink": 64, "recent": 256}},
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,  # of a GPU leave it out: vLLM takes what is free
    )
    (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8))
    answer = output.outputs[0].text.strip()
    print(answer)
    return answer


if __name__ == "__main__":  # vLLM may start processes that import this file
    main(*sys.argv[1:])
