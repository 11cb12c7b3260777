"""Points in the README and docs are what `benchmarks/results` has, to the digits shown."""

from functools import cache

import pytest
from figures import REPO, RESULTS, line, load, text_of
from figures_of_models import (
    LEARNED_MASKS,
    archives,
    interval,
    kl,
    named,
    requests_and_rate,
    served_engines,
)
from real.kl_picture import FLOOR
from real.study_table import lost, mean_points, merged, points, shared_cells, some

from vllm_leank.mask.file import load_mask

DENSE, FOUR, TWO = "vLLM, dense", "leank, 4 bits", "leank, 2 bits"
OTHERS = (
    "vLLM fp8, 4 layers whole",
    "vLLM fp8",
    "vLLM turboquant_4bit_nc",
    "vLLM int4_per_token_head",
    "KIVI, 4 bits",
    "KIVI, 2 bits",
)


ASKED_MOST = "dense", "bits_4", "bits_2"


@cache
def study():
    """Variants of the study by name, and what those were asked that were asked most."""
    variants = {one["variant"]: one for one in merged(RESULTS / "study_qwen_1.5b")["variants"]}
    return variants, shared_cells([variants[name] for name in ASKED_MOST])


def opening():
    """The README's first table."""
    variants, cells = study()
    engines = {named(name): one for name, one in variants.items()}
    for title, name, key in zip(
        (DENSE, FOUR, TWO), (FLOOR, "leank bits_4", "leank bits_2"), ASKED_MOST, strict=True
    ):
        one = variants[key]
        row = archives()[name]
        assert row["token_bytes"] == one["token_bytes"]
        size = f"{row['token_bytes']:,.0f}"
        if one is not variants["dense"]:
            size += f" ({row['x']:.1f}x)"
        found = interval(points(one, cells))
        yield line(title, size, found, kl(row, 8192), kl(row, 30000), *speed(title))
    caches, asked = simulated()
    of_engines = [name for name in OTHERS if name in engines]
    # Those without an engine stand below what dense attention has where they were simulated.
    for name in (*of_engines, "dense", *(name for name in OTHERS if name not in engines)):
        if name == "dense":
            size = f"{archives()[FLOOR]['token_bytes']:,.0f}"
            found = interval(points(caches[name], asked))
            yield line("dense, in the simulation", size, found, *[""] * 4)
            continue
        row = archives()[name]
        size = f"{row['token_bytes']:,.0f} ({row['x']:.1f}x)"
        if one := engines.get(name):
            assert shared_cells([variants["dense"], one]) == cells
            title, found = name, interval(points(one, cells))
        else:
            title, found = f"{name}, simulated", interval(points(caches[name], asked))
        yield line(title, size, found, kl(row, 8192), kl(row, 30000), *speed(name))


def speed(name):
    """Requests at once and tokens per second, where an engine has the cache."""
    engines = served_engines()
    one = engines["dense"] if name == DENSE else engines.get(name)
    return requests_and_rate(one, engines["dense"]) if one else ("", "")


SERVED = {"dense": "dense", "leank bits_2": "bits_2"}
"""Of simulated caches, what the study calls those that engines have."""


def simulated(model="qwen_1.5b", engines=None):
    """Simulated caches by name, and what all were asked, which the study asked engines, too."""
    engines = engines or study()[0]
    results = load(f"simulated_{model}")
    assert results["questions_sha256"] == merged(RESULTS / f"study_{model}")["questions_sha256"]
    found = {one["variant"]: one for one in results["variants"]}
    return found, shared_cells([*found.values(), *(engines[name] for name in SERVED.values())])


def simulated_name(name):
    """As pages have it."""
    if name.endswith("everywhere"):
        return name.removeprefix("leank ").replace("_", " ")
    return named(name)


def simulated_rows():
    """Points of simulated caches, and of engines on the same questions."""
    engines, _ = study()
    found, cells = simulated()
    dense = found["dense"]
    for name, one in found.items():
        size = f"{one['token_bytes']:,.0f} ({dense['token_bytes'] / one['token_bytes']:.1f}x)"
        engine = f"{mean_points(engines[SERVED[name]], cells):.1f}" if name in SERVED else ""
        gap = interval(lost(one, dense, cells))
        yield line(simulated_name(name), size, f"{mean_points(one, cells):.1f}", gap, engine)


def small_simulated_rows():
    """What simulated caches lose on the smaller models."""
    both = simulated("qwen_0.5b", small_study()), simulated("smollm2", smallest_study())
    counts = [sum(cells.values()) for _, cells in both]
    yield line("lost", f"0.5B, {counts[0]:,} questions", f"135M, {counts[1]:,} questions")
    yield "|---|---|---|"
    for name in both[0][0]:
        if name == "dense":
            had = (f"({mean_points(found[name], cells):.1f} points)" for found, cells in both)
            yield line(name, *had)
        else:
            gaps = (interval(lost(found[name], found["dense"], cells)) for found, cells in both)
            yield line(simulated_name(name), *gaps)


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
        yield line(title, size, f"{sum(cells.values()):,}", *found, gap)


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


MODELS = {
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": (
        "study_qwen_1.5b",
        ("kl_qwen_1.5b_many_8192", "kl_qwen_1.5b_many_30000"),
    ),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": ("study_qwen_0.5b", ("kl_qwen_0.5b_8192",)),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("study_smollm2", ("kl_smollm2_7936",)),
}
"""For each model with masks that ship: results of points, and of KL."""


def shipped():
    """Masks for real models: model, title, the mask, and points that were had with it, those of
    dense attention, and of which questions.
    """
    variants = study()[0], small_study(), smallest_study()
    for path, known in zip(MODELS, variants, strict=True):
        for title, (name, end) in SHIPPED.items():
            cells = shared_cells([known["dense"], known[name]])
            mask = load_mask(REPO / f"masks/{path}-{end}.yaml")
            yield path, title, name, mask, known[name], known["dense"], cells


def shipped_rows():
    """All masks for real models: what `leank verify` said, and points that they lose."""
    for path, title, _, mask, one, dense, cells in shipped():
        verdict = mask.evaluation["verify"].partition(":")[0]
        gap = interval(lost(one, dense, cells))
        yield line(
            path.partition("/")[2], title, verdict, f"{gap}, of {mean_points(dense, cells):.1f}"
        )


def evaluations():
    """What masks say of themselves, but for verify's words: mask, and entries."""
    for path, _, name, mask, one, dense, cells in shipped():
        folder, files = MODELS[path]
        kl = {}
        for file in files:
            (row,) = (row for row in load(file)["archives"] if row["name"] == f"leank {name}")
            kl |= {length: found["kinds seen"]["kl"] for length, found in row["lengths"].items()}
        points_of = f"{mean_points(one, cells):.1f} of dense's {mean_points(dense, cells):.1f}"
        yield (
            mask,
            {
                "study": f"benchmarks/results/{folder}",
                "points": f"{points_of}, {sum(cells.values()):,} questions",
                "kl": kl,
                "kl_study": ", ".join(f"benchmarks/results/{file}.json" for file in files),
            },
        )


def test_masks_say_what_was_measured_of_them():
    for mask, told in evaluations():
        assert {name: mask.evaluation[name] for name in told} == told, mask.path


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
        ("docs/accuracy.md", study_rows),
        ("docs/accuracy.md", lambda: compared_rows(small_study())),
        ("docs/accuracy.md", small_study_rows),
        ("docs/accuracy.md", cache_rows),
        ("docs/accuracy.md", first_cache_rows),
        ("docs/accuracy.md", turboquant_rows),
        ("docs/accuracy.md", lambda: compared_rows(smallest_study())),
        ("docs/accuracy.md", smallest_study_rows),
        ("docs/accuracy.md", long_rows),
        ("docs/accuracy.md", streaming_points_rows),
        ("docs/accuracy.md", simulated_rows),
        ("docs/accuracy.md", small_simulated_rows),
        ("masks/README.md", shipped_rows),
        ("docs/performance.md", selected_study_rows),
    ],
)
def test_rows_are_those_of_the_results(page, rows):
    assert "\n".join(rows()) in text_of(page)


@pytest.mark.parametrize("model", ["qwen_1.5b", "qwen_0.5b", "smollm2"])
def test_masks_of_simulated_caches_are_those_at_hand(model):
    folder = RESULTS / f"simulated_{model}_masks"
    told = load(f"simulated_{model}")["masks"]
    assert {name: one["sha256"] for name, one in told.items()} == {
        path.stem: load_mask(path).sha256 for path in folder.iterdir()
    }


def test_the_readme_says_how_many_greedy_texts_loop():
    dense, two = (load(f"long_qwen_1.5b/{name}")["ways"]["greedy"] for name in ("dense", "bits_2"))
    assert (
        f"Of {two['answers']} greedy texts of up to 4,000 tokens {two['loops']} [ended in a loop]"
        f"(docs/accuracy.md#long-answers), {dense['loops']} with dense attention."
    ) in " ".join(text_of("README.md").split())


def test_the_readme_says_what_simulated_caches_lose():
    found, cells = simulated()
    gaps = {
        name.partition(",")[0]: f"{lost(one, found['dense'], cells).value:.1f}"
        for name, one in found.items()
        if name != "KIVI, 4 bits"
    }
    variants, asked = study()
    dense = points(found["dense"], cells).value, points(variants["dense"], asked).value
    sentence = (
        "Simulated caches were asked the same in transformers, where dense attention has "
        f"{dense[0]:.1f}, not {dense[1]:.1f}: 2 bits lose "
        f"{gaps['leank bits_2']} points there, KIVI's 2 bits {gaps['KIVI']}, Kitty's "
        f"{gaps['Kitty']}, ThinK's 70% of K pruned {gaps['ThinK']}, and KIVI's 4 bits none ("
    )
    assert sentence in " ".join(text_of("README.md").split())
    assert cells == asked
    assert lost(found["KIVI, 4 bits"], found["dense"], cells).value < 0


def test_pages_say_what_fp8_loses_with_four_layers_as_they_are():
    variants, cells = study()
    whole, dense, two = (variants[name] for name in ("vllm_fp8_ends", "dense", "bits_2"))
    gap = lost(whole, dense, cells)
    layers = " ".join(whole["engine_args"]["kv_cache_dtype_skip_layers"])
    said = f"(`--kv-cache-dtype-skip-layers {layers}`)"
    readme, docs = (" ".join(text_of(p).split()) for p in ("README.md", "docs/accuracy.md"))
    points_lost = f"{gap.value:.1f} points ({gap.low:.1f} to {gap.high:.1f})"
    assert f"{said} it loses {points_lost}" in readme
    assert gap.low < 0 < lost(two, dense, cells).low
    assert (
        f"{said} fp8 loses {points_lost}, which cannot be told from none; 2 bits lose as many for "
        "sure, at a quarter of its bytes"
    ) in docs
    assert f"{lost(two, dense, cells).value:.1f}" == f"{gap.value:.1f}"
    assert round(whole["token_bytes"] / two["token_bytes"]) == 4


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("KIVI has {:.1f} points less than leank's 2 bits ({:.1f} to {:.1f})", "KIVI, 2 bits"),
        ("Kitty {:.1f} ({:.1f} to {:.1f})", "Kitty, 2 bits, an eighth of K at 4"),
        ("2 bits everywhere {:.1f} ({:.1f} to {:.1f})", "leank 2_bits_everywhere"),
        ("has {:.1f} less ({:.1f} to {:.1f})", "ThinK, 70% of K pruned"),
        (
            "at 2.2 times the bytes of leank's 2, have {:.1f} points more than these "
            "({:.1f} to {:.1f})",
            "KIVI, 4 bits",
        ),
    ],
)
def test_docs_say_what_simulated_caches_lose_against_2_bits(sentence, name):
    found, cells = simulated()
    others = found[name], found["leank bits_2"]
    gap = lost(*(others[::-1] if "more" in sentence else others), cells)
    text = " ".join(text_of("docs/accuracy.md").split())
    assert sentence.format(gap.value, gap.low, gap.high) in text


def test_docs_say_where_simulated_caches_lose():
    found, cells = simulated()
    names = "KIVI, 2 bits", "Kitty, 2 bits, an eighth of K at 4", "leank bits_2"
    kivi, kitty, mine = (
        " and ".join(
            f"{lost(found[name], found['dense'], some(cells, task)).value:.1f}"
            for task in ("niah_multikey_2", "niah_multikey_3")
        )
        for name in names
    )
    sentence = f"KIVI loses {kivi} points there, Kitty {kitty}, leank's 2 bits {mine}"
    assert sentence in " ".join(text_of("docs/accuracy.md").split())
