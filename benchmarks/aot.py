"""What the compilers of accelerators make of real shapes: bytes on the wires and on a device. Nothing runs.

    python benchmarks/aot.py [--parts wires decode copies tpu estimate]

wires: an update of Qwen3-14B on 128 H100, by mesh and rows at once.  decode: its sampler's step.  copies: gradients
over `data` with 8 microbatches against 1.  tpu: Qwen2.5-1.5B in BF16 on slices of v5p and v5e.  estimate: what a run
prints of its memory against the compilers' sum, ten shapes.  Written to results/aot.json, part by part; others stay.
"""

from __future__ import annotations

import argparse
import json

from record import ROOT, machine, print_table, save

from jaxrl_fp16.plan.compilers import CompileError, compile_program
from jaxrl_fp16.plan.reckoning import carried_on, moved_in_step, needs_of, wires_of
from jaxrl_fp16.plan.targets import GIB, get_target

QWEN3_14B = dict(family="qwen3", vocab_size=151936, hidden_size=5120, intermediate_size=17408, num_layers=40,
                 num_heads=40, num_kv_heads=8, head_dim=128, tie_embeddings=False, rope_theta=1e6)
QWEN2_7B = dict(family="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28,
                num_heads=28, num_kv_heads=4, head_dim=128, tie_embeddings=False)
QWEN2_3B = dict(family="qwen2", vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_layers=36,
                num_heads=16, num_kv_heads=2, head_dim=128, tie_embeddings=True)
QWEN2_1_5B = dict(family="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28,
                  num_heads=12, num_kv_heads=2, head_dim=128, tie_embeddings=True)
QWEN2_0_5B = dict(family="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_layers=24,
                  num_heads=14, num_kv_heads=2, head_dim=64, tie_embeddings=True)
SMOLLM2 = dict(family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
               num_kv_heads=3, head_dim=64, tie_embeddings=True)
MIB, TB = 2**20, 1e12


def config_of(shape, mesh, rows, micro, prompt, new, group=8, prompts=None, **sections):
    """A run's config: `rows` of a minibatch, which is a step's unless `prompts` says otherwise."""
    return {
        "model": {**shape, "attention": "blockwise"}, "task": {"name": "arithmetic"},
        "mesh": dict(zip(("data", "fsdp", "tensor"), mesh)),
        "sampling": {"max_new_tokens": new, "group_size": group, **sections.pop("sampling", {})},
        "training": {"prompts_per_step": prompts or rows // group, "minibatch_size": rows, "microbatch_size": micro,
                     "max_prompt_tokens": prompt}, **sections,
    }


def of_14b(mesh, micro, rows=256):
    return config_of(QWEN3_14B, mesh, rows, micro, 1024, 8192, group=2)


def tera(summary):
    return sum(moved_in_step({"update": summary}, {**summary["facts"], "updates": 1}).values()) / TB


def wires():
    """Bound: 0.25 TB and 13 GiB of temporary memory; 0.55 TB; 0.45 TB."""
    target = get_target("h100x128")
    for mesh, micro in (((1, 128, 1), 128), ((1, 32, 4), 32), ((1, 32, 4), 64)):
        found = compile_program(of_14b(mesh, micro), target, "update")
        yield {"program": "update", "mesh": "x".join(map(str, mesh)), "rows at once": micro, "TB": tera(found),
               "temporary GiB": found["memory"]["temporary"] / GIB, "seconds": found["seconds"]}


def decode():
    """Bound: 20 MiB a decode step and device."""
    target, config = get_target("h100x128"), of_14b((1, 32, 4), 32)
    few, more = (compile_program(config, target, "sampler", layers) for layers in (2, 4))
    found = carried_on(few, more, 40)
    yield {"program": "sampler", "mesh": "1x32x4", "layers compiled": "2, 4",
           "MiB a step": found["decode"]["moved"] / MIB,
           "largest array MiB": found["decode"]["largest"] / MIB, "kernels a step": found["decode"]["kernels"],
           "GiB a step": found["decode"]["bytes"] / GIB, "least GiB a step": found["facts"]["must_read"] / GIB,
           "cache": found["decode"]["cache"]["others"], "seconds": few["seconds"] + more["seconds"]}


def copies():
    """The same bytes along `data`."""
    target = get_target("h100x128")
    for micro in (128, 1024):
        found = compile_program(of_14b((2, 64, 1), micro, rows=1024), target, "update", 4)
        size = sum(at["bytes"] for (_, axes, _, _, _), at in wires_of(found).items() if "data" in axes.split("+"))
        yield {"program": "update, 4 layers", "mesh": "2x64x1", "microbatches": 1024 // micro,
               "GB over data": size / 1e9,
               "seconds": found["seconds"]}


def tpu():
    """They compile, fit, and convert no cache in the decode loop."""
    cases = (("sampler", "v5p:2x2x1", (1, 4, 1)), ("update", "v5p:2x2x1", (1, 4, 1)),
             ("sampler", "v5e:4x4", (1, 16, 1)))
    for name, place, mesh in cases:
        target = get_target(place)
        config = {**config_of(QWEN2_1_5B, mesh, 64, 16, 512, 1536, group=4), "precision": "bf16"}
        try:
            found = compile_program(config, target, name, seconds=1200)
        except CompileError as error:
            yield {"program": name, "target": place, "refused": str(error)}
            continue
        needs = sum(needs_of(name, found, found["facts"]).values())
        yield {"program": name, "target": place, "GiB a device": needs / GIB, "of GiB": target.chip.memory / GIB,
               "fits": needs <= target.chip.memory, "dots": ", ".join(found["dots"]),
               "cache made anew": len(found["decode"]["cache"]["others"]) if found["decode"] else "-",
               "seconds": found["seconds"]}


SHAPES = (
    ("SmolLM2-135M", "h100x1", config_of(SMOLLM2, (1, 1, 1), 64, 16, 256, 768)),
    ("Qwen2.5-0.5B", "h100x1", config_of(QWEN2_0_5B, (1, 1, 1), 128, 8, 512, 1536)),
    ("Qwen2.5-0.5B, 32 at once", "h100x1", config_of(QWEN2_0_5B, (1, 1, 1), 128, 32, 512, 1536)),
    ("Qwen2.5-1.5B", "h100x1", config_of(QWEN2_1_5B, (1, 1, 1), 64, 4, 512, 1536)),
    ("Qwen2.5-1.5B, sanity test", "h100x1", config_of(QWEN2_1_5B, (1, 1, 1), 128, 4, 1024, 8192, prompts=64,
                                                     sampling={"max_rows": 128})),
    ("Qwen2.5-1.5B on 8", "h100x8", config_of(QWEN2_1_5B, (1, 8, 1), 256, 32, 512, 3584)),
    ("Qwen2.5-3B on 2", "h100x2", config_of(QWEN2_3B, (1, 2, 1), 64, 4, 512, 1536)),
    ("Qwen2.5-7B on 8", "h100x8", config_of(QWEN2_7B, (1, 8, 1), 128, 16, 1024, 3072)),
    ("Qwen2.5-7B on 8, tensor 4", "h100x8", config_of(QWEN2_7B, (1, 2, 4), 128, 8, 1024, 3072)),
    ("Qwen3-14B on 128", "h100x128", of_14b((1, 128, 1), 128)),
)


def estimate():
    """Within 10 %."""
    for name, place, config in SHAPES:
        target, found, layers = get_target(place), {}, config["model"]["num_layers"]
        for program in ("sampler", "scorer", "update"):
            depths = (2, 4) if program == "sampler" else (None,)
            done = [compile_program(config, target, program, depth) for depth in depths]
            found[program] = carried_on(*done, layers) if len(done) > 1 else done[0]
        facts = found["update"]["facts"]
        needs = {program: sum(needs_of(program, each, facts).values()) for program, each in found.items()}
        most, own = max(needs, key=needs.get), sum(facts["estimate"].values())
        yield {"shape": name, "target": place, "estimate GiB": own / GIB, "compilers GiB": needs[most] / GIB,
               "ratio": own / needs[most], "largest program": most,
               **{f"{program} GiB": size / GIB for program, size in needs.items()},
               "parts": {program: needs_of(program, each, facts) for program, each in found.items()},
               "estimate parts": facts["estimate"]}


PARTS = {"wires": wires, "decode": decode, "copies": copies, "tpu": tpu, "estimate": estimate}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    given = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "aot.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    for part in given.parts:
        rows = [{"part": part, "commit": machine()["commit"], **row} for row in PARTS[part]()]
        kept = [row for row in kept if row["part"] != part] + rows
        save("aot", kept, machine())
        print_table(part, [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows])


if __name__ == "__main__":
    main()
