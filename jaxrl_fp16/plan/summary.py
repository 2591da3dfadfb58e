"""What a compiled program says of itself, as plain values: memory, what crosses between devices, how it multiplies."""

from jaxrl_fp16.parallel import MESH_AXES
from jaxrl_fp16.plan import hlo
import numpy as np

DECODE = "decode_step"    # the name of the sampler's step in the names of its operations


def summary_of(compiled, text, setup, model):
    """Of a compiled program and its optimised HLO, on one device.

    memory: bytes, `total` is what the device needs while it runs. moved: what collectives make, one entry for each
    kind, place and shape. dots: the dtypes of matmuls. loops: instructions of the decode loop's body that make an array
    as large as a layer's keys or values.
    """
    instructions = hlo.read(text)
    shape = [setup.mesh.shape[axis] for axis in MESH_AXES]
    step = decode_body(instructions)
    return {
        "memory": memory_of(compiled), "layers": model.config.num_layers,
        "moved": [_moved(each, shape, step) for each in hlo.collectives(instructions)],
        "dots": sorted({" x ".join(each[:2]) + f" -> {each[2]}" for each in hlo.dots(text)}),
    }


def memory_of(compiled):
    """Bytes on a device by what they are for."""
    found = compiled.memory_analysis()
    sizes = {"arguments": found.argument_size_in_bytes, "results": found.output_size_in_bytes,
             "donated": found.alias_size_in_bytes, "temporary": found.temp_size_in_bytes,
             "code": found.generated_code_size_in_bytes}
    return {**sizes, "total": sizes["arguments"] + sizes["results"] - sizes["donated"] + sizes["temporary"]
            + sizes["code"]}


def decode_body(instructions):
    """Names of the bodies of the loops that decode, one a stage, in the order of the program."""
    found = {}
    for each in instructions:
        before, inside, _ = each.name.partition(f"/{DECODE}/")
        depth = before.count("while/body")
        if inside and 0 < depth <= len(each.inside):
            found[each.inside[depth - 1]] = None
    return list(found)


def _moved(each, shape, step):
    place = "decode" if any(body in step for body in each.inside) else "loop" if each.inside else "once"
    return {
        "kind": each.opcode, "axes": axes_of(each.groups, shape), "place": place, "times": each.times,
        "arrays": [[dtype, list(size)] for dtype, size in each.arrays], "bytes": each.moved,
        "group": each.members or int(np.prod(shape)), "name": each.name,
    }


def axes_of(groups, shape):
    """The mesh axes that a collective's groups span, joined by +."""
    if groups is None:
        return "+".join(axis for axis, size in zip(MESH_AXES, shape) if size > 1)
    places = np.stack(np.unravel_index(groups, shape))   # [axes, groups, members]
    return "+".join(axis for axis, at in zip(MESH_AXES, places) if (at != at[:, :1]).any())
