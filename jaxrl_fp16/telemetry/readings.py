"""What a run reports of its ranges: metrics every few iterations, and the first module that is not finite.

L: layers.  The programs are in `ranges.py`; their results are read here, on the host.
"""

import dataclasses
import math
from operator import itemgetter
from typing import Annotated

from annotated_types import Ge
import jax
import jax.numpy as jnp

from jaxrl_fp16.config import Doc
from jaxrl_fp16.models.init import at, tensor_table
from jaxrl_fp16.models.taps import tap_names
from jaxrl_fp16.parallel import to_host
from jaxrl_fp16.telemetry.ranges import dtype_of, module_names


@dataclasses.dataclass(frozen=True)
class TelemetryConfig:
    """Ranges of weights, activations and gradients while a run trains."""

    every: Annotated[int, Ge(0), Doc("iterations between looks at weights, activations and gradients; 0: none")] = 50
    rows: Annotated[
        int, Ge(1), Doc("rows of an iteration whose ranges telemetry takes; those with an advantage come first")
    ] = 8


def summarize(model, policy, ranges, weights):
    """The metrics `telemetry/...` of one look: `Ranges` and a tree of WeightRange, both on the host.

    The activation's layer as a number: -1 is the embedding, L the last norm.
    """
    name, peak = largest(ranges.activations.items())
    gradients, tensors = by_tensor(model, ranges.gradients), by_tensor(model, weights)
    tensor, slope = largest((key, value.peak) for key, value in gradients)
    lost, subnormal = weight_shares(tensors)
    return {
        "telemetry/activation_max": float(peak),
        "telemetry/activation_module": name,
        "telemetry/activation_layer": _layer_of(name, model.config.num_layers),
        "telemetry/margin": min(margin(p, dtype_of(model, policy, name)) for name, p in ranges.activations.items()),
        "telemetry/gradient_underflow": underflow_share(gradients),
        "telemetry/gradient_max": float(slope),
        "telemetry/gradient_tensor": tensor,
        "telemetry/weight_max": float(largest((key, value.peak) for key, value in tensors)[1]),
        "telemetry/weights_lost": lost,
        "telemetry/weights_subnormal": subnormal,
    }


def largest(peaks):
    """Of pairs `(name, peak)` the one with the largest peak, NaN above all."""
    return max(peaks, key=lambda pair: (math.isnan(pair[1]), float(pair[1])))


def margin(peak, dtype):
    """The factor by which `peak` may still grow within `dtype`; 0 where it is not finite."""
    peak = float(peak)
    return float(jnp.finfo(dtype).max) / peak if peak > 0 and math.isfinite(peak) else 0.0 if peak else math.inf


def underflow_share(gradients):
    """Of all gradient entries that are not 0 in float32 the share that the compute dtype makes 0."""
    nonzero = sum(int(value.nonzero) for _, value in gradients)
    return sum(int(value.underflow) for _, value in gradients) / max(nonzero, 1)


def weight_shares(tensors):
    """`(lost, subnormal)`: shares of all weights that float16 makes 0, and keeps with fewer digits."""
    entries = sum(int(value.entries) for _, value in tensors)
    return tuple(sum(int(getattr(value, name)) for _, value in tensors) / entries for name in ("lost", "subnormal"))


def _layer_of(name, num_layers):
    first, *rest = name.split(".")
    return int(rest[0]) if rest else {"embedding": -1, "final_norm": num_layers}[first]


def by_tensor(model, tree):
    """`[(name, values)]` of every tensor of a folder that holds `model`, from embedding to head.

    tree: one like the parameters, or their trained part alone, on the host, whose leaves or structs are of arrays [L]
    or [].
    """
    rows = []
    for tensor in tensor_table(model):
        if tensor.path[0] not in tree:
            continue
        values = at(tree, tensor.path)
        for index, name in tensor.entries(jax.tree.leaves(values)[0].shape):
            own = jax.tree.map(lambda x, index=index: x[index], values) if index else values
            rows.append((next(PLACES[part] for part in tensor.path if part in PLACES), index, name, own))
    return [(name, own) for _, _, name, own in sorted(rows, key=itemgetter(0, 1))]


PLACES = {"embedding": 0, "layers": 1, "final_norm": 2, "head": 3}  # of a parameter in the forward


# -- what is not finite --------------------------------------------------------------------------


def name_not_finite(model, policy, peaks, params, scale, rows, total):
    """What is not finite first on `rows` at loss scale `scale`, as text; None where nothing is.

    peaks: a program of `make_peaks`; the other arguments are its. In the order in which
    a step computes: the activations, the loss, the gradients from the head down, those of the
    parameters. Where scale 1 would do, the text says that the scale alone was too large.
    """
    dtype = policy.compute_dtype
    found = jax.tree.map(to_host, peaks(params, scale, rows, total))
    name = first_overflow(model, policy, found.activations)
    if name is not None:
        return f"the activation of {name}, {_beyond(found.activations[name], dtype)}{_by_weights(model, found, dtype)}"
    if not math.isfinite(found.loss):
        return f"the loss, {found.loss:g}, with finite activations: its ratios or importance weights"
    name = _first_gradient(model, found, dtype)
    if name is None:
        return None
    if scale == 1:
        return f"the gradient of {name}"
    alone = jax.tree.map(to_host, peaks(params, jnp.ones_like(scale), rows, total))
    if _first_gradient(model, alone, dtype) is None:
        return f"the gradient of {name} at loss scale {float(scale):g}; at scale 1 all is finite"
    return f"the gradient of {name}, at scale 1 too"


def first_overflow(model, policy, activations):
    """The first module, in the order of the forward, whose activation is no finite number of its dtype, or None."""
    names = module_names(model.config.num_layers)
    return next((name for name in names if first_beyond(activations, [name], dtype_of(model, policy, name))), None)


def first_beyond(peaks, names, dtype):
    """The first of `names` whose peak is no finite number of `dtype`; None if each one's is."""
    limit = float(jnp.finfo(dtype).max)
    return next((name for name in names if not peaks[name] <= limit), None)  # a NaN compares false


def _beyond(peak, dtype):
    peak, limit = float(peak), float(jnp.finfo(dtype).max)
    return f"{peak:g} where {jnp.dtype(dtype).name} ends at {limit:,.0f}" if math.isfinite(peak) else f"{peak:g}"


def _by_weights(model, found, dtype):
    """The first weights that are no finite numbers of `dtype`, as an explanation; empty where all are."""
    weights = dict(by_tensor(model, found.weights))
    name = first_beyond(weights, weights, dtype)
    return "" if name is None else f"; the weights {name} hold {float(weights[name]):g}"


def _first_gradient(model, found, dtype):
    """The first module from the head down, else the first parameter, whose gradient is not finite."""
    name = first_beyond(found.cotangents, reversed(tap_names(model.config.num_layers)), dtype)
    if name is not None:
        return name
    tensors = dict(by_tensor(model, found.gradients))
    return first_beyond(tensors, reversed(tensors), "float32")
