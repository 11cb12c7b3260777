"""The scheduler's side: cache specs, and which request holds which blocks.

Specs are registered when this package is imported, since the scheduler's process first meets leank
when it unpickles one.
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

register_spec(ArchiveSpec, ExactArchiveManager)
register_spec(WindowSpec, ExactWindowManager)
register_spec(PrunedArchiveSpec, PrunedArchiveManager)
register_spec(PrunedWindowSpec, PrunedWindowManager)
