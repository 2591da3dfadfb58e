"""The backend of vLLM: what it asks of vLLM, against a stand-in; and vLLM itself, where JAXRL_FP16_VLLM_PYTHON names an
interpreter that has it."""

import contextlib
import json
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.cli import main
from jaxrl_fp16.engines import (
    Engine, EngineRefused, RolloutConfig, check_sampling, find_python, make_rollout, vllm_backend,
)
from jaxrl_fp16.engines.vllm_backend import Refused, Vllm, cache_bytes, free_bytes, room_for
from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.models import (
    Decoder, DecoderConfig, LoraConfig, init_lora, init_params, save_adapter, save_pretrained,
)
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig

# Heads of 32: the smallest that vLLM's attention on a CPU knows.
CONFIG = DecoderConfig(family="qwen2", vocab_size=128, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2,
                       num_kv_heads=1, head_dim=32, tie_embeddings=True, max_positions=512)
SETTINGS = {"dtype": "float16", "device": "cpu", "memory_fraction": 0.3, "seed": 5, "max_length": 20, "max_rows": 4}
SAMPLING = {"max_new_tokens": 3, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "end_ids": [7]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder in float16."""
    model, path = Decoder(CONFIG), tmp_path_factory.mktemp("model") / "one"
    save_pretrained(path, model, init_params(model, jax.random.key(0)), dtype="float16")
    return path


class Llm:
    """What the backend uses of `vllm.LLM`; what was done to it is in `log`. Each response is 3, 4, 7."""

    def __init__(self, folder, **options):
        self.options, self.log, self.empties, self.answer = options, [], True, {}
        self.model_config = types.SimpleNamespace(dtype=f"torch.{options['dtype']}")
        packing = types.SimpleNamespace(process_weights_after_loading=lambda head: self.log.append(("packed", head)))
        self.head = types.SimpleNamespace(quant_method=packing)
        self.dtypes, self.attention = [options["dtype"]], (2, 1, 32)
        self.llm_engine, self.adapters, self.taken = self, [], 14

    def add_lora(self, request):
        self.adapters.append(request.lora_int_id)
        self.log.append(("added", vars(request)))

    def remove_lora(self, number):
        self.adapters.remove(number)

    def list_loras(self):
        return self.adapters

    def collective_rpc(self, name, kwargs):
        self.log.append((name, kwargs["weights_path"]))

    def apply_model(self, function):
        weights = [types.SimpleNamespace(dtype=f"torch.{name}", is_floating_point=lambda: True) for name in self.dtypes]
        layer = types.SimpleNamespace(**dict(zip(("num_heads", "num_kv_heads", "head_size"), self.attention)))
        stack = (np.ones(1),) * self.taken + (np.zeros(1),)
        adapters = types.SimpleNamespace(lora_a_stacked=stack, lora_b_stacked=stack)
        return [function(types.SimpleNamespace(lm_head=self.head, parameters=lambda: weights,
                                               modules=lambda: [self.head, layer, adapters]))]

    def reset_prefix_cache(self):
        self.log.append("reset")
        return self.empties

    def generate(self, requests, parameters, use_tqdm, lora_request):
        self.log.append((requests, parameters))
        self.adapter = lora_request
        found = {"tokens": [3, 4, 7], "logprobs": [-1.0, -2.0, -0.5], "reason": "stop"} | self.answer
        flat = types.SimpleNamespace(logprobs=found["logprobs"], token_ids=found.get("ids", found["tokens"]))
        one = types.SimpleNamespace(token_ids=found["tokens"], finish_reason=found["reason"], logprobs=flat)
        return [types.SimpleNamespace(outputs=[one]) for _ in requests]


@pytest.fixture
def make(monkeypatch):
    """make(platform="cpu", **settings) -> a Vllm over the stand-in."""
    def made(platform="cpu", **settings):
        found = types.SimpleNamespace(is_cpu=lambda: platform == "cpu", device_type=platform)
        request = lambda name, number, path: types.SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)
        names = {"vllm": {"LLM": Llm, "SamplingParams": lambda **given: given},
                 "vllm.platforms": {"current_platform": found}, "vllm.lora": {},
                 "vllm.lora.request": {"LoRARequest": request}}
        for name, attributes in names.items():
            module = types.ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        return Vllm(SETTINGS | settings)

    return made


def test_it_is_made_for_exact_log_probs_and_the_rows_that_come(make, folder):
    backend = make()
    facts = backend.load(folder)
    width = CONFIG.num_kv_heads * CONFIG.head_dim
    assert backend.engine.options == {
        "dtype": "float16", "seed": 5, "skip_tokenizer_init": True, "enforce_eager": True, "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs", "max_model_len": 20, "max_num_seqs": 4,
        "kv_cache_memory_bytes": 2 * 2 * width * 2 * 128 * (4 + 1),
    }
    assert backend.engine.log == ["reset"] and facts["dtype"] == "float16" and facts["device"] == "cpu"
    assert facts.keys() >= {"torch", "transformers"}
    on_gpu = make("cuda", device="gpu", max_rows=10**6)
    on_gpu.load(folder)
    assert on_gpu.engine.options["gpu_memory_utilization"] == 0.3 and on_gpu.engine.options["max_num_seqs"] == 256
    assert "kv_cache_memory_bytes" not in on_gpu.engine.options


def test_a_later_load_replaces_all_weights(make, folder):
    backend = make()
    backend.load(folder)
    engine, before = backend.engine, len(backend.engine.log)
    backend.load(folder)
    assert backend.engine is engine
    assert engine.log[before:] == [("reload_weights", str(folder)), ("packed", engine.head), "reset"]
    del engine.head.quant_method.process_weights_after_loading  # as another version, or another method, may lack it
    backend.load(folder)
    on_gpu = make("cuda", device="gpu")
    for _ in range(2):
        on_gpu.load(folder)
    assert on_gpu.engine.log == ["reset", ("reload_weights", str(folder)), "reset"]


def test_what_it_would_get_wrong_in_silence_is_an_error(make, folder, tmp_path):
    backend = make()
    backend.load(folder)
    model = Decoder(DecoderConfig(**{**vars(CONFIG), "tie_embeddings": False}))
    save_pretrained(tmp_path / "other", model, init_params(model, jax.random.key(0)), dtype="float16")
    with pytest.raises(ValueError, match="are not of the shapes of the first, beginning with lm_head.weight"):
        backend.load(tmp_path / "other")
    backend.engine.dtypes = ["float16", "float32"]
    assert backend.load(folder)["dtype"] == "float16, float32"     # which the parent refuses
    backend.engine.empties = False
    with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
        backend.load(folder)


def test_each_response_is_a_request_with_a_seed_of_its_own(make, folder):
    backend = make()
    backend.load(folder)
    found = backend.generate([[1, 2], [9]], 2, [11, 12, 13, 14], SAMPLING)
    assert found == [([3, 4, 7], [-1.0, -2.0, -0.5], True)] * 4
    requests, parameters = backend.engine.log[-1]
    assert [request["prompt_token_ids"] for request in requests] == [[1, 2], [1, 2], [9], [9]]
    assert [given.pop("seed") for given in parameters] == [11, 12, 13, 14]
    assert parameters == 4 * [{
        "temperature": 0.7, "max_tokens": 3, "ignore_eos": True, "stop_token_ids": [7], "logprobs": 0,
        "flat_logprobs": True, "detokenize": False,
    }]
    backend.engine.answer = {"reason": "length"}
    assert backend.generate([[1]], 1, [0], SAMPLING) == [([3, 4, 7], [-1.0, -2.0, -0.5], False)]


def test_each_version_of_adapters_has_a_name_and_a_number_of_its_own(make, folder, tmp_path):
    model, place = Decoder(CONFIG, lora=LoraConfig(rank=12)), str(tmp_path / "adapter")
    save_adapter(place, model, init_lora(model, init_params(model, jax.random.key(0)), jax.random.key(1),
                                         policy=get_precision("fp32").policy))
    backend = make(rank=12)
    backend.load(folder)
    options = {name: backend.engine.options[name] for name in ("enable_lora", "max_loras", "max_lora_rank")}
    assert options == {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    backend.generate([[1]], 1, [0], SAMPLING)
    assert backend.engine.adapter is None
    for version in (0, 3):
        assert backend.adapt(place, version)["dtype"] == "float16" and backend.engine.adapters == [version + 1]
        assert backend.engine.log[-2:] == [("added", {"lora_name": f"version-{version}", "lora_int_id": version + 1,
                                                      "lora_path": place}), "reset"]
        backend.generate([[1]], 1, [0], SAMPLING)
        assert backend.engine.adapter.lora_int_id == version + 1
    backend.engine.taken = 13
    with pytest.raises(RuntimeError, match="vLLM has 13 adapters on its layers of the 14 in "):
        backend.adapt(place, 4)
    backend.engine.adapters[:] = [9]
    with pytest.raises(RuntimeError, match=r"adapters of numbers \[6, 9\] after a load of number 6"):
        backend.adapt(place, 5)
    backend.load(folder)
    backend.generate([[1]], 1, [0], SAMPLING)
    assert backend.engine.adapter is None, "a load takes adapters away"
    assert [room_for(rank) for rank in (1, 8, 9, 512)] == [8, 8, 16, 512]
    with pytest.raises(Refused, match="of rank 512 at most; these have 513"):
        make(rank=513).load(folder)
    make("cuda", device="gpu", rank=4), make(rank=4, dtype="float32")
    with pytest.raises(Refused, match="compute in float16 or bfloat16 on a GPU, and the run samples in float32"):
        make("cuda", device="gpu", rank=4, dtype="float32")


@pytest.mark.parametrize("seeds, changes, error, says", [
    ([1, 1], {}, ValueError, "2 seeds for 2 prompts x 1; needed: one for each response, all different"),
    ([1], {}, ValueError, "1 seeds for 2 prompts"), ([1, -1], {}, ValueError, "none negative"),
    ([1, 2], {"max_new_tokens": 19}, ValueError, "prompt and response of 21 tokens; allowed: 20"),
    ([1, 2], {"top_k": 5}, Refused, "which tokens top_k and top_p keep"),
    ([1, 2], {"top_p": 0.9}, Refused, "which tokens top_k and top_p keep"),
    ([1, 2], {"temperature": 0.005}, Refused, "temperature 0.005; allowed: 0, 0.01 to 2"),
    ([1, 2], {"temperature": 2.5}, Refused, "temperature 2.5"),
])
def test_what_it_cannot_draw_is_refused(make, folder, seeds, changes, error, says):
    backend = make()
    backend.load(folder)
    with pytest.raises(error, match=says):
        backend.generate([[1, 2], [9]], 1, seeds, SAMPLING | changes)


@pytest.mark.parametrize("answer, says", [
    ({"logprobs": [-1.0]}, "1 log-probs for 3 tokens"), ({"ids": [3, 4, 5]}, "3 log-probs for 3 tokens"),
    ({"reason": "abort"}, "ended a response with 'abort'"),
])
def test_an_odd_answer_is_an_error(make, folder, answer, says):
    backend = make()
    backend.load(folder)
    backend.engine.answer = answer
    with pytest.raises(RuntimeError, match=says):
        backend.generate([[1]], 1, [1], SAMPLING)


def test_another_place_is_refused(make, folder, monkeypatch):
    with pytest.raises(Refused, match="runs on cuda, JAX on the CPU"):
        make("cuda")
    with pytest.raises(Refused, match="runs on cpu, JAX on the GPU"):
        make(device="gpu")
    backend = make()
    monkeypatch.setattr(sys.modules["vllm"], "LLM", lambda *_, **__: (_ for _ in ()).throw(ValueError("no such dtype")))
    with pytest.raises(Refused, match="cannot load the model: no such dtype"):
        backend.load(folder)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(Refused, match="would start processes of its own"):
        Vllm(SETTINGS)


def test_a_model_that_it_reads_otherwise_is_refused(make, tmp_path):
    """Of qwen2 vLLM does not read head_dim, and takes a part of each weight."""
    model = Decoder(DecoderConfig(**{**vars(CONFIG), "head_dim": 64}))
    save_pretrained(tmp_path / "wide", model, init_params(model, jax.random.key(0)), dtype="float16")
    with pytest.raises(Refused, match=r"width\) \[\(2, 1, 32\)\] of weights with \(2, 1, 64\)"):
        make().load(tmp_path / "wide")


def test_the_cache_leaves_memory_to_others(monkeypatch):
    config = {"num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 3}
    assert cache_bytes(config, 4, 2, 129) == 2 * 3 * 64 * 4 * 128 * (2 * 2 + 1)
    assert cache_bytes({**config, "num_key_value_heads": 2, "head_dim": 16}, 2, 1, 1) == 2 * 3 * 32 * 2 * 128 * 2
    monkeypatch.setattr(vllm_backend, "free_bytes", lambda: 1000)
    assert cache_bytes(config, 4, 2, 129) == 500
    assert free_bytes() > 2**20


def test_a_run_is_refused_before_its_start():
    check_sampling("vllm", SamplingConfig(temperature=0.0))
    check_sampling("jit", SamplingConfig(top_k=5, top_p=0.5, temperature=1e-4))
    for top_k, top_p, temperature, says in ((5, 1.0, 1.0, "top_k is 5"), (0, 0.9, 1.0, "top_p 0.9"),
                                            (0, 1.0, 0.001, "temperature is 0.001.*allowed: 0, or 0.01 to 2"),
                                            (0, 1.0, 3.0, "temperature is 3.0")):
        with pytest.raises(ValueError, match=says):
            check_sampling("vllm", SamplingConfig(top_k=top_k, top_p=top_p, temperature=temperature))


# -- vLLM itself ---------------------------------------------------------------------------------------

PYTHON = os.environ.get("JAXRL_FP16_VLLM_PYTHON")
PROMPTS = [[3, 4, 5], list(range(100, 110)), [1 + place % 99 for place in range(300)]]  # the last: beyond a block


@pytest.fixture
def started():
    """started(precision, model) -> an Engine of vLLM, closed afterwards."""
    with contextlib.ExitStack() as stack:
        def start(precision, model):
            config = RolloutConfig(engine="vllm", python=PYTHON, deadline_seconds=600)
            settings = SETTINGS | {"dtype": get_precision(precision).policy.compute_dtype.name, "max_length": 320}
            return stack.enter_context(contextlib.closing(Engine(config, find_python(config), model, settings, print)))

        yield start


def scored(model, params, precision, temperature, found):
    """The engine's log-probs and our scorer's, of the responses' tokens."""
    width = max(map(len, PROMPTS))
    tokens = np.array([[0] * (width - len(ids)) + ids for ids in PROMPTS], np.int32)
    rollout = make_rollout(tokens, tokens > 0, found, 0)
    mine = token_logprobs(model, params, jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask),
                          policy=get_precision(precision).policy, temperature=temperature)
    return rollout.logprobs[rollout.response_mask], np.asarray(mine)[rollout.response_mask]


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-4), ("bf16", 0.1)])
def test_new_weights_act_whole_and_log_probs_are_the_scorers(started, tied, precision, bound):
    """Head and prefix cache too: whatever of the old weights were left, these logits of the new ones would show it."""
    model = Decoder(DecoderConfig(**{**vars(CONFIG), "tie_embeddings": tied}))
    versions = [init_params(model, jax.random.key(seed)) for seed in range(2)]
    engine, sampling = started(precision, model), SamplingConfig(8, temperature=0.7, group_size=2)
    found = [engine.draw(params, PROMPTS, sampling, 9, ()) for params in (*versions, versions[0])]
    assert engine.version == 3 and engine.restarts == 0
    for params, one in zip((*versions, versions[0]), found):
        theirs, mine = scored(model, params, precision, 0.7, one)
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=bound)
    assert (found[0].tokens == found[2].tokens).all() and (found[0].logprobs == found[2].logprobs).all()
    assert (found[0].tokens != found[1].tokens).any(1).all()
    assert (found[0].tokens[::2] != found[0].tokens[1::2]).any(1).all(), "rows of a group draw noise of their own"


@pytest.mark.vllm
def test_end_ids_end_responses(started):
    model = Decoder(CONFIG)
    params = init_params(model, jax.random.key(0))
    engine = started("fp32", model)
    found = engine.draw(params, PROMPTS, SamplingConfig(12, group_size=4), 3, tuple(range(64, 128)))
    assert found.finished.any() and (found.tokens[np.arange(12), found.lengths - 1] >= 64).sum() == found.finished.sum()
    assert (found.lengths[~found.finished] == 12).all()


@pytest.mark.vllm
@pytest.mark.parametrize("changes, says", [({"head_dim": 64}, "made attention with"),
                                           ({"hidden_size": 32, "head_dim": 16}, "cannot run the model here")])
def test_a_model_that_it_cannot_run_is_refused_at_the_start(started, changes, says):
    model = Decoder(DecoderConfig(**{**vars(CONFIG), **changes}))
    with pytest.raises(EngineRefused, match=says):
        started("fp32", model).begin(init_params(model, jax.random.key(0)))


@pytest.mark.vllm
def test_stop_strings_are_cut_and_truncation_is_refused(tiny, tmp_path, capsys):
    """A whole run of two steps, whose log-probs are the scorer's."""
    own = ["--model.hidden_size", "64", "--model.head_dim", "32", "--sampling.stop", '["1"]', "--precision", "fp32",
           "--sampling.max_new_tokens", "8", "--rollout.engine", "vllm", "--rollout.python", PYTHON]
    assert main(["train", str(tiny), *own, "--run.dir", str(tmp_path)]) == 0
    steps = read_metrics(next(tmp_path.iterdir()))[1:]
    assert [step["rollout/version"] for step in steps] == [2, 3]
    assert all(step["mismatch/kl_k3"] < 1e-8 and step["rollout/restarts"] == 0 for step in steps)
    lines = (next(tmp_path.iterdir()) / "samples.jsonl").read_text().splitlines()
    texts = [json.loads(line)["response"] for line in lines]
    assert any("1" in text for text in texts) and not any("1" in text[:-1] for text in texts)
    assert main(["train", str(tiny), *own, "--sampling.top_k", "3"]) == 2
    assert "vLLM does not say which ids it kept" in capsys.readouterr().err
