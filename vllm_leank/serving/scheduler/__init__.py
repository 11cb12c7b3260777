"""The scheduler's side: cache specs, and which request holds which blocks.

Specs are registered when this package is imported, since the scheduler's process first meets leank
when it unpickles one: nothing has checked the config there. States beside them are hooked for the
same reason.
"""

from vllm_leank.serving.scheduler.managers import ExactArchiveManager, ExactWindowManager
from vllm_leank.serving.scheduler.pruned_managers import PrunedArchiveManager, PrunedWindowManager
from vllm_leank.serving.scheduler.specs import (
    ArchiveSpec,
    PrunedArchiveSpec,
    PrunedWindowSpec,
    WindowSpec,
)
from vllm_leank.serving.vllm.cache_specs import register_spec
from vllm_leank.serving.vllm.states import hook_states

register_spec(ArchiveSpec, ExactArchiveManager)
register_spec(WindowSpec, ExactWindowManager)
register_spec(PrunedArchiveSpec, PrunedArchiveManager)
register_spec(PrunedWindowSpec, PrunedWindowManager)
hook_states()
