"""Text to padded arrays and back.

Every tokenizer here is a `transformers.PreTrainedTokenizerFast`, read from a folder's `tokenizer.json` as it
is: `AutoTokenizer` rebuilds the pre-tokenizer of some families and gives other ids. Nothing adds special
tokens; a template's text already holds those that are due.

n: texts.  T: columns.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
import json
import os
from typing import TYPE_CHECKING, Any, Iterable, Mapping, NamedTuple, Sequence
import warnings

import numpy as np

from jaxrl_fp16.folders import local_folder

if TYPE_CHECKING:  # importing it takes a second, and graders do without
    from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"

# What one tokenizer may cut otherwise than another: numbers, blanks, marks, letters beyond ASCII, LaTeX.
TELLING = ("The sum of 12 and 345 is 3,570.", "  don't\n\n\tif x:  y ", "\\boxed{\\frac{1}{2}} = 0.5; user: 1+2=3",
           "Zwölf Bären, 漢字 🙂")


class Prompts(NamedTuple):
    """Left-padded prompts."""

    tokens: np.ndarray     # int32 [n,T]; pad id before the prompt
    mask: np.ndarray       # bool [n,T]: real tokens
    kept: np.ndarray       # bool [n]: False where a prompt is set aside; its row is empty


class Completions(NamedTuple):
    """Right-padded prompts with their completions, for supervised training."""

    tokens: np.ndarray     # int32 [n,T]; prompt, completion, end-of-text, then pad id
    mask: np.ndarray       # bool [n,T]: real tokens
    loss_mask: np.ndarray  # bool [n,T]: completion and end-of-text
    kept: np.ndarray       # bool [n]: False where a pair is set aside; its row is empty


def _fast_class():
    """Transformers' class for a `tokenizer.json`."""
    # Where PyTorch is not installed its import would say so on stderr, which is for a refusal's one line.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def load_tokenizer(folder) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder, with its chat template from whichever file holds it.

    Raises `ValueError` without such a folder, a readable `tokenizer.json` or an end-of-text token, and where the
    longest text is no number.
    """
    folder = os.fspath(local_folder(folder, "tokenizer"))
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        raise ValueError(f"{folder}: no tokenizer.json; a folder with a fast tokenizer is needed")
    try:
        # Named here, for in Transformers 4 a path in tokenizer_config.json would take its place.
        tokenizer = _fast_class().from_pretrained(folder, tokenizer_file=path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise ValueError(f"{folder}: its tokenizer cannot be read: {error}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-text token; "
                         "tokenizer_config.json must name one as eos_token")
    length = tokenizer.model_max_length
    if not isinstance(length, (int, float)):
        raise ValueError(f"{folder}: tokenizer_config.json: model_max_length is {str(length)[:80]!r}; "
                         "allowed: a number")
    return tokenizer


def save_tokenizer(tokenizer, folder) -> None:
    """Writes a folder that `load_tokenizer` reads, and Transformers 4 and 5 alike."""
    tokenizer.save_pretrained(folder)
    path = os.path.join(folder, "tokenizer_config.json")
    if not os.path.isfile(path):  # not of Transformers' own tokenizers
        return
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    # Transformers 5 writes a class and a list that 4, and with it vLLM, cannot read; 5 reads the older names.
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, ensure_ascii=False)


def auto_difference(tokenizer, folder) -> str | None:
    """How Transformers' `AutoTokenizer` reads `folder`, a whole model's, otherwise than `tokenizer`, which was saved
    there; None where it gives the same ids."""
    texts = [*TELLING, "".join(tokenizer.all_special_tokens)]
    level, where = None, f"AutoTokenizer, and what serves models by it, reads {folder} otherwise"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoTokenizer, logging

            level = logging.get_verbosity()
            logging.set_verbosity(logging.CRITICAL)
            theirs = encode(AutoTokenizer.from_pretrained(folder, local_files_only=True), texts)
    except Exception as error:  # whatever a class of the library raises for files that are not its own
        return f"{where}: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
    finally:
        if level is not None:
            logging.set_verbosity(level)
    for text, own, other in zip(texts, encode(tokenizer, texts), theirs):
        if own != other:
            return (f"{where}: {text!r} is {other[:12]} there, {own[:12]} in training; "
                    "PreTrainedTokenizerFast.from_pretrained reads the trained ids")
    return None


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one id a character: `<pad>` 0, `<eos>` 1, `<unk>` 2, then the alphabet in its
    order."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"the alphabet is {alphabet!r}; different characters are needed, and at least one")
    pieces = [PAD, END, UNKNOWN, *alphabet]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()  # without a decoder the library puts a space between tokens
    return _fast_class()(tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
                         clean_up_tokenization_spaces=False)


def end_ids(tokenizer, generation_config: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None,
            names: Sequence[str] = ()) -> tuple[int, ...]:
    """The ids that end a response; the first one ends what is written for training.

    Those of the tokens `names`, where there are any; else the tokenizer's, then those of a folder's
    `generation_config.json` and `config.json`. Raises `ValueError` for a name that is no token, and where a
    file gives anything but ids.
    """
    if names:
        return tuple(dict.fromkeys(_token_id(tokenizer, name) for name in names))
    found = [tokenizer.eos_token_id]
    for file, settings in (("generation_config.json", generation_config), ("config.json", config)):
        given = (settings or {}).get("eos_token_id")
        more = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(each) is int and 0 <= each < 2**31 for each in more):
            raise ValueError(f"{file}: eos_token_id is {str(given)[:80]}; allowed: an id or a list of ids")
        found += more
    return tuple(dict.fromkeys(found))


def _token_id(tokenizer, name: str) -> int:
    known = tokenizer.get_vocab()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) or [tokenizer.eos_token]
        raise ValueError(f"{name!r} is no token of the tokenizer; allowed: the name of one, such as {near[0]!r}")
    return known[name]


def pad_id(tokenizer) -> int:
    """The id of empty columns: the pad token, or end-of-text, which masks tell from a real one."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_vocabulary(tokenizer, vocab_size: int) -> None:
    """Raises `ValueError` where the tokenizer has ids beyond a model's embedding."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise ValueError(f"the tokenizer has ids up to {needed - 1} and the model's embedding "
                         f"{vocab_size} rows: they do not belong together")


def vocabulary_size(tokenizer) -> int:
    """One more than the largest id, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without additions. Raises `ValueError` for one that is not Unicode."""
    if not len(texts):
        return []
    for text in texts:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"text {text[:40]!a} holds half of a surrogate pair; allowed: whole characters")
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False,
                     return_token_type_ids=False, verbose=False)["input_ids"]


@lru_cache(maxsize=4)
def begin_text(tokenizer) -> str:
    """The text of what the tokenizer itself puts before every text, such as `<s>`; "" where it puts nothing."""
    (bare,), whole = encode(tokenizer, ["a"]), tokenizer("a", verbose=False)["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start:start + len(bare)] == bare]
    ids = whole[:starts[0]] if starts else []
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
    return text if encode(tokenizer, [text]) == [ids] else ""


def encode_prompts(tokenizer, texts: Sequence[str], length: int) -> Prompts:
    """Prompts in `length` columns. One that is longer, or has no token, is set aside; none is cut."""
    rows = encode(tokenizer, texts)
    kept = np.array([0 < len(row) <= length for row in rows], bool)
    tokens = np.full((len(rows), length), pad_id(tokenizer), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for index in np.flatnonzero(kept):
        start = length - len(rows[index])
        tokens[index, start:], mask[index, start:] = rows[index], True
    return Prompts(tokens, mask, kept)


def encode_completions(tokenizer, prompts: Sequence[str], completions: Sequence[str], length: int,
                       ends: Sequence[int] | None = None) -> Completions:
    """Pairs in `length` columns. One that does not fit with its end is set aside; none is cut.

    Prompt and completion are encoded apart, as the sampler meets them: no token spans the two. A row ends once:
    with the first of `ends` (by default the tokenizer's end-of-text), or where the completion's text already does.
    """
    ends = end_ids(tokenizer) if ends is None else ends
    starts = encode(tokenizer, prompts)
    rows = [start + _ended(tokenizer, row, ends)
            for start, row in zip(starts, encode(tokenizer, completions), strict=True)]
    kept = np.array([len(start) > 0 and len(row) <= length for start, row in zip(starts, rows)], bool)
    tokens = np.full((len(rows), length), pad_id(tokenizer), np.int32)
    mask, loss_mask = np.zeros((2, len(rows), length), bool)
    for index in np.flatnonzero(kept):
        size = len(rows[index])
        tokens[index, :size], mask[index, :size] = rows[index], True
        loss_mask[index, len(starts[index]):size] = True
    return Completions(tokens, mask, loss_mask, kept)


def _ended(tokenizer, row: list[int], ends: Sequence[int]) -> list[int]:
    """`row` with the first of `ends`; or, where nothing but blanks follows an end of its own, up to that one."""
    size = len(row)
    while size and (row[size - 1] in ends or not tokenizer.decode(row[size - 1]).strip()):
        size -= 1
    own = next((at for at in range(size, len(row)) if row[at] in ends), None)
    return [*row, ends[0]] if own is None else row[:own + 1]


def decode_responses(tokenizer, tokens, response_mask, ends: Iterable[int] | None = None) -> list[str]:
    """The text of each row's response: tokens [n,T] where `response_mask` [n,T] is set.

    Ids of `ends` (by default the tokenizer's end-of-text) are dropped. Other special tokens stay in the text: an
    answer may follow one such as `</think>`, and a pad token inside the mask was sampled.
    """
    dropped = [*(end_ids(tokenizer) if ends is None else ends)]
    tokens = np.asarray(tokens)
    keep = np.asarray(response_mask).astype(bool) & ~np.isin(tokens, dropped)
    exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(row[kept].tolist(), **exact) for row, kept in zip(tokens, keep)]


def token_bytes(tokenizer, size: int | None = None) -> list[bytes]:
    """What each id adds to the text, in UTF-8 bytes; empty for ids without a token.

    Knows byte-level vocabularies (GPT-2's alphabet), SentencePiece's (`▁` and `<0xNN>`) and plain ones.
    `size` pads the list to a model's vocabulary, which may have more rows than the tokenizer has ids.
    """
    convert = _PIECES_TO_BYTES[_decoder_kind(tokenizer)]
    pieces = {index: convert(piece) for piece, index in tokenizer.get_vocab().items()}
    pieces |= {index: str(added).encode() for index, added in tokenizer.added_tokens_decoder.items()}
    return [pieces.get(index, b"") for index in range(max(size or 0, max(pieces) + 1))]


def _decoder_kind(tokenizer) -> str:
    decoder = tokenizer.backend_tokenizer.decoder
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    kinds = {part["type"] for part in [state, *state.get("decoders", ())] if "type" in part}
    if "ByteLevel" in kinds:
        return "byte level"
    return "sentencepiece" if kinds & {"ByteFallback", "Metaspace"} else "plain"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: Latin-1's visible ones for themselves, the others moved up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    if any(character not in _BYTE_OF for character in piece):
        return piece.encode()  # a token added as plain text
    return bytes(_BYTE_OF[character] for character in piece)


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


_PIECES_TO_BYTES = {"byte level": _byte_level, "sentencepiece": _sentencepiece, "plain": str.encode}
