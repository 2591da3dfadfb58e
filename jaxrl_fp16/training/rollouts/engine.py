"""What makes rollouts for a run: the one place that knows which arguments of a run a sampler takes.

n: prompts.  P: prompt columns.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_fp16.config import ConfigError, naming
from jaxrl_fp16.engines import (
    PROBE_LENGTH, EngineRefused, check_rank, check_sampling, cut_at_stops, find_python, make_rollout,
)
from jaxrl_fp16.models import param_shardings
from jaxrl_fp16.models.attention import kind_for
from jaxrl_fp16.parallel import batch_sharding, row_shards, sampling_mesh, shard_batch
from jaxrl_fp16.sampling import make_sampler, make_stepwise_sampler
from jaxrl_fp16.sampling.slots import LONG
from jaxrl_fp16.sampling.stopping import stop_table
from jaxrl_fp16.tokenizer import end_ids, token_bytes


def make_engine(setup, model, sampling=None, precision=None, engine=None):
    """`engine(params, tokens, mask, key, watch=None) -> Rollout` of left-padded host prompts int32 [n,P], their mask.

    watch: takes a `Sampled` every few seconds, and may end the batch by an exception. Our own sampler is one call on a
    mesh, and for responses of fewer than `LONG` tokens.

    Args:
      setup: of the run; its tokenizer's ids end a response and fill what follows.
      model: the Decoder that samples; its attention is `kind_for` the precision.
      sampling: a SamplingConfig; None: section `sampling`.
      precision: a Precision; None: the run's `rollout_precision`.
      engine: jit, or one of `KINDS`; None: `rollout.engine`.

    Raises ValueError for what that engine cannot sample; of another one than jit the rollout raises `EngineError`, and
    ConfigError for what it refuses at its start.
    """
    precision, sampling = precision or setup.rollout_precision, sampling or setup.config.sampling
    engine = engine or setup.config.rollout.engine
    if engine != "jit":
        return _other_engine(setup, model, sampling, precision, engine)
    sample = own_sampler(setup, model, sampling, precision)
    if not _in_steps(setup, sampling):
        whole = sample
        sample = lambda params, tokens, mask, key, watch: whole(params, tokens, mask, key)

    mesh = sampling_mesh(setup.config.mesh, setup.mesh)
    if mesh is setup.mesh:
        there = back = lambda tree: tree
    else:    # the same devices, otherwise divided
        there = jax.jit(lambda params: params, out_shardings=param_shardings(model, mesh))
        back = jax.jit(lambda rollout: rollout, out_shardings=batch_sharding(setup.mesh))

    def sampled(params, tokens, mask, key, watch=None):
        return back(sample(there(params), *shard_batch((tokens, mask), mesh), key, watch))

    return sampled


def own_sampler(setup, model, sampling=None, precision=None):
    """Our own sampler as a run calls it, `sample(params, tokens, mask, key) -> Rollout`: in steps on one device, else
    one jitted function. Its `lower` takes shapes, and gives the program that needs most. Arguments as for
    `make_engine`."""
    precision, sampling = precision or setup.rollout_precision, sampling or setup.config.sampling
    model = model.clone(attention=kind_for(model.attention, precision.policy.compute_dtype))
    ids = dict(eos_id=setup.eos_ids, pad_id=setup.pad_id, tokenizer=setup.tokenizer)
    if _in_steps(setup, sampling):
        return make_stepwise_sampler(model, precision.policy, sampling, **ids)
    mesh = sampling_mesh(setup.config.mesh, setup.mesh)
    return make_sampler(model, precision.policy, sampling, **ids, lockstep=row_shards(mesh) > 1)


def _in_steps(setup, sampling):
    return setup.mesh.size == 1 and sampling.max_new_tokens >= LONG


def first_batch(setup):
    """What a run's first batch takes its time for, in words."""
    engine = setup.config.rollout.engine
    return "compiling the sampler" if engine == "jit" else f"sampling by {engine}"


def check_engine(rollout, lora=None):
    """Refuses a section `rollout` whose engine cannot run here: a run of several processes, an interpreter that is not
    there or lacks the engine's packages, adapters beyond it. lora: the model's `LoraConfig`, or None. Raises
    ConfigError; starts nothing."""
    if rollout.engine == "jit":
        return
    with naming("rollout"):
        if jax.process_count() > 1:
            raise ValueError(f"engine is {rollout.engine} in a run of {jax.process_count()} processes; allowed: jit, "
                             "or a run of one process")
        if lora is not None:
            check_rank(rollout.engine, lora.rank)
        find_python(rollout, lora is not None)


def begin_engine(setup, model, params):
    """Starts `rollout.engine` with `params` where it is not jit: what can be refused is refused. Raises ConfigError for
    that, and EngineError."""
    if setup.config.rollout.engine != "jit":
        with _refusing():
            _process(setup, model, setup.rollout_precision, setup.config.rollout.engine).begin(params)


def _other_engine(setup, model, sampling, precision, engine):
    check_sampling(engine, sampling)
    check_engine(dataclasses.replace(setup.config.rollout, engine=engine), model.lora)
    ends = end_ids(setup.tokenizer, names=sampling.end_tokens) if sampling.end_tokens else setup.eos_ids
    vocab_size = model.config.vocab_size
    stops = stop_table(sampling.stop, token_bytes(setup.tokenizer, vocab_size)[:vocab_size]) if sampling.stop else None

    def sample(params, tokens, mask, key, watch=None):
        prompts = [row[real].tolist() for row, real in zip(tokens, mask.astype(bool))]
        seed = int(jax.random.bits(key, dtype=jnp.uint32)) >> 1
        with _refusing():
            found = _process(setup, model, precision, engine).draw(
                params, prompts, sampling, seed, ends, watch)
        found = found if stops is None else cut_at_stops(found, stops)
        return shard_batch(make_rollout(tokens, mask, found, setup.pad_id), setup.mesh)

    return sample


@contextlib.contextmanager
def _refusing():
    """Turns an engine's refusal into the command's."""
    try:
        yield
    except EngineRefused as error:
        raise ConfigError(f"rollout: {error}") from error


def _process(setup, model, precision, engine):
    """The command's `Engine`, started or not."""
    config = setup.config
    longest = max(config.sampling.max_new_tokens, config.evaluation.max_new_tokens or 0)
    settings = {
        "dtype": precision.policy.compute_dtype.name, "device": "gpu" if config.run.platform == "gpu" else "cpu",
        "memory_fraction": config.rollout.memory_fraction, "seed": config.run.seed,
        "max_length": max(PROBE_LENGTH, config.training.max_prompt_tokens + longest),
        "max_rows": config.sampling.max_rows or config.training.prompts_per_step * config.sampling.group_size,
    }
    return setup.engines.get(dataclasses.replace(config.rollout, engine=engine), model, settings)
