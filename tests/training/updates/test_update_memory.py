"""What an update of a real shape would need, from the compiled program alone: nothing is allocated."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxrl_fp16.models import Decoder, DecoderConfig, param_shapes
from jaxrl_fp16.objectives import get_algorithm
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.updates import init_train_state, make_update
from jaxrl_fp16.types import Batch

GIB = 2**30
ROWS = 8
# Qwen2.5-0.5B
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
    num_kv_heads=2, head_dim=64, tie_embeddings=True))


def given(columns, parts=1):
    """`(update, state, batch)`, the last two as shapes; `parts` microbatches of ROWS."""
    precision = get_precision("fp16")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    start = lambda params, key: init_train_state(params, optimizer, precision.loss_scale, key)
    state = jax.eval_shape(start, param_shapes(MODEL), jax.eval_shape(lambda: jax.random.key(0)))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    grid = parts * ROWS, columns
    batch = Batch(
        tokens=array(jnp.int32, *grid), mask=array(bool, *grid), response_mask=array(bool, *grid),
        rollout_logprobs=array(jnp.float32, *grid), old_logprobs=array(jnp.float32, *grid),
        advantages=array(jnp.float32, parts * ROWS),
    )
    update = make_update(MODEL, precision.policy, get_algorithm("grpo"), optimizer, microbatch_size=ROWS)
    return update, state, batch


def memory_of_update(columns, parts=1):
    update, state, batch = given(columns, parts)
    return update.lower(state, batch).compile().memory_analysis()


def memory_of_part(columns, width):
    """Of the program that adds a part's gradient, and of its sums' bytes."""
    update, state, batch = given(columns, 2)
    sums = jax.eval_shape(lambda state, batch: update.programs["begin"](state, batch, sharding=None), state, batch)
    index, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, ROWS), ()))
    program = update.programs["add"].lower(sums, state, batch, index, count, width=width, sharding=None)
    found = program.compile().memory_analysis()
    return found.temp_size_in_bytes, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sums)), found


@pytest.fixture(scope="module")
def short():
    return memory_of_update(1024)


def test_8_rows_of_1024_tokens_need_less_than_7_gib_beside_the_state(short):
    temporary, state = short.temp_size_in_bytes, short.argument_size_in_bytes
    print(f"{temporary / GIB:.2f} GiB temporary, {state / GIB:.2f} GiB of state")
    assert temporary < 7 * GIB


def test_no_width_needs_more_than_the_widest_nor_that_more_than_one_program_of_all():
    widest, sums, found = memory_of_part(1024, 1024)
    narrow, whole = memory_of_part(1024, 512)[0], memory_of_update(1024, 2).temp_size_in_bytes
    print(f"{narrow / GIB:.2f}, {widest / GIB:.2f} GiB beside {sums / GIB:.2f} GiB of sums; {whole / GIB:.2f} GiB")
    assert narrow <= widest and widest + sums <= 1.01 * whole
    assert found.alias_size_in_bytes >= sums    # the sums are added to in place


def test_doubling_the_length_adds_at_most_2_gib(short):
    added = memory_of_update(2048).temp_size_in_bytes - short.temp_size_in_bytes
    print(f"{added / GIB:.2f} GiB added")
    assert added <= 2 * GIB


def test_the_state_is_updated_in_place(short):
    """Masters and two moments in float32: 3 x 4 bytes a parameter, and no second copy of them."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(MODEL)))
    assert short.argument_size_in_bytes == pytest.approx(12 * parameters, rel=1e-3)
    assert short.alias_size_in_bytes == pytest.approx(short.argument_size_in_bytes, rel=1e-3)
