"""The dense parts of a decoder, each rounded once.

B: rows.  T: columns.  D: hidden size.  H: heads.  E: head dim.  F: intermediate size.
Matmul inputs are in the compute dtype and accumulate in float32; norms, rotary
angles and biases are float32.
"""

import dataclasses
from functools import partial
import math
from typing import Annotated

from annotated_types import Gt
from flax import linen as nn
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from jaxrl_fp16.config import Doc
from jaxrl_fp16.models.lora import COLLECTION, LoraConfig, uniform_init


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(spec, a, b):
    """`einsum(spec, a, b)` of two arrays of one compute dtype, accumulated and returned in float32.

    Its gradient keeps to the same rule: the cotangent is cast to the compute
    dtype, so that no float32 x float16 product appears in the backward pass.
    """
    return _einsum(spec, a, b)


def _einsum(spec, a, b):
    if a.dtype != b.dtype:
        raise TypeError(f"matmul of {a.dtype} and {b.dtype}; allowed: one compute dtype for both")
    # A GPU would round float32 inputs to TF32 otherwise.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=precision)


def _matmul_forward(spec, a, b):
    return _einsum(spec, a, b), (a, b)


def _matmul_backward(spec, saved, cotangent):
    a, b = saved
    grad_a, grad_b = _gradients(spec, a, b, cotangent)
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


def _gradients(spec, a, b, cotangent):
    """float32: with respect to both inputs of a matmul, from its cotangent rounded to their dtype."""
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    return _input_gradient(spec, b, cotangent), _einsum(f"{left},{out}->{right}", a, cotangent.astype(a.dtype))


def _input_gradient(spec, b, cotangent):
    """float32: the first of them, which needs the second input alone."""
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    return _einsum(f"{out},{right}->{left}", cotangent.astype(b.dtype), b)


matmul.defvjp(_matmul_forward, _matmul_backward)


_PROJECTION = "btd,df->btf"


@jax.custom_vjp
def project(x, kernel):
    """float32 `x @ kernel` of `x` [B,T,D], rounded to the dtype of `kernel` [D,F]; its gradient with respect to a
    float32 `x` is not rounded.

    So several projections of one input add up their gradients in float32, and round the sum once; over a mesh's tensor
    axis they are then one sum.
    """
    return _einsum(_PROJECTION, x.astype(kernel.dtype), kernel)


def _project_forward(x, kernel):
    rounded = x.astype(kernel.dtype)
    return _einsum(_PROJECTION, rounded, kernel), (jnp.zeros((), x.dtype), rounded, kernel)


def _project_backward(saved, cotangent):
    like, x, kernel = saved
    grad_x, grad_kernel = _gradients(_PROJECTION, x, kernel, cotangent)
    return grad_x.astype(like.dtype), grad_kernel.astype(kernel.dtype)


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def project_frozen(x, kernel):
    """`project` onto a kernel that is not trained: it has no gradient, and `x` is not kept for one."""
    return _einsum(_PROJECTION, x.astype(kernel.dtype), kernel)


def _frozen_forward(x, kernel):
    return project_frozen(x, kernel), (jnp.zeros((), x.dtype), kernel)


def _frozen_backward(saved, cotangent):
    like, kernel = saved
    return _input_gradient(_PROJECTION, kernel, cotangent).astype(like.dtype), None


project_frozen.defvjp(_frozen_forward, _frozen_backward)


def shared(x):
    """`x` as the input of several projections."""
    return x.astype(jnp.float32)


KEPT = "kept"


def kept(x):
    """`x`, marked as what a layer without remat keeps for its backward pass: all else there is cheap to make again."""
    return checkpoint_name(x, KEPT)


def _of_cudnn(primitive, *_, **__):
    return primitive.name.startswith("dot_product_attention_fwd")


# Of `jax.checkpoint`: what is marked, and what cuDNN's attention gives, where no mark can stand.
keep_marked = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(KEPT), _of_cudnn)


class Projection(nn.Module):
    """`x @ kernel (+ bias)` in float32, not yet rounded: what follows decides where.

    x [B,T,*inputs], kernel [*inputs,*outputs] -> [B,T,*outputs]. With `lora` the kernel is frozen, and has an adapter
    beside it where the variables hold one: without, the layer is as it was before any training.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool = False
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x):
        fan_in, rows = math.prod(self.inputs), x.shape[:2]
        normal = nn.initializers.normal(fan_in**-0.5)
        kernel = self.param("kernel", normal, (*self.inputs, *self.outputs), jnp.float32)
        # Heads as one axis: a CPU is slow to sum over two.
        x, kernel = x.reshape(*rows, fan_in), kernel.reshape(fan_in, -1)
        y = project(x, kernel) if self.lora is None else project_frozen(x, kernel)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32).reshape(-1)
        adapted = self.lora is not None and self.lora.adapts(self.name)
        if adapted and (self.is_initializing() or self.has_variable(COLLECTION, "a")):
            y = y + self._adapter(x)
        return y.reshape(*rows, *self.outputs)

    def _adapter(self, x):
        """`(x A scale) B` in float32; between the two rounded once, as every input of a matmul is."""
        lora = self.lora
        down, up = (*self.inputs, lora.rank), (lora.rank, *self.outputs)
        a = self.variable(COLLECTION, "a", lambda: uniform_init(self.make_rng("params"), down, jnp.float32)).value
        b = self.variable(COLLECTION, "b", lambda: jnp.zeros(up, jnp.float32)).value
        if lora.dropout and self.has_rng("dropout"):
            x = nn.Dropout(lora.dropout, deterministic=False)(x)
        # Scaled where it is narrow; of a power of two no bit depends on where.
        inner = kept((project(x, a.reshape(-1, lora.rank)) * lora.scale).astype(b.dtype))
        return matmul("btr,rf->btf", inner, b.reshape(lora.rank, -1))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` in float32 (1910.07467); the caller rounds the result.

    A division by the square root: `rsqrt` rounds differently from one shape to another.
    """

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x / jnp.sqrt(mean_square + self.eps) * scale


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (2002.05202), float32 [B,T,D]: the residual sum rounds it."""

    intermediate_size: int
    bias: bool = False
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x):
        width, inner, lora = x.shape[-1], self.intermediate_size, self.lora
        projected = partial(Projection, (width,), (inner,), self.bias, lora)
        wide = shared(x)
        gate, up = kept(projected(name="gate")(wide)), kept(projected(name="up")(wide))
        down = Projection((inner,), (width,), self.bias, lora, name="down")
        return down((nn.silu(gate) * up).astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies (2407.21783); a wavelength is in tokens."""

    factor: Annotated[float, Gt(0), Doc("factor by which long rotary wavelengths are stretched")]
    low_freq_factor: Annotated[
        float, Gt(0), Doc("rotary wavelengths above original_max_position / low_freq_factor tokens are long")
    ]
    high_freq_factor: Annotated[
        float, Gt(0), Doc("rotary wavelengths below original_max_position / high_freq_factor tokens stay as they are")
    ]
    original_max_position: Annotated[int, Gt(0), Doc("tokens of the context before rotary stretching")]

    def stretch(self, frequencies, theta):
        """float32 [E/2] -> float32 [E/2]; a linear blend between the two bounds. theta: the frequencies' base."""
        wavelengths = 2 * jnp.pi / frequencies
        low, high = self.low_freq_factor, self.high_freq_factor
        blend = (self.original_max_position / wavelengths - low) / (high - low)
        blend = jnp.clip(blend, 0.0, 1.0)
        return frequencies * (blend + (1 - blend) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN's stretching of the rotary frequencies (2309.00071), as Transformers does it."""

    factor: Annotated[float, Gt(0), Doc("factor by which YaRN makes the context longer")]
    original_max_position: Annotated[int, Gt(0), Doc("tokens of the context before YaRN")]
    beta_fast: Annotated[
        float, Gt(0), Doc("rotary pairs that turn more than this often in the original context stay as they are")
    ] = 32.0
    beta_slow: Annotated[
        float, Gt(0), Doc("rotary pairs that turn less than this often in the original context are stretched in full")
    ] = 1.0
    attention_factor: Annotated[
        float | None, Gt(0), Doc("number that multiplies rotated queries and keys; null: 0.1 ln(factor) + 1")
    ] = None
    truncate: Annotated[bool, Doc("take whole rotary pairs for the bounds of YaRN's blend")] = True
    declared_positions: Annotated[
        int | None, Gt(0), Doc("max_position_embeddings to write in config.json with YaRN; null: model.max_positions")
    ] = None

    @property
    def longest(self):
        """Tokens of the stretched context."""
        return max(1, int(self.original_max_position * self.factor))

    @property
    def amplitude(self):
        """What rotated queries and keys are multiplied by."""
        return yarn_amplitude(self.factor) if self.attention_factor is None else self.attention_factor

    def stretch(self, frequencies, theta):
        """float32 [E/2] -> float32 [E/2]; a linear blend between two pairs. theta: the frequencies' base."""
        size = 2 * len(frequencies)

        def pair_of(turns):
            """Where a pair turns so often in the original context."""
            return size * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        high = high + 0.001 if low == high else high
        stretched = jnp.clip((jnp.arange(len(frequencies), dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
        return frequencies / self.factor * stretched + frequencies * (1 - stretched)


def yarn_amplitude(factor, slope=1.0):
    """YaRN's attention factor: 0.1 slope ln(factor) + 1, and 1 where nothing is stretched."""
    return 0.1 * slope * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_angles(positions, head_dim, theta, scaling=None):
    """float32 [..., E/2]: rotary angles of int32 `positions` [...] (2104.09864), E the head dim."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is not None:
        frequencies = scaling.stretch(frequencies, theta)
    return positions[..., None].astype(jnp.float32) * frequencies


def rotate(x, angles, scale=1.0):
    """float32 `x` [B,T,H,E] turned by `angles` [B or 1,T,E/2]; halves are paired, as Hugging Face does.

    scale: a number that the result is multiplied by.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
