"""Whether the Hugging Face hub can be reached, asked before its client tries for half a minute."""

import functools
import os
import socket
from urllib.parse import urlsplit

_SECONDS = 3

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")
"""Where one is set, only it can tell."""


@functools.cache
def work_offline_without_a_hub() -> None:
    """Let transformers look at what is cached only, where the hub does not answer: its own client
    would repeat each question for 31 seconds.
    """
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or any(os.environ.get(name) for name in PROXIES):
        return
    place = urlsplit(hub.ENDPOINT)
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        socket.create_connection((place.hostname or "", port), timeout=_SECONDS).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True
