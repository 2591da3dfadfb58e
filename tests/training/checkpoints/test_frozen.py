"""Checkpoints of adapters: the frozen part is not written, is told by its digest, and comes from the template."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.models import Decoder, DecoderConfig, LoraConfig, critic_params, param_shapes
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from jaxrl_fp16.training.checkpoints.leaves import named_leaves, saved_and_frozen
from jaxrl_fp16.training.updates import init_train_state

MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=4,
    head_dim=4), lora=LoraConfig(rank=2, alpha=4))


def parameters(seed=0, dtype=jnp.float16):
    generator = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(draw, param_shapes(MODEL, dtype))


def states(params):
    """What a run with PPO keeps: policy and critic beside one base."""
    scale, optimizer = get_precision("fp16").loss_scale, optax.adam(1e-3)
    make = lambda params: init_train_state(params, optimizer, scale, jax.random.key(3))
    return {"policy": make(params), "critic": make(critic_params(params)), "reference": None}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """`(folder, what was saved)` after two steps."""
    folder, state = tmp_path_factory.mktemp("run") / "checkpoints", states(parameters())
    with Checkpoints(folder, CheckpointConfig(keep=9)) as checkpoints:
        checkpoints.save(1, state, {"position": 4})
        checkpoints.save(2, state, {"position": 8})
    return folder, state


def restored(folder, template, step=None, said=print):
    with Checkpoints(folder, CheckpointConfig(keep=9), say=said) as checkpoints:
        return checkpoints.restore(template, step)


def same_bits(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = (jax.random.key_data(z) if jax.dtypes.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y))
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_what_is_frozen_is_not_written(kept):
    folder, state = kept
    about = json.loads((folder / "1" / "about.json").read_text())
    assert not any("base" in name for name in about["leaves"])
    assert "policy.params.lora.layers.attention.q.a" in about["leaves"]
    assert "critic.params.lora.value.kernel" in about["leaves"]
    frozen = saved_and_frozen(named_leaves(state))[1]
    assert about["frozen"]["arrays"] == len(frozen) == 2 * len(jax.tree.leaves(state["policy"].params["base"]))
    assert about["frozen"]["dtypes"] == ["float16"]
    assert about["frozen"]["bytes"] == 2 * sum(x.nbytes for x in jax.tree.leaves(state["policy"].params["base"]))
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        arrays, extra = checkpoints.arrays(1)
        assert checkpoints.holds("critic") and not checkpoints.holds("reference")
    assert extra == {"position": 4} and not any("base" in name for name in arrays)
    np.testing.assert_array_equal(arrays["policy.params.lora.layers.mlp.up.b"],
                                  state["policy"].params["lora"]["layers"]["mlp"]["up"]["b"])


def test_adapters_and_moments_come_back_beside_the_templates_base(kept):
    folder, state = kept
    template = states(jax.tree.map(jnp.zeros_like, parameters()) | {"base": parameters()["base"]})
    found, extra, step = restored(folder, template)
    assert (extra, step) == ({"position": 8}, 2)
    same_bits(found, state)
    for name in ("policy", "critic"):
        assert jax.tree.leaves(found[name].params["base"])[0] is jax.tree.leaves(template[name].params["base"])[0]


def other_base(change):
    params = parameters()
    params["base"] = jax.tree.map(lambda x: x, params["base"])
    change(params["base"])
    return states(params)


def one_bit(base):
    bits = np.array(base["embedding"]).view(np.uint16)
    bits[5, 3] ^= 1
    base["embedding"] = jnp.asarray(bits.view(np.float16))


def two_swapped(base):
    base["embedding"] = base["embedding"].at[jnp.array([3, 9])].set(base["embedding"][jnp.array([9, 3])])


def two_layers_swapped(base):
    base["layers"] = jax.tree.map(lambda x: x[::-1], base["layers"])


@pytest.mark.parametrize("change", [one_bit, two_swapped, two_layers_swapped])
def test_another_base_is_refused_in_one_line(kept, change):
    """And is no damage: the checkpoint stays as it is."""
    folder, said = kept[0], []
    with pytest.raises(CheckpointError, match="adapters were trained beside other frozen weights: digest .*, here .*; "
                                              "allowed: the same model folder in the same precision") as caught:
        restored(folder, other_base(change), said=said.append)
    assert "\n" not in str(caught.value) and said == []


def test_the_base_in_another_precision_is_refused(kept):
    with pytest.raises(CheckpointError, match="dtypes .'float16'., here .'bfloat16'."):
        restored(kept[0], states({**parameters(), "base": parameters(dtype=jnp.bfloat16)["base"]}))


def test_adapters_of_another_rank_and_a_whole_model_are_refused(kept):
    wide = MODEL.clone(lora=LoraConfig(rank=3))
    other = {**parameters(), "lora": jax.tree.map(lambda x: jnp.zeros(x.shape), param_shapes(wide)["lora"])}
    with pytest.raises(CheckpointError, match=r"lora.* is float32\[2, 16, 2\], wanted is float32\[2, 16, 3\]"):
        restored(kept[0], states(other))
    with pytest.raises(CheckpointError, match="lora.* is float32.*, wanted is nothing"):
        restored(kept[0], states(parameters()["base"]))


def test_a_template_of_shapes_alone_is_no_damage(kept):
    """What is frozen must be there: its bits are looked at, and the result holds it."""
    folder, state = kept
    template = {**state, "policy": jax.eval_shape(lambda: state["policy"])}
    said = []
    with pytest.raises(ValueError, match="policy.params.base.embedding is a shape alone; allowed: what is frozen"):
        restored(folder, template, said=said.append)
    assert said == []
