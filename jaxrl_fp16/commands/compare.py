"""`compare`: one config by several precisions and engines, each run a process of its own, from one warm start a seed.

    runs/NAME-compare-STAMP/
      config.yaml               as given; inputs.json: digests of the data and folders that it names
      configs/RUN.yaml          what each run was started with; `train` takes it
      warm-seed0/model/         the warm start of a seed, in float32, from which its runs begin
      fp16-seed0/, ...          run folders
      logs/RUN.stdout, .stderr  what they said
      outcomes.json             how each ended and what it took
      report.html, report.json, figure.png
"""

from concurrent.futures import ProcessPoolExecutor
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
from pathlib import Path
import shutil
import sys
import tempfile
import time
from typing import Any

from jaxrl_fp16.config import ConfigError, naming, parse_config, to_dict, to_yaml
from jaxrl_fp16.console import Console
from jaxrl_fp16.engines import check_rank, check_sampling
from jaxrl_fp16.lab.compare.page import show_comparison, write_comparison
from jaxrl_fp16.lab.compare.processes import Job, core_count, run_jobs, shares_of_cores
from jaxrl_fp16.lab.compare.runs import CONFIGS, OUTCOMES, Planned, last_step, plan_runs, read_comparison
from jaxrl_fp16.logs import METRICS
from jaxrl_fp16.training.loops.iterations import open_training
from jaxrl_fp16.training.runs.inputs import check_inputs, inputs_of
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.run_folder import check_resumed, new_folder, write_inputs
from jaxrl_fp16.training.safety.deadlines import caught_signals
from jaxrl_fp16.training.safety.folder_lock import only_writer

# A run's process, started with -P: a stray json.py in the current folder must not hide the standard library's.
START = "import sys; sys.path.append(sys.argv.pop(1)); from jaxrl_fp16.cli import entry; entry()"
PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
LOOK_SECONDS = 2.0      # between looks at the steps of the runs


def run_compare(config):
    """Gives the exit code: 0 done; 3 where a run crashed; 128 + the signal that ended it. Writes the report anyway."""
    platform = check_runs(config)
    config = dataclasses.replace(config, platform=None, run=dataclasses.replace(config.run, platform=platform))
    folder, console = _open_folder(config), Console()
    with only_writer(folder) as lock, caught_signals() as signals, console:
        stages = _Stages(config, folder, console, signals, lock)
        runs = plan_runs(config, folder)
        console.say(f"{folder}: {len(runs)} runs, {', '.join(dict.fromkeys(run.label for run in runs))}")
        ready = stages.warm_up(runs)
        stages.train([run for run in runs if run.seed in ready])
    with console.announce("drawing the report"):
        comparison = read_comparison(folder)
        write_comparison(comparison)
    show_comparison(comparison, console)
    if signals.received is not None:
        console.say(f"ended by a signal; --resume {folder} continues it")
        return 128 + signals.received
    failed = [run.name for run in comparison.runs if run.code not in (0, 3)]
    if failed:
        print(f"jaxrl-fp16: {', '.join(failed)} did not end in order; the report says how", file=sys.stderr)
    return 3 if failed else 0


# -- before the first run --------------------------------------------------------------------------


def check_runs(config):
    """Refuses whatever any of the runs would refuse, before a folder is made; gives the platform that JAX finds.

    In a process of its own: one that has looked at an accelerator keeps its memory.
    """
    if config.rollout_precision is not None:
        raise ConfigError(
            f"rollout_precision is {config.rollout_precision!r}; allowed with compare: null, and "
            "--rollout-precisions instead"
        )
    with naming("compare.engines"):
        for engine in config.compare.engines:
            check_sampling(engine, config.sampling)
            check_rank(engine, config.lora.rank)
    planned = plan_runs(config, Path("."), warm=False)
    first = [run for run in planned if run.seed == planned[0].seed]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_open_each, [(run.name, to_dict(run.config)) for run in first]).result()


def _open_each(runs):
    """Opens each `(name, config as a mapping)` as `train` would, and closes it again."""
    for name, mapping in runs:
        config = parse_config(Config, mapping)
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=scratch))
            try:
                with open_training(config) as (run, _):
                    platform = run.config.run.platform
            except ConfigError as error:
                raise ConfigError(f"compare, run {name}: {error}") from error
    return platform


def _open_folder(config):
    inputs = inputs_of(config)
    if config.resume is not None:
        check_resumed(config, config.resume)
        check_inputs(config.resume, inputs)
        folder = Path(config.resume)
    else:
        folder = new_folder(
            dataclasses.replace(config, run=dataclasses.replace(config.run, name=f"{config.run.name}-compare"))
        )
    for name in (CONFIGS, "logs"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(dataclasses.replace(config, resume=None)), encoding="utf-8")
    write_inputs(folder, inputs)
    return folder


# -- the stages ------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Stages:
    """What both stages share."""

    config: Any
    folder: Path
    console: Console
    signals: Any
    lock: int            # its descriptor: the runs inherit it, so that it outlasts whatever kills this process alone
    looked: float = 0.0

    def warm_up(self, runs):
        """Makes the warm starts that are not there yet; gives the seeds whose runs can begin."""
        seeds = list(dict.fromkeys(run.seed for run in runs))
        if not self.config.sft.steps:
            return seeds
        todo = [seed for seed in seeds if not _is_warm(self.folder, seed)]
        warm = [_warm_run(self.config, self.folder, seed) for seed in todo]
        if warm:
            self._run([self._job(run, "warmup") for run in warm], self._places(len(warm)), warm)
        return [seed for seed in seeds if _is_warm(self.folder, seed)]

    def train(self, runs):
        """Starts or continues the runs that are not at their end."""
        todo = [run for run in runs if not _is_done(self.folder, run)]
        if todo and self.signals.received is None:
            # As many beside each other as if none had been done: so a resumed run has the cores that it had.
            self._run([self._job(run, "train") for run in todo], self._places(len(runs)), todo)

    def _places(self, jobs):
        """The cores of each run that may run beside others."""
        wanted = self.config.compare.jobs
        if self.config.run.platform != "cpu":
            return [None] * min(jobs, wanted or 1)
        return shares_of_cores(min(jobs, wanted or core_count()))

    def _job(self, run, command):
        path, folder, resume = self.folder / CONFIGS / f"{run.name}.yaml", self.folder / run.name, ()
        path.write_text(to_yaml(run.config), encoding="utf-8")
        if (folder / "config.yaml").exists():
            resume = ("--resume", str(folder))
        elif folder.exists():
            shutil.rmtree(folder)       # killed as it was made
        arguments = (sys.executable, "-P", "-c", START, PACKAGE_ROOT, command, str(path), *resume)
        return Job(run.name, arguments, self.folder / "logs" / run.name)

    def _run(self, jobs, places, runs):
        cores = f", {len(places[0])} cores each" if places[0] else ""
        names = ", ".join(job.name for job in jobs)
        self.console.say(f"{len(jobs)} to do, {len(places)} beside each other{cores}: {names}")
        steps = {run.name: run.config.run.steps for run in runs}
        run_jobs(
            jobs, places, self.signals, ended=self._ended, keep_open=(self.lock,),
            tick=lambda names: self._look(names, steps),
        )

    def _ended(self, job, ended):
        outcomes = _outcomes(self.folder)
        outcomes[job.name] = _added(outcomes.get(job.name), dataclasses.asdict(ended))
        temporary = self.folder / f"{OUTCOMES}.tmp"
        temporary.write_text(json.dumps(outcomes, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / OUTCOMES)
        how = "done" if ended.code == 0 else f"exit code {ended.code}{': ' if ended.error else ''}{ended.error}"
        self.console.say(f"{job.name}: {how}  ({ended.seconds:.0f} s, {ended.peak_bytes / 2**20:,.0f} MiB)")

    def _look(self, names, steps):
        if time.monotonic() - self.looked >= LOOK_SECONDS and names:
            self.looked = time.monotonic()
            at = {name: last_step(self.folder / name / METRICS) for name in names}
            self.console.status("  ".join(f"{name} {at[name]}/{steps[name]}" for name in names))


def _warm_run(config, folder, seed):
    """The warm start of one seed as a run: in float32, and by our own sampler where engines are compared, which favours
    no side."""
    name = f"warm-seed{seed}"
    run = dataclasses.replace(
        config.run, name=name, dir=str(folder), stamp=False, seed=seed, export=True, steps=config.sft.steps
    )
    engine = "jit" if config.compare.engines else config.rollout.engine
    own = dataclasses.replace(config, precision="fp32", rollout_precision=None, run=run, resume=None,
                              rollout=dataclasses.replace(config.rollout, engine=engine))
    return Planned(name, name, "fp32", None, seed, own)


def _is_warm(folder, seed):
    return (folder / f"warm-seed{seed}" / "model").is_dir()     # an export has this name once it is whole


def _is_done(folder, run):
    """Whether a run came to the end that its config now asks for."""
    outcome = _outcomes(folder).get(run.name)
    return bool(outcome) and outcome["code"] == 0 and last_step(folder / run.name / METRICS) >= run.config.run.steps


def _outcomes(folder):
    path = folder / OUTCOMES
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _added(before, now):
    """An outcome with what earlier attempts of the same run took."""
    if before is None:
        return now | {"attempts": 1}
    return now | {
        "attempts": before["attempts"] + 1,
        "seconds": before["seconds"] + now["seconds"],
        "cpu_seconds": before["cpu_seconds"] + now["cpu_seconds"],
        "peak_bytes": max(before["peak_bytes"], now["peak_bytes"]),
    }
