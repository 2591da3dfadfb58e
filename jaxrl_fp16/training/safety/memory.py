"""What a run will need of a device's memory, estimated before anything compiles.

It counts what lives longest and measures nothing: `plan` asks the compilers.
"""

import os

import jax
import numpy as np

from jaxrl_fp16.forward import LOGIT_BYTES
from jaxrl_fp16.lengths import rows_at
from jaxrl_fp16.models import FAMILIES, param_shapes
from jaxrl_fp16.models.frozen import trained_of
from jaxrl_fp16.models.init import plain

MIB = 2**20
LOWERS_MEMORY = "sampling.max_rows, training.microbatch_size, training.microbatch_tokens, model.remat, mesh.fsdp"


def is_out_of_memory(error):
    """Whether this exception of JAX says that a device's memory did not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def estimate(config, model, mesh, compute_dtype, **others):
    """`{what: bytes}` on one device, by what takes room, while a step samples or while it learns, whichever takes more.

    others: as `phases` takes them.
    """
    found = phases(config, model, mesh, compute_dtype, **others)
    return max(found, key=lambda needs: sum(needs.values()))


def phases(config, model, mesh, compute_dtype, *, command="train", reference=False, critic=None, reward_model=None):
    """The same of sampling and of learning, a list. critic: its module, or None; reward_model: likewise.

    command: whose rows there are; None for one that only holds a state. What evaluation samples is not counted.
    benchmarks/aot.py holds the sums against what compilers for GPUs say.
    """
    c, count, adapted = model.config, parameter_count(plain(model)), model.lora is not None
    learns = trained_count(model)
    trained = learns + (trained_count(critic) if critic is not None else 0)
    tensor = mesh.shape["tensor"]
    shared, parts = mesh.shape["fsdp"] * tensor, mesh.shape["data"] * mesh.shape["fsdp"]
    # A sampler may divide the same devices otherwise.
    apart = config.mesh.rollout_tensor or tensor
    spread = parts * tensor // apart
    half, on_cpu = compute_dtype.itemsize, mesh.devices.flatten()[0].platform == "cpu"
    # A CPU multiplies half precision in float32: XLA keeps such a copy beside.
    upcast = 4 if half < 4 and on_cpu else 0
    decoded, learnt, waiting = TOKENS[command](config)
    decoded, learnt, waiting = decoded / spread, learnt / parts, waiting / spread
    attention = FAMILIES[c.family].attention(c)
    table = c.vocab_size * c.hidden_size
    head = table // tensor if parts > 1 else 0
    states = {
        "parameters": 4 * trained // shared,
        "Adam's moments": 8 * trained // shared,
        # Held once by policy, reference and critic, unless that has a folder of its own.
        "frozen weights": half * count * (2 if critic is not None and config.critic.path else 1) // shared
        if adapted else 0,
        "reference": 4 * count // shared if reference and not adapted else 0,
        "reward model": (4 + half) * parameter_count(reward_model) // shared if reward_model else 0,
    }
    cached = half * c.num_layers * attention.cached // (1 if attention.kv_heads % apart else apart)
    sampling = {
        # A mesh that divides rows gives each device all weights that it decodes with, and the table that it reads.
        "compute copy": (half + upcast) * count // apart if decoded else 0,
        "embedding": 4 * table // apart if decoded and spread > 1 and not c.tie_embeddings else 0,
        # On several devices that do not divide rows, one program holds it before and after it has grown to twice.
        "key-value cache": int(cached * decoded * (1.5 if spread == 1 < apart else 1)),
        # Slots are refilled from what is kept of every prompt; a mesh that divides rows does without.
        "prompts' cache": int(cached * waiting) if spread == 1 else 0,
    }
    heads = attention.heads * attention.head_dim
    inside = 4 * (3 * c.intermediate_size + 4 * heads) // tensor  # float32, of the layer at work
    inside += 0 if tensor == 1 else 16 * c.hidden_size            # and what is summed over the tensor axis
    residual = c.hidden_size * (4 if model.numerics.float32_residual else half)
    # A layer's input, and without remat what `layers.kept` marks.
    kept = residual if model.remat else (
        2 * residual + (2 * 4 * c.intermediate_size + half * (2 * heads + attention.cached)) // tensor)
    learning = {
        # Their sum, and those of the rows at work.
        "gradients": (4 + (4 if on_cpu else half)) * learns // shared,
        "compute copy": ((half + upcast) * learns + (upcast * count if adapted else 0)) // shared,
        # Gathered from all devices, and its gradient from a device's own rows.
        "head": (half + (0 if adapted else 4)) * head,
        "activations": int(learnt * (c.num_layers * kept + inside)),
        "logits": 3 * LOGIT_BYTES,
    } if learnt else {}
    return [{what: size for what, size in {**states, **phase}.items() if size} for phase in (sampling, learning)]


def _of_rollouts(config, prompts=None):
    t, s = config.training, config.sampling
    columns, prompts = t.max_prompt_tokens + s.max_new_tokens, min(prompts or t.prompts_per_step, t.prompts_per_step)
    rows, learnt = prompts * s.group_size, rows_at(columns, t.microbatch_size, t.microbatch_tokens)
    slots = min(rows, s.max_rows or rows)
    return slots * columns, learnt * columns, prompts * t.max_prompt_tokens if slots < rows else 0


def _of_solutions(config):
    return 0, config.sft.microbatch_size * config.sft.max_length, 0


def _of_pairs(config):
    warm = _of_solutions(config)[1] if config.sft.steps else 0
    return 0, max(2 * config.dpo.microbatch_size * config.dpo.max_length, warm), 0


# What makes rows -> `config -> tokens (decoded at once, learnt from at once, of prompts kept)`, on all devices.
TOKENS = {
    "train": _of_rollouts, "sft": _of_solutions, "warmup": _of_solutions, "dpo": _of_pairs,
    "mismatch": lambda config: _of_rollouts(config, config.mismatch.prompts), None: lambda config: (0, 0, 0),
}


def parameter_count(model):
    """Parameters of a Decoder or Critic, adapters included."""
    return _entries(param_shapes(model))


def trained_count(model):
    """Those that are trained: all, or the adapters, of a Critic with its head."""
    return _entries(trained_of(param_shapes(model)))


def _entries(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


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
