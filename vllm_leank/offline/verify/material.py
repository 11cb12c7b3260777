"""What can be compared at all: known before a model is loaded, so that nobody waits in vain."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.builtin_prompts import Named
from vllm_leank.offline.verify.haystacks import KINDS, haystack
from vllm_leank.offline.verify.plan import COMPARED, doublings, least_longest
from vllm_leank.offline.verify.texts import texts
from vllm_leank.offline.verify.verdict import LEAST_ANSWERS


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        texts: built-in texts to compare.
        needles: right answers of dense attention to judge by.
        data: prompts of the user's, with answers or without.
        written: tokens that the model writes after a prompt without an answer.
        max_tokens: the longest length (None: what the model takes, if there is time).
        minutes: the time that may be taken once the model is loaded.
        seed: of texts and needles.

    Raises:
        UserError: needles are too few to judge by.
    """

    texts: int
    needles: int
    data: Sequence[Named]
    written: int
    max_tokens: int | None
    minutes: float
    seed: int

    def __post_init__(self) -> None:
        if 0 < self.needles < LEAST_ANSWERS:
            raise UserError(
                f"--needles is {self.needles}; answers are judged by at least {LEAST_ANSWERS}, or "
                "not at all with --needles 0"
            )


@dataclass(frozen=True)
class Material:
    """What of a request can be compared.

    Attributes:
        candidates: what the longest length may be, descending.
        shortest: the short length.
        probe: token ids of the short length, to measure with.
        texts: how many built-in texts.
        kinds: kinds of needles.
        notes: what is left out, and why.
    """

    candidates: Sequence[int]
    shortest: int
    probe: Sequence[int]
    texts: int
    kinds: Sequence[str]
    notes: Sequence[str]


def find_material(checkpoint: Checkpoint, window: Window, request: Request) -> Material:
    """See `Material`; reads the tokenizer.

    Raises:
        UserError: nothing can be compared.
    """
    unknown = 1 << 40
    longest = checkpoint.max_tokens(request.max_tokens or unknown)
    if longest == unknown:
        raise UserError("the model's config has no longest context; give --max-tokens")
    least = least_longest(window)
    if longest < least:
        raise UserError(
            f"samples of {longest} tokens would have no far tokens; with sink {window.sink} and "
            f"recent {window.recent} they need {least}"
        )
    lengths = doublings(window, longest)
    shortest = lengths[0]
    notes, kinds, probe = [], [], []
    if request.texts:
        try:
            probe = texts(checkpoint, 1, shortest, request.seed)[0][1]
        except UserError as error:
            notes.append(f"built-in texts were left out: {error}")
    count = request.texts if probe else 0
    faults = []
    for kind in KINDS if request.needles else ():
        try:
            found = haystack(checkpoint, window, kind, shortest, [request.seed])
        except UserError as error:
            faults.append(str(error))
            continue
        kinds.append(kind)
        probe = probe or found.context
    if faults and not kinds:
        notes.append(f"needles were left out: {faults[0]}")
    data = [prompt + answer for _, (prompt, answer) in request.data]
    probe = probe or max(data, key=len, default=[])[-shortest:]
    if len(probe) <= COMPARED:
        advice = "give prompts with far tokens by --data prompts.jsonl"
        raise UserError("; ".join(["nothing to compare", *notes, advice]))
    candidates = [longest] if request.max_tokens else lengths[::-1]
    return Material(candidates, shortest, probe, count, kinds, notes)
