"""States of a prompt, for models with layers that keep such: what `Context` has of K and V.

A state stands for all tokens before, so it cannot be cut as K and V can: who wants to go back to a
shorter prompt copies the states first.
"""

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer


class _Layer(LinearAttentionAndFullAttentionLayer):
    """The state of one layer. K and V pass through, as hooks keep them."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        # Not written over the one before, through which gradients may go.
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


class States(Cache):
    """The states of a model's `num_layers` layers, in the form that transformers' models change in
    place; at first those of no token.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[_Layer() for _ in range(num_layers)])

    def copy(self) -> "States":
        """The same states, to be changed without changing these."""
        return copy.deepcopy(self)
