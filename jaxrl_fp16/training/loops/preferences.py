"""Preference pairs out of a task, and the steps of `dpo` over them.

N: held-out pairs.
"""

from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.config import naming
from jaxrl_fp16.models import param_shardings
from jaxrl_fp16.models.frozen import is_adapted
from jaxrl_fp16.objectives import host_floats, pair_normalizer
from jaxrl_fp16.parallel import shard_batch
from jaxrl_fp16.tokenizer import encode_completions
from jaxrl_fp16.training.loops.follow import Step
from jaxrl_fp16.training.loops.supervised import check_solutions
from jaxrl_fp16.training.rollouts.collect import fitting_rows, rendered, set_aside
from jaxrl_fp16.training.runs.learner import Learner
from jaxrl_fp16.training.runs.run import announced
from jaxrl_fp16.training.updates.dpo_update import PreferencePairs, make_dpo_update, make_pair_scorer, pair_loss
from jaxrl_fp16.training.updates.optimizer import make_optimizer
from jaxrl_fp16.training.updates.state import create_train_state, shardings_of


def encode_preferences(task, tokenizer, examples, length, ends=None):
    """`(PreferencePairs on the host, why [B])`: None, or why a pair is set aside; its rows are empty.

    ends: as `encode_completions` takes them.
    """
    prompts, flaws = rendered(task, examples, tokenizer)
    chosen = encode_completions(tokenizer, prompts, [example.solution for example in examples], length, ends)
    rejected = encode_completions(tokenizer, prompts, [example.rejected for example in examples], length, ends)
    fits = chosen.kept & rejected.kept
    why = [flaw or (None if fit else f"longer than dpo.max_length = {length}") for flaw, fit in zip(flaws, fits)]
    kept = np.array([each is None for each in why], bool)
    arrays = ((chosen.tokens, rejected.tokens), (chosen.mask, rejected.mask), (chosen.loss_mask, rejected.loss_mask))
    tokens, mask, response_mask = (np.stack(sides, axis=1) for sides in arrays)
    return PreferencePairs(tokens, mask & kept[:, None, None], response_mask & kept[:, None, None]), why


def next_preferences(task, tokenizer, position, count, length, seed, ends=None):
    """`(PreferencePairs on the host, position after them)`: problems with two responses, in the order of `data_order`.

    Problems without, prompts without their problem's text, and pairs of which a response
    makes more than `length` tokens, are passed over. Raises ValueError when a whole epoch
    holds none that fits. ends: as `encode_completions` takes them.
    """
    encode = preference_encoder(task, tokenizer, length, ends)
    places, chosen = zip(*islice(fitting_rows(task, position, count, seed, encode, (
        f"none of the {len(task.train)} problems has a chosen and a rejected response that fit into max_length = "
        f"{length} tokens; allowed: task arithmetic or preference, or a larger limit"
    )), count))
    return jax.tree.map(lambda *rows: np.stack(rows), *chosen), places[-1] + 1


def preference_encoder(task, tokenizer, length, ends=None):
    """`examples -> PreferencePairs of one row or why it is set aside`, of each."""
    def encode(examples):
        pairs, why = encode_preferences(task, tokenizer, _preferences(examples), length, ends)
        rows = (reason or jax.tree.map(lambda x, at=at: x[at], pairs) for at, reason in enumerate(why))
        return ["without two responses" if example.rejected is None else next(rows) for example in examples]

    return encode


def _preferences(examples):
    return [example for example in examples if example.rejected is not None]


def check_preferences(setup, task):
    """Refuses data without a pair, or for the warm start a solution, that fits; gives the lines that say what is set
    aside."""
    config, section = setup.config, setup.config.dpo
    with naming("dpo"):
        next_preferences(
            task, setup.tokenizer, 0, section.batch_size, section.max_length, config.run.seed, setup.eos_ids
        )
        lines = set_aside(task, preference_encoder(task, setup.tokenizer, section.max_length, setup.eos_ids), "pairs")
    return lines + (check_solutions(setup, task) if config.sft.steps else [])


def preference_learner(run, params):
    """A fresh state for section `dpo`'s optimizer, and the reference: `params`, which are taken over. With adapters the
    reference is what the policy is without them."""
    reference = None if is_adapted(params) else jax.tree.map(jnp.copy, params)
    actor = create_train_state(
        params, make_optimizer(run.config.dpo.optimizer), run.setup.precision.loss_scale, run.setup.keys.learning,
        param_shardings(run.model, run.setup.mesh),
    )
    return Learner(actor, reference=reference)


def optimize(run, learner, position=0, start=0):
    """The steps of section `dpo` after step `start`, from `learner` and a position in the data.

    Yields a Step after each. Its metrics are the update's own, and `prompts_set_aside`, the pairs that it passed over.
    """
    section, setup = run.config.dpo, run.setup
    sizes = dict(microbatch_size=section.microbatch_size, announce=run.log.announce)
    scorer = make_pair_scorer(run.model, setup.precision.policy, **sizes)
    update = make_dpo_update(
        run.model, setup.precision.policy, section, make_optimizer(section.optimizer),
        state_shardings=shardings_of(learner.actor), **sizes,
    )
    for step in range(start + 1, section.steps + 1):
        began = position
        pairs, position = next_preferences(
            run.task, setup.tokenizer, position, section.batch_size, section.max_length, run.config.run.seed,
            setup.eos_ids,
        )
        pairs = shard_batch(pairs, setup.mesh)
        with announced(run.log, step == start + 1, "compiling scorer and update"):
            pairs = pairs.replace(ref_logprobs=scorer(learner.reference_params, pairs))
            actor, metrics = update(learner.actor, pairs)
        learner, metrics = learner.replace(actor=actor), host_floats(metrics)
        metrics |= {"prompts_set_aside": float(position - began - section.batch_size)}
        yield Step(step, learner, metrics, position, [metrics])


def make_held_out(run, reference):
    """`evaluate(params) -> metrics` of the task's held-out pairs: `heldout/loss`, `heldout/pairs`,
    `heldout/pairs_set_aside`, and those of `dpo_loss` under `heldout/`. Without a pair that fits it gives the two
    counts, and without a pair none."""
    section, setup = run.config.dpo, run.setup
    pairs, why = encode_preferences(
        run.task, setup.tokenizer, _preferences(run.task.heldout), section.max_length, setup.eos_ids
    )
    count = why.count(None)
    counts = {"pairs": count, "pairs_set_aside": len(why) - count}
    if not count:
        return lambda params: {f"heldout/{name}": value for name, value in counts.items()} if why else {}
    scorer = make_pair_scorer(run.model, setup.precision.policy, microbatch_size=section.microbatch_size)
    normalizer = pair_normalizer(pairs.response_mask[:, 0], pairs.response_mask[:, 1])
    batches = [shard_batch(batch, setup.mesh) for batch in _in_batches(pairs, section.batch_size)]
    batches = [batch.replace(ref_logprobs=scorer(reference, batch)) for batch in batches]
    share = jax.jit(partial(pair_loss, section))

    def evaluate(params):
        shares = jax.device_get([share(batch, scorer(params, batch), normalizer) for batch in batches])
        metrics = {name: sum(float(part[name]) for _, part in shares) for name in shares[0][1]}
        metrics = {"loss": sum(float(loss) for loss, _ in shares), **metrics, **counts}
        return {f"heldout/{name}": value for name, value in metrics.items()}

    return evaluate


def _in_batches(pairs, size):
    """The rows in pieces of `size`, the last one filled with empty rows."""
    missing = -pairs.tokens.shape[0] % size
    pairs = jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0), (0, 0))), pairs)
    count = pairs.tokens.shape[0]
    return [jax.tree.map(lambda x, at=at: x[at:at + size], pairs) for at in range(0, count, size)]
