"""Reads prompts as an engine does, and tells what the model expects next, dense and with leank.

Prompts are read with full attention (unless the window says that they are read pruned). What comes
after them is read token by token what the engine would compute: with far K and V as they are, and
as the engine's archive gives them back. What differs between the two is the doing of the mask and
the archive's format.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import transformers

from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.attention_hook import AttentionHook, hooked_attention
from vllm_leank.offline.context import (
    AfterContext,
    Context,
    Mark,
    hidden_states,
    logits,
    logits_after,
)
from vllm_leank.offline.divergence import Divergence, divergence
from vllm_leank.offline.selected_tokens import SelectedTokens
from vllm_leank.offline.served_archive import ServedArchive
from vllm_leank.offline.simulate import Archive, Select, SimulatedArchive

Tick = Callable[[float], None]


class Reader:
    """A prompt that grows by `read` and is made shorter by `cut`.

    What comes after it is asked for and leaves no trace: `dense` and `served` give logits,
    `compare` and `compare_layers` what differs.

    Attributes:
        model: computes, `chunk` tokens of a prompt at a time.
        window: which tokens are far, and how prompts are read.
        geometry: shape of the model's attention.
        archive: what far tokens are stored in.
        selected: which of them are read, where it is not all.
        tick: is told of tokens when they have been read.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        mask: Mask,
        window: Window,
        selection: Selection | None = None,
        *,
        chunk: int = 1024,
        tick: Tick | None = None,
    ):
        self.model = model
        self.window = window
        self.chunk = chunk
        self.geometry = mask.geometry
        self.archive = ServedArchive(mask)
        self.selected: Select | None = None
        if selection is not None:
            self.selected = SelectedTokens(self.archive, window.sink, selection)
        self.tick = tick
        self._dense = self._served = Context(mask.geometry)
        self._ways: list[tuple[Context, AttentionHook]] = [(self._dense, self._dense)]
        if not window.exact:
            self._served = Context(mask.geometry)
            pruned = SimulatedArchive(window, self.archive, self.archive.blind)
            self._ways.append((self._served, AfterContext(self._served, pruned)))

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self._dense.length

    def begin(self, room: int) -> None:
        """Start a prompt; with what comes after it, it will have about `room` tokens."""
        for context, _ in self._ways:
            context.begin(room)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> tuple[int, int]:
        """Let the prompt go on; the most likely tokens after it, dense and with leank.

        Raises:
            UserError: the model's attention is not what masks are for.
        """
        firsts = []
        for context, hook in self._ways:
            with hooked_attention(self.model, hook, context=context):
                for at in range(0, len(ids) - 1, self.chunk):
                    tokens = ids[at : min(at + self.chunk, len(ids) - 1)]
                    hidden_states(self.model, context, tokens)
                    self._advance(context, len(tokens))
                last = logits(self.model, context, ids[-1:])
                self._advance(context, 1)
            firsts.append(int(last.argmax(-1)))
        return firsts[0], firsts[-1]

    def _advance(self, context: Context, tokens: int) -> None:
        context.advance(tokens)
        if self.tick is not None:
            self.tick(tokens / len(self._ways))

    def mark(self) -> list[Mark]:
        """Where the prompt ends now, for `cut`."""
        return [context.mark() for context, _ in self._ways]

    def cut(self, marks: Sequence[Mark]) -> None:
        """Make the prompt as short as it was when `mark` was asked."""
        for (context, _), mark in zip(self._ways, marks, strict=True):
            context.cut(mark)

    @torch.inference_mode()
    def write(self, first: int, count: int) -> list[int]:
        """At most `count` tokens that the model writes after the prompt, dense and greedily.

        `first` is the first of them, as `read` gave it. The prompt stays as it is.
        """
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        written, end = [first], self._dense.mark()
        with hooked_attention(self.model, self._dense, context=self._dense):
            while len(written) < count and written[-1] not in ends:
                written.append(int(logits(self.model, self._dense, written[-1:]).argmax(-1)))
                self._dense.advance(1)
        self._dense.cut(end)
        return written

    @torch.inference_mode()
    def dense(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits `[T, vocabulary]` after each of the tokens that follow the prompt.

        It is the same computation as with an archive, so that nothing but that differs.
        """
        return self._after(self._dense, ids, _as_it_is)

    @torch.inference_mode()
    def served(self, ids: Sequence[int]) -> torch.Tensor:
        """The same with far tokens as the archive gives them back, those that are read."""
        return self._after(self._served, ids, self.archive, self.archive.blind, self.selected)

    def compare(self, ids: Sequence[int]) -> Divergence:
        """What the archive changes after each of the tokens that follow the prompt.

        Raises:
            UserError: logits are not finite.
        """
        return divergence(self.dense(ids), self.served(ids))

    @torch.inference_mode()
    def compare_layers(
        self, ids: Sequence[int], streaming: torch.Tensor | None = None
    ) -> Iterator[Divergence]:
        """What the archive changes in each layer alone, all others dense, one after the other.

        The prompt is the one that was read with full attention. Heads where `streaming` (bool
        `[L, H]`) see no far tokens either way, in all layers.
        """
        dense = self._after(self._dense, ids, _as_it_is, streaming)
        others = torch.zeros_like(self.archive.blind) if streaming is None else streaming
        for layer in range(len(self.archive.blind)):
            blind = others.clone()
            blind[layer] = self.archive.blind[layer]
            alone = self._only(layer), blind, self._selected_only(layer)
            yield divergence(dense, self._after(self._dense, ids, *alone))

    def _selected_only(self, chosen: int) -> Select | None:
        """What is read, of all far tokens of other layers."""
        selected = self.selected
        if selected is None:
            return None
        return lambda layer, query, key: selected(layer, query, key) if layer == chosen else None

    def _only(self, chosen: int) -> Archive:
        """The archive in one layer."""

        def archive(
            layer: int, first: int, key: torch.Tensor, value: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return (self.archive if layer == chosen else _as_it_is)(layer, first, key, value)

        return archive

    def _after(
        self,
        context: Context,
        ids: Sequence[int],
        archive: Archive,
        blind: torch.Tensor | None = None,
        selected: Select | None = None,
    ) -> torch.Tensor:
        hook = SimulatedArchive(self.window, archive, blind, selected)
        return logits_after(self.model, context, ids, hook)


def _as_it_is(
    layer: int, first: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return key, value
