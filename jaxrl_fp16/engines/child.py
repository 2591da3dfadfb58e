"""An inference engine in a process of its own: the file that the engine's interpreter runs, by its path.

That interpreter may lack `jaxrl_fp16` and JAX, so nothing of either is imported, and an engine's packages only by its
backend. Requests come as frames on stdin, answers go as frames to what was stdout; file descriptor 1 is stderr from
then on, so that a library's print disturbs nothing. Nothing is unpickled, no port is opened. The process ends with its
stdin, and on Linux with its parent.

A frame: 8 bytes with the header's length, 8 bytes with the body's, both little-endian; the header, a JSON object; the
body, arrays of int32 and float32 back to back, as the header's `arrays` lists them: `[name, type, number of values]`.

A backend has
  `__init__(settings)`, a dict: `dtype` (float32, float16, bfloat16), `device` (cpu, gpu), `memory_fraction`, `seed`,
    `max_length` (of a prompt with its response, in tokens), `max_rows` (responses that decode at once), `rank` (of the
    adapters that come, 0: none do);
  `load(folder)`: reads a model folder, every weight anew, and gives a dict with the `dtype` that it then sees on the
    parameters, and what else is worth a record;
  `adapt(folder, version)`: puts the adapters of a folder in PEFT's format beside those weights, in place of the ones
    before, under a name that no other version has, and gives such a dict. A load takes adapters away;
  `generate(prompts, n, seeds, sampling)`: `n` responses to each prompt, a list of ids. `seeds` has one for each
    response, all different. sampling: `max_new_tokens`, `temperature` (0: greedy), `top_k` (0: off), `top_p` (1: off),
    `max_support` (most ids that top-p keeps), `end_ids` (each ends a response, and is its last token). Gives a list of
    `(tokens, logprobs, finished)`, prompt-major; of a truncated distribution `(tokens, logprobs, finished, kept,
    full)`, where kept has a list of the kept ids for each token, and full its log-prob under all ids.
Log-probs are those of the distribution that was drawn from: tempered, truncated, renormalised; at temperature 0 of the
distribution at temperature 1.
"""

import array
import hashlib
import importlib.util
import json
import os
import platform
import signal
import struct
import sys

LENGTHS = struct.Struct("<QQ")
LONGEST_HEADER, LONGEST_BODY = 1 << 20, 1 << 33     # bytes
FORMATS = {"int32": "i", "float32": "f"}            # of `array` and `memoryview`


class FrameError(ValueError):
    """What came is no frame."""


class Refused(Exception):
    """The engine cannot do what is asked, and would not another time either."""


# -- frames ----------------------------------------------------------------------------------------


def pack(header, **arrays):
    """A frame as a list of bytes. arrays: one-dimensional buffers of 32-bit integers or floats."""
    names = {form: name for name, form in FORMATS.items()}
    views = {name: memoryview(values) for name, values in arrays.items()}
    described = [[name, names[view.format], len(view)] for name, view in views.items()]
    text = json.dumps({**header, "arrays": described}, allow_nan=False).encode()
    body = [view.tobytes() for view in views.values()]
    return [LENGTHS.pack(len(text), sum(map(len, body))), text, *body]


def lengths_of(start):
    """`(bytes of the header, bytes of the body)` from a frame's first 16 bytes. Raises FrameError beyond the limits."""
    header, body = LENGTHS.unpack(start)
    if header > LONGEST_HEADER or body > LONGEST_BODY:
        raise FrameError(f"a frame of {header} and {body} bytes; allowed: {LONGEST_HEADER} and {LONGEST_BODY}")
    return header, body


def unpack(text, body):
    """`(header, {name: memoryview})` of a frame's header and body. Raises FrameError."""
    try:
        header = json.loads(text)
        arrays, start, view = {}, 0, memoryview(body)
        for name, kind, count in header.pop("arrays"):
            end = start + 4 * count
            if name in arrays or count < 0 or end > len(view):
                raise FrameError(f"the frame's array {name!r} of {count} values is given twice or beyond its body")
            arrays[name] = view[start:end].cast(FORMATS[kind])
            start = end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise error if isinstance(error, FrameError) else FrameError(f"a frame's header is damaged: {error}") from None
    if start != len(view):
        raise FrameError(f"a frame's body has {len(view)} bytes; its arrays have {start}")
    return header, arrays


# -- the process -------------------------------------------------------------------------------------


def main(backends):
    """Answers requests until stdin ends. backends: name -> class. `sys.argv[1]` is the parent's process id."""
    answers = os.dup(1)
    os.dup2(2, 1)
    _die_with(int(sys.argv[1]))
    server = _Server(backends)
    while True:
        frame = _read_frame(sys.stdin.buffer)
        if frame is None:
            return
        for piece in server.answer(*frame):
            _write(answers, piece)


class _Server:
    """The backend, once it is open, and the version of the weights that it has."""

    def __init__(self, backends):
        self.backends, self.backend, self.version = backends, None, None
        self.ops = {"open": self.open, "load": self.load, "adapt": self.adapt, "generate": self.generate}

    def answer(self, header, arrays):
        """The frame that answers a request; an error is an answer too."""
        op = header.get("op")
        try:
            found, more = self.ops[op](header, arrays)
            return pack({"op": op, "version": self.version, **found}, **more)
        except Exception as error:
            return pack({"op": op, "version": self.version, "error": one_line(error), "kind": kind_of(error)})

    def open(self, header, arrays):
        self.backend = self.backends[header["engine"]](header["settings"])
        return {"facts": {"python": platform.python_version()}}, {}

    def load(self, header, arrays):
        return self.take(header, self.backend.load)

    def adapt(self, header, arrays):
        if self.version is None:
            raise ValueError("no weights are loaded that adapters belong to")
        return self.take(header, lambda folder: self.backend.adapt(folder, header["version"]))

    def take(self, header, read):
        """What `read` makes of a folder whose files are those that the header has checksums of."""
        self.version, folder = None, header["folder"]
        found = {name: checksum(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
        if found != header["files"]:
            names = set(found.items()) ^ set(header["files"].items())
            raise ValueError(f"the weights in {folder} are not those that were written: {min(names)[0]}")
        facts = read(folder)
        self.version = header["version"]
        return {"facts": facts}, {}

    def generate(self, header, arrays):
        if self.version is None:
            raise ValueError("no weights are loaded")
        prompts = list(_pieces(arrays["tokens"].tolist(), arrays["lengths"].tolist()))
        rows = self.backend.generate(prompts, header["n"], arrays["seeds"].tolist(), header["sampling"])
        lists = {"tokens": [token for row in rows for token in row[0]], "lengths": [len(row[0]) for row in rows],
                 "logprobs": [value for row in rows for value in row[1]], "finished": [int(row[2]) for row in rows]}
        if rows and len(rows[0]) > 3:
            lists["kept_counts"] = [len(ids) for row in rows for ids in row[3]]
            lists["kept"] = [token for row in rows for ids in row[3] for token in ids]
            lists["full_logprobs"] = [value for row in rows for value in row[4]]
        kind = {"logprobs": "f", "full_logprobs": "f"}
        return {}, {name: array.array(kind.get(name, "i"), values) for name, values in lists.items()}


def checksum(path):
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            found.update(chunk)
    return found.hexdigest()


def one_line(error):
    """`Kind: text` of an exception, on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def kind_of(error):
    """`refused`: for good; `memory`: too little of it; `failed`: anything else."""
    if isinstance(error, ImportError) or type(error).__name__ == "Refused":     # vllm_backend.py has one too
        return "refused"
    short = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    return "memory" if short or "out of memory" in str(error) or "allocate memory" in str(error) else "failed"


def _pieces(values, lengths):
    start = 0
    for length in lengths:
        yield values[start:start + length]
        start += length


def _read_frame(stream):
    """A request, or None at the stream's end."""
    start = stream.read(LENGTHS.size)
    if len(start) < LENGTHS.size:
        return None
    header, body = lengths_of(start)
    text, rest = stream.read(header), stream.read(body)
    return unpack(text, rest) if len(text) + len(rest) == header + body else None


def _write(descriptor, piece):
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view):]


def _die_with(parent):
    """Asks Linux to kill this process with its parent, which may be killed while an answer is worked on."""
    if sys.platform.startswith("linux"):
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


# -- backends ----------------------------------------------------------------------------------------


class Transformers:
    """Hugging Face Transformers: its models' forward over its own cache, in a decode loop of our own.

    Not its `generate`, which draws a batch from one generator, takes what is not given from `generation_config.json`,
    and does not give kept ids. Here a row has a seed of its own and uses one uniform number a token, so its draw does
    not depend on its neighbours but through the rounding of matmuls; and no default can come in.
    """

    ROWS = 64               # whose probabilities exist in float64 at once
    TINY = 1.1754944e-38    # the least normal float32: what is below may count as 0

    def __init__(self, settings):
        import torch
        import transformers

        self.torch, self.transformers, self.settings, self.model = torch, transformers, settings, None
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        if settings.get("rank"):
            self.adapters = beside("peft_adapters")
            self.versions["peft"] = self.adapters.version()
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdigit() and int(threads):
            torch.set_num_threads(int(threads))
        self.device = "cpu"
        if settings["device"] == "gpu":
            if not torch.cuda.is_available():
                raise Refused(f"PyTorch {torch.__version__} of {sys.executable} sees no GPU, and JAX runs on one; "
                              "allowed: an interpreter whose PyTorch does")
            self.device = "cuda"
            torch.cuda.set_per_process_memory_fraction(settings["memory_fraction"])
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def load(self, folder):
        self.model = None   # goes before the next one comes
        model, info = self.transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(self.torch, self.settings["dtype"]), use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )
        for what, names in info.items():
            if names:   # a missing tensor would be random
                raise ValueError(f"{what} of the weights in {folder}: {sorted(map(str, names))[0]}")
        self.model = model.eval().to(self.device)
        return self._facts()

    def adapt(self, folder, version):
        self.model = self.adapters.put(self.model, folder, f"version-{version}")
        return self._facts()

    def _facts(self):
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in self.model.parameters()})
        return {"dtype": ", ".join(dtypes), "device": str(self.model.device), **self.versions}

    def generate(self, prompts, n, seeds, sampling):
        with self.torch.inference_mode():
            return self._generate(prompts, n, seeds, sampling)

    def _generate(self, prompts, n, seeds, sampling):
        torch, limit = self.torch, sampling["max_new_tokens"]
        uniforms = torch.stack([torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                                for seed in seeds]).to(self.device)
        ends = torch.tensor(sampling["end_ids"], dtype=torch.int64, device=self.device)
        logits, cache, mask = self._prefill(prompts, n)
        rows, living = [([], [], False, [], []) for _ in seeds], list(range(len(seeds)))
        for step in range(limit):
            token, *found = self._draw(logits, uniforms[living, step], sampling)
            ended = torch.isin(token, ends).tolist()
            for row, over, *drawn in zip(living, ended, token.tolist(), *found):
                tokens, logprobs, _, kept, full = rows[row]
                for values, value in zip((tokens, logprobs, kept, full), drawn):
                    values.append(value)
                rows[row] = tokens, logprobs, over, kept, full
            going = [place for place, over in enumerate(ended) if not over]
            if not going or step == limit - 1:
                break
            if len(going) < len(living):
                index = torch.tensor(going, device=self.device)
                cache.batch_select_indices(index)
                token, mask, living = token[index], mask[index], [living[place] for place in going]
            position = mask.sum(1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self._forward(token[:, None], mask, position, cache)[0]
        return rows if rows[0][3] else [row[:3] for row in rows]

    def _prefill(self, prompts, n):
        """`(logits [B,V], cache, mask int64 [B,P])`: each prompt once, left-padded, then a row for each response."""
        torch, width = self.torch, max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        logits, cache = self._forward(tokens, mask, (mask.cumsum(1) - 1).clamp(min=0), None)
        cache.batch_repeat_interleave(n)
        return logits.repeat_interleave(n, 0), cache, mask.repeat_interleave(n, 0)

    def _forward(self, tokens, mask, positions, cache):
        found = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                           use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].float(), found.past_key_values

    def _draw(self, logits, uniforms, sampling):
        """`(token int64 [B], logprobs, kept ids, full logprobs)`, the last three lists a row; the last two empty where
        nothing is truncated. logits: float32 [B,V].  uniforms: float64 [B]."""
        pieces = zip(logits.split(self.ROWS), uniforms.split(self.ROWS))
        token, *lists = zip(*[self._draw_piece(*piece, sampling) for piece in pieces])
        return (self.torch.cat(token), *filter(None, ([value for part in parts for value in part] for parts in lists)))

    def _draw_piece(self, logits, uniforms, sampling):
        torch, temperature = self.torch, sampling["temperature"]
        if temperature == 0:
            token = logits.argmax(-1)
            return token, _at(logits.log_softmax(-1), token), [], []
        # Distances from the largest logit are finite at any temperature.
        scores = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, self.TINY)).clamp(min=-1e30)
        if not sampling["top_k"] and sampling["top_p"] >= 1:
            token = self._invert(scores.double().softmax(-1), uniforms)
            return token, _at(scores.log_softmax(-1), token), [], []
        best, ids = scores.topk(min(sampling["max_support"], sampling["top_k"] or scores.shape[-1], scores.shape[-1]))
        mass = (best - (best if sampling["top_k"] else scores).logsumexp(-1, keepdim=True)).exp()
        keeps = mass.cumsum(-1) - mass < sampling["top_p"]
        keeps[:, 0] = True      # however small the mass that is asked for
        best = torch.where(keeps, best, -torch.inf)
        place = self._invert(best.double().softmax(-1), uniforms)
        token = ids.gather(-1, place[:, None])[:, 0]
        kept = [row[:count] for row, count in zip(ids.tolist(), keeps.sum(-1).tolist())]
        return token, _at(best.log_softmax(-1), place), kept, _at(scores.log_softmax(-1), token)

    def _invert(self, probabilities, uniforms):
        """int64 [B]: the first place whose cumulated probability, float64 [B,V], exceeds a share of the whole."""
        cumulated = probabilities.cumsum(-1)
        wanted = (uniforms * cumulated[:, -1])[:, None]
        return self.torch.searchsorted(cumulated, wanted, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def _at(values, places):
    """A list: of each row of `values` [B,V] what stands at its place."""
    return values.gather(-1, places[:, None])[:, 0].tolist()


def beside(name):
    """The module of a file beside this one, which has no package to be imported from."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vllm(settings):
    return beside("vllm_backend").Vllm(settings)


BACKENDS = {"transformers": Transformers, "vllm": vllm}

if __name__ == "__main__":
    main(BACKENDS)
