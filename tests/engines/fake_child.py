"""An engine of the standard library alone, which fails as it is told: FAKE_FAULT at answer FAKE_AT, FAKE_TIMES times.

It draws ids evenly. The file FAKE_LOG gets a line for each process, load and answer, so that a fault may come once and
not again in the next process. `python fake_child.py PARENT`, as `child.py` is run.
"""

import importlib.util
import json
import math
import os
from pathlib import Path
import random
import signal
import sys
import time

PLACE = Path(__file__).resolve().parents[2] / "jaxrl_fp16" / "engines" / "child.py"
spec = importlib.util.spec_from_file_location("child", PLACE)
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)

FAULT, LOG = os.environ.get("FAKE_FAULT", ""), Path(os.environ["FAKE_LOG"])
AT, TIMES = int(os.environ.get("FAKE_AT", "0")), int(os.environ.get("FAKE_TIMES", "1"))


def note(line):
    """Writes a line, and gives how many like it were there before."""
    before = LOG.read_text().splitlines() if LOG.exists() else []
    with open(LOG, "a") as file:
        file.write(f"{line}\n")
    return sum(other.split()[0] == line.split()[0] for other in before)


class Fake:
    def __init__(self, settings):
        print("a line on stdout that is no frame")
        note(f"process {os.getpid()}")
        self.settings, self.weights, self.adapters = settings, None, None
        if FAULT == "no start":
            raise child.Refused("this engine never starts")

    def load(self, folder):
        config = json.loads((Path(folder) / "config.json").read_text())
        self.size = config["vocab_size"]
        if self.weights is None or FAULT != "stale":
            self.weights = child.checksum(Path(folder) / "model.safetensors")
        self.adapters = None
        note(f"load {Path(folder).name} {sorted(path.name for path in Path(folder).iterdir())}")
        return {"dtype": "bfloat16" if FAULT == "dtype" else self.settings["dtype"]}

    def adapt(self, folder, version):
        if self.adapters is None or FAULT != "stale adapters":
            self.adapters = child.checksum(Path(folder) / "adapter_model.safetensors")
        note(f"adapt {version} {sorted(path.name for path in Path(folder).iterdir())}")
        return {"dtype": self.settings["dtype"]}

    def generate(self, prompts, n, seeds, sampling):
        faulty = AT <= note("answer") < AT + TIMES
        if faulty and FAULT in FAULTS:
            FAULTS[FAULT]()
        shift = sum(int(found[:6], 16) / 2**24 * 1e-3 for found in (self.weights, self.adapters) if found)
        rows = [self.draw(seed, sampling, shift) for seed in seeds]
        if faulty and FAULT in SPOILT:
            rows = SPOILT[FAULT](rows)
        return rows

    def draw(self, seed, sampling, shift):
        chance, tokens = random.Random(seed), []
        for _ in range(sampling["max_new_tokens"]):
            tokens.append(chance.randrange(self.size) if sampling["temperature"] else 0)
            if tokens[-1] in sampling["end_ids"]:
                break
        return tokens, [-math.log(self.size) - shift] * len(tokens), tokens[-1] in sampling["end_ids"]


def leave():
    print("the engine's last words", file=sys.stderr, flush=True)
    os._exit(7)


def spend():
    raise MemoryError("no room for a cache")


def other_version():
    server = sys._getframe(2).f_locals["self"]
    server.version += 1


def rubbish():
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"\xff" * 4096)
        except OSError:
            pass


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "exit": leave, "hang": lambda: time.sleep(1000),
    "memory": spend, "version": other_version, "rubbish": rubbish,
}
SPOILT = {
    "nan": lambda rows: [(rows[0][0], [math.nan] * len(rows[0][0]), rows[0][2]), *rows[1:]],
    "above": lambda rows: [(rows[0][0], [0.5] * len(rows[0][0]), rows[0][2]), *rows[1:]],
    "count": lambda rows: rows[1:],
    "short": lambda rows: [(rows[0][0], rows[0][1][1:], rows[0][2]), *rows[1:]],
    "long": lambda rows: [(rows[0][0] * 9, rows[0][1] * 9, rows[0][2]), *rows[1:]],
    "early": lambda rows: [([5], rows[0][1][:1], False), *rows[1:]],
    "ids": lambda rows: [([10**6, *rows[0][0][1:]], *rows[0][1:]), *rows[1:]],
}

if __name__ == "__main__":
    child.main({"transformers": Fake, "vllm": Fake})
