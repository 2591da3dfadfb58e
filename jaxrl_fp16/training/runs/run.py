"""A run while it lives: its folder, log, checkpoints, task and model, opened in the order in which they can fail.

What is wrong with the config, the data or the model is refused before the run folder is made.
"""

import contextlib
import dataclasses
from pathlib import Path
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from jaxrl_fp16.config import naming, to_dict, to_yaml
from jaxrl_fp16.console import Console
from jaxrl_fp16.logs import RunLog, truncate
from jaxrl_fp16.models import save_adapter, save_pretrained
from jaxrl_fp16.parallel import LOST_PROCESS, from_first_process
from jaxrl_fp16.tasks import Task
from jaxrl_fp16.tokenizer import auto_difference
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from jaxrl_fp16.training.rollouts.engine import begin_engine, check_engine
from jaxrl_fp16.training.rollouts.evaluate import evaluate, make_evaluators
from jaxrl_fp16.training.rollouts.reward_model import make_grader, open_reward_model
from jaxrl_fp16.training.runs.inputs import Inputs, check_inputs, inputs_of
from jaxrl_fp16.training.runs.learner import critic_model
from jaxrl_fp16.training.runs.positions import check_positions
from jaxrl_fp16.training.runs.run_folder import check_resumed, new_folder, write_record
from jaxrl_fp16.training.runs.setup import Setup, check_models_beside, merged, opened, set_up
from jaxrl_fp16.training.safety.deadlines import Interrupted, Signals, Watchdog, caught_signals, leaving_on_abort
from jaxrl_fp16.training.safety.folder_lock import only_writer
from jaxrl_fp16.training.safety.guards import Guard, ending_in_order
from jaxrl_fp16.training.safety.memory import MIB, check_fits, device_bytes, estimate, parameter_count, trained_count


@dataclasses.dataclass
class Run:
    """What is open. `log` is the console alone until `start_log`."""

    setup: Setup
    task: Task
    model: Any
    evaluators: list
    folder: Path
    signals: Signals
    watchdog: Watchdog
    stack: contextlib.ExitStack
    log: Console
    inputs: Inputs
    checkpoints: Checkpoints = dataclasses.field(init=False)  # opened below `folder`, which the log tells of
    ending: int | None = None   # the signal after which all processes end, once `stops` has said so

    @property
    def config(self):
        """The resolved one."""
        return self.setup.config


    def starts_anew(self):
        """Whether there is nothing to restore: a new run, or one that was killed before its first checkpoint,
        whose logs are then emptied."""
        if self.config.resume is None:
            return True
        if not self.checkpoints.is_empty():
            return False
        self.log.say("no iteration is in a checkpoint yet; the run begins again")
        if jax.process_index() == 0:
            truncate(self.folder, -1)
        return True

    def restore(self, state):
        """`(state, position in the data, step)` of the newest sound checkpoint; `state` is the template."""
        state, extra, step = self.checkpoints.restore(state)
        if jax.process_index() == 0:
            truncate(self.folder, step)
        self.log.say(f"resumed after step {step}")
        return state, extra["position"], step

    def stage(self, name, told=False):
        """A stage begins; the one before has ended. One that takes too long ends the run. told: whether a long step
        says into a file, where no line lives, that it is there."""
        if told:
            self.log.stage(name)
        self.watchdog.start(name, self.checkpoints.describe())

    def tell(self, what):
        """What an engine calls on the way: it says how far `what` is, and raises Interrupted once a signal came."""
        def how_far(found):
            self.log.status(f"{what}: {found}")
            if self.signals.received is not None:
                raise Interrupted(what)

        return how_far

    def start_log(self, start, steps, **console):
        """Opens the run's files; those of a resumed run have been cut back to step `start`."""
        primary = jax.process_index() == 0
        log = RunLog(
            self.folder, self.config.logging, steps=steps, primary=primary,
            resumed=None if self.config.resume is None else start,
            facts=to_dict(self.config), **console,
        )
        self.log = self.stack.enter_context(log)

    def open_checkpoints(self, name, **changes):
        """The `Checkpoints` in a folder of the run, by section `checkpoint` with these changes."""
        config = dataclasses.replace(self.config.checkpoint, **changes)
        return Checkpoints(
            self.folder / name, config, resolved=to_yaml(self.config), inputs=self.inputs,
            say=lambda text: self.log.say(text),
        )

    def saved(self):
        """The last checkpoint, once the save under way is finished, for the line that the run ends with."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            return str(error)
        return self.checkpoints.describe()

    def evaluate(self, params, evaluators=None):
        """Metrics of every evaluation set, or of `evaluators`, with the same sampling keys each time."""
        metrics = {}
        for evaluator in self.evaluators if evaluators is None else evaluators:
            self.stage(f"evaluating {evaluator.name}")
            with self.log.announce(f"evaluating {evaluator.name}"):
                metrics |= evaluate(
                    evaluator, params, self.setup, self.config.training.max_prompt_tokens, self.setup.keys.evaluation,
                    self.log.status,
                )
            self.stage(f"the work after evaluating {evaluator.name}")
        return metrics

    def evaluation_due(self, step):
        """Whether the config wants an evaluation after `step` iterations."""
        every = self.config.evaluation.every
        return every > 0 and step % every == 0

    def stops(self):
        """Whether a signal asks the run to end after this step. Ask once a step: another may come at any time.

        A run of several processes ends in all of them, whichever got the signal.
        """
        self.ending = self.signals.received
        if jax.process_count() > 1:
            self.ending = int(multihost_utils.process_allgather(np.array(self.ending or 0)).max()) or None
        return self.ending is not None

    def end_by_signal(self, step, saved=None):
        """The exit code after a signal, once the save under way is finished; step 0: nothing was saved.
        saved: what to say of that in other words."""
        self.checkpoints.wait()
        saved = saved or (f"saved after step {step}" if step else "before the first step, with nothing to save")
        self.log.say(f"stopped by {signal.Signals(self.ending).name}; {saved}")
        return 128 + self.ending

    def export(self, params, merge=False):
        """The weights as a Hugging Face folder, with the settings that they were trained to be sampled with; adapters
        as a folder in PEFT's format, and with `merge` both."""
        self.stage("exporting")
        if self.model.lora is None:
            return self._export_model(self.model, params)
        folder = self.folder / "adapter"
        with _stopping_the_run():
            save_adapter(folder, self.model, params, base_model=self.config.model.path, overwrite=True)
        self.log.say(f"adapters for PEFT and vLLM, beside {self.config.model.path or 'random weights'}: {folder}")
        if merge:
            self._export_model(*merged(self.setup, self.model, params))

    def _export_model(self, model, params):
        s, folder = self.config.sampling, self.folder / "model"
        generation = {"eos_token_id": list(self.setup.eos_ids), "pad_token_id": self.setup.pad_id}
        if s.temperature:
            generation |= {"do_sample": True, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        if s.stop:
            generation["stop_strings"] = list(s.stop)
        with _stopping_the_run():
            save_pretrained(
                folder, model, params, dtype=self.setup.precision.policy.compute_dtype.name,
                tokenizer=self.setup.tokenizer, generation_config=generation, overwrite=True,
            )
        self.log.say(f"weights for Transformers and vLLM: {folder}")
        difference = auto_difference(self.setup.tokenizer, folder) if jax.process_index() == 0 else None
        if difference:
            self.log.say(difference)


@contextlib.contextmanager
def _stopping_the_run():
    """Ends the run in order where weights cannot be written."""
    try:
        yield
    except ValueError as error:
        raise Guard(str(error)) from error


@contextlib.contextmanager
def open_run(config, command, *, check=None, reference=False, critic=False, rewarded=False):
    """Gives `(Run, parameters)`. `reference`: whether one will take memory.
    critic: whether PPO's will. command: whose run it is; None for one that only
    reads a run's folder, which others may write meanwhile.

    Where `rewarded`, and the config names a reward model, `run.task` is graded by it; the
    evaluation sets keep the task's own reward: where the two differ, the policy exploits the model.

    Raises ConfigError for whatever can be refused before the start; `check(setup, task)`
    may raise more of them, before the run folder is made, and gives lines to say at the start.
    """
    check_models_beside(config, critic, rewarded)
    setup = set_up(config, command)
    config = setup.config
    if config.resume is not None:
        check_resumed(config, config.resume, command)
    with contextlib.ExitStack() as stack:
        bench = stack.enter_context(opened(setup, prompts=command is not None))
        task, model, inputs = bench.task, bench.model, inputs_of(config)
        if config.resume is not None:
            check_inputs(config.resume, inputs, exporting=command is None)
        with naming("evaluation"):
            evaluators = make_evaluators(bench) if command is not None else []
        samples = command == "train" or bool(evaluators)
        if samples:
            check_engine(config.rollout, model.lora)
        others = dict(command=command, reference=reference and config.training.reference == "device",
                      critic=critic_model(config, model) if critic else None)
        needs = _check_memory(setup, model, **others)   # before `check` makes rows: as many as the config asks for
        if command is not None:
            check_positions(config, command, model.config.max_positions)
            if others["critic"] is not None:
                check_positions(config, command, others["critic"].body.config.max_positions, "critic")
        remarks = check(setup, task) if check is not None else []
        judge = open_reward_model(setup, task) if rewarded else None
        if judge is not None:
            task = dataclasses.replace(task, grade=make_grader(judge, config.task.reward_model, setup.mesh))
            needs = _check_memory(setup, model, **others, reward_model=judge.model)
            check_positions(config, "reward model", judge.model.body.config.max_positions, "reward model")
        params = bench.load_params()
        if samples:
            begin_engine(setup, model, params)
        folder = stack.enter_context(open_folder(config, alone=command is not None))
        signals = stack.enter_context(caught_signals())
        watchdog = stack.enter_context(Watchdog(config.training.stage_seconds, "training.stage_seconds"))
        if jax.process_count() > 1:
            stack.enter_context(leaving_on_abort(lambda: f"{LOST_PROCESS}; {watchdog.saved}"))
        console = Console(quiet=jax.process_index() != 0)
        run = Run(setup, task, model, evaluators, folder, signals, watchdog, stack, console, inputs)
        run.checkpoints = stack.enter_context(run.open_checkpoints("checkpoints"))
        stack.enter_context(ending_in_order(run))
        if command is not None and jax.process_index() == 0:
            write_record(setup, folder, command, inputs, judge.precision.policy if judge else None)
        _introduce(run, needs, judge)
        for remark in remarks:
            console.say(remark)
        yield run, params


def _check_memory(setup, model, **others):
    """The estimate, `{what: bytes}` on a device; refuses a run that cannot fit. others: as `estimate` takes them."""
    needs = estimate(setup.config, model, setup.mesh, setup.precision.policy.compute_dtype, **others)
    with naming("memory"):
        check_fits(needs, device_bytes(setup.mesh.local_devices[0]))
    return needs


@contextlib.contextmanager
def open_folder(config, alone=True):
    """Gives the run folder of `resume`, which `check_resumed` has let through, or a new one; if `alone`, no other
    process writes it meanwhile.

    Raises ConfigError.
    """
    if config.resume is None:
        folder = Path(from_first_process(lambda: str(new_folder(config))))
    else:
        folder = Path(config.resume)
    with only_writer(folder) if alone and jax.process_index() == 0 else contextlib.nullcontext():
        yield folder


def _introduce(run, needs, judge):
    """Which model in which numerics, and what it will take."""
    setup, config = run.setup, run.config
    size = parameter_count(run.model)
    compute, device = setup.precision.policy.compute_dtype.name, setup.mesh.devices.flatten()[0].device_kind
    run.log.say(
        f"{run.folder}: {run.model.config.family}, {size / 1e6:,.2f}M parameters, in {setup.precision.name} "
        f"(compute {compute}, {config.model.attention} attention) on {setup.mesh.size} x {device}"
    )
    if config.rollout_precision:
        run.log.say(f"ablation: the sampler computes in {setup.rollout_precision.name}, all else in {config.precision}")
    if judge is not None:
        run.log.say(
            f"rewards: by the model in {config.task.reward_model.path}, {parameter_count(judge.model) / 1e6:,.2f}M "
            f"parameters, in {judge.precision.name}; evaluation keeps the task's own"
        )
    if run.model.lora is not None:
        lora, few = run.model.lora, trained_count(run.model)
        run.log.say(f"LoRA: {few / 1e6:,.2f}M parameters are trained, adapters of rank {lora.rank}; all others stay as "
                    f"they are, in {compute}")
    run.log.say("memory, about: " + ", ".join(f"{name} {value / MIB:,.1f} MiB" for name, value in needs.items()))


def announced(log, first, text):
    """Says what compiles, where this is the first time."""
    return log.announce(text) if first else contextlib.nullcontext()
