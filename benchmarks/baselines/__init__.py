"""Other ways to choose channels, to compare masks with. Quality only: none of them is served.

Each is bool `[L, H, D]` and prunes a share of `ratio`. Those that need no alignment have none: they
are as good as they can be.
"""
