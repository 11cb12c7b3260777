"""The version of vllm-leank and the vLLM versions it works with: the one place that states either.

Only the standard library may be used here: `setup.py` runs this file, before anything is installed.
"""

__version__ = "0.1.0"

SUPPORTED_VLLM = ">=0.32.0,<0.34"
