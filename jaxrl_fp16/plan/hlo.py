"""What a compiled program holds, read out of its optimised HLO text: each instruction, and how often it runs."""

import dataclasses
import math
import re

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?|pred)\[([\d,]*)\]")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations|true_computation|"
                     r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAME = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(?:\{(\{[^=]*?\})\}|(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?))")
_MATMUL = re.compile(r"\b(dot|convolution|custom-call)\(([^)]*)\)")
_GEMM = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|dot)[^"]*"')
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([\d,]+\))?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[^=]*?\})\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program, on one device."""

    opcode: str                                     # without the -start of an asynchronous one
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each result
    times: int                                      # how often it runs
    inside: tuple[str, ...]                         # bodies of loops around it, the outermost first
    name: str                                       # where in the Python program it comes from
    operands: tuple[tuple[str, tuple[int, ...]], ...]   # dtype and shape of what it reads, where those are arrays
    text: str                                       # all of it

    @property
    def bytes(self):
        """Of its results, of one time."""
        return sum(array_bytes(dtype, shape) for dtype, shape in self.arrays)

    @property
    def moved(self):
        """Of a collective: bytes of what enters or of what leaves a device, whichever is more, of one time."""
        parts = 1 if self.opcode != "reduce-scatter" else self.members or 1
        return self.bytes * parts

    @property
    def members(self):
        """Of a collective: how many devices take part in one; None: all of them."""
        return None if self.groups is None else self.groups.shape[1]

    @property
    def groups(self):
        """Of a collective: int [N,M], the devices of each group, by their places in the mesh; None: all are one."""
        if pairs := _PAIRS.search(self.text):
            return _listed(pairs[1])
        if found := _AXES.search(self.text):
            return _along(*found.groups())
        found = _GROUPS.search(self.text)
        if found is None:
            return None
        return _listed(found[1]) if found[1] else _counted(found[2])


def _listed(text):
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])


def _counted(text):
    """`[4,2]<=[2,2,2]T(0,2,1)`: all places in a grid, its axes in another order, cut into groups."""
    shape, grid, order = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    return _in_order(grid, order).reshape(_numbers(shape))


def _along(axes, devices, chosen):
    """`mesh['a'=4,'b'=2] {'a'}`: the groups along some axes of a grid of all places, or of `devices` in that order."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    chosen = re.findall(r"'(\w+)'", chosen)
    if devices:
        grid, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", devices).groups()
        places = _in_order(grid, order)
    else:
        places = np.arange(math.prod(sizes.values()))
    last = [name for name in sizes if name not in chosen] + chosen
    places = places.reshape([*sizes.values()]).transpose([[*sizes].index(name) for name in last])
    return places.reshape(-1, math.prod(sizes[name] for name in chosen))


def _in_order(grid, order):
    places = np.arange(math.prod(_numbers(grid))).reshape(_numbers(grid))
    return (places.transpose(_numbers(order)) if order else places).reshape(-1)


def _numbers(text):
    return [int(n) for n in text.split(",")]


def array_bytes(dtype, shape):
    """Of an array of HLO's `dtype`."""
    size = BYTES.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8
    return math.ceil(size * math.prod(shape))


def read(text, steps=1):
    """The Instructions of a program's optimised HLO, those of fusions left out.

    steps: how often a loop runs whose count the compiler does not know.
    """
    computations, entry = _computations(text)
    found, channels = [], set()

    def walk(name, times, inside, fused=""):
        made = {}
        for line in computations[name]:
            instruction, called = _instruction(line, times, inside, made)
            if not fused:
                found.append(instruction)
            elif instruction.opcode in COLLECTIVES:
                # Of a TPU: one collective is in several fusions, of other work that it goes on beside.
                channel = _CHANNEL.search(line)
                if channel is None or channel[1] not in channels:
                    channels.add(channel and channel[1])
                    found.append(_scattering(instruction, computations[name]) if "scatter" in fused else instruction)
            count, around = times, inside
            if instruction.opcode == "while":
                known = _TRIPS.search(line)
                trips = int(known[1]) if known else _trips(computations[called["condition"][0]]) or steps
                count, around = times * trips, (*inside, called["body"][0])
            for kind, names in called.items():
                for other in names if kind not in ("to_apply", "condition") or instruction.opcode == "call" else ():
                    walk(other, count, around, fused or (other if instruction.opcode == "fusion" else ""))

    walk(entry, 1, ())
    return found


def _trips(condition):
    """How often a loop runs whose condition compares a counter with a constant; None where it does otherwise."""
    root = next((line for line in condition if line.lstrip().startswith("ROOT")), "")
    compared = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", root)
    if compared is None:
        return None
    for line in condition:
        constant = re.match(rf"\s+%?{re.escape(compared[2])} = s32\[\]\S* constant\((\d+)\)", line)
        if constant:
            return int(constant[1])
    return None


def _scattering(reduced, lines):
    """An all-reduce of a fusion that keeps a part of it, as the reduce-scatter that it is."""
    root, _ = _instruction(next(line for line in lines if line.lstrip().startswith("ROOT")), reduced.times, ())
    return dataclasses.replace(reduced, opcode="reduce-scatter", arrays=root.arrays)


def collectives(instructions):
    """Those that move arrays between devices; of an asynchronous pair the start."""
    return [each for each in instructions if each.opcode in COLLECTIVES]


def dots(text):
    """The matmuls of a program, each as dtypes `(left, right, result)`; also those inside of fusions and of a vendor's
    library."""
    computations, _ = _computations(text)
    found = []
    for lines in computations.values():
        dtypes = {}
        for line in lines:
            name, body = _INSTRUCTION.match(line).groups()
            arrays = _ARRAY.findall(body.split("(", 1)[0] if not body.startswith("(") else body)
            dtypes[name] = arrays[0][0] if arrays else ""
            called = _MATMUL.search(body)
            if called is None or called[1] == "custom-call" and not _GEMM.search(body):
                continue
            operands = [each.strip().lstrip("%").split(" ")[-1].lstrip("%") for each in called[2].split(",")]
            if all(each in dtypes for each in operands[:2]):
                found.append((*(dtypes[each] for each in operands[:2]), dtypes[name]))
    return found


def _computations(text):
    found, entry, name = {}, None, None
    for line in text.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name = match[2]
                found[name] = []
                entry = name if match[1] else entry
        elif line.startswith("}"):
            name = None
        elif _INSTRUCTION.match(line):
            found[name].append(line)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; allowed: what `compiled.as_text()` gives")
    return found, entry


def _instruction(line, times, inside, made=None):
    """The Instruction of a line, and what it calls; made: the arrays of the lines before by name, to which it adds."""
    own, body = _INSTRUCTION.match(line).groups()
    depth, end = 0, len(body)
    # The results come first: an array, or a tuple in parentheses.
    if body.startswith("("):
        for end, letter in enumerate(body):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                break
        results, rest = body[:end + 1], body[end + 1:]
    else:
        results, _, rest = body.partition(" ")
    opcode = _OPCODE.search(" " + rest)[1]
    arrays = [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(results)]
    started = opcode.endswith("-start") and opcode != "async-start"
    if started:     # the operands and contexts are among the results
        opcode, arrays = opcode.removesuffix("-start"), _results_of_start(opcode, arrays)
    called = {match[1]: [name.strip().lstrip("%") for name in (match[2] or match[3]).split(",")]
              for match in _CALLED.finditer(rest)}
    name = _NAME.search(rest)
    operands = []
    if made is not None:
        made[own] = arrays
        inputs = rest[rest.index(opcode) + len(opcode):].partition("(")[2].split(")")[0]
        operands = [made[each][0] for each in re.findall(r"%([\w.\-]+)", inputs) if len(made.get(each, ())) == 1]
    return Instruction(opcode, tuple(arrays), times, inside, name[1] if name else "", tuple(operands),
                       line.strip()), called


def _results_of_start(opcode, arrays):
    if opcode == "all-reduce-start":
        return arrays
    return arrays[len(arrays) // 2:] if opcode != "collective-permute-start" else arrays[1:2]
