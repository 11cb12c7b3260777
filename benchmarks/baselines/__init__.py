"""What masks and archives are compared with. Quality only: none of it is served.

Other ways to choose channels, each bool `[L, H, D]`, prune a share of `ratio`; those that need no
alignment have none: they are as good as they can be. Other caches (`rounded_cache.py`) give back
every number as they round it.
"""
