"""Questions about real text that every machine has: source code, and documents.

`code`: which function of a file has a docstring. `document`: how a sentence goes on. Both have one
answer, which stands once in the text, far from its end. The texts are those that calibration does
not read.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.local_texts import Texts, library_sources, prose

ROOM = 128
"""Tokens for the question, what the chat template adds, and the answer."""

ANSWER = 48
"""Tokens that an answer may have."""

FAR = 0.85
"""Share of the text in which answers lie."""

BEGINNING, END = 8, 5
"""Words of a sentence that are given, and those that are asked for."""

Asked = tuple[str, str]
"""A question and its answer."""


def text_questions(
    checkpoint: Checkpoint, task: str, length: int, count: int, seed: int
) -> Iterator[tuple[str, str, int]]:
    """`count` questions of `task`, each with a text of its own: prompt in the chat template,
    answer, and tokens that an answer may have. Both have `length` tokens together at most.

    Raises:
        UserError: the machine has no such text, or it gives no questions.
    """
    documents, ask = TEXT_TASKS[task]
    texts = Texts(documents(), held_out=True)
    if not texts:
        raise UserError(f"{task}: this machine has no texts of the kind")
    rng = np.random.default_rng([seed, length])
    made, tries = 0, 0
    while made < count:
        tries += 1
        if tries > 20 * count:
            raise UserError(f"{task}: texts of {length} tokens give no questions here")
        text = _cut(checkpoint, texts.pieces(rng), length - ROOM - ANSWER)
        found = ask(text, int(FAR * len(text)))
        if not found:
            continue
        question, answer = found[rng.integers(len(found))]
        prompt = _chat(checkpoint, f"{text}\n\n{question}")
        if len(checkpoint.encode_rest(prompt)) + ANSWER <= length:
            made += 1
            yield prompt, answer, ANSWER


def _cut(checkpoint: Checkpoint, pieces: Iterator[str], tokens: int) -> str:
    """The pieces up to `tokens` tokens, without the line that is cut."""
    text, ids = "", []  # type: str, list[int]
    while len(ids) < tokens:
        before = len(text)
        while len(text) - before < 4 * (tokens - len(ids)) + 64:
            text += next(pieces)
        ids = checkpoint.encode_rest(text)
    return str(checkpoint.tokenizer.decode(ids[:tokens])).rpartition("\n")[0]


def _chat(checkpoint: Checkpoint, text: str) -> str:
    """A user's message as the model reads it."""
    if not checkpoint.tokenizer.chat_template:
        return text
    messages = [{"role": "user", "content": text}]
    return str(
        checkpoint.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    )


def ask_code(text: str, end: int) -> list[Asked]:
    """Functions in the text's first `end` characters, by the first lines of their docstrings. Both
    stand once in the text, and neither is within the other.
    """
    found = []
    for match in re.finditer(r'^ *def (\w+)\(.*?:\n *"""(.{24,100}?)(?:"""|\n)', text, re.M):
        name, line = match.group(1), match.group(2).strip()
        alone = len(re.findall(rf"\b{name}\b", text)) == 1 and text.count(line) == 1
        if match.end() < end and len(name) > 4 and alone and name.lower() not in line.lower():
            question = (
                f'Which function above has the docstring that begins with "{line}"? '
                "Answer with its name only."
            )
            found.append((question, name))
    return found


def ask_document(text: str, end: int) -> list[Asked]:
    """Sentences in the text's first `end` characters, by their first words, which stand once."""
    found = []
    for match in re.finditer(r"(?<=[.!?]\s)[A-Z][^.!?]{60,400}(?=[.!?]\s)", text[:end]):
        words = match.group().split()
        if len(words) < BEGINNING + END:
            continue
        given, asked = words[:BEGINNING], words[BEGINNING : BEGINNING + END]
        pattern = r"\s+".join(map(re.escape, given))
        plain = all(re.fullmatch(r"[\w',;()-]+", word) for word in words[: BEGINNING + END])
        if plain and len(re.findall(pattern, text)) == 1:
            question = (
                f'A sentence above begins with "{" ".join(given)}". '
                f"Which {END} words come next? Answer with these words only."
            )
            found.append((question, " ".join(asked)))
    return found


TEXT_TASKS: dict[str, tuple[Callable, Callable[[str, int], list[Asked]]]] = {
    "code": (library_sources, ask_code),
    "document": (prose, ask_document),
}
"""By name: the documents, and what makes questions and answers of a text."""
