"""KL and losses in the docs are what `benchmarks/results` has, to the digits shown."""

import re

import pytest
from figures import REPO, RESULTS, line, load, text_of
from figures_of_models import KINDS, LEARNED_MASKS, archives, kl, kl_results, named
from real.kl_picture import FLOOR, draw, drawn, joined
from real.learn_picture import draw as draw_losses

from vllm_leank.errors import UserError
from vllm_leank.mask.file import load_mask
from vllm_leank.offline.intervals import ratio_estimate


def kl_cells(row, *lengths):
    """Bytes of a token, how many times fewer than dense these are, and KL at each length."""
    found = (kl(row, length, kinds) for length in lengths for kinds in KINDS)
    return f"{row['token_bytes']:,.0f}", f"{row['x']:.2f}", *found


def uniform_rows():
    """Bits and channels where they save most, beside as many everywhere."""
    for row in load("kl_smollm2_uniform_cpu")["archives"]:
        name = row["name"].replace("packed, ", "").replace("70% pruned", "70% of K pruned")
        yield line(name.replace("leank ", "leank, "), *kl_cells(row, 1024))


def even_rows():
    """The same on a larger model, at two lengths."""
    known = archives()
    for name in ("leank bits_4", "leank bits_2", "leank pruned_70", "leank fisher_70"):
        yield line(named(name, LEARNED_MASKS), *kl_cells(known[name], 8192, 30000))
    even = joined(load(f"kl_qwen_1.5b_even_{length}") for length in (8192, 30000))
    for row in even["archives"]:
        if row["name"] != FLOOR:
            yield line(row["name"], *kl_cells(row, 8192, 30000))


def halves_rows():
    """Half of K pruned, as calibrated and as learned."""
    learned = [load(f"kl_qwen_1.5b_learned_50_{n}")["archives"][0] for n in (8192, 30000)]
    joint = learned[0] | {"lengths": learned[0]["lengths"] | learned[1]["lengths"]}
    for title, row in (("by Fisher", archives()["leank pruned_50"]), ("learned", joint)):
        yield line(title, *(kl(row, n, kinds) for n in (8192, 30000) for kinds in KINDS))


def paired_rows():
    """70% of K pruned, by Fisher and learned, and what that saves, text by text."""
    cells = {"by Fisher": [], "learned": [], "less, by text": []}
    for length in (8192, 30000):
        fisher, learned = paired(length)
        for kinds in KINDS:
            cells["by Fisher"].append(kl(fisher, length, kinds))
            cells["learned"].append(kl(learned, length, kinds))
            cells["less, by text"].append(paired_gap(length, kinds)[1])
    for title, found in cells.items():
        yield line(title, *found)


def paired(length):
    """Fisher's mask and the learned one, on the same texts."""
    rows = {row["name"]: row for row in load(f"kl_qwen_1.5b_70_{length}")["archives"]}
    return rows["leank fisher_70"], rows["leank pruned_70"]


def paired_gap(length, *kinds):
    """How much less KL the learned mask has than Fisher's, in the mean over texts."""
    fisher, learned = (
        [value for each in kinds for value in row["lengths"][str(length)][each]["kl_by_text"]]
        for row in paired(length)
    )
    gaps = [a - b for a, b in zip(fisher, learned, strict=True)]
    found = ratio_estimate(gaps, [1.0] * len(gaps))
    return len(gaps), f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def test_docs_say_that_the_learned_mask_is_nearer_at_both_lengths():
    (many, short), (few, long) = (paired_gap(length, *KINDS) for length in (8192, 30000))
    assert (
        f"Of all {many} texts of 8,192 tokens together that is {short}, and of all {few} of 30,000 "
        f"tokens {long}."
    ) in " ".join(text_of("docs/accuracy.md").split())


def kl_rows():
    for name, row in archives().items():
        yield line(named(name, LEARNED_MASKS), *kl_cells(row, 8192, 30000))


def directions_rows():
    for row in load("kl_qwen_1.5b")["archives"]:
        if row["name"].startswith("directions"):
            yield line(row["name"], *kl_cells(row, 8192, 30000))


def alike(row, *lengths):
    """How alike the next token's distributions are."""
    for length in lengths:
        found = row["lengths"].get(str(length))
        for kinds in KINDS:
            yield f"{1 - found[kinds]['variation']:.1%}" if found else ""


def variation_rows():
    for name, row in archives().items():
        yield line(named(name, LEARNED_MASKS), *kl_cells(row)[:2], *alike(row, 8192, 30000))


def small_kl_rows(length, *files):
    """KL of a smaller model, and how alike distributions are; of each cache as the last of the
    files has it.
    """
    found = {row["name"]: row for file in files for row in load(file)["archives"] if row["lengths"]}
    whose = "leank", "vLLM"
    for row in sorted(
        found.values(), key=lambda row: [not row["name"].startswith(w) for w in whose]
    ):
        yield line(named(row["name"]), *kl_cells(row, length), *alike(row, length))


SMALL_KL = tuple(f"kl_qwen_0.5b_{name}8192" for name in ("", "few_bits_", "others_", "vllm_"))
SMALLEST_KL = "kl_smollm2_7936", "kl_smollm2_vllm_7936"


def selection_rows():
    """What choices of far tokens cost, and what better ones would."""
    titles = {"bf16": "as they are", "bits_4": "4 bits", "bits_2": "2 bits"}
    for name, row in load("selection_qwen_1.5b")["rows"].items():
        stored, choice = name.split(", ")
        cells = []
        for length in ("16384", "32000"):
            found = row["lengths"][length]
            cells += [f"{found[kinds]['value']:.4f}" for kinds in ("kinds seen", "kinds unseen")]
            cells.append(f"{found['found']:.0%}")
        points = (f"{row['points'][asked]['value']:.0f}" for asked in ("16384", "32256"))
        yield line(titles[stored], choice, *cells, *points)


LEARNED = {
    "fisher": "Fisher's, not learned",
    "fisher second 0.002": "Fisher's, then stage 2 at 0.002",
    "fisher second 0.01": "Fisher's, then stage 2 at 0.01",
    "learned": "stage 1 from nothing",
    "learned second 0.002": "stage 1, then stage 2 at 0.002",
    "learned second 0.01": "stage 1, then stage 2 at 0.01",
}


def learned_rows():
    """Masks of 70% by how they were found."""
    rows = {row["name"]: row for row in load("kl_qwen_1.5b_learned")["archives"]}
    found = {row["name"]: row for row in load("learn_qwen_1.5b")["masks"]}
    text = (RESULTS / "verify_qwen_1.5b_learned.txt").read_text()
    for name, title in LEARNED.items():
        file = name.replace(" ", "_")
        row = rows[f"leank {file}"]
        cells = [kl(row, length, kinds) for length in (8192, 30000) for kinds in KINDS]
        verdict = re.search(rf"==== {re.escape(file)}\.yaml ====.*?^(PASS|FAIL)", text, re.S | re.M)
        yield line(title, f"{found[name]['loss']:.4f}", *cells, verdict[1] if verdict else "")


def streaming_rows():
    """Masks with a share of streaming heads, by who chose them."""
    kinds = {"bits_4": "4 bits", "bits_2": "2 bits", "pruned_0.7": "70% of K pruned"}
    masks = load("streaming_qwen_1.5b")["masks"]
    for kind, title in kinds.items():
        for end in ("", *(f"_{way}_{s}" for s in ("0.25", "0.5", "0.65") for way in HEADS)):
            one = masks[kind + end]
            (fits,) = (each for each in one["capacity"] if each["name"] == "leank")
            yield line(
                title,
                f"{one['share']:.0%}" if end else "none",
                HEADS[one["way"]] if end else "",
                f"{one['far_token_bytes']:,}",
                f"{one['saved']:.1%}",
                f"{fits['ratio_in_decode']:.2f}x",
                *(f"{one['kl'][n][which]['kl']:.4f}" for n in ("8192", "30000") for which in KINDS),
            )


def test_docs_say_who_chooses_streaming_heads_better():
    masks = load("streaming_qwen_1.5b")["masks"]
    cells = [(length, which) for length in ("8192", "30000") for which in KINDS]

    def wins(share, *kinds):
        pairs = [[masks[f"{kind}_{way}_{share}"]["kl"] for way in HEADS] for kind in kinds]
        found = [
            first[length][which]["kl"] < second[length][which]["kl"]
            for first, second in pairs
            for length, which in cells
        ]
        return sum(found), len(found)

    every, codes = ("bits_4", "bits_2", "pruned_0.7"), ("bits_4", "bits_2")
    of_all = {share: wins(share, *every) for share in ("0.25", "0.5", "0.65")}
    half, most = (wins(share, *codes) for share in ("0.5", "0.65"))
    more = [
        masks[f"pruned_0.7_fisher_{share}"]["far_token_bytes"]
        / masks[f"pruned_0.7_duo_{share}"]["far_token_bytes"]
        - 1
        for share in of_all
    ]
    said = " ".join(text_of("docs/accuracy.md").split())
    assert "Fisher's KL is lower in {} of {} figures".format(*of_all["0.25"]) in said
    assert "At 50% it is lower in {} of {}, at 65% in {} of {}".format(
        *of_all["0.5"], *of_all["0.65"]
    ) in said  # fmt: skip
    assert f"{min(more):.0%} to {max(more):.0%} more bytes" in said
    assert half[1] == most[1] == 8
    assert f"with bits it is {half[0]} and {most[0]} of 8" in said


HEADS = {"fisher": "Fisher", "duo": "DuoAttention"}


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("docs/accuracy.md", kl_rows),
        ("docs/accuracy.md", variation_rows),
        ("docs/accuracy.md", uniform_rows),
        ("docs/accuracy.md", even_rows),
        ("docs/accuracy.md", halves_rows),
        ("docs/accuracy.md", paired_rows),
        ("docs/accuracy.md", learned_rows),
        ("docs/accuracy.md", streaming_rows),
        ("benchmarks/real/README.md", directions_rows),
        ("docs/accuracy.md", lambda: small_kl_rows(8192, *SMALL_KL)),
        ("docs/accuracy.md", lambda: small_kl_rows(7936, *SMALLEST_KL)),
        ("docs/performance.md", selection_rows),
    ],
)
def test_rows_are_those_of_the_results(page, rows):
    assert "\n".join(rows()) in text_of(page)


def test_the_picture_has_what_engines_have_and_caches_of_others(tmp_path):
    results = joined(kl_results())
    assert results["lengths"] == [8192, 30000]
    assert all(len(row["lengths"]) == 2 for row in results["archives"])
    names = [row["name"] for _, row in drawn(results)]
    assert {"leank bits_2", "KIVI, 4 bits", "vLLM fp8"} <= set(names)
    assert FLOOR not in names
    assert not any("directions" in name for name in names)
    draw(results, tmp_path / "kl.svg")
    assert (tmp_path / "kl.svg").stat().st_size > 10_000
    with pytest.raises(UserError, match="no archives"):
        drawn(results | {"archives": []})


def test_docs_say_what_four_layers_left_as_they_are_save():
    rows = archives()
    fp8, int4 = (rows[f"vLLM {name}, 4 layers whole"] for name in ("fp8", "int4_per_token_head"))
    four = rows["leank bits_4"]
    fewer = (f"{one['token_bytes'] / four['token_bytes']:.1f}" for one in (fp8, int4))
    eight_bit, four_bit, ours = (
        f"{kl(one, 8192)} and {kl(one, 30000)}" for one in (fp8, int4, four)
    )
    said = " ".join(text_of("docs/accuracy.md").split())
    assert f"fp8 has {eight_bit} at the two lengths, and int4 {four_bit} ([" in said
    assert f"leank's 4 bits have {ours}, at {' and '.join(fewer)} times fewer" in said
    two = rows["leank bits_2"]
    nearer = [kl(fp8, length, kinds) < kl(two, length, kinds)
              for length in (8192, 30000) for kinds in KINDS]  # fmt: skip
    assert nearer == [True] * 4
    assert "So fp8 is nearer than 2 bits in all four figures, at four times their bytes." in said
    readme = " ".join(text_of("README.md").split())
    size = f"{int4['token_bytes']:,.0f} bytes"
    assert f"was simulated alone: KL {four_bit}, at {size}." in readme
    assert "within 10% of the table's at 8,192 tokens, and within 12% at 30,000." in said
    for length, apart in ((8192, 0.10), (30000, 0.12)):
        results = load(f"kl_qwen_1.5b_vllm_ends_{length}")
        again = {row["name"]: row for row in results["archives"]}
        for name in set(again) & set(rows) - {FLOOR, fp8["name"], int4["name"]}:
            for kinds in KINDS:
                first, second = (
                    one["lengths"][str(length)][kinds]["kl"] for one in (rows[name], again[name])
                )
                assert abs(second / first - 1) < apart


def test_the_picture_of_learning_has_both_starts(tmp_path):
    results = load("learn_qwen_1.5b")
    draw_losses(results, tmp_path / "learning.svg")
    assert (size := (tmp_path / "learning.svg").stat().st_size) > 10_000
    checked = [row | {"held_out": [[0, 75, 150], [0.09, 0.08, 0.07]]} for row in results["masks"]]
    draw_losses(results | {"masks": checked}, tmp_path / "checked.svg")
    assert (tmp_path / "checked.svg").stat().st_size > size
    with pytest.raises(UserError, match="no second stage from learned"):
        draw_losses(results | {"masks": results["masks"][:4]}, tmp_path / "learning.svg")


def test_docs_say_how_near_verify_it_would_be_at_30000_tokens():
    """The same top-1 of kinds of text that `leank verify` has, too."""
    known = archives()

    def same(name):
        found = [known[name]["lengths"]["30000"][kind] for kind in ("python", "tables", "prose")]
        tokens = sum(one["tokens"] for one in found)
        return f"{sum(one['top1'] * one['tokens'] for one in found) / tokens:.1%}"

    four, two, learned, fisher = map(
        same, ("leank bits_4", "leank bits_2", "leank pruned_70", "leank fisher_70")
    )
    assert (
        f"is {four} with 4 bits, {two} with 2, {learned} with 70% pruned, learned, and {fisher} by "
        "Fisher, where it asks for 95%"
    ) in " ".join(text_of("docs/accuracy.md").split())


@pytest.mark.parametrize(
    ("row", "mask"),
    [("4 bits", "4bit"), ("2 bits", "2bit"), ("70%", "70pruned")],
)
def test_docs_and_masks_say_what_verify_said_at_the_longest_length(row, mask):
    text = (RESULTS / "verify_qwen_1.5b_32768.txt").read_text()
    name = f"Qwen2.5-Coder-1.5B-Instruct-{mask}.yaml"
    said = re.search(rf"==== {re.escape(name)} ====.*?^(PASS|FAIL)$", text, re.S | re.M)
    tokens = re.findall(r"^(\S+) tokens +\S+ +(\S+%) .*? (0\.\d{4}) \(", said[0], re.M)
    (short, short_top1, _), (long, long_top1, _) = tokens
    worst = max(re.findall(r" (0\.\d{4}) \(", said[0]))
    kept, asked = re.search(r"right answers kept: (\d+) of (\d+)", said[0]).groups()
    top1 = f"{short_top1} at {short} tokens, {long_top1} at {long}"
    learned = " (learned)" if row == "70%" else ""
    cells = f"{row}, as shipped{learned}", top1, worst, f"{kept} of {asked}", said[1]
    assert f"| {line(*cells)}" in text_of("docs/accuracy.md")
    assert load_mask(REPO / "masks/Qwen" / name).evaluation["verify"] == (
        f"{said[1]}: top-1 {top1.replace(', ', ' and ')}, {kept} of {asked} answers kept"
    )
