"""A decoder-only transformer for every family: one block, scanned over stacked layers.

B: rows.  T: columns.  S: cache slots, J blocks of C.  L: layers.  D: hidden size.
H: query heads.  K: key-value heads.  E: head dim.  V: vocabulary.
Rows are left-aligned here: a token's column is its position and its cache slot.
`forward.py` aligns what callers bring, and casts the kernels.
"""

from __future__ import annotations

import dataclasses
from operator import itemgetter
from typing import Annotated, Any

from annotated_types import Ge, Gt
from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.config import Doc
from jaxrl_fp16.masking import segment_positions
from jaxrl_fp16.models import attention
from jaxrl_fp16.models.families import FAMILIES
from jaxrl_fp16.models.families.family import AttentionShape
from jaxrl_fp16.models.layers import (
    Projection, RMSNorm, RopeScaling, YarnScaling, keep_marked, kept, rope_angles, rotate, shared,
)
from jaxrl_fp16.models.lora import COLLECTION, LoraConfig
from jaxrl_fp16.models.numerics import DEFAULT, NumericsConfig
from jaxrl_fp16.parallel import constrain


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape. Fields left None take the family's value."""

    family: Annotated[str, Doc(f"family of the model: {', '.join(FAMILIES)}")]
    vocab_size: Annotated[int, Ge(1), Doc("rows of the embedding")]
    hidden_size: Annotated[int, Ge(1), Doc("width of the residual stream")]
    intermediate_size: Annotated[int, Ge(1), Doc("width inside an MLP")]
    num_layers: Annotated[int, Ge(1), Doc("layers, each of attention and MLP")]
    num_heads: Annotated[int, Ge(1), Doc("query heads of an attention layer")]
    num_kv_heads: Annotated[int, Ge(1), Doc("key-value heads of an attention layer; divides num_heads")]
    head_dim: Annotated[int, Ge(2), Doc("width of an attention head; even")]
    rope_theta: Annotated[float | None, Gt(0), Doc("base of the rotary frequencies")] = None
    rope_scaling: Annotated[RopeScaling | None, Doc("Llama 3's stretching of the rotary frequencies")] = None
    rope_yarn: Annotated[YarnScaling | None, Doc("YaRN's stretching of the rotary frequencies")] = None
    norm_eps: Annotated[float | None, Gt(0), Doc("number added to the mean square in a norm")] = None
    tie_embeddings: Annotated[bool | None, Doc("the head is the embedding, transposed")] = None
    qkv_bias: Annotated[bool | None, Doc("bias on query, key and value projections")] = None
    output_bias: Annotated[bool | None, Doc("bias on attention's output projection")] = None
    mlp_bias: Annotated[bool | None, Doc("bias on the MLP's projections")] = None
    qk_norm: Annotated[bool | None, Doc("RMSNorm on each query and key head")] = None
    max_positions: Annotated[int | None, Ge(1), Doc("longest sequence the weights were made for, in tokens")] = None

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"model family {self.family!r} is unknown; allowed: {', '.join(FAMILIES)}")
        defaults = dict(FAMILIES[self.family].defaults)
        if self.rope_yarn is not None:
            if self.rope_scaling is not None:
                raise ValueError("rope_scaling and rope_yarn are both given; allowed: one of them, or null")
            defaults["max_positions"] = self.rope_yarn.longest
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the dataclass is frozen for everyone after this
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; allowed: a divisor of num_heads, {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; allowed: even numbers, rotary angles turn pairs")


@struct.dataclass
class Cache:
    """Keys and values of one layer, as `attention.store` keeps the compute dtype or float32; slot = position."""

    keys: jax.Array    # [B,K,J,E,C], of cuDNN's kernel [B,K,S,E]; a prefill returns them with L in front
    values: jax.Array  # [B,K,S,E], likewise

    def widened(self, kind, slots):
        """With zeros after what is there, up to `slots` slots of an attention of `kind`."""
        return Cache(*attention.widen(kind, self.keys, self.values, slots))


class Attention(nn.Module):
    """Self-attention with rotary positions, grouped heads (2305.13245) and, in Qwen3, normalised heads."""

    shape: AttentionShape
    width: int      # of the residual stream
    norm_eps: float
    kind: str
    numerics: NumericsConfig = NumericsConfig()
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x, angles, cache, positions, segments):
        c = self.shape
        dtype = jnp.float32 if self.numerics.float32_cache else x.dtype
        weights = jnp.float32 if self.numerics.float32_weights else None
        wide = shared(x)
        q = self._heads("q", c.heads)(wide)
        k = self._heads("k", c.kv_heads)(wide)
        v = kept(self._heads("v", c.kv_heads)(wide).astype(dtype))
        if c.qk_norm:
            q, k = RMSNorm(self.norm_eps, name="q_norm")(q), RMSNorm(self.norm_eps, name="k_norm")(k)
        q, k = (kept(rotate(x, angles, c.rotary_scale).astype(dtype)) for x in (q, k))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if positions is None:
            mixed = attention.attend(self.kind, q, k, v, segments, weights)
            cache = Cache(*attention.stored(self.kind, k, v))
        else:
            cache = Cache(*attention.write(self.kind, cache.keys, cache.values, positions, k, v))
            mixed = attention.attend_cache(self.kind, q, cache.keys, cache.values, positions, weights)
        output = Projection((c.heads, c.head_dim), (self.width,), c.output_bias, self.lora, name="o")
        return output(mixed.astype(x.dtype)), cache

    def _heads(self, name, heads):
        c = self.shape
        return Projection((self.width,), (heads, c.head_dim), c.qkv_bias, self.lora, name=name)


def attention_of(config, kind, numerics=DEFAULT, **module):
    """The attention that a config's family names."""
    shape = FAMILIES[config.family].attention(config)
    return Attention(shape, config.hidden_size, config.norm_eps, kind, numerics, **module)


def mlp_of(config, lora=None, **module):
    """The MLP that a config's family names; a family without adapters there takes no `lora`."""
    return FAMILIES[config.family].mlp(config, **({} if lora is None else {"lora": lora}), **module)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, each sum rounded once to the dtype of `x`.

    dtype: the compute dtype, of what enters attention and MLP. Returns the new `x` and, where `keep` or a
    cache is given, this layer's keys and values.
    """

    config: DecoderConfig
    kind: str
    keep: bool = False
    dtype: Any = jnp.float32
    numerics: NumericsConfig = NumericsConfig()
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x, angles, cache=None, positions=None, segments=None):
        c, x = self.config, rows_apart(x)
        normed = RMSNorm(c.norm_eps, name="attention_norm")(x).astype(self.dtype)
        attend = attention_of(c, self.kind, self.numerics, lora=self.lora, name="attention")
        mixed, cache = attend(normed, angles, cache, positions, segments)
        x = kept(rows_apart((x + mixed).astype(x.dtype)))
        normed = RMSNorm(c.norm_eps, name="mlp_norm")(x).astype(self.dtype)
        x = rows_apart((x + mlp_of(c, self.lora, name="mlp")(normed)).astype(x.dtype))
        return x, cache if self.keep else None


class Decoder(nn.Module):
    """Tokens to final hidden states; `forward.py` turns those into logits and log-probs.

    attention: which kernel every program uses. remat: keep only each layer's
    input for the backward pass and compute the rest again; without, what products
    and attention gave is kept too. dtype: the compute dtype; `forward.py` sets it
    from the policy. numerics: what is not rounded to it.
    lora: adapters beside all or some linear layers, which alone are trained; None: all is.
    """

    config: DecoderConfig
    attention: attention.AttentionKind = "blockwise"
    remat: bool = True
    dtype: Any = jnp.float32
    numerics: NumericsConfig = NumericsConfig()
    lora: LoraConfig | None = None

    @property
    def residual_dtype(self):
        """Of the residual stream."""
        return jnp.float32 if self.numerics.float32_residual else self.dtype

    @property
    def hidden_dtype(self):
        """Of the last hidden state, and of the head that reads it."""
        return jnp.float32 if self.numerics.float32_head else self.dtype

    @nn.compact
    def __call__(self, tokens, keep_cache=False, segments=None):
        """`tokens` int32 [B,T], left-aligned -> hidden [B,T,D]; with `keep_cache` also a `Cache` of [L,B,K,T,E].

        segments int32 [B,T], of packed rows: positions begin anew and attention ends with each segment.
        """
        c = self.config
        initial = nn.initializers.normal(c.hidden_size**-0.5)
        embedding = self.param("embedding", initial, (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tie_embeddings:
            # Made here, beside the embedding; `forward.cast_to_compute` says what the head is.
            self.param("head", initial, (c.vocab_size, c.hidden_size), jnp.float32)
        x = embed(embedding, tokens, self.residual_dtype)
        positions = jnp.arange(tokens.shape[1])[None] if segments is None else segment_positions(segments)
        x, cache = self._layers(keep_cache)(x, angles_of(c, positions), None, None, segments)
        x = RMSNorm(c.norm_eps, name="final_norm")(x).astype(self.hidden_dtype)
        return (x, cache) if keep_cache else x

    def _layers(self, keep):
        block = nn.remat(Block, prevent_cse=False, policy=None if self.remat else keep_marked)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, COLLECTION: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.config.num_layers,
        )
        return scanned(self.config, self.attention, keep, self.dtype, self.numerics, self.lora, name="layers")


def block_of(model, keep=False):
    """One layer of `model`, for its variables without the leading axis."""
    return Block(model.config, model.attention, keep, model.dtype, model.numerics, model.lora)


def layers_of(compute):
    """The layers' variables, for `block_of`, each array [L,...], out of what `forward.cast_to_compute` gives."""
    adapters = {COLLECTION: compute[COLLECTION]["layers"]} if COLLECTION in compute else {}
    return {"params": compute["layers"], **adapters}


def embed(embedding, tokens, dtype):
    """Rows of the float32 table, then cast: the gradient is a scatter-add, which float16 would saturate."""
    return rows_apart(jnp.take(embedding, tokens, axis=0).astype(dtype))


def rows_apart(x):
    """`x` [B,T,D], on a mesh each device with its own rows, whole."""
    return constrain(x, "rows", None, None)


def angles_of(config, positions):
    """float32 [...,E/2]: the rotary angles of a config's heads at int32 `positions` [...]."""
    return rope_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling or config.rope_yarn)


def unstack_layers(stacked, num_layers):
    """Trees of arrays [L,...] as a list of L trees, for `decode_step`: sliced once, not at every step."""
    return [jax.tree.map(itemgetter(i), stacked) for i in range(num_layers)]


def decode_step(model, params, layers, token, caches, positions):
    """The decoder on one token a row: the same modules, layer after layer.

    token int32 [B] at `positions` int32 [B]; `layers` from `unstack_layers` of `layers_of`;
    `caches` a list of one `Cache` of [B,K,S,E] a layer -> hidden [B,1,D] and the caches, written.
    """
    c = model.config
    x = embed(params["embedding"], token[:, None], model.residual_dtype)
    angles = angles_of(c, positions[:, None])
    block, written = block_of(model, keep=True), []
    for layer, cache in zip(layers, caches, strict=True):
        x, cache = block.apply(layer, x, angles, cache, positions)
        written.append(cache)
    x = RMSNorm(c.norm_eps).apply({"params": params["final_norm"]}, x).astype(model.hidden_dtype)
    return x, written
