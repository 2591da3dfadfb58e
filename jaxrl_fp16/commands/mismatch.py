"""`mismatch`: the paper's offline figure (arXiv 2510.26788) for a model and task of your own.

Samples once in each precision, scores every rollout in every precision and in a
float32 reference, keeps it all as .npz, and writes a page; or makes the page from
what was kept.
"""

import contextlib
import dataclasses
from functools import partial
import itertools
import json
import signal
import time
from types import SimpleNamespace

import jax

from jaxrl_fp16.config import ConfigError, naming, to_dict
from jaxrl_fp16.console import Console, clock
from jaxrl_fp16.engines import check_sampling
from jaxrl_fp16.lab.mismatch.answer import answer
from jaxrl_fp16.lab.mismatch.attribution import attribute
from jaxrl_fp16.lab.mismatch.engine_files import load_rollout_file
from jaxrl_fp16.lab.mismatch.report import console_tables, doubts_of, measure, write_report
from jaxrl_fp16.lab.mismatch.rollout_files import JIT, labelled, load_rollouts, save_rollout
from jaxrl_fp16.lab.mismatch.scoring import (
    Laboratory, Stopped, check_stored, open_model, read_prompts, sample_rollout, score_rollouts,
)
from jaxrl_fp16.logs import write_json
from jaxrl_fp16.precision import get_precision_on
from jaxrl_fp16.training.rollouts.engine import check_engine
from jaxrl_fp16.training.runs.positions import check_positions
from jaxrl_fp16.training.runs.run_folder import new_folder, write_record
from jaxrl_fp16.training.runs.setup import check_no_dropout, lora_of, set_up
from jaxrl_fp16.training.safety.deadlines import caught_signals
from jaxrl_fp16.training.safety.memory import parameter_count

REPORT = "report.json"
ATTRIBUTED = 16  # responses of each precision: attribution costs as much for each as some hundred forwards


def run_mismatch(config):
    """Makes the report of `config` in a new run folder; gives the exit code. Raises ConfigError for what is refused."""
    _refuse_unused(config)
    setup = set_up(config, "mismatch")
    config, section = setup.config, setup.config.mismatch
    check_no_dropout(config, "mismatch")
    precisions = [_open_precision(setup, "precisions", name) for name in section.precisions]
    reference = _open_precision(setup, "reference", section.reference)
    names = [precision.name for precision in precisions]
    if len(set(names)) < len(names):
        raise ConfigError(f"mismatch.precisions are {', '.join(names)}; allowed: different ones")
    engines = _engines(config)
    to_sample = () if section.rollouts is not None else engines
    given = _read_given(section, precisions, engines, to_sample)
    _refuse_attribution(config, to_sample, given)
    scored = not to_sample and all(_is_scored(rollout, [*names, reference.name]) for _, rollout in given)
    rollouts = [rollout for _, rollout in given]
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(Console(quiet=jax.process_index() != 0))
        stack.enter_context(contextlib.closing(setup.engines))
        signals = stack.enter_context(caught_signals())
        programs = None
        if not scored or section.attribution:
            programs = _open_programs(setup, console, signals, to_sample, given)
        folder = new_folder(config)
        write_record(setup, folder, "mismatch")
        try:
            if scored:
                console.say(f"{folder}: all figures from {_source(section)}, where every score is"
                            + ("" if programs else "; no model is loaded"))
            else:
                programs, rollouts = _fill(*programs, to_sample, precisions, reference, rollouts, folder)
            sides = labelled(rollouts)
            facts = _facts(setup, folder, sides, programs[0].model if not scored else None)
            shares = {}
            if section.attribution:
                laboratory, params, programs = programs[0], programs[1].sampling_params, None  # the moments go
                shares = _attribute(laboratory, params, precisions, rollouts)
        except Stopped:
            again = f"; --mismatch.rollouts {folder} continues from what was sampled" if to_sample else ""
            console.say(f"stopped by {signal.Signals(signals.received).name}{again}")
            return 128 + signals.received
        _report(console, folder, facts, sides, reference.name, section.bins, shares)
    return 0


def _engines(config):
    """The engines that sample, or whose rollouts `mismatch.rollouts` holds: refused where one cannot run here."""
    section = config.mismatch
    if not section.engines and section.rollout_files and section.rollouts is None:
        return ()
    engines = section.engines or (config.rollout.engine,)
    for engine in engines if section.rollouts is None else ():
        with naming("mismatch.engines"):
            check_sampling(engine, config.sampling)
        check_engine(dataclasses.replace(config.rollout, engine=engine), lora_of(config))
    return engines


def _read_given(section, precisions, engines, to_sample):
    """`(key, rollout)` of each stored rollout and each in a file."""
    names, given = [precision.name for precision in precisions], []
    if section.rollouts is not None:
        with naming("mismatch.rollouts"):
            given += [("mismatch.rollouts", rollout) for rollout in load_rollouts(section.rollouts, names, engines)]
    with naming("mismatch.rollout_files"):
        given += [("mismatch.rollout_files", load_rollout_file(path, precisions)) for path in section.rollout_files]
        planned = [SimpleNamespace(engine=engine, precision=name) for engine in to_sample for name in names]
        labelled([*planned, *(rollout for _, rollout in given)])     # refuses two of one name
    return given


def _source(section):
    """Where rollouts that were stored come from."""
    return ", ".join([*([section.rollouts] if section.rollouts else []), *section.rollout_files])


def _refuse_unused(config):
    if config.resume is not None:
        raise ConfigError("mismatch resumes no run; allowed: --mismatch.rollouts FOLDER, for what was sampled before")
    if config.rollout_precision is not None:
        raise ConfigError(f"rollout_precision is {config.rollout_precision}; allowed with mismatch: null, as it "
                          "samples and scores in each of mismatch.precisions")


def _refuse_attribution(config, to_sample, given):
    if not config.mismatch.attribution:
        return
    if JIT not in (*to_sample, *(rollout.engine for _, rollout in given)):
        raise ConfigError("mismatch.attribution is true and all rollouts are another engine's; allowed: some of this "
                          "program's own sampler, whose modules are known, or attribution false")
    if config.sampling.top_k or config.sampling.top_p < 1:
        raise ConfigError(f"mismatch.attribution is true with sampling.top_k {config.sampling.top_k} and top_p "
                          f"{config.sampling.top_p}; allowed: 0 and 1, or attribution false")


def _open_precision(setup, field, name):
    with naming(f"mismatch.{field}"):
        return get_precision_on(setup.config.run.platform, name, setup.config.loss_scale)


def _is_scored(rollout, names):
    """Whether every score that a figure or table needs is there."""
    return all(name in rollout.scorer and name in rollout.entropy for name in names) and (
        rollout.precision in rollout.gradient
    )


def _open_programs(setup, console, signals, to_sample, given):
    """(Laboratory, TrainState, prompts or None): what sampling and scoring need, refused where at fault."""
    prompts = read_prompts(setup) if to_sample else None
    model, state = open_model(setup)
    if to_sample:
        check_positions(setup.config, "mismatch", model.config.max_positions)
    laboratory = Laboratory(setup, model, console, signals)
    for key, rollout in given:
        check_stored(laboratory, rollout, key)
    return laboratory, state, prompts


def _fill(laboratory, state, prompts, to_sample, precisions, reference, given, folder):
    """Samples with each engine in each precision, and scores that and what is given; what is there is kept as it comes.

    Returns what `_open_programs` does, the state with the same parameters, as the one that came is donated; and the
    rollouts.
    """
    say, config = laboratory.console.say, laboratory.setup.config
    keep = partial(save_rollout, folder / "rollouts") if jax.process_index() == 0 else lambda rollout: None
    say(f"{folder}: {laboratory.model.config.family}, {parameter_count(laboratory.model) / 1e6:,.2f}M parameters, "
        f"{config.model.attention} attention, in {', '.join(precision.name for precision in precisions)}; "
        f"reference in {reference.name}")
    others = [] if reference.name in [precision.name for precision in precisions] else [reference]
    _count(laboratory.tally, to_sample, given, precisions, others, config.mismatch.attribution)
    if to_sample:
        by = "" if to_sample == (JIT,) else f", by {', '.join(to_sample)}"
        say(f"{len(prompts[0])} prompts x {config.sampling.group_size} responses of at most "
            f"{config.sampling.max_new_tokens} tokens{by}")
    sampled = []
    for engine, precision in itertools.product(to_sample, precisions):
        sampled.append(sample_rollout(laboratory, engine, precision, state.sampling_params, prompts))
        keep(sampled[-1])
    laboratory.setup.engines.close()    # its memory is the scorers' from now on
    rollouts = [dataclasses.replace(rollout, scorer={}, gradient={}, entropy={}) for rollout in (*sampled, *given)]
    for precision in [*precisions, *others]:
        state, rollouts = score_rollouts(laboratory, precision, state, rollouts, gradient=precision in precisions)
    for rollout in rollouts:
        keep(rollout)
    return (laboratory, state, prompts), rollouts


def _count(tally, to_sample, given, precisions, others, attribution):
    """Adds up the programs that there are to run, on the rollouts that there are or will be."""
    samples = len(to_sample) * len(precisions)
    own = (JIT in to_sample) * len(precisions) + sum(rollout.engine == JIT for rollout in given)
    foreign = samples + len(given) - own
    scorers = len(precisions) + len(others)
    tally.total = samples + own * (scorers + len(precisions) + attribution) + foreign * (scorers + 1)


def _attribute(laboratory, params, precisions, rollouts):
    """By precision, what `attribute` finds in the first responses of our own sampler."""
    found, tally = {}, laboratory.tally
    own = [rollout for rollout in rollouts if rollout.engine == JIT]
    tally.total = max(tally.total, len(own))
    policies = {precision.name: precision.policy for precision in precisions}
    for rollout in own:
        laboratory.check_signals()
        first = {name: getattr(rollout, name)[:ATTRIBUTED] for name in ("tokens", "mask", "response_mask", "logprobs")}
        text = f"attribution in {rollout.precision}"
        with tally.counted(laboratory.console, text), naming("mismatch.attribution"):
            found[rollout.precision] = attribute(
                laboratory.model, params, dataclasses.replace(rollout, **first), policies[rollout.precision],
                temperature=rollout.temperature, rows=laboratory.setup.config.training.microbatch_size,
                progress=partial(_tell_modules, laboratory, time.monotonic()),
            )
    return found


def _tell_modules(laboratory, began, done, total, part):
    """How far attribution is, from time to time; ends it at a signal."""
    laboratory.check_signals()
    left = f", about {clock((time.monotonic() - began) / part * (1 - part))} left" if part else ""
    laboratory.console.status(f"    {done} of {total} modules{left}")


def _facts(setup, folder, rollouts, model):
    """What the numbers depend on, as plain values."""
    source = folder / "rollouts" if model is not None else _source(setup.config.mismatch)
    return {
        "rollouts": str(source),
        "responses": {label: len(rollout.tokens) for label, rollout in rollouts.items()},
        "tokens": {label: int(rollout.response_mask.sum()) for label, rollout in rollouts.items()},
        "temperature": next(iter(rollouts.values())).temperature,
        "model": None if model is None else {
            "path": setup.config.model.path, "parameters": parameter_count(model), "attention": model.attention,
        },
        "environment": json.loads((folder / "environment.json").read_text()),
        "config": to_dict(setup.config),
    }


def _report(console, folder, facts, rollouts, reference, bins, shares):
    """report.json, report.html and the tables on the console."""
    if jax.process_index() != 0:
        return
    found = measure(rollouts, reference, bins) | ({"attribution": shares} if shares else {})
    write_json(folder / REPORT, {"answer": answer(found, facts), **facts, "reference": reference, **found})
    page = write_report(folder, facts, rollouts, reference, found)
    for title, columns, rows in console_tables(found, facts, reference):
        console.table(title, columns, rows)
    for line in (*answer(found, facts), *doubts_of(found, facts["config"]["rollout"]["stop_above"])):
        console.say(line)
    console.say(f"report: {page}")
