"""What an engine that fails does to a command: started once more or given up in one line, and no process left."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import psutil
import pytest

from jaxrl_fp16.engines import EngineError, EngineRefused, pipe
from jaxrl_fp16.engines import weights as exchange
from jaxrl_fp16.sampling import SamplingConfig

PROMPTS, SAMPLING = [[1, 2, 3], [4], [5, 6]], SamplingConfig(max_new_tokens=6, group_size=2)
ROOT = Path(__file__).parents[2]
# What each fault is called in the line that ends the command.
SAYS = {
    "kill": "was killed by SIGKILL", "exit": "ended with code 7; its last line: the engine's last words",
    "hang": "gave no answer within rollout.deadline_seconds = 1 s", "memory": "out of memory): MemoryError",
    "version": "answered with weights of version 2; it was sent version 1", "rubbish": "answer is damaged",
    "nan": "log-probs of the engine are not finite", "above": "are not finite or above 0", "count": "gave 5 responses",
    "short": "log-probs of", "long": "responses of", "early": "ended neither with an end of text nor at the limit",
    "ids": "tokens are from",
}
SEEN = 3    # answers that the start takes, which sees a synchronisation act


def draw(engine, params, seed=7, sampling=SAMPLING, ends=(0,), watch=None):
    return engine.draw(params, PROMPTS, sampling, seed, ends, watch)


def equal(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "lengths", "logprobs"))


@pytest.fixture(scope="module")
def plain(small, start_fake, tmp_path_factory):
    """What an engine that does not fail draws."""
    with pytest.MonkeyPatch.context() as patch:
        return draw(start_fake(patch, tmp_path_factory.mktemp("plain")).engine, small[1])


def test_what_it_draws_is_decided_by_the_seed_alone(fake, small):
    """max_rows changes nothing but how many go at once; every row has a seed of its own."""
    found, params = fake(), small[1]
    first = draw(found.engine, params)
    assert equal(first, draw(found.engine, params)) and not equal(first, draw(found.engine, params, seed=8))
    parts = draw(found.engine, params, sampling=SamplingConfig(max_new_tokens=6, group_size=2, max_rows=3))
    assert equal(first, parts) and len(found.notes("answer")) == SEEN + 3 + 3
    assert len({row.tobytes() for row in first.tokens}) == 6
    assert first.finished.any() and (first.tokens[first.finished, first.lengths[first.finished] - 1] == 0).all()


def test_weights_are_sent_once_whole_and_leave_nothing(fake, small):
    found, params = fake(), small[1]
    draw(found.engine, params)
    assert found.engine.version == 1 and len(found.notes("load")) == 2
    place = found.engine._place
    assert place.is_dir() and not list(place.iterdir())
    draw(found.engine, params)
    assert len(found.notes("load")) == 2
    other = jax.tree.map(lambda x: x + 1, params)
    draw(found.engine, other)
    draw(found.engine, params)
    assert [line.split()[1] for line in found.notes("load")] == ["version-0", "version-1", "version-2", "version-3"]
    assert all("['config.json', 'model.safetensors']" in line for line in found.notes("load"))
    found.engine.close()
    assert not place.exists() and not found.living()


@pytest.mark.fault(36)
@pytest.mark.parametrize("fault", SAYS)
def test_an_engine_that_fails_once_is_started_once_more(fake, small, fault, plain):
    """With the same weights and the same seeds: what is drawn is what would have been."""
    found = fake(fault, at=SEEN, deadline_seconds=1.0 if fault == "hang" else 20.0)
    drawn = draw(found.engine, small[1])
    assert found.engine.restarts == 1 and found.engine.version == 1 and len(found.living()) == 1
    (line,) = found.lines
    assert SAYS[fault] in line and line.endswith("it is started once more")
    assert equal(drawn, plain)


@pytest.mark.fault(36)
@pytest.mark.parametrize("fault", ["kill", "hang", "memory", "nan", "count", "version"])
def test_one_that_fails_again_ends_the_command(fake, small, fault):
    found = fake(fault, at=SEEN, times=9, deadline_seconds=0.5 if fault == "hang" else 20.0)
    began = time.monotonic()
    with pytest.raises(EngineError, match="rollout.engine transformers failed twice: ") as caught:
        draw(found.engine, small[1])
    said = SAYS[fault].replace("= 1 s", "= 0.5 s")
    assert said in str(caught.value) and "\n" not in str(caught.value) and time.monotonic() - began < 10
    assert len(found.notes("process")) == 2 and not found.living()


def test_a_batch_says_how_far_it_is_and_can_be_ended(fake, small, monkeypatch):
    """An engine that hangs is not waited for once a signal came."""
    found, seen = fake("hang", at=SEEN, deadline_seconds=60.0), []
    monkeypatch.setattr(pipe, "PACE", 0.05)

    def watch(sampled):
        seen.append(sampled)
        if len(seen) == 3:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        draw(found.engine, small[1], watch=watch)
    assert time.monotonic() - began < 20 and not found.living() and found.engine.restarts == 0
    assert {(each.rows, each.of, each.tokens) for each in seen} == {(0, 6, 0)}
    assert len(draw(found.engine, small[1]).lengths) == 6     # the next batch starts it again


@pytest.mark.fault(36)
def test_another_dtype_is_refused_at_the_start(fake, small):
    found = fake("dtype")
    with pytest.raises(EngineRefused, match="weights in bfloat16 after loading; the run samples in float32"):
        found.engine.begin(small[1])
    assert len(found.notes("process")) == 1 and not found.living()


def test_what_will_never_start_is_refused_and_not_tried_again(fake, small):
    found = fake("no start")
    with pytest.raises(EngineRefused, match="Refused: this engine never starts"):
        found.engine.begin(small[1])
    assert len(found.notes("process")) == 1 and not found.living()


@pytest.mark.fault(37)
def test_weights_that_do_not_act_are_refused_at_the_start(fake, small):
    found = fake("stale")
    with pytest.raises(EngineRefused, match="answers alike, to 0, with weights that differ by a fifth"):
        found.engine.begin(small[1])
    assert not found.living()


def test_weights_beyond_the_dtype_are_not_sent(fake, small):
    found, params = fake(dtype="float16"), jax.tree.map(lambda x: x, small[1])
    found.engine.begin(params)
    params["embedding"] = params["embedding"].at[0, 0].set(1e6)
    with pytest.raises(EngineError, match="the weights cannot be sent: .*model.embed_tokens.weight holds 1e"):
        draw(found.engine, params)


def test_damaged_weights_are_noticed_by_the_child(fake, small, monkeypatch):
    found = fake()
    found.engine.begin(small[1])
    monkeypatch.setattr(exchange, "checksum", lambda path: "0")
    with pytest.raises(EngineError, match="failed twice: .*are not those that were written: config.json"):
        draw(found.engine, jax.tree.map(lambda x: x + 1, small[1]))


def test_a_folder_that_lacks_room_in_memory_goes_elsewhere(tmp_path, monkeypatch):
    with exchange.exchange_folder(str(tmp_path), 1) as place:
        assert place.parent == Path(exchange.MEMORY) and place.stat().st_mode & 0o777 == 0o700
    assert not place.exists()
    with exchange.exchange_folder(str(tmp_path), 2**60) as place:
        assert place.parent == tmp_path
    with pytest.raises(OSError):
        with exchange.exchange_folder(str(tmp_path / "absent"), 2**60):
            pass


def test_what_a_killed_run_left_is_removed_and_what_lives_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "ORPHANED", -1)
    (tmp_path / f"{exchange.PREFIX}dead").mkdir()
    with exchange.exchange_folder(str(tmp_path), 2**60) as held:
        with exchange.exchange_folder(str(tmp_path), 2**60) as other:
            assert sorted(path for path in tmp_path.iterdir()) == sorted([held, other])


@pytest.mark.fault(36)
def test_the_child_goes_with_a_parent_that_is_killed(tmp_path):
    """Even in the middle of an answer."""
    code = f"""if True:
        import os, sys
        from jaxrl_fp16.engines import pipe
        pipe.CHILD = {str(Path(__file__).with_name("fake_child.py"))!r}
        found = pipe.Pipe(sys.executable, {{"FAKE_FAULT": "hang", "FAKE_LOG": {str(tmp_path / "log")!r}}}, 60)
        found.ask({{"op": "open", "engine": "vllm", "settings": {{}}}})
        print(found.pid, flush=True)
        sys.stdin.read()
        """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_childs_file_needs_nothing_of_ours():
    """Alone in an interpreter without any package."""
    path = ROOT / "jaxrl_fp16" / "engines" / "child.py"
    code = f"import runpy, sys, json; runpy.run_path({str(path)!r}); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"jaxrl_fp16", "jax", "numpy", "torch", "pickle", "socket"} & set(json.loads(done.stdout))
