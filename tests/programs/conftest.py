"""What a compiled program holds, read out of its optimised HLO text: each instruction, and how often it runs."""

import dataclasses
import math
import re
import types

import pytest

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?|pred)\[([\d,]*)\]")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations|true_computation|"
                     r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


@pytest.fixture(scope="session")
def hlo():
    """`read`, `collectives` and `array_bytes`."""
    return types.SimpleNamespace(read=read, collectives=collectives, array_bytes=array_bytes)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program, on one device."""

    opcode: str                                     # without the -start of an asynchronous one
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each result
    times: int                                      # how often it runs
    inside: tuple[str, ...]                         # bodies of loops around it, the outermost first
    name: str                                       # where in the Python program it comes from
    text: str                                       # all of it

    @property
    def bytes(self):
        """Of its results, of one time."""
        return sum(array_bytes(dtype, shape) for dtype, shape in self.arrays)


def array_bytes(dtype, shape):
    """Of an array of HLO's `dtype`."""
    size = BYTES.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8
    return math.ceil(size * math.prod(shape))


def read(text, steps=1):
    """The Instructions of a program's optimised HLO, those of fusions left out.

    steps: how often a loop runs whose count the compiler does not know.
    """
    computations, entry = _computations(text)
    found = []

    def walk(name, times, inside):
        for line in computations[name]:
            instruction, called = _instruction(line, times, inside)
            found.append(instruction)
            if instruction.opcode == "fusion":
                continue
            count, around = times, inside
            if instruction.opcode == "while":
                known = _TRIPS.search(line)
                count, around = times * (int(known[1]) if known else steps), (*inside, called["body"][0])
            for kind, names in called.items():
                for other in names if kind not in ("to_apply", "condition") or instruction.opcode == "call" else ():
                    walk(other, count, around)

    walk(entry, 1, ())
    return found


def collectives(instructions):
    """Those that move arrays between devices; of an asynchronous pair the start."""
    return [each for each in instructions if each.opcode in COLLECTIVES]


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


def _instruction(line, times, inside):
    body = _INSTRUCTION.match(line)[2]
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
    return Instruction(opcode, tuple(arrays), times, inside, name[1] if name else "", line.strip()), called


def _results_of_start(opcode, arrays):
    if opcode == "all-reduce-start":
        return arrays
    return arrays[len(arrays) // 2:] if opcode != "collective-permute-start" else arrays[1:2]
