"""Samples in each of several precisions, and what each precision's programs say of the same tokens.

B: rows (responses).  T: columns.  n: prompts.  P: prompt columns.

The programs are those of training, with its shapes: the sampler over an iteration's
prompts, scorer and update over minibatches, a microbatch at a time.
"""

import contextlib
import dataclasses
from functools import partial
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.config import ConfigError, naming, naming_at_entry
from jaxrl_fp16.console import Console, clock
from jaxrl_fp16.lab.mismatch.rollout_files import JIT, ScoredRollout
from jaxrl_fp16.lab.mismatch.stats import k3
from jaxrl_fp16.models import param_shardings
from jaxrl_fp16.models.attention import kind_for
from jaxrl_fp16.objectives import needs_reference
from jaxrl_fp16.parallel import replicated, row_shards, shard_batch, to_host
from jaxrl_fp16.tasks import check_template, open_task
from jaxrl_fp16.training.rollouts.collect import next_prompts
from jaxrl_fp16.training.rollouts.engine import make_engine
from jaxrl_fp16.training.runs.run_config import resolve_algorithm
from jaxrl_fp16.training.runs.setup import Setup, load_params, make_model
from jaxrl_fp16.training.safety.deadlines import Signals
from jaxrl_fp16.training.safety.memory import check_fits, device_bytes, estimate
from jaxrl_fp16.training.updates.optimizer import make_optimizer
from jaxrl_fp16.training.updates.policy_update import make_update
from jaxrl_fp16.training.updates.scorer import make_scorer
from jaxrl_fp16.training.updates.state import create_train_state, shardings_of
from jaxrl_fp16.types import Batch


class Stopped(Exception):
    """A signal came; what was under way is given up."""


@dataclasses.dataclass
class Tally:
    """How many programs on how many rollouts there are to run, and how far that is."""

    total: int = 0
    done: int = 0
    seconds: float = 0.0    # that the done ones took

    @contextlib.contextmanager
    def counted(self, console, text):
        """One more, which the block runs: said when it begins, and with its time and about what is left at its end."""
        began, place = time.monotonic(), f"{self.done + 1} of {self.total}"
        console.say(f"{place}: {text} ...")
        yield
        took = time.monotonic() - began
        self.done, self.seconds = self.done + 1, self.seconds + took
        left = self.seconds / self.done * (self.total - self.done)
        console.say(f"{place}: {text}: {took:.1f} s" + (f", about {clock(left)} left" if left else ""))


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """What sampling and scoring work with. Nothing in it changes but the signals that come, and the tally."""

    setup: Setup
    model: Any
    console: Console
    signals: Signals
    tally: Tally = dataclasses.field(default_factory=Tally)

    def check_signals(self):
        if self.signals.received is not None:
            raise Stopped


def open_model(setup):
    """`(model, TrainState)` as training starts from; its parameters serve every program here.

    Raises ConfigError for a model that is at fault or cannot fit.
    """
    model = make_model(setup)
    compute = setup.precision.policy.compute_dtype
    with naming("memory"):
        needs = estimate(setup.config, model, setup.mesh, compute, command="mismatch")
        check_fits(needs, device_bytes(setup.mesh.local_devices[0]))
    params = load_params(setup, model, several=True)
    optimizer = make_optimizer(setup.config.optimizer)
    shardings = param_shardings(model, setup.mesh)
    return model, create_train_state(params, optimizer, setup.precision.loss_scale, setup.keys.learning, shardings)


def model_for(model, precision):
    """`model` with an attention that computes in `precision`."""
    return model.clone(attention=kind_for(model.attention, precision.policy.compute_dtype))


def read_prompts(setup):
    """(tokens int32 [n,P], mask bool [n,P]) of the task's first `mismatch.prompts` prompts, in training's order."""
    config = setup.config
    count = config.mismatch.prompts or config.training.prompts_per_step
    with naming_at_entry("task", open_task(config.task)) as task, naming("training"):
        check_template(task.template, task.train[0], setup.tokenizer)
        prompts = next_prompts(
            task, setup.tokenizer, 0, count, config.training.max_prompt_tokens, config.run.seed
        )
    return prompts.tokens, prompts.mask


def sample_rollout(laboratory, engine, precision, params, prompts):
    """A ScoredRollout, not yet scored, that `engine` draws of `prompts` as `read_prompts` gives them."""
    setup, sampling = laboratory.setup, laboratory.setup.config.sampling
    draw, key = make_engine(setup, laboratory.model, precision=precision, engine=engine), setup.keys.learning
    parts = row_shards(setup.mesh)
    at_once = min(setup.config.training.prompts_per_step, -(-len(prompts[0]) // parts) * parts)

    def run(number, chunk):
        return draw(params, *chunk, jax.random.fold_in(key, number))  # the same in every precision

    by = "" if engine == JIT else f"by {engine} "
    with laboratory.tally.counted(laboratory.console, f"sampling {by}in {precision.name}"):
        found = _in_chunks(laboratory, run, prompts, at_once)
    return ScoredRollout(
        precision.name, sampling.temperature, found.tokens, found.mask, found.response_mask, found.logprobs,
        found.finished, **vars(found.decisions), engine=engine,
        version="" if engine == JIT else str(setup.engines.facts().get(engine, "")),
    )


def score_rollouts(laboratory, precision, state, rollouts, gradient=True):
    """`(state, rollouts)`, with `precision`'s log-probs and entropies in each rollout.

    `gradient`: those of the gradient program too, for what another engine sampled in its own precision alone. `state`
    is donated; the one that comes back has the same parameters.
    """
    scorer = make_scorer(
        model_for(laboratory.model, precision), precision.policy,
        microbatch_size=laboratory.setup.config.training.microbatch_size,
        microbatch_tokens=laboratory.setup.config.training.microbatch_tokens,
        temperature=laboratory.setup.config.sampling.temperature, with_entropy=True,
    )
    done = []
    for rollout in rollouts:
        with _announced(laboratory, "the scorer", precision, rollout):
            logprobs, entropy = _score(laboratory, scorer, state.sampling_params, rollout)
        _tell(laboratory, "scorer", precision, rollout, logprobs)
        done.append(dataclasses.replace(
            rollout, scorer={**rollout.scorer, precision.name: logprobs},
            entropy={**rollout.entropy, precision.name: entropy},
        ))
    return _score_by_gradient(laboratory, precision, state, done) if gradient else (state, done)


def _name_of(rollout):
    """What it is called beside others, ours by its precision alone."""
    return rollout.precision if rollout.engine == JIT else f"{rollout.engine} {rollout.precision}"


def _announced(laboratory, program, precision, rollout):
    text = f"{program} in {precision.name}, on what {_name_of(rollout)} sampled"
    return laboratory.tally.counted(laboratory.console, text)


def _tell(laboratory, program, precision, rollout, logprobs):
    """The first figures of a program, before the report has them all; over the tokens where both are finite."""
    mu, pi = (np.asarray(x, np.float64)[rollout.response_mask] for x in (rollout.logprobs, logprobs))
    finite = np.isfinite(mu) & np.isfinite(pi)
    if not finite.any():
        return
    d = mu[finite] - pi[finite]
    laboratory.console.say(
        f"    sampler in {_name_of(rollout)} | {program} in {precision.name}: token KL (k3) {k3(-d).mean():.2e}, "
        f"|log-prob difference| mean {np.abs(d).mean():.2e}, largest {np.abs(d).max():.2e}"
    )


def _score(laboratory, scorer, params, rollout):
    def run(number, chunk):
        return scorer(params, *shard_batch(chunk, laboratory.setup.mesh))

    return _in_chunks(laboratory, run, (rollout.tokens, rollout.mask, rollout.decisions), _rows(laboratory, rollout))


def wants_gradient(rollout, precision):
    """Whether the gradient program of `precision` is asked about a rollout."""
    return rollout.engine == JIT or rollout.precision == precision.name


def _score_by_gradient(laboratory, precision, state, rollouts):
    """Runs the update for the log-probs that it returns from inside its gradient."""
    config, mesh = laboratory.setup.config, laboratory.setup.mesh
    algorithm = resolve_algorithm(config)
    scale = jax.device_put(jax.tree.map(jnp.copy, precision.loss_scale), replicated(mesh))
    state = state.replace(loss_scale=scale)
    update = make_update(
        model_for(laboratory.model, precision), precision.policy, algorithm, make_optimizer(config.optimizer),
        microbatch_size=config.training.microbatch_size, microbatch_tokens=config.training.microbatch_tokens,
        temperature=config.sampling.temperature,
        max_new_tokens=config.sampling.max_new_tokens, keep_logprobs=True, state_shardings=shardings_of(state),
    )

    def run(number, chunk):
        nonlocal state
        state, metrics = update(state, shard_batch(chunk, mesh))
        return metrics["logprobs"]

    done = []
    for rollout in rollouts:
        if not wants_gradient(rollout, precision):
            done.append(rollout)
            continue
        with _announced(laboratory, "the gradient program", precision, rollout):
            logprobs = _in_chunks(laboratory, run, _idle_batch(algorithm, rollout), _rows(laboratory, rollout))
        _tell(laboratory, "gradient program", precision, rollout, logprobs)
        done.append(dataclasses.replace(rollout, gradient={**rollout.gradient, precision.name: logprobs}))
    return state, done


def _idle_batch(algorithm, rollout):
    """The rollout as a Batch without a token that counts: its step is empty and leaves the state as it is.

    The program is that of training, whatever the mask's values, and so are its log-probs.
    """
    return Batch(
        tokens=rollout.tokens, mask=rollout.mask, response_mask=np.zeros_like(rollout.mask),
        rollout_logprobs=rollout.logprobs, old_logprobs=rollout.logprobs,
        advantages=np.zeros(len(rollout.tokens), np.float32),
        ref_logprobs=rollout.logprobs if needs_reference(algorithm) else None, **vars(rollout.decisions),
    )


def _rows(laboratory, rollout):
    """Rows at once: a minibatch, or for fewer the microbatches that hold them."""
    t = laboratory.setup.config.training
    return min(t.minibatch_size, -(-len(rollout.tokens) // t.microbatch_size) * t.microbatch_size)


def _in_chunks(laboratory, run, arrays, size):
    """`run(number, chunk)` over host arrays [n,...], `size` at a time, joined on the host.

    A last chunk that is short is filled with rows again, so that nothing recompiles;
    what comes of those is dropped.
    """
    total, parts = len(jax.tree.leaves(arrays)[0]), []
    for number, start in enumerate(range(0, total, size)):
        laboratory.check_signals()
        if number:
            laboratory.console.status(f"    {start} of {total} rows")
        take = partial(np.take, indices=np.arange(start, start + size) % total, axis=0)
        parts.append(jax.tree.map(to_host, run(number, jax.tree.map(take, arrays))))
    return jax.tree.map(lambda *x: np.concatenate(x)[: total * len(x[0]) // size], *parts)


def check_stored(laboratory, rollout, key):
    """Refuses a stored rollout, which `key` names, that this model and config cannot have drawn."""
    model, config = laboratory.model.config, laboratory.setup.config
    vocab, temperature, who = model.vocab_size, config.sampling.temperature, _name_of(rollout)
    if rollout.vocab_size not in (None, vocab):
        raise ConfigError(f"{key}: {who} is of a model with vocab_size {rollout.vocab_size}; allowed: that of this "
                          f"model, {vocab}")
    if rollout.tokens.max() >= vocab:
        raise ConfigError(f"{key}: {who}'s tokens are as high as {rollout.tokens.max()}; allowed: below the model's "
                          f"vocab_size, {vocab}")
    if rollout.temperature != temperature:
        raise ConfigError(f"{key}: {who} was sampled at temperature {rollout.temperature:g}; allowed: "
                          f"sampling.temperature, {temperature:g}")
    longest, limit = int(rollout.mask.sum(axis=1).max()), model.max_positions
    if limit is not None and longest > limit and not config.model.allow_longer:
        raise ConfigError(f"{key}: {who}'s longest row has {longest} tokens, and the model's weights were made for "
                          f"{limit} positions (max_position_embeddings); allowed: at most these, or "
                          "model.allow_longer true")
