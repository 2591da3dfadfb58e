"""Folders that people take for a model's: adapters, other formats, runs and caches, each named as what it is."""

from jaxrl_fp16.models.families.config_json import read_json

ADAPTER = "adapter_config.json"
# Files by their patterns, and what they are; the first that is there is named.
SIGNS = (
    ("adapter_model.*", "it holds an adapter's weights ({name}), which must be merged into their model"),
    ("checkpoints", "it is a run folder; `jaxrl-fp16 export CONFIG --resume {folder}` writes {folder}/model"),
    ("snapshots/*", "it is the Hub's cache; the model is in {folder}/{name}"),
    ("*.gguf", "it holds GGUF ({name}), llama.cpp's format; take the model that this was made from"),
    ("consolidated*", "it holds {name}, its maker's own format, which Transformers' conversion scripts read"),
    ("*.distcp", "it holds a distributed checkpoint ({name}), which the program that wrote it can merge"),
    ("*.nemo", "it holds NeMo's format ({name}), which NeMo exports to Hugging Face's"),
    ("tf_model.h5", "it holds TensorFlow's format ({name}); take the folder's safetensors"),
    ("flax_model*.msgpack", "it holds Flax's format ({name}); take the folder's safetensors"),
    ("*.onnx", "it holds ONNX ({name}); take the model that this was made from"),
    ("*/config.json", "{name} is there: perhaps that folder is meant"),
)


def refuse_adapter(folder):
    """ValueError for the folder of an adapter. Transformers would load another model's weights under it."""
    if not (folder / ADAPTER).is_file():
        return
    about = read_json(folder / ADAPTER)
    kind, base = (str(about.get(key) or "?")[:80] for key in ("peft_type", "base_model_name_or_path"))
    raise ValueError(f"{folder} holds an adapter ({ADAPTER}: {kind} of {base}), not a whole model; allowed: the two "
                     "merged, as PEFT's merge_and_unload() and then save_pretrained(FOLDER) write them")


def what_lies_in(folder, *more):
    """`" (...)"` with what a folder is, where that can be told by its files' names; else nothing. more: as SIGNS."""
    for pattern, words in (*SIGNS, *more):
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found is not None:
            return f" ({words.format(name=found.relative_to(folder), folder=folder)})"
    return ""
