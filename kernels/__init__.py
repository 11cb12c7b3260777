"""Attention and cache kernels over leank pages, each beside a plain PyTorch reference."""
