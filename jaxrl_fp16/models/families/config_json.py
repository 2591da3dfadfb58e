"""The values of a Hugging Face `config.json`, each checked; rotary settings in both of its dialects.

Transformers 4 writes `rope_theta` and `rope_scaling` at the top, 5 writes
`rope_parameters`. Both are read; what is written holds both and is read by both.
"""

import dataclasses
import json
import math
from pathlib import Path

from jaxrl_fp16.models.layers import RopeScaling, YarnScaling, yarn_amplitude

_TYPES = {int: "an integer >= 1, below 2^31", float: "a number > 0", bool: "true or false"}
_BELOW = {int: 2**31, float: math.inf}
_SCALING = {  # key there -> our field and its type
    "factor": ("factor", float),
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "original_max_position_embeddings": ("original_max_position", int),
}
_YARN = {key: (key, float) for key in ("factor", "beta_fast", "beta_slow", "attention_factor")} | {
    "original_max_position_embeddings": ("original_max_position", int), "truncate": ("truncate", bool)}
_MSCALE = ("mscale", "mscale_all_dim")
ROPE_TYPES = {"default": set(), "llama3": set(_SCALING), "yarn": {*_YARN, *_MSCALE}}  # -> the keys that each has
# Of other kinds: what the model is without them.
_LEFT_OUT = {
    "dynamic": "the same up to max_position_embeddings tokens",
    "linear": "another one at every length",
    "longrope": "another one at every length, unless all of short_factor is 1 and the attention factor too",
    "su": "another one at every length, unless all of short_factor is 1 and the attention factor too",
    "mrope": "the same for text alone",
    "proportional": "another one at every length",
}
ABSENT_THETA = 10000.0  # what Transformers takes where the key is missing, whatever the family


def read_json(path):
    """The object in a JSON file; ValueError for anything else, a repeated key included."""
    text = Path(path).read_bytes()
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer; allowed: the file, as `git lfs pull` fetches it")
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; allowed: a JSON object")
    return found


def _without_repeats(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def read_value(config, key, kind):
    """`config[key]` as `kind` (int, float or bool), in range."""
    if config.get(key) is None:
        raise ValueError(f"{key} is missing; allowed: {_TYPES[kind]}")
    value = config[key]
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind or (kind is not bool and not 0 < value < _BELOW[kind]):
        raise ValueError(f"{key} is {repr(config[key])[:80]}; allowed: {_TYPES[kind]}")
    return value


def refuse_unless(config, key, allowed):
    """ValueError unless `config` lacks `key` or holds one of `allowed` there."""
    value = config.get(key)
    if value is not None and value not in allowed:
        names = ", ".join(json.dumps(item) for item in allowed) or "none, leave the key out"
        raise ValueError(f"{key} is {json.dumps(value)[:80]}; allowed: {names}")


def refuse_quantised(config):
    """ValueError if `config` says that the weights are quantised, by any of the keys that tools write."""
    for key in ("quantization_config", "quantization", "compression_config"):
        about = config.get(key)
        if about is not None:
            known = about if isinstance(about, dict) else {}
            method = known.get("quant_method") or known.get("quant_algo") or "some method"
            raise ValueError(f"{key} is {json.dumps(about)[:80]}: a model quantised by {str(method)[:40]} cannot be "
                             "trained; allowed: the unquantised model that it was made from; leave the key out only "
                             "where all weights are plain numbers")


def read_rope(config):
    """`rope_theta`, `rope_scaling` and `rope_yarn` of a DecoderConfig."""
    rope = {"rope_theta": ABSENT_THETA, "rope_type": "default", **_rope_settings(config)}
    _refuse_rope_type(rope["rope_type"])
    refuse_unless(rope, "partial_rotary_factor", (1.0,))
    known = {"rope_type", "rope_theta", "partial_rotary_factor"}
    for key in rope.keys() - known - ROPE_TYPES[rope["rope_type"]]:
        raise ValueError(f"rope_parameters.{key} is {rope[key]!r} with rope_type {rope['rope_type']!r}; "
                         f"allowed: none, leave the key out")
    fields = {"rope_theta": read_value(rope, "rope_theta", float), "rope_scaling": None, "rope_yarn": None}
    if rope["rope_type"] == "yarn":
        fields["rope_yarn"] = _read_yarn(rope, config)
    if rope["rope_type"] == "llama3":
        values = {field: read_value(rope, key, kind) for key, (field, kind) in _SCALING.items()}
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise ValueError(f"high_freq_factor is {values['high_freq_factor']}; allowed: above "
                             f"low_freq_factor, here {values['low_freq_factor']}")
        fields["rope_scaling"] = RopeScaling(**values)
    return fields


def _refuse_rope_type(name):
    if isinstance(name, str) and name in ROPE_TYPES:
        return
    without = _LEFT_OUT.get(name) if isinstance(name, str) else None
    raise ValueError(f"rope_type is {json.dumps(name)[:80]}; allowed: {', '.join(map(json.dumps, ROPE_TYPES))}; "
                     f"without these settings the model is {without or 'another one'}")


def _read_yarn(rope, config):
    values = {field: read_value(rope, key, kind) for key, (field, kind) in _YARN.items()
              if key in rope or key in ("factor", "original_max_position_embeddings")}
    if values.get("beta_fast", 32.0) < values.get("beta_slow", 1.0):
        raise ValueError(f"beta_fast is {rope.get('beta_fast', 32)}; allowed: from beta_slow, here "
                         f"{rope.get('beta_slow', 1)}")
    if all(key in rope for key in _MSCALE):  # one of them alone is passed over, as Transformers does
        slopes = [yarn_amplitude(values["factor"], read_value(rope, key, float)) for key in _MSCALE]
        values.setdefault("attention_factor", slopes[0] / slopes[1])
    declared = config.get("max_position_embeddings")
    scaling = YarnScaling(**values)
    return scaling if declared == scaling.longest else dataclasses.replace(scaling, declared_positions=declared)


def _rope_settings(config):
    """One dict from both dialects; ValueError where they contradict each other."""
    top = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    merged = {}
    for source in (top, config.get("rope_scaling"), config.get("rope_parameters")):
        if not isinstance(source, dict | None):
            raise ValueError(f"rotary settings are {source!r}; allowed: an object")
        for key, value in (source or {}).items():
            key = "rope_type" if key == "type" else key  # the name until Transformers 4.43
            if value is not None and merged.setdefault(key, value) != value:
                raise ValueError(f"{key} is given as {merged[key]!r} and as {value!r}; allowed: one value")
    if merged.get("rope_type") in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        above = config.get(key)
        if above is not None and merged.setdefault(key, above) != above:
            raise ValueError(f"{key} is given as {merged[key]!r} and as {above!r}; allowed: one value")
        # Transformers 5 assumes the same where the key is missing.
        merged.setdefault(key, config.get("max_position_embeddings"))
    return merged


def write_rope(theta, scaling, yarn=None):
    """The keys of config.json for `rope_theta`, `rope_scaling` and `rope_yarn` of a DecoderConfig, in both dialects."""
    settings = {"rope_type": "default"}
    if yarn is not None:
        usual = {field.name: field.default for field in dataclasses.fields(yarn)}
        settings = {key: getattr(yarn, field) for key, (field, _) in _YARN.items()
                    if getattr(yarn, field) != usual[field]}
        settings["rope_type"] = "yarn"
    elif scaling is not None:
        settings = {key: getattr(scaling, field) for key, (field, _) in _SCALING.items()}
        settings["rope_type"] = "llama3"
    return {
        "rope_theta": theta,
        "rope_scaling": None if settings["rope_type"] == "default" else settings,
        "rope_parameters": {**settings, "rope_theta": theta},
    }
