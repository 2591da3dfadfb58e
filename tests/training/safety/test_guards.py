"""What stops a run from inside: skipped steps, bounds on metrics, and what may go wrong at any moment."""

from types import SimpleNamespace

import jax
import pytest

from jaxrl_fp16.precision import LossScaleConfig, make_loss_scale
from jaxrl_fp16.tasks import BatchDeadline, RewardShapeError
from jaxrl_fp16.training.safety.guards import Guard, SkipGuard, check_bounds, ending_in_order


def a_run(**bounds):
    return SimpleNamespace(
        config=SimpleNamespace(training=SimpleNamespace(stop_above=bounds)),
        saved=lambda: "the last checkpoint is runs/5",
    )


def test_a_metric_above_its_bound_stops_the_run():
    run = a_run(**{"mismatch/kl_k3": 0.1, "kl": 5})
    check_bounds(run, 7, {"mismatch/kl_k3": 0.1, "kl": 0.0})
    with pytest.raises(Guard, match="mismatch/kl_k3 is 0.2 after step 7, above training.stop_above's 0.1: the run"):
        check_bounds(run, 7, {"mismatch/kl_k3": 0.2, "kl": 0.0})
    with pytest.raises(Guard, match="kl is nan after step 8"):
        check_bounds(run, 8, {"mismatch/kl_k3": 0.0, "kl": float("nan")})
    check_bounds(a_run(), 7, {"mismatch/kl_k3": float("inf")})


def test_a_metric_that_is_not_measured_stops_the_run():
    with pytest.raises(Guard, match="'kl', which step 1 does not measure; it measures mismatch/kl_k1, mismatch/kl_k3"):
        check_bounds(a_run(kl=5), 1, {"mismatch/kl_k3": 0.0, "mismatch/kl_k1": 0.0, "reward": 1.0})


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device", "metrics.jsonl"), "No space left on device: 'metrics.jsonl'; the last"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3G"), "out of device memory; what lowers it: .*; the last"),
    (Guard("5 of 32 rewards failed"), "^5 of 32 rewards failed; the last checkpoint is runs/5$"),
    (BatchDeadline("grading took longer"), "^grading took longer; the last checkpoint is runs/5"),
    (RewardShapeError("reward returned 1"), "^reward returned 1; the last checkpoint is runs/5"),
], ids=["disk", "memory", "guard", "grading", "rewards"])
def test_what_goes_wrong_is_one_line_that_names_what_is_saved(error, message):
    with pytest.raises(Guard, match=message):
        with ending_in_order(a_run()):
            raise error


def test_a_bug_stays_one():
    for error in (ValueError("shapes"), jax.errors.JaxRuntimeError("INTERNAL: a bug"), KeyError("name")):
        with pytest.raises(type(error)):
            with ending_in_order(a_run()):
                raise error


@pytest.mark.fault(20)
def test_what_the_skip_guard_counts():
    precision = SimpleNamespace(loss_scale=make_loss_scale(LossScaleConfig(initial=8.0, minimum=2.0)))
    own = SimpleNamespace(loss_scale=make_loss_scale(LossScaleConfig(minimum=1.0)))
    run = SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(max_skipped_steps=3)),
                          setup=SimpleNamespace(precision=precision, critic_precision=own))
    step = lambda skipped, scale=8.0, **more: {"skipped": skipped, "loss_scale": scale, **more}
    guard = SkipGuard(run)
    for skipped in (1, 1, 0, 1, 1, 0):
        guard.check(step(skipped))
    guard.check(step(1, 4.0))      # it leaves the scale at its minimum, but was not taken there
    with pytest.raises(Guard, match="2 optimizer steps of the policy skipped with the loss scale at its minimum, 2"):
        guard.check(step(1, 2.0))
    guard = SkipGuard(run)
    critic = {"critic/skipped": 1, "critic/loss_scale": 2.0}  # not its minimum: it has its own
    guard.check(critic), guard.check(step(1, **critic))
    with pytest.raises(Guard, match="3 optimizer steps of the critic skipped in a row: gradients are not finite; try"):
        guard.check(step(1, **critic))
