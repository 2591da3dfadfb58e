"""Adapters of a Decoder: fresh ones beside its weights, and their sum with those."""

import math

import jax
from jax import lax
from jax.sharding import NamedSharding
import jax.numpy as jnp

from jaxrl_fp16.models.decoder import Decoder
from jaxrl_fp16.models.frozen import BASE, LORA
from jaxrl_fp16.models.init import adapter_table, at, initializer, param_shapes, param_shardings, plain


def init_lora(model, base_params, key, *, policy):
    """`{"base", "lora"}`: parameters of a Decoder with adapters, which begin as what `base_params` are.

    Args:
      model: a Decoder with `lora`.
      base_params: parameters of the plain model, as `load_pretrained` or `init_params` give them.
      key: a PRNG key; the first matrix of each adapter is drawn from it, the second is 0 (2106.09685).
      policy: a `jmp.Policy`, the run's precision. The base is kept in its compute dtype alone, norms and biases too.

    The base lies where `base_params` do, the adapters, float32, beside it. `init_train_state` and `make_update` take
    the tree and train the adapters; the base is neither copied nor donated.

    Raises ValueError for a model without `lora`, a target that it lacks, or parameters of another model.
    """
    base = with_dtype(model, base_params, policy.compute_dtype)
    make = jax.jit(lambda key: initializer(model)(key)[LORA], out_shardings=_beside(model, base))
    return {BASE: base, LORA: make(key)}


def with_dtype(model, base_params, dtype):
    """`base_params` as the base of `model`, a Decoder with `lora`, in `dtype`; None: as they are. Raises ValueError."""
    _check_adapted(model)
    check_same(param_shapes(plain(model)), base_params, "base_params")
    if dtype is None:
        return base_params
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), base_params)


def _beside(model, base):
    """Where the adapters lie: as the mesh of their base has it; None without one."""
    sharding = getattr(jax.tree.leaves(base)[0], "sharding", None)
    return param_shardings(model, sharding.mesh)[LORA] if isinstance(sharding, NamedSharding) else None


def merge_lora(model, params, base_params):
    """`(the plain Decoder, W + A B scale)`: the sum of both in float32.

    Args:
      model: a Decoder with `lora`.
      params: its `{"base", "lora"}`, of which the adapters are read.
      base_params: the weights that the adapters are added to, float32: those of the model's folder, not "base", which
        was rounded once already.

    For an export alone: weights of half precision that a sum is rounded into at every step lose what was learnt.
    Raises ValueError for a model without `lora`, or parameters of another model.
    """
    _check_adapted(model)
    check_same(param_shapes(plain(model)), base_params, "base_params")
    check_same(param_shapes(model)[LORA], params[LORA], 'params["lora"]')
    merged = jax.tree.map(lambda x: x, base_params)     # of new dicts: the caller's stay as they are
    for down, up in zip(*[iter(adapter_table(model))] * 2):
        path = down.path[:-1]
        a, b, layer = at(params[LORA], down.path), at(params[LORA], up.path), at(merged, path)
        layer["kernel"] = _sum(layer["kernel"], a, b, model.lora.scale)
    return plain(model), merged


@jax.jit
def _sum(kernel, a, b, scale):
    """float32 [L,...]: a kernel and its adapter, A [L,...,r] and B [L,r,...]."""
    depth, rank = a.shape[0], a.shape[-1]
    a, b = a.reshape(depth, math.prod(a.shape[1:-1]), rank), b.reshape(depth, rank, math.prod(b.shape[2:]))
    product = jnp.einsum("lir,lro->lio", a, b, precision=lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + product.reshape(kernel.shape) * scale


def _check_adapted(model):
    """ValueError for what has no adapters, or a target that it lacks."""
    if not isinstance(model, Decoder) or model.lora is None:
        raise ValueError(f"{type(model).__name__} has no adapters; allowed: Decoder(config, lora=LoraConfig(...))")
    adapter_table(model)


def check_same(shapes, given, name):
    """ValueError where `given` is no tree of arrays of these shapes."""
    wanted, found = _shapes(shapes), _shapes(given)
    for path in wanted | found:
        if wanted.get(path) != found.get(path):
            raise ValueError(f"{name}{path} has shape {found.get(path)}; allowed: {wanted.get(path)}")


def _shapes(tree):
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
