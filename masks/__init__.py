"""Mask files that come with the package, found by model id and geometry."""
