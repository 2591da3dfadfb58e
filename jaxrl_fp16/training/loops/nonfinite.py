"""Beside a run: its ranges every few iterations, and what was not finite in a step that was skipped.

M: rows of a minibatch.
It reads and changes nothing: its programs are its own, and nothing in a run depends on what they find.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.lengths import dividing, rows_at
from jaxrl_fp16.objectives import normalizer_of
from jaxrl_fp16.parallel import row_shards, to_host
from jaxrl_fp16.telemetry import name_not_finite, summarize
from jaxrl_fp16.telemetry.ranges import make_peaks, make_ranges, weight_ranges
from jaxrl_fp16.training.safety.memory import is_out_of_memory
from jaxrl_fp16.training.updates.policy_update import loss_of_rows

OUT_OF_MEMORY = "not named: the program that looks inside needs more memory than is there"


class Watch:
    """Looks at each iteration of a run from outside."""

    def __init__(self, run, algorithm):
        config, policy = run.config, run.setup.precision.policy
        loss_of = partial(_loss_of, algorithm, config.sampling.max_new_tokens)
        options = dict(temperature=config.sampling.temperature, with_entropy=algorithm.entropy_coef != 0)
        self.run = run
        self._ranges = make_ranges(run.model, policy, loss_of, **options)
        self._peaks = make_peaks(run.model, policy, loss_of, **options)
        self._batch = self._suspect = None

    def keep(self, rows_of, minibatches):
        """The iteration's rows: `rows_of(int32 [n]) -> Batch`, and those of each optimizer step, int32 [M]."""
        self._batch, self._suspect = (rows_of, minibatches), None

    def look(self, step, state, taken):
        """Metrics for the log after an iteration: the policy's TrainState, and its optimizer steps' metrics.

        `telemetry/...` when it is due; `nonfinite`, a text, at a run's first skipped step, its second,
        fourth, eighth and so on: a dynamic loss scale makes skips a matter of course. The
        weights are those after the iteration, as the last skipped step of it found them if no
        other step came after that one.
        """
        metrics = self._measure(state) if _due(self.run.config.telemetry.every, step) else {}
        skipped = [index for index, values in zip(self._batch[1], taken) if values.get("skipped")]
        if not skipped:
            self._batch = None  # its arrays need not wait for the next iteration
            return metrics
        scale = [values["loss_scale"] for values in taken if values["skipped"]][-1]
        self._suspect = state.sampling_params, jnp.asarray(scale, jnp.float32), skipped[-1]
        total = int(state.loss_scale.skipped)
        if (total - len(skipped)).bit_length() < total.bit_length():
            text = self.cause() or "nothing, when it is computed again"
            self.run.log.say(f"step {step}: {len(skipped)} of {len(taken)} optimizer steps skipped; not finite: {text}")
            metrics["nonfinite"] = text
        return metrics

    def cause(self):
        """What was not finite in the latest step, where it was skipped; else None."""
        if self._suspect is None:
            return None
        params, scale, index = self._suspect
        rows_of, _ = self._batch
        parts = len(index) // _rows_of_a_look(self.run, rows_of(index).mask)
        total = normalizer_of(rows_of(index).response_mask)
        microbatches = (rows_of(index[part::parts]) for part in range(parts))  # as `split_rows` takes them
        return name_in_parts(self.run, self._peaks, params, scale, microbatches, total)

    def _measure(self, state):
        rows_of, (index, *_) = self._batch
        shards = row_shards(self.run.setup.mesh)
        count = min(-(-self.run.config.telemetry.rows // shards) * shards, len(index))
        minibatch = rows_of(index)
        total = normalizer_of(minibatch.response_mask)
        # Rows with an advantage come first: the policy loss of the others has no gradient to measure.
        idle = (to_host(minibatch.advantages).reshape(len(index), -1) == 0).all(axis=1)
        index = index[np.argsort(idle, kind="stable")]
        with self.run.log.announce("looking at the ranges"):
            found = self._ranges(state.sampling_params, state.loss_scale.loss_scale, rows_of(index[:count]), total)
            found, weights = jax.tree.map(to_host, (found, weight_ranges(state.sampling_params)))
        return summarize(self.run.model, self.run.setup.precision.policy, found, weights)


def _rows_of_a_look(run, mask):
    """Rows of full width in memory at once, a divisor of all."""
    t, shards = run.config.training, row_shards(run.setup.mesh)
    return dividing(len(mask), rows_at(mask.shape[1], t.microbatch_size, t.microbatch_tokens, shards), shards)


def name_in_parts(run, peaks, params, scale, microbatches, total):
    """`name_not_finite` of the first of `microbatches` in which something is not; None where all is finite."""
    policy = run.setup.precision.policy
    try:
        with run.log.announce("looking for what is not finite"):
            found = (
                name_not_finite(run.model, policy, peaks, params, scale, rows, total) for rows in microbatches
            )
            return next((text for text in found if text is not None), None)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return OUT_OF_MEMORY


def _loss_of(algorithm, limit, logprobs, entropy, rows, total):
    return loss_of_rows(algorithm, logprobs, entropy, rows, limit, total)[0]


def _due(every, step):
    return every > 0 and step % every == 0
