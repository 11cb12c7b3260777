"""Ask a server that runs leank, with OpenAI's own client: nothing about leank shows here.

leank serve MODEL --bits 2
python examples/openai_client.py "Once upon a time" [http://localhost:8000]
"""

import sys

from openai import OpenAI


def main(prompt: str, url: str = "http://localhost:8000") -> str:
    """Print what the model writes after a prompt, as it comes, and return it."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = next(iter(client.models.list())).id
    text = ""
    for part in client.completions.create(
        model=model, prompt=prompt, max_tokens=32, temperature=0, stream=True
    ):
        piece = part.choices[0].text
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


if __name__ == "__main__":
    main(*sys.argv[1:])
