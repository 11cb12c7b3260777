"""Which requests of a step are decoded, with drafts too: these come first; and how many may be."""

from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from leank_configs import config_of
from speculation import NGRAM
from vllm.v1.attention.backends.utils import reorder_batch_to_split_decodes_and_prefills
from vllm_leank.kernels.batch import Batch

from vllm_leank.serving.metadata import PagesMetadataBuilder
from vllm_leank.serving.vllm.config import most_decode_rows


class Rows:
    """A step of vLLM's V1 runner: for each request new tokens, computed ones, and its prompt's."""

    def __init__(self, **rows):
        self.rows = list(rows.items())
        self._tell()

    def _tell(self):
        self.req_ids = [name for name, _ in self.rows]
        self.num_computed_tokens_cpu = np.array([computed for _, (_, computed, _) in self.rows])
        self.num_prompt_tokens = np.array([prompt for _, (_, _, prompt) in self.rows])

    def swap_states(self, first, second):
        self.rows[first], self.rows[second] = self.rows[second], self.rows[first]
        self._tell()

    def batch(self):
        """What kernels are told of it."""
        new = [tokens for _, (tokens, _, _) in self.rows]
        start = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
        lengths = torch.tensor([new + computed for _, (new, computed, _) in self.rows])
        prompts = torch.tensor([prompt for _, (_, _, prompt) in self.rows])
        table = torch.zeros(len(new), 1, dtype=torch.int32)
        return Batch(
            start, start, lengths, prompts, table, table, torch.zeros(sum(new)),
            torch.tensor([computed < prompt for _, (_, computed, prompt) in self.rows]),
            max(new), int(lengths.max()),
        )  # fmt: skip


@pytest.mark.parametrize("drafts", [3, 16])
def test_answers_with_drafts_come_before_chunks_of_prompts(tiny_llama_dir, mask_file, drafts):
    """But for those with more drafts than are decoded."""
    options = {"mask": str(mask_file), "sink": 32, "recent": 64}
    speculation = NGRAM | {"num_speculative_tokens": drafts}
    config = config_of(tiny_llama_dir, options, speculative_config=speculation)
    builder = PagesMetadataBuilder(None, [], config, torch.device("cpu"))
    all_drafts, answer = (1 + drafts, 30000, 20000), (4, 30000, 20000)
    rows = Rows(prompt=(2048, 2048, 9000), most=all_drafts, rest=(2, 8998, 9000), few=answer)
    assert rows.batch().num_decodes == 0
    step = SimpleNamespace(num_scheduled_tokens={name: new for name, (new, _, _) in rows.rows})
    reorder_batch_to_split_decodes_and_prefills(rows, step, builder.reorder_batch_threshold)
    decoded = ["few"] if drafts == 16 else ["few", "most"]
    assert sorted(rows.req_ids[: len(decoded)]) == decoded
    assert rows.batch().num_decodes == len(decoded)


@pytest.mark.parametrize(
    ("requests", "drafts", "tokens", "rows"),
    [(8, 0, 2048, 128), (8, 3, 2048, 128), (8, 20, 2048, 168), (64, 0, 512, 512)],
)
def test_every_request_may_bring_as_many_rows_as_are_decoded(
    tiny_llama_dir, mask_file, requests, drafts, tokens, rows
):
    """Kernels are compiled for as many, of drafts or of the rests of prompts."""
    config = config_of(
        tiny_llama_dir,
        {"mask": str(mask_file)},
        max_num_seqs=requests,
        max_num_batched_tokens=tokens,
        speculative_config=NGRAM | {"num_speculative_tokens": drafts} if drafts else None,
    )
    assert most_decode_rows(config) == rows
