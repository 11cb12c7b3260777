"""Kinds of requests: with a full mask, each is answered as by plain vLLM."""

import pytest
from engines import engine
from mask_samples import full_mask
from recall.demo import MODEL
from recall.tasks import make_sample
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from vllm_leank.mask.file import save_mask

pytestmark = pytest.mark.engine

LIMITS = {
    "max_num_seqs": 8,
    "skip_tokenizer_init": False,
    "enable_prefix_caching": True,
    "scheduling_policy": "priority",
    "max_num_batched_tokens": 256,
}
FEW = (60, 130)
MANY = (60, 130, 200, 310, 420, 610)
"""Lengths of prompts, which have some 90 tokens of room."""


def asked(running, lengths):
    """Answers to requests of all kinds, as plain values."""
    llm = running.llm
    all_prompts = [
        {"prompt_token_ids": make_sample("multikey", length, length).prompt_token_ids}
        for length in lengths
    ]

    def generate(prompts=all_prompts, priority=None, **params):
        """Tokens, log-probabilities, text and the reason to stop, of every sequence. By default of
        70 tokens: at least two compactions.
        """
        params = {"temperature": 0, "max_tokens": 70} | params
        outputs = llm.generate(prompts, SamplingParams(**params), priority=priority, use_tqdm=False)
        for output in outputs:
            for one in output.outputs:
                yield list(one.token_ids), one.text, one.finish_reason, one.stop_reason
            for rows in (output.prompt_logprobs, *(one.logprobs for one in output.outputs)):
                for row in rows or []:
                    yield {token: entry.logprob for token, entry in (row or {}).items()}

    answers = {
        "greedy": list(generate(ignore_eos=True)),
        "until the end of the sequence": list(generate()),
        "several samples": list(generate(n=3, temperature=1.0, top_k=1)),
        "log-probabilities": list(generate(logprobs=3, prompt_logprobs=2, max_tokens=40)),
        "as long as the model allows": list(
            generate(all_prompts[len(lengths) // 2 :], ignore_eos=True, max_tokens=2000)
        ),
        "by priority": list(generate(priority=[*range(len(lengths))][::-1])),
        "penalties": list(generate(repetition_penalty=1.3, min_tokens=50)),
    }
    words = answers["greedy"][0][1].split()
    answers["stop strings"] = list(generate(stop=words[4:6], ignore_eos=True))
    beams = llm.beam_search(all_prompts[:3], BeamSearchParams(beam_width=3, max_tokens=20))
    answers["beams"] = [list(beam.tokens) for output in beams for beam in output.sequences]
    pool = running.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return answers


def approximately(value):
    return pytest.approx(value, abs=1e-3) if isinstance(value, dict) else value


@pytest.mark.parametrize(
    "lengths", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"]
)
def test_requests_of_all_kinds(tmp_path, lengths):
    limits = LIMITS | {"max_model_len": max(lengths) + 90}
    with engine(MODEL, **limits) as plain:
        expected = asked(plain, lengths)
    mask = tmp_path / "full.yaml"
    save_mask(full_mask(MODEL), mask)
    with engine(MODEL, mask, **limits) as leank:
        answers = asked(leank, lengths)
    for kind, values in expected.items():
        assert len(answers[kind]) == len(values), kind
        for value, wanted in zip(answers[kind], values, strict=True):
            assert value == approximately(wanted), kind
    assert any(reason == "stop" for _, _, reason, _ in expected["stop strings"])
    assert all(reason == "length" for _, _, reason, _ in expected["as long as the model allows"])
