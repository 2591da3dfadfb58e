"""The sound input of a refusal's test: configs, a model, data, a run folder; and what spoils each of them."""

from __future__ import annotations

import json

CONFIG = {
    "run": {"steps": 1, "platform": "auto", "compile_cache": None, "dir": "runs"},
    "task": {"arithmetic": {"kinds": ["add"], "digits": 1}, "train_size": 64, "heldout_size": 6},
    "sampling": {"max_new_tokens": 4, "group_size": 4},
    "training": {"prompts_per_step": 8, "minibatch_size": 16, "microbatch_size": 8, "max_prompt_tokens": 6},
    "logging": {"tensorboard": False},
}
SHAPE = {"family": "qwen2", "hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "num_heads": 2,
         "num_kv_heads": 1, "head_dim": 4}
TENSOR = "model.layers.1.mlp.gate_proj.weight"
SHARD_INDEX = "model.safetensors.index.json"


def lay_out(folder):
    """Writes `random.yaml`, `folder.yaml` and `shards.yaml`, and what they name, and `data.jsonl` and `run/`."""
    import jax

    from jaxrl_fp16.config import load_config, to_yaml
    from jaxrl_fp16.models import Decoder, DecoderConfig, init_params, save_pretrained
    from jaxrl_fp16.tasks import ALPHABET
    from jaxrl_fp16.tokenizer import character_tokenizer, vocabulary_size
    from jaxrl_fp16.training.runs.run_config import Config

    for name, model in (("random", SHAPE), ("folder", {"path": "model"}), ("shards", {"path": "shards"})):
        (folder / f"{name}.yaml").write_text(json.dumps({**CONFIG, "model": model}))
    tokenizer = character_tokenizer(ALPHABET)
    model = Decoder(DecoderConfig(vocab_size=vocabulary_size(tokenizer), **SHAPE))
    params = init_params(model, jax.random.key(0))
    save_pretrained(folder / "model", model, params, dtype="float32", tokenizer=tokenizer)
    save_pretrained(folder / "shards", model, params, dtype="float32", tokenizer=tokenizer, shard_bytes=1500)
    (folder / "data.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n' * 8)
    # As `train` on a CPU would resolve it.
    started = load_config(Config, folder / "folder.yaml",
                          ["--precision", "fp16", "--run.platform", "cpu", "--run.name", "folder",
                           "--model.attention", "blockwise"])
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(to_yaml(started))


# -- what spoils it: functions of the folder --------------------------------------------------------


def write(name, content):
    """A file with this text or these bytes."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def lose(name):
    return lambda folder: (folder / name).unlink()


def cut(name, size):
    return lambda folder: write(name, (folder / name).read_bytes()[:size])(folder)


def edit_json(name, **changes):
    """Sets keys of a JSON file; None removes one."""

    def edit(folder):
        found = json.loads((folder / name).read_text()) | changes
        write(name, json.dumps({key: value for key, value in found.items() if value is not None}))(folder)

    return edit


def edit_tensor(change, name=TENSOR):
    """Puts `change(tensor)` in a tensor's place; None removes it."""

    def edit(folder):
        from safetensors.numpy import load_file, save_file

        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        changed = change(tensors.pop(name, None))
        save_file(tensors if changed is None else {**tensors, name: changed}, path, metadata={"format": "pt"})

    return edit


def fill(value):
    """One element of a tensor."""

    def change(tensor):
        tensor[1, 2] = value
        return tensor

    return edit_tensor(change)


def place_shard(name):
    """Says in the index that a tensor lies in the file `name`."""

    def edit(folder):
        where = json.loads((folder / "shards" / SHARD_INDEX).read_text())["weight_map"]
        edit_json(f"shards/{SHARD_INDEX}", weight_map=where | {TENSOR: name})(folder)

    return edit


def large_vocabulary(folder):
    from jaxrl_fp16.tokenizer import character_tokenizer, save_tokenizer

    save_tokenizer(character_tokenizer("".join(map(chr, range(33, 90)))), folder / "model")


def ones(*shape):
    import numpy as np

    return np.ones(shape, np.float32)


__all__ = ["TENSOR", "cut", "edit_json", "edit_tensor", "fill", "large_vocabulary", "lay_out", "lose", "ones",
           "place_shard",
           "write"]
