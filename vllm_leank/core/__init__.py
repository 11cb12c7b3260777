"""What all other rooms build on: the window rule, geometry, archive formats, pages, plan, capacity.

Imports numpy and pydantic at most, so that `leank plan` starts at once.
"""
