"""What does not go together with sliding layers, or such that keep states, beside served ones: what
`leank plan` and `leank serve` have to know, as well as servers.
"""

from typing import Any

from vllm_leank.core.layers import count_state_layers, sliding_layers

STATES = "layers that keep states"
SLIDING = "sliding layers"

NO_PREFIX_CACHING = "--no-enable-prefix-caching"
"""The flag of `vllm serve` that models with `STATES` need."""


def other_layers(config: Any) -> str | None:
    """What other layers than those with full attention a decoder has, in words; None: none.

    Raises:
        UserError: the config contradicts itself.
    """
    if count_state_layers(config):
        return STATES
    return None if sliding_layers(config) is None else SLIDING


def refused_prefill(kind: str | None, prefill: str) -> str | None:
    """Why prompts are not read so beside layers of `kind`: a sentence part that says what to do;
    None where they are.
    """
    if kind is None or prefill != "pruned":
        return None
    return f'the option prefill "pruned" is for models without {kind}: leave it out'
