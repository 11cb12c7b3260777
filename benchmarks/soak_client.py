"""What `soak.py` asks of a server, and how two answers to one prompt differ."""

from dataclasses import dataclass
from typing import Any

import httpx
from server_metrics import metric

TOP = 5
"""Tokens whose log-probabilities are asked for, at each position."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: its token ids.
        logprobs: their log-probabilities.
        others: log-probabilities of the likeliest tokens at each position, by token id.
    """

    tokens: list[int]
    logprobs: list[float]
    others: list[dict[int, float]]


@dataclass(frozen=True)
class Difference:
    """How an answer differs from an earlier one.

    Attributes:
        drifts: differences of log-probabilities of the tokens before the first other one.
        gap: at the first other token, by how much the earlier run found its own more likely; where
            the other one was none of its `TOP`, at least so much. None if all tokens are equal.
    """

    drifts: list[float]
    gap: float | None

    @property
    def size(self) -> float:
        """The largest of all."""
        return max(self._all)

    @property
    def worst(self) -> int:
        """Index of the token where it is."""
        return self._all.index(self.size)

    @property
    def _all(self) -> list[float]:
        return [*self.drifts, self.gap or 0.0]


def compare(quiet: Answer, now: Answer) -> Difference:
    """How `now` differs from `quiet`, an answer to the same prompt and as long."""
    pairs = enumerate(zip(quiet.tokens, now.tokens, strict=True))
    first = next((at for at, (some, other) in pairs if some != other), None)
    before = zip(quiet.logprobs[:first], now.logprobs[:first], strict=True)
    drifts = [abs(some - other) for some, other in before]
    if first is None:
        return Difference(drifts, None)
    others = quiet.others[first]
    likely = others.get(now.tokens[first], min(others.values()))
    return Difference(drifts, max(quiet.logprobs[first] - likely, 0.0))


class Server:
    """A server that runs.

    Args:
        url: where it is.
        tokens_only: whether it takes and gives token ids alone.
    """

    def __init__(self, url: str, tokens_only: bool) -> None:
        self._tokens_only = tokens_only
        # Servers close connections that are idle for 5 seconds. A client that keeps them as long,
        # as httpx does, now and then sends a request just then, and reads an error.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
        self._client = httpx.AsyncClient(base_url=url, timeout=600, limits=limits)

    async def version(self) -> str:
        """Of its vLLM."""
        reply = (await self._client.get("/version")).raise_for_status()
        return str(reply.json()["version"])

    async def ready(self) -> str:
        """The name of its model."""
        models = (await self._client.get("/v1/models")).raise_for_status().json()
        return str(models["data"][0]["id"])

    async def generate(
        self,
        model: str,
        prompt: list[int],
        tokens: int,
        salt: str | None = None,
        top: bool = True,
    ) -> Answer:
        """Exactly `tokens` greedy tokens, with log-probabilities where `top` is set. Prefixes are
        shared among requests with the same salt.

        Raises:
            ValueError: the server refuses, or answers something else. Log-probabilities that are
                NaN are refused.
        """
        params: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        if top:
            params["logprobs"] = TOP
        body = {"model": model} | ({"cache_salt": salt} if salt else {})
        if self._tokens_only:
            path = "/inference/v1/generate"
            body |= {"token_ids": prompt, "sampling_params": params}
        else:
            path = "/v1/completions"
            ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
            body |= {"prompt": prompt} | ids | params
        reply = await self._client.post(path, json=body)
        if reply.is_error:
            raise ValueError(f"status {reply.status_code}: {reply.text[:300]}")
        choice = reply.json()["choices"][0]
        if len(choice["token_ids"]) != tokens:
            raise ValueError(f"{len(choice['token_ids'])} tokens instead of {tokens}")
        if not top:
            return Answer(choice["token_ids"], [], [])
        return (_from_ids if self._tokens_only else _from_text)(choice)

    async def metrics(self) -> str:
        """The text of `/metrics`."""
        return (await self._client.get("/metrics")).raise_for_status().text

    async def gauge(self, name: str) -> float | None:
        """The sum of a metric's samples; None where the server has no such metric."""
        return metric(await self.metrics(), name)


def _from_ids(choice: dict[str, Any]) -> Answer:
    content = choice["logprobs"]["content"]
    return Answer(
        choice["token_ids"],
        [one["logprob"] for one in content],
        [{top["token_id"]: top["logprob"] for top in one["top_logprobs"]} for one in content],
    )


def _from_text(choice: dict[str, Any]) -> Answer:
    """Of an endpoint whose tokens are called `token_id:17`."""
    given = choice["logprobs"]
    others = [
        {int(name.removeprefix("token_id:")): value for name, value in top.items()}
        for top in given["top_logprobs"]
    ]
    return Answer(choice["token_ids"], given["token_logprobs"], others)
