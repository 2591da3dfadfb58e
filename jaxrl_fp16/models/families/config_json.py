"""The values of a Hugging Face `config.json`, each checked; rotary settings in both of its dialects.

Transformers 4 writes `rope_theta` and `rope_scaling` at the top, 5 writes
`rope_parameters`. Both are read; what is written holds both and is read by both.
"""

import json
import math
from pathlib import Path

from jaxrl_fp16.models.layers import RopeScaling

_TYPES = {int: "an integer >= 1, below 2^31", float: "a number > 0", bool: "true or false"}
_BELOW = {int: 2**31, float: math.inf}
_SCALING = {  # key there -> our field and its type
    "factor": ("factor", float),
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "original_max_position_embeddings": ("original_max_position", int),
}
ROPE_TYPES = ("default", "llama3")
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
    """`rope_theta` and `rope_scaling` of a DecoderConfig."""
    rope = {"rope_theta": ABSENT_THETA, "rope_type": "default", **_rope_settings(config)}
    refuse_unless(rope, "rope_type", ROPE_TYPES)
    refuse_unless(rope, "partial_rotary_factor", (1.0,))
    known = {"rope_type", "rope_theta", "partial_rotary_factor"}
    stretched = rope["rope_type"] == "llama3"
    for key in rope.keys() - known - (_SCALING.keys() if stretched else set()):
        raise ValueError(f"rope_parameters.{key} is {rope[key]!r} with rope_type {rope['rope_type']!r}; "
                         f"allowed: none, leave the key out")
    fields = {"rope_theta": read_value(rope, "rope_theta", float), "rope_scaling": None}
    if stretched:
        values = {field: read_value(rope, key, kind) for key, (field, kind) in _SCALING.items()}
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise ValueError(f"high_freq_factor is {values['high_freq_factor']}; allowed: above "
                             f"low_freq_factor, here {values['low_freq_factor']}")
        fields["rope_scaling"] = RopeScaling(**values)
    return fields


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
    if merged.get("rope_type") == "llama3":
        # Transformers 5 assumes the same where the key is missing.
        merged.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return merged


def write_rope(theta, scaling):
    """The keys of config.json for `rope_theta` and `rope_scaling` of a DecoderConfig, in both dialects."""
    settings = {"rope_type": "default"}
    if scaling is not None:
        settings = {key: getattr(scaling, field) for key, (field, _) in _SCALING.items()}
        settings["rope_type"] = "llama3"
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else settings,
        "rope_parameters": {**settings, "rope_theta": theta},
    }
