"""What choices of far tokens make of one text, and of one answer, in transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from baselines.far_tokens import FarTokens, Store
from baselines.selected_reading import Choice, SelectedReading, Together

from real.greedy import before_stop
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.selection import DENSE_LAYERS
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.attention_hook import AttentionHook, hooked_attention
from vllm_leank.offline.context import Context, logits_after, read_prompt
from vllm_leank.offline.divergence import divergence
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.simulate import SimulatedArchive

CHUNK = 4096
"""Tokens of a prompt that are computed at once."""

SCORES = 1 << 28
"""Attention scores in memory at once, 1 GiB, several times."""

Name = str
"""What a row of the table is called: how far tokens are stored, and how they are chosen."""


def row_name(stored: str, choice: str) -> Name:
    """Of far tokens that are stored and chosen so."""
    return f"{stored}, {choice}"


@dataclass
class Simulated:
    """A model that continues prompts with every choice, over far tokens stored in several ways.

    Args:
        model: with full attention in all layers.
        window: which tokens are far.
        stores: how far tokens are stored, by name.
        choices: how they are chosen, by name.
        seed: of choices by chance.

    Raises:
        UserError: the model has other layers, or none that select.
    """

    model: transformers.PreTrainedModel
    window: Window
    stores: Mapping[str, Store]
    choices: Mapping[str, Choice]
    seed: int = 0
    _context: Context = field(init=False)

    def __post_init__(self) -> None:
        geometry = Geometry.from_hf_config(self.model.config)
        if len(geometry.layers) < geometry.num_layers:
            raise UserError("the model has sliding layers, with which rows are not read at once")
        if geometry.num_layers <= DENSE_LAYERS:
            raise UserError(
                f"the model has {geometry.num_layers} layers, and the first {DENSE_LAYERS} read all"
            )
        self._context = Context(geometry)

    @torch.inference_mode()
    def judge(self, sample: Sample) -> dict[Name, dict[str, Any]]:
        """What rows do to the answer of a text, token by token: `kl` in nats and equal most likely
        tokens `agree`, both summed over its tokens; of full attention's weights the mean share
        `found` of what far tokens have, and the weights `lost` (0 to 1), over tokens, layers that
        select and heads.
        """
        context = self._context
        read_prompt(self.model, context, sample.prompt, CHUNK)
        expected = logits_after(self.model, context, sample.answer, self._dense)
        heads = self.model.config.get_text_config().num_attention_heads
        scores = heads * len(sample.answer) * (context.length + len(sample.answer))
        together = max(1, SCORES // scores)
        rows: dict[Name, dict[str, Any]] = {}
        names = list(self.choices)
        for stored, store in self.stores.items():
            far = FarTokens(context, self.window.sink, store)
            for first in range(0, len(names), together):
                some = names[first : first + together]
                choices = [self.choices[name] for name in some]
                hook = SelectedReading(context, self.window, far, choices, self.seed)
                ids = torch.tensor([sample.answer] * len(some), device=self.model.device)
                with hooked_attention(self.model, hook, context=context):
                    found = self._logits(ids, 0)
                means = hook.found.means()
                for name, logits, (share, lost) in zip(some, found, means, strict=True):
                    one = divergence(expected, logits)
                    rows[row_name(stored, name)] = {
                        "kl": round(one.total, 6),
                        "agree": one.agree,
                        "found": round(share, 5),
                        "lost": round(lost, 6),
                    }
        return rows

    @torch.inference_mode()
    def answer(
        self, prompt: Sequence[int], max_tokens: int, stop: Sequence[int]
    ) -> dict[Name, list[int]]:
        """Greedy answers of all rows, decoded together, up to the first token of `stop`.

        Raises:
            UserError: answers are longer than the window.
        """
        if max_tokens > self.window.recent:
            raise UserError(
                f"an answer of {max_tokens} tokens does not fit into the last "
                f"{self.window.recent}, which stay dense; give a larger --recent"
            )
        context = self._context
        read_prompt(self.model, context, prompt[:-1], CHUNK)
        # The prompt's last token reads everything, so the first of the answer is the same in all.
        first = logits_after(self.model, context, prompt[-1:], self._dense)
        context.advance(1)
        hooks = [
            SelectedReading(
                context,
                self.window,
                FarTokens(context, self.window.sink, store),
                list(self.choices.values()),
                self.seed,
            )
            for store in self.stores.values()
        ]
        names = [row_name(stored, choice) for stored in self.stores for choice in self.choices]
        ends = torch.tensor(stop, dtype=torch.int64, device=self.model.device)
        tokens = [first[-1].argmax().repeat(len(names))]
        done = torch.isin(tokens[0], ends)
        with hooked_attention(self.model, Together(hooks), context=context):
            while len(tokens) < max_tokens and not done.all():
                logits = self._logits(tokens[-1][:, None], len(tokens) - 1)
                tokens.append(logits[:, -1].argmax(-1))
                done |= torch.isin(tokens[-1], ends)
        answers = torch.stack(tokens, 1).tolist()
        return {name: before_stop(ids, stop) for name, ids in zip(names, answers, strict=True)}

    @property
    def _dense(self) -> AttentionHook:
        return SimulatedArchive(self.window)

    def _logits(self, ids: torch.Tensor, behind: int) -> torch.Tensor:
        """Logits `[rows, T, vocabulary]` of tokens `[rows, T]` that stand so many tokens behind
        the prompt's end.
        """
        first = self._context.length + behind
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)
        logits: torch.Tensor = self.model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).logits
        return logits
