"""A tokenizer for models' folders that have none, such as those of `shapes/`."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

FILES = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json"


def tokenizer_for(model: Path, folder: Path) -> Path:
    """The model's folder, if it has a tokenizer; else `folder`, in which one is written: a word for
    each token of the vocabulary, with spaces between, so that any text of n words has n tokens.
    """
    if any((model / name).is_file() for name in FILES):
        return model
    size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    words = {f"t{number}": number for number in range(size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "t0",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
