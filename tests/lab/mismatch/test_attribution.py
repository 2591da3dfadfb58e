"""Attribution: shares that add up in squares, errors where they are put, and remedies measured one at a time."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import cast_to_compute, in_compute_dtype, token_logprobs
from jaxrl_fp16.lab.mismatch import attribution, carried
from jaxrl_fp16.lab.mismatch.attribution import attribute, shares_by
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.models.taps import tap_names, tapped_forward
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler

MODEL = Decoder(DecoderConfig(family="qwen2", vocab_size=60, hidden_size=32, intermediate_size=48, num_layers=2,
                              num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True), attention="plain")
BF16, FP16 = (get_precision(name).policy for name in ("bf16", "fp16"))
GENERATOR = np.random.default_rng(0)
MASK = np.arange(8) >= GENERATOR.integers(0, 5, 6)[:, None]
PROMPTS = np.where(MASK, GENERATOR.integers(2, 60, MASK.shape), 0).astype(np.int32)
SAMPLING = SamplingConfig(max_new_tokens=12, group_size=1)


@cache
def setting():
    params = init_params(MODEL, jax.random.key(0))
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 3
    rollout = make_sampler(MODEL, BF16, SAMPLING, eos_id=1, pad_id=0)(params, PROMPTS, MASK, jax.random.key(1))
    return params, rollout


@cache
def found(precision="bf16"):
    params, rollout = setting()
    return attribute(MODEL, params, rollout, get_precision(precision).policy)


def test_the_decode_program_is_the_samplers():
    """Its log-probs on the stored tokens are those that the sampler has written, to what taps change."""
    params, rollout = setting()
    batch = attribution._aligned(rollout)
    model, cast = in_compute_dtype(MODEL, BF16), cast_to_compute(params, BF16)
    decode = jax.jit(lambda batch: attribution._decode(model, cast, batch, 8, 1.0)[0])
    logprobs, response = np.asarray(decode(batch)), np.asarray(batch["response"])
    np.testing.assert_allclose(logprobs[response], rollout.logprobs[rollout.response_mask], atol=2e-2)
    assert not logprobs[~response].any() and attribution._prompt_columns(rollout) == 8


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_programs_are_the_samplers_and_the_scorers_to_the_last_bit(precision):
    """Where a prompt has two rows, too, which the sampler prefills once."""
    policy, sampling = get_precision(precision).policy, SamplingConfig(max_new_tokens=12, group_size=2)
    params, _ = setting()
    rollout = make_sampler(MODEL, policy, sampling, eos_id=1, pad_id=0)(params, PROMPTS, MASK, jax.random.key(1))
    batch = attribution._aligned(rollout)
    assert attribution._group(batch) == 2
    model, cast = in_compute_dtype(MODEL, policy), cast_to_compute(params, policy)
    response = np.asarray(batch["response"])
    decode = jax.jit(lambda batch: attribution._decode(model, cast, batch, 8, 1.0, group=2))(batch)[0]
    full = jax.jit(lambda batch: attribution._full(model, cast, batch, 1.0))(batch)[0]
    scored = token_logprobs(MODEL, params, rollout.tokens, rollout.mask, policy=policy)
    np.testing.assert_array_equal(decode[response], rollout.logprobs[rollout.response_mask])
    np.testing.assert_array_equal(full[response], scored[rollout.response_mask])


def test_shares_add_up_in_squares():
    result = found()
    assert 0 < result["untapped"] and 0 < result["end_to_end"]
    assert 0.5 < result["squares"] < 2
    assert result["unexplained"] < 0.3 * result["end_to_end"]
    assert result["token_kl"].keys() == {"tapped", "untapped"}


def test_every_module_has_a_row():
    rows = found()["modules"]
    assert [row["name"] for row in rows] == [*tap_names(2), "head"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["embedding"]["decode_full"] == by_name["embedding"]["share"] == 0
    for name in ("layers.1", "final_norm", "head"):
        row = by_name[name]
        assert 0 < row["decode_full"] < row["full_float32"] < 0.1 and 0 < row["decode_float32"] < 0.1
    assert by_name["layers.1.mlp"]["kind"] == "mlp" and by_name["layers.1.mlp"]["layer"] == 1
    assert by_name["layers.1"]["kind"] == "residual" and by_name["layers.1"]["share"] == 0
    for key in ("kind", "layer"):
        assert sum(shares_by(found(), key).values()) == pytest.approx(1)


def test_an_error_put_into_one_module_is_found_there(monkeypatch):
    """In float32 the programs agree but for what is added to one module of the decode program."""
    place, (params, rollout) = "layers.0.mlp", setting()
    step, noise = attribution.tapped_decode_step, 1e-2 * jax.random.normal(jax.random.key(5), (1, 1, 32))

    def change(module, layer, value):
        return value + jnp.where(layer == 0, noise, 0.0) if module == "mlp" else value

    monkeypatch.setattr(attribution, "tapped_decode_step", lambda *args: step(*args, change))
    result = attribute(MODEL, params, rollout, get_precision("fp32").policy)
    shares = {row["name"]: row["share"] for row in result["modules"]}
    assert max(shares, key=shares.get) == place
    assert shares[place] == pytest.approx(result["end_to_end"], rel=0.1)
    others = {name: share for name, share in shares.items() if name != place}
    assert max(others.values()) < 1e-2 * shares[place], (shares[place], others)


def test_a_truncated_distribution_is_refused():
    params, rollout = setting()
    cut = rollout.replace(support=jnp.zeros((6, 12, 2), jnp.int32))
    with pytest.raises(ValueError, match="allowed: top_k 0 and top_p 1"):
        attribute(MODEL, params, cut, BF16)


def test_rows_may_be_measured_in_parts(monkeypatch):
    """Six at once, then four and two that are filled up; nothing but last bits may differ. It says how far it is."""
    (params, rollout), at_once, said = setting(), found("fp16"), []
    parts = [{name: x[index] for name, x in attribution._aligned(rollout).items()} | {"own": np.arange(4) < own}
             for index, own in ((np.arange(4), 4), (np.array([4, 5, 0, 1]), 2))]
    monkeypatch.setattr(attribution, "_in_parts", lambda batch, config: (parts, 1))
    result = attribute(MODEL, params, rollout, FP16, progress=lambda *given: said.append(given))
    for part, one in zip(result["modules"], at_once["modules"]):
        assert part["name"] == one["name"]
        for key in ("decode_float32", "full_float32"):
            assert part[key] == pytest.approx(one[key], rel=1e-2), (part["name"], key)
        assert part["share"] == pytest.approx(one["share"], rel=0.05, abs=1e-6), part["name"]
    assert result["token_kl"]["untapped"] == at_once["token_kl"]["untapped"]
    assert said == sorted(said) and said[0] == (0, 20, 0) and said[-1] == (20, 20, 1)


def parts_of(monkeypatch, batch, fit):
    monkeypatch.setattr(attribution, "TAP_BYTES", int(fit * 4 * 20 * 32 * len(tap_names(2))))
    return attribution._in_parts(batch, MODEL.config)


@pytest.mark.parametrize("fit, expected", [(9, [6]), (5, [3, 3]), (3, [3, 3]), (2, [2, 2, 2]), (0.5, [1] * 6)])
def test_parts_are_of_one_size(monkeypatch, fit, expected):
    parts, group = parts_of(monkeypatch, attribution._aligned(setting()[1]), fit)
    assert [int(part["own"].sum()) for part in parts] == [len(part["tokens"]) for part in parts] == expected
    assert group == 1


def test_the_scorers_program_takes_as_many_rows_as_the_run(monkeypatch):
    (params, rollout), taken = setting(), []
    original = attribution.tapped_forward

    def counted(model, params, tokens, **settings):
        taken.append(len(tokens))
        return original(model, params, tokens, **settings)

    monkeypatch.setattr(attribution, "tapped_forward", counted)
    result = attribute(MODEL, params, rollout, FP16, rows=3)
    whole = found("fp16")
    assert 3 in taken and result["token_kl"]["untapped"] == pytest.approx(whole["token_kl"]["untapped"], rel=0.5)
    assert [row["name"] for row in result["modules"]] == [row["name"] for row in whole["modules"]]



@pytest.mark.parametrize("fit, size, group", [(12, 12, 3), (11, 6, 3), (8, 6, 3), (3, 3, 3), (2, 2, 1)])
def test_parts_keep_a_prompts_rows_together(monkeypatch, fit, size, group):
    batch = {name: jnp.repeat(x, 3, axis=0)[:12] for name, x in attribution._aligned(setting()[1]).items()}
    parts, shared = parts_of(monkeypatch, batch, fit)
    assert shared == group and {len(part["tokens"]) for part in parts} == {size}


def test_the_last_part_is_filled_up(monkeypatch):
    batch = {name: x[:5] for name, x in attribution._aligned(setting()[1]).items()}
    (first, last), _ = parts_of(monkeypatch, batch, 4)
    assert first["own"].tolist() == [True] * 3 and last["own"].tolist() == [True, True, False]
    np.testing.assert_array_equal(last["tokens"][2], batch["tokens"][0])


def test_a_share_is_the_change_of_a_whole_forward():
    """By the module's word: the error added to one output alone, in a float32 forward from the tokens on."""
    params, rollout = setting()
    half, cast, batch = in_compute_dtype(MODEL, FP16), cast_to_compute(params, FP16), attribution._aligned(rollout)
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), cast)

    @jax.jit
    def own(batch):
        def errors(logprobs, taps):
            outside = carried._errors_outside(MODEL, upcast, batch, logprobs, taps, 1.0)
            return carried._errors_inside(MODEL, upcast, 1, taps, jnp.float16) | {"final_norm": outside["final_norm"]}

        programs = attribution._decode(half, cast, batch, 8, 1.0), attribution._full(half, cast, batch, 1.0)
        return jax.tree.map(jnp.subtract, *(errors(*found) for found in programs))

    @jax.jit
    def logprobs(batch, add):
        def change(module, layer, value):
            if module not in add:
                return value
            return value + (add[module] if layer is None else jnp.where(layer == 1, add[module], 0.0))

        hidden, _ = tapped_forward(MODEL, upcast, batch["tokens"], change)
        return carried.scored(hidden, upcast["head"], batch, 1.0)

    rows, errors = {row["name"]: row for row in found("fp16")["modules"]}, own(batch)
    nothing = jax.tree.map(jnp.zeros_like, errors)
    for name in errors:
        moved = logprobs(batch, {**nothing, name: errors[name]}) - logprobs(batch, nothing)
        expected = np.sqrt(np.mean(np.square(np.asarray(moved, np.float64)[np.asarray(batch["response"])])))
        row = rows[name if name == "final_norm" else f"layers.1.{name}"]
        assert row["share"] == pytest.approx(expected, rel=1e-2, abs=1e-6), name
