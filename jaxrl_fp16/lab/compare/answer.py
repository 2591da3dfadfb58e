"""What a comparison found, in three sentences: who won, by how much, and whether the seeds carry it."""

import math

import numpy as np

from jaxrl_fp16.lab.compare.tables import NUMERICS, REWARDS, quantities, value_of
from jaxrl_fp16.lab.compare.verdicts import size, turned

KL = NUMERICS[0]
CARRIED = {
    "held": "goes beyond seed noise",
    "alone": "goes beyond seed noise taken alone, but not among all comparisons of its table",
    "noise": "lies within seed noise",
    "one seed": "rests on one seed",
    "alike": "is as much in every seed, so that no spread is known",
    "same": "is none: every seed gives the same",
    "absent": "is unknown, as no seed ran on both sides",
}


def answer(comparison, found):
    """The sentences of `verdicts`' result, in words that need no statistics.

    Sides are judged by the accuracy of the first evaluation set, or without one by the training reward at the end.
    """
    ran = [label for label in comparison.sides if any(run.steps for run in comparison.of(label))]
    if len(ran) < 2:
        return [f"There is nothing to compare: {f'{ran[0]} alone' if ran else 'no side'} took a step."]
    judged = judged_by(comparison)
    means, seeds = means_of(comparison, ran, judged)
    if not means:
        return [f"None can be said to have won: no seed ran on all of {', '.join(ran)}."]
    leader, leads = _first_of(found, means, judged, highest=True)
    kls, _ = means_of(comparison, ran, KL)
    least, gaps = _first_of(found, kls, KL) if kls else (None, {})
    return [
        _who(leader, means, leads, judged) + _falls(comparison, ran),
        _how_much(leader, leads, least, gaps),
        _carried(leads, gaps, seeds),
    ]


def judged_by(comparison):
    """The Quantity that says who won."""
    after = {key for run in comparison.runs for step in run.steps for key in step}
    return next((one for one in quantities(comparison) if one.key.startswith("eval/") and one.key in after), REWARDS[0])


def means_of(comparison, labels, quantity):
    """`({label: mean}, seeds)` over the seeds that all sides ran, up to the step that all of them reached."""
    sides = {label: {run.seed: run for run in comparison.of(label) if run.steps} for label in labels}
    values = []
    for seed in set.intersection(*(set(runs) for runs in sides.values())):
        runs = [side[seed] for side in sides.values()]
        until = min(run.steps[-1]["step"] for run in runs)
        values.append([value_of(run, quantity, until) for run in runs])
    values = [row for row in values if all(map(math.isfinite, row))]
    return (dict(zip(labels, np.mean(values, axis=0).tolist())) if values else {}), len(values)


def _first_of(found, means, quantity, highest=False):
    """`(label, {other: (Pairing, its standing)})` of the side with the lowest mean, or the highest."""
    first, *others = sorted(means, key=means.get, reverse=highest)
    return first, {other: _between(found, first, other, quantity) for other in others}


def _between(found, first, second, quantity):
    """`(Pairing, its standing)` of two sides, whichever of them the table names first."""
    rows = found.get((first, second)) or found[second, first]
    row = next(row for row in rows if row.quantity == quantity)
    return row.pairing if row.first == first else turned(row.pairing), row.standing


def _who(leader, means, leads, judged):
    name = f"{judged.key.split('/')[1]} accuracy at the end" if judged.over == "last" else "training reward at the end"
    values = ", ".join(f"{label} {means[label]:.3g}" for label in (leader, *leads))
    how = {standing for _, standing in leads.values()}
    if how <= {"held", "alone"}:
        return f"{leader} won: it has the highest {name} ({values})."
    if how == {"same"}:
        return f"No side won: {name} is {means[leader]:.3g} on all of them."
    if "one seed" in how:
        return f"{leader} ended with the highest {name} ({values}); one seed makes no win."
    return f"No side can be said to have won: {name} is {values}."


def _how_much(leader, leads, least, gaps):
    ahead = [f"{other} by {abs(pairing.difference):.3g}" for other, (pairing, how) in leads.items() if how != "same"]
    said = f"{leader} leads {_listed(ahead)}" if ahead else "No side leads"
    less = [f"{size(pairing)} than in {other}" if how != "same" else f"the same as in {other}"
            for other, (pairing, how) in gaps.items()]
    return said + (f"; token KL between sampler and trainer is, in {least}, {_listed(less)}." if less else ".")


def _falls(comparison, labels):
    """How often the reward of each side collapsed, where it did at all."""
    falls = {label: sum(step is not None for step in comparison.collapses(label).values()) for label in labels}
    ran = {label: sum(bool(run.steps) for run in comparison.of(label)) for label in labels}
    said = [f"{count} of {ran[label]} runs of {label}" for label, count in falls.items()]
    return f" The reward collapsed in {_listed(said)}." if any(falls.values()) else ""


def _carried(leads, gaps, seeds):
    if seeds == 1:
        return "One seed carries nothing: how much seeds differ among themselves is not known."
    said = [f"the lead over {_listed(those)} {CARRIED[how]}" for how, those in _by_standing(leads)]
    said += [f"the difference in token KL from {_listed(those)} {CARRIED[how]}" for how, those in _by_standing(gaps)]
    return f"Over {seeds} seeds, {', and '.join(said)}."


def _by_standing(pairs):
    """`(standing, [labels])`, as they come."""
    return [(how, [label for label, (_, one) in pairs.items() if one == how])
            for how in dict.fromkeys(how for _, how in pairs.values())]


def _listed(words):
    """`a`, `a and b`, `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
