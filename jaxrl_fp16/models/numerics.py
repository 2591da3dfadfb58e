"""Where a model rounds beyond what its policy says: remedies against the mismatch of sampler and trainer.

Sampler, scorer and gradient program take the same ones, always: they are the model's.
`benchmarks/attribution.py` measures each alone; benchmarks/results/attribution.json holds what it found.
"""

import dataclasses
import functools
from typing import Annotated

from annotated_types import Ge
import jax

from jaxrl_fp16.config import Doc


@dataclasses.dataclass(frozen=True)
class NumericsConfig:
    """Remedies, one program for all."""

    excess_precision: Annotated[
        bool, Doc("XLA may leave roundings out inside a fusion; on: without it no bit changed on CPU")
    ] = True
    float32_head: Annotated[
        bool, Doc("last hidden state and head unrounded; off: bought little, and is slow where half precision is fast")
    ] = False
    float32_weights: Annotated[
        bool, Doc("attention's weights meet the values unrounded; off: bought FP16 nothing, and made BF16 worse on CPU")
    ] = False
    float32_residual: Annotated[
        bool, Doc("sums after attention and MLP unrounded; lowered the mismatch most; off: twice what remat keeps")
    ] = False
    float32_cache: Annotated[
        bool, Doc("queries, keys and values unrounded; off: twice the cache; little in FP16, worse in BF16, on CPU")
    ] = False
    decode_rows: Annotated[
        int, Ge(0), Doc("fewer rows are decoded as this many, for its matmul kernels; 0: costs more than it buys")
    ] = 0

    @property
    def compiler_options(self):
        """What `jax.jit` takes as such; None for XLA's own."""
        return None if self.excess_precision else {"xla_allow_excess_precision": False}


DEFAULT = NumericsConfig()


def jit(function, numerics, **settings):
    """`jax.jit(function, **settings)` under the compiler options of `numerics`.

    JAX takes such options at the outermost jit alone: called while another
    function is traced, the result is jitted without them, and that function's hold.
    """
    inner = jax.jit(function, **settings)
    if numerics.compiler_options is None:
        return inner
    outer = jax.jit(function, compiler_options=numerics.compiler_options, **settings)

    @functools.wraps(function)
    def call(*args, **kwargs):
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        return (inner if traced else outer)(*args, **kwargs)

    call.lower, call._cache_size = outer.lower, outer._cache_size
    return call


def jit_by_model(numerics_of, **settings):
    """A decorator for `function(model, ...)`: `jit` under the options of `numerics_of(model)`."""

    def decorate(function):
        programs = {allowed: jit(function, NumericsConfig(excess_precision=allowed), **settings)
                    for allowed in (True, False)}

        @functools.wraps(function)
        def call(model, *args, **kwargs):
            return programs[numerics_of(model).excess_precision](model, *args, **kwargs)

        call._cache_size = lambda: sum(program._cache_size() for program in programs.values())
        return call

    return decorate
