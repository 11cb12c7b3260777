"""What tables about real models share: how rows are called, points with intervals, and KL of the
1.5B.
"""

from figures import load
from real.kl_picture import joined
from real.pictures import label_of


def interval(found):
    cells = [f"{one:.1f}" for one in (found.value, found.low, found.high)]
    value, low, high = ["0.0" if one == "-0.0" else one for one in cells]
    return f"{value} ({low} to {high})"


def archives():
    """Masks that were served, and caches of others, on the same texts."""
    return {row["name"]: row for row in joined(kl_results())["archives"]}


def kl_results():
    names = (
        "many_8192", "many_30000", "vllm_8192", "vllm_ends_8192", "kitty_8192", "others_30000",
        "vllm_ends_30000",
    )  # fmt: skip
    return [load(f"kl_qwen_1.5b_{name}") for name in names]


LEARNED_MASKS = ("leank pruned_70",)
"""Of the 1.5B, as studies and KL of today have it: its name does not say so."""


def named(name, learned=()):
    """A row's name as pages have it, where masks of `learned` were learned as well."""
    name = name.replace("vllm_", "vLLM ").replace("_ends", ", 4 layers whole")
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
    found = row["lengths"].get(str(length))
    return f"{found[kinds]['kl']:.4f}" if found else ""


KINDS = "kinds seen", "kinds unseen"


MASKS_SERVED = "pruned_50", "pruned_70", "bits_4", "bits_2", "bits_1.5", "bits_1"


def served_engines():
    """Engines of the 1.5B under load, by cache. Dense attention is first: FlashAttention 3."""
    vllm = _served_caches("qwen_1.5b", {"vLLM fp8, 4 layers whole": "fp8_ends"})
    return vllm | served_masks("qwen_1.5b", LEARNED_MASKS)


def served_small(model):
    """The same of a smaller model, 0.5B or 135M, whose masks were all calibrated."""
    return _served_caches(model, {}) | served_masks(model, learned=())


def _served_caches(model, more):
    """Of vLLM, and of `more` the files."""
    flash, fp8 = load(f"serve_{model}_flash")["variants"]
    files = more | {
        "vLLM turboquant_4bit_nc": "turboquant",
        "vLLM int4_per_token_head": "int4",
    }
    others = {name: load(f"serve_{model}_{file}")["variants"][0] for name, file in files.items()}
    return {"dense": flash, "vLLM fp8": fp8, **others}


def served_masks(model, learned):
    """Engines of leank, each of a file of its own, by mask."""
    found = {}
    for mask in MASKS_SERVED:
        (one,) = load(f"serve_{model}_{mask}")["variants"]
        found[named(f"leank {mask}", learned)] = one
    return found


def requests_and_rate(one, dense):
    """Requests at once and tokens per second, and how much of dense attention's that is, but of
    itself.
    """
    cells = []
    for form, (found, of_dense) in (
        ("{}", (one["concurrent"], dense["concurrent"])),
        ("{:,.0f}", (one["decode"]["tokens_per_s"], dense["decode"]["tokens_per_s"])),
    ):
        beside = "" if one is dense else f" ({found / of_dense:.2f}x)"
        cells.append(form.format(found) + beside)
    return cells
