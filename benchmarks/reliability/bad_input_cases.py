"""Bad input as data: which files and flags, and what the one line of the refusal must say.

The rows are those of the table in docs/reliability.md. A case's `build` spoils a folder that `lay_out` of
`sound_input.py` filled with sound input, and its command is run there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import gzip
from pathlib import Path
import sys

from jaxrl_fp16.cli import COMMANDS
from jaxrl_fp16.models import FAMILIES
from jaxrl_fp16.tasks import TASKS
from sound_input import TENSOR, cut, edit_json, edit_tensor, fill, large_vocabulary, lose, ones, place_shard, write

DATA = ("--task.name", "math", "--task.path", "data.jsonl", "--task.template", "{problem}")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ROLLOUTS = """{"format": "jaxrl_fp16 engine rollouts 1", "engine": "vllm", "version": "1", "dtype": "float16", \
"temperature": 1.0, "vocab_size": 21}
{"prompt": [3], "response": [4, 5], "logprobs": [-0.5]}
"""
# A pickle that makes the file `ran` if anything opens it as one.
PICKLE = b"cposix\nsystem\n(S'touch ran'\ntR."


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input: its row, a name, what the line on stderr holds, the flags after `COMMAND CONFIG`."""

    row: int
    name: str
    says: str
    flags: tuple[str, ...] = ()
    build: Callable[[Path], None] | None = None     # spoils a folder that `lay_out` filled
    command: str = "train"
    config: str | None = "random.yaml"              # None: no config file is named
    backend: str | None = None                      # what JAX is made to say that it runs on
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # only a process of its own has it
    held: str | None = None                         # a folder that another writer holds meanwhile

    @property
    def argv(self):
        return [self.command, *([self.config] if self.config else []), *self.flags]


def config_file(row, name, says, content):
    """A case whose config file holds `content`."""
    return Case(row, name, says, config="bad.yaml", build=write("bad.yaml", content))


def model_folder(row, name, says, build, *flags):
    return Case(row, name, says, flags, build, config="folder.yaml")


def data_file(name, says, content):
    return Case(12, name, says, DATA, lose("data.jsonl") if content is None else write("data.jsonl", content))


def keys_and_values():
    return [
        Case(1, "unknown command", f"command 'trian' is unknown; allowed: {', '.join(COMMANDS)}", command="trian"),
        Case(1, "no config file", "train needs a config file: jaxrl-fp16 train CONFIG", config=None),
        Case(1, "flag in the file's place", "eval needs a config file", ("--run.steps", "3"), None, "eval", None),
        Case(1, "absent config file", "absent.yaml: no such config file", config="absent.yaml"),
        Case(1, "word without a key", '"more" is not allowed; allowed: --key VALUE (command line)', ("more",)),
        Case(1, "unknown flag", "unknown key sampling.temprature; did you mean sampling.temperature? (command line)",
             ("--sampling.temprature", "1")),
        config_file(1, "unknown key of a file", "unknown key run.step; did you mean run.steps? (bad.yaml)",
                    "run: {step: 1}"),
        config_file(1, "unknown section", "unknown key optimiser; did you mean optimizer? (bad.yaml)", "optimiser: {}"),
        config_file(1, "key of another section", "unknown key group_size; did you mean sampling.group_size?",
                    "group_size: 8"),
        Case(2, "wrong type", 'run.steps: "many" is not allowed; allowed: integer >= 0 (command line)',
             ("--run.steps", "many")),
        config_file(2, "text for a number", 'sampling.temperature: "1" is not allowed; allowed: number >= 0',
                    "sampling: {temperature: '1'}"),
        config_file(2, "true for a number", "run.steps: true is not allowed; allowed: integer >= 0",
                    "run: {steps: true}"),
        config_file(2, "null", "run.steps: null is not allowed; allowed: integer >= 0 (bad.yaml)",
                    "run: {steps: null}"),
        config_file(2, "null section", "optimizer: null is not allowed; allowed: a section of", "optimizer: null"),
        config_file(2, "not finite", 'optimizer.learning_rate: ".nan" is not allowed; allowed: number',
                    "optimizer: {learning_rate: .nan}"),
        Case(2, "beyond 32 bits", "run.seed: 4294967296 is not allowed; allowed: integer >= 0, up to 2147483647",
             ("--run.seed", "4294967296")),
        Case(2, "beyond float32", "optimizer.learning_rate: 1e+39 is not allowed; allowed: number >= 0, up to 3.4e+38",
             ("--optimizer.learning_rate", "1e39")),
        Case(2, "prompts beyond any memory", "memory: the run needs about",
             ("--training.max_prompt_tokens", "1000000000")),
        Case(2, "flag without a value", "--run.steps has no value; allowed: --run.steps VALUE", ("--run.steps",)),
        Case(2, "out of range", "run.steps: -1 is not allowed; allowed: integer >= 0", ("--run.steps=-1",)),
        Case(2, "penalty beyond the length", "overlong_penalty is 5.0; allowed: above 0, up to max_new_tokens 4",
             ("--algorithm.preset", "dapo", "--algorithm.overlong_penalty", "5")),
        Case(2, "schedule without an end", "schedule 'linear' with decay_steps 0; allowed: more than warmup",
             ("--critic.optimizer.schedule", "linear")),
        Case(2, "unknown field of a template", "template names the field 'question'; known: kind, problem, q",
             ("--task.template", "{question}")),
        Case(2, "absent reward file", "task.reward_file: absent.py is no file", ("--task.reward_file", "absent.py")),
        Case(2, "reward function with a parameter that nothing fills",
             "reward has the parameter 'wishes'; allowed: prompts, responses or completions, examples, a column of",
             ("--task.reward_file", "odd.py"), write("odd.py", "def reward(responses, wishes):\n    return []\n")),
        Case(2, "model without a width",
             "model: hidden_size missing; allowed: model.path, or all of family, vocab_size",
             ("--model.hidden_size", "null")),
        Case(2, "heads that do not divide", "model: num_kv_heads is 3; allowed: a divisor of num_heads, 2",
             ("--model.num_kv_heads", "3")),
        Case(2, "shape that is not the folder's",
             "model: hidden_size is 16 and path model has 8; allowed: the folder's",
             ("--model.hidden_size", "16"), config="folder.yaml"),
        Case(2, "run folder that cannot be made", "run.dir: data.jsonl", ("--run.dir", "data.jsonl"),
             config="folder.yaml"),
    ]


def yaml_texts():
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
    return [
        config_file(3, "duplicate key", "bad.yaml, line 2: the key 'run' is given twice",
                    "run: {steps: 1}\nrun: {steps: 2}"),
        config_file(3, "alias bomb", "bad.yaml, line 1: anchors and aliases are not allowed", bomb),
        config_file(3, "python tag", "bad.yaml, line 1: the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
                    "run: !!python/object/apply:os.system [touch ran]"),
        config_file(3, "empty", "bad.yaml: holds nothing; a mapping of keys to values is wanted", ""),
        config_file(3, "not YAML", "bad.yaml, line 2: ", "run: {steps: [1\n"),
        config_file(3, "not UTF-8", "bad.yaml: not UTF-8 text (byte 15)", b"run: {name: 'ab\xff'}"),
        config_file(3, "a list", "bad.yaml: holds a list; a mapping of keys to values is wanted", "[1]"),
        config_file(3, "nested too deeply", "bad.yaml: nested too deeply", "[" * 100_000),
        config_file(3, "too large", "bytes; a config file has at most 1,048,576", "#" * (1 << 20) + "\n"),
        config_file(3, "extends an absent file", 'extends: "absent.yaml" is no file beside', "extends: absent.yaml"),
        config_file(3, "extends itself", "extends itself", "extends: bad.yaml"),
        Case(3, "in a flag", "command line, --sampling.stop, line 1: ", ("--sampling.stop", "[a")),
    ]


def names():
    return [
        Case(4, "precision", "precision 'fp17' is unknown; allowed: fp16, bf16, fp32", ("--precision", "fp17")),
        Case(4, "rollout precision", "rollout_precision: precision 'int8' is unknown; allowed: fp16, bf16, fp32",
             ("--rollout_precision", "int8")),
        Case(4, "critic's precision", "critic.precision: precision 'fp8' is unknown; allowed: fp16, bf16, fp32",
             ("--critic.precision", "fp8")),
        Case(4, "dtype of parameters", "params is 'float16'; allowed: float32",
             ("--precision", "params=float16,compute=float16,output=float32")),
        Case(4, "dtype of computation", "compute is 'int8'; allowed: float16, bfloat16, float32",
             ("--precision", "params=float32,compute=int8,output=float32")),
        Case(4, "preset", 'algorithm.preset: "grop" is not allowed; allowed: grpo | dr_grpo',
             ("--algorithm.preset", "grop")),
        Case(4, "task", f'task.name: "maths" is not allowed; allowed: {" | ".join(TASKS)}', ("--task.name", "maths")),
        Case(4, "family", f"model: model family 'gpt2' is unknown; allowed: {', '.join(FAMILIES)}",
             ("--model.family", "gpt2")),
        model_folder(4, "family of a folder", f"model_type is 'gpt2'; allowed: {', '.join(FAMILIES)}",
                     edit_json("model/config.json", model_type="gpt2")),
        Case(4, "attention", 'model.attention: "flash" is not allowed; allowed: auto | blockwise | plain',
             ("--model.attention", "flash")),
        Case(4, "template", "template 'nonsense' is neither a text with a field name", ("--task.template", "nonsense")),
        Case(5, "FP16 on a TPU",
             "precision 'fp16' computes in float16, which a TPU's matrix units do not; allowed on TPU: "
             "bf16, fp32", ("--precision", "fp16"), backend="tpu"),
        Case(5, "GPU that is absent", "run.platform: JAX finds no gpu here", ("--platform", "gpu"),
             environment={"JAX_PLATFORMS": ""}),
        Case(5, "TPU that is absent", "run.platform: JAX finds no tpu here", ("--platform", "tpu"),
             environment={"JAX_PLATFORMS": "cpu"}),
    ]


def arithmetic():
    return [
        Case(6, "mesh", "mesh of data what is left x fsdp 7 x tensor 1 does not fit 1 devices; allowed: fsdp x tensor, "
             "here 7, divides 1", ("--mesh.fsdp", "7")),
        Case(6, "mesh of a given size",
             "mesh of data 2 x fsdp 1 x tensor 1 does not fit 1 devices; allowed: a product of "
             "1, here it is 2", ("--mesh.data", "2")),
        Case(6, "rows over the devices",
             "training.microbatch_size is 8; allowed: multiples of mesh data x fsdp = 3 x 1 = 3",
             environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}),
        Case(6, "minibatch", "training.minibatch_size is 12; allowed: a divisor of prompts_per_step x group_size = "
             "8 x 4 = 32", ("--training.minibatch_size", "12")),
        Case(6, "microbatch", "training.microbatch_size is 5; allowed: a divisor of minibatch_size, 16",
             ("--training.microbatch_size", "5")),
        Case(6, "tokens of a microbatch",
             "training.microbatch_tokens is 5; allowed: null, or at least max_prompt_tokens + max_new_tokens",
             ("--training.microbatch_tokens", "5")),
        Case(6, "supervised microbatch", "sft.microbatch_size is 3; allowed: a divisor of batch_size, 64",
             ("--sft.microbatch_size", "3")),
        Case(6, "group of one", "group_size is 1; advantage 'group_std' allows 2 or more, gae 1",
             ("--sampling.group_size", "1")),
    ]


def models():
    header = (2**60).to_bytes(8, "little") + b"{}"
    shards = [
        ("shard above the folder", "../model/model.safetensors"), ("shard of an absolute path", "/etc/x.safetensors"),
        ("shard in a folder", "sub/x.safetensors"), ("shard by a backslash", "..\\x.safetensors"),
    ]
    return [
        Case(7, "absent folder", "model.path: model folder absent does not exist; allowed: a local folder, nothing is",
             ("--model.path", "absent"), config="folder.yaml"),
        Case(7, "absent folder, tokenizer elsewhere", "absent does not exist; allowed: a local folder, nothing is "
             "downloaded", ("--model.path", "absent", "--model.tokenizer", "model"), config="folder.yaml"),
        Case(7, "name on a hub", "nothing is downloaded; if it is a name on the Hub, fetch it: `hf download Qwen/Qwen2",
             ("--model.path", "Qwen/Qwen2.5-0.5B"), config="folder.yaml"),
        Case(7, "absent tokenizer", "model.tokenizer: tokenizer folder absent does not exist; allowed: a local folder",
             ("--model.tokenizer", "absent"), config="folder.yaml"),
        Case(7, "file for a folder", "model.path: model/model.safetensors is a file; allowed: the model folder that it "
             "lies in, model", ("--model.path", "model/model.safetensors"), config="folder.yaml"),
        model_folder(7, "adapter", "model: model holds an adapter (adapter_config.json: LORA of base), not a whole "
                     "model; allowed: the two merged", lambda folder: [
                         lose("model/config.json")(folder), lose("model/tokenizer.json")(folder), write(
                             "model/adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "base"}')(
                             folder)]),
        model_folder(7, "quantised", "a model quantised by gptq cannot be trained; allowed: the unquantised model",
                     edit_json("model/config.json", quantization_config={"quant_method": "gptq", "bits": 4})),
        Case(7, "run folder", "run/config.json is missing (it is a run folder; `jaxrl-fp16 export CONFIG --resume run`",
             ("--model.path", "run"), lambda folder: (folder / "run" / "checkpoints").mkdir(), config="folder.yaml"),
        Case(7, "critic's folder absent", "critic.path: model folder absent does not exist",
             ("--algorithm.preset", "ppo", "--critic.path", "absent")),
        Case(7, "reward model's folder absent", "task.reward_model.path: model folder absent does not exist",
             ("--task.reward_model.path", "absent", "--training.truncated", "mask")),
        Case(7, "reward model's tokenizer absent",
             "task.reward_model.tokenizer: tokenizer folder absent does not exist",
             ("--task.reward_model.path", "model", "--task.reward_model.tokenizer", "absent", "--training.truncated",
              "mask")),
        model_folder(7, "without config.json", "model/config.json is missing; allowed: a model folder as Transformers",
                     lose("model/config.json")),
        model_folder(7, "config.json is no JSON", "model/config.json is not a JSON file",
                     write("model/config.json", "{")),
        model_folder(7, "without weights", "model holds no weights; allowed: model.safetensors, or",
                     lose("model/model.safetensors")),
        model_folder(7, "pickle alone", "model holds pickled weights only (pytorch_model.bin), which are never opened",
                     lambda folder: [lose("model/model.safetensors")(folder),
                                     write("model/pytorch_model.bin", PICKLE)(folder)]),
        model_folder(8, "truncated header", "model/model.safetensors is damaged or not a safetensors file",
                     cut("model/model.safetensors", 100)),
        model_folder(8, "truncated tensors", "model/model.safetensors is damaged or not a safetensors file",
                     cut("model/model.safetensors", -9)),
        model_folder(8, "header of 2^60 bytes", "model/model.safetensors is damaged or not a safetensors file",
                     write("model/model.safetensors", header)),
        model_folder(8, "Git LFS pointer", "model/model.safetensors is a Git LFS pointer",
                     write("model/model.safetensors", POINTER)),
        model_folder(8, "tensor missing", f"tensor {TENSOR} is missing", edit_tensor(lambda tensor: None)),
        model_folder(8, "tensor too many",
                     "tensor score.weight in model.safetensors is unknown; allowed: the 27 tensors",
                     edit_tensor(lambda tensor: ones(1, 8), "score.weight")),
        model_folder(8, "tensor misshapen", f"tensor {TENSOR} has shape [8, 7]; allowed: [8, 8]",
                     edit_tensor(lambda tensor: ones(8, 7))),
        model_folder(8, "tensor of integers", f"tensor {TENSOR} is stored as I64; allowed: F32, F16, BF16",
                     edit_tensor(lambda tensor: ones(8, 8).astype("int64"))),
        model_folder(8, "config of more layers", "tensor model.layers.2.",
                     edit_json("model/config.json", num_hidden_layers=3)),
        model_folder(8, "width beyond 32 bits", "hidden_size is 1000000000000; allowed: an integer >= 1, below 2^31",
                     edit_json("model/config.json", hidden_size=10**12)),
        model_folder(8, "config of another width", "has shape [21, 8]; allowed: [21, 16], as config.json",
                     edit_json("model/config.json", hidden_size=16)),
        *(Case(9, name, f"tensor {TENSOR} is said to lie in {shard!r}; allowed: the name of a .safetensors file in "
               "that folder", (), place_shard(shard), config="shards.yaml") for name, shard in shards),
        Case(8, "shard missing", "shards/model-00004-of-00004.safetensors is missing; allowed: every shard that", (),
             lose("shards/model-00004-of-00004.safetensors"), config="shards.yaml"),
        model_folder(10, "NaN", f"model: model: tensor {TENSOR} holds nan; allowed: finite values", fill(float("nan"))),
        model_folder(10, "infinite", f"tensor {TENSOR} holds inf; allowed: finite values", fill(float("inf"))),
        model_folder(10, "infinite in BF16", f"tensor {TENSOR} holds inf; allowed: finite values", fill(float("-inf")),
                     "--precision", "bf16"),
        model_folder(10, "beyond FP16",
                     f"tensor {TENSOR} holds 65505; allowed: finite values up to 65504, the range of "
                     "float16", fill(-65505.0)),
        model_folder(6, "rows beyond the positions",
                     "training.max_prompt_tokens + sampling.max_new_tokens is 6 + 4 = 10 tokens, and the model's "
                     "weights were made for 9 positions (max_position_embeddings); allowed: at most these, or",
                     edit_json("model/config.json", max_position_embeddings=9)),
        model_folder(11, "no tokenizer",
                     "model.path: model: no tokenizer.json; a folder with a fast tokenizer is needed",
                     lose("model/tokenizer.json")),
        model_folder(11, "no end-of-text", "the tokenizer has no end-of-text token",
                     edit_json("model/tokenizer_config.json", eos_token=None)),
        model_folder(11, "longest text is no number", "model_max_length is 'long'; allowed: a number",
                     edit_json("model/tokenizer_config.json", model_max_length="long")),
        model_folder(11, "vocabulary too large",
                     "model: the tokenizer has ids up to 59 and the model's embedding 21 rows",
                     large_vocabulary),
        model_folder(11, "marks of a published template",
                     "task: template 'qwen3' holds <|im_start|>, <|im_end|>, which this tokenizer reads as pieces of",
                     None, "--task.template", "qwen3"),
        Case(11, "embedding too small", "model: the tokenizer has ids up to 20 and the model's embedding 20 rows",
             ("--model.vocab_size", "20")),
        Case(11, "end token that is no token",
             "sampling.end_tokens: '<|im_end|>' is no token of the tokenizer; allowed: the name of one, such as '<",
             ("--sampling.end_tokens", '["<|im_end|>"]')),
        model_folder(11, "damaged generation_config.json", "generation_config.json is not a JSON file",
                     write("model/generation_config.json", "{")),
    ]


def data():
    good = b'{"problem": "1", "answer": "1"}\n'
    return [
        data_file("absent", "task: data.jsonl: no such data file", None),
        data_file("empty", "task: data.jsonl: no rows; at least one JSON object is needed", b""),
        data_file("not JSON", "task: data.jsonl, line 3: not JSON", good + b'\n{"problem": "2", answer: "2"}\n'),
        data_file("no such field", "task: data.jsonl, line 2: no field 'answer'; the row has 'problem'",
                  good + b'{"problem": "2"}\n'),
        data_file("null for text", "task: data.jsonl, line 2: field 'answer' is a NoneType",
                  good + b'{"problem": "2", "answer": null}\n'),
        data_file("a list", "task: data.jsonl, line 1: a JSON list; a JSON object is needed", b'["1", "2"]\n'),
        data_file("not UTF-8", "task: data.jsonl, line 1: not UTF-8", b'{"problem": "\xff", "answer": "1"}\n'),
        data_file("nested too deeply", "task: data.jsonl, line 1: not JSON", b"[" * 100_000),
        data_file("key twice", "task: data.jsonl, line 2: key 'answer' is there twice; allowed: once",
                  good + b'{"problem": "2", "answer": "2", "answer": "3"}\n'),
        data_file("half of a surrogate pair", "task: data.jsonl, line 2: text '2\\ud800' holds half of a surrogate",
                  good + b'{"problem": "2\\ud800", "answer": "2"}\n'),
        data_file("NaN for an answer", "task: data.jsonl, line 2: field 'answer' is nan; text or a finite number",
                  good + b'{"problem": "2", "answer": NaN}\n'),
        data_file("empty answer", "task: data.jsonl, line 2: field 'answer' is ' ', no answer to grade by; allowed",
                  good + b'{"problem": "2", "answer": " "}\n'),
        data_file("zip archive", "task: data.jsonl: a zip archive, by its first bytes; allowed: JSONL or a JSON list",
                  b"PK\x03\x04"),
        data_file("gzip cut short", "task: data.jsonl: a damaged gzip file", gzip.compress(good)[:-9]),
        data_file("CSV", "task: data.jsonl, line 1: not JSON (Expecting value: line 1 column 1 (char 0)): it begins "
                  "with 'problem,answer'; allowed: JSONL", b"problem,answer\n1,1\n"),
        Case(12, "rollouts of another engine", "rollouts.jsonl, line 2: logprobs has 1 entries and response 2; allowed",
             ("--rollouts", "rollouts.jsonl"), write("rollouts.jsonl", ROLLOUTS), command="mismatch"),
        Case(12, "evaluation set", "evaluation: absent.jsonl: no such data file",
             ("--evaluation.sets", "[{name: a, path: absent.jsonl}]"), config="folder.yaml"),
        Case(13, "all prompts too long", "none of the 64 prompts fits into training.max_prompt_tokens = 3",
             ("--training.max_prompt_tokens", "3")),
        Case(13, "no prompt with its problem", "training: none of the 8 problems makes a prompt: 8 without the "
             "problem's text; allowed: problems with a text, and a template that shows it",
             (*DATA[:-1], "{answer_to}="),
             write("data.jsonl", b'{"problem": "1", "answer": "1", "answer_to": "2"}\n' * 14)),
        Case(13, "all prompts of a file too long", "none of the 2 prompts fits into training.max_prompt_tokens = 3",
             (*DATA, "--training.max_prompt_tokens", "3")),
    ]


def run_folders():
    def resumed(row, name, says, *flags, **more):
        return Case(row, name, says, ("--resume", "run", *flags), **{"config": "folder.yaml", **more})

    return [
        resumed(27, "changed value", "resume: run was started otherwise: optimizer.learning_rate was 1e-06, is 0.1; "
                "allowed to differ: run.steps", "--optimizer.learning_rate", "0.1"),
        resumed(27, "changed precision", "resume: run was started otherwise: precision was 'fp16', is 'bf16'",
                "--precision", "bf16"),
        resumed(27, "changed seed", "run.seed was 0, is 1; allowed to differ:", "--run.seed", "1"),
        resumed(27, "changed content", "run was started with other content: config.json of model.path has changed",
                build=write("run/inputs.json", '{"model.path": {"config.json": "of another"}}')),
        resumed(27, "damaged digests", "resume: run/inputs.json cannot be read", build=write("run/inputs.json", "{")),
        resumed(27, "a key that is gone", "training.gone was 3, and is no key any more",
                build=lambda folder: write("run/config.yaml", (folder / "run" / "config.yaml").read_bytes().replace(
                    b"training:\n", b"training:\n  gone: 3\n"))(folder)),
        Case(28, "no run", "resume: model has no config.yaml; allowed: the folder of an earlier run",
             ("--resume", "model"), config="folder.yaml"),
        Case(28, "absent run", "resume: absent does not exist; allowed: the folder of an earlier run",
             ("--resume", "absent"), config="folder.yaml"),
        resumed(28, "another run", "resume: run was started otherwise: run.name was 'folder', is 'shards'",
                config="shards.yaml"),
        resumed(28, "another writer", "resume: run is being written by process", held="run"),
    ]


def engines():
    other = ("--rollout.engine", "transformers")
    return [
        Case(36, "unknown engine", 'rollout.engine: "sglang" is not allowed; allowed: jit | transformers | vllm',
             ("--rollout.engine", "sglang")),
        Case(36, "no such interpreter",
             "rollout: python is /no/python, which is no program here; allowed: the path of a Python interpreter that "
             "has torch, transformers", (*other, "--rollout.python", "/no/python")),
        Case(36, "an interpreter that is none",
             "rollout: python is ls, which does not run as Python (code 2); allowed: an interpreter",
             (*other, "--rollout.python", "ls")),
        Case(36, "interpreter without the packages", "rollout: python is ./bare, which lacks vllm; rollout.engine vllm "
             "needs an interpreter with: pip install vllm", ("--rollout.engine", "vllm", "--rollout.python", "./bare"),
             bare_python),
        Case(36, "top-k with vLLM",
             "top_k is 5 and top_p 1.0 with rollout.engine vllm; allowed: 0 and 1, as vLLM does not say which ids it",
             ("--rollout.engine", "vllm", "--sampling.top_k", "5")),
        Case(36, "a temperature that vLLM raises",
             "temperature is 0.001 with rollout.engine vllm; allowed: 0, or 0.01 to 2, beyond which it",
             ("--rollout.engine", "vllm", "--sampling.temperature", "0.001")),
        Case(36, "top-p of an evaluation with vLLM", "evaluation: top_k is 0 and top_p 0.9 with rollout.engine vllm",
             ("--rollout.engine", "vllm", "--evaluation.sets", "[{name: a, top_p: 0.9}]")),
        Case(36, "memory beyond the card",
             "rollout.memory_fraction: 0.95 is not allowed; allowed: number > 0 and <= 0.8",
             ("--rollout.memory_fraction", "0.95")),
        Case(36, "an engine at another's run", "run was started otherwise: rollout.engine was 'jit', is 'transformers'",
             ("--resume", "run", *other), config="folder.yaml"),
    ]


def bare_python(folder):
    """An interpreter that finds no package."""
    place = folder / "bare"
    place.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -I -S "$@"\n')
    place.chmod(0o755)


CASES = [*keys_and_values(), *yaml_texts(), *names(), *arithmetic(), *models(), *data(), *run_folders(), *engines()]

__all__ = ["CASES", "Case"]
