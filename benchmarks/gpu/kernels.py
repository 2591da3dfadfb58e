"""On a GPU: the longest kernels of decode steps and of one update, out of a trace by `jax.profiler`.

    python benchmarks/gpu/kernels.py [--model 1.5B] [--rows 64] [--slots 2048] [--columns 2048]
"""

import collections
from pathlib import Path
import tempfile

import jax

from qwen import Results, arguments, decoder, params_of
from speed import decode_program, update_program


COUNT = 12  # kernels that are named
# platform -> what the names of a trace's planes contain, and those of their lines begin with, where kernels are
PLACES = {"gpu": ("/device:", "Stream"), "cpu": ("/host:CPU", "tf_XLA")}


def longest(program, *args):
    """`{"busy_ms", "launches", "kernels"}` of one call of the first of `program(*args)`: its longest kernels."""
    run = program(*args)[0]
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        traces = sorted(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(traces[-1]))
        spent, launches = collections.Counter(), collections.Counter()
        for event in events_of(data, *PLACES[jax.default_backend()]):
            spent[event.name] += event.duration_ns / 1e6
            launches[event.name] += 1
    kernels = [{"name": name[:120], "ms": ms, "launches": launches[name]} for name, ms in spent.most_common(COUNT)]
    return {"busy_ms": sum(spent.values()), "launches": sum(launches.values()), "kernels": kernels}


def events_of(data, plane_part, line_start):
    """The kernels of a trace. Raises ValueError, with the names that there are, where it has none."""
    lines = [(f"{plane.name}: {line.name}", line) for plane in data.planes for line in plane.lines]
    found = [event for name, line in lines if plane_part in name and line.name.startswith(line_start)
             for event in line.events]
    if not found:
        raise ValueError(f"no kernels in the trace's lines {[name for name, _ in lines][:20]}")
    return found


def main():
    given = arguments(__doc__, model="1.5B", rows=64, slots=2048, columns=2048, update_rows=4,
                      attention=["cudnn", "blockwise"], precision="fp16", name="gpu_profile")
    results, params = Results(given.name, vars(given)), params_of(decoder(given.model, "plain"))
    for kind in given.attention:
        model = decoder(given.model, kind)
        results.add({"what": "decode, 32 steps", "attention": kind},
                    longest, decode_program, model, params, given.precision, given.rows, given.slots)
        results.add({"what": "update", "attention": kind},
                    longest, update_program, model, params, given.precision, given.update_rows, given.columns,
                    given.update_rows)


if __name__ == "__main__":
    main()
