"""The commands. `main(argv)` returns an exit code: 0 done; 2 refused before the start; 3 stopped by a
guard; 130 and 143 after SIGINT and SIGTERM."""

import dataclasses
from importlib import import_module
import json
import logging
import os
from pathlib import Path
import re
import sys
import warnings

from jaxrl_fp16.config import ConfigError, describe, parse_overrides

USAGE = """usage: jaxrl-fp16 COMMAND CONFIG [--key.subkey VALUE ...]

commands:
{commands}

`jaxrl-fp16 COMMAND --help` lists the command's own keys, and names the sections of the others, which
`jaxrl-fp16 --help SECTION` lists."""


# name -> what it does; `commands/NAME.py` has `run_NAME(config) -> exit code`
COMMANDS = {
    "train": "RL, after a warm start where sft.steps asks for one; continues with --resume RUN_FOLDER",
    "sft": "supervised training on the task's solutions",
    "warmup": "the warm start of train alone, as a model folder",
    "dpo": "preference optimization on pairs of responses, after a warm start as in train",
    "eval": "accuracy, pass@k and standard error on evaluation.sets",
    "filter": "the problems that a model solves sometimes; continues with --resume RUN_FOLDER",
    "compare": "one config under --precisions fp16 bf16 ..., --engines ..., --seeds 0 1 ...; one report of all runs",
    "mismatch": "how far sampler and trainer disagree, by precision and by --engines jit vllm ..., as a page",
    "generate": "responses to prompts, printed",
    "info": "is the model safe in FP16: its weights, activations and gradients against float16's range",
    "plan": "does it fit --target h100x8 or v5e-16, and what crosses the wires: compiled for it, without having one",
    "export": "the newest checkpoint of --resume RUN_FOLDER as a Hugging Face folder, model/; adapters as adapter/",
}

# Flags of a command that are short for a key; those of a list take several values.
LISTS = {
    "compare": {
        "precisions": "compare.precisions", "rollout-precisions": "compare.rollout_precisions",
        "engines": "compare.engines", "seeds": "compare.seeds",
    },
    "mismatch": {
        "precisions": "mismatch.precisions", "engines": "mismatch.engines", "rollouts": "mismatch.rollout_files",
    },
}
SHORT = {"compare": {"jobs": "compare.jobs"}, "plan": {"target": "plan.target", "search": "plan.search"}}

# The sections that a command's help shows in full, beside the keys at the top of a config.
OWN = {
    "train": ("run", "training", "sampling", "algorithm", "optimizer"), "warmup": ("sft",),
    "filter": ("filter", "sampling"), "eval": ("evaluation",), "generate": ("generate", "sampling"),
    "export": ("checkpoint",),
}


def main(argv):
    """Runs one command; `argv` without the program's name."""
    asks = bool(argv) and argv[0] in ("-h", "--help", "help")
    if not argv or asks and len(argv) == 1:
        print(USAGE.format(commands="\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())))
        return 0 if argv else 2
    try:
        if asks:
            return _help(argv[1], argv[2:]) if argv[1] in COMMANDS else _help("COMMAND", argv[1:])
        command, arguments = argv[0], list(argv[1:])
        if command not in COMMANDS:
            raise ConfigError(f"command {command!r} is unknown; allowed: {', '.join(COMMANDS)}")
        for place, argument in enumerate(arguments):
            if argument in ("--help", "-h"):
                return _help(command, arguments[place + 1:])
        return _run(command, arguments)
    except ConfigError as error:
        return _end(2, error)


def _run(command, arguments):
    from jaxrl_fp16.training.runs.run_config import load_for

    if not arguments or arguments[0].startswith("--"):
        raise ConfigError(f"{command} needs a config file: jaxrl-fp16 {command} CONFIG [--key VALUE ...]")
    path, *rest = arguments
    config = load_for(command, path, parse_overrides(list(lengthened(command, rest))))
    if config.run.name is None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=Path(path).stem))
    # orbax warns of what it will do by default one day; a person at a console can do nothing about it
    warnings.filterwarnings("ignore", module=r"orbax\..*")
    return _guarded(getattr(import_module(f"jaxrl_fp16.commands.{command}"), f"run_{command}"), config)


def lengthened(command, arguments):
    """`--seeds 0 1` as `--compare.seeds [0, 1]`, `--jobs 2` as `--compare.jobs 2`."""
    lists, short, rest = LISTS.get(command, {}), SHORT.get(command, {}), list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or flag not in (*lists, *short):
            yield argument
            continue
        if flag in short:
            yield f"--{short[flag]}{equals}{value}"
            continue
        values = [value] if equals else []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not values:
            raise ConfigError(f"--{flag} has no value; allowed: --{flag} VALUE [VALUE ...] (command line)")
        # A word is quoted: precision's free form holds commas.
        values = [value if re.fullmatch(r"[+-]?\d+", value) else json.dumps(value) for value in values]
        yield from (f"--{lists[flag]}", f"[{', '.join(values)}]")


def _guarded(run, config):
    """The errors that end a run in order, each as one line."""
    import jax

    from jaxrl_fp16.engines import EngineError
    from jaxrl_fp16.tasks import BatchDeadline, RewardShapeError, WorkerStartError
    from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointError
    from jaxrl_fp16.training.safety.guards import Guard
    from jaxrl_fp16.training.safety.memory import LOWERS_MEMORY, is_out_of_memory

    try:
        return run(config)
    # A run has made one Guard of most of these, which names its last checkpoint; other commands have none.
    except (Guard, CheckpointError, EngineError, BatchDeadline, RewardShapeError, WorkerStartError, OSError) as error:
        return _end(3, error)
    except KeyboardInterrupt:
        return _end(130, "interrupted")
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _end(3, f"out of device memory; what lowers it: {LOWERS_MEMORY}")


def _end(code, error):
    from jaxrl_fp16.console import printable

    print(f"jaxrl-fp16: {' '.join(printable(str(error)).split())}", file=sys.stderr)
    return code


def _help(command, wanted):
    """The keys of `wanted`, sections or `all`; without any the command's own, and which sections there are beside."""
    from jaxrl_fp16.training.runs.run_config import USED, Config

    sections = {}
    for row in describe(Config):
        sections.setdefault(row.key.partition(".")[0] if "." in row.key else "", []).append(row)
    unknown = [name for name in wanted if name not in (*filter(None, sections), "all")]
    if unknown:
        allowed = ", ".join([*filter(None, sections), "all"])
        asked = f"{command} --help" if command in COMMANDS else "--help"
        raise ConfigError(f"{asked}: there is no section {unknown[0]!r}; allowed: {allowed}")
    wanted = list(sections) if "all" in wanted else wanted
    shown = wanted or ["", *OWN.get(command, (command,))]
    print(f"usage: jaxrl-fp16 {command} CONFIG [--key VALUE ...]\n\n{COMMANDS.get(command, 'keys of all commands')}\n")
    for row in (row for name in shown for row in sections[name]):
        print(f"  --{row.key} ({row.type}; {row.default})\n      {row.doc}")
    if not wanted:
        commands = [name for name in sections if name in COMMANDS and name not in ("sft", command)]
        read = [name for name in USED.get(command, sections) if name not in (*shown, *commands)]
        print(f"\nother sections that {command} reads: {', '.join(read)}\n"
              f"sections that it does not read: {', '.join(name for name in sections if name not in (*shown, *read))}\n"
              f"`jaxrl-fp16 {command} --help SECTION` lists the keys of one, `--help all` every key.")
    return 0


def entry():
    """The console script."""
    # XLA's own lines, "Very slow compile?" among its errors: what matters of them comes as an exception too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")    # a response may hold what the console's encoding does not
    _silence_failed_saves()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # of `... --help | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if code and _is_one_of_several():
        _leave_the_others(code)
    sys.exit(code)


def _silence_failed_saves():
    """Of a save that cannot be written orbax logs every array, and callbacks of tensorstore find their event loop
    closed: hundreds of lines around the one that says what happened."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def filtered(given):
        closed = isinstance(given.exc_value, RuntimeError) and str(given.exc_value) == "Event loop is closed"
        if not closed:
            show(given)

    sys.unraisablehook = filtered


def _is_one_of_several():
    """Whether this process belongs to a run of several; asks no device."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _leave_the_others(code, patience=5.0):
    """Ends this process; before that it waits a little for the others, which may be about to end too.

    Left to itself JAX would wait for minutes, while they wait for this process.
    """
    import threading

    import jax

    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(patience)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    entry()
