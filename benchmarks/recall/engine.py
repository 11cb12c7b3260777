"""The recall model in a vLLM engine of this process, dense or with leank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from recall.tasks import TASKS, Sample
from vllm_leank.serving.settings import load_settings


class Engine:
    """A running engine; `right` is as in `recall.endpoint.Endpoint`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy tokens after prompts that arrive at once."""
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def most_running(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """As `generate`; how many requests ran at once, at most."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        engine, most = self._llm.llm_engine, 0
        for number, prompt in enumerate(prompts):
            engine.add_request(f"counted {number}", {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            engine.step()
            most = max(most, self.counter("vllm:num_requests_running"))
        return most

    def counter(self, name: str) -> int:
        """One of vLLM's own metrics, as in `/metrics`; needs `disable_log_stats=False`."""
        return int(sum(one.value for one in self._llm.get_metrics() if one.name == name))

    def right(self, samples: Sequence[Sample]) -> list[bool]:
        """Which of the samples, all of one task, are answered without a mistake, greedily."""
        prompts = [sample.prompt_token_ids for sample in samples]
        answers = self.generate(prompts, TASKS[samples[0].task].answer_tokens)
        return [
            answer == sample.answer_token_ids
            for answer, sample in zip(answers, samples, strict=True)
        ]

    @property
    def dtype(self) -> str:
        """Of the model."""
        return str(self._llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")

    def mask(self) -> dict[str, Any]:
        """The mask in use and the dense window, of an engine with leank."""
        settings = load_settings(self._llm.llm_engine.vllm_config)
        mask, window = settings.mask, settings.window
        return {
            "model": mask.model,
            "method": mask.provenance["method"],
            "sha256": mask.sha256,
            "k_kept": round(mask.k_kept, 4),
            "v_kept": round(mask.v_kept, 4),
            "sink": window.sink,
            "recent": window.recent,
            "archive_format": settings.plan.archive_format.name,
            "prefill": "exact" if window.exact else "pruned",
        }


@contextmanager
def engine(
    model: str,
    leank: dict[str, Any] | None,
    *,
    enable_prefix_caching: bool = False,
    **arguments: Any,
) -> Iterator[Engine]:
    """An engine with these arguments; `leank` has leank's options, None is vLLM's own attention."""
    if leank is not None:
        arguments |= {"attention_backend": "leank", "additional_config": {"leank": leank}}
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enable_prefix_caching=enable_prefix_caching,
        **arguments,
    )
    try:
        yield Engine(llm)
    finally:
        # The next engine needs the memory.
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
