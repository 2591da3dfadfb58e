"""A tiny model, and an engine that fails as it is told."""

from pathlib import Path
import types

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from jaxrl_fp16.engines import Engine, RolloutConfig, find_python, pipe
from jaxrl_fp16.engines.weights import changed_adapters
from jaxrl_fp16.models import Decoder, DecoderConfig, LoraConfig, init_lora, param_shapes
from jaxrl_fp16.precision import get_precision

FAKE = Path(__file__).with_name("fake_child.py")


@pytest.fixture(scope="session")
def small():
    """`(model, params)`, tied, of 23 ids."""
    model = Decoder(DecoderConfig(family="qwen2", vocab_size=23, hidden_size=16, intermediate_size=24, num_layers=2,
                                  num_heads=2, num_kv_heads=1, head_dim=8, tie_embeddings=True))
    generator = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(0.5 * generator.normal(size=leaf.shape), jnp.float32),
                               param_shapes(model))


@pytest.fixture(scope="session")
def adapted(small):
    """`(model, [{"base", "lora"}, ...])`: the same with adapters, first as they begin, then three that act."""
    model = small[0].clone(lora=LoraConfig(rank=4, alpha=6.0))
    first = init_lora(model, small[1], jax.random.key(1), policy=get_precision("fp32").policy)
    return model, [first, *(changed_adapters(model, first, seed) for seed in (1, 2, 3))]


@pytest.fixture(scope="session")
def start_fake(small):
    """start_fake(patch, folder, fault, at=.., times=.., dtype=.., model=.., **config) -> an Engine over the fake child;
    what it said in `.lines`, the child's notes by `.notes()`, living children by `.living()`."""
    made = []

    def start(patch, folder, fault="", at=0, times=1, dtype="float32", model=None, **config):
        log = folder / "fake.log"
        patch.setattr(pipe, "CHILD", FAKE)
        for name, value in (("LOG", log), ("FAULT", fault), ("AT", at), ("TIMES", times)):
            patch.setenv(f"FAKE_{name}", str(value))
        config = RolloutConfig(engine="transformers", **config)
        settings = {"dtype": dtype, "device": "cpu", "memory_fraction": 0.5, "seed": 0, "max_length": 20}
        lines = []
        made.append(Engine(config, find_python(config), model or small[0], settings, lines.append))
        notes = lambda kind: [line for line in log.read_text().splitlines() if line.startswith(kind)]
        living = lambda: [line for line in notes("process") if psutil.pid_exists(int(line.split()[1]))]
        return types.SimpleNamespace(engine=made[-1], lines=lines, notes=notes, living=living)

    yield start
    for engine in made:
        engine.close()


@pytest.fixture
def fake(monkeypatch, tmp_path, start_fake):
    """`start_fake` with patches and a folder of the test's own; its engines end with the test."""
    made = []

    def start(*arguments, **more):
        made.append(start_fake(monkeypatch, tmp_path, *arguments, **more))
        return made[-1]

    yield start
    for found in made:
        found.engine.close()
