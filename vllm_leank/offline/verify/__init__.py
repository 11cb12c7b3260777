"""Whether a mask keeps a model's answers: what `leank verify` measures, judges and draws.

It runs in transformers, so it judges the mask and the archive's format, not the engine.
"""
