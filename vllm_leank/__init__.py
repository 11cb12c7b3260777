"""Smaller KV caches for vLLM: far tokens keep the bits of each channel that matter.

vLLM finds the plugin through the entry point `vllm_leank.serving.plugin:register`. This module
stays light, because every process that loads vLLM's plugins imports it.
"""

from vllm_leank.version import __version__

__all__ = ["__version__"]
