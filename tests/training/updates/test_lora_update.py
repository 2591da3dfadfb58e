"""An update of adapters: what it moves and what it never does, no gradient of the base, dropout in supervised steps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, LoraConfig, critic_params, init_lora, init_params
from jaxrl_fp16.objectives import get_algorithm
from jaxrl_fp16.precision import LossScaleConfig, get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler
from jaxrl_fp16.training.updates import init_train_state, make_update, make_value_update
from jaxrl_fp16.training.updates.sft_update import SFTRows, make_sft_update

pytestmark = pytest.mark.usefixtures("quick_compile")

# Sizes of which no two products are alike, so that an array's shape says whose it is.
CONFIG = DecoderConfig(family="qwen2", vocab_size=37, hidden_size=22, intermediate_size=26, num_layers=3, num_heads=4,
                       num_kv_heads=2, head_dim=14, tie_embeddings=False)
MODEL = Decoder(CONFIG, lora=LoraConfig(rank=5, alpha=10), attention="plain", remat=False)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


@functools.cache
def base():
    return init_params(MODEL, jax.random.key(0))


def start(precision="fp16", model=MODEL, seed=0, **loss_scale):
    found = get_precision(precision, LossScaleConfig(**loss_scale))
    params = init_lora(model, base(), jax.random.key(1), policy=found.policy)
    return init_train_state(params, OPTIMIZER, found.loss_scale, jax.random.key(seed))


@functools.cache
def update_of(precision="fp16", model=MODEL):
    return make_update(model, get_precision(precision).policy, get_algorithm("grpo"), OPTIMIZER, microbatch_size=4,
                       max_new_tokens=10)


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def host(tree):
    return jax.tree.map(np.array, tree)


def shapes_of(params):
    """The shapes of matrices, of all layers and of one, as a program's text writes them."""
    whole = [leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
             if path[-1].key in ("kernel", "embedding", "head")]
    every = {*whole, *(shape[1:] for shape in whole if len(shape) > 2), *((1, *shape[1:]) for shape in whole)}
    return {"x".join(map(str, shape)) for shape in every if len(shape) > 1}


def wide_matrices(text, params):
    """Those that a program holds in float32."""
    return sorted(set(re.findall(r"tensor<([\dx]+)xf32>", text)) & shapes_of(params))


# -- the state -------------------------------------------------------------------------------------


def test_the_adapters_alone_have_masters_and_moments():
    state = start()
    shapes = lambda tree: sorted(leaf.shape for leaf in jax.tree.leaves(tree) if leaf.ndim)
    assert shapes(state.opt_state) == sorted(2 * shapes(state.params["lora"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained_params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params["base"])} == {jnp.dtype("float16")}


def test_an_update_leaves_the_base_where_it_is_and_moves_the_adapters(toy):
    """The base goes in and comes out as the same arrays, and is copied by nobody; what it is given is donated."""
    state, batch = start(), toy.batch()
    given, before, was = state.params, host(state.params), pointers(state.params["base"])
    for step in range(2):
        state, metrics = update_of()(state, batch)
        assert float(metrics["skipped"]) == 0 and float(metrics["grad_norm"]) > 0
    assert pointers(state.params["base"]) == was and not any(x.is_deleted() for x in jax.tree.leaves(given["base"]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start_donated(batch)))
    jax.tree.map(np.testing.assert_array_equal, host(state.params["base"]), before["base"])
    for part in ("attention", "mlp"):
        for name, own in state.params["lora"]["layers"][part].items():
            assert (own["b"] != 0).mean() > 0.9 and (own["a"] != before["lora"]["layers"][part][name]["a"]).mean() > 0.9


def start_donated(batch):
    """The adapters that an update was given."""
    state = start()
    update_of()(state, batch)
    return state.params["lora"]


def test_the_same_steps_twice_give_the_same_bits(toy):
    def two_steps():
        state = start()
        for seed in (0, 1):
            state, metrics = update_of()(state, toy.batch(seed=seed))
        return host((state.params, state.opt_state, state.loss_scale, metrics))

    jax.tree.map(np.testing.assert_array_equal, two_steps(), two_steps())


def test_a_skipped_step_changes_the_loss_scale_alone(toy):
    batch = toy.batch()
    state = start(initial=1024.0)
    before = host((state.params, state.opt_state, state.step))
    after, metrics = update_of()(state, batch.replace(advantages=batch.advantages.at[2].set(jnp.nan)))
    assert float(metrics["skipped"]) == 1 and float(after.loss_scale.loss_scale) == 512
    jax.tree.map(np.testing.assert_array_equal, host((after.params, after.opt_state, after.step)), before)


def test_a_critic_and_a_policy_train_beside_one_base(toy):
    state = start()
    critic = Critic(MODEL)
    value_state = init_train_state(critic_params(state.params), OPTIMIZER, state.loss_scale, jax.random.key(0))
    value_update = make_value_update(critic, get_precision("fp16").policy, get_algorithm("ppo"), OPTIMIZER,
                                     microbatch_size=4)
    was = pointers(state.params["base"])
    before = host(value_state.params["lora"])
    for _ in range(2):
        value_state, metrics = value_update(value_state, toy.batch())
        state, _ = update_of()(state, toy.batch())
    assert float(metrics["skipped"]) == 0
    assert pointers(value_state.params["base"]) == pointers(state.params["base"]) == was
    assert (value_state.params["lora"]["value"]["kernel"] != before["value"]["kernel"]).all()
    moved = value_state.params["lora"]["body"]["layers"]["mlp"]["down"]["b"]
    assert float(jnp.abs(moved).max()) > 0


# -- what the program is made of -----------------------------------------------------------------------


def test_no_program_holds_a_matrix_of_the_base_in_float32(toy):
    """No gradient of it, no master, no copy: neither of all layers nor of one. The whole model's update has them."""
    text = update_of().lower(start(), toy.batch()).as_text()
    assert wide_matrices(text, base()) == []
    assert "tensor<3x22x26xf16>" in text and "tensor<37x22xf16>" in text and "tensor<3x22x5xf32>" in text
    plain = MODEL.clone(lora=None)
    whole = init_train_state(base(), OPTIMIZER, get_precision("fp16").loss_scale, jax.random.key(0))
    found = wide_matrices(update_of(model=plain).lower(whole, toy.batch()).as_text(), base())
    assert {"3x22x26", "37x22", "3x22x4x14"} <= set(found)


def test_the_critics_program_holds_none_either(toy):
    critic, state = Critic(MODEL), start()
    value_state = init_train_state(critic_params(state.params), OPTIMIZER, state.loss_scale, jax.random.key(0))
    update = make_value_update(critic, get_precision("fp16").policy, get_algorithm("ppo"), OPTIMIZER, microbatch_size=4)
    assert wide_matrices(update.lower(value_state, toy.batch()).as_text(), base()) == []


# -- dropout -------------------------------------------------------------------------------------------


DROPS = MODEL.clone(lora=LoraConfig(rank=5, alpha=10, dropout=0.5))


@functools.cache
def supervised(model):
    return make_sft_update(model, get_precision("fp32").policy, OPTIMIZER, microbatch_size=4)


def losses_of(toy, model, steps=3, seed=0):
    """Of supervised steps on one batch, and the parameters after them."""
    batch = toy.batch()
    rows, state, losses = SFTRows(batch.tokens, batch.mask, batch.response_mask), start("fp32", model, seed), []
    for _ in range(steps):
        state, metrics = supervised(model)(state, rows)
        losses.append(float(metrics["loss"]))
    return losses, host(state.params["lora"])


def test_supervised_steps_drop_by_the_key_and_the_step(toy):
    """At the first step B is 0 and nothing that is dropped shows; the gradient is another one all the same."""
    without, dropped, again, other = (losses_of(toy, *which) for which in (
        (MODEL,), (DROPS,), (DROPS,), (DROPS, 3, 1)))
    assert dropped[0][0] == without[0][0] and dropped[0][1:] != without[0][1:]
    assert dropped[0] == again[0] != other[0]
    jax.tree.map(np.testing.assert_array_equal, dropped[1], again[1])


def test_each_step_drops_others(toy):
    """With the same parameters: the step's number is what differs."""
    batch, found = toy.batch(), []
    rows = SFTRows(batch.tokens, batch.mask, batch.response_mask)
    _, trained = losses_of(toy, DROPS)
    for step in (0, 1, 2):
        state = start("fp32", DROPS).with_trained(jax.tree.map(jnp.asarray, trained))
        found.append(float(supervised(DROPS)(state.replace(step=jnp.int32(step)), rows)[1]["loss"]))
    assert len(set(found)) == 3 and np.ptp(found) > 1e-3


def test_no_sampler_or_scorer_drops_and_rl_refuses_it(toy):
    """They are the same programs as without dropout."""
    params, policy, batch = start().params, get_precision("fp16").policy, toy.batch()

    def texts(model):
        sample = make_sampler(model, policy, SamplingConfig(max_new_tokens=4, group_size=1), eos_id=1, pad_id=0)
        score = jax.jit(lambda *given: token_logprobs(model, *given, policy=policy))
        rows = params, batch.tokens, batch.mask
        return sample.lower(*rows, jax.random.key(2)).as_text(), score.lower(*rows).as_text()

    assert texts(DROPS) == texts(MODEL)
    with pytest.raises(ValueError, match="dropout is 0.5; allowed in RL: 0, as a policy that drops is not the one"):
        update_of(model=DROPS)
