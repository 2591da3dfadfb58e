"""What a run will need of a device's memory, estimated before anything compiles.

It counts what lives longest and measures nothing: temporary buffers of a
compiled program come on top, and `jax.jit(...).lower().compile().memory_analysis()`
tells those.
"""

import os

import jax
import numpy as np

from jaxrl_fp16.forward import LOGIT_BYTES
from jaxrl_fp16.models import FAMILIES, param_shapes

MIB = 2**20
LOWERS_MEMORY = "sampling.max_rows, training.microbatch_size, model.remat, mesh.fsdp"


def is_out_of_memory(error):
    """Whether this exception of JAX says that a device's memory did not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def estimate(config, model, mesh, compute_dtype, *, reference=False, critic=None, reward_model=None):
    """`{what: bytes}` on one device, by what takes room. critic: its module, or None; reward_model: likewise."""
    c = model.config
    count = parameter_count(model)
    trained = count + (parameter_count(critic) if critic is not None else 0)
    shared = mesh.shape["fsdp"] * mesh.shape["tensor"]
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    half = compute_dtype.itemsize
    columns = config.training.max_prompt_tokens + config.sampling.max_new_tokens
    rows = config.training.prompts_per_step * config.sampling.group_size
    decoded = min(rows, config.sampling.max_rows or rows) / parts
    # Slots are refilled from what is kept of every prompt; a mesh that divides rows does without.
    queued = parts == 1 and decoded < rows
    prompts = config.training.prompts_per_step * config.training.max_prompt_tokens
    learnt = config.training.microbatch_size / parts
    kept = c.num_layers if config.model.remat else 12 * c.num_layers  # a layer keeps about 12 arrays like its input
    attention = FAMILIES[c.family].attention(c)
    inside = 4 * (3 * c.intermediate_size + 4 * attention.heads * attention.head_dim)  # float32, of the layer at work
    return {
        "parameters": 4 * trained // shared,
        "Adam's moments": 8 * trained // shared,
        "gradients": 4 * count // shared,
        "compute copy": half * count // shared,
        **({"reference": 4 * count // shared} if reference else {}),
        **({"reward model": (4 + half) * parameter_count(reward_model) // shared} if reward_model else {}),
        "key-value cache": int(half * c.num_layers * attention.cached * columns * decoded),
        **({"prompts' cache": half * c.num_layers * attention.cached * prompts} if queued else {}),
        "activations": int(columns * learnt * (kept * c.hidden_size * half + inside)),
        "logits": 3 * LOGIT_BYTES,
    }


def parameter_count(model):
    """Parameters of a Decoder or Critic."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(param_shapes(model)))


def device_bytes(device):
    """What the device has: its allocator's limit, or on a CPU the machine's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device):
    """The most that the device's allocator has held so far; None where it does not count, as on a CPU."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def check_fits(needs, available):
    """Refuses what cannot fit, with the settings that lower it."""
    total = sum(needs.values())
    if total > available:
        largest = sorted(needs, key=needs.get, reverse=True)[:3]
        parts = ", ".join(f"{name} {needs[name] / MIB:,.0f} MiB" for name in largest)
        raise ValueError(
            f"the run needs about {total / MIB:,.0f} MiB a device and {available / MIB:,.0f} MiB are there "
            f"({parts}, ...); what lowers it: {LOWERS_MEMORY}"
        )
