"""What the families share: Llama's names for tensors and for the fields of config.json."""

from collections.abc import Callable
import dataclasses
from functools import partial
import json
from typing import Any

from flax import linen as nn

from jaxrl_fp16.models.families.config_json import read_rope, read_value, refuse_unless, write_rope
from jaxrl_fp16.models.families.family import AttentionShape, Family, Tensor
from jaxrl_fp16.models.layers import GatedMLP

# config.json's key -> our field and its type.
FIELDS = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("intermediate_size", int),
    "num_hidden_layers": ("num_layers", int),
    "num_attention_heads": ("num_heads", int),
    "num_key_value_heads": ("num_kv_heads", int),
    "head_dim": ("head_dim", int),
    "rms_norm_eps": ("norm_eps", float),
    "tie_word_embeddings": ("tie_embeddings", bool),
    "max_position_embeddings": ("max_positions", int),
}

# Keys that would change the forward, and the values under which they do not; with `hidden_act`, which is the MLP's.
# `auto_map` names code inside the folder, which is never run.
IMPLEMENTED = {"auto_map": ()}

# Fields that a family either has, lacks, or switches by a flag in config.json.
PARTS = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm")


LAYER = "model.layers.{layer}"


@dataclasses.dataclass(frozen=True)
class MLP:
    """What a family has between attention and the next layer."""

    make: Callable[..., nn.Module]              # as Family.mlp
    tensors: Callable[[Any], list[Tensor]]      # DecoderConfig -> its rows of the table
    activations: tuple[str, ...]                # names of `hidden_act` in config.json; the first is written


def _gated_mlp(config, **module):
    return GatedMLP(config.intermediate_size, config.mlp_bias, **module)


def _gated_tensors(config):
    return [row for name, axes in (("gate", ("embed", "mlp")), ("up", ("embed", "mlp")), ("down", ("mlp", "embed")))
            for row in linear_tensors(config, name, axes)]


def linear_tensors(config, name, axes):
    """Weight, and bias where `config` has one, of an MLP's projection with these logical axes of input and output."""
    stem, path = f"{LAYER}.mlp.{name}_proj", ("layers", "mlp", name)
    yield Tensor(f"{stem}.weight", (*path, "kernel"), axes, "transpose")
    if config.mlp_bias:
        yield Tensor(f"{stem}.bias", (*path, "bias"), axes[1:])


GATED = MLP(_gated_mlp, _gated_tensors, ("silu", "swish"))


def family(name, architecture, defaults, absent, switches, mlp=GATED, nulls=()):
    """A family with Llama's layout.

    defaults: of DecoderConfig fields left None. absent: what Transformers takes
    where config.json lacks a key, which need not be those. switches: flags of
    config.json -> the fields among PARTS that each one sets. mlp: an MLP. nulls:
    keys that must be null -> what Transformers takes where they are absent.
    """
    about = dict(absent=absent, switches=switches, mlp=mlp, nulls=dict(nulls))
    return Family(
        name=name,
        architecture=architecture,
        defaults=defaults,
        read=partial(_read, **about),
        write=partial(_write, architecture=architecture, defaults=defaults, **about),
        tensors=partial(tensors, mlp=mlp),
        attention=_attention,
        mlp=mlp.make,
    )


def _attention(config):
    c = config
    scale = 1.0 if c.rope_yarn is None else c.rope_yarn.amplitude
    return AttentionShape(c.num_heads, c.num_kv_heads, c.head_dim, c.qkv_bias, c.output_bias, c.qk_norm, scale)


def _read(config, *, absent, switches, mlp, nulls):
    for key, taken in nulls.items():
        if config.get(key, taken) is not None:
            there = f"{json.dumps(config[key])[:80]}" if key in config else f"missing, which is {taken}"
            raise ValueError(f"{key} is {there}; allowed: null, no layer here attends within a window")
    given = {key: value for key, value in config.items() if value is not None}
    if "num_key_value_heads" in config.keys() - given.keys():  # null is no key's absence
        given["num_key_value_heads"] = config.get("num_attention_heads")
    config = {**absent, **dict.fromkeys(switches, False), **given}
    for key, allowed in (IMPLEMENTED | {"hidden_act": mlp.activations}).items():
        refuse_unless(config, key, allowed)
    heads = read_value(config, "num_attention_heads", int)
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", read_value(config, "hidden_size", int) // heads)
    fields = {field: read_value(config, key, kind) for key, (field, kind) in FIELDS.items()}
    _refuse_sliding_window(config, fields["num_layers"])
    for flag, names in switches.items():
        fields.update(dict.fromkeys(names, read_value(config, flag, bool)))
    rope = read_rope(config)
    if rope["rope_yarn"] is not None:
        fields["max_positions"] = rope["rope_yarn"].longest
    return {**fields, **rope}


def _refuse_sliding_window(config, num_layers):
    """ValueError if any layer attends within a window; a window that no layer uses is let through."""
    kinds = config.get("layer_types", [])
    if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}:
        raise ValueError(f"layer_types is {str(kinds)[:80]}; allowed: \"full_attention\" for each layer")
    if config.get("use_sliding_window") and not kinds and config.get("max_window_layers", 28) < num_layers:
        raise ValueError("use_sliding_window is true; allowed: false, no layer here attends within a window")


def _write(config, *, architecture, defaults, absent, switches, mlp, nulls):
    switched = {field: flag for flag, fields in switches.items() for field in fields}
    for field in PARTS:
        if field not in switched and getattr(config, field) != defaults[field]:
            raise ValueError(f"{field} is {getattr(config, field)}; allowed: {defaults[field]}, "
                             f"{architecture} has no key for it")
    written = {"architectures": [architecture], "model_type": config.family, "hidden_act": mlp.activations[0]}
    written |= {key: getattr(config, field) for key, (field, _) in FIELDS.items()} | dict.fromkeys(nulls)
    if config.rope_yarn is not None and config.rope_yarn.declared_positions is not None:
        written["max_position_embeddings"] = config.rope_yarn.declared_positions
    for flag, fields in switches.items():
        values = {getattr(config, field) for field in fields}
        if len(values) > 1:
            raise ValueError(f"{' and '.join(fields)} differ; allowed: one value, config.json's {flag}")
        written[flag] = values.pop()
    return {**written, **write_rope(config.rope_theta, config.rope_scaling, config.rope_yarn)}


def tensors(config, mlp=GATED):
    """The table of a Llama-shaped decoder; biases, head norms and an untied head where `config` has them."""
    table = [
        Tensor("model.embed_tokens.weight", ("embedding",), ("vocab", "embed")),
        Tensor("model.norm.weight", ("final_norm", "scale"), ("norm",)),
        Tensor(f"{LAYER}.input_layernorm.weight", ("layers", "attention_norm", "scale"), ("norm",)),
        Tensor(f"{LAYER}.post_attention_layernorm.weight", ("layers", "mlp_norm", "scale"), ("norm",)),
        Tensor(f"{LAYER}.self_attn.o_proj.weight", ("layers", "attention", "o", "kernel"),
               ("heads", "head_dim", "embed"), "from_heads"),
    ]
    if not config.tie_embeddings:
        table.append(Tensor("lm_head.weight", ("head",), ("vocab", "embed")))
    if config.output_bias:
        path = ("layers", "attention", "o", "bias")
        table.append(Tensor(f"{LAYER}.self_attn.o_proj.bias", path, ("norm",)))
    for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        stem, path = f"{LAYER}.self_attn.{name}_proj", ("layers", "attention", name)
        table.append(Tensor(f"{stem}.weight", (*path, "kernel"), ("embed", heads, "head_dim"), "to_heads"))
        if config.qkv_bias:
            table.append(Tensor(f"{stem}.bias", (*path, "bias"), (heads, "head_dim"), "bias_of_heads"))
        if config.qk_norm and name != "v":
            path = ("layers", "attention", f"{name}_norm", "scale")
            table.append(Tensor(f"{LAYER}.self_attn.{name}_norm.weight", path, ("norm",)))
    return [*table, *mlp.tensors(config)]
