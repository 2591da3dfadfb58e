"""From what was compiled to what a step takes: bytes on a device, bytes on the wires, seconds at best.

Everything here is plain values, as `summary_of` and `facts_of` give them.
"""

from collections import defaultdict

LARGEST_SHARE = 0.92    # of a GPU's memory that JAX is given by launch/gpu.sh; a TPU's is given whole
SENT = {"all-reduce": 2.0, "collective-permute": None}   # rounds of a ring; others make one


def carried_on(few, more, layers):
    """The summary of a program with `layers` layers, on the line through those of two smaller depths."""
    step = more["layers"] - few["layers"]

    def along(a, b):
        return b + (b - a) * (layers - more["layers"]) / step

    def numbers(a, b):
        return {key: along(a[key], b[key]) if isinstance(a[key], int | float) else b[key] for key in b}

    first, second = wires_of(few), wires_of(more)
    wires = {key: {"bytes": along(first.get(key, {}).get("bytes", 0), at["bytes"]),
                   "sent": along(first.get(key, {}).get("sent", 0),
                                                       at["sent"])}
             for key, at in second.items()}
    return {**more, "layers": layers, "carried": [few["layers"], more["layers"]], "wires": wires,
            "memory": numbers(few["memory"], more["memory"]),
            "decode": numbers(few["decode"], more["decode"]) if more["decode"] else None}


def wires_of(summary):
    """`{(place, axes, kind, hosts, members a host): {"bytes", "sent"}}` of one call; of a decode step where the place
    is decode. bytes: what enters or leaves a device, whichever is more; sent: what a ring makes of it."""
    if "wires" in summary:
        return summary["wires"]
    found = defaultdict(lambda: {"bytes": 0, "sent": 0})
    for each in summary["moved"]:
        if each["place"] == "earlier stage" or each["group"] < 2:
            continue
        key = each["place"], each["axes"], each["kind"], each["hosts"], each["group"] // each["hosts"]
        rounds = SENT.get(each["kind"], 1.0)
        share = 1.0 if rounds is None else rounds * (each["group"] - 1) / each["group"]
        found[key]["bytes"] += each["bytes"] * each["times"]
        found[key]["sent"] += each["bytes"] * each["times"] * share
    return dict(found)


def calls_of(name, facts):
    """How often a step calls a program."""
    if name.endswith("update"):
        return facts["updates"]
    return facts["scored"] if name == "scorer" else 1


def moved_in_step(summaries, facts):
    """`{(program, place, axes, kind): bytes}` of a device, in a whole step."""
    found = defaultdict(float)
    for name, summary in summaries.items():
        for (place, axes, kind, _, _), at in wires_of(summary).items():
            times = facts["new_tokens"] * facts["rounds"] if place == "decode" else 1
            found[name, place, axes, kind] += at["bytes"] * times * calls_of(name, facts)
    return dict(found)


def link(chip, hosts, members):
    """Bytes a second of a device in a collective over hosts, `members` of its devices on each: a ring through k devices
    of a host uses the network of all k."""
    return chip.near if hosts == 1 else min(chip.near, chip.far * members)


def seconds_of(name, summary, facts, target):
    """`{"compute", "memory", "wires"}`: seconds of a step that a program takes at best by each limit."""
    chip, calls = target.chip, calls_of(name, facts)
    peak = chip.half_flops if facts["half"] == 2 else chip.float_flops
    flops, steps = facts["flops"], facts["new_tokens"] * facts["rounds"]
    work = flops["prefill"] + flops["decode"] if name == "sampler" else flops[name]
    found = {"compute": calls * work / target.chips / peak, "memory": 0.0, "wires": 0.0}
    if name == "sampler":
        found["memory"] = steps * facts["must_read"] / chip.bandwidth
    for (place, _, _, hosts, members), at in wires_of(summary).items():
        times = steps if place == "decode" else 1
        found["wires"] += calls * times * at["sent"] / link(chip, hosts, members)
    return found


def at_best(seconds):
    """Of `seconds_of`: if everything that can go on at once does."""
    return max(seconds.values())


def one_by_one(seconds):
    """Of `seconds_of`: if nothing goes on beside the wires."""
    return max(seconds["compute"], seconds["memory"]) + seconds["wires"]


def needs_of(name, summary, facts):
    """Bytes on a device while a program runs, by what takes them."""
    memory, learner = summary["memory"], facts["learner"]
    own = {"update": learner["policy"], "critic update": learner["critic"], "values": learner["critic parameters"]}
    # On one device the sampler's program is given weights that are cast already, beside all that is learnt.
    apart = name == "sampler" and facts["decodes in steps"]
    given = 0 if apart else own.get(name, learner["policy parameters"])
    others = learner["policy"] + learner["critic"] + learner["reference"] - given
    return {"arguments": memory["arguments"], "temporary": memory["temporary"],
            "results and code": memory["results"] - memory["donated"] + memory["code"], "other states": others}


def room(target):
    """Bytes of a device that a run may use."""
    return target.chip.memory * (LARGEST_SHARE if target.chip.platform == "gpu" else 1.0)
