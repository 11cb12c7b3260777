"""Attention over window and archive pages: store, compact, attend.

`reference` is plain PyTorch in fp32: the truth that other kernels are tested against, and what
serves on CPU. Kernels know the cache layout and the window rule, but neither vLLM nor the plugin.
"""
