"""What `mismatch` found, in three sentences: what differs least, by how many times, what it means for a response."""

import math


def answer(found, facts):
    """The sentences of `report.measure`'s result; `facts` has `responses` and `tokens` by label."""
    sides, drawn = found["sides"], {label: pairs["sampler|scorer"] for label, pairs in found["metrics"].items()}
    finite = {label: metrics["kl_k3"] for label, metrics in drawn.items() if math.isfinite(metrics["kl_k3"])}
    if not finite:
        return ["No log-prob can be compared: none of these rollouts has finite ones alone."]
    least = min(finite, key=finite.get)
    length = sum(facts["tokens"].values()) / sum(facts["responses"].values())
    return [
        _least(least, finite, len(drawn)),
        _times(finite, found["kl_error"], sides) or "There is no other to compare it with.",
        _meaning({label: drawn[label] for label in finite}, sides, length),
    ]


def _least(least, finite, count):
    by = f"by a token KL of {finite[least]:.1e}" if finite[least] else "by not a single bit"
    if count == 1:
        return f"In {least} sampler and trainer differ {by}."
    return f"Sampler and trainer differ least in {least}: {by}."


def _times(finite, errors, sides):
    """With each engine how its precisions differ; with several engines also how those do in each precision."""
    said = [(f"with {engine}, ", _steps(finite, errors, sides, "precision", labels))
            for engine, labels in _grouped(finite, sides, "engine")]
    several = len(said) > 1
    if several:
        said += [(f"in {precision}, ", _steps(finite, errors, sides, "engine", labels))
                 for precision, labels in _grouped(finite, sides, "precision")]
    text = "; ".join((place if several else "") + ", ".join(steps) for place, steps in said if steps)
    return f"{text[:1].upper() if several else text[:1]}{text[1:]}." if text else ""


def _grouped(labels, sides, key):
    """`(value, [labels])` of what `key` of a side is, as they come."""
    values = dict.fromkeys(sides[label][key] for label in labels)
    return [(value, [label for label in labels if sides[label][key] == value]) for value in values]


def _steps(finite, errors, sides, key, labels):
    """From each of `labels` to the next larger token KL, in words."""
    order = sorted(labels, key=finite.get)
    return [_step(sides[low][key], sides[high][key], finite[low], finite[high], math.hypot(errors[low], errors[high]))
            for low, high in zip(order, order[1:])]


def _step(low_name, high_name, low, high, error):
    if low == high:
        return f"{high_name} differs as much as {low_name}"
    if not low:
        return f"{high_name} differs by {high:.1e} and {low_name} by nothing"
    carried = high - low > 2 * error
    return f"{high_name} differs {high / low:.3g} times as much as {low_name}" + (
        "" if carried else ", within two standard errors")


def _meaning(drawn, sides, length):
    """What a sequence makes of it: one standard deviation of its probability's ratio, and what the rows weigh."""
    groups = [(name, [drawn[label] for label in labels]) for name, labels in _grouped(drawn, sides, "precision")]
    factors = [f"{_range([math.exp(min(x['seq_log_ratio_std'], 700)) for x in those], '.4g')} in {name}"
               for name, those in groups]
    weights = [f"{_range([100 * x['ess_seq'] for x in those], '.3g')} in {name}" for name, those in groups]
    return (f"Over a response of {length:.0f} tokens, the average, its probability differs by a factor of "
            f"{_listed(factors)} (one standard deviation); 100 responses weigh as much as {_listed(weights)}.")


def _range(values, form):
    """`1.2`, or `1.2 to 1.4` where they differ as shown."""
    low, high = (format(edge, form) for edge in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _listed(words):
    """`a`, `a and b`, `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
