"""Inputs that are wrong in some way: masks, options, prompts and requests."""

import json
import random
import string

KEYS = (
    "format", "model", "geometry", "align", "window", "provenance", "layers", "num_layers", "sink",
    "recent", "head_dim", "num_kv_heads", "rope_theta", "rope_scaling", "method", "evaluation",
    "profiles", "k", "v", "k_mean", "v_scale",
)  # fmt: skip
VALUES = (
    "", "null", "~", "true", "-1", "0", "1e400", ".nan", ".inf", "0x10", "1_0", "'", '"', "[", "{",
    "[]", "{}", "[[[[", "- - -", "&a [*a]", "*b", "!!python/object/apply:os.system ['true']", "|",
    "2026-11-23", "\u2028", "\x00", "\t", "99999999999999999999", "ffff", "0" * 64, "---", "...",
    "0x" + "9" * 9999, "9" * 9999, "1" + ":2" * 9999, "f" * 128,
)  # fmt: skip


def masks(text, count, seed=0):
    """Texts like a mask file's, each with a few places changed."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = text
        for _ in range(rng.randint(1, 3)):
            changed = rng.choice(MUTATIONS)(changed, rng)
        yield changed


def _cut(text, rng):
    first, last = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return text[:first] + text[last:]


def _flip(text, rng):
    at = rng.randrange(max(len(text), 1))
    return text[:at] + chr(rng.choice((rng.randrange(128), 0xFEFF, 0xD7FF))) + text[at + 1 :]


def _value(text, rng):
    """Another value behind some colon."""
    colons = [at for at, letter in enumerate(text) if letter == ":"]
    if not colons:
        return text
    at = rng.choice(colons)
    end = min((text + "\n").index("\n", at), at + rng.randint(1, 40))
    return f"{text[:at]}: {rng.choice(VALUES)}{text[end:]}"


def _key(text, rng):
    return text.replace(rng.choice(KEYS), rng.choice(KEYS + VALUES), 1)


def _lines(text, rng):
    lines = text.splitlines(keepends=True)
    rng.shuffle(lines) if rng.random() < 0.3 else lines.extend(rng.sample(lines, len(lines) // 2))
    return "".join(lines)


def _digit(text, rng):
    return text.replace(rng.choice("0123456789abcdef"), rng.choice(string.printable), 1)


MUTATIONS = (_cut, _flip, _value, _key, _lines, _digit)


def large_masks(size):
    """Texts of so many characters, each of one thing that a reader may be slow or greedy at."""
    pieces = (
        "[", "{", "{a: ", "- ", "- 1\n", "- a\n", "a", "1", "1_", "9.", ":2", "#", "'", "? ", "&a ",
        "---\n", "\t", " ", "\n", "|\n a\n", "\\x41", "'f',", "<<: *a\n", "!!set ", "\u2028",
    )  # fmt: skip
    for piece in pieces:
        for start in ("", "format: leank-mask/2\nlayers:\n- ["):
            yield start + piece * ((size - len(start)) // len(piece.encode()))
    yield "".join(f"k{number}: 1\n" for number in range(size // 12))


def prompts(count, seed=0):
    """Prompts files, as bytes, in which at least one line is wrong."""
    rng = random.Random(seed)
    good = json.dumps({"prompt_token_ids": [5, 6, 7], "answer_token_ids": [8]})
    text = json.dumps({"prompt": "one two three", "answer": "four"})
    wrong = (
        "{}", "[]", "null", "1", '"a"', "{", "[" * 9999, '{"a":' * 9999, "9" * 9999, "-", "nan",
        '{"prompt_token_ids": []}', '{"prompt_token_ids": [1.5]}', '{"prompt_token_ids": [-1]}',
        '{"prompt_token_ids": [true]}', '{"prompt_token_ids": "5"}', '{"prompt_token_ids": {}}',
        '{"prompt_token_ids": [[5]]}', '{"prompt_token_ids": [NaN]}', '{"prompt_token_ids": null}',
        '{"prompt_token_ids": [%s]}' % ("9" * 4000), '{"prompt_token_ids": [%s]}' % ("9" * 9999),
        '{"prompt_token_ids": [1e999]}', '{"prompt": ""}', '{"prompt": 5}', '{"prompt": null}',
        '{"prompt": ["a"]}', '{"prompt": "\\ud800"}', '{"prompt": "a", "prompt_token_ids": [5]}',
        '{"Prompt": "a"}', '{"prompt": "a"', "\x00", "\ufeff" + good, "prompt: a",
        '{"answer": "a"}',
    )  # fmt: skip
    for _ in range(count):
        lines = [rng.choice((good, text, "")) for _ in range(rng.randrange(4))]
        lines.insert(rng.randint(0, len(lines)), rng.choice(wrong))
        data = rng.choice(("\n", "\r\n")).join(lines).encode()
        if rng.random() < 0.2:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([rng.choice((0xFF, 0xC0, 0x80))]) + data[at:]
        yield data


def options(count, seed=0):
    """What may stand for leank's options in a config."""
    rng = random.Random(seed)

    def value(depth=0):
        kind = rng.randrange(9 if depth < 3 else 6)
        return (
            None, rng.random() < 0.5, rng.randint(-(1 << 40), 1 << 40), rng.uniform(-1e3, 1e3),
            rng.choice(VALUES), "".join(rng.choices(string.printable, k=rng.randrange(9))),
            *([value(depth + 1)] if kind == 6 else [None]),
            *([[value(depth + 1) for _ in range(2)]] if kind == 7 else [None]),
            *([{rng.choice(KEYS): value(depth + 1)}] if kind == 8 else [None]),
        )[kind]  # fmt: skip

    names = ("mask", "sink", "recent", "archive_dtype", "prefill", "Sink", "ratio", "", "mask ")
    for _ in range(count):
        if rng.random() < 0.15:
            yield value()
        else:
            chosen = rng.choices(names, k=rng.randint(1, 3))
            yield {name: value() for name in chosen}


def requests(count, model, max_model_len, vocabulary, seed=0):
    """Bodies for `/v1/completions`, as bytes; every one is to be refused."""
    rng = random.Random(seed)
    good = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4}
    wrong = [
        {"prompt": []}, {"prompt": ""}, {"prompt": [[]]}, {"prompt": [-1]}, {"prompt": [1.5]},
        {"prompt": {"a": 1}}, {"prompt": None}, {"prompt": [vocabulary]}, {"prompt": ["a", 1]},
        {"prompt": [5] * max_model_len}, {"prompt": [5] * (4 * max_model_len)},
        {"prompt": [1 << 40]}, {"max_tokens": -1}, {"max_tokens": "many"}, {"n": 0}, {"n": -3},
        {"max_tokens": 1.5}, {"temperature": -1}, {"temperature": "hot"}, {"top_p": 0},
        {"top_p": 2}, {"top_k": -7}, {"logprobs": 10_000}, {"prompt_logprobs": -9},
        {"model": "nobody"}, {"model": 3}, {"stop": [""]}, {"stop": {"a": 1}}, {"seed": "x"},
        {"stream_options": {"include_usage": True}}, {"min_tokens": 50},
        {"frequency_penalty": 9}, {"presence_penalty": -9}, {"repetition_penalty": 0},
        {"logit_bias": {"x": 1}}, {"allowed_token_ids": [vocabulary + 1]},
        {"allowed_token_ids": []}, {"min_p": 2}, {"cache_salt": ""}, {"cache_salt": 7},
        {"response_format": {"type": "nothing"}}, {"echo": "x"}, {"truncate_prompt_tokens": -9},
    ]  # fmt: skip
    yield from (json.dumps(good | change).encode() for change in wrong)
    text = json.dumps(good).encode()
    for _ in range(count - len(wrong)):
        if rng.random() < 0.5:
            yield json.dumps(good | rng.choice(wrong) | rng.choice(wrong)).encode()
        else:
            yield text[: rng.randrange(len(text))] + bytes(rng.choices(range(32, 256), k=3))
