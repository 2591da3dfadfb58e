"""The backend of Transformers, in this process: what it draws and says of it against Transformers' own full forward and
our scorer."""

import jax
import numpy as np
import pytest

from jaxrl_fp16.engines.child import Transformers
from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import save_pretrained
from jaxrl_fp16.precision import get_precision

torch = pytest.importorskip("torch")
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]     # left-padded together
ENDS = [0, 1, 2, 3, 4, 5]
SAMPLING = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_support": 256, "end_ids": ENDS}
pytestmark = pytest.mark.usefixtures("quick_compile", "one_torch_thread")


@pytest.fixture(scope="module")
def backend(small, tmp_path_factory):
    """backend(dtype) -> a Transformers with the small model loaded, whose folder's own sampling settings would show."""
    folder = tmp_path_factory.mktemp("model") / "small"
    save_pretrained(folder, *small, dtype="float32", generation_config={"temperature": 0.1, "top_k": 1, "top_p": 0.1})

    def made(dtype="float32"):
        found = Transformers({"dtype": dtype, "device": "cpu", "memory_fraction": 0.5, "seed": 0, "max_length": 11})
        assert found.load(str(folder))["dtype"] == dtype
        return found

    return made


def draw(backend, prompts=PROMPTS, n=4, first=100, **sampling):
    seeds = list(range(first, first + len(prompts) * n))
    return backend.generate(prompts, n, seeds, {**SAMPLING, **sampling})


def laid_out(prompts, n, rows):
    """`(tokens, mask, place of each row's response)`, right-padded."""
    whole = [prompts[place // n] + row[0] for place, row in enumerate(rows)]
    tokens = np.zeros((len(rows), 11), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for place, row in enumerate(whole):
        tokens[place, :len(row)], mask[place, :len(row)] = row, True
    return tokens, mask, [slice(len(prompts[place // n]), len(row)) for place, row in enumerate(whole)]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_its_logprobs_are_those_of_what_was_drawn(backend, small, temperature):
    """In float32, against our scorer, row by row of ragged prompts and ragged ends."""
    rows = draw(backend(), temperature=temperature)
    tokens, mask, places = laid_out(PROMPTS, 4, rows)
    scored = np.asarray(token_logprobs(*small, tokens, mask, policy=get_precision("fp32").policy,
                                       temperature=temperature))
    for row, (found, place) in enumerate(zip(rows, places)):
        np.testing.assert_allclose(found[1], scored[row, place], atol=2e-5)
        assert found[2] == (found[0][-1] in ENDS) and not set(ENDS) & set(found[0][:-1])
    lengths = {len(row[0]) for row in rows}
    assert temperature == 0 or len(lengths) > 1, "some rows end before others"


def test_at_hardly_any_temperature_it_is_greedy(backend):
    engine = backend()
    cold, greedy = draw(engine, temperature=1e-45), draw(engine, temperature=0.0)
    assert [row[0] for row in cold] == [row[0] for row in greedy] and all(set(row[1]) == {0.0} for row in cold)


@pytest.mark.parametrize("truncation", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.7},
                                        {"top_p": 0.9, "max_support": 4}, {"top_p": 1e-9}])
def test_kept_ids_renormalise_as_our_scorer_does(backend, small, truncation):
    rows = draw(backend(), **truncation)
    tokens, mask, places = laid_out(PROMPTS, 4, rows)
    most = max(len(ids) for row in rows for ids in row[3])
    assert most <= (truncation.get("top_k") or truncation.get("max_support", 23)) and len(rows[0]) == 5
    support = np.full((*tokens.shape, 23), -1, np.int32)
    for row, (found, place) in enumerate(zip(rows, places)):
        for column, ids, token in zip(range(place.start, place.stop), found[3], found[0]):
            support[row, column, :len(ids)] = ids
            assert token in ids
    policy = get_precision("fp32").policy
    kept = np.asarray(token_logprobs(*small, tokens, mask, policy=policy, support=support))
    full = np.asarray(token_logprobs(*small, tokens, mask, policy=policy))
    for row, (found, place) in enumerate(zip(rows, places)):
        np.testing.assert_allclose(found[1], kept[row, place], atol=2e-5)
        np.testing.assert_allclose(found[4], full[row, place], atol=2e-5)


def test_a_row_draws_what_it_would_draw_alone(backend):
    """By its seed, whatever its neighbours, their lengths and when they end."""
    engine = backend()
    together = draw(engine)
    for place in (0, 5, 10):
        (alone,) = draw(engine, [PROMPTS[place // 4]], 1, 100 + place)
        assert alone[0] == together[place][0]
        np.testing.assert_allclose(alone[1], together[place][1], atol=1e-5)
    assert len({tuple(row[0]) for row in draw(engine, [[1]] * 8, 1)}) > 4, "equal prompts, other seeds"


def test_it_draws_by_the_probabilities(backend, small):
    """First tokens of 4,000 rows against the scorer's distribution: none of 23 ids off by five standard errors."""
    rows = draw(backend(), [[3, 1, 4]], 4000, max_new_tokens=1, temperature=1.5)
    found = np.bincount([row[0][0] for row in rows], minlength=23) / len(rows)
    tokens = np.array([[3, 1, 4, last] for last in range(23)], np.int32)
    logprobs = token_logprobs(*small, tokens, np.ones(tokens.shape, bool), policy=get_precision("fp32").policy,
                              temperature=1.5)
    wanted = np.exp(np.asarray(logprobs)[:, 3])
    assert (np.abs(found - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / len(rows)) + 1e-9).all()


def test_greedy_is_that_of_its_own_generate(backend):
    engine = backend("float16")
    (found,) = draw(engine, [[1, 2, 3]], 1, temperature=0.0, end_ids=[])
    prompt = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        own = engine.model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, top_k=None,
                                    top_p=None, temperature=None, max_new_tokens=6, pad_token_id=0)
    assert own[0, 3:].tolist() == found[0] and not found[2]


def test_a_load_replaces_every_weight(backend, small, tmp_path):
    """Tied: the head too. What it gives is what a fresh one gives."""
    engine = backend()
    before = draw(engine)
    model, params = small
    save_pretrained(tmp_path / "other", model, jax.tree.map(lambda x: x * 1.05, params), dtype="float32")
    engine.load(str(tmp_path / "other"))
    after = draw(engine)
    fresh = Transformers(engine.settings)
    fresh.load(str(tmp_path / "other"))
    assert after == draw(fresh) and any(a[1] != b[1] for a, b in zip(before, after))


def test_weights_that_are_not_whole_are_refused(backend, small, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "part"
    save_pretrained(folder, *small, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys .*model.layers.1.mlp.gate_proj.weight"):
        backend().load(str(folder))
