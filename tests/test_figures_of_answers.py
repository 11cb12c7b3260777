"""Figures of answers in the README and docs are what `benchmarks/results` has, to the digits
shown.
"""

import re
from functools import cache

import pytest
from figures import REPO, RESULTS, line, load, text_of
from real.kl_picture import FLOOR, draw, drawn, joined
from real.learn_picture import draw as draw_losses
from real.pictures import label_of
from real.study_table import lost, mean_points, merged, points, shared_cells, some

from vllm_leank.errors import UserError
from vllm_leank.mask.file import load_mask

DENSE, FOUR, TWO = "vLLM, dense", "leank, 4 bits", "leank, 2 bits"
OTHERS = (
    "vLLM fp8",
    "vLLM turboquant_4bit_nc",
    "vLLM int4_per_token_head",
    "KIVI, 4 bits",
    "KIVI, 2 bits",
)


def interval(found):
    cells = [f"{one:.1f}" for one in (found.value, found.low, found.high)]
    value, low, high = ["0.0" if one == "-0.0" else one for one in cells]
    return f"{value} ({low} to {high})"


def archives():
    """Masks that were served, and caches of others, on the same texts."""
    return {row["name"]: row for row in joined(kl_results())["archives"]}


def kl_results():
    names = "many_8192", "many_30000", "vllm_8192", "kitty_8192", "others_30000"
    return [load(f"kl_qwen_1.5b_{name}") for name in names]


LEARNED_MASKS = ("leank pruned_70",)
"""Of the 1.5B, as studies and KL of today have it: its name does not say so."""


def named(name, learned=()):
    """A row's name as pages have it, where masks of `learned` were learned as well."""
    if name.startswith("leank packed, "):
        name = f"leank bits_{name.removeprefix('leank packed, ').removesuffix(' bits')}"
    kind, _, number = name.removeprefix("leank ").partition("_")
    if not name.startswith("leank "):
        return name
    if kind == "bits":
        return f"leank, {label_of(name)}"
    way = "learned" if kind == "learned" or name in learned else "by Fisher"
    return f"leank, {number}% of K pruned, {way}"


def kl(row, length, kinds="kinds seen"):
    return f"{row['lengths'][str(length)][kinds]['kl']:.4f}"


KINDS = "kinds seen", "kinds unseen"


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


ASKED_MOST = "dense", "bits_4", "bits_2"


@cache
def study():
    """Variants of the study by name, and what those were asked that were asked most."""
    variants = {one["variant"]: one for one in merged(RESULTS / "study_qwen_1.5b")["variants"]}
    return variants, shared_cells([variants[name] for name in ASKED_MOST])


def opening():
    """The README's first table."""
    variants, cells = study()
    flash, four = load("serve_full_4")["variants"]
    two = load("serve_full_2")["variants"][0]
    names = FLOOR, "leank bits_4", "leank bits_2"
    for title, name, key, served in zip(
        (DENSE, FOUR, TWO), names, ASKED_MOST, (flash, four, two), strict=True
    ):
        one = variants[key]
        row, count, rate = archives()[name], served["concurrent"], served["decode"]["tokens_per_s"]
        assert row["token_bytes"] == one["token_bytes"]
        size, requests, speed = f"{row['token_bytes']:,.0f}", str(count), f"{rate:,.0f}"
        if one is not variants["dense"]:
            size += f" ({row['x']:.1f}x)"
            requests += f" ({count / flash['concurrent']:.2f}x)"
            speed += f" ({rate / flash['decode']['tokens_per_s']:.2f}x)"
        found = interval(points(one, cells))
        yield line(title, size, found, kl(row, 8192), kl(row, 30000), requests, speed)
    for name in OTHERS:
        row = archives()[name]
        size = f"{row['token_bytes']:,.0f} ({row['x']:.1f}x)"
        title, found = f"{name}, simulated", ""
        if one := variants.get(name.replace("vLLM ", "vllm_")):
            assert shared_cells([variants["dense"], one]) == cells
            title, found = f"{name}, KL simulated", interval(points(one, cells))
        yield line(title, size, found, kl(row, 8192), kl(row, 30000), "", "")


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
        for kinds in KINDS:
            yield f"{1 - row['lengths'][str(length)][kinds]['variation']:.1%}"


def variation_rows():
    for name, row in archives().items():
        yield line(named(name, LEARNED_MASKS), *kl_cells(row)[:2], *alike(row, 8192, 30000))


def small_kl_rows(length, *files):
    """KL of a smaller model, and how alike distributions are."""
    for row in joined(load(file) for file in files)["archives"]:
        yield line(named(row["name"]), *kl_cells(row, length), *alike(row, length))


SMALL_KL = "kl_qwen_0.5b_8192", "kl_qwen_0.5b_others_8192"


SERVED = {"dense": "dense", "leank bits_2": "bits_2"}
"""Of simulated caches, what the study calls those that engines have."""


def simulated():
    """Simulated caches by name, and what all were asked, which the study asked engines, too."""
    engines, _ = study()
    results = load("simulated_qwen_1.5b")
    assert results["questions_sha256"] == engines["dense"]["questions_sha256"]
    found = {one["variant"]: one for one in results["variants"]}
    return found, shared_cells([*found.values(), *(engines[name] for name in SERVED.values())])


def simulated_rows():
    """Points of simulated caches, and of engines on the same questions."""
    engines, _ = study()
    found, cells = simulated()
    dense = found["dense"]
    for name, one in found.items():
        size = f"{one['token_bytes']:,.0f} ({dense['token_bytes'] / one['token_bytes']:.1f}x)"
        title = name.removeprefix("leank ").replace("_", " ") if "everywhere" in name else name
        engine = f"{mean_points(engines[SERVED[name]], cells):.1f}" if name in SERVED else ""
        gap = interval(lost(one, dense, cells))
        yield line(named(title), size, f"{mean_points(one, cells):.1f}", gap, engine)


@cache
def first_study():
    """Variants by name that were asked other questions of the same kinds, before."""
    folder = RESULTS / "study_first_qwen_1.5b"
    return {one["variant"]: one for one in merged(folder)["variants"]}


def cache_rows():
    """All caches in the study, on the questions that these and dense attention were asked, but for
    choices of far tokens.
    """
    asked = {name: one for name, one in study()[0].items() if "pages" not in name}
    yield from compared_rows(asked, LEARNED_MASKS)


def first_cache_rows():
    yield from compared_rows(first_study())


def compared_rows(variants, learned=()):
    """Each of the variants beside dense attention, on the same questions."""
    dense = variants["dense"]
    for name, one in variants.items():
        cells = shared_cells([dense, one])
        ours = "_" in name and "vllm" not in name
        title = named(f"leank {name}" if ours else name, learned)
        size = f"{one['token_bytes']:,.0f} ({dense['token_bytes'] / one['token_bytes']:.1f}x)"
        found = [f"{mean_points(each, cells):.1f}" for each in (dense, one)]
        gap = interval(lost(one, dense, cells))
        yield line(title.replace("vllm_", "vLLM "), size, f"{sum(cells.values()):,}", *found, gap)


def long_rows():
    """Long answers: mean tokens, loops and what was said before, greedy and sampled."""
    for name in ASKED_MOST:
        ways = load(f"long_qwen_1.5b/{name}")["ways"].values()
        found = [
            f"{told['mean_tokens']:,.0f}, {told['loops']} of {told['answers']}, "
            f"{told['said_before']:.1%}"
            for told in ways
        ]
        yield line(named(f"leank {name}" if "_" in name else name), *found)


def lost_cells(part, dense, *others):
    """Points of dense attention, and of others with what they lose against it."""
    yield f"{mean_points(dense, part):.1f}"
    for one in others:
        yield f"{mean_points(one, part):.1f}"
        yield interval(lost(one, dense, part))


def study_rows():
    """Points by length and by task, and what is lost on the same questions."""
    variants, cells = study()
    for place in (1, 0):
        for value in sorted({cell[place] for cell in cells}):
            name = f"{value:,} tokens" if place else f"`{value}`"
            asked = (variants[one] for one in ASKED_MOST)
            yield line(name, *lost_cells(some(cells, value), *asked))


def lost_by_length(dense, *others):
    """Points of dense attention, and of others with what they lose: in all, and by length."""
    cells = shared_cells([dense, *others])
    parts = {f"all {sum(cells.values())} questions": cells}
    parts |= {f"{n:,} tokens": some(cells, n) for n in sorted({length for _, length in cells})}
    for title, part in parts.items():
        yield line(title, *lost_cells(part, dense, *others))


def turboquant_rows():
    found, _ = study()
    return lost_by_length(*(found[n] for n in ("dense", "vllm_turboquant_4bit_nc", "bits_2")))


def small_study():
    """Variants by name that the 0.5B was served with."""
    return {one["variant"]: one for one in merged(RESULTS / "study_qwen_0.5b")["variants"]}


def small_study_rows():
    found = small_study()
    return lost_by_length(*(found[name] for name in ("dense", "bits_4", "bits_2")))


def smallest_study():
    """Variants by name that SmolLM2 was served with."""
    known = {"smollm2_70pruned": "pruned_70", "smollm2_4bit": "bits_4", "smollm2_2bit": "bits_2"}
    known |= {"50pruned": "pruned_50", "1.5bit": "bits_1.5", "1bit": "bits_1"}
    found = merged(RESULTS / "study_smollm2")["variants"]
    return {known.get(one["variant"], one["variant"]): one for one in found}


def smallest_study_rows():
    found = smallest_study()
    return lost_by_length(*(found[name] for name in ("dense", "bits_4", "bits_2")))


SHIPPED = {
    "4 bits": ("bits_4", "4bit"),
    "2 bits": ("bits_2", "2bit"),
    "70% pruned": ("pruned_70", "70pruned"),
}
"""Masks for each model: in the study, and as files end."""


def shipped_rows():
    """All masks for real models: what `leank verify` said, and points that they lose."""
    for path, known in (
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", study()[0]),
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct", small_study()),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", smallest_study()),
    ):
        model = path.partition("/")[2]
        for title, (name, end) in SHIPPED.items():
            mask = load_mask(REPO / f"masks/{path}-{end}.yaml")
            verdict = mask.evaluation["verify"].partition(":")[0]
            cells = shared_cells([known["dense"], known[name]])
            gap = interval(lost(known[name], known["dense"], cells))
            dense = f"{mean_points(known['dense'], cells):.1f}"
            yield line(model, title, verdict, f"{gap}, of {dense}")


def selected_study_rows():
    """Points where the best far tokens alone are read, on the questions that all were asked."""
    rows = (
        ("dense", "all", "dense"),
        (4, "all", "bits_4"),
        (4, "a tenth", "bits_4_pages_0.1"),
        (2, "all", "bits_2"),
        (2, "a quarter", "bits_2_pages_0.25"),
        (2, "a tenth", "bits_2_pages_0.1"),
    )
    found, _ = study()
    cells = shared_cells([found[name] for *_, name in rows])
    for bits, read, name in rows:
        lengths = sorted({length for _, length in cells})
        parts = [cells, *(some(cells, length) for length in lengths)]
        gap = interval(lost(found[name], found["dense"], cells))
        shown = (f"{points(found[name], part).value:.1f}" for part in parts)
        yield line(bits, read, *shown, gap)


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


HEADS = {"fisher": "Fisher", "duo": "DuoAttention"}


def streaming_points_rows():
    """Points of 2 bits with streaming heads, beside fewer bits everywhere."""
    known = first_study()
    folder = RESULTS / "streaming_points_qwen_1.5b"
    found = {one["variant"]: one for one in merged(folder)["variants"]}
    assert (
        merged(folder)["questions_sha256"]
        == merged(RESULTS / "study_first_qwen_1.5b")["questions_sha256"]
    )
    cells = shared_cells([*found.values(), known["dense"], known["bits_1.5"]])
    assert sum(cells.values()) == 640
    for title, one in (
        ("dense", known["dense"]),
        ("2 bits", known["bits_2"]),
        ("1.5 bits", known["bits_1.5"]),
        ("1 bit", known["bits_1"]),
        ("2 bits, 25% streaming by Fisher", found["bits_2_fisher_0.25"]),
        ("2 bits, 25% streaming by DuoAttention", found["bits_2_duo_0.25"]),
    ):
        gap = interval(lost(one, known["dense"], cells))
        yield line(title, f"{one['token_bytes']:,.0f}", f"{mean_points(one, cells):.1f}", gap)


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("README.md", opening),
        ("docs/accuracy.md", kl_rows),
        ("docs/accuracy.md", variation_rows),
        ("docs/accuracy.md", uniform_rows),
        ("docs/accuracy.md", even_rows),
        ("docs/accuracy.md", halves_rows),
        ("docs/accuracy.md", study_rows),
        ("docs/accuracy.md", lambda: compared_rows(small_study())),
        ("docs/accuracy.md", small_study_rows),
        ("docs/accuracy.md", cache_rows),
        ("docs/accuracy.md", first_cache_rows),
        ("docs/accuracy.md", turboquant_rows),
        ("docs/accuracy.md", lambda: compared_rows(smallest_study())),
        ("docs/accuracy.md", smallest_study_rows),
        ("docs/accuracy.md", long_rows),
        ("docs/accuracy.md", learned_rows),
        ("docs/accuracy.md", streaming_rows),
        ("docs/accuracy.md", streaming_points_rows),
        ("benchmarks/real/README.md", directions_rows),
        ("docs/accuracy.md", lambda: small_kl_rows(8192, *SMALL_KL)),
        ("docs/accuracy.md", lambda: small_kl_rows(7936, "kl_smollm2_7936")),
        ("docs/accuracy.md", simulated_rows),
        ("masks/README.md", shipped_rows),
        ("docs/performance.md", selected_study_rows),
        ("docs/performance.md", selection_rows),
    ],
)
def test_rows_are_those_of_the_results(page, rows):
    assert "\n".join(rows()) in text_of(page)


def test_masks_of_simulated_caches_are_those_at_hand():
    (shipped,) = REPO.glob("masks/Qwen/Qwen2.5-Coder-1.5B-Instruct-2bit.yaml")
    files = {"bits_2": shipped}
    files |= {path.stem: path for path in (RESULTS / "simulated_qwen_1.5b_masks").iterdir()}
    told = load("simulated_qwen_1.5b")["masks"]
    assert {name: one["sha256"] for name, one in told.items()} == {
        name: load_mask(path).sha256 for name, path in files.items()
    }


def test_the_readme_says_what_simulated_caches_lose():
    found, cells = simulated()
    gaps = {
        name.partition(",")[0]: f"{lost(one, found['dense'], cells).value:.1f}"
        for name, one in found.items()
        if name != "KIVI, 4 bits"
    }
    sentence = (
        f"On {sum(cells.values())} of them, simulated, 2 bits lose {gaps['leank bits_2']} points, "
        f"KIVI's 2 bits {gaps['KIVI']}, Kitty's {gaps['Kitty']}, ThinK's 70% of K pruned "
        f"{gaps['ThinK']}, and KIVI's 4 bits none ("
    )
    assert sentence in " ".join(text_of("README.md").split())
    assert lost(found["KIVI, 4 bits"], found["dense"], cells).value < 0


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("KIVI has {:.1f} points less than leank's 2 bits ({:.1f} to {:.1f})", "KIVI, 2 bits"),
        ("Kitty {:.1f} ({:.1f} to {:.1f})", "Kitty, 2 bits, an eighth of K at 4"),
        ("2 bits everywhere {:.1f} ({:.1f} to {:.1f})", "leank 2_bits_everywhere"),
        ("has {:.1f} less ({:.1f} to {:.1f})", "ThinK, 70% of K pruned"),
    ],
)
def test_docs_say_what_simulated_caches_lose_against_2_bits(sentence, name):
    found, cells = simulated()
    gap = lost(found[name], found["leank bits_2"], cells)
    text = " ".join(text_of("docs/accuracy.md").split())
    assert sentence.format(gap.value, gap.low, gap.high) in text


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


def test_the_picture_of_learning_has_both_starts(tmp_path):
    results = load("learn_qwen_1.5b")
    draw_losses(results, tmp_path / "learning.svg")
    assert (size := (tmp_path / "learning.svg").stat().st_size) > 10_000
    checked = [row | {"held_out": [[0, 75, 150], [0.09, 0.08, 0.07]]} for row in results["masks"]]
    draw_losses(results | {"masks": checked}, tmp_path / "checked.svg")
    assert (tmp_path / "checked.svg").stat().st_size > size
    with pytest.raises(UserError, match="no second stage from learned"):
        draw_losses(results | {"masks": results["masks"][:4]}, tmp_path / "learning.svg")
