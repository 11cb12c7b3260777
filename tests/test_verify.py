"""`leank verify` as a command: what it prints and writes, its exit codes, and what it refuses."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from byte_tokenizer import copy_with_bytes
from mask_samples import full_mask, random_mask
from recall.demo import MODEL
from recall.tasks import make_sample

from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.lookup import find_masks
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.verify.texts import file_samples


@pytest.fixture(scope="module")
def with_tokenizer(tiny_llama_dir, tmp_path_factory):
    """A random model that reads text, with a mask of nothing and one of everything beside it."""
    directory = copy_with_bytes(tiny_llama_dir, tmp_path_factory.mktemp("verify") / "tiny")
    save_mask(full_mask(directory), directory / "full.yaml")
    save_mask(random_mask(directory, [0]), directory / "none.yaml")
    return directory


WINDOW = ("--sink", 32, "--recent", 64)


def test_texts_and_needles_come_with_the_command(leank, with_tokenizer):
    full = with_tokenizer / "full.yaml"
    args = ("--mask", full, "--texts", 3, "--needles", 16, "--max-tokens", 1500, *WINDOW, "--json")
    code, out, err = leank("verify", with_tokenizer, *args)
    report = json.loads(out)
    # A random model knows no answer, so nothing tells whether a mask loses any.
    assert code == 3
    assert (report["outcome"], report["exit_code"]) == ("not_judged", 3)
    assert [group["name"] for group in report["groups"]] == ["1,024 tokens", "1,500 tokens"]
    for group in report["groups"]:
        assert group["positions"] == 3 * 64
        # Too few to say how sure they are.
        assert group["kl"] == {"value": 0, "low": None, "high": None}
        assert group["top1"] == {"value": 1, "low": None, "high": None}
    assert report["window"] == {"sink": 32, "recent": 64}
    assert report["archive_format"] == "auto"
    assert report["answers"]["dense_right"] == 0
    assert report["checks"][-1]["ok"] is None
    texts = [one for one in report["each"] if one["dense_right"] is None]
    assert [one["prompt_tokens"] for one in texts] == [960, 1436] * 3
    assert [one["source"] for one in texts[::2]] == ["python", "tables", "prose"]
    needles = report["each"][6:]
    # Each kind was given up at the short length.
    assert {one["source"] for one in needles} == {
        "value among keys",
        "number in prose",
        "short number in prose",
    }
    assert min(one["prompt_tokens"] for one in needles) < 1024
    assert all(one["prompt_tokens"] + one["positions"] <= 1500 for one in needles)
    assert [one["kl"] for one in report["layers"]] == [0, 0]
    (note,) = report["notes"]
    assert note.startswith("needles: dense attention has 0 of ")
    assert note.endswith(" right, fewer than 16: it finds too few even in short contexts")
    assert re.search(r"about \d+ \w+, at most 10 minutes \(--minutes\): 3 texts at 1,024, 1,5", err)


def test_a_mask_of_nothing_fails(leank, with_tokenizer):
    none = with_tokenizer / "none.yaml"
    args = ("--mask", none, "--texts", 2, "--needles", 0, "--max-tokens", 700, *WINDOW)
    code, out, _ = leank("verify", with_tokenizer, *args)
    assert code == 1
    assert out.endswith("\nFAIL: same top-1 (700 tokens), KL (700 tokens)\n")
    assert "answers kept: not judged, as dense attention has 0 of 0 right" in out


@pytest.fixture(scope="module")
def recall_data(tmp_path_factory):
    """Sixteen questions with answers, one without, and a prompt that has no far tokens."""
    tasks = ("multivalue", "tracking", "single", "multikey")
    samples = [make_sample(tasks[i % 4], 288, i) for i in range(17)]
    lines = [{"prompt_token_ids": one.prompt_token_ids} for one in samples]
    for line, one in zip(lines[:16], samples, strict=False):
        line["answer_token_ids"] = one.answer_token_ids
    lines.append({"prompt": "what is bako ="})
    path = tmp_path_factory.mktemp("recall") / "re$c<a>ll.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Counts tags, and knows the page's text and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.loads = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        urls = [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.loads += [url for url in urls if not url.startswith("#")]

    def handle_data(self, data):
        self.text += data


def test_the_bundled_model_passes_with_its_mask_only(leank, recall_data, tmp_path):
    args = ("--data", recall_data, "--max-prompts", 18, *WINDOW)
    code, out, _ = leank("verify", MODEL, *args, "--report", tmp_path / "page.html")
    assert code == 0
    for text in (
        "right answers kept: 16 of 16 = 100.0% (80.6-100.0), asked: at least 90.0%",
        "re$c<a>ll.jsonl: 1 prompts without far tokens were left out",
        "built-in texts were left out: the tokenizer of",
        "needles were left out: the tokenizer of",
        "page.html: plots and the worst prompts",
    ):
        assert text in out
    assert out.endswith("\nPASS\n")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    # The name of the file is no tag, and nothing comes from elsewhere.
    assert "a" not in page.tags
    assert page.loads == []
    assert "re$c<a>ll.jsonl" in page.text
    assert page.text.count("tokens read, KL") == 6

    code, _, err = leank("verify", MODEL, *args, "--report", tmp_path / "page.html")
    assert code == 2
    assert "page.html: exists already" in err

    (shipped,) = find_masks(str(MODEL))
    keep = np.random.default_rng(0).permuted(shipped.keep, axis=-1)
    mask = Mask.from_keep(keep, shipped.geometry, model="random", provenance={"method": "random"})
    save_mask(mask, tmp_path / "random.yaml")
    code, out, _ = leank("verify", MODEL, *args, "--mask", tmp_path / "random.yaml")
    assert code == 1
    assert re.search(r"right answers kept: \d of 16 = ", out)
    assert re.search(r"\nFAIL: .*right answers\n", out)


def test_a_page_shows_plots_and_texts(leank, with_tokenizer, tmp_path):
    page = tmp_path / "page.html"
    none = with_tokenizer / "none.yaml"
    args = ("--mask", none, "--texts", 2, "--needles", 0, "--max-tokens", 1400, *WINDOW)
    _, out, _ = leank("verify", with_tokenizer, *args, "--report", page, "--pages", 512)
    assert "pages: answers read the best far tokens alone, 512 tokens; the first 2 layers" in out
    source = page.read_text(encoding="utf-8")
    parsed = Page(source)
    assert parsed.tags.count("svg") == 2
    assert parsed.loads == []
    for text in ("KL over position", "KL by layer", "KL, this layer alone", "1,024", "1,400"):
        assert text in parsed.text
    # Tokens tell what either would have written.
    hints = re.findall(r'title="(KL [^"]+)"', source)
    assert len(hints) == 2 * 2 * 63
    pattern = re.compile(r"KL \d+\.\d{4}; dense ['\"].*['\"], leank ['\"].*['\"]$", re.S)
    assert all(pattern.match(html.unescape(hint)) for hint in hints)


def test_a_tokenizer_of_other_words_needs_prompts_of_its_own(leank):
    code, _, err = leank("verify", MODEL)
    assert code == 2
    assert "built-in texts were left out: the tokenizer of" in err
    assert "needles were left out: the tokenizer of" in err
    assert err.endswith("; give prompts with far tokens by --data prompts.jsonl\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--min-top1", "1.5"], "--min-top1 is 1.5"),
        (["--needles", 0, "--texts", 0], "nothing to compare"),
        (["--needles", 15], "--needles is 15; answers are judged by at least 16"),
        (["--max-tokens", 100, *WINDOW], "they need 192"),
        (["--sink", 33], "sink is 33"),
        (["--pages", 0.1, "--prefill", "pruned"], "pages works with prefill: exact alone"),
        (["--data", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--dtype", "int4"], "dtype is int4"),
        (["--report", "page.pdf"], "page.pdf: the report is a page; name it .html"),
        (["--report", "missing/page.html"], "missing: no such directory"),
        (["--max-tokens", 16000, "--minutes", 0.01], "with up to 16,000 tokens; give --minutes"),
    ],
)
def test_what_cannot_be_done_is_refused(leank, with_tokenizer, args, message):
    code, _, err = leank("verify", with_tokenizer, "--mask", with_tokenizer / "full.yaml", *args)
    assert code == 2
    assert message in err


def test_pages_are_judged(leank, tiny_llama, tmp_path):
    """By a model of four layers, as the first two read all far tokens."""
    model = tiny_llama(layers=4)
    save_mask(full_mask(model), tmp_path / "full.yaml")
    ids = np.random.default_rng(0).integers(256, size=760).tolist()
    line = {"prompt_token_ids": ids[:700], "answer_token_ids": ids[700:]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    args = ["--mask", tmp_path / "full.yaml", "--data", tmp_path / "data.jsonl", *WINDOW, "--json"]
    args += ["--texts", 0, "--needles", 0]
    found = []
    for pages in ([], ["--pages", 256]):
        _, out, _ = leank("verify", model, *args, *pages)
        found.append(json.loads(out))
    everything, best = (one["groups"][0]["kl"]["value"] for one in found)
    assert everything == 0
    assert best > 1e-3
    assert [one["segments"] for one in found] == [None, {"share": 0, "least": 4}]


def test_without_a_tokenizer_needles_are_refused(leank, tiny_llama_dir, with_tokenizer):
    code, _, err = leank("verify", tiny_llama_dir, "--mask", with_tokenizer / "full.yaml")
    assert code == 2
    assert "cannot be loaded by transformers" in err


def write_prompts(path, *lengths):
    path.write_text(
        "".join(json.dumps({"prompt_token_ids": [7] * length}) + "\n" for length in lengths)
    )
    return ("--data", path, "--texts", 0, "--needles", 0, *WINDOW)


def test_short_prompts_are_nothing_to_compare(leank, with_tokenizer, tmp_path):
    mask = ("--mask", with_tokenizer / "full.yaml")
    code, out, err = leank("verify", with_tokenizer, *mask, *write_prompts(tmp_path / "d", 65, 70))
    assert (code, out) == (2, "")
    assert "nothing was compared; d: " in err
    assert "2 prompts without far tokens were left out" in err
    code, _, err = leank("verify", with_tokenizer, *mask, *write_prompts(tmp_path / "d", 20, 9))
    assert code == 2
    assert "nothing to compare; give prompts with far tokens" in err


def test_a_short_prompt_may_come_first(leank, with_tokenizer, tmp_path):
    prompts = write_prompts(tmp_path / "d", 20, 600)
    code, out, err = leank(
        "verify", with_tokenizer, "--mask", with_tokenizer / "full.yaml", *prompts
    )
    assert code == 3, err
    assert "1 prompts without far tokens were left out" in out


def test_prompts_are_read_with_their_answers_or_without(recall_data):
    samples = file_samples(recall_data, Checkpoint.open(str(MODEL)), max_samples=17, room=40)
    assert {name for name, _ in samples} == {recall_data.name}
    assert [bool(one.answer) for _, one in samples] == [True] * 16 + [False]
