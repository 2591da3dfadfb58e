"""The devices as a grid of three axes: data x fsdp x tensor."""

import dataclasses
from typing import Annotated

from annotated_types import Ge
import jax
from jax.sharding import AxisType, Mesh

from jaxrl_fp16.config import Doc

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each way of dividing the work gets. Their product is the number of devices."""

    data: Annotated[int, Ge(-1), Doc("copies of the model, each with its own rows; -1: as many as devices allow")] = -1
    fsdp: Annotated[int, Ge(1), Doc("devices that a copy's parameters are divided over, each with its own rows")] = 1
    tensor: Annotated[int, Ge(1), Doc("devices that heads and widths are divided over, on the same rows")] = 1
    rollout_tensor: Annotated[
        int | None, Ge(1),
        Doc("the same while sampling, a multiple of mesh.tensor that divides fsdp x tensor: each device then holds "
            "less of the weights that it decodes with, and more of the rows; null: mesh.tensor"),
    ] = None

    def __post_init__(self):
        for name, least in (("data", -1), ("fsdp", 1), ("tensor", 1)):
            value = getattr(self, name)
            if value < least or value == 0:
                raise ValueError(f"{name} is {value}; allowed: integers >= 1{', or -1' if least < 0 else ''}")
        sampled = self.rollout_tensor
        if sampled is not None and (sampled < 1 or sampled % self.tensor or self.fsdp * self.tensor % sampled):
            raise ValueError(f"rollout_tensor is {sampled}; allowed: null, or a multiple of tensor, {self.tensor}, "
                             f"that divides fsdp x tensor, {self.fsdp} x {self.tensor}")

    def shape(self, devices):
        """(data, fsdp, tensor) for that many devices; ValueError if they do not fit."""
        shared = self.fsdp * self.tensor
        data = devices // shared if self.data == -1 else self.data
        if data * shared != devices or data == 0:
            asked, allowed = self.data, f"a product of {devices}, here it is {data * shared}"
            if asked == -1:
                asked, allowed = "what is left", f"fsdp x tensor, here {shared}, divides {devices}"
            raise ValueError(f"mesh of data {asked} x fsdp {self.fsdp} x tensor {self.tensor} "
                             f"does not fit {devices} devices; allowed: {allowed}")
        return data, self.fsdp, self.tensor


def sampling_mesh(config, mesh):
    """The mesh that a sampler works on: `mesh`, or its devices in the same order with `rollout_tensor` along tensor."""
    data, fsdp, tensor = mesh.devices.shape
    wanted = config.rollout_tensor or tensor
    if wanted == tensor:
        return mesh
    return Mesh(mesh.devices.reshape(data, fsdp * tensor // wanted, wanted), MESH_AXES, axis_types=mesh.axis_types)


def make_mesh(config=MeshConfig(), devices=None):
    """A `jax.sharding.Mesh` of `devices` (default: all, over all processes) with MESH_AXES as axes."""
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    # Auto: XLA decides how intermediate values are divided, from how parameters and rows are.
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)
