"""Mask files: their format, how one is found for a model, composed, imported and drawn."""
