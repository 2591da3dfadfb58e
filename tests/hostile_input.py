"""Run by test_security.py in a process of its own: hostile input goes through the real commands under an audit hook.

Prints one JSON line a case: exit code, the line on stderr, and every event that should not have been. A hook cannot be
taken off again, so it is set here and not in the tests' process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks" / "reliability"
sys.path.append(str(BENCHMARKS))

from sound_input import edit_json, lay_out, lose, place_shard, write  # noqa: E402

CANARY = "canary"                      # the file that hostile code makes
SECRET = "hunter2-is-the-password"     # the content of the files outside
CODE = f"open({CANARY!r}, 'w').close()\n"
PICKLE = f"c__builtin__\nexec\n(S{CODE.strip()!r}\ntR.".encode()
EVIL = ("modeling_evil", "tokenizer_evil", "evil", "generate", "custom_generate")  # modules that lie in the folders
NETWORK = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr",
           "socket.sendto", "urllib.Request", "http.client.connect"}
PROCESSES = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"}
FLAGS = ("--run.steps", "0", "--run.export", "false", "--task.workers", "1", "--training.max_prompt_tokens", "200")


class Watch:
    """What the hook saw since the last case. `work`: the folder of all cases, with the files outside in `secret`."""

    def __init__(self, work):
        self.work, self.secrets, self.found = str(work), str(work / "secret"), []

    def __call__(self, event, arguments):
        told = self.problem(event, arguments)
        if told:
            self.found.append(f"{event}: {told}"[:200])

    def problem(self, event, arguments):
        """What is wrong with an event, as text; empty for most."""
        if event == "open":
            path = arguments[0]
            path = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
            return path if os.path.abspath(path).startswith(self.secrets) or os.path.basename(path) == CANARY else ""
        if event == "import":
            return arguments[0] if arguments[0].rpartition(".")[2] in EVIL else ""
        if event == "exec":
            return arguments[0].co_filename if arguments[0].co_filename.startswith(self.work) else ""
        if event == "pickle.find_class":
            return ".".join(arguments)
        if event in NETWORK:
            local = event in ("socket.connect", "socket.bind") and arguments[0].family == socket.AF_UNIX
            return "" if local else repr(arguments[1:] or arguments)
        if event == "subprocess.Popen":
            return "" if "jaxrl_fp16.tasks.grading.worker" in " ".join(map(str, arguments[1])) else repr(arguments[1])
        return repr(arguments) if event in PROCESSES else ""


# -- the hostile input ------------------------------------------------------------------------------------


def several(*edits):
    return lambda folder: [edit(folder) for edit in edits]


def stray_modules(folder):
    """Files that hide libraries, where the current folder is looked in first."""
    for name in ("json", "yaml", "sympy", "math_verify", "numpy", "jaxrl_fp16", "sitecustomize", "evil"):
        write(f"{name}.py", CODE)(folder)


def object_arrays(folder):
    """Rollouts whose array is a pickle."""
    import numpy as np

    (folder / "rollouts").mkdir()
    np.savez(folder / "rollouts" / "fp16.npz", tokens=np.array([Bomb()], dtype=object))


class Bomb:
    def __reduce__(self):
        return exec, (CODE,)


def checkpoint(change):
    """Changes the files of a run's checkpoint, and writes checksums that fit them."""

    def edit(folder):
        from jaxrl_fp16.training.checkpoints.manifest import write_manifest

        path = folder / "trained" / "checkpoints" / "1"
        change(path)
        write_manifest(path)

    return edit


def pickled_payloads(path):
    for file in path.glob("state/**/*"):
        if file.is_file():
            file.write_bytes(pickle.dumps(Bomb()))


def pickled_arrays(path):
    """The metadata stay as they are."""
    for file in path.glob("state/**/d/*"):
        file.write_bytes(PICKLE)


def leaves_outside(path):
    about = json.loads((path / "about.json").read_text())
    about["leaves"] = {f"../../../../secret/{name}": entry for name, entry in about["leaves"].items()}
    (path / "about.json").write_text(json.dumps(about))


def manifest_outside(folder):
    path = folder / "trained" / "checkpoints" / "1" / "manifest.json"
    path.write_text(json.dumps({"../../../../secret/secret.txt": "0", str(path.parents[4] / "secret/secret.txt"): "0"}))


MODEL = ("folder.yaml", *FLAGS)
DATA = ("--task.name", "math", "--task.path", "data.jsonl", "--task.template", "{problem}")
TRAINED = ("--sft.steps", "1", "--sft.batch_size", "8", "--sft.microbatch_size", "8", "--sft.max_length", "10",
           "--run.name", "trained", "--run.stamp", "false")
RESUME = ("--resume", "trained", *TRAINED)
HOSTILE_ROW = json.dumps({"problem": "{{ 7*7 }} {% include 'x' %} {0.__class__} 1+1=", "kind": "__import__('os')",
                          "answer": f"['2', __import__('os').system('touch {CANARY}')]"}) + "\n"


def model(build, *flags, code=2):
    return code, ("train", *MODEL, *flags), build


def chat(template):
    """A folder with this chat template, which makes the prompts."""
    return model(edit_json("model/tokenizer_config.json", chat_template=template), "--task.template", "chat")


def config(text):
    return 2, ("train", "bad.yaml"), write("bad.yaml", text)


# name -> (exit code, arguments, what spoils the folder)
CASES = {
    "pickle alone": model(several(lose("model/model.safetensors"), write("model/pytorch_model.bin", PICKLE))),
    "pickles beside the weights": model(several(*(write(f"model/{name}", PICKLE) for name in (
        "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"))), code=0),
    "auto_map of the model": model(several(
        write("model/modeling_evil.py", CODE),
        edit_json("model/config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Model"}))),
    "trust_remote_code in config.json": model(several(
        write("model/modeling_evil.py", CODE), edit_json("model/config.json", trust_remote_code=True)), code=0),
    "auto_map of the tokenizer": model(several(
        write("model/tokenizer_evil.py", CODE), edit_json(
            "model/tokenizer_config.json", trust_remote_code=True, tokenizer_class="Tokenizer",
            auto_map={"AutoTokenizer": ["tokenizer_evil.Tokenizer", "tokenizer_evil.Tokenizer"]})), code=0),
    "tokenizer files outside": model(edit_json(
        "model/tokenizer_config.json", tokenizer_file="../secret/tokenizer.json", vocab_file="../secret/secret.txt",
        added_tokens_file="../secret/secret.txt", special_tokens_map_file="../secret/secret.txt"), code=0),
    "tokenizer that is a pickle": model(write("model/tokenizer.json", PICKLE)),
    "custom_generate": model(several(
        lambda folder: (folder / "model/custom_generate").mkdir(),
        write("model/custom_generate/generate.py", CODE),
        write("model/generation_config.json", '{"custom_generate": "custom_generate", "trust_remote_code": true}')),
        code=0),
    "end-of-text that is no id": model(write("model/generation_config.json", '{"eos_token_id": {"0": 1.5}}')),
    "end-of-text beyond all ids": model(write("model/generation_config.json", f'{{"eos_token_id": [1, {10**30}]}}')),
    "shard above the folder": (2, ("train", "shards.yaml", *FLAGS), place_shard("../secret/model.safetensors")),
    "shard by its whole path": (2, ("train", "shards.yaml", *FLAGS), lambda folder: place_shard(
        str(folder.parent / "secret/model.safetensors"))(folder)),
    "header of 2^60 bytes": model(write("model/model.safetensors", (2**60).to_bytes(8, "little") + b"{}")),
    "config.json 10,000 deep": model(write("model/config.json", '{"a":' * 10_000 + "1" + "}" * 10_000)),
    "a million million layers": model(edit_json("model/config.json", num_hidden_layers=10**12)),
    "a width of 10^30": model(edit_json("model/config.json", hidden_size=10**30)),
    "chat template into the classes": chat("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "chat template by a filter": chat("{{ ''|attr('__class__')|attr('__mro__') }}{{ x.y.z }}"),
    "chat template into the globals": chat(f"{{{{ cycler.__init__.__globals__.os.system('touch {CANARY}') }}}}"),
    "chat template by lipsum": chat(f"{{{{ lipsum.__globals__['os'].popen('touch {CANARY}') }}}}"),
    "chat template that includes": chat("{% include '../secret/secret.txt' %}"),
    "chat template that imports": chat("{% import 'os' as os %}{{ os.system('true') }}"),
    "chat template without an end": chat("{% for i in range(10**9) %}x{% endfor %}"),
    "python tag": config(f"run: !!python/object/apply:os.system ['touch {CANARY}']"),
    "python module": config("run: !!python/module:evil {}"),
    "python name": config("run: {name: !!python/name:evil.x }"),
    "alias bomb": config("a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))),
    "extends a secret": config("extends: ../secret/secret.txt"),
    "extends a secret mapping": config("extends: ../secret/password.yaml"),
    "template with attributes": (2, ("train", *MODEL, "--task.template", "{problem.__class__.__mro__}"), None),
    "template with an index": (2, ("train", *MODEL, "--task.template", "{0}{1!r}"), None),
    "template beside a field": (0, ("train", *MODEL, "--task.template", "{problem} {problem.__class__} {0}"), None),
    "rows of data": (0, ("train", *MODEL, *DATA), write("data.jsonl", HOSTILE_ROW * 9)),
    "rows that are graded": (0, ("generate", "folder.yaml", *DATA, *FLAGS), write("data.jsonl", HOSTILE_ROW * 9)),
    "data that are a pickle": (2, ("train", *MODEL, *DATA), write("data.jsonl", PICKLE)),
    "model by its name": (2, ("train", *MODEL, "--model.path", "evil/model"), None),
    "model at a URL": (2, ("train", *MODEL, "--model.path", "https://evil.example/model"), None),
    "tokenizer by its name": (2, ("train", *MODEL, "--model.tokenizer", "evil/model"), None),
    "critic by its name": (2, ("train", *MODEL, "--algorithm.preset", "ppo", "--critic.path", "evil/model"), None),
    "reward model at a URL": (2, ("train", *MODEL, "--training.truncated", "keep", "--task.reward_model.path",
                                  "https://evil.example/model"), None),
    "data at a URL": (2, ("train", *MODEL, *DATA, "--task.path", "https://evil.example/data.jsonl"), None),
    "reward file at a URL": (2, ("train", *MODEL, "--task.reward_file", "https://evil.example/evil.py"), None),
    "evaluation set at a URL": (2, ("eval", "folder.yaml", "--evaluation.sets",
                                    "[{name: a, path: 'https://evil.example/data.jsonl'}]"), None),
    "modules in the current folder": (0, ("train", *MODEL, *DATA), stray_modules),
    "rollouts of objects": (2, ("mismatch", "folder.yaml", "--mismatch.rollouts", "rollouts", "--mismatch.precisions",
                                "[fp16]"), object_arrays),
    "rollouts that are a pickle": (2, ("mismatch", "folder.yaml", "--mismatch.rollouts", "model",
                                       "--mismatch.precisions", "[fp16]"), write("model/fp16.npz", PICKLE)),
    "checkpoint with leaves outside": (3, ("export", "folder.yaml", *RESUME), checkpoint(leaves_outside)),
    "checkpoint with a manifest outside": (3, ("export", "folder.yaml", *RESUME), manifest_outside),
    "run folder with a python tag": (2, ("export", "folder.yaml", *RESUME), write(
        "trained/config.yaml", "run: !!python/object/apply:os.system ['true']")),
    "critic that is a pickle": (2, ("train", *MODEL, "--algorithm.preset", "ppo", "--critic.path", "critic"), several(
        lambda folder: shutil.copytree(folder / "model", folder / "critic"), lose("critic/model.safetensors"),
        write("critic/pytorch_model.bin", PICKLE))),
    "info of a pickle": (2, ("info", "folder.yaml"), several(
        lose("model/model.safetensors"), write("model/model.bin", PICKLE))),
    # With checksums that fit, it is orbax that finds the arrays unreadable, in its own words.
    "checkpoint of pickles": (3, ("export", "folder.yaml", *RESUME), checkpoint(pickled_payloads)),
    "checkpoint with pickled arrays": (3, ("export", "folder.yaml", *RESUME), checkpoint(pickled_arrays)),
}


def import_evil(secrets):
    (secrets.parent / "evil.py").write_text(CODE)
    sys.path.insert(0, str(secrets.parent))
    __import__("evil")


# What the hook must notice, by the event that it must name: run last, they show that it looks.
MISDEEDS = {
    "open": lambda secrets: open(secrets / "secret.txt").close(),
    "import": import_evil,
    "exec": lambda secrets: exec(compile("1", str(secrets.parent / "evil.py"), "exec")),
    "pickle.find_class": lambda secrets: pickle.loads(pickle.dumps(Bomb())),
    "socket.getaddrinfo": lambda secrets: socket.getaddrinfo("127.0.0.1", 80),
    "socket.bind": lambda secrets: socket.socket().bind(("127.0.0.1", 0)),
    "subprocess.Popen": lambda secrets: subprocess.run(["true"]),
    "os.system": lambda secrets: os.system("true"),
}


# -- running it ---------------------------------------------------------------------------------------------


def main():
    import jax

    from jaxrl_fp16 import cli
    from jaxrl_fp16.tokenizer import character_tokenizer, save_tokenizer

    jax.config.update("jax_disable_most_optimizations", True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        work = Path(work).resolve()
        (work / "secret").mkdir()
        sound = work / "sound"
        sound.mkdir()
        lay_out(sound)
        os.chdir(sound)
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(["sft", "folder.yaml", "--run.dir", ".", "--run.export", "false", *TRAINED]) == 0
        shutil.copy(sound / "model/model.safetensors", work / "secret")
        # Of more ids than the models have rows: a command that reads it is refused.
        save_tokenizer(character_tokenizer("".join(map(chr, range(33, 90)))), work / "secret")
        (work / "secret/secret.txt").write_text(SECRET + "\n")
        (work / "secret/password.yaml").write_text(f"run: {{name: {SECRET}, stepz: 1}}\n")
        watch = Watch(work)
        sys.addaudithook(watch)
        for name, case in CASES.items():
            report(name, *run(cli, watch, work, sound, name, *case))
        for event, misdeed in MISDEEDS.items():
            watch.found.clear()
            with contextlib.suppress(OSError):
                misdeed(work / "secret")
            report(f"control {event}", found=list(watch.found))


def run(cli, watch, work, sound, name, code, arguments, build):
    folder = work / name.replace(" ", "-")
    shutil.copytree(sound, folder)
    if build is not None:
        build(folder)
    os.chdir(folder)
    watch.found.clear()
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            ended = cli.main([*arguments])
        except BaseException as caught:     # a traceback, where the command line would have shown one
            ended = f"{type(caught).__name__}: {caught}"[:300]
    found = list(watch.found)
    found += [f"module {name}" for name, module in list(sys.modules.items())
              if str(getattr(module, "__file__", None) or "").startswith(str(work))]
    found += [f"{path} was made" for path in [folder / CANARY, folder / "model" / CANARY] if path.exists()]
    said = out.getvalue() + error.getvalue()
    return found, ended, code, error.getvalue(), SECRET in said


def report(name, found, ended=None, wanted=None, error="", echoed=False):
    print(json.dumps({"name": name, "found": found, "ended": ended, "wanted": wanted, "error": error,
                      "echoed": echoed}), flush=True)


if __name__ == "__main__":
    main()
