"""How the soak judges answers, and what servers under load are started with."""

import asyncio
import json
import random

import aiohttp
import pytest
from engine_server import flags
from mixed_load import BACKEND, KIND, given_up_after
from mixed_load_picture import draw
from recall.demo import MODEL
from soak_client import Answer, compare
from soak_requests import Prompts, Watched
from soak_verdict import KIND as SOAK
from soak_verdict import chance_of_more, failed, plain_answers
from stand_in_tokenizer import tokenizer_for
from transformers import AutoTokenizer

from vllm_leank.errors import UserError

QUIET = Answer([5, 6, 7], [-0.5, -1.0, -0.25], [{5: -0.5}, {6: -1.0, 9: -1.1}, {7: -0.25, 8: -2}])


def under_load(tokens, logprobs=(-0.5, -1.0, -0.25)):
    return Answer(tokens, list(logprobs), [])


def test_an_equal_answer_may_drift():
    found = compare(QUIET, under_load([5, 6, 7], (-0.5, -1.25, -0.25)))
    assert (found.gap, found.drifts) == (None, [0, 0.25, 0])


@pytest.mark.parametrize(
    ("tokens", "gap", "before"),
    [([5, 9, 1], 0.1, 1), ([5, 6, 8], 1.75, 2), ([4, 6, 7], 0, 0), ([5, 3, 7], 0.1, 1)],
    ids=["near", "far", "alone", "unknown: at least"],
)
def test_the_gap_is_the_quiet_runs_at_the_first_other_token(tokens, gap, before):
    found = compare(QUIET, under_load(tokens))
    assert found.gap == pytest.approx(gap)
    assert len(found.drifts) == before


def test_answers_beyond_a_tie_have_changed():
    watched = Watched(Prompts(random.Random(0), 512, 100, 10), 1)
    watched.answers.append(QUIET)
    for tokens in ([5, 6, 7], [5, 6, 8], [5, 9, 1], [5, 6, 7]):
        watched.add(0, under_load(tokens))
    watched.add(0, under_load([5, 6, 7], (-0.5, -1.25, -0.25)))  # the same tokens by luck
    found = watched.found(tie=0.125)
    names = ("compared", "equal", "ties", "changed", "largest_gap", "largest_drift")
    assert [found[name] for name in names] == [5, 3, 1, 2, 1.75, 0.25]
    assert [found["differ_by_more_than"][step] for step in ("0.125", "0.25", "1", "2")] == [
        *(2, 1, 1, 0),
    ]
    told = [[one[key] for key in ("by", "token", "quiet", "now")] for one in found["changed_most"]]
    assert told == [[1.75, 2, [7], [8]], [0.25, 1, [6, 7], [6, 7]]]


def answers(changed, compared, tie=0.5):
    return {"changed": changed, "compared": compared, "tie": tie}


def test_changed_answers_are_a_fault_where_more_than_plain_vllms_share_changed():
    # Two boxes of 3 and 2: both changed ones fall on the 3 in 3 of 10 ways, one or two in 9.
    assert chance_of_more(answers(2, 3), answers(0, 2)) == pytest.approx(3 / 10)
    assert chance_of_more(answers(1, 3), answers(1, 2)) == pytest.approx(9 / 10)
    assert chance_of_more(answers(0, 144), answers(2, 219)) == 1
    fine = {"failed": 0, "probes_changed": 0, "usage_in_pauses": [0.0, 0.0]}
    for changed, wrong in ((0, False), (30, False), (90, True)):
        ours = answers(changed, 6000)
        chance = chance_of_more(ours, answers(4, 1000))
        assert failed(fine | {"answers": ours, "chance_of_more_changed": chance}) is wrong
        assert failed(fine | {"answers": ours}) is (changed > 0)
        assert not failed(fine | {"answers": ours}, allow_changed=True)
    for fault in ({"failed": 1}, {"probes_changed": 1}, {"usage_in_pauses": [0.0, 0.01]}):
        assert failed(fine | {"answers": answers(0, 9)} | fault, allow_changed=True)


def test_plain_answers_had_the_same_tie(tmp_path):
    path = tmp_path / "dense.json"
    path.write_text(json.dumps({"what": SOAK, "answers": answers(1, 200)}))
    assert plain_answers(path, 0.5) == answers(1, 200)
    with pytest.raises(UserError, match=r"its tie is 0\.5, not 0\.125"):
        plain_answers(path, 0.125)
    path.write_text(json.dumps({"what": SOAK, "answers": answers(0, 0)}))
    with pytest.raises(UserError, match="no answers"):
        plain_answers(path, 0.5)


def test_a_stand_in_tokenizer_has_a_word_for_each_token(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"vocab_size": 300}))
    assert tokenizer_for(MODEL, tmp_path) == MODEL
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_for(model, tmp_path))
    tokens = [0, 299, 17, 17]
    assert tokenizer(tokenizer.decode(tokens)).input_ids == tokens
    assert tokenizer.vocab_size == 300


def test_engine_arguments_as_flags():
    engine_args = {"max_num_seqs": 8, "enforce_eager": True, "async_scheduling": False}
    assert flags(engine_args | {"additional_config": {"leank": {"sink": 32}}}) == [
        *("--max-num-seqs", "8", "--enforce-eager", "--no-async-scheduling"),
        *("--additional-config", '{"leank": {"sink": 32}}'),
    ]


def test_requests_that_are_late_are_given_up():
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, RequestFuncInput

    async def ask():
        silent = await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}/v1/completions"
        request = RequestFuncInput("hello", url, 1, 1, "model")
        async with silent, aiohttp.ClientSession() as session:
            with given_up_after(0.3):
                return await ASYNC_REQUEST_FUNCS[BACKEND](request, session)

    before = ASYNC_REQUEST_FUNCS[BACKEND]
    found = asyncio.run(asyncio.wait_for(ask(), 30))
    assert (found.success, found.error) == (False, "not done after 0 s")
    assert ASYNC_REQUEST_FUNCS[BACKEND] is before


def test_the_picture_leaves_out_what_was_not_measured(tmp_path):
    times = {"p50": 20.0, "p99": 300.0}
    cell = {"ttft_ms": times, "itl_ms": times, "output_tokens_per_s": 9, "good_requests_per_s": 1}
    load = {"model": "m", "prompt_tokens": [2048, 32768], "output_tokens": [128, 1024]}
    missing = {"variant": "fp8", "rate": None, "error": "the server did not start"}
    cell |= {"rate": 1.0, "failed": 0}
    cells = [{"variant": one} | cell for one in ("dense", "bits_4")] + [missing]
    # Who waited longest is not among its figures.
    late = {"variant": "bits_2"} | cell | {"failed": 20}
    cells.append(late)
    results = {"what": KIND, "load": load, "cells": cells}
    draw(results, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "<!-- bits_4 -->" in text
    assert "<!-- fp8 -->" not in text
    assert "<!-- bits_2 -->" not in text
    with pytest.raises(UserError, match="no cell was measured whole"):
        draw(results | {"cells": [missing, late]}, tmp_path / "picture.svg")
