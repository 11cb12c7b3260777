"""How long reading and comparing take on this machine, from a short prompt that is timed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_leank.offline.verify.reader import Reader


@dataclass(frozen=True)
class Pace:
    """Seconds that a prompt of `tokens` tokens took: `read` to read it, and `compare` to compare
    what follows it.

    A token costs `weights` multiply-adds, and `per_key` more for every token before it. The model
    has `layers` layers.
    """

    tokens: int
    read: float
    compare: float
    weights: float
    per_key: float
    layers: int

    def reading(self, tokens: int) -> float:
        """Seconds to read a prompt of so many tokens."""
        return self.read * self._work(tokens) / self._work(self.tokens)

    def comparing(self, tokens: int) -> float:
        """Seconds, at most, to compare what follows it."""
        return self.compare * max(1, tokens / self.tokens)

    def _work(self, tokens: int) -> float:
        return tokens * self.weights + self.per_key * tokens**2 / 2


def measure_pace(reader: Reader, prompt: Sequence[int], following: Sequence[int]) -> Pace:
    """Read a prompt and compare what follows it, with a clock.

    Raises:
        UserError: the model's attention is not what masks are for, or gives no numbers.
    """
    model = reader.model
    if model.device.type != "cpu":
        # The first time, libraries are loaded and kernels chosen.
        _timed(reader, prompt, following)
    read, compare = _timed(reader, prompt, following)
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight.numel()
    output = model.get_output_embeddings()
    # Looking a token up costs nothing, and the head only runs where logits are asked for.
    tables = embedding + (0 if output is None else output.weight.numel())
    if config.tie_word_embeddings:
        tables = embedding
    weights = sum(one.numel() for one in model.parameters()) - tables
    heads, layers = config.num_attention_heads, len(reader.archive.blind)
    head_dim = reader.geometry.head_dim
    # Scores and their product with V.
    return Pace(len(prompt), read, compare, float(weights), 2.0 * layers * heads * head_dim, layers)


def _timed(reader: Reader, prompt: Sequence[int], following: Sequence[int]) -> tuple[float, float]:
    begin = time.monotonic()
    reader.begin(len(prompt) + len(following))
    reader.read(prompt)
    middle = time.monotonic()
    reader.compare(following)
    return middle - begin, time.monotonic() - middle
