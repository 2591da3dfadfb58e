"""What a compiled program says of itself, as plain values: memory, what crosses between devices, how it multiplies."""

import numpy as np

from jaxrl_fp16.models import FAMILIES
from jaxrl_fp16.parallel import MESH_AXES, row_shards, sampling_mesh
from jaxrl_fp16.plan import hlo

DECODE = "decode_step"    # the name of the sampler's step in the names of its operations
AHEAD = " copy-start(", " slice-start(", '"ConcatBitcast"'    # the last puts together what the others read
PICKING = "jit(_take)", "take_along_axis", "gather", "dynamic_slice"
# What names a value and starts nothing on a device.
NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "opt-barrier", "partition-id", "replica-id")


def summary_of(compiled, text, setup, model):
    """Of a compiled program and its optimised HLO, on one device, a mapping of plain values.

    memory: bytes, `memory_of`.  moved: what collectives move, an entry for each.  dots: the dtypes of matmuls.
    decode: of a sampler, `decode_of`; else None.
    """
    instructions = hlo.read(text)
    bodies = decode_bodies(instructions)
    mesh = sampling_mesh(setup.config.mesh, setup.mesh) if bodies else setup.mesh
    return {
        "memory": memory_of(compiled), "layers": model.config.num_layers,
        "moved": [_moved(each, mesh, bodies) for each in hlo.collectives(instructions)],
        "dots": sorted({f"{left} x {right} -> {result}" for left, right, result in hlo.dots(text)}),
        "decode": decode_of(instructions, bodies[-1], setup, model) if bodies else None,
    }


def memory_of(compiled):
    """Bytes on a device by what they are for; `total` is what the program takes while it runs."""
    found = compiled.memory_analysis()
    sizes = {"arguments": found.argument_size_in_bytes, "results": found.output_size_in_bytes,
             "donated": found.alias_size_in_bytes, "temporary": found.temp_size_in_bytes,
             "code": found.generated_code_size_in_bytes}
    total = sizes["arguments"] + sizes["results"] - sizes["donated"] + sizes["temporary"] + sizes["code"]
    return {**sizes, "total": total}


def decode_bodies(instructions):
    """Names of the bodies of the loops that decode, one a stage, in the order of the program."""
    found = {}
    for each in instructions:
        before, inside, _ = each.name.partition(f"/{DECODE}/")
        depth = before.count("while/body")
        if inside and 0 < depth <= len(each.inside):
            found[each.inside[depth - 1]] = None
    return list(found)


def decode_of(instructions, body, setup, model):
    """Of one decode step, of the stage with that body.

    kernels: what is started on the device. bytes: that those kernels read and write, an array that is changed in place
    left out. moved: bytes that cross the wires; largest: those of the largest array that does. cache: of the arrays as
    large as a layer's keys or values that are made, those written in place, and the others by their names; what a TPU
    reads ahead into the memory on its chip is none.
    """
    steps = [each for each in instructions if body in each.inside]
    around = steps[0].inside.index(body)
    first = min(each.times for each in steps if len(each.inside) == around + 1)
    kernels = [each for each in steps if each.opcode not in NAMES and not each.opcode.endswith("-done")]
    moved = hlo.collectives(steps)
    written, others = 0, []
    for each in kernels:
        ahead = any(kind in each.text for kind in AHEAD)
        if not ahead and any(_is_cache(shape, setup, model) for _, shape in each.arrays):
            if "scatter" in each.text.partition("(")[0] + each.name.rpartition("/")[2]:
                written += 1
            else:
                others.append(f"{each.opcode} {each.name}")
    return {
        "kernels": sum(each.times for each in kernels) // first,
        "bytes": sum(_touched(each) * each.times for each in kernels) // first,
        "moved": sum(each.moved * each.times for each in moved) // first,
        "largest": max((each.moved for each in moved), default=0), "cache": {"written": written, "others": others},
    }


def _is_cache(shape, setup, model):
    """Whether an array of that shape is as large as one layer's keys or values on a device, of any number of slots."""
    config, mesh = setup.config, sampling_mesh(setup.config.mesh, setup.mesh)
    attention = FAMILIES[model.config.family].attention(model.config)
    tensor = mesh.shape["tensor"]
    heads = attention.kv_heads // (1 if attention.kv_heads % tensor else tensor)
    rows = config.training.prompts_per_step * config.sampling.group_size
    slots = min(rows, config.sampling.max_rows or rows) // row_shards(mesh)
    size, least = int(np.prod(shape)), config.training.max_prompt_tokens
    each = slots * heads * attention.head_dim
    return size % each == 0 and size // each >= least and attention.head_dim in shape


def _touched(kernel):
    """Bytes that a kernel reads and writes; where it changes an operand in place, what it is given beside, and where
    it picks rows out of a table, those."""
    if any(each in kernel.name for each in PICKING):
        return 2 * sum(hlo.array_bytes(*each) for each in kernel.arrays)
    read = [hlo.array_bytes(*each) for each in kernel.operands]
    made = [hlo.array_bytes(*each) for each in kernel.arrays]
    same = [each for each in kernel.arrays if each in kernel.operands]
    in_place = "scatter" in kernel.text.partition("(")[0] or "dynamic-update-slice" in kernel.text.partition("(")[0]
    if in_place and same:
        changed = hlo.array_bytes(*same[0])
        return sum(read) + sum(made) - 2 * changed
    return sum(read) + sum(made)


def _moved(each, mesh, bodies):
    stages = [place for place, body in enumerate(bodies) if body in each.inside]
    place = "loop" if each.inside else "once"
    if stages:    # of several stages of decoding, which follow one another, the last stands for all
        place = "decode" if stages[0] == len(bodies) - 1 else "earlier stage"
    shape = [mesh.shape[axis] for axis in MESH_AXES]
    groups = np.arange(mesh.size)[None] if each.groups is None else each.groups
    return {
        "kind": each.opcode, "axes": axes_of(groups, shape), "place": place, "times": each.times,
        "arrays": [[dtype, list(size)] for dtype, size in each.arrays], "bytes": each.moved,
        "group": int(groups.shape[1]), "hosts": hosts_of(groups, mesh), "name": each.name,
    }


def axes_of(groups, shape):
    """The mesh axes that a collective's groups span, joined by +."""
    places = np.stack(np.unravel_index(groups, shape))   # [axes, groups, members]
    return "+".join(axis for axis, at in zip(MESH_AXES, places) if (at != at[:, :1]).any())


def hosts_of(groups, mesh):
    """Over how many hosts the widest of a collective's groups goes; the chips of a TPU's slice count as one."""
    devices = mesh.devices.flatten()
    if devices[0].platform == "tpu":
        return 1
    return max(len({devices[place].process_index for place in group}) for group in groups)
