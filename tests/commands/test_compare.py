"""compare: its runs, its processes, its report, and a comparison in processes of which one run fails midway."""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.commands import compare
from jaxrl_fp16.config import ConfigError, load_config, to_dict, to_yaml
from jaxrl_fp16.lab.compare.answer import answer
from jaxrl_fp16.lab.compare.figures import look_of
from jaxrl_fp16.lab.compare.page import show_comparison, verdict_table, write_comparison
from jaxrl_fp16.lab.compare.processes import Job, run_jobs, shares_of_cores
from jaxrl_fp16.lab.compare.runs import band, last_step, plan_runs, read_comparison, series, window_of
from jaxrl_fp16.lab.compare.tables import verdicts
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.safety.folder_lock import only_writer

ROOT = Path(__file__).resolve().parents[2]


def configured(tiny, *flags):
    return load_config(Config, tiny, ["--run.name", "tiny", *flags])


# -- the command line and the plan -----------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--precisions", "fp16", "fp17"], "compare: precision 'fp17' is unknown; allowed: fp16, bf16, fp32"),
    (["--rollout-precisions", "int8"], "compare: precision 'int8' is unknown"),
    (["--precisions", "fp16", "fp16"], "compare: precisions are fp16, fp16; allowed: one or more, each once"),
    (["--precisions", "--seeds", "0"], "--precisions has no value; allowed: --precisions VALUE [VALUE ...]"),
    (["--seeds", "0", "1", "0"], "compare: seeds are 0, 1, 0; allowed: one or more, each once"),
    (["--seeds", "-1"], "compare.seeds[0]: -1 is not allowed; allowed: list of integer >= 0"),
    (["--seeds", "4294967296"], "compare.seeds: [4294967296] is not allowed; allowed: list of integer >= 0, up to"),
    (["--seeds", "one"], 'compare.seeds[0]: "one" is not allowed'),
    (["--engines", "jit", "jit"], "compare: engines are jit, jit; allowed: one or more, each once"),
    (["--engines", "sglang"], 'compare.engines[0]: "sglang" is not allowed; allowed: list of jit'),
    (["--engines", "jit", "vllm", "--sampling.top_k", "3"], "compare.engines: top_k is 3 and top_p 1.0 with rollout."),
    (["--jobs", "0"], "compare.jobs: 0 is not allowed; allowed: integer >= 1"),
    (["--jobs", "1", "2"], '"2" is not allowed; allowed: --key VALUE'),
    (["--rollout_precision", "bf16"], "rollout_precision is 'bf16'; allowed with compare: null"),
])
def test_what_is_refused_before_any_process(tiny, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", str(tiny), *flags]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not any(tmp_path.iterdir())


def test_flags_of_several_values(tiny, monkeypatch):
    taken = []
    monkeypatch.setattr(compare, "run_compare", lambda config: taken.append(config.compare) or 0)
    free = "params=float32,compute=float16,output=float32"
    flags = ["--seeds", "0", "7", "--run.steps", "3", "--precisions", "fp32", free, "--jobs=2"]
    flags += ["--rollout-precisions=bf16"]
    assert cli.main(["compare", str(tiny), *flags]) == 0
    (section,) = taken
    assert (section.seeds, section.precisions, section.jobs) == ((0, 7), ("fp32", free), 2)
    assert section.rollout_precisions == ("bf16",)


def test_the_ablation_matrix(tiny):
    config = configured(tiny, "--compare.precisions", "[fp16, bf16]", "--compare.rollout_precisions", "[fp16, fp32]",
                        "--compare.seeds", "[3, 4]", "--sft.steps", "5", "--run.seed", "9")
    runs = plan_runs(config, Path("there"))
    assert [run.name for run in runs[:4]] == [
        "fp16-seed3", "fp16_rollout_fp32-seed3", "bf16_rollout_fp16-seed3", "bf16_rollout_fp32-seed3"]
    assert [run.label for run in runs[4:]] == ["fp16", "fp16<-fp32", "bf16<-fp16", "bf16<-fp32"]
    own = runs[1].config
    assert (own.precision, own.rollout_precision, own.run.seed) == ("fp16", "fp32", 3)
    assert own.model.path == str(Path("there/warm-seed3/model").resolve()) and own.sft.steps == 0
    assert runs[0].config.rollout_precision is None
    cold = plan_runs(configured(tiny), Path("there"))
    assert [run.name for run in cold] == ["fp16-seed0", "bf16-seed0"] and cold[0].config.model.path is None


def test_engines_are_an_axis(tiny):
    config = configured(tiny, "--compare.engines", "[jit, vllm]", "--compare.seeds", "[3]", "--sft.steps", "5",
                        "--rollout.engine", "transformers", "--compare.rollout_precisions", "[fp16]")
    runs = plan_runs(config, Path("there"))
    assert [run.label for run in runs] == ["jit fp16", "jit bf16<-fp16", "vllm fp16", "vllm bf16<-fp16"]
    assert [run.name for run in runs] == ["jit_fp16-seed3", "jit_bf16_rollout_fp16-seed3", "vllm_fp16-seed3",
                                          "vllm_bf16_rollout_fp16-seed3"]
    assert [run.config.rollout.engine for run in runs] == [run.engine for run in runs] == ["jit"] * 2 + ["vllm"] * 2
    assert compare._warm_run(config, Path("there"), 3).config.rollout.engine == "jit", "which favours no side"
    alone = configured(tiny, "--rollout.engine", "transformers")
    runs = plan_runs(alone, Path("there"))
    assert [(run.name, run.label, run.engine) for run in runs] == [
        ("fp16-seed0", "fp16", "transformers"), ("bf16-seed0", "bf16", "transformers")]
    assert compare._warm_run(alone, Path("there"), 0).config.rollout.engine == "transformers"


# -- processes -------------------------------------------------------------------------------------------


class Signals:
    received = None


def run_python(tmp_path, shares, *codes, signals=Signals, tick=lambda names: None):
    """How processes with these programs ended, by their number."""
    ended = {}
    python = (sys.executable, "-S", "-c")
    jobs = [Job(str(place), (*python, code), tmp_path / str(place)) for place, code in enumerate(codes)]
    run_jobs(jobs, shares, signals, ended=lambda job, how: ended.update({int(job.name): how}), tick=tick)
    return ended


def test_how_processes_end(tmp_path):
    ended = run_python(
        tmp_path, [None, None], "print('fine')", "import sys; sys.exit('a line\\nthe last line')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "1 / 0", "bytearray(300 * 2**20)")
    assert [ended[place].code for place in range(5)] == [0, 1, 137, 1, 0]
    assert [ended[place].error for place in range(4)] == [
        "", "the last line", "killed by SIGKILL", "ZeroDivisionError: division by zero"]
    assert (tmp_path / "0.stdout").read_text() == "fine\n"
    assert ended[4].peak_bytes > 300 * 2**20 and ended[0].cpu_seconds < ended[0].seconds + 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process")
def test_processes_have_their_cores(tmp_path):
    mine = os.sched_getaffinity(0)
    shares = shares_of_cores(min(2, len(mine)))
    assert len({core for share in shares for core in share}) == sum(map(len, shares)) <= len(mine)
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    ended = run_python(tmp_path, shares, *[code] * len(shares))
    said = [json.loads((tmp_path / f"{place}.stdout").read_text()) for place in range(len(shares))]
    assert said == [list(share) for share in shares] and os.sched_getaffinity(0) == mine
    assert ended[0].cores == len(shares[0])
    assert shares_of_cores(len(mine) + 1)[0] is None     # more than there are cores: none has its own


def test_a_signal_ends_those_that_run_and_starts_no_other(tmp_path):
    signals = SimpleNamespace(received=None)
    patient = """if True:
        import signal, sys, time, pathlib
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        pathlib.Path(sys.argv[0] + 'ready').write_text('')
        time.sleep(60)"""
    ready = tmp_path / "ready"

    def tick(names):
        if ready.exists():
            signals.received = signal.SIGTERM

    code = patient.replace("sys.argv[0] + 'ready'", repr(str(ready)))
    ended = run_python(tmp_path, [None], code, "print('never')", signals=signals, tick=tick)
    assert {place: how.code for place, how in ended.items()} == {0: 143}
    assert not (tmp_path / "1.stdout").exists()


def test_no_process_outlives_an_error(tmp_path):
    def tick(names):
        raise SystemExit(130)

    threads = threading.active_count()
    with pytest.raises(SystemExit):
        run_python(tmp_path, [None], "import os, time; print(os.getpid(), flush=True); time.sleep(60)", tick=tick)
    text = (tmp_path / "0.stdout").read_text()
    assert threading.active_count() == threads
    if text:        # it came as far as to say who it is
        with pytest.raises(ProcessLookupError):
            os.kill(int(text), 0)


# -- the report, from files ------------------------------------------------------------------------------


def write_run(folder, name, rewards, kl, code=0, error="", **more):
    (folder / name).mkdir()
    lines = [{"step": 0, "eval/greedy/accuracy": 0.5}]
    lines += [{"step": step, "reward": reward, "mismatch/kl_k3": kl * (step % 3), "loss_scale": 2.0**15, "skipped": 0.0,
               "tokens_per_second": 100.0, **more} for step, reward in enumerate(rewards, 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / name / "metrics.jsonl").write_text(text + ('{"step": 9' if code else ""))   # cut by a kill
    return {name: {"code": code, "error": error, "seconds": 10.0, "cpu_seconds": 12.0, "peak_bytes": 2**29, "cores": 1,
                   "attempts": 1}}


@pytest.fixture(scope="module")
def reported(tiny, tmp_path_factory):
    """A folder with three seeds of two precisions: bf16 loses its reward twice, and is killed once."""
    folder = tmp_path_factory.mktemp("compared")
    config = configured(tiny, "--compare.seeds", "[0, 1, 2]", "--run.steps", "60", "--sft.steps", "9")
    (folder / "config.yaml").write_text(to_yaml(config))
    rise = [0.5 + 0.005 * step for step in range(60)]
    outcomes = {}
    for seed in range(3):
        rewards = [value + 0.001 * seed for value in rise]
        outcomes |= write_run(folder, f"fp16-seed{seed}", rewards, 1e-9 * (1 + 0.1 * seed))
    for seed in range(2):
        outcomes |= write_run(folder, f"bf16-seed{seed}", rise[:30] + [0.1] * 30, 2e-8 * (1 + 0.1 * seed))
    outcomes |= write_run(folder, "bf16-seed2", rise[:7], 2.5e-8, 137, "killed by SIGKILL", grad_norm="NaN")
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
    comparison = read_comparison(folder)
    write_comparison(comparison)
    return comparison


def test_the_page(reported, read_page):
    seen = read_page(reported.folder / "report.html")
    assert {"Reward and mismatch", "Verdicts", "Training", "The runs", "How it was tested"} <= set(seen.text)
    assert {"bf16-seed2", "killed by SIGKILL"} <= set(seen.text)
    assert seen.tags.count("svg") == seen.tags.count("figure") >= 4
    said = " ".join(seen.text)
    assert "fp16 did not collapse in 3 seeds." in said and "bf16 collapsed in 2 of 3 seeds (seed 0 at step 3" in said
    assert "Not to the end: bf16-seed2 (killed (signal 9))." in said
    assert (reported.folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_verdicts(reported):
    rows = {row.quantity.key: row for row in verdicts(reported)["fp16", "bf16"] if row.quantity.over != "tail"}
    kl = rows["mismatch/kl_k3"]
    assert kl.pairing.difference == pytest.approx(1 / 20.4, rel=0.1) and kl.pairing.p < 1e-3
    assert "fp16's token KL (k3), sampler | scorer is 20." in kl.text and "times smaller than bf16's" in kl.text
    assert rows["skipped"].text == "the same in every seed"
    assert rows["cpu_seconds"].pairing.first == (12.0, 12.0)     # not of the seed whose run was killed
    # Of that seed only the seven steps count that both sides took.
    assert rows["reward"].pairing.second[2] == pytest.approx(0.515)
    assert rows["reward"].pairing.first[2] == pytest.approx(0.517)


def test_the_answer_in_three_sentences(reported, read_page):
    """Who won, by how much, whether seeds carry it; then what was not to the end, and only then a heading."""
    seen = read_page(reported.folder / "report.html")
    said = [text for text in seen.text if text][1:]
    who, how_much, carried, odd, *rest = said[said.index("tiny: fp16, bf16") + 1:]
    assert who == ("No side can be said to have won: training reward at the end is fp16 0.699, bf16 0.243. "
                   "The reward collapsed in 0 of 3 runs of fp16 and 2 of 3 runs of bf16.")
    assert re.fullmatch(r"fp16 leads bf16 by 0.456; token KL between sampler and trainer is, in fp16, 20.\d times "
                        r"smaller than in bf16.", how_much)
    assert carried == ("Over 3 seeds, the lead over bf16 lies within seed noise, and the difference in token KL from "
                       "bf16 goes beyond seed noise.")
    assert "fp16's is 20.3 times smaller than bf16's" in seen.text
    assert odd.startswith("Not to the end") and rest[0] == "Reward and mismatch"
    open_text, folded = (" ".join(part.split()) for part in
                         (reported.folder / "report.html").read_text().split("<details>", 1))
    assert "Student" in folded and "Student" not in open_text and folded.count("<details>") == 1
    assert json.loads((reported.folder / "report.json").read_text())["answer"] == [who, how_much, carried, odd]


def courses(tiny, folder, rewards, flags=(), **more):
    """A comparison of runs of three steps: `{(precision, seed): reward}`, with an evaluation after the last."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(configured(tiny, *flags)))
    outcomes = {}
    for (precision, seed), reward in rewards.items():
        kl = 2e-8 if precision == "bf16" else 1e-9
        outcomes |= write_run(folder, f"{precision}-seed{seed}", [reward] * 3, kl, **more)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
    return read_comparison(folder)


def test_who_won_in_other_cases(tiny, tmp_path):
    """One seed; seeds that carry it; none that differ; three sides; a side without a run."""
    def said(name, rewards, *flags, **more):
        comparison = courses(tiny, tmp_path / name, rewards, flags, **more)
        return answer(comparison, verdicts(comparison))

    one = said("one", {("fp16", 0): 0.5, ("bf16", 0): 0.6})
    assert one == [
        "bf16 ended with the highest training reward at the end (bf16 0.6, fp16 0.5); one seed makes no win.",
        "bf16 leads fp16 by 0.1; token KL between sampler and trainer is, in fp16, 20 times smaller than in bf16.",
        "One seed carries nothing: how much seeds differ among themselves is not known."]
    three, seeds = ("--compare.precisions", "[fp16, bf16, fp32]"), ("--compare.seeds", "[0, 1, 2]")
    rewards = {(precision, seed): level + 0.001 * seed * (1 if precision == "bf16" else 2) for seed in range(3)
               for precision, level in (("fp16", 0.2), ("bf16", 0.9), ("fp32", 0.5))}
    won = said("won", rewards, *three, *seeds)
    assert won[0] == "bf16 won: it has the highest training reward at the end (bf16 0.901, fp32 0.502, fp16 0.202)."
    assert won[1].startswith("bf16 leads fp32 by 0.399 and fp16 by 0.699; token KL")
    assert won[2].startswith("Over 3 seeds, the lead over fp32 and fp16 goes beyond seed noise, and")
    same = said("same", {("fp16", 0): 0.5, ("bf16", 0): 0.5}, **{"eval/sums/accuracy": 0.25})
    assert same[0] == "No side won: sums accuracy at the end is 0.25 on all of them." and "No side leads" in same[1]
    assert said("alone", {("fp16", 0): 0.5}) == ["There is nothing to compare: fp16 alone took a step."]
    assert said("none", {}) == ["There is nothing to compare: no side took a step."]
    apart = said("apart", {("fp16", 0): 0.5, ("bf16", 1): 0.5}, "--compare.seeds", "[0, 1]")
    assert apart == ["None can be said to have won: no seed ran on all of fp16, bf16."]


def test_a_report_of_engines(tiny, tmp_path, read_page):
    """Two engines in two precisions: four sides, a colour for each precision and a kind of line for each engine."""
    rewards = {(f"{engine}_{precision}", seed): 0.5 + 0.1 * (engine == "jit") + 0.001 * seed
               for engine in ("jit", "vllm") for precision in ("fp16", "bf16") for seed in (0, 1)}
    comparison = courses(tiny, tmp_path / "engines", rewards,
                         ("--compare.engines", "[jit, vllm]", "--compare.seeds", "[0, 1]"))
    assert comparison.sides == ["jit fp16", "jit bf16", "vllm fp16", "vllm bf16"] and len(comparison.runs) == 8
    looks = [look_of(comparison, side) for side in comparison.sides]
    assert [look["linestyle"] for look in looks] == ["-", "-", "--", "--"]
    assert looks[0]["color"] == looks[2]["color"] != looks[1]["color"] == looks[3]["color"]
    write_comparison(comparison)
    seen = read_page(comparison.folder / "report.html")
    assert "tiny: jit fp16, jit bf16, vllm fp16, vllm bf16" in seen.text
    assert "A side's name begins with the engine that sampled." in " ".join(seen.text)
    data = json.loads((comparison.folder / "report.json").read_text())
    assert [run["engine"] for run in data["runs"]] == ["jit", "jit", "vllm", "vllm"] * 2
    assert len({(row["first"], row["second"]) for row in data["verdicts"]}) == 6
    assert data["answer"][1].startswith("jit fp16 leads vllm fp16 by 0.1 and vllm bf16 by 0.1; token KL")


def test_a_verdict_of_every_row_is_said_once(tiny, tmp_path, read_page):
    equal = courses(tiny, tmp_path / "equal", {("fp16", 0): 0.5, ("fp32", 0): 0.5},
                    ("--compare.precisions", "[fp16, fp32]"))
    write_comparison(equal)
    seen = read_page(equal.folder / "report.html")
    said = "fp16 against fp32. One seed: no spread is known. In every row seeds: 1; verdict: the same."
    assert said in seen.text and "verdict" not in seen.text and "95 % interval" not in seen.text
    apart = courses(tiny, tmp_path / "apart", {("fp16", 0): 0.5, ("bf16", 0): 0.6})
    table = verdict_table(("fp16", "bf16"), verdicts(apart)["fp16", "bf16"])
    assert table.caption == "fp16 against bf16. One seed: no spread is known. In every row seeds: 1."
    assert table.columns == ["quantity", "fp16", "bf16", "difference, or factor", "verdict"]
    assert {row[-1] for row in table.rows} == {"-", "the same"}


def test_the_data_file(reported):
    data = json.loads((reported.folder / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert data["collapsed"]["fp16"] == {"0": None, "1": None, "2": None}
    assert data["collapsed"]["bf16"]["2"] is None and 30 < data["collapsed"]["bf16"]["0"] < 40
    runs = {run["name"]: run for run in data["runs"]}
    assert runs["bf16-seed2"]["code"] == 137 and runs["bf16-seed2"]["last_step"] == 7
    assert runs["warm-seed0"]["code"] is None and runs["fp16-seed0"]["cores"] == 1
    assert len(data["series"]["fp16-seed0"]["mismatch/kl_k3"]["values"]) == 60
    assert "grad_norm" not in data["series"]["fp16-seed0"]       # no step of any run had a finite one
    assert {row["verdict"] for row in data["verdicts"]} and data["verdicts"][0]["first_values"]


def test_the_console(reported):
    said, tables = [], {}
    console = SimpleNamespace(say=said.append, table=lambda title, columns, rows: tables.update({title: list(rows)}))
    show_comparison(reported, console)
    assert said[-2:] == [f"picture: {reported.folder / 'figure.png'}", f"report: {reported.folder / 'report.html'}"]
    assert "verdicts, fp16 against bf16" in tables and len(tables["what happened"]) == 9


def test_series_and_bands(reported):
    run = reported.of("fp16")[0]
    steps, values = series(run, "mismatch/kl_k3", 3)
    assert list(steps[:2]) == [2, 5] and values == pytest.approx([1e-9] * 20)
    assert list(series(run, "skipped", 10)[1]) == [0.0] * 6 and window_of(reported) == 1
    shared, mean, low, high = band([series(run, "reward") for run in reported.of("bf16")])
    assert list(shared) == list(range(1, 8)) and (low <= mean).all() and (mean <= high).all()
    assert band([]) is None
    assert last_step(reported.folder / "bf16-seed2" / "metrics.jsonl") == 7 and last_step("absent") == 0


# -- in processes ------------------------------------------------------------------------------------------

# Right for so many calls, of all runs together; then it raises, until the file `mended` is there.
REWARD = '''
from pathlib import Path
HERE = Path(__file__).parent

def reward(prompts, responses, examples):
    with open(HERE / "calls", "a") as file:
        file.write("x")
    if (HERE / "calls").stat().st_size > 24 and not (HERE / "mended").exists():
        raise ValueError("out of rewards")
    return [sum(character.isdigit() for character in response) / 4 for response in responses]
'''


@pytest.fixture(scope="module")
def compared(tiny, compiled, quick_environment, tmp_path_factory):
    """Two runs, one after another: of 24 calls, 8 a step, the first takes two steps' and the second one step's."""
    root = tmp_path_factory.mktemp("compare")
    (root / "reward.py").write_text(REWARD)
    flags = ["--precisions", "fp16", "bf16", "--jobs", "1", "--sft.steps", "2", "--task.reward_file", "reward.py",
             "--run.dir", "runs", "--run.compile_cache", str(compiled), "--run.export", "false", "--task.workers", "1",
             "--logging.tensorboard", "false"]
    quick = quick_environment | {
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(*more):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            for name, value in quick.items():
                patch.setenv(name, value)
            code = cli.main(["compare", str(tiny), *flags, *more])
        (folder,) = (root / "runs").iterdir()
        return SimpleNamespace(code=code, folder=folder, data=json.loads((folder / "report.json").read_text()))

    first = start()
    records = read_metrics(first.folder / "fp16-seed0"), read_metrics(first.folder / "bf16-seed0")
    (root / "mended").write_text("")
    first.folder = first.folder.rename(first.folder.with_name("moved"))     # with the warm start that both begin from
    return SimpleNamespace(first=first, records=records, again=start("--resume", str(first.folder)))


def test_a_run_that_fails_midway(compared):
    """Its reward function raises from the second step on; the report says so and holds what there is."""
    first, (whole, cut) = compared.first, compared.records
    assert first.code == 0      # a run that stopped itself is a result
    runs = {run["name"]: run for run in first.data["runs"]}
    assert [runs[name]["code"] for name in ("warm-seed0", "fp16-seed0", "bf16-seed0")] == [0, 0, 3]
    assert "rewards failed (ValueError: out of rewards" in runs["bf16-seed0"]["error"]
    assert [record["step"] for record in whole] == [0, 1, 2] and [record["step"] for record in cut] == [0, 1]
    assert all(run["peak_bytes"] > 2**27 and run["cpu_seconds"] > 1 for run in runs.values())


def test_both_runs_begin_from_one_warm_start(compared):
    whole, cut = compared.records
    config = load_config(Config, compared.first.folder / "fp16-seed0" / "config.yaml")
    assert config.sft.steps == 0 and config.model.path.endswith("warm-seed0/model")
    assert whole[1]["reward"] == pytest.approx(cut[1]["reward"], abs=0.2) and "sft/loss" not in whole[0]
    assert read_metrics(compared.first.folder / "warm-seed0")[0]["sft/steps"] == 2


def test_resume_keeps_what_was_done_and_ends_the_rest(compared, read_page):
    runs = {run["name"]: run for run in compared.again.data["runs"]}
    assert compared.again.code == 0 and compared.again.folder == compared.first.folder
    assert (runs["fp16-seed0"]["attempts"], runs["bf16-seed0"]["attempts"]) == (1, 2)
    assert runs["bf16-seed0"]["code"] == 0 and runs["bf16-seed0"]["last_step"] == 2
    assert read_metrics(compared.again.folder / "fp16-seed0") == compared.records[0]
    assert [record["step"] for record in read_metrics(compared.again.folder / "bf16-seed0")] == [0, 1, 2]
    assert "bf16-seed0" in " ".join(read_page(compared.again.folder / "report.html").text)


def test_runs_that_were_left_behind_hold_the_folder(tmp_path):
    with only_writer(tmp_path) as lock:
        left = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(ConfigError, match="is being written by process"):
        with only_writer(tmp_path):
            pass
    left.communicate(b"\n")
    with only_writer(tmp_path):
        pass


def test_what_a_run_would_refuse_names_the_run(tiny, tmp_path, monkeypatch):
    """The check before a folder is made, here without its process."""
    monkeypatch.chdir(tmp_path)
    config = configured(tiny, "--task.reward_file", "absent.py", "--run.compile_cache", "null")
    with pytest.raises(ConfigError, match="compare, run bf16-seed0: task.reward_file: absent.py is no file"):
        compare._open_each([("bf16-seed0", to_dict(config))])
    assert not any(tmp_path.iterdir())
