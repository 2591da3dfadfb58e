"""Meshes and the arithmetic of their refusals; shardings by rule; what runs on 4 devices, in 2 processes."""

import os
from pathlib import Path
import socket
import subprocess
import sys

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
import numpy as np
import pytest

from jaxrl_fp16.config import parse_config
from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, param_axes, param_shapes, param_shardings
from jaxrl_fp16.parallel import (
    MESH_AXES, MeshConfig, axes_sharding, initialize_distributed, make_mesh, row_shards, shard_batch, to_host,
)

HERE = Path(__file__).parent


def abstract(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("fields, devices, shape", [
    ({}, 1, (1, 1, 1)),
    ({}, 8, (8, 1, 1)),
    (dict(fsdp=4), 8, (2, 4, 1)),
    (dict(fsdp=2, tensor=4), 8, (1, 2, 4)),
    (dict(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
])
def test_data_takes_what_is_left(fields, devices, shape):
    assert MeshConfig(**fields).shape(devices) == shape


@pytest.mark.parametrize("fields, devices, pattern", [
    (dict(fsdp=3), 4, "data what is left x fsdp 3 x tensor 1 does not fit 4 .* x tensor, here 3, divides 4"),
    (dict(data=1, fsdp=2), 4, "data 1 x fsdp 2 x tensor 1 does not fit 4 .* a product of 4, here it is 2"),
    (dict(data=2, tensor=2), 1, "allowed: a product of 1, here it is 4"),
    (dict(tensor=2), 1, "here 2, divides 1"),
])
def test_a_mesh_that_does_not_fit_is_refused(fields, devices, pattern):
    with pytest.raises(ValueError, match=pattern):
        MeshConfig(**fields).shape(devices)


@pytest.mark.parametrize("fields", [dict(data=0), dict(data=-2), dict(fsdp=0), dict(tensor=-1)])
def test_sizes_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match="allowed"):
        MeshConfig(**fields)
    with pytest.raises(ValueError, match="allowed"):
        parse_config(MeshConfig, fields)


def test_one_device_makes_a_mesh():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == dict(data=1, fsdp=1, tensor=1) and mesh.axis_types == (AxisType.Auto,) * 3


# -- rules ------------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
             head_dim=6)


def test_parameters_are_divided_by_rule():
    model = Decoder(DecoderConfig(family="qwen2", **SHAPE))
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(model, abstract(1, 2, 4)))
    layers = specs["layers"]
    assert specs["embedding"] == specs["head"] == PartitionSpec("tensor", "fsdp")
    assert layers["attention"]["q"]["kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    # 2 key-value heads do not divide over 4 devices.
    assert layers["attention"]["k"]["kernel"] == PartitionSpec(None, "fsdp", None, None)
    assert layers["attention"]["o"]["kernel"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert layers["mlp"]["gate"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert layers["mlp"]["down"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert layers["mlp_norm"]["scale"] == PartitionSpec(None, None)


def test_every_parameter_has_axes():
    body = Decoder(DecoderConfig(family="llama", **SHAPE, qkv_bias=True, output_bias=True, mlp_bias=True))
    for model in (body, Critic(body)):
        same = jax.tree.map(lambda axes, leaf: len(axes) == leaf.ndim, param_axes(model), param_shapes(model))
        assert all(jax.tree.leaves(same))


def test_unknown_or_too_few_axes_are_refused():
    with pytest.raises(ValueError, match="logical axis 'width' is unknown; allowed: embed, "):
        axes_sharding(("width",), (4,), abstract(1, 1, 1))
    with pytest.raises(ValueError, match="1 logical axes .* for shape \\(4, 4\\); allowed: one for each"):
        axes_sharding(("embed",), (4, 4), abstract(1, 1, 1))


def test_rows_that_do_not_divide_are_refused():
    mesh = abstract(2, 2, 4)
    assert row_shards(mesh) == 4
    with pytest.raises(ValueError, match="6 rows do not divide over data 2 x fsdp 2; .*multiples of 4"):
        shard_batch({"tokens": np.zeros((6, 3))}, mesh)


def test_a_batch_keeps_its_values_and_its_gaps():
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = shard_batch({"a": np.arange(6).reshape(3, 2), "b": None, "c": 2.5}, mesh)
    assert batch["b"] is None and float(batch["c"]) == 2.5
    np.testing.assert_array_equal(to_host(batch["a"]), np.arange(6).reshape(3, 2))


# -- several devices, several processes ----------------------------------------------------------------


def run_python(*arguments, **environment):
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=os.environ | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_on_four_devices(on_four_devices):
    on_four_devices(HERE / "four_devices.py")


def test_in_two_processes(quick_environment, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    run = quick_environment | {"JAXRL_COORDINATOR": address, "JAXRL_NUM_PROCESSES": "2"}
    runs = [run_python(HERE / "two_processes.py", tmp_path, JAXRL_PROCESS_ID=str(index), **run)
            for index in range(2)]
    outs = [run.communicate(timeout=300)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(outs)


def test_alone_nothing_is_started(monkeypatch):
    monkeypatch.delenv("JAXRL_COORDINATOR", raising=False)
    assert initialize_distributed() is False


@pytest.mark.parametrize("given, pattern", [
    (dict(coordinator="a:1"), r"lacks num_processes \(JAXRL_NUM_PROCESSES\), process_id \(JAXRL_PROCESS_"),
    (dict(num_processes=2, process_id=0), "lacks coordinator"),
    (dict(coordinator="here", num_processes=2, process_id=0), "coordinator is 'here'; allowed: host:port"),
    (dict(coordinator="a:1", num_processes="2?", process_id=0), "num_processes is '2.'; allowed: an integer"),
    (dict(coordinator="a:1", num_processes=2, process_id=2), "process_id is 2; allowed: 0 to .*, here 1"),
])
def test_a_half_described_run_is_refused(given, pattern):
    with pytest.raises(ValueError, match=pattern):
        initialize_distributed(**given)
