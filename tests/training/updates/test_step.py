"""The guarded step: accumulation, what a skipped and an empty step change, the loss scale at work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.precision import LossScaleConfig, get_precision
from jaxrl_fp16.training.updates import init_train_state
from jaxrl_fp16.training.updates.step import guarded_step, join_rows, split_rows

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-1, weight_decay=0.1))
SCALE = LossScaleConfig(initial=1024.0, growth_interval=3)
ROWS = 8


def state(name="fp16"):
    params = {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(())}
    return init_train_state(params, OPTIMIZER, get_precision(name, SCALE).loss_scale, jax.random.key(0))


def batch():
    return {"x": jax.random.normal(jax.random.key(1), (ROWS, 3)), "poison": jnp.zeros(ROWS)}


def share(params, rows):
    """This microbatch's share of a mean over all rows."""
    errors = rows["x"] @ params["w"] + params["b"] + rows["poison"] * params["b"]
    return jnp.sum(errors**2) / ROWS, errors


def run(before, rows, size=ROWS, empty=False):
    return jax.jit(lambda s, b, e: guarded_step(share, OPTIMIZER, s, b, size, empty=e))(before, rows, empty)


def assert_same(a, b, but=()):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if not jax.tree_util.keystr(path).startswith(tuple(but)):
            np.testing.assert_array_equal(*(jax.random.key_data(z) if jax.dtypes.issubdtype(
                z.dtype, jax.dtypes.prng_key) else z for z in (x, y)), err_msg=jax.tree_util.keystr(path))


def test_loss_gradient_and_step_are_those_of_the_whole_batch():
    before = state()
    loss, grads = jax.value_and_grad(lambda p: share(p, batch())[0])(before.params)
    updates, opt_state = OPTIMIZER.update(grads, before.opt_state, before.params)
    for size in (1, 2, 4, ROWS):
        after, metrics, errors = run(before, batch(), size)
        assert errors.shape == (ROWS // size, size)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
        expected = before.replace(params=optax.apply_updates(before.params, updates), opt_state=opt_state)
        for a, b in zip(jax.tree.leaves((after.params, after.opt_state)),
                        jax.tree.leaves((expected.params, expected.opt_state)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        assert (int(after.step), float(metrics["skipped"]), float(metrics["empty"])) == (1, 0, 0)


def test_the_reported_norm_is_that_before_clipping():
    _, metrics, _ = run(state(), batch())
    assert float(metrics["grad_norm"]) > 1.5


@pytest.mark.fault(19)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, ROWS])
def test_a_gradient_that_is_not_finite_changes_the_loss_scale_alone(poison, size):
    before, rows = state(), batch()
    rows["poison"] = rows["poison"].at[5].set(poison)
    after, metrics, _ = run(before, rows, size)
    assert_same(after, before, but=[".loss_scale"])
    assert float(after.loss_scale.loss_scale) == 512.0 and int(after.loss_scale.skipped) == 1
    assert (float(metrics["skipped"]), float(metrics["empty"])) == (1, 0)
    assert float(metrics["loss_scale"]) == 1024.0  # of this step
    assert not np.isfinite(metrics["grad_norm"])


def test_a_step_after_a_skipped_one_is_as_if_it_had_not_been():
    before, rows = state("bf16"), batch()
    bad = {**rows, "poison": rows["poison"].at[0].set(np.nan)}
    skipped, _, _ = run(before, bad)
    assert_same(run(skipped, rows)[0], run(before, rows)[0], but=[".loss_scale"])


def test_an_empty_step_changes_nothing():
    before = state()
    after, metrics, _ = run(before, batch(), empty=True)
    assert_same(after, before)
    assert (float(metrics["skipped"]), float(metrics["empty"])) == (0, 1)


def test_an_empty_step_with_a_nan_changes_nothing_either():
    before, rows = state(), batch()
    rows["poison"] += np.nan
    after, metrics, _ = run(before, rows, empty=True)
    assert_same(after, before)
    assert float(metrics["skipped"]) == 0


def test_the_scale_grows_after_its_interval_and_divides_out():
    current, norms = state(), []
    for _ in range(4):
        # Always from the first parameters, so that the gradient is the same under every scale.
        stepped, metrics, _ = run(current, batch())
        current = state().replace(loss_scale=stepped.loss_scale)
        norms.append((float(metrics["loss_scale"]), float(metrics["grad_norm"])))
    assert [scale for scale, _ in norms] == [1024.0, 1024.0, 1024.0, 2048.0]
    assert len({norm for _, norm in norms}) == 1  # a power of two changes no bit


def test_other_precisions_keep_scale_one():
    for name in ("bf16", "fp32"):
        after, metrics, _ = run(state(name), batch())
        assert float(metrics["loss_scale"]) == float(after.loss_scale.loss_scale) == 1.0


# -- rows ------------------------------------------------------------------------------------------


def test_splitting_and_joining_keep_the_order_of_rows():
    rows = jnp.arange(24).reshape(12, 2)
    for size in (1, 2, 3, 12):
        parts = split_rows({"a": rows}, size)["a"]
        assert parts.shape == (12 // size, size, 2)
        np.testing.assert_array_equal(join_rows(parts), rows)


def test_a_microbatch_takes_rows_from_the_whole_batch():
    np.testing.assert_array_equal(split_rows(jnp.arange(8), 4), [[0, 2, 4, 6], [1, 3, 5, 7]])


@pytest.mark.parametrize("size", [0, 3, 9, -1])
def test_a_size_that_does_not_divide_is_refused(size):
    with pytest.raises(ValueError, match=f"microbatch_size is {size}; allowed: a divisor of the batch's 8"):
        split_rows(jnp.zeros((8, 2)), size)
