import io
import json
import math
import os
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxrl_fp16 import logs
from jaxrl_fp16.logs import LoggingConfig, RunLog, read_metrics, truncate

QUIET = LoggingConfig(tensorboard=False)


def plain_console():
    return rich.console.Console(file=io.StringIO(), width=120)


def terminal():
    return rich.console.Console(
        file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False, _environ={"TERM": "xterm"}
    )


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_metrics_are_strict_json_flushed_by_the_line(tmp_path):
    with RunLog(tmp_path / "run", QUIET, steps=2, console=plain_console()) as log:
        log.metrics(
            1,
            {
                "a": 1,
                "b": np.float32(0.5),
                "c": jnp.float16(2),
                "d": jnp.int32(3),
                "e": True,
                "f": "text",
                "g": [1, np.int64(2)],
                "h": None,
                "i": np.array([4.0]),
            },
        )
        assert lines(tmp_path / "run/metrics.jsonl") == [
            {
                "step": 1,
                "a": 1,
                "b": 0.5,
                "c": 2.0,
                "d": 3,
                "e": True,
                "f": "text",
                "g": [1, 2],
                "h": None,
                "i": 4.0,
            }
        ]
        log.metrics(2, {"nan": math.nan, "up": np.float32(np.inf), "down": jnp.float16(-jnp.inf)})
    record = lines(tmp_path / "run/metrics.jsonl")[1]
    assert record == {"step": 2, "nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    read = read_metrics(tmp_path / "run")[1]
    assert math.isnan(read["nan"]) and read["up"] == math.inf and read["down"] == -math.inf


@pytest.mark.parametrize("value", [object(), np.zeros(2), {1, 2}])
def test_a_metric_that_is_no_scalar_is_refused_by_name(tmp_path, value):
    with (
        RunLog(tmp_path, QUIET, console=plain_console()) as log,
        pytest.raises(ValueError, match="loss: .*allowed"),
    ):
        log.metrics(1, {"loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_samples_keep_the_first_few_of_each_step(tmp_path):
    with RunLog(tmp_path, LoggingConfig(tensorboard=False, samples=2), console=plain_console()) as log:
        log.samples(3, ({"text": f"line\n{i} é \u2028 \ud800", "reward": np.float32(i)} for i in range(9)))
        log.samples(4, [])
    records = [
        json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=False)
    ]
    assert [(r["step"], r["reward"]) for r in records] == [(3, 0.0), (3, 1.0)]
    assert records[0]["text"].startswith("line\n0 é \u2028 ")


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "NaN"}\n{"step": 2, "lo')
    (record,) = read_metrics(tmp_path)
    assert record["step"] == 1 and math.isnan(record["loss"])


def test_the_status_is_one_live_line_or_a_line_now_and_then():
    live, plain = terminal(), plain_console()
    with RunLog(None, QUIET, console=live) as log:
        log.status("a 1/9")
        log.status("a 2/9")
    assert "a 1/9" in live.file.getvalue() and "a 2/9" in live.file.getvalue()
    log = RunLog(None, QUIET, console=plain)
    log.status("too early")
    log.status("now", seconds=0)
    assert plain.file.getvalue() == "now\n"


def test_truncate_cuts_back_to_a_step_and_drops_half_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "late": 1}\n{"st'
    )
    (tmp_path / "samples.jsonl").write_text('{"step": 2}\n[1]\n{"step": 2}')
    truncate(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "late": 1}\n'
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 2}\n{"step": 2}\n'
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "samples.jsonl"]
    truncate(tmp_path / "absent", 2)


def test_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        with RunLog(tmp_path, QUIET, resumed=step - 1, console=plain_console()) as log:
            log.metrics(step, {})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_tensorboard_events_are_written(tmp_path, caplog):
    with RunLog(tmp_path, LoggingConfig(), resumed=4, console=plain_console()) as log:
        log.metrics(5, {"loss": 0.25, "bad": math.nan, "name": "x"})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes() and b"bad" not in events.read_bytes() and not caplog.records


@pytest.mark.fault(31)
def test_a_failing_sink_is_dropped_with_one_line(tmp_path, monkeypatch):
    written = []

    def fail(step, numbers):
        written.append(step)
        raise ConnectionError("gone")

    monkeypatch.setattr(logs, "_open_tensorboard", lambda folder, resumed: (fail, fail))
    console = plain_console()
    with RunLog(tmp_path, LoggingConfig(), console=console) as log:
        log.metrics(1, {"a": 1})
        log.metrics(2, {"a": 2})
    assert written == [1] and len(read_metrics(tmp_path)) == 2
    assert console.file.getvalue().count("tensorboard failed and is dropped") == 1


def test_wandb_that_is_absent_is_refused_before_anything_starts():
    if logs.importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ValueError, match=r"wandb: true needs .*allowed: false"):
        LoggingConfig(wandb=True)


def test_wandb_gets_config_and_metrics(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    stub = types.ModuleType("wandb")
    stub.__spec__ = types.SimpleNamespace()
    stub.init = lambda **options: calls.append(options["config"]) or run
    monkeypatch.setitem(sys.modules, "wandb", stub)
    config = LoggingConfig(tensorboard=False, wandb=True)
    with RunLog(tmp_path, config, facts={"seed": 1}, console=plain_console()) as log:
        log.metrics(1, {"a": 1, "text": "x"})
    assert calls == [{"seed": 1}, (1, {"a": 1.0}), "finish"]


def test_wandb_goes_on_with_the_run_that_it_had(tmp_path, monkeypatch):
    """Also where the folder has moved since; another folder is another run."""
    opened = []
    stub = types.ModuleType("wandb")
    stub.__spec__ = types.SimpleNamespace()
    stub.init = lambda **options: opened.append((options["id"], options["resume"])) or types.SimpleNamespace(
        log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for folder, resumed in (("a", None), ("b", None), ("a", 3), ("moved", 4)):
        if folder == "moved":
            (tmp_path / "a").rename(tmp_path / "moved")
        with RunLog(tmp_path / folder, LoggingConfig(tensorboard=False, wandb=True), resumed=resumed,
                    console=plain_console()):
            pass
    ids = [id for id, _ in opened]
    assert ids[0] == ids[2] == ids[3] != ids[1] and all(len(id) == 8 for id in ids)
    assert {resume for _, resume in opened} == {"allow"}


def test_only_the_primary_process_writes(tmp_path):
    console = plain_console()
    with RunLog(tmp_path / "run", LoggingConfig(), primary=False, console=console) as log:
        log.metrics(1, {"a": 1})
        log.samples(1, [{"text": "x"}])
        log.say("hello")
    assert not (tmp_path / "run").exists() and console.file.getvalue() == ""


def test_without_a_terminal_some_steps_are_plain_lines(tmp_path):
    console = plain_console()
    with RunLog(tmp_path, LoggingConfig(tensorboard=False, every=4), steps=10, console=console) as log:
        for step in range(1, 11):
            log.metrics(step, {"reward": step / 10, "loss_scale": 65536.0, "mismatch/kl_k3": math.nan})
    shown = console.file.getvalue()
    assert [line.split("/")[0].split()[1] for line in shown.splitlines()] == ["1", "4", "8", "10"]
    assert "\x1b" not in shown and "\r" not in shown
    first, second, *_, last = shown.splitlines()
    assert first == "step  1/10  reward 0.100  KL nan  scale 65,536"
    assert second.endswith("left 0:00:00") and "left" not in last


@pytest.mark.parametrize("seconds, wanted", [(0.1, [1, 200]), (1, [1, *range(31, 200, 30), 200]), (45, range(1, 201))])
def test_progress_comes_by_time_into_a_file(seconds, wanted, tmp_path, monkeypatch):
    """However long the steps take, a line comes each half minute, and with the first step and the last."""
    now = [0.0]
    monkeypatch.setattr("jaxrl_fp16.console.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    console = plain_console()
    with RunLog(tmp_path, LoggingConfig(tensorboard=False), steps=200, console=console) as log:
        for step in range(1, 201):
            now[0] += seconds
            log.metrics(step, {"reward": 0.5})
    assert [int(line.split("/")[0].split()[1]) for line in console.file.getvalue().splitlines()] == list(wanted)


def test_what_goes_on_in_a_long_step_is_told_into_a_file(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("jaxrl_fp16.console.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for console, wanted in ((plain_console(), ["step 1: 4", "step 1: 8"]), (terminal(), [])):
        log = RunLog(None, QUIET, console=console)
        for stage in range(1, 10):
            now[0] += 8.0
            log.stage(f"step 1: {stage}")
        assert console.file.getvalue().splitlines() == wanted


def test_a_line_of_what_goes_on_takes_no_steps_place(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr("jaxrl_fp16.console.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    console = plain_console()
    with RunLog(tmp_path, LoggingConfig(tensorboard=False), steps=6, console=console) as log:
        for step in range(1, 7):
            now[0] += 35.0
            log.stage(f"step {step}: learning")
            now[0] += 5.0
            log.metrics(step, {"reward": 0.5})
    said = [line.partition("  ")[0] for line in console.file.getvalue().splitlines()]
    assert [text for text in said if "/" in text] == [f"step {step}/6" for step in range(1, 7)]
    assert "step 2: learning, 35 s after step 1" in said


def test_a_long_step_says_how_long_and_a_short_one_leaves_the_line_to_progress(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("jaxrl_fp16.console.time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def lines(steps, sampling, learning):
        console = plain_console()
        log = RunLog(None, QUIET, steps=steps, console=console)
        for step in range(1, steps + 1):
            log.stage(f"step {step}: sampling")
            now[0] += sampling
            log.stage(f"step {step}: learning")
            now[0] += learning
            log.metrics(step, {})
        return [line.partition("  left")[0] for line in console.file.getvalue().splitlines()]

    assert lines(3, 40, 35) == ["step 1: learning", "step 1/3", "step 2: learning, 40 s after step 1", "step 2/3",
                                "step 3: learning, 40 s after step 2", "step 3/3"]
    assert lines(130, 0.25, 0.25) == [f"step {step:>3}/130" for step in (1, 61, 121, 130)]


def test_what_would_steer_a_terminal_is_not_shown():
    console = plain_console()
    log = RunLog(None, QUIET, console=console)
    log.say("a\x1b[2J\x07\x9b31m\rb\x00\x7f\tc\n\u202ed [/foo] \ud800 é 数 \U0001f469\u200d\U0001f4bb")
    log.table("\x1b[1mtitle", ["\x08column"], [["\x1b]0;owned\x07cell"]])
    shown = console.file.getvalue()
    assert shown.startswith("a[2J31mb        c\nd [/foo] \ufffd é 数 \U0001f469\u200d\U0001f4bb\n")
    assert not set("\x1b\x07\x08\x9b\r\x00\x7f\u202e") & set(shown) and "]0;ownedcell" in shown


def test_on_a_terminal_one_line_lives_below_what_is_said(tmp_path):
    console = terminal()
    with RunLog(tmp_path, QUIET, steps=3, console=console) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"reward": 0.5})
            log.say(f"said [{step}]")
    shown = console.file.getvalue()
    assert "step 1/3" in shown and "step 3/3" in shown and "said [2]" in shown and "\x1b[2K" in shown


def test_table_and_brackets_are_shown_as_they_are():
    console = plain_console()
    RunLog(None, QUIET, console=console).table(
        "what [happened]", ["metric", "before"], [["[red]reward", 0.5]]
    )
    assert all(
        text in console.file.getvalue() for text in ("what [happened]", "metric", "[red]reward", "0.5")
    )


def test_announce_speaks_only_of_what_takes_long():
    console = plain_console()
    log = RunLog(None, QUIET, console=console)
    with log.announce("compiling the sampler", after=5):
        pass
    assert console.file.getvalue() == ""
    with log.announce("compiling the update", after=0.02):
        for _ in range(500):
            if console.file.getvalue():
                break
            time.sleep(0.01)
        assert console.file.getvalue() == "compiling the update ...\n"
    assert console.file.getvalue().splitlines()[1].startswith("compiling the update: 0.")
    with pytest.raises(RuntimeError, match="boom"), log.announce("x", after=5):
        raise RuntimeError("boom")


@pytest.mark.fault(31)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    code = """if True:
        import sys
        from jaxrl_fp16.logs import LoggingConfig, RunLog
        with RunLog(sys.argv[1], LoggingConfig(tensorboard=False, every=1), steps=300) as log:
            for step in range(1, 301):
                log.metrics(step, {"reward": 1.0, "note": "x" * 1000})
        """
    writer = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=logs.Path(__file__).parents[1],
    )
    writer.stdout.readline()
    writer.stdout.close()
    errors = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait() == 0 and errors == b""
    assert len(read_metrics(tmp_path)) == 300
