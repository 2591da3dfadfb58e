"""Attribution: shares that add up in squares, errors where they are put, and remedies measured one at a time."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import cast_to_compute, in_compute_dtype
from jaxrl_fp16.lab.mismatch import attribution
from jaxrl_fp16.lab.mismatch.attribution import attribute, shares_by
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.models.taps import tap_names
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler

MODEL = Decoder(DecoderConfig(family="qwen2", vocab_size=60, hidden_size=32, intermediate_size=48, num_layers=2,
                              num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True), attention="plain")
BF16 = get_precision("bf16").policy
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
def found():
    params, rollout = setting()
    return attribute(MODEL, params, rollout, BF16)


def test_the_decode_program_is_the_samplers():
    """Its log-probs on the stored tokens are those that the sampler has written, to what taps change."""
    params, rollout = setting()
    batch = attribution._aligned(rollout)
    model, cast = in_compute_dtype(MODEL, BF16), cast_to_compute(params, BF16)
    decode = jax.jit(lambda batch: attribution._decode(model, cast, batch, 8, 1.0)[0])
    logprobs, response = np.asarray(decode(batch)), np.asarray(batch["response"])
    np.testing.assert_allclose(logprobs[response], rollout.logprobs[rollout.response_mask], atol=2e-2)
    assert not logprobs[~response].any() and attribution._prompt_columns(rollout) == 8


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
    monkeypatch.setattr(attribution, "tapped_decode_step",
                        lambda *args: step(*args, add={place: jnp.broadcast_to(noise, (6, 1, 32))}))
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
    """Four at once, then two and two that fill up; nothing but last bits may differ."""
    a_row = 4 * 20 * 32 * len(tap_names(2))
    monkeypatch.setattr(attribution, "TAP_BYTES", 4 * a_row)
    params, rollout = setting()
    assert len(attribution._in_parts(attribution._aligned(rollout), MODEL.config)) == 2
    result = attribute(MODEL, params, rollout, get_precision("fp32").policy)
    monkeypatch.undo()
    at_once = attribute(MODEL, params, rollout, get_precision("fp32").policy)
    assert len(attribution._in_parts(attribution._aligned(rollout), MODEL.config)) == 1
    for part, one in zip(result["modules"], at_once["modules"]):
        assert part["name"] == one["name"]
        assert part["decode_float32"] == pytest.approx(one["decode_float32"], rel=0.1, abs=1e-7), part["name"]
    assert result["token_kl"]["untapped"] == at_once["token_kl"]["untapped"]
