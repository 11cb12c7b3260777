"""RULER's questions, from lm_eval, by a model that answers nothing and keeps what it is asked."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint

# Its tasks are made up here; without this it asks the hub for each and waits.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
except ImportError as error:
    raise UserError(
        f"RULER's tasks come from lm_eval: pip install 'lm_eval[ruler]' ({error})"
    ) from error


class _Listener(LM):  # type: ignore[misc]
    """Keeps requests for text and answers none."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.requests: list[Any] = []
        self._tokenizer = tokenizer

    @property
    def tokenizer_name(self) -> str:
        return "listener"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        self.requests += requests
        return [""] * len(requests)

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("RULER asks for text only")

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        raise NotImplementedError("RULER asks for text only")


def ruler_questions(
    checkpoint: Checkpoint, tasks: Sequence[str], length: int, count: int
) -> Iterator[tuple[str, str, tuple[str, ...], int]]:
    """Of each task `count` questions of `length` tokens: task, prompt, references, tokens of the
    answer. The prompt is in the model's chat template and ends with how the answer begins.
    """
    listener = _Listener(checkpoint.tokenizer)
    simple_evaluate(
        model=listener,
        tasks=list(tasks),
        limit=count,
        apply_chat_template=bool(checkpoint.tokenizer.chat_template),
        metadata={"max_seq_lengths": [length], "tokenizer": str(checkpoint.path)},
        bootstrap_iters=0,
    )
    for one in listener.requests:
        prompt, settings = one.args
        yield one.task_name, prompt, tuple(one.doc["outputs"]), settings["max_gen_toks"]
