"""Run by test_layouts.py in a process that has 4 virtual devices: nothing is run, programs are compiled and read.

The partitioner is the one that GPUs and TPUs have, so where it puts collectives is seen here too.
"""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxrl_fp16.models import Decoder, DecoderConfig, param_shapes, param_shardings
from jaxrl_fp16.objectives import get_algorithm
from jaxrl_fp16.parallel import MeshConfig, batch_sharding, make_mesh, state_shardings
from jaxrl_fp16.plan import hlo
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler
from jaxrl_fp16.training.updates import init_train_state, make_update
from jaxrl_fp16.training.updates.scorer import make_scorer
from jaxrl_fp16.types import Batch

ROWS, COLUMNS, PROMPT, VOCAB, WIDTH, LAYERS = 8, 48, 16, 512, 64, 2
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=96, num_layers=LAYERS, num_heads=4,
    num_kv_heads=2, head_dim=16, tie_embeddings=False))
PRECISION = get_precision("fp16")
ACTIVATION = ROWS * COLUMNS * WIDTH     # elements, of all rows


@pytest.fixture(scope="module", params=[(1, 4, 1), (1, 2, 2)], ids=str)
def mesh(request):
    return make_mesh(MeshConfig(*request.param))


def shaped(shapes, shardings):
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def params_on(mesh):
    return shaped(param_shapes(MODEL), param_shardings(MODEL, mesh))


def rows_on(mesh, dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def moved(program):
    """The collectives of what a lowered program compiles to."""
    return hlo.collectives(hlo.read(program.compile().as_text()))


def most(instructions):
    """Elements of the largest array that is moved."""
    return max((math.prod(shape) for each in instructions for _, shape in each.arrays), default=0)


def test_a_device_scores_its_own_rows(mesh):
    scorer = make_scorer(MODEL, PRECISION.policy, microbatch_size=ROWS)
    score = jax.jit(lambda params, tokens, mask: scorer(params, tokens, mask)[0])
    found = moved(score.lower(
        params_on(mesh), rows_on(mesh, jnp.int32, ROWS, COLUMNS), rows_on(mesh, bool, ROWS, COLUMNS)))
    own = ACTIVATION // mesh.shape["fsdp"]
    inside = [each for each in found if each.inside]
    activations = [each for each in inside if each.opcode == "all-reduce"]
    assert most(activations) <= own and (mesh.shape["tensor"] > 1) == bool(most(activations) >= own)
    heads = [each for each in found if ("f16", (VOCAB // mesh.shape["tensor"], WIDTH)) in each.arrays]
    assert sum(each.times for each in heads) == 1     # gathered once, in the compute dtype


def test_an_update_moves_weights_and_not_rows(mesh):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    start = lambda params, key: init_train_state(params, optimizer, PRECISION.loss_scale, key)
    shapes = jax.eval_shape(start, param_shapes(MODEL), jax.eval_shape(lambda: jax.random.key(0)))
    shardings = state_shardings(shapes, param_shardings(MODEL, mesh))
    array = lambda dtype, *shape: rows_on(mesh, dtype, *shape)
    grid = ROWS, COLUMNS
    batch = Batch(
        tokens=array(jnp.int32, *grid), mask=array(bool, *grid), response_mask=array(bool, *grid),
        rollout_logprobs=array(jnp.float32, *grid), old_logprobs=array(jnp.float32, *grid),
        advantages=array(jnp.float32, ROWS))
    update = make_update(MODEL, PRECISION.policy, get_algorithm("grpo"), optimizer, microbatch_size=ROWS,
                         state_shardings=shardings)
    found = moved(update.lower(shaped(shapes, shardings), batch))
    layers = [each for each in found if each.times == LAYERS]
    assert layers and most(layers) <= max(ACTIVATION // mesh.shape["fsdp"], 96 * WIDTH)


def test_a_decode_step_moves_no_weights(mesh):
    sample = make_sampler(MODEL, PRECISION.policy, SamplingConfig(max_new_tokens=COLUMNS - PROMPT, group_size=2),
                          eos_id=1, pad_id=0, lockstep=True)
    found = moved(sample.lower(
        params_on(mesh), rows_on(mesh, jnp.int32, ROWS // 2, PROMPT), rows_on(mesh, bool, ROWS // 2, PROMPT),
        jax.eval_shape(lambda: jax.random.key(0))))
    weights = WIDTH * WIDTH // mesh.shape["tensor"]     # of the smallest that is divided
    decoding = [each for each in found if each.inside and each.times == 1]    # the prompts' loop runs once a layer
    assert most([each for each in decoding if each.opcode != "all-reduce"]) < weights
    assert most(decoding) <= max(ROWS * WIDTH, weights // 2)
