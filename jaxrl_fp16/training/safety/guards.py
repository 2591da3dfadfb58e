"""What stops a run from inside: exit code 3, one line with the cause, what to try and what is saved."""

import contextlib
import math

import jax

from jaxrl_fp16.engines import EngineError
from jaxrl_fp16.parallel import LOST_PROCESS, is_lost_process
from jaxrl_fp16.tasks import BatchDeadline, RewardShapeError, WorkerStartError
from jaxrl_fp16.training.safety.deadlines import STOPPED, leave
from jaxrl_fp16.training.safety.memory import LOWERS_MEMORY, is_out_of_memory


class Guard(RuntimeError):
    """A run stopped itself; one line with the cause and what to try."""


@contextlib.contextmanager
def ending_in_order(run):
    """What may go wrong at any moment of a run, as a `Guard` that names the last checkpoint too."""
    try:
        yield
    except (Guard, OSError, EngineError, BatchDeadline, RewardShapeError, WorkerStartError) as error:
        raise Guard(f"{error}; {run.saved()}") from error
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if is_lost_process(error):      # at once: whatever else there is to end may wait for the lost one
            leave(STOPPED, f"{LOST_PROCESS}; {run.checkpoints.describe()}")
        if is_out_of_memory(error):
            raise Guard(f"out of device memory; what lowers it: {LOWERS_MEMORY}; {run.saved()}") from error
        raise


class SkipGuard:
    """Counts optimizer steps skipped in a row; stops a run whose gradients stay non-finite."""

    def __init__(self, run):
        self.limit = run.config.training.max_skipped_steps
        self.scales = {"": run.setup.precision.loss_scale, "critic/": run.setup.critic_precision.loss_scale}
        self.in_a_row = dict.fromkeys(self.scales, 0)

    def check(self, metrics, cause=lambda: None):
        """After each optimizer step: its metrics, with those of the critic's step under `critic/`.

        cause: tells what was not finite in the policy's, or None.
        """
        for model in self.in_a_row:
            if f"{model}skipped" in metrics:
                self._check(model, bool(metrics[f"{model}skipped"]), metrics[f"{model}loss_scale"], cause)

    def _check(self, model, skipped, scale, cause):
        self.in_a_row[model] = self.in_a_row[model] + 1 if skipped else 0
        floored = skipped and bool(self.scales[model].replace(loss_scale=scale).at_minimum)
        if self.in_a_row[model] < self.limit and not floored:
            return
        when = f"with the loss scale at its minimum, {scale:g}" if floored else "in a row"
        found = None if model else cause()
        first = f", first {found}" if found else ""
        raise Guard(
            f"{self.in_a_row[model]} optimizer steps of the {'critic' if model else 'policy'} skipped {when}: "
            f"gradients are not finite{first}; try precision bf16 or a lower learning rate"
        )


def check_canary(config, metrics):
    """Stops a run, before its update, whose engine and scorer part beyond `rollout.stop_above`. Not of jit, whose
    forward is the scorer's own. metrics: of the iteration, with `mismatch/kl_k3`."""
    if config.rollout.engine == "jit":
        return
    value, bound = float(metrics["mismatch/kl_k3"]), config.rollout.stop_above
    if not value <= bound:      # a NaN compares false
        raise Guard(
            f"mismatch/kl_k3 of rollout.engine {config.rollout.engine} against the scorer is {value:g}, above "
            f"rollout.stop_above {bound:g}; no update was made. It may be: stale weights (all, or a tied head alone); "
            "a prefix cache of older weights; log-probs of another distribution than was drawn from (temperature, "
            "top-k, top-p, defaults of the engine's own); another precision. rollout.engine jit has none of them"
        )


def check_bounds(run, step, metrics):
    """Stops a run of which a metric of `training.stop_above` is above its bound, or no number."""
    for name, bound in run.config.training.stop_above.items():
        if name not in metrics:
            known = ", ".join(sorted(key for key in metrics if "kl" in key.lower())) or "none of them a KL"
            raise Guard(
                f"training.stop_above names {name!r}, which step {step} does not measure; it measures {known}, and "
                "what else metrics.jsonl holds"
            )
        value = float(metrics[name])
        if value > bound or math.isnan(value):
            raise Guard(
                f"{name} is {value:g} after step {step}, above training.stop_above's {bound:g}: the run diverges; try "
                f"precision fp16 or a lower learning rate, and continue from an earlier checkpoint"
            )
