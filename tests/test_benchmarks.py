"""The table of presets: what is repeated, what is kept of a run that failed, where the table goes; remedies."""

import dataclasses
import importlib
import json
from pathlib import Path
import sys

import jax
import numpy as np
import pytest

from jaxrl_fp16.forward import logits as logits_of, token_logprobs
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def presets(monkeypatch, tmp_path):
    """The script with its runs replaced: `presets.codes` says how a preset's run ends, `presets.ran` lists them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("presets")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.MARKS[0]}\nold\n{script.MARKS[1]}\nafter\n")
    script.codes, script.ran = {}, []

    def command(name, path, log, **flags):
        preset = flags["algorithm.preset"]
        script.ran.append(preset)
        code = script.codes.get(preset, 0)
        if code != 2:
            folder = tmp_path / f"{flags['run.name']}-{len(script.ran)}"
            folder.mkdir()
            steps = [{"step": step, "seconds/sample": 1.0, "seconds/learn": step, "mismatch/kl_k3": 1e-9, "skipped": 1}
                     for step in (1, 2, 3)]
            first = {"step": 0, "eval/sampled/accuracy": 0.25, "eval/greedy/accuracy": 0.5}
            steps[-1] |= {"eval/sampled/accuracy": 0.75, "mismatch/kl_k3": "NaN" if code else 1e-9}
            lines = [json.dumps(record) for record in [first, *steps]]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return code, "what | went wrong" if code else ""

    monkeypatch.setattr(script, "command", command)
    monkeypatch.setattr(script, "warm_start", lambda config, work: work / "start.yaml")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    yield script
    for name in ("presets", "record"):
        sys.modules.pop(name, None)


def start(script, monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["presets.py", "--work", str(folder), "--out", str(folder), "--steps", "3",
                                      "--config", str(BENCHMARKS.parent / "configs" / "quickstart.yaml"), *flags])
    script.main()
    return {row["preset"]: row for row in json.loads((folder / "presets.json").read_text())["rows"]}


def test_runs_that_failed_are_rows_and_only_refused_ones_are_repeated(presets, monkeypatch, tmp_path, capsys):
    presets.codes |= {"cispo": 3, "dapo": 2}
    names = "grpo", "cispo", "dapo"
    rows = start(presets, monkeypatch, tmp_path, "--presets", *names, "--docs")
    assert presets.ran == list(rows) == list(names)
    assert rows["grpo"]["accuracy"] == {"sampled": {"0": 0.25, "3": 0.75}, "greedy": {"0": 0.5}}
    assert rows["grpo"]["seconds_per_step"] == 3.5 and rows["grpo"]["skipped"] == 3
    assert rows["cispo"]["exit_code"] == 3 and "mismatch/kl_k3" not in rows["cispo"]
    assert rows["dapo"]["accuracy"] == {"sampled": {}, "greedy": {}} and rows["dapo"]["steps_done"] == 0
    text = presets.PAGE.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `grpo` | 0.250 / 0.500 | 0.750 / - | 3.50 | 1.0e-09 | 1 | done |" in text
    assert "exit 3, what / went wrong |" in text and "`dapo`*" in text

    start(presets, monkeypatch, tmp_path, "--presets", *names)
    assert presets.ran == [*names, "dapo"], "the refused one alone is started again"
    start(presets, monkeypatch, tmp_path, "--presets", "grpo", "--seeds", "1")
    start(presets, monkeypatch, tmp_path, "--presets", "grpo", "--again")
    assert presets.ran[4:] == ["grpo", "grpo"]
    kept = json.loads((tmp_path / "presets.json").read_text())["rows"]
    assert sorted((row["preset"], row["seed"]) for row in kept) == [("cispo", 0), ("dapo", 0), ("grpo", 0), ("grpo", 1)]
    capsys.readouterr()


def test_an_interrupt_ends_it_with_what_is_there_kept(presets, monkeypatch, tmp_path, capsys):
    presets.codes["rloo"] = 130
    with pytest.raises(SystemExit, match="130"):
        start(presets, monkeypatch, tmp_path, "--presets", "grpo", "rloo", "ppo")
    assert presets.ran == ["grpo", "rloo"]
    assert len(json.loads((tmp_path / "presets.json").read_text())["rows"]) == 1
    capsys.readouterr()


@pytest.fixture
def sanity_mini(monkeypatch, tmp_path):
    """The script with its runs replaced: BF16 with another sampler falls from 0.5 to 0, and a guard stops it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("sanity_mini")
    script.ran = []

    def command(name, path, log, **flags):
        collapses = flags.get("rollout_precision") == "fp32" and flags["precision"] == "bf16"
        script.ran.append((flags["run.name"], flags.get("rollout_precision")))
        folder = tmp_path / f"{flags['run.name']}-{len(script.ran)}"
        folder.mkdir()
        steps = [
            {"step": step, "seconds/sample": 1.0, "seconds/learn": 1.0, "skipped": int(collapses), "entropy": 0.1,
             "grad_norm": "NaN" if collapses else 1.0, "reward": 0.5 if step <= script.WINDOW or not collapses else 0.0,
             "mismatch/prob_abs_diff_mean": step * 1e-3, "mismatch/kl_k3": 0.0, "mismatch/seq_log_ratio_std": 0.0}
            for step in range(1, 2 * script.WINDOW + 1)
        ]
        records = [{"step": 0, "eval/sampled/accuracy": 0.25}, *steps]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        return (3, "gradients are not finite") if collapses else (0, "")

    monkeypatch.setattr(script, "command", command)
    monkeypatch.setattr(script, "warm_start", lambda work: work / "model")
    yield script
    for name in ("sanity_mini", "presets", "record"):
        sys.modules.pop(name, None)


def test_a_sanity_run_that_collapses_is_a_row_beside_the_others(sanity_mini, monkeypatch, tmp_path):
    flags = "--work", str(tmp_path), "--out", str(tmp_path), "--arms", "bf16", "bf16/fp32", "--seeds", "0"
    monkeypatch.setattr(sys, "argv", ["sanity_mini.py", *flags])
    sanity_mini.main()
    sanity_mini.main()  # nothing is repeated: one row has ended, the other was stopped by its guard
    assert sanity_mini.ran == [("dr_grpo-bf16-0", None), ("dr_grpo-bf16-fp32-0", "fp32")]
    rows = json.loads((tmp_path / "sanity_mini.json").read_text())["rows"]
    same, other = rows
    assert same["reward"] == [0.5, 0.5] and same["exit_code"] == 0 and same["skipped"] == 0
    assert other["reward"] == [0.5, 0.0] and other["exit_code"] == 3 and other["failure"] == "gradients are not finite"
    assert other["grad_norm"] == [None, None] and other["skipped"] == 2 * sanity_mini.WINDOW
    assert same["heldout"] == {"0": 0.25}
    first, second = sanity_mini.summary(rows)
    assert (first["arm"], first["last"], first["ended"]) == ("bf16", 0.5, "done")
    assert second["best"] == 0.5 and second["last"] == 0 and "seed 0: gradients" in second["ended"]
    assert second["prob diff, first"] == pytest.approx(5.5e-3) and second["prob diff, last"] == pytest.approx(15.5e-3)


# -- remedies ------------------------------------------------------------------------------------


@pytest.fixture
def remedies(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("remedies")
    sys.modules.pop("remedies", None)


def test_remedies_are_measured_alone(remedies):
    model = Decoder(DecoderConfig(family="qwen2", vocab_size=60, hidden_size=32, intermediate_size=48, num_layers=2,
                                  num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True), attention="plain")
    params, policy = init_params(model, jax.random.key(0)), get_precision("bf16").policy
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 3
    generator, sampling = np.random.default_rng(0), SamplingConfig(max_new_tokens=12, group_size=1)
    mask = np.arange(8) >= generator.integers(0, 5, 6)[:, None]
    prompts = np.where(mask, generator.integers(2, 60, mask.shape), 0).astype(np.int32)
    chosen = {name: remedies.REMEDIES[name] for name in ("none", "float32_cache")}
    given = params, prompts, mask, jax.random.key(1)
    rows = remedies.measure_remedies(model, *given, policy, sampling, eos_id=1, pad_id=0, remedies=chosen, repeats=1)
    assert [row["remedy"] for row in rows] == ["none", "float32_cache"]
    rollout = make_sampler(model, policy, sampling, eos_id=1, pad_id=0)(*given)
    scored = token_logprobs(model, params, rollout.tokens, rollout.mask, policy=policy)
    apart = np.abs(np.asarray(rollout.logprobs - scored))[np.asarray(rollout.response_mask)]
    assert rows[0]["abs_diff_max"] == pytest.approx(apart.max(), rel=1e-5)
    assert rows[1]["token_kl"] != rows[0]["token_kl"]
    assert all(row["float32_kl"] > 0 and row["sampler_seconds"] > 0 and row["scorer_seconds"] > 0 for row in rows)
    fields = {field.name for field in dataclasses.fields(model.numerics)}
    assert {name for remedy in remedies.REMEDIES.values() for name in remedy} == fields


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_script_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    assert importlib.import_module(name).__doc__
    for added in {path.stem for path in BENCHMARKS.glob("*.py")} - before:
        sys.modules.pop(added, None)


def test_telemetry_times_the_looks_of_train(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("telemetry")
    monkeypatch.setattr(script.Watch, "look", lambda self, *given: {})

    def train(config):
        watch = script.loop.Watch.__new__(script.loop.Watch)
        return [watch.look(step, None, None) for step in range(4)]

    monkeypatch.setattr(script, "train", train)
    assert len(script.measure(None)) == 3 and script.loop.Watch is script.Watch
    for name in ("telemetry", "record"):
        sys.modules.pop(name, None)


# -- speed ---------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - names:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.mark.parametrize("lengths", ["geometric", "log-normal"])
def test_rows_end_with_the_chance_of_their_kind(script, lengths):
    """In every precision: the entry of the end's embedding is exact enough."""
    workload = script("workload")
    chances, params = workload.chances_of(lengths), workload.make_ending_params(lengths)
    tokens, mask = workload.make_prompts(32, seed=7)
    kinds = tokens[mask] % len(chances)
    for precision in ("fp32", "bf16"):
        logits = logits_of(workload.MODEL, params, tokens, mask, get_precision(precision).policy)
        chance = np.asarray(jax.nn.softmax(logits))[mask]
        ends = np.array([chance[kinds == kind, workload.EOS].mean() for kind in range(len(chances))])
        np.testing.assert_allclose(ends, chances, rtol=0.2, atol=1e-9)
        assert chance[np.arange(workload.VOCAB) % len(chances) == kinds[:, None]].sum() > 0.8 * len(chance)


def test_drawn_lengths_are_those_of_the_chances(script):
    workload = script("workload")
    drawn = workload.draw_lengths("geometric", 20_000, 256)
    assert drawn.mean() == pytest.approx(48 * (1 - (47 / 48) ** 256), rel=0.03) and drawn.min() >= 1
    limit = np.mean(workload.draw_lengths("log-normal", 20_000, 256) == 256)
    assert 0.06 < limit < 0.15
    batch = workload.make_batch(*workload.make_prompts(4), np.array([1, 2, 3, 8]), 8)
    assert batch.response_mask.sum(axis=1).tolist() == [1, 2, 3, 8]
    assert (batch.tokens[~batch.mask] == workload.PAD).all() and batch.tokens.shape == (4, workload.PROMPT + 8)
    assert workload.make_full_batch(4, 8).mask.all()


def test_tokens_behind_the_end_of_a_row_do_not_count(script):
    count = script("sampler")._count
    rows = np.array([[5, 1, 0, 0], [5, 6, 7, 8], [1, 1, 1, 1]])
    assert count(rows, 1) == 2 + 4 + 1 and count(rows, None) == 12


def test_programs_take_turns_and_rates_are_of_their_own_work(script):
    timing, order = script("timing"), []

    def program(name, result):
        def run():
            order.append(name)
            return result
        return run

    spent = timing.Spent(work=30, cpu=2.0, wall=4.0)
    rows = timing.alternate({"a": program("a", spent), "b": program("b", None)}, 2, 7, unit="rows")
    assert order == ["a", "b"] * 3
    assert rows[0] == {"program": "a", "rows_per_cpu_second": 15, "least": 15, "most": 15, "rows_per_second": 7.5,
                       "runs": 2}
    assert timing.add_ratios(rows[:1], "a", "rows", "times")[0]["times"] == 1
    assert timing.add_ratios(rows, "c", "rows") == rows


PEER = """
from turns import Turns
turns = Turns()
print("noise")
for turn in range(2):
    turns.start()
    turns.end(turns.settings["work"] + turn)
raise SystemExit("no more")
"""


def test_a_peer_answers_each_turn_and_says_why_it_ended(script, monkeypatch, tmp_path):
    peer = script("peer")
    (tmp_path / "count.py").write_text(PEER)
    (tmp_path / "turns.py").write_text((peer.PEERS / "turns.py").read_text())
    monkeypatch.setattr(peer, "PEERS", tmp_path)
    with peer.Peer(sys.executable, "count.py", work=5) as program:
        assert program().work == 5
        found = program()
        assert found.work == 6 and 0 <= found.cpu and found.wall > 0
        with pytest.raises(RuntimeError, match="count.py ended with code 1: (?s:.)*no more"):
            program()
    with peer.Peer(sys.executable, "count.py", work=1):
        pass  # ends by itself where no turn comes
