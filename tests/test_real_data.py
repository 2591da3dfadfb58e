"""The sanity test's path on the real problems: tokenizer, template, grader, checkpoint, resume, export."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("JAXRL_FP16_DATA", ROOT.parent / "shared" / "data")) / "math_sanity_1460.jsonl"
pytestmark = pytest.mark.skipif(not DATA.is_file(), reason=f"no {DATA}; JAXRL_FP16_DATA names its folder")
SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
# Fewer tokens than the config's: nothing here depends on their number. Two workers are as many as a test needs.
SMALL = ("--sampling.max_new_tokens", "16", "--training.max_prompt_tokens", "160", "--task.workers", "2")


def test_the_sanity_path_from_tokenizer_to_export(compile_cache, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "launch" / "train_tokenizer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tokenizer = tmp_path / "tokenizer"
    assert script.main(["--data", str(DATA), "--vocab-size", "1024", "--out", str(tokenizer),
                        "--special-token", *SPECIAL]) == 0
    ids = load_tokenizer(tokenizer).convert_tokens_to_ids(SPECIAL)
    assert len(set(ids)) == 5 and None not in ids

    config = str(ROOT / "configs" / "sanity_tiny.yaml")
    flags = ("--model.tokenizer", str(tokenizer), "--task.path", str(DATA), "--run.dir", str(tmp_path / "runs"),
             "--run.compile_cache", compile_cache, *SMALL)
    capsys.readouterr()
    assert cli.main(["train", config, *flags]) == 0
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("sanity_tiny-") and "dr_grpo: 3 steps of 8 prompts x 4 = 32 rows" in said
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    problems = {row["problem"]: row["answer"] for row in rows}
    for line in map(json.loads, (folder / "samples.jsonl").read_text().splitlines()):
        start, _, rest = line["prompt"].partition("<｜User｜>")
        assert start == "<｜begin▁of▁sentence｜>" and rest.partition("<｜Assistant｜>")[1]
        assert any(rest.startswith(problem) and answer == line["answer"] for problem, answer in problems.items())
    # A random model solves nothing; that a right answer scores is the math task's own test.
    assert all(record["reward"] == 0 and record["rewards_failed"] == 0 for record in records[1:])
    assert sum(record["prompts_set_aside"] for record in records[1:]) > 0

    assert cli.main(["train", config, *flags, "--run.steps", "4", "--resume", str(folder)]) == 0
    assert [record["step"] for record in read_metrics(folder)] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "4"]      # keep: 2
    capsys.readouterr()
    assert cli.main(["export", config, *flags, "--run.steps", "4", "--resume", str(folder)]) == 0
    assert f"weights for Transformers and vLLM: {folder}/model" in capsys.readouterr().out
    _check_in_transformers(folder / "model")


def _check_in_transformers(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float16 and model.config.tie_word_embeddings
    text = "<｜User｜>What is $1 + 1$?<｜Assistant｜><think>\n"
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    assert tokenizer.decode(prompt["input_ids"][0]) == text
    with torch.no_grad():
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=3)
    assert np.isfinite(model(tokens).logits.detach().numpy()).all()
