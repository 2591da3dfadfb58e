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
        bool, Doc("XLA may skip roundings inside a fusion; turning this off changed no bit on CPU")
    ] = True
    float32_head: Annotated[
        bool, Doc("head and last hidden state in float32: gains little, and is slow where half precision is fast")
    ] = False
    float32_weights: Annotated[
        bool, Doc("attention's softmax weights in float32: gained nothing in FP16 and made BF16 worse, on CPU")
    ] = False
    float32_residual: Annotated[
        bool, Doc("sums after attention and MLP in float32: lowered the mismatch most, but doubles what remat keeps")
    ] = False
    float32_cache: Annotated[
        bool, Doc("queries, keys, values in float32: twice the cache; gained little in FP16, worse in BF16, on CPU")
    ] = False
    decode_rows: Annotated[
        int, Ge(0), Doc("rows that smaller batches are filled to when decoding; 0: off, as it costs more than it gains")
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
