"""Learns masks by LeanK's two stages of distillation (arXiv 2508.02215).

Read `distillation.py` for the loss, `stages.py` for the two stages, `run.py` for a whole run.
"""
