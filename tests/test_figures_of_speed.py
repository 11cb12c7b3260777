"""Figures of speed, room and reliability in the README and docs are what `benchmarks/results` has,
to the digits shown.
"""

import pytest
from figures import line, load, text_of
from figures_of_models import requests_and_rate, served_engines, served_small
from long_context import fit_lines, measured_lines, read_lines

DENSE, FOUR, TWO, ONE = "vLLM, dense", "leank, 4 bits", "leank, 2 bits", "leank, 1 bit"


def packed_rows():
    """Decode attention on two machines."""
    for bits in (4, 2, 1):
        for card, end in (("H100", ""), ("H200", "_h200")):
            results = load(f"attention_packed_{bits}{end}")
            assert card in results["machine"]["gpu"]
            many, one = (case["mean"] for case in results["cases"])
            yield line(
                bits,
                card,
                f"{many['ms']:.3f}",
                *(_times(many[name]) for name in ("speedup_flash", "bound_flash")),
                f"{many['share_of_read_limit']:.0%}",
                *(_times(one[name]) for name in ("speedup_flash", "bound_flash")),
            )


def _times(value):
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def chunk_rows():
    """A chunk of a prompt, with the launch that engines use."""
    for bits in (4, 2, 1):
        results = load(f"prompt_chunk_packed_{bits}")
        mean = results["means"][0]
        assert mean["launch"] == "chosen"
        flash = results["flash_ms"]
        yield line(bits, f"{flash:.2f}", f"{mean['ms']:.2f}", f"{mean['ms'] / flash:.1f}")


def serve_rows():
    """Engines under load, at the memory of an H200."""
    yield from served_rows("serve_full", {4: FOUR, 2: TWO})


def smaller_rows():
    """Engines under load, at the memory of an 80 GB card."""
    yield from served_rows("serve_bits", {4: FOUR, 2: TWO, 1: ONE})


def served_rows(files, names):
    """Of FlashAttention, whose figures are the first in the file of 4 bits, and of leank."""
    flash = load(f"{files}_4")["variants"][0]
    engines = {name: load(f"{files}_{bits}")["variants"][-1] for bits, name in names.items()}
    yield from engine_rows({"vLLM, FlashAttention 3": flash, **engines})


def engine_rows(engines):
    """Engines under load, beside the first of them."""
    flash = next(iter(engines.values()))
    for name, one in engines.items():
        first = f"{one['ttft_s']['median']:.2f}"
        if one is not flash:
            first += f" ({one['ttft_s']['median'] / flash['ttft_s']['median']:.2f}x)"
        tpot = f"{one['decode']['tpot_p50_ms']:.1f}"
        yield line(name, *requests_and_rate(one, flash), tpot, first)


def real_rows():
    """An engine of a real model under load, with vLLM's caches and ours."""
    return dense_first(served_engines())


def dense_first(engines):
    return engine_rows({"vLLM, FlashAttention 3": engines.pop("dense"), **engines})


def small_real_rows():
    """Two smaller models side by side."""
    models = [served_small(model) for model in ("qwen_0.5b", "smollm2")]
    for name in models[0]:
        cells = []
        for engines in models:
            one, dense = engines[name], engines["dense"]
            assert one["waiting"], "not all room was in use"
            cells += [*requests_and_rate(one, dense), f"{one['decode']['tpot_p50_ms']:.1f}"]
        yield line("vLLM, FlashAttention 3" if name == "dense" else name, *cells)


def apart_rows():
    """Decode attention of heads with eight profiles, each compiled apart or all together."""
    for bits in (2, 4):
        together, apart = (
            load(f"attention_qwen_1.5b_{bits}{end}")["cases"] for end in ("_bf6cb4a", "")
        )
        for before, now in zip(together, apart, strict=True):
            times = (f"{1e3 * one['mean']['ms']:.1f}" for one in (before, now))
            yield line(bits, f"{now['batch']} x {now['length']:,}", *times)


def rebuilt_rows():
    """An engine before the package got its rooms, and after that twice."""
    for name, files in (("before", ["2c4e8bf"]), ("after", ["489142f_1", "489142f_2"])):
        runs = [load(f"serve_llama_{one}")["variants"][0] for one in files]

        def each(form, figure, runs=runs):
            return ", ".join(form.format(figure(one)) for one in runs)

        yield line(
            name,
            each("{:.3f}", lambda one: one["ttft_s"]["median"]),
            each("{:.1f}", lambda one: one["decode"]["tpot_p50_ms"]),
            each("{}", lambda one: one["concurrent"]),
            each("{:,.0f}", lambda one: one["decode"]["tokens_per_s"]),
            each("{:,}", lambda one: one["engine"]["num_gpu_blocks"]),
        )


def mixed_rows():
    """Prompts that arrive while others decode."""
    names = {"dense": DENSE, "vllm_fp8": "vLLM, fp8", "bits_2": TWO}
    for cell in sorted(load("mixed_load_h200")["cells"], key=lambda cell: cell["rate"]):
        assert not cell["failed"]
        first, each = cell["ttft_ms"], cell["tpot_ms"]
        yield line(
            cell["rate"],
            names[cell["variant"]],
            f"{cell['requests_per_s']:.2f}",
            f"{cell['good_requests_per_s']:.2f}",
            f"{first['p50'] / 1e3:.2f}, {first['p99'] / 1e3:.2f}",
            f"{each['p50']:.1f}, {each['p99']:.1f}",
            f"{cell['output_tokens_per_s']:,.0f}",
        )


def soak_rows():
    """Servers under load in a pool that is too small."""
    names = {"dense": "plain vLLM", "bits_4": FOUR}
    names["nan_bits_4"] = "leank, memory that nobody may read is NaN"
    for name, title in names.items():
        found = load(f"soak_gpu/{name}")
        answers = found["answers"]
        counts = (
            found["preemptions"], found["prompt_tokens_found"], answers["compared"],
            answers["equal"], answers["ties"], answers["changed"],
        )  # fmt: skip
        ends = ", ".join(f"{found[one]:,}" for one in ("served", "hung_up", "failed"))
        yield line(title, f"{found['seconds'] / 60:.1f}", ends, *(f"{one:,.0f}" for one in counts))


def selected_rows():
    """Decode attention that reads the best far tokens alone."""
    yield from rows_of_reads(
        ("70% of K pruned", "all", "attention_lead_whole"),
        ("70% of K pruned", "a tenth", "attention_lead_whole_pages"),
        ("4 bits, all heads alike", "all", "attention_even_4"),
        ("4 bits, all heads alike", "a tenth", "attention_even_4_pages"),
        ("2 bits, three profiles", "all", "attention_even_2"),
        ("2 bits, three profiles", "a tenth", "attention_even_2_pages"),
        ("1 bit, as a real model's first heads", "all", "attention_lead_2"),
        ("1 bit, as a real model's first heads", "a tenth", "attention_lead_2_pages"),
    )


def selected_rows_h100():
    """The same on the other card."""
    yield from rows_of_reads(
        ("2 bits, three profiles", "a tenth", "attention_even_2_pages_h100"),
        ("1 bit, as a real model's first heads", "all", "attention_lead_2_h100"),
        ("1 bit, as a real model's first heads", "a tenth", "attention_lead_2_pages_h100"),
    )


def rows_of_reads(*reads):
    """Of a mask, how many far tokens are read, and the file."""
    for mask, read, name in reads:
        results = load(name)
        assert ("H100" in results["machine"]["gpu"]) == name.endswith("_h100")
        means = {case["batch"]: case["mean"] for case in reversed(results["cases"])}
        one, eight = means[1], means[8]
        figures = (
            f"{one['ms']:.4f}", _times(one["speedup_flash"]),
            f"{eight['ms']:.3f}", _times(eight["speedup_flash"]),
        )  # fmt: skip
        yield line(mask, read, *figures)


def long_attention_rows():
    """One long request against FlashAttention 3."""
    for bits in (4, 2):
        cases = load(f"attention_long_{bits}_h200")["cases"]
        assert [(case["batch"], case["length"]) for case in cases] == [(1, 1 << 17), (1, 1 << 19)]
        yield line(bits, *(_times(case["mean"]["speedup_flash"]) for case in cases))


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("docs/performance.md", packed_rows),
        ("docs/performance.md", chunk_rows),
        ("docs/performance.md", serve_rows),
        ("docs/performance.md", smaller_rows),
        ("docs/performance.md", real_rows),
        ("docs/performance.md", small_real_rows),
        ("docs/performance.md", apart_rows),
        ("docs/performance.md", rebuilt_rows),
        ("README.md", mixed_rows),
        ("docs/reliability.md", soak_rows),
        ("docs/performance.md", selected_rows),
        ("docs/performance.md", selected_rows_h100),
        ("docs/performance.md", long_attention_rows),
        ("docs/performance.md", lambda: read_lines(load("long_context"))),
        ("docs/performance.md", lambda: fit_lines(load("long_context"))),
        ("docs/performance.md", lambda: measured_lines(load("long_context"))),
    ],
)
def test_rows_are_those_of_the_results(page, rows):
    assert "\n".join(rows()) in text_of(page)


def test_docs_say_what_prompts_read_pruned_leave_room_for():
    (found,) = (
        row["requests"]["80GiB"]
        for row in load("long_context")["rows"]
        if (row["shape"], row["tensor_parallel_size"]) == ("llama-3.1-70b", 8)
        and (row["length"], row["bits"], row["pages"]) == (1 << 20, 1, None)
    )
    more, fewer = f"{found['at_once_pruned']:.1f}", f"{found['at_once']:.1f}"
    said = " ".join(text_of("docs/performance.md").split())
    assert f"leave room for more, as for {more} instead of {fewer} with 1 bit (70B, 8 GPUs" in said


def test_docs_say_how_long_a_first_start_takes():
    flash, four = (one["seconds"]["start"] for one in load("serve_qwen_1.5b_4")["variants"])
    (two,) = (one["seconds"]["start"] for one in load("serve_qwen_1.5b_2")["variants"])
    before = load("serve_qwen_1.5b_4_f8d2b56")["variants"][-1]["seconds"]["start"]
    said = " ".join(text_of("docs/performance.md").split())
    assert f"started in {four:.0f} s with 4 bits, of which 56 were for 16 kernels" in said
    assert f"in {two:.0f} s with 2 bits, and without leank in {flash:.0f} (" in said
    assert f"It was [{before:.0f} s](" in said


def test_docs_say_what_other_runs_of_the_real_model_had():
    engines = served_engines()
    assert {name for name, one in engines.items() if one["preempted"]} == {"vLLM fp8"}
    eight_bit = engines["vLLM fp8"]
    assert eight_bit["preempted"] == 1
    before, sooner = (
        _served(load(f"serve_qwen_1.5b_{name}_9689cc4")["variants"][0])
        for name in ("flash", "bits_2")
    )
    earlier, beside = load("serve_qwen_1.5b_fp8"), load("serve_qwen_1.5b_2_469eadf")
    assert earlier["date"] == beside["date"]
    flash, fp8, four = (_served(one) for one in earlier["variants"])
    assert earlier["variants"][1]["concurrent"] == 26
    first, second = (_served(one) for one in load("serve_qwen_1.5b_4")["variants"])
    two, again, then = (
        load(f"serve_qwen_1.5b_2{end}")["variants"][0] for end in ("", "_3c07c68", "_469eadf")
    )
    _, same_day = load("serve_qwen_1.5b_turboquant")["variants"]
    ms, alone = (f"{one['decode']['tpot_p50_ms']:.1f}" for one in (then, engines["leank, 2 bits"]))
    said = " ".join(text_of("docs/performance.md").split())
    steps = eight_bit["decode"]["steps"]
    assert (
        f"fp8 had its {eight_bit['concurrent']} requests for {steps} steps instead of 256, until"
    ) in said
    assert f"flash_9689cc4.json) had {before} tokens/s and [2 bits](" in said
    assert f"bits_2_9689cc4.json) {sooner}. [TurboQuant](" in said
    assert f"where FlashAttention had {_served(same_day)}." in said
    assert (
        f"FlashAttention had {first} and {flash}, fp8 {fp8} (with 26 requests), 4 bits "
        f"{second} and {four} (["
    ) in said
    assert f"2 bits {_served(two)} and {_served(again)} ([" in said
    found = "[2 bits](../benchmarks/results/serve_qwen_1.5b_2_469eadf.json)"
    assert f"{found} had {_served(then)}, {ms} ms per token instead of {alone}" in said


def test_docs_say_how_small_models_are_served():
    said = " ".join(text_of("docs/performance.md").split())
    small = served_small("smollm2")
    for one in small.values():
        # As many as ever ran at once.
        assert one["concurrent"] == one["peak_running"]
    held = {name: one["decode"]["steps"] for name, one in small.items() if one["preempted"]}
    assert {one["decode"]["steps"] for name, one in small.items() if name not in held} == {256}
    assert (
        "until one was preempted: {dense} with FlashAttention, {vLLM fp8} with fp8, "
        "{vLLM turboquant_4bit_nc} with TurboQuant and {vLLM int4_per_token_head} with int4."
    ).format(**held) in said
    int4 = served_small("qwen_0.5b")["vLLM int4_per_token_head"]
    assert (
        f"int4 ran {int4['peak_running']} requests of the 0.5B until one was; the table has the "
        f"{int4['concurrent']} after that."
    ) in said

    engines = [small[name] for name in (FOUR, TWO, ONE)]
    cases = [load(f"attention_smollm2_{bits}")["cases"][0] for bits in (4, 2, 1)]
    assert [case["batch"] for case in cases] == [one["concurrent"] for one in engines]
    assert {case["length"] for case in cases} == {7900}
    reads = [f"{30 * case['mean']['ms']:.1f} ms for {case['batch']}" for case in cases]
    assert f"is about {reads[0]} requests of 7,900 tokens with [4 bits](" in said
    assert f"{reads[1]} with [2 bits](" in said
    assert f"and {reads[2]} with [1 bit](" in said
    steps = [f"{one['decode']['tpot_p50_ms']:.1f}" for one in engines]
    assert f"took {steps[0]}, {steps[1]} and {steps[2]} ms. Most likely" in said


def test_docs_say_what_ran_with_the_scheduler_of_today():
    masks = [
        one
        for model in ("qwen_0.5b", "smollm2")
        for name, one in served_small(model).items()
        if name.startswith("leank")
    ]
    assert [one["preempted"] for one in masks] == [0] * 12
    most = max(one["concurrent"] for one in masks)
    said = " ".join(text_of("docs/reliability.md").split())
    assert (
        f"two smaller models (342d9f3 and 0eb2e03) served up to {most} requests at once on an "
        "H200 with six masks each"
    ) in said


def test_docs_say_what_other_runs_of_a_small_model_had():
    said = " ".join(text_of("docs/performance.md").split())
    again, before, flash, two = (
        _served(load(f"serve_qwen_0.5b_{name}")["variants"][0])
        for name in ("bits_4_again", "bits_4_9689cc4", "flash_9689cc4", "bits_2_9689cc4")
    )
    results = "../benchmarks/results/serve_"
    folder = f"{results}qwen_0.5b"
    assert (
        f"had {_served(served_small('qwen_0.5b')[FOUR])}, [{again}]({folder}_bits_4_again"
        f".json) nine minutes later, and [{before}]({folder}_bits_4_9689cc4.json) on another host"
    ) in said
    dense = f"[FlashAttention]({folder}_flash_9689cc4.json) had {flash}"
    assert f"{dense} and [2 bits]({folder}_bits_2_9689cc4.json) {two}." in said
    (earlier,) = load("serve_smollm2_bits_2_342d9f3")["variants"]
    now = served_small("smollm2")[TWO]
    assert (
        f"2 bits of the 135M had {_served(now)} tokens/s, and [{_served(earlier)}]("
        f"{results}smollm2_bits_2_342d9f3.json), {earlier['decode']['tpot_p50_ms']:.1f} ms"
    ) in said
    more = now["decode"]["tokens_per_s"] / earlier["decode"]["tokens_per_s"]
    assert f"{more:.1f}" == "1.5"
    assert "a run of such a small model may have half as many tokens again" in said


def _served(one):
    return f"{one['decode']['tokens_per_s']:,.0f}"


def test_docs_say_what_the_scheduler_takes():
    rows = load("scheduler_time")["rows"]
    assert {row["requests"] for row in rows} == {82}

    def range_of(engine):
        times = [row["schedule_ms"] for row in rows if row["engine"] == engine]
        assert len(times) == 4
        return f"{min(times):.2f} to {max(times):.2f}"

    said = " ".join(text_of("docs/performance.md").split())
    assert f"it takes {range_of('plain')} ms to make a step of 82 requests with plain" in said
    assert f"{range_of('leank')} with leank, which has two kinds of pages" in said


def test_docs_say_how_vllm_s_small_caches_are_served():
    engines = served_engines()
    flash = engines["dense"]
    turboquant, int4 = (
        flash["decode"]["tokens_per_s"] / engines[f"vLLM {name}"]["decode"]["tokens_per_s"]
        for name in ("turboquant_4bit_nc", "int4_per_token_head")
    )
    first = engines["vLLM int4_per_token_head"]["ttft_s"]["median"] / flash["ttft_s"]["median"]
    said = " ".join(text_of("docs/performance.md").split())
    assert f"decode {turboquant:.1f} and {int4:.1f} times as slowly as the dense cache" in said
    assert f"a prompt takes int4 {first:.0f} times as long" in said


def test_docs_say_what_was_tried_and_left():
    said = " ".join(text_of("docs/performance.md").split())
    apart, together = (
        1e3 * load(f"attention_apart_2_{commit}")["cases"][0]["mean"]["ms"]
        for commit in ("e17ca4a", "bf6cb4a")
    )
    assert f"took {apart:.0f} us in their own functions and {together:.0f} in one" in said
    first, again, before, sums = (
        load(f"prompt_chunk_packed_4_{run}")
        for run in ("b3038c4_1", "b3038c4_2", "bf6cb4a", "e17ca4a")
    )
    now, twice, registers, memory = (
        f"{one['means'][0]['ms']:.2f}" for one in (first, again, before, sums)
    )
    assert now == twice
    assert f"chunk at 4 bits takes {now} ms instead of {registers}" in said
    assert f"still {first['means'][0]['ms'] / first['flash_ms']:.1f} times" in said
    assert f"through memory as well took {memory} ms" in said


def test_docs_say_how_fast_a_real_model_s_codes_are_read():
    four, two = (load(f"attention_qwen_1.5b_{bits}")["cases"][0] for bits in (4, 2))
    assert (four["batch"], four["length"]) == (two["batch"], two["length"]) == (64, 32768)
    gains, bounds = (
        [_times(one["mean"][name]) for one in (four, two)]
        for name in ("speedup_flash", "bound_flash")
    )
    said = " ".join(text_of("docs/performance.md").split())
    assert f"it is {gains[0]} as fast as FlashAttention 3 with the [4 bits]" in said
    assert f"{gains[1]} with the [2 bits]" in said
    assert f"where bytes would allow {bounds[0]} and {bounds[1]}" in said
    wide = load("attention_packed_2_h200")["cases"][0]["mean"]["speedup_flash"]
    said = " ".join(text_of("README.md").split())
    assert f"runs {wide:.1f}x as fast as FlashAttention 3 on an H200 with masks of random" in said
    assert f"{two['mean']['speedup_flash']:.1f}x with the 1.5B's" in said


def test_the_readme_says_how_a_larger_shape_is_served():
    engines = [*load("serve_full_4")["variants"], *load("serve_full_2")["variants"]]
    dense, four, two = (
        f"{one['concurrent']} {{}}{one['decode']['tokens_per_s']:,.0f}" for one in engines
    )
    said = (
        f"{dense.format('requests and ')} tokens/s dense, {four.format('and ')} with 4 bits, "
        f"{two.format('and ')} with 2 bits"
    )
    (beside,) = load("serve_qwen_1.5b_2_469eadf")["variants"]
    readme = " ".join(text_of("README.md").split())
    assert said in readme
    assert f"2 bits had {_served(beside)} tokens/s in another run, while a second engine" in readme


def test_the_readme_says_how_fast_codes_are_read():
    cases = [
        [load(f"attention_packed_{bits}{end}")["cases"] for bits in (4, 2, 1)]
        for end in ("_h200", "")
    ]

    def times(card, case, name):
        found = [_times(one[case]["mean"][name]) for one in cases[card]]
        return f"{found[0]}, {found[1]} and {found[2]}"

    many, one = ([times(card, case, "speedup_flash") for card in (0, 1)] for case in (0, 1))
    assert {len(results[0]["layers"]) for results in cases[0]} == {2}
    real = [load(f"attention_qwen_1.5b_{bits}")["cases"] for bits in (4, 2)]
    assert {len(results[0]["layers"]) for results in real} == {4}
    batch, against, request = (
        " and ".join(_times(results[case]["mean"][name]) for results in real)
        for case, name in ((0, "speedup_flash"), (0, "speedup_flash_fp8"), (1, "speedup_flash"))
    )
    said = " ".join(text_of("README.md").split())
    assert (
        f"with fp8 K and V the batch is {times(0, 0, 'speedup_flash_fp8')} as fast on the" in said
    )
    assert f"{batch} as fast for the batch, {against} against fp8, and {request} for one" in said
    assert (
        f"{many[0]} as fast as FlashAttention 3 on an H200, and {many[1]} on an H100, where bytes "
        f"would allow {times(0, 0, 'bound_flash')}. With one request of 131,072 tokens it is "
        f"{one[0]} on the H200, and {one[1]} on the H100."
    ) in said
