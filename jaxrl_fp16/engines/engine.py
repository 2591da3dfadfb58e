"""An engine beside this program: started, given weights, asked, started once more where it fails.

n: prompts.  P: prompt columns.  B: rows, n times the group.
"""

import contextlib
import os
import random
import time
import weakref

import jax
import numpy as np

from jaxrl_fp16.engines.answers import join_responses, read_responses
from jaxrl_fp16.engines.pipe import EngineError, EngineRefused, Pipe
from jaxrl_fp16.engines.settings import KINDS
from jaxrl_fp16.engines.weights import Seen, adapters_written, changed, changed_adapters, exchange_folder, written
from jaxrl_fp16.models.frozen import BASE, base_of, is_adapted
from jaxrl_fp16.sampling import Sampled
from jaxrl_fp16.sampling.support import support_size

SEEDS = 2**31 - 1                       # seeds are below it
CHANGED, ALONE = 0, -1                  # versions of what is changed to be seen; of weights without their adapters
PROBE_PROMPT = 8                        # tokens
PROBE = dict(max_new_tokens=4, temperature=0.0, top_k=0, top_p=1.0, max_support=1, end_ids=[])
PROBE_LENGTH = PROBE_PROMPT + PROBE["max_new_tokens"]


class Engine:
    """One child process, and the weights that it has. State: closed by its owner, and at the interpreter's end.

    Weights are known by their arrays: where they are others than before their `version` is one more, and they are sent
    before anything is drawn. Version 0 is that of the changed weights by which an engine is shown at its start that a
    synchronisation acts. Of a model with adapters a process gets the weights that they belong to once, as version -1,
    and then the adapters alone.

    Args:
      config: a `RolloutConfig` with another engine than jit.
      python: path of its interpreter.
      model: the Decoder whose weights come.
      settings: as a backend of `child.py` takes them.
      say: takes a line for a person.
    """

    def __init__(self, config, python, model, settings, say):
        self._config, self._python, self._model, self._say = config, python, model, say
        self._settings = settings | {"rank": model.lora.rank if model.lora else 0}
        self._stack = contextlib.ExitStack()
        self._pipe = self._place = self._sent = None    # process, exchange folder, version that it has
        self._arrays = self._base = None    # `Seen`: what came last, and what the process was sent of all weights
        self._acts = False
        self.version, self.restarts, self.seconds, self.facts = 0, 0, 0.0, {}
        weakref.finalize(self, self._stack.close)

    @property
    def name(self):
        """That of the config."""
        return self._config.engine

    @property
    def dtype(self):
        """Name of the dtype that weights are sent in and the engine computes in."""
        return self._settings["dtype"]

    def begin(self, params):
        """Starts the engine and sees a synchronisation act. Raises EngineRefused, EngineError."""
        self._twice(lambda: self._bring(params))

    def draw(self, params, prompts, sampling, seed, end_ids, watch=None):
        """`Responses` of the distribution of `params`, which are sent where they are new, to prompts as lists of ids.

        sampling: a SamplingConfig; `stop` and `end_tokens` are the caller's.  seed: an int below 2**31.
        watch: called with a `Sampled` every few seconds; what it raises ends the engine's process, and the batch.
        The same request is repeated, with the same seeds, by an engine that had to be started anew.
        Raises EngineError, EngineRefused.
        """
        def once():
            self._bring(params)
            return self.generate(prompts, sampling, seed, end_ids, watch)

        return self._twice(once)

    # -- the protocol ------------------------------------------------------------------------------

    def load(self, params, version):
        """Sends all weights of the plain model, in the dtype that is asked for; whatever is drawn from now on must
        carry `version`."""
        self._base = None
        self._exchange("load", written, params, version)
        self._base = Seen(params)

    def adapt(self, params, version):
        """Sends the adapters of `{"base", "lora"}` alone, otherwise as `load`; the process has "base"."""
        self._exchange("adapt", adapters_written, params, version)

    def _exchange(self, op, write, params, version):
        began, self._sent = time.perf_counter(), None
        with write(self._place, self._model, params, self.dtype, version) as (folder, files):
            answer, _ = self._pipe.ask({"op": op, "version": version, "folder": str(folder), "files": files})
        self.facts |= answer["facts"]
        found = answer["facts"].get("dtype")
        if found != self.dtype:
            raise EngineRefused(f"the engine {self.name} has weights in {found} after loading; the run samples in "
                                f"{self.dtype}: allowed: an engine that computes in it, or another rollout_precision")
        self._check_version(answer, version)
        self._sent, self.seconds = version, time.perf_counter() - began

    def generate(self, prompts, sampling, seed, end_ids, watch=None):
        """`Responses` of the weights that were loaded last, each row drawn with a seed of its own."""
        group, vocab_size = sampling.group_size, self._model.config.vocab_size
        seeds = random.Random(seed).sample(range(SEEDS), len(prompts) * group)
        at_once = sampling.max_rows // group or len(prompts)
        asked = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
                 "top_k": sampling.top_k, "top_p": sampling.top_p, "max_support": sampling.max_support,
                 "end_ids": list(end_ids)}
        kept = support_size(sampling, vocab_size)
        parts, began = [], time.monotonic()

        def meanwhile():
            if watch is not None:
                lengths = [length for part in parts for length in part.lengths.tolist()]
                watch(Sampled(len(lengths), len(seeds), sum(lengths), time.monotonic() - began))

        for start in range(0, len(prompts), at_once):
            part, own = prompts[start:start + at_once], seeds[start * group:(start + at_once) * group]
            arrays = self._ask(part, group, own, asked, meanwhile=meanwhile)
            parts.append(read_responses(arrays, len(own), sampling.max_new_tokens, vocab_size, end_ids, kept))
        return join_responses(parts)

    def close(self):
        """Ends the process, and removes what is left of weights on their way."""
        self._stop()
        self._stack.close()
        self._place = None

    # -- within ------------------------------------------------------------------------------------

    def _twice(self, action):
        """What `action` gives; after an EngineError once more, with a new process."""
        for again in (True, False):
            try:
                return action()
            except EngineError as error:
                self._stop()
                if not again:
                    raise EngineError(f"rollout.engine {self.name} failed twice: {error}") from error
                self.restarts += 1
                self._say(f"rollout.engine {self.name}: {error}; it is started once more")
            except EngineRefused as error:
                self._stop()
                if not self._acts:
                    raise
                raise EngineError(f"rollout.engine {self.name}: {error}") from error
            except BaseException:
                self._stop()    # a late answer must not be taken for that to a later question
                raise

    def _bring(self, params):
        """The process runs and has `params`."""
        if self._arrays is None or not self._arrays.are(params):
            self._arrays = Seen(params)
            self.version += 1
        if self._pipe is None:
            self._start(sum(leaf.size for leaf in jax.tree.leaves(params)))
        if not self._acts:
            self._see_it_act(params)
        if self._sent != self.version:
            self._send(params)

    def _send(self, params):
        """What the process lacks of `params`, as the engine's version."""
        if not is_adapted(params):
            return self.load(params, self.version)
        if self._base is None or not self._base.are(params[BASE]):
            self.load(params[BASE], ALONE)
        return self.adapt(params, self.version)

    def _start(self, count):
        if self._place is None:
            needed = count * np.dtype(self.dtype).itemsize
            self._place = self._stack.enter_context(exchange_folder(self._config.exchange, needed))
        kind = KINDS[self.name]
        environment = {name: os.environ.get(name, value) for name, value in kind.defaults.items()} | kind.environment
        if self._settings["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._pipe = Pipe(self._python, environment, self._config.deadline_seconds)
        self._stack.callback(self._pipe.close)
        answer, _ = self._pipe.ask({"op": "open", "engine": self.name, "settings": self._settings})
        self.facts = answer["facts"]

    def _stop(self):
        pipe, self._pipe, self._sent, self._base = self._pipe, None, None, None
        if pipe is not None:
            pipe.close()

    def _see_it_act(self, params):
        """Loads changed weights, then `params`, and refuses an engine that answers alike; with adapters likewise."""
        base, adapted = base_of(params), is_adapted(params)
        self.load(changed(base), CHANGED)
        self._see_change(lambda version: self.load(base, version), ALONE if adapted else self.version,
                         "weights that differ by a fifth")
        if adapted:
            self.adapt(changed_adapters(self._model, params), CHANGED)
            self._see_change(lambda version: self.adapt(params, version), self.version, "adapters that differ")
        self._acts = True

    def _see_change(self, send, version, what):
        """Refuses an engine that has what was changed, is sent what it ought to have, and answers alike."""
        first, second = self._probe(CHANGED), self._probe(CHANGED)
        send(version)
        third = self._probe(version)
        if np.array_equal(first[0], third[0]):
            noise, gap = (np.abs(first[1] - other[1]).max() for other in (second, third))
            if gap <= 2 * noise:    # changed weights may overflow: a NaN is another answer too
                raise EngineRefused(
                    f"the engine {self.name} answers alike, to {gap:g}, with {what}: what it is sent does not act; "
                    "allowed: a version of it that is known to work (docs/engines.md)")

    def _probe(self, version):
        """`(tokens, log-probs)` of a few greedy tokens; of what was changed they need not be finite."""
        size = self._model.config.vocab_size
        prompt = [place % size for place in range(1, PROBE_PROMPT + 1)]
        arrays = self._ask([prompt], 1, [0], PROBE, version)
        found = read_responses(arrays, 1, PROBE["max_new_tokens"], size, [], finite=version != CHANGED)
        return found.tokens, found.logprobs

    def _ask(self, prompts, group, seeds, sampling, version=None, meanwhile=None):
        """The arrays of an answer to `generate`, which carries the version of the weights that were loaded last."""
        flat = np.array([token for prompt in prompts for token in prompt], np.int32)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        answer, arrays = self._pipe.ask({"op": "generate", "n": group, "sampling": sampling}, meanwhile, tokens=flat,
                                        lengths=lengths, seeds=np.array(seeds, np.int32))
        self._check_version(answer, self._sent if version is None else version)
        return arrays

    def _check_version(self, answer, version):
        if answer.get("version") != version:
            raise EngineError(f"the engine answered with weights of version {answer.get('version')}; it was sent "
                              f"version {version}")
