import json
import os
from pathlib import Path
import subprocess
import sys
import time

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.training.checkpoints import checkpoint
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig, CheckpointError, Checkpoints

ROOT = Path(__file__).parents[3]


@struct.dataclass
class State:
    params: dict
    opt_state: optax.OptState
    scale: jax.Array
    key: jax.Array
    raw_key: jax.Array


def make_state(seed=0):
    params = {
        "dense": {
            "kernel": jax.random.normal(jax.random.key(seed), (3, 4)),
            "bias": jnp.zeros(4, jnp.bfloat16),
        },
        "empty": jnp.zeros((2, 0), jnp.float16),
    }
    return State(
        params,
        optax.adam(1e-3).init(params),
        jnp.float32(2.0**16),
        jax.random.key(seed + 1),
        jax.random.PRNGKey(seed + 2),
    )


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(tmp_path, said):
    """opened(**config) -> Checkpoints in the same folder each time, its lines in `said`."""
    return lambda **config: Checkpoints(
        tmp_path / "checkpoints", CheckpointConfig(**config), say=said.append, resolved="steps: 3\n"
    )


def saved(opened, *steps):
    with opened(keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step})
    return checkpoints.folder


def test_whole_state_round_trips_bit_by_bit(opened, said):
    state = make_state()
    with opened() as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.save(7, state, {"epoch": 1, "order": [3, 1, 2]})
    with opened() as checkpoints:
        assert checkpoints.latest() == 7
        for template in (state, abstract(state)):
            restored, extra, step = checkpoints.restore(template)
            assert_same(restored, state)
            assert extra == {"epoch": 1, "order": [3, 1, 2]} and step == 7
    assert (checkpoints.folder / "7/config.yaml").read_text() == "steps: 3\n" and said == []


def test_other_key_kinds_keep_theirs(opened):
    state = {"key": jax.random.key(3, impl="rbg"), "keys": jax.random.split(jax.random.key(1), 5)}
    with opened() as checkpoints:
        checkpoints.save(1, state)
        assert_same(checkpoints.restore(abstract(state))[0], state)
        with pytest.raises(CheckpointError, match=r"key is key<rbg>\[\], wanted is key<fry>\[\]"):
            checkpoints.restore({**state, "key": jax.random.key(3)})


def test_a_state_may_be_donated_as_soon_as_save_returns(opened):
    state = {"x": jnp.arange(1_000_000, dtype=jnp.float32)}
    wanted = np.array(state["x"])
    with opened() as checkpoints:
        checkpoints.save(1, state)
        jax.block_until_ready(
            jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)(state)
        )
        restored, _, _ = checkpoints.restore(jax.eval_shape(lambda: {"x": jnp.asarray(wanted)}))
    np.testing.assert_array_equal(restored["x"], wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.replace(scale=jnp.float16(1)), r"scale is float32\[\], wanted is float16\[\]"),
        (
            lambda s: s.replace(raw_key=jnp.zeros(4, jnp.uint32)),
            r"raw_key is uint32\[2\], wanted is uint32\[4\]",
        ),
        (lambda s: s.replace(params={"dense": s.params["dense"]}), r"params.empty is .*, wanted is nothing"),
        (
            lambda s: s.replace(params={**s.params, "new": jnp.zeros(1)}),
            r"params.new is nothing, wanted is float32\[1\]",
        ),
    ],
)
def test_another_model_or_dtype_is_refused(opened, change, message):
    saved(opened, 1)
    with opened() as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(change(make_state()))


def test_the_newest_few_are_kept(opened):
    with opened(keep=2, every=5) as checkpoints:
        for step in (5, 10, 15, 20):
            checkpoints.save(step, make_state(step))
        assert [step for step in range(11) if checkpoints.due(step)] == [0, 5, 10]
    assert checkpoints.steps() == [15, 20]
    assert sorted(os.listdir(checkpoints.folder)) == ["15", "20"]
    assert not any(Checkpoints("x", CheckpointConfig(every=0)).due(step) for step in range(9))


def test_the_best_is_kept_too(opened):
    scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: float("nan"), 5: 0.9, 6: None, 7: 0.1}
    with opened(keep=2, best="eval/a/accuracy") as checkpoints:
        assert checkpoints.is_empty() and checkpoints.best() is None
        for step, score in scores.items():
            metrics = {"reward": 1.0} if score is None else {"eval/a/accuracy": np.float32(score)}
            checkpoints.save(step, make_state(step), metrics=metrics)
            checkpoints.wait()
            if step == 4:
                assert checkpoints.steps() == [2, 3, 4]
        assert checkpoints.steps() == [5, 6, 7] and checkpoints.best() == 5     # of equals the later one
    (checkpoints.folder / "5" / "about.json").write_text("{")
    with opened(best="eval/a/accuracy") as checkpoints:
        assert checkpoints.best() == 7 and not checkpoints.is_empty()


def test_a_checkpoint_gives_its_arrays_without_a_template(opened):
    state = make_state()
    with opened() as checkpoints:
        checkpoints.save(1, state, {"position": 3})
        arrays, extra = checkpoints.arrays(1)
        with pytest.raises(CheckpointError, match="no sound checkpoint of step 2"):
            checkpoints.arrays(2)
    assert extra == {"position": 3} and arrays["params.empty"].shape == (2, 0)
    np.testing.assert_array_equal(arrays["params.dense.kernel"], state.params["dense"]["kernel"])
    np.testing.assert_array_equal(arrays["key"], jax.random.key_data(state.key))


def test_saving_a_step_twice(opened, said):
    with opened() as checkpoints:
        assert checkpoints.save(1, make_state())
        assert not checkpoints.save(1, make_state(5))
        assert said == ["the checkpoint of step 1 is there already and stays as it is"]
    with opened() as checkpoints:
        with pytest.raises(CheckpointError, match="1: exists already; allowed"):
            checkpoints.save(1, make_state(5))
        assert_same(checkpoints.restore(make_state())[0], make_state())
        assert not checkpoints.save(1, make_state())  # where a resumed run stops at once


def test_unfinished_folders_are_skipped_aloud_and_replaced(opened, said):
    folder = saved(opened, 3)
    (folder / "4").mkdir()
    (folder / "5.partial/state").mkdir(parents=True)
    with opened() as checkpoints:
        assert checkpoints.restore(make_state())[2] == 3 and checkpoints.latest() == 3
        assert len(said) == 2 and all("skipped" in line for line in said) and "/4:" in said[0]
        checkpoints.save(4, make_state(4))
    assert checkpoints.latest() == 4 and not (folder / "5.partial").exists()


def largest_payload(path):
    return max(
        (file for file in (path / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_a_bit(largest_payload(path)),
        lambda path: flip_a_bit(path / "about.json"),
        lambda path: flip_a_bit(path / "manifest.json"),
        lambda path: (path / "manifest.json").write_bytes(b""),
        lambda path: os.truncate(largest_payload(path), 10),
        lambda path: os.truncate(largest_payload(path), 0),
        lambda path: largest_payload(path).unlink(),
        lambda path: (path / "state/more").write_text("x"),
    ],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(opened, said, damage):
    folder = saved(opened, 1, 2)
    damage(folder / "2")
    with opened(keep=2) as checkpoints:
        restored, extra, step = checkpoints.restore(make_state())
        assert step == 1 and extra == {"position": 1} and len(said) == 1 and "2: damaged" in said[0]
        assert_same(restored, make_state(1))
        assert checkpoints.latest() == 1
        checkpoints.save(2, make_state(2))  # the run comes by that step again
        assert_same(checkpoints.restore(make_state())[0], make_state(2))
    assert sorted(os.listdir(folder)) == ["1", "2", "2.damaged"]


@pytest.mark.fault(25)
def test_sound_files_that_are_no_checkpoint_are_passed_over_too(opened, said):
    """Their checksums fit: what was written was wrong."""
    folder = saved(opened, 1, 2)
    about = json.loads((folder / "2" / "about.json").read_text())
    (folder / "2" / "about.json").write_text(json.dumps({"step": 2, "leaves": about["leaves"]}))
    checkpoint.manifest.write_manifest(folder / "2")
    with opened() as checkpoints:
        restored, extra, step = checkpoints.restore(make_state())
    assert step == 1 and "2: damaged, KeyError: 'extra'; skipped" in said[0]
    assert_same(restored, make_state(1))


def test_no_checkpoint_or_not_that_one(opened, tmp_path):
    with opened() as checkpoints, pytest.raises(CheckpointError, match="no sound checkpoint; .*: none"):
        checkpoints.restore(make_state())
    saved(opened, 1, 2)
    with opened() as checkpoints:
        assert_same(checkpoints.restore(make_state(), step=1)[0], make_state(1))
        with pytest.raises(CheckpointError, match="no sound checkpoint of step 3; .*: 1, 2"):
            checkpoints.restore(make_state(), step=3)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(opened):
    with opened() as checkpoints:
        with pytest.raises(ValueError, match="a.b: int is not allowed"):
            checkpoints.save(1, {"a": {"b": 3}})
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(1, make_state(), {"loss": float("nan")})
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(1, make_state(), {"order": jnp.ones(2)})
        with pytest.raises(ValueError, match="two leaves"):
            checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
    assert not checkpoints.folder.exists()


def test_an_error_in_the_background_surfaces_and_older_ones_stay(opened, monkeypatch, said):
    folder = saved(opened, 1)

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.manifest, "write_manifest", full)
    message = f"step 2 could not be written .*No space left.*the last checkpoint is {folder}/1"
    with opened() as checkpoints:
        checkpoints.save(2, make_state())
        with pytest.raises(CheckpointError, match=message):
            checkpoints.wait()
    with pytest.raises(CheckpointError, match=message), opened() as checkpoints:
        checkpoints.save(2, make_state())
    with pytest.raises(KeyError), opened() as checkpoints:  # the first error is the one that counts
        checkpoints.save(2, make_state())
        raise KeyError
    assert "step 2 could not be written" in said[-1] and os.listdir(folder) == ["1"]


def run_python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.fault(24)
def test_a_disk_that_takes_no_more_leaves_the_older_one(tmp_path):
    code = """if True:
        import resource, signal, sys
        import jax, jax.numpy as jnp
        from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointError, Checkpoints
        state = {"x": jax.random.normal(jax.random.key(0), (1000, 1000))}
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, state)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))      # a write past it fails
        checkpoints = Checkpoints(sys.argv[1])
        try:
            with checkpoints:
                checkpoints.save(2, state)
        except CheckpointError as error:
            print("refused:", error)
        print(checkpoints.steps())
        """
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "refused: checkpoint of step 2 could not be written" in done.stdout and done.stdout.endswith(
        "[1]\n"
    )
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.fault(22)
def test_a_save_that_is_killed_costs_only_itself(tmp_path):
    code = """if True:
        import sys, time
        import jax.numpy as jnp
        from jaxrl_fp16.training.checkpoints import checkpoint
        with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, {"x": jnp.ones(5)})
            checkpoints.wait()
            checkpoint.manifest.write_manifest = lambda folder: time.sleep(60)
            checkpoints.save(2, {"x": jnp.zeros(5)})
            print("saving", flush=True)
            time.sleep(60)
        """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline() == b"saving\n"
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob("2.partial/state/_CHECKPOINT_METADATA")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    said = []
    with Checkpoints(tmp_path, say=said.append) as checkpoints:
        restored, _, step = checkpoints.restore({"x": jnp.zeros(5)})
    assert step == 1 and restored["x"].tolist() == [1.0] * 5 and "2.partial: not a finished" in said[0]


@pytest.mark.fault(26)
def test_restored_on_another_mesh_the_values_are_equal(tmp_path):
    code = """if True:
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from jaxrl_fp16.training.checkpoints.checkpoint import Checkpoints
        wanted = np.arange(64, dtype=np.float32).reshape(8, 8)
        def state(shape, spec):
            mesh = Mesh(np.array(jax.devices()[:shape[0] * shape[1]]).reshape(shape), ("a", "b"))
            put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
            return {"x": put(wanted, spec), "key": put(jax.random.key(5), P())}
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, state((4, 1), P("a")))
            for shape, spec in (((2, 2), P("b", "a")), ((1, 4), P(None, "b")), ((1, 1), P())):
                template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                                        state(shape, spec))
                restored, _, _ = checkpoints.restore(template)
                assert restored["x"].sharding == template["x"].sharding, restored["x"].sharding
                assert np.array_equal(restored["x"], wanted)
                data = jax.random.key_data(restored["key"])
                assert data.tolist() == jax.random.key_data(jax.random.key(5)).tolist()
                assert restored["key"].sharding.device_set == template["key"].sharding.device_set
        """
    done = run_python(code, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert done.returncode == 0, done.stderr


def test_about_is_readable_by_people(opened):
    about = json.loads((saved(opened, 1) / "1/about.json").read_text())
    assert about["step"] == 1 and about["leaves"]["params.dense.bias"] == ["bfloat16", [4]]
