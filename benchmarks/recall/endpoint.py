"""The recall model behind a running server."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import openai
from transformers import AutoTokenizer

from recall.tasks import TASKS, Sample


class EndpointError(Exception):
    """A server that cannot be asked, with what it said."""


class Endpoint:
    """Asks a server with OpenAI's completions API, several samples at a time.

    Its tokenizer must be the recall model's: prompts go as token ids, answers come as text.

    Args:
        url: where the API is, as `http://localhost:8000` or with `/v1`.
        tokenizer: directory of the recall model.
        model: the name it is served by (None: the first that the server lists).
        concurrency: requests that are under way at once.
        timeout: seconds that an answer may take.

    Raises:
        EndpointError: nobody answers there.
    """

    def __init__(
        self,
        url: str,
        tokenizer: str,
        model: str | None = None,
        concurrency: int = 16,
        timeout: float = 600,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.concurrency = concurrency
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._client = openai.OpenAI(base_url=self.url, api_key="none", timeout=timeout)
        try:
            self.model = model or next(iter(self._client.models.list())).id
        except (openai.OpenAIError, StopIteration) as error:
            raise EndpointError(f"{self.url}: {error or 'serves no model'}") from error

    def right(self, samples: Sequence[Sample]) -> list[bool]:
        """Which of the samples are answered without a mistake, greedily.

        Raises:
            EndpointError: the server refuses a request or does not answer.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._is_right, samples))

    def _is_right(self, sample: Sample) -> bool:
        try:
            completion = self._client.completions.create(
                model=self.model,
                prompt=sample.prompt_token_ids,
                max_tokens=TASKS[sample.task].answer_tokens,
                temperature=0,
            )
        except openai.OpenAIError as error:
            raise EndpointError(f"{self.url}: {error}") from error
        # The last token of an answer ends it: with another one there would be one more word.
        expected = self._tokenizer.decode(sample.answer_token_ids, skip_special_tokens=True)
        return completion.choices[0].text.split() == expected.split()
