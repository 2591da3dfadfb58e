#!/usr/bin/env python3
"""Trains a byte-level BPE tokenizer on the texts of JSONL files and writes it as a Hugging Face folder.

It has Qwen2's special tokens and a chat template of its own, so that the prompts of `qwen_math`, `qwen3` and
`chat` work with it. The same data and size give the same file.

    python launch/train_tokenizer.py --data train.jsonl more.jsonl --vocab-size 4096 --out runs/tokenizer

For the template `r1_distill_qwen`:

    ... --special-token '<｜begin▁of▁sentence｜>' '<｜User｜>' '<｜Assistant｜>' '<think>' '</think>'
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import sys
from typing import Iterable, Iterator, Sequence

from jaxrl_fp16.tokenizer import save_tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Each message between its marks, the role on the first line; then the mark that asks for the answer.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '" + TURN_START + "' + message['role'] + '\n' + message['content'] + '" + TURN_END + "\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + TURN_START + "assistant\n' }}{%- endif -%}"
)


def texts_of(files: Iterable[str]) -> Iterator[str]:
    """Every text field of every row."""
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{file}, line {number}: a JSON object is needed")
                yield from (value for value in row.values() if isinstance(value, str))


def train_tokenizer(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()):
    """A `PreTrainedTokenizerFast` of at most `vocab_size` ids, the special ones last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = list(dict.fromkeys([END_OF_TEXT, TURN_START, TURN_END, *special_tokens]))
    bytes_alone = 256
    least = bytes_alone + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"--vocab-size is {vocab_size}; {bytes_alone} bytes and {len(special_tokens)} "
                         f"special tokens need {least} at least")
    backend = Tokenizer(models.BPE())
    # Digits one by one: a number then has one spelling, digit by digit, as in Qwen2.
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=TURN_END, pad_token=END_OF_TEXT,
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="JSONL; every text counts")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="ids, special ones too")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the tokenizer's files go")
    parser.add_argument("--special-token", nargs="+", default=[], metavar="TOKEN", help="more, never split")
    options = parser.parse_args(arguments)
    try:
        tokenizer = train_tokenizer(texts_of(options.data), options.vocab_size, options.special_token)
    except (OSError, ValueError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    Path(options.out).mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, options.out)
    print(f"{len(tokenizer)} ids in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
