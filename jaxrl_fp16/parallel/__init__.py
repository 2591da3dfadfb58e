"""The mesh of devices, how arrays lie on it, and the start of a run in several processes."""

from jaxrl_fp16.parallel.agreement import check_same_config
from jaxrl_fp16.parallel.distributed import (
    LOST_PROCESS, from_first_process, initialize_distributed, is_lost_process,
)
from jaxrl_fp16.parallel.mesh import MESH_AXES, MeshConfig, make_mesh, sampling_mesh
from jaxrl_fp16.parallel.sharding import (
    RULES,
    axes_sharding,
    batch_sharding,
    constrain,
    copies_of,
    mesh_size,
    platform_of,
    replicated,
    row_shards,
    rows_spread,
    shard_batch,
    state_shardings,
    to_device_memory,
    to_host,
    to_host_memory,
    tree_shardings,
)

__all__ = [
    "LOST_PROCESS",
    "check_same_config",
    "from_first_process",
    "initialize_distributed",
    "is_lost_process",
    "MESH_AXES",
    "MeshConfig",
    "make_mesh",
    "sampling_mesh",
    "RULES",
    "axes_sharding",
    "batch_sharding",
    "constrain",
    "copies_of",
    "mesh_size",
    "platform_of",
    "replicated",
    "row_shards",
    "rows_spread",
    "shard_batch",
    "state_shardings",
    "to_device_memory",
    "to_host",
    "to_host_memory",
    "tree_shardings",
]
