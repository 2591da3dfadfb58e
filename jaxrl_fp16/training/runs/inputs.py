"""What a run depends on beside its config: the content of the files and folders that the config names.

A digest is of content alone, so a folder may move, and its files may not change. `{key: {part: digest}}`: a key of the
config, and what lies at the path that it holds.
"""

from collections.abc import Iterator, Mapping
import hashlib
import json
from pathlib import Path

from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.tasks import TASKS, get_template
from jaxrl_fp16.tasks.examples import read_hub_rows
from jaxrl_fp16.training.checkpoints.checkpoint import newest_about

NAME = "inputs.json"
PATHS = ("model.path", "model.tokenizer", "lora.path", "critic.path", "task.path", "task.reward_file",
         "task.reward_model.path", "task.reward_model.tokenizer")
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja", "additional_chat_templates/*.jinja")
WEIGHTS = ".safetensors"
ADAPTERS = ("adapter_config.json", "adapter_model" + WEIGHTS)
SINGLE, SHARDS = ("model" + WEIGHTS,), ("model.safetensors.index.json", "*" + WEIGHTS)
EDGE = 2**20    # bytes at either end of a file of weights; what lies between is told by its size alone
Inputs = Mapping[str, Mapping[str, str]]


def inputs_of(config) -> Inputs:
    """The digests of everything that `config` names, of what is there; evaluation sets may change, and are left out."""
    model, task, judge = config.model, config.task, config.task.reward_model
    found = {
        "model.path": _of_model(model.path, model.tokenizer),
        "model.tokenizer": _of_folder(model.tokenizer, TOKENIZER),
        "lora.path": _of_folder(config.lora.path, ADAPTERS),
        "critic.path": _of_model(config.critic.path, config.critic.path),
        "task.path": _of_file(task.path),
        "task.hub": _of_rows(task),
        "task.template": _of_template(task),
        "task.reward_file": _of_file(task.reward_file),
        "task.reward_model.path": _of_model(judge.path, judge.tokenizer),
        "task.reward_model.tokenizer": _of_folder(judge.tokenizer, TOKENIZER),
    }
    return {key: parts for key, parts in found.items() if parts}


def recorded_inputs(folder) -> Inputs:
    """What the newest checkpoint of a run folder was led to by, or where it does not say, the run's last start; of a
    run from before digests were kept, nothing."""
    for name in ("checkpoints", "warm_start"):
        found = newest_about(Path(folder) / name).get("inputs")
        if found:
            return found
    path = Path(folder) / NAME
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"resume: {path} cannot be read ({error}); allowed: the file that the run wrote") from error


def check_inputs(folder, inputs: Inputs, exporting: bool = False) -> None:
    """Refuses to resume `folder` where what led to it has other content by now, naming it.

    exporting: whether only weights are written: then data, rewards and the weights to start from do not matter.
    """
    changed = []
    for key, before in recorded_inputs(folder).items():
        now = inputs.get(key, {})
        for part in {**before, **now}:
            if exporting and (not key.startswith("model.") or part.endswith(WEIGHTS)):
                continue
            if before.get(part) != now.get(part):
                how = "is gone" if part not in now else "is new" if part not in before else "has changed"
                changed.append(f"{part} of {key} {how}")
    if changed:
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(f"resume: {folder} was started with other content: {'; '.join(changed[:3])}{more}; allowed: "
                          "the same content, in any place")


def _of_model(path, tokenizer) -> dict[str, str]:
    """Config and weights, and the tokenizer unless that of another folder is taken."""
    if path is None:
        return {}
    weights = SINGLE if (_place(path) / SINGLE[0]).is_file() else SHARDS
    return _of_folder(path, (*CONFIGS, *weights, *(TOKENIZER if tokenizer is None else ())))


def _of_folder(path, patterns) -> dict[str, str]:
    if path is None:
        return {}
    folder = _place(path)
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return {file.relative_to(folder).as_posix(): _digest(file) for file in files}


def _of_file(path) -> dict[str, str]:
    return {"content": _digest(_place(path))} if path is not None and _place(path).is_file() else {}


def _of_rows(task) -> dict[str, str]:
    """Of a Hub data set, which may have changed there."""
    if task.hub is None:
        return {}
    return {"rows": _joined(json.dumps(row, default=str).encode() for _, row in read_hub_rows(task.hub, task.split))}


def _of_template(task) -> dict[str, str]:
    """Of a template of our own; a chat template is one of the tokenizer's files."""
    text = get_template(task.template or TASKS[task.name].template, task.system).text
    return {} if text is None else {"text": _joined([text.encode(errors="surrogatepass")])}


def _place(path) -> Path:
    return Path(path).expanduser()


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        if file.suffix != WEIGHTS:
            return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        size = content.seek(0, 2)
        return f"{size}-{_joined(_edges(content, size))}"


def _edges(content, size: int) -> Iterator[bytes]:
    for start in (0, max(0, size - EDGE)):
        content.seek(start)
        yield content.read(EDGE)


def _joined(parts) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()
