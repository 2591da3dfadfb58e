"""Rollouts that other engines write: the format as it is documented, every way to be wrong, and the script for it."""

import ast
import gzip
import importlib.util
import json
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace
import warnings

import jax
import numpy as np
import pytest

import jaxrl_fp16 as rl
from jaxrl_fp16.lab.mismatch.engine_files import load_rollout_file
from jaxrl_fp16.lab.mismatch.rollout_files import labelled, load_rollout, save_rollout
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.tokenizer import character_tokenizer

ROOT = Path(__file__).resolve().parents[3]
PRECISIONS = [get_precision("fp16"), get_precision("bf16")]
HEAD = {"format": "jaxrl_fp16 engine rollouts 1", "engine": "sglang", "version": "0.5", "dtype": "bfloat16",
        "temperature": 0.7, "vocab_size": 20, "model": "small"}
ROWS = [
    {"prompt": [3, 4, 5], "response": [7, 1], "logprobs": [-0.5, -2], "finished": True},
    {"prompt": [6], "response": [8, 9, 10], "logprobs": [-0.25, 0.0, -1e-9]},
]


def load_script():
    spec = importlib.util.spec_from_file_location("write_rollouts", ROOT / "launch" / "write_rollouts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def written(path, *objects):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in objects))
    return path


def test_a_file_becomes_a_rollout(tmp_path):
    found = load_rollout_file(written(tmp_path / "a.jsonl", HEAD, *ROWS), PRECISIONS)
    assert (found.engine, found.version, found.precision, found.temperature) == ("sglang", "0.5", "bf16", 0.7)
    assert found.vocab_size == 20 and found.finished.tolist() == [True, False]
    assert found.tokens.tolist() == [[3, 4, 5, 7, 1, 0], [0, 0, 6, 8, 9, 10]]
    assert found.mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert found.response_mask.tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(found.logprobs, np.float32([[0, 0, 0, -0.5, -2, 0], [0, 0, 0, -0.25, 0, -1e-9]]))
    assert found.tokens.dtype == np.int32 and found.logprobs.dtype == np.float32 and found.mask.dtype == bool


def test_it_may_be_gzipped_and_is_kept_as_our_own(tmp_path):
    plain = written(tmp_path / "a.jsonl", HEAD, *ROWS)
    (tmp_path / "a.gz").write_bytes(gzip.compress(plain.read_bytes()))
    first = load_rollout_file(tmp_path / "a.gz", PRECISIONS)
    kept = save_rollout(tmp_path, first)
    assert kept.name == "sglang-bf16.npz"
    for again in (load_rollout(kept), load_rollout_file(kept, PRECISIONS)):
        assert (again.engine, again.version, again.precision) == ("sglang", "0.5", "bf16")
        np.testing.assert_array_equal(again.logprobs, first.logprobs)
    with pytest.raises(ValueError, match="was sampled in 'bf16'; allowed: mismatch.precisions, fp16"):
        load_rollout_file(kept, PRECISIONS[:1])


def test_labels_name_the_engine_where_another_than_ours_is_there():
    made = lambda engine, precision: SimpleNamespace(engine=engine, precision=precision)
    assert list(labelled([made("jit", "fp16"), made("jit", "bf16")])) == ["fp16", "bf16"]
    assert list(labelled([made("jit", "fp16"), made("vllm", "fp16")])) == ["jit fp16", "vllm fp16"]
    with pytest.raises(ValueError, match="two rollouts of vllm fp16; allowed: each engine once .* such as vllm-eager"):
        labelled([made("vllm", "fp16"), made("vllm", "fp16")])


def head(**changes):
    return [{**HEAD, **changes}, *ROWS]


def row(**changes):
    return [HEAD, ROWS[0], {**ROWS[1], **changes}]


def without(name, place=0):
    objects = [dict(one) for one in (HEAD, *ROWS)]
    del objects[place][name]
    return objects


@pytest.mark.parametrize("objects, message", [
    ([], "no rows; at least one JSON object is needed"),
    ([HEAD], "no response after its first object; allowed: one or more"),
    (ROWS, "line 1: format is None; allowed: 'jaxrl_fp16 engine rollouts 1', in the first object"),
    (head(format="jaxrl_fp16 engine rollouts 2"), "line 1: format is 'jaxrl_fp16 engine rollouts 2'"),
    (without("version"), "line 1: version missing; allowed: format, engine, version, dtype, temperature, vocab_size, "),
    (head(top_k=20), "line 1: top_k unknown"),
    (head(version=3), "version is 3; allowed: a text"),
    (head(version=""), "version is ''; allowed: a text"),
    (head(model=None), "model is None; allowed: a text"),
    (head(engine="jit"), "engine is 'jit'; allowed: up to 40 letters"),
    (head(engine="../up"), "engine is '../up'; allowed: up to 40 letters"),
    (head(engine="v" * 41), "allowed: up to 40 letters"),
    (head(dtype="float32"), "dtype is 'float32'; allowed: the compute dtypes of mismatch.precisions, "),
    (head(dtype="fp8"), "dtype is 'fp8'; allowed"),
    (head(dtype=["bfloat16"]), "dtype is ['bfloat16']; allowed: a text"),
    (head(temperature=0), "temperature is 0; allowed: a number above 0"),
    (head(temperature=-1.0), "temperature is -1.0; allowed"),
    (head(temperature=True), "temperature is True; allowed"),
    (head(temperature=float("inf")), "temperature is inf; allowed"),
    (head(temperature=float("nan")), "temperature is nan; allowed"),
    (head(temperature="1"), "temperature is '1'; allowed"),
    (head(vocab_size=0), "vocab_size is 0; allowed: a whole number above 0"),
    (head(vocab_size=20.0), "vocab_size is 20.0; allowed"),
    (head(vocab_size=2**31), "vocab_size is 2147483648; allowed"),
    (without("logprobs", 1), "line 2: logprobs missing; allowed: prompt, response, logprobs, and finished"),
    (row(reward=1), "line 3: reward unknown"),
    (row(prompt=[]), "line 3: prompt is []; allowed: a list with one entry or more"),
    (row(response=[], logprobs=[]), "line 3: response is []; allowed"),
    (row(response="8 9 10"), "line 3: response is '8 9 10'; allowed: a list"),
    (row(prompt=[20]), "line 3: prompt holds 20; allowed: ids, whole numbers from 0 to 19"),
    (row(response=[8, 9, -1]), "line 3: response holds -1; allowed: ids"),
    (row(response=[8, 9, 1.5]), "line 3: response holds 1.5; allowed: ids"),
    (row(response=[8, 9, True]), "line 3: response holds True; allowed: ids"),
    (row(response=[8, 9, 2**40]), "line 3: response holds 1099511627776; allowed: ids"),
    (row(logprobs=[-1, -1]), "line 3: logprobs has 2 entries and response 3; allowed: as many"),
    (row(logprobs=[-1, -1, 0.5]), "line 3: logprobs holds 0.5; allowed: finite numbers up to 0"),
    (row(logprobs=[-1, -1, None]), "line 3: logprobs holds None; allowed"),
    (row(logprobs=[-1, -1, float("nan")]), "line 3: logprobs holds nan; allowed"),
    (row(logprobs=[-1, -1, -float("inf")]), "line 3: logprobs holds -inf; allowed"),
    (row(logprobs=[-1, -1, "-1"]), "line 3: logprobs holds '-1'; allowed"),
    (row(finished=1), "line 3: finished is 1; allowed: true or false"),
    ([HEAD, '{"prompt": [1], "prompt": [2]}'], "line 2"),
    ([HEAD, "[1, 2]"], "line 2"),
    ([HEAD, "{"], "line 2"),
])
def test_what_is_wrong_is_refused_with_its_line(tmp_path, objects, message):
    path = written(tmp_path / "bad.jsonl", *objects)
    with pytest.raises(ValueError) as caught:
        load_rollout_file(path, PRECISIONS)
    said = str(caught.value)
    assert message in said and said.startswith(str(path)) and "\n" not in said


@pytest.mark.parametrize("data", [b"\x80\x04K\x01.", b"PK\x03\x04 and no more", b"\x1f\x8b cut", b"\xff\xfe{"])
def test_no_file_and_another_kind_of_file(tmp_path, data):
    (tmp_path / "odd").write_bytes(data)
    with pytest.raises(ValueError, match="odd"):
        load_rollout_file(tmp_path / "odd", PRECISIONS)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match="no such data file|is a folder"):
            load_rollout_file(path, PRECISIONS)


# -- the script --------------------------------------------------------------------------------------


def test_the_page_shows_what_is_read(tmp_path):
    """The two objects of docs/rollouts.md, as they are there."""
    page = (ROOT / "docs" / "rollouts.md").read_text()
    blocks = [block for block in page.split("\n\n") if block.startswith("    {")]
    head, row = (" ".join(block.split()) for block in blocks)
    found = load_rollout_file(written(tmp_path / "a.jsonl", head, row), PRECISIONS)
    assert found.engine == "vllm" and found.response_mask.sum() == 3 and found.finished.all()


def test_the_script_needs_nothing_of_ours():
    tree = ast.parse((ROOT / "launch" / "write_rollouts.py").read_text())
    names = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] in ("jaxrl_fp16", "jax")]


def test_what_is_written_is_read(tmp_path):
    rows = [([3, 4, 5], np.int64([7, 1]), np.float32([-0.1, -2]), np.True_), ((6,), (8,), [-0.25], False)]
    about = dict(engine="sglang", version="0.5", dtype="float16", temperature=1.0, vocab_size=20)
    assert script.write_rollouts(tmp_path / "a.jsonl", iter(rows), **about) == 2
    found = load_rollout_file(tmp_path / "a.jsonl", PRECISIONS)
    assert found.precision == "fp16" and found.tokens.tolist() == [[3, 4, 5, 7, 1], [0, 0, 6, 8, 0]]
    assert found.logprobs[0, 3] == np.float32(-0.1), "to the last bit"
    assert script.read_prompts(tmp_path / "a.jsonl", None) == [[3, 4, 5], [6]]
    assert script.read_prompts(save_rollout(tmp_path, found), None) == [[3, 4, 5], [6]]
    for wrong in ([], [([], [1], [0.0], True)], [([1], [1], [], True)], [([1], [1], [float("nan")], True)]):
        with pytest.raises(ValueError, match="allowed: one or more"):
            script.write_rollouts(tmp_path / "b.jsonl", wrong, **about)
    with pytest.raises(ValueError, match="dtype is 'half'; allowed: float16, bfloat16, float32"):
        script.write_rollouts(tmp_path / "b.jsonl", rows, **{**about, "dtype": "half"})
    assert not (tmp_path / "b.jsonl").exists()


def test_rows_of_vllm():
    """Its RequestOutput: of each completion ids, and of each position a dictionary of log-probs by id."""
    at = lambda **values: {int(name[1:]): SimpleNamespace(logprob=value) for name, value in values.items()}
    completions = [
        SimpleNamespace(token_ids=(7, 1), logprobs=[at(_7=-0.5), at(_1=-2.0, _5=-0.2)], finish_reason="stop"),
        SimpleNamespace(token_ids=[8], logprobs=[at(_8=-0.25)], finish_reason="length"),
    ]
    output = SimpleNamespace(prompt_token_ids=[3, 4], outputs=completions)
    assert list(script.rows_of_vllm([output])) == [
        ([3, 4], (7, 1), [-0.5, -2.0], True), ([3, 4], [8], [-0.25], False)]
    completions[0].logprobs = None
    with pytest.raises(ValueError, match=r"allowed: SamplingParams\(logprobs=0\)"):
        list(script.rows_of_vllm([output]))


def test_transformers_samples_as_it_says(tmp_path, capsys, quick_compile):
    """Its log-probs are those of our scorer, at the temperature, whatever defaults the folder has."""
    pytest.importorskip("torch")
    config = rl.DecoderConfig(family="qwen2", vocab_size=20, hidden_size=16, intermediate_size=24, num_layers=1,
                              num_heads=2, num_kv_heads=1, head_dim=8)
    model = rl.Decoder(config)
    params = rl.init_params(model, jax.random.key(0))
    rl.save_pretrained(tmp_path / "model", model, params, dtype="float32", tokenizer=character_tokenizer("0123456789"),
                       generation_config={"eos_token_id": [1, 2], "top_k": 3, "temperature": 0.2})
    prompts = written(tmp_path / "prompts.jsonl", HEAD, ROWS[0], {"prompt": "12"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of Transformers about itself
        script.main([str(tmp_path / "model"), str(prompts), str(tmp_path / "out.jsonl"), "--dtype", "float32",
                     "--max-new-tokens", "6", "--samples", "8", "--temperature", "0.7", "--rows-at-once", "5"])
    assert "16 responses in float32" in capsys.readouterr().out
    fp32 = get_precision("fp32")
    found = load_rollout_file(tmp_path / "out.jsonl", [fp32])
    assert found.engine == "transformers" and found.temperature == 0.7 and len(found.tokens) == 16
    assert [row[real].tolist() for row, real in zip(found.tokens, found.mask & ~found.response_mask)][7:9] == [
        [3, 4, 5], character_tokenizer("0123456789").encode("12", add_special_tokens=False)]
    scored = rl.token_logprobs(model, params, found.tokens, found.mask, policy=fp32.policy, temperature=0.7)
    np.testing.assert_allclose(np.where(found.response_mask, scored, 0.0), found.logprobs, atol=2e-5)
    lengths, last = found.response_mask.sum(axis=1), found.tokens[found.response_mask]
    ends = np.isin(last[np.cumsum(lengths) - 1], (1, 2))
    assert (ends == found.finished).all() and ((lengths == 6) | ends).all()
    assert np.isin(last, (1, 2)).sum() == ends.sum() and len(np.unique(last)) > 10


def test_the_command_says_what_it_takes():
    done = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "launch" / "write_rollouts.py"), "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--max-new-tokens" in done.stdout
