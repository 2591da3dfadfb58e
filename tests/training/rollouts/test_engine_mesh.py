"""Sampling on a mesh of its own, on 4 virtual devices, in a process of its own."""

from pathlib import Path

import pytest

from jaxrl_fp16.parallel import MeshConfig


def test_a_sampler_may_divide_the_devices_otherwise(on_four_devices):
    on_four_devices(Path(__file__).with_name("sampling_mesh.py"))


@pytest.mark.parametrize("fields", [
    {"fsdp": 4, "rollout_tensor": 3}, {"fsdp": 2, "tensor": 2, "rollout_tensor": 1}, {"rollout_tensor": 2},
    {"fsdp": 2, "rollout_tensor": 0},
])
def test_what_a_sampler_cannot_divide_is_refused(fields):
    with pytest.raises(ValueError, match="rollout_tensor is .*; allowed: null, or a multiple of tensor, .* divides"):
        MeshConfig(**fields)
