"""The page of `plan`: whether a run fits a machine, what crosses its wires, how long a step takes at best."""

from jaxrl_fp16.lab.figures import FAINT, INK, SERIES, legend, name_axes, new_figure, svg_of
from jaxrl_fp16.lab.page import Figure, Section, Table, write_page
from jaxrl_fp16.plan.reckoning import (
    at_best, calls_of, moved_in_step, needs_of, one_by_one, room, seconds_of,
)
from jaxrl_fp16.plan.targets import ACCELERATORS, GIB

WIRES = {"all-reduce": "sums on every device", "all-gather": "gathers what is divided",
         "reduce-scatter": "sums, and divides the sum", "all-to-all": "exchanges parts",
         "collective-permute": "hands on"}
FITS, TIGHT = 0.9, 1.0


def answer(found, facts, target):
    """The page's three sentences. found: summaries by program."""
    needs = {name: sum(needs_of(name, each, facts).values()) for name, each in found.items()}
    most, free = max(needs, key=needs.get), room(target)
    share = needs[most] / free
    fits = "It fits" if share <= FITS else "It fits barely" if share <= TIGHT else "It does not fit"
    yield (f"{fits}: the {most} takes most, {_number(needs[most] / GIB)} GiB of the {free / GIB:,.1f} GiB that a run "
           f"has on each of {target.said}.")
    seconds = {name: seconds_of(name, each, facts, target) for name, each in found.items()}
    least, longest = sum(map(at_best, seconds.values())), sum(map(one_by_one, seconds.values()))
    slow = max(seconds, key=lambda name: one_by_one(seconds[name]))
    limit = max(seconds[slow], key=seconds[slow].get)
    bound = {"compute": "its arithmetic", "memory": "reading weights and cache", "wires": "the wires"}[limit]
    span = " to ".join(dict.fromkeys([_time(least), _time(longest)]))
    yield (f"A step takes {span} at best, every response as long as it may be; the {slow} "
           f"takes most of it, and is bound by {bound}.")
    moved = moved_in_step(found, facts)
    total = sum(moved.values())
    if total < 2**20:
        yield "Next to nothing crosses the wires."
    else:
        program, _, axes, kind = max(moved, key=moved.get)
        yield (f"{_bytes(total)} cross the wires for each device and step, most of it where the {program} "
               f"{WIRES.get(kind, kind)} along {axes} ({kind}): {moved[max(moved, key=moved.get)] / total:.0%}.")


def advice(found, facts, target):
    """What to change, a sentence each."""
    free, mesh, large = room(target), facts["mesh"], set()
    for name, each in found.items():
        needs = needs_of(name, each, facts)
        over = sum(needs.values()) - free
        if over <= 0:
            continue
        large.add(name)
        largest = max(needs, key=needs.get)
        keys = {"sampler": "sampling.max_rows (fewer rows at once), mesh.rollout_tensor"}.get(
            name, "training.microbatch_size, training.microbatch_tokens")
        if largest in ("arguments", "other states"):
            keys = f"mesh.fsdp (here {mesh['fsdp']})" + (", training.reference: host" if facts["learner"]["reference"]
                                                        else "")
        yield f"The {name} is {over / GIB:,.1f} GiB too large, most of it {largest}. What lowers it: {keys}."
    for name, each in found.items():
        seconds = seconds_of(name, each, facts, target)
        if seconds["wires"] <= max(seconds["compute"], seconds["memory"]):
            continue
        moved = {key: size for key, size in moved_in_step({name: each}, facts).items()}
        _, place, axes, kind = max(moved, key=moved.get)
        if axes == "tensor":
            yield (f"The {name} waits for sums along tensor: a smaller mesh.tensor (here {mesh['tensor']}) makes them "
                   "fewer.")
        elif place == "decode":
            yield f"Each decode step waits for the wires, along {axes}."
        else:
            yield (f"The {name} waits for weights and gradients along {axes}: a larger training.microbatch_size moves "
                   "them less often.")
    if "sampler" in found and "sampler" not in large:
        seconds = seconds_of("sampler", found["sampler"], facts, target)
        if seconds["memory"] > 4 * seconds["compute"]:
            yield ("Decoding reads weights and cache far longer than it computes: more rows at once "
                   "(sampling.max_rows, training.prompts_per_step) cost little.")


def tables(found, facts, target):
    """The tables of memory, wires and seconds."""
    rows = []
    for name, each in found.items():
        needs = needs_of(name, each, facts)
        total = sum(needs.values())
        rows.append([name, *(_number(size / GIB) for size in needs.values()), _number(total / GIB),
                     f"{total / room(target):.0%}"])
    columns = ("program", *needs, "sum", "of what there is")
    yield Table(columns, rows, "GiB on a device while a program runs. Results: those that no donated array holds. "
                "Other states: what the run keeps there meanwhile, such as Adam's moments while it samples.")
    moved = sorted(moved_in_step(found, facts).items(), key=lambda item: -item[1])
    places = {"once": "once a call", "loop": "in loops", "decode": "at each decode step"}
    rows = [[name, places[place], axes, kind, _number(size / 1e9)] for (name, place, axes, kind), size in moved
            if size >= 1e7] or [["all programs", "-", "-", "-", "0"]]
    yield Table(("program", "where", "mesh axis", "collective", "GB a step"), rows,
                "Bytes that enter or leave a device, whichever is more, of collectives in the compiled programs, loops "
                "counted; those below 0.01 GB are left out.")
    rows = []
    for name, each in found.items():
        seconds = seconds_of(name, each, facts, target)
        rows.append([name, str(calls_of(name, facts)), *map(_number, seconds.values()),
                     _number(at_best(seconds)), _number(one_by_one(seconds))])
    yield Table(("program", "calls a step", "compute", "memory", "wires", "all at once", "one by one"), rows,
                "Seconds of a step at best: FLOP over the chip's peak, of decoding bytes over its memory's speed, "
                "bytes over the wires. A real run takes longer; peaks are not reached.")


def search_table(searched):
    """Meshes side by side. searched: `{mesh: {"needs", "moved", "seconds", "micro"} or the compiler's refusal}`."""
    rows = []
    for (data, fsdp, tensor), each in searched.items():
        name = f"{data} x {fsdp} x {tensor}"
        if isinstance(each, str):
            rows.append([name, "-", "-", "-", "-", each])
            continue
        seconds = each["seconds"]
        rows.append([name, str(each["micro"]), _number(each["needs"] / GIB), _number(each["moved"] / 1e9),
                     _number(at_best(seconds)), _number(one_by_one(seconds))])
    return Table(("data x fsdp x tensor", "rows at once", "GiB a device", "GB a step", "all at once, s",
                  "one by one, s"), rows, "The update alone. At once: training.microbatch_size, or the nearest number "
                 "that the mesh divides.")


def draw_needs(found, facts, target):
    """Bars of what each program takes of a device's memory."""
    figure, ((axes,),) = new_figure(height=0.6 + 0.45 * len(found))
    names, left = list(found), [0.0] * len(found)
    parts = list(needs_of(names[0], found[names[0]], facts))
    for part, colour in zip(parts, SERIES):
        sizes = [needs_of(name, found[name], facts)[part] / GIB for name in names]
        axes.barh(names, sizes, left=left, color=colour, label=part, height=0.6)
        left = [a + b for a, b in zip(left, sizes)]
    axes.axvline(room(target) / GIB, color=INK, linewidth=1.2)
    axes.annotate("what a run has", (room(target) / GIB, 0), xytext=(-4, -12), textcoords="offset points", ha="right",
                  fontsize=8, color=FAINT)
    axes.invert_yaxis()
    name_axes(axes, "memory of a device", x="GiB")
    legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def write_plan(path, name, found, facts, target, searched, notes):
    """Writes the page. notes: further sentences on how it was found."""
    memory, wires, times = tables(found, facts, target)
    lead = list(answer(found, facts, target))
    figure = Figure(svg_of(draw_needs(found, facts, target)))
    changes = "\n\n".join(advice(found, facts, target)) or "Nothing stands out."
    mesh = facts["mesh"]
    about = (f"{name}: {facts['parameters'] / 1e9:,.2f}B parameters, {facts['rows']} rows of {facts['columns']:,} "
             f"columns a step, {facts['precision']}, mesh data {mesh['data']} x fsdp {mesh['fsdp']} x tensor "
             f"{mesh['tensor']}.")
    sections = [
        Section("What to change", changes),
        Section("Memory", tables=[memory], figures=[figure]),
        Section("What crosses the wires", tables=[wires]),
        Section("Seconds a step, at best", tables=[times]),
        *([Section("Other meshes", tables=[search_table(searched)])] if searched else []),
        Section("How this was found", about + "\n\n" + "\n\n".join(notes), tables=[_chips(target), _own(facts, found)],
                folded=True),
    ]
    return write_page(path, f"{name} on {target.name}", lead, sections)


def _chips(target):
    rows = [[("* " if chip == target.chip else "") + chip.name, f"{chip.memory / GIB:,.1f}",
             f"{chip.half_flops / 1e12:,.0f}", f"{chip.bandwidth / 1e12:,.2f}", f"{chip.near / 1e9:,.0f}",
             f"{chip.far / 1e9:,.0f}", chip.source] for chip in ACCELERATORS.values()]
    columns = ("chip", "memory, GiB", "16 bits, TFLOP/s", "memory, TB/s", "near, GB/s", "network, GB/s", "source")
    return Table(columns, rows, "What each chip is reckoned with. Near and network: what a chip sends to chips of its "
                 "host or slice, and to others, a second.")


def _own(facts, found):
    total = sum(facts["estimate"].values())
    rows = [[what, f"{size / GIB:,.2f}"] for what, size in facts["estimate"].items()]
    needs = max(sum(needs_of(name, each, facts).values()) for name, each in found.items())
    return Table(("part", "GiB"), [*rows, ["sum", f"{total / GIB:,.2f}"], ["of the compilers", f"{needs / GIB:,.2f}"]],
                 "The estimate of memory that a run prints at its start, beside the largest of the programs above.")


def _number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds):
    return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def _bytes(size):
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 1e6:,.0f} MB"
