"""What a server says of itself in `/metrics`."""

from prometheus_client.parser import text_string_to_metric_families

RUNNING, USAGE = "vllm:num_requests_running", "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
ASKED, FOUND = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
"""Tokens of prompts, and how many of them were found in the prefix cache."""


def metric(text: str, name: str) -> float | None:
    """The sum of a metric's samples in the text of `/metrics`; None where it is not there."""
    samples = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]
    return sum(samples) if samples else None
