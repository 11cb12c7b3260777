"""Write the tokenizer: one token per word, words separated by spaces.

Run PYTHONPATH=benchmarks python -m recall.text benchmarks/recall/model
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from recall.vocab import BOS, EOS, PAD, tokens


def save_tokenizer(directory: str | Path, model_max_length: int) -> None:
    """Write a tokenizer that puts `<s>` first and whose `decode` is the inverse of `encode`.

    Both files are written here, and not by transformers, so that they load in its versions 4 and 5.
    """
    names = tokens()
    bos, eos, pad = names[BOS], names[EOS], names[PAD]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=pad))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (pad, bos, eos)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(directory, "tokenizer.json")))
    Path(directory, "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    save_tokenizer(sys.argv[1], model_max_length=32768)
