"""What pictures call a cache."""


def label_of(name: str) -> str:
    """Of its name in a file of results: that of a mask's file (`bits_4`, `pruned_70`), with or
    without `leank`, or what vLLM calls its own.
    """
    for prefix in ("leank packed, ", "leank ", "vLLM ", "vllm_"):
        name = name.removeprefix(prefix)
    kind, _, number = name.partition("_")
    if kind == "bits":
        return f"{number} bit" if number == "1" else f"{number} bits"
    if number.isdecimal():
        return f"{number}% pruned"
    return name.replace("turboquant_", "TurboQuant ").split(", an")[0]
