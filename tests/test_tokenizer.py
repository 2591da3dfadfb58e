"""Tokenizers from folders, from an alphabet and from the training script; text to arrays and back."""

import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxrl_fp16 import tokenizer as tk
from jaxrl_fp16.tasks import ALPHABET, Example, get_template, render

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("JAXRL_FP16_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder {DATA}; JAXRL_FP16_DATA names one")
R1_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
TEXTS = ["The sum of 12 and 345 is 357.", "Zwölf Bären, 3 € — 漢字 🙂\n\n\tx  y ",
         "\\frac{1}{2} \\boxed{}", ""]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "launch" / "train_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    """A byte-level tokenizer trained on a few texts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rows = (json.dumps({"text": text, "n": 1}) for text in TEXTS * 3)
    (folder / "data.jsonl").write_text("\n".join(rows))
    assert script.main(["--data", str(folder / "data.jsonl"), "--vocab-size", "300", "--out", str(folder),
                        "--special-token", *R1_TOKENS]) == 0
    return folder


@pytest.fixture(scope="module")
def byte_level(folder):
    return tk.load_tokenizer(folder)


def test_characters_round_trip_through_transformers(tmp_path):
    text = "(12+3)%9=15,6 \nz"
    tokenizer = tk.character_tokenizer(ALPHABET + " \nz")
    tk.save_tokenizer(tokenizer, tmp_path)
    again = tk.load_tokenizer(tmp_path)
    ids = tk.encode(tokenizer, [text])[0]
    assert len(ids) == len(text) and tk.encode(again, [text])[0] == ids
    assert again.decode(ids) == tokenizer.decode(ids) == text
    assert (again.pad_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2)
    assert tk.vocabulary_size(again) == 3 + len(ALPHABET) + 3
    assert tk.encode(again, ["1é2"])[0][1] == again.unk_token_id
    assert b"".join(tk.token_bytes(again)[index] for index in ids) == text.encode()


def test_nothing_is_said_where_there_is_no_pytorch():
    code = """if True:
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *package: None if name == "torch" else find(name, *package)
        from jaxrl_fp16.tokenizer import character_tokenizer
        character_tokenizer("ab")
        from transformers.utils import is_torch_available
        assert not is_torch_available()
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_auto_tokenizer_reads_otherwise_is_said(tmp_path):
    """Under a config.json of Qwen2's, Transformers 5 puts Qwen2's way of cutting text in the file's own place."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(tk.TELLING * 4, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tk.save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert tk.auto_difference(tokenizer, tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    differ = any(tk.encode(tokenizer, [text]) != tk.encode(theirs, [text]) for text in tk.TELLING)
    said = tk.auto_difference(tokenizer, tmp_path)
    assert differ == (said is not None)
    if said:
        assert f"reads {tmp_path} otherwise: 'The sum of 12 and" in said and "\n" not in said
    (tmp_path / "tokenizer.json").write_text("{}")
    assert f"reads {tmp_path} otherwise: " in tk.auto_difference(tokenizer, tmp_path)


@pytest.mark.parametrize("alphabet", ["", "aa"])
def test_a_bad_alphabet_is_refused(alphabet):
    with pytest.raises(ValueError, match="different characters"):
        tk.character_tokenizer(alphabet)


def test_byte_level_round_trip(byte_level):
    rows = tk.encode(byte_level, TEXTS)
    assert [byte_level.decode(row) for row in rows] == TEXTS and rows[-1] == []
    pieces = tk.token_bytes(byte_level)
    assert [b"".join(pieces[index] for index in row).decode() for row in rows] == TEXTS
    padded = tk.token_bytes(byte_level, size=512)
    assert len(padded) == 512 and padded[:300] == pieces and padded[-1] == b""
    special = byte_level.convert_tokens_to_ids("</think>")
    assert pieces[special] == b"</think>" and tk.encode(byte_level, ["</think>"]) == [[special]]


def test_the_folder_is_what_transformers_of_both_generations_read(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and not config.get("extra_special_tokens")
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")


def test_the_same_data_give_the_same_tokenizer(script, folder, tmp_path):
    script.main(["--data", str(folder / "data.jsonl"), "--vocab-size", "300", "--out", str(tmp_path),
                 "--special-token", *R1_TOKENS])
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("lines, size, message", [
    ('{"a": "b"}', 100, "--vocab-size is 100"), ("{", 300, "line 1: not JSON"), ("[]", 300, "a JSON object")])
def test_the_script_refuses_bad_input(script, tmp_path, capsys, lines, size, message):
    (tmp_path / "data.jsonl").write_text(lines)
    data, out = str(tmp_path / "data.jsonl"), tmp_path / "out"
    assert script.main(["--data", data, "--vocab-size", str(size), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


@needs_data
def test_training_on_real_problems(script, tmp_path):
    script.main(["--data", str(DATA / "math500.jsonl"), "--vocab-size", "1000", "--out", str(tmp_path)])
    tokenizer = tk.load_tokenizer(tmp_path)
    with open(DATA / "minerva.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["problem"] for line in lines]
    rows = tk.encode(tokenizer, texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert tk.vocabulary_size(tokenizer) == 1000 and sum(map(len, rows)) < 0.6 * sum(map(len, texts))


@pytest.mark.parametrize("where", ["jinja", "config"])
def test_chat_template_from_either_file(byte_level, tmp_path, where):
    tk.save_tokenizer(byte_level, tmp_path)
    if where == "config":
        jinja = tmp_path / "chat_template.jinja"
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": jinja.read_text()}))
        jinja.unlink()
    tokenizer = tk.load_tokenizer(tmp_path)
    prompt = render(get_template("chat", system="Be brief."), Example("1+1? {x}", "2"), tokenizer)
    assert prompt == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1? {x}<|im_end|>\n"
                      "<|im_start|>assistant\n")
    marks = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    found = [index for index in tk.encode(tokenizer, [prompt])[0] if index in marks]
    assert found == [*marks, *marks, marks[0]]


def test_faulty_folders_are_refused(byte_level, tmp_path):
    with pytest.raises(ValueError, match="tokenizer folder a/b does not exist; .*`hf download a/b --local-dir"):
        tk.load_tokenizer("a/b")
    with pytest.raises(ValueError, match="no tokenizer.json"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        tk.load_tokenizer(tmp_path)
    tk.save_tokenizer(byte_level, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)  # where Transformers 4 says it once more
    with pytest.raises(ValueError, match="no end-of-text token"):
        tk.load_tokenizer(tmp_path)


def test_ids_of_ends_and_padding(byte_level):
    end = byte_level.eos_token_id
    assert tk.end_ids(byte_level) == tk.end_ids(byte_level, {}) == (end,)
    assert tk.end_ids(byte_level, {"eos_token_id": 7}) == (end, 7)
    assert tk.end_ids(byte_level, {"eos_token_id": [7, end, 8]}) == (end, 7, 8)
    assert tk.end_ids(byte_level, None, {"eos_token_id": [8, 7]}) == (end, 8, 7)
    assert tk.end_ids(byte_level, {"eos_token_id": 7}, {"eos_token_id": [8, end, 7]}) == (end, 7, 8)
    for file, settings in (("generation_config.json", ({"eos_token_id": "7"},)), ("config.json", (None, {
            "eos_token_id": [7, True]}))):
        with pytest.raises(ValueError, match=f"^{file}: eos_token_id is .*; allowed: an id or a list of ids"):
            tk.end_ids(byte_level, *settings)
    assert tk.pad_id(byte_level) == byte_level.pad_token_id != end
    without = tk.character_tokenizer("ab")
    without.pad_token = None
    assert tk.pad_id(without) == without.eos_token_id


def test_ends_by_name(byte_level):
    marks = tk.encode(byte_level, ["</think><|im_end|>"])[0]
    given = {"eos_token_id": 7}
    assert tk.end_ids(byte_level, given, given, names=["</think>", "<|im_end|>", "</think>"]) == tuple(marks)
    with pytest.raises(ValueError, match=r"'<\|im_ends\|>' is no token of the tokenizer; .*such as '<\|im_end\|>'"):
        tk.end_ids(byte_level, names=["</think>", "<|im_ends|>"])


def test_the_vocabulary_must_fit_the_embedding(byte_level):
    tk.check_vocabulary(byte_level, tk.vocabulary_size(byte_level))
    with pytest.raises(ValueError, match="ids up to 299.*255 rows"):
        tk.check_vocabulary(byte_level, 255)


def test_encode_prompts():
    tokenizer = tk.character_tokenizer("123+=")
    tokens, mask, kept = tk.encode_prompts(tokenizer, ["1+2=", "11+22=", "", "3="], 4)
    assert tokens.dtype == np.int32 and mask.dtype == kept.dtype == bool
    np.testing.assert_array_equal(kept, [True, False, False, True])
    np.testing.assert_array_equal(tokens, [[3, 6, 4, 7], [0] * 4, [0] * 4, [0, 0, 5, 7]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [0] * 4, [0] * 4, [0, 0, 1, 1]])
    assert tk.encode_prompts(tokenizer, [], 4).tokens.shape == (0, 4)


def test_encode_pairs():
    tokenizer = tk.character_tokenizer("123+=")
    pairs = tk.encode_completions(tokenizer, ["1+2=", "1+1=", "1="], ["3", "22", ""], 6)
    np.testing.assert_array_equal(pairs.kept, [True, False, True])
    np.testing.assert_array_equal(pairs.tokens, [[3, 6, 4, 7, 5, 1], [0] * 6, [3, 7, 1, 0, 0, 0]])
    np.testing.assert_array_equal(pairs.mask, [[1] * 6, [0] * 6, [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(pairs.loss_mask, [[0, 0, 0, 0, 1, 1], [0] * 6, [0, 0, 1, 0, 0, 0]])
    assert tk.encode_completions(tokenizer, ["1"], ["2"], 3).kept.all()


@pytest.mark.parametrize("text, ends, written", [
    ("4", None, "4<|im_end|>"),
    ("4<|im_end|>", None, "4<|im_end|>"),
    ("4<|im_end|>\n", None, "4<|im_end|>"),
    ("4 \n<|im_end|>\n<|im_end|><|endoftext|>", ["<|im_end|>", "<|endoftext|>"], "4 \n<|im_end|>"),
    ("4<|endoftext|>", ["<|im_end|>", "<|endoftext|>"], "4<|endoftext|>"),
    ("4", ["<|endoftext|>", "<|im_end|>"], "4<|endoftext|>"),
    ("4<|im_end|>", ["<|endoftext|>"], "4<|im_end|><|endoftext|>"),
    ("4<|im_end|>\nno, 5<|im_end|>", None, "4<|im_end|>\nno, 5<|im_end|>"),
    ("4<|im_end|>\nno, 5\n", None, "4<|im_end|>\nno, 5\n<|im_end|>"),
    ("\n", None, "\n<|im_end|>"),
    ("<|im_end|>", None, "<|im_end|>"),
])
def test_a_row_ends_once(byte_level, text, ends, written):
    ids = None if ends is None else tk.end_ids(byte_level, names=ends)
    row = tk.encode_completions(byte_level, ["2+2="], [text], 32, ids)
    assert byte_level.decode(row.tokens[0][row.loss_mask[0]]) == written
    assert (row.mask[0] == row.loss_mask[0])[len(tk.encode(byte_level, ["2+2="])[0]):].all()


def test_decode_responses(byte_level):
    text = "so </think> \\boxed{ 3 } , 漢"
    row = tk.encode(byte_level, [text])[0]
    tokens = np.array([[5, *row, byte_level.eos_token_id, byte_level.pad_token_id],
                       [5] + [byte_level.pad_token_id] * (len(row) + 2)])
    mask = np.zeros(tokens.shape, bool)
    mask[0, 1:-1] = True
    assert tk.decode_responses(byte_level, tokens, mask) == [text, ""]
    assert tk.decode_responses(byte_level, tokens, mask, ends=[row[-1], byte_level.eos_token_id])[0] == (
        byte_level.decode([index for index in row if index != row[-1]]))


def test_a_pad_token_that_was_sampled_stays_in_the_text():
    tokenizer = tk.character_tokenizer("12")
    tokens, mask = np.array([[3, 0, 4, 1, 0], [3, 0, 0, 0, 0]]), np.array([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]], bool)
    assert tk.decode_responses(tokenizer, tokens, mask) == ["1<pad>2", "1"]
    tokenizer.pad_token = None  # end-of-text then fills up, and ends
    assert tk.decode_responses(tokenizer, np.array([[3, 4, 1, 1]]), mask[:1, 1:]) == ["12"]


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match=r"text '1\\ud800' holds half of a surrogate pair; allowed: whole characters"):
        tk.encode(tk.character_tokenizer("12"), ["1", "1\ud800"])


def test_sentencepiece_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "▁the", "<0xE2>", "<0x0A>", "é", "<0x>"]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert tk.token_bytes(tokenizer) == [b"<unk>", b"</s>", b" the", b"\xe2", b"\n", "é".encode(), b"<0x>"]
