"""A Decoder's adapters <-> a folder in PEFT's format, which Transformers with PEFT and vLLM load.

`adapter_config.json` and `adapter_model.safetensors`, float32 unless otherwise asked: two matrices for each layer and
target. The weights that they belong to are not in it.
"""

from contextlib import nullcontext
import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from jaxrl_fp16.folders import local_folder
from jaxrl_fp16.models.adapters import check_same, with_dtype
from jaxrl_fp16.models.decoder import Decoder
from jaxrl_fp16.models.families.config_json import read_json
from jaxrl_fp16.models.frozen import BASE, LORA
from jaxrl_fp16.models.hf.export import check_free, hf_array, new_folder, write_json
from jaxrl_fp16.models.hf.load import check_arrays, check_stored, expected_tensors, load_array
from jaxrl_fp16.models.hf.other_folders import ADAPTER
from jaxrl_fp16.models.hf.weight_files import PretrainedError, read_header, refuse_pickles
from jaxrl_fp16.models.init import adapter_table, at, param_shapes, param_shardings, put
from jaxrl_fp16.models.lora import LoraConfig

WEIGHTS = "adapter_model.safetensors"
# Keys of adapter_config.json that would change the forward, and the values under which they do not.
PLAIN = {
    "peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"), "bias": (None, "none"), "fan_in_fan_out": (None, False),
    "use_dora": (None, False), "use_qalora": (None, False), "lora_bias": (None, False),
    "modules_to_save": (None, []), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    "layers_to_transform": (None,), "layers_pattern": (None, [], ""), "layer_replication": (None,),
    "exclude_modules": (None, []), "target_parameters": (None, []), "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []), "megatron_config": (None,),
}


def save_adapter(folder, model, params, *, base_model=None, dtype="float32", overwrite=False, durable=True):
    """Writes the adapters of `{"base", "lora"}` as a folder in PEFT's format; in a run of several processes all call.

    Args:
      folder: its path. It must be new or empty, unless `overwrite`.
      model, params: a Decoder with `lora` and its parameters.
      base_model: folder or name of the model that they belong to, for `base_model_name_or_path`.
      dtype: of the stored matrices: float32, float16 or bfloat16.
      durable: wait until the disk has it all.

    Raises ValueError for a model without adapters, parameters of another one, or an entry that `dtype` does not hold;
    FileExistsError where the folder holds something and `overwrite` is false.
    """
    folder = Path(folder).expanduser()
    if not isinstance(model, Decoder) or model.lora is None:
        raise ValueError(f"{type(model).__name__} has no adapters; allowed: Decoder(config, lora=LoraConfig(...))")
    check_free(folder, overwrite)
    check_same(param_shapes(model)[LORA], params[LORA], 'params["lora"]')
    table = adapter_table(model)
    arrays = [at(params[LORA], tensor.path) for tensor in table]
    check_arrays(table, arrays, dtype, f"export to {folder}")
    tensors = {name: hf_array(tensor, array, index, dtype) for tensor, array in zip(table, arrays)
               for index, name in tensor.entries(array.shape)}
    with new_folder(folder, durable) if jax.process_index() == 0 else nullcontext() as place:
        if place is not None:
            write_json(place / ADAPTER, _config_of(model, base_model))
            save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def _config_of(model, base_model):
    lora = model.lora
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "lora_dropout": lora.dropout,
        "target_modules": _targets(model),
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }


def read_adapter(folder):
    """The `LoraConfig` of a folder in PEFT's format. Raises PretrainedError for what is none, or has more than LoRA."""
    try:
        folder = local_folder(folder, "adapter")
        path = folder / ADAPTER
        if not path.is_file():
            raise ValueError(f"{path} is missing; allowed: an adapter's folder, as PEFT or save_adapter writes it")
        found = read_json(path)
        for key, allowed in PLAIN.items():
            if found.get(key) not in allowed:
                raise ValueError(f"{path}: {key} is {json.dumps(found.get(key))[:80]}; allowed: "
                                 f"{' or '.join(json.dumps(value) for value in allowed)}")
        return _lora_of(path, found)
    except ValueError as error:
        raise PretrainedError(str(error)) from error


def _lora_of(path, found):
    targets = found.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets) or not targets:
        raise ValueError(f"{path}: target_modules is {json.dumps(targets)[:80]}; allowed: a list of linear layers' "
                         "names")
    if found.get("use_rslora") not in (None, False, True):
        raise ValueError(f"{path}: use_rslora is {json.dumps(found['use_rslora'])[:80]}; allowed: true or false")
    numbers = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float, type(None))}
    for key, kinds in numbers.items():
        if not isinstance(found.get(key), kinds) or isinstance(found.get(key), bool):
            raise ValueError(f"{path}: {key} is {json.dumps(found.get(key))[:80]}; allowed: a number")
        if abs(found[key] or 0) >= 2**31:    # an integer of any length is one of JSON
            raise ValueError(f"{path}: {key} is {json.dumps(found[key])[:80]}; allowed: a number below 2^31")
    try:
        return LoraConfig(
            rank=found["r"], alpha=float(found["lora_alpha"]), rslora=bool(found.get("use_rslora")),
            targets=tuple(sorted(name.split(".")[-1] for name in targets)), dropout=found.get("lora_dropout") or 0.0,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_adapter(folder, model, base_params, *, policy=None):
    """`{"base", "lora"}`: the adapters of a folder in PEFT's format beside `base_params`.

    Args:
      folder: its path.
      model: a Decoder whose `lora` is the folder's, but for dropout: `read_adapter` gives it.
      base_params: parameters of the plain model, as `load_pretrained` gives them.
      policy: a `jmp.Policy`: the base is kept in its compute dtype, and adapters beyond its range are refused; None:
        the base stays as it is.

    Raises PretrainedError, a ValueError, for a folder that is damaged, of another model or of other settings.
    """
    found, folder = read_adapter(folder), local_folder(folder, "adapter")
    base = with_dtype(model, base_params, None if policy is None else policy.compute_dtype)
    _check_settings(folder, model, found)
    table, shapes = adapter_table(model), param_shapes(model)[LORA]
    stored = _find(folder)
    check_stored(folder, stored, expected_tensors(table, shapes), ADAPTER)
    sharding = getattr(jax.tree.leaves(base)[0], "sharding", None)
    places = param_shardings(model, sharding.mesh)[LORA] if isinstance(sharding, NamedSharding) else None
    lora, arrays = {}, []
    for tensor in table:
        there = None if places is None else at(places, tensor.path)
        arrays.append(load_array(tensor, at(shapes, tensor.path).shape, there, stored))
        put(lora, tensor.path, arrays[-1])
    check_arrays(table, arrays, "float32" if policy is None else policy.compute_dtype, folder)
    return {BASE: base, LORA: lora}


def _check_settings(folder, model, found):
    lora = model.lora
    try:
        theirs = _targets(model.clone(lora=found))
    except ValueError as error:
        raise PretrainedError(f"{folder}: {error}") from error
    pairs = [("rank", lora.rank, found.rank), ("alpha", lora.alpha, found.alpha), ("rslora", lora.rslora, found.rslora),
             ("targets", _targets(model), theirs)]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise PretrainedError(f"{folder}: {name} is {theirs}, and the model's lora has {ours}; allowed: "
                                  "the folder's, as read_adapter gives it")


def _targets(model):
    """The names of the linear layers with an adapter. Raises ValueError for one that the model lacks."""
    return sorted({tensor.name.split(".")[-3] for tensor in adapter_table(model)})


def _find(folder):
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    refuse_pickles(folder, WEIGHTS)
    raise PretrainedError(f"{folder} lacks {WEIGHTS}; allowed: {WEIGHTS}")


__all__ = ["load_adapter", "read_adapter", "save_adapter"]
