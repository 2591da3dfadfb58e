"""Names to policies, what is refused, and the loss scale against a plain Python oracle."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.precision import LossScale, LossScaleConfig, get_precision, make_loss_scale, resolve_precision

# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, compute, output, dynamic", [
    ("fp16", "float16", "float32", True),
    ("bf16", "bfloat16", "float32", False),
    ("fp32", "float32", "float32", False),
    ("params=float32,compute=float16,output=float32", "float16", "float32", True),
    (" output=float16, compute=bfloat16 ,params=float32", "bfloat16", "float16", False),
])
def test_a_name_is_a_policy(name, compute, output, dynamic):
    precision = get_precision(name)
    dtypes = [getattr(precision.policy, f"{kind}_dtype") for kind in ("param", "compute", "output")]
    assert dtypes == [jnp.float32, jnp.dtype(compute), jnp.dtype(output)]
    assert precision.name == name and precision.loss_scale.dynamic is dynamic
    assert float(precision.loss_scale.loss_scale) == (2.0**15 if dynamic else 1.0)


@pytest.mark.parametrize("name, message", [
    ("fp8", "precision 'fp8' is unknown; allowed: fp16, bf16, fp32"),
    ("", "precision '' is unknown"),
    ("FP16", "precision 'FP16' is unknown"),
    (None, "precision None is unknown"),
    (16, "precision 16 is unknown"),
    ("params=float16,compute=float16,output=float32", "params is 'float16'; allowed: float32"),
    ("params=float32,compute=int8,output=float32", "compute is 'int8'; allowed: float16, bfloat16, float32"),
    ("params=float32,compute=float16,output=float64", "output is 'float64'; allowed: float16"),
    ("params=float32,compute=float16", "must give each of params, compute and output once"),
    ("params=float32,compute=float16,output=float32,compute=float32", "each of params, compute and output"),
    ("params=float32,compute=float16,outputs=float32", "each of params, compute and output once"),
    ("params=float32,compute=,output=float32", "compute is ''; allowed"),
])
def test_any_other_name_is_refused_with_what_is_allowed(name, message):
    with pytest.raises(ValueError, match=message):
        get_precision(name)


@pytest.mark.parametrize("name, platform, resolved", [
    ("auto", "gpu", "fp16"), ("auto", "cpu", "fp16"), ("auto", "tpu", "bf16"),
    ("fp16", "cpu", "fp16"), ("bf16", "tpu", "bf16"), ("fp32", "tpu", "fp32"),
])
def test_auto_follows_the_platform(name, platform, resolved):
    assert resolve_precision(name, platform) == resolved


@pytest.mark.parametrize("name", ["fp16", "params=float32,compute=float16,output=float32"])
def test_float16_on_a_tpu_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match="float16, which a TPU's matrix units do not; allowed on TPU: bf16"):
        resolve_precision(name, "tpu")


@pytest.mark.parametrize("fields, message", [
    (dict(initial=2.0**25), "initial is 3.35544e\\+07; allowed: .* 1 to 1.67772e\\+07"),
    (dict(initial=0.5), "initial is 0.5; allowed"),
    (dict(minimum=8.0, maximum=4.0, initial=6.0), "initial is 6; allowed"),
])
def test_a_first_scale_outside_its_bounds_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LossScaleConfig(**fields)


def test_the_config_reaches_the_scale():
    config = LossScaleConfig(initial=64.0, growth_interval=3)
    scale = get_precision("fp16", config).loss_scale
    assert scale.config == config and float(scale.loss_scale) == 64.0
    assert float(get_precision("bf16", config).loss_scale.loss_scale) == 1.0


# -- the rule of adjust --------------------------------------------------------------------------


class Oracle:
    """The rule, as its definition reads."""

    def __init__(self, config):
        self.config, self.scale, self.good, self.bad, self.skipped = config, config.initial, 0, 0, 0

    def adjust(self, finite):
        c = self.config
        if finite:
            self.good += 1
            if self.good == c.growth_interval:
                self.scale, self.good, self.bad = min(self.scale * c.growth, c.maximum), 0, 0
        else:
            self.good, self.bad, self.skipped = 0, self.bad + 1, self.skipped + 1
            if self.bad == c.hysteresis:
                self.scale, self.bad = max(self.scale * c.backoff, c.minimum), 0

    @property
    def state(self):
        return self.scale, self.good, self.bad, self.skipped


CONFIGS = [
    LossScaleConfig(),
    LossScaleConfig(growth_interval=1),
    LossScaleConfig(growth_interval=3, hysteresis=2),
    LossScaleConfig(growth_interval=2, hysteresis=4, growth=4.0, backoff=0.25),
    LossScaleConfig(initial=8.0, growth_interval=2, minimum=4.0, maximum=32.0),
    LossScaleConfig(initial=3.0, growth_interval=5, growth=1.5, backoff=0.75, minimum=1.0, maximum=100.0),
    LossScaleConfig(initial=1.0, minimum=1.0, maximum=1.0, growth_interval=2),
]


@jax.jit
def history(scale, flags):
    """The scale and its counters after each of `flags` bool [n]."""

    def step(scale, finite):
        scale = scale.adjust(finite)
        return scale, (scale.loss_scale, scale.good, scale.bad, scale.skipped)

    return jax.lax.scan(step, scale, flags)[1]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_adjust_follows_the_oracle_over_random_sequences(config):
    generator = random.Random(0)
    for share_finite in (0.2, 0.5, 0.8, 0.95, 1.0):
        for _ in range(100):
            flags = [generator.random() < share_finite for _ in range(60)]
            oracle, expected = Oracle(config), []
            for finite in flags:
                oracle.adjust(finite)
                expected.append(oracle.state)
            found = jnp.stack(history(make_loss_scale(config), jnp.array(flags)), axis=1)
            np.testing.assert_array_equal(found, np.float32(expected))


def test_the_defaults_grow_after_400_finite_steps():
    scales, good, _, _ = history(make_loss_scale(), jnp.ones(801, bool))
    assert (scales[398], scales[399], scales[798], scales[799]) == (2.0**15, 2.0**16, 2.0**16, 2.0**17)
    assert (good[398], good[399]) == (399, 0)


def test_a_scale_that_is_not_dynamic_only_counts():
    flags = jnp.array([True, False] * 450)
    scales, _, _, skipped = history(make_loss_scale(LossScaleConfig(growth_interval=1), dynamic=False), flags)
    assert (scales == 1.0).all() and skipped[-1] == 450


def test_at_minimum_is_said_of_a_dynamic_scale_alone():
    config = LossScaleConfig(initial=2.0, minimum=1.0)
    scale = make_loss_scale(config)
    assert not scale.at_minimum and scale.adjust(False).at_minimum
    assert not make_loss_scale(config, dynamic=False).at_minimum


# -- jmp's protocol --------------------------------------------------------------------------------


def test_scale_keeps_the_dtype_and_unscale_gives_float32():
    scale = make_loss_scale(LossScaleConfig(initial=1024.0))
    tree = {"a": jnp.float16(0.5), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.float32(3.0)}
    scaled = scale.scale(tree)
    assert {k: v.dtype for k, v in scaled.items()} == {"a": jnp.float16, "b": jnp.bfloat16, "c": jnp.float32}
    assert float(scaled["a"]) == 512.0 and float(scaled["c"]) == 3072.0
    unscaled = scale.unscale(scaled)
    assert all(leaf.dtype == jnp.float32 for leaf in unscaled.values())
    np.testing.assert_array_equal(unscaled["b"], np.ones(3))


def test_a_float16_leaf_survives_a_scale_that_float16_cannot_hold():
    scale = make_loss_scale(LossScaleConfig(initial=2.0**20))
    tiny = jnp.float16(2.0**-14)
    assert float(scale.scale(tiny)) == 64.0  # a scale rounded to float16 first would be infinite
    assert float(scale.unscale(tiny)) == 2.0**-34  # float16 would give 0


def test_the_scale_is_a_pytree_of_arrays():
    scale = make_loss_scale(LossScaleConfig(initial=16.0, minimum=4.0))
    leaves = jax.tree.leaves(scale)
    assert [leaf.dtype for leaf in leaves] == [jnp.float32, jnp.int32, jnp.int32, jnp.int32]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == 4  # donated together, so none shared
    for same in (jax.tree.map(lambda x: x, scale), jax.jit(lambda s: s)(scale), jax.device_put(scale)):
        assert isinstance(same, LossScale) and same.config == scale.config and same.dynamic
        assert float(same.loss_scale) == 16.0
    shapes = jax.eval_shape(lambda s: s.adjust(jnp.bool_(False)), scale)
    assert isinstance(shapes, LossScale) and shapes.loss_scale.shape == ()


def test_bounds_survive_jit_and_donation():
    step = jax.jit(lambda scale, finite: scale.adjust(finite), donate_argnums=0)
    scale = make_loss_scale(LossScaleConfig(initial=16.0, minimum=4.0))
    for _ in range(5):
        given, scale = scale, step(scale, jnp.bool_(False))
        assert given.loss_scale.is_deleted()
    assert float(scale.loss_scale) == 4.0 and int(scale.skipped) == 5
    assert step._cache_size() == 1


def test_get_precision_gives_a_fresh_scale_each_time():
    first, second = get_precision("fp16").loss_scale, get_precision("fp16").loss_scale
    jax.jit(lambda scale: scale.adjust(True), donate_argnums=0)(first)
    assert not second.loss_scale.is_deleted()
