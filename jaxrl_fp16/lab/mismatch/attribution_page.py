"""What `attribute` found, as a section of the `mismatch` page."""

from jaxrl_fp16.lab.figures import colour_of, legend, name_axes, new_figure, svg_of
from jaxrl_fp16.lab.mismatch.attribution import shares_by
from jaxrl_fp16.lab.page import Figure, Section, Table

PARTS = ("embedding", "norm", "attention", "mlp", "head")


def attribution_section(found):
    """`found`: by precision, what `attribute` gives."""
    return Section(
        "Where the difference arises",
        "The stored tokens once more, through the sampler's cache token by token and through the scorer's "
        "program, with every module's output taken out of both. A module's share is the change of the log-probs "
        "when the difference of its own rounding in the two programs is put into its output alone; what its input "
        "brought along is its predecessors'. If roundings are independent the squares of the shares add up to the "
        "square of the whole: the table's ratio is then 1. Taps change what is fused, so the difference without "
        "them is given too.",
        tables=[_whole(found), _modules(found)],
        figures=[Figure(svg_of(draw_attribution(found)), "Left: the residual stream after each layer, where it "
                        "predicts a response token; the norm of the difference over the stream's. Right: parts of the "
                        "squared shares.")],
    )


def _whole(found):
    columns = ("root mean square, nats", "with taps", "without", "not explained by shares", "ratio of squares")
    rows = [(name, *(f"{one[key]:.3g}" for key in ("end_to_end", "untapped", "unexplained", "squares")))
            for name, one in found.items()]
    return Table(columns, rows)


def _modules(found):
    heads = [f"{name}: {what}" for name in found for what in ("decode | full", "decode | float32", "full | float32",
                                                              "share")]
    first = next(iter(found.values()))["modules"]
    rows = []
    for place, module in enumerate(first):
        cells = [one["modules"][place][key] for one in found.values()
                 for key in ("decode_full", "decode_float32", "full_float32", "share")]
        rows.append((module["name"], *(f"{cell:.2g}" for cell in cells)))
    return Table(("module", *heads), rows, "Differences over the norm of the second of the two; shares in nats.")


def draw_attribution(found):
    """Left the difference along the layers, right whose roundings it is made of."""
    figure, ((left, right),) = new_figure(1, 2, width=10.0)
    for place, (name, one) in enumerate(found.items()):
        colour = colour_of(name, place)
        stream = [row for row in one["modules"] if row["kind"] == "residual"]
        layers = [row["layer"] for row in stream]
        for key, style, what in (("decode_full", "-", "decode | full"), ("full_float32", ":", "full | float32")):
            seen = [row[key] or float("nan") for row in stream]  # no difference has no logarithm
            left.plot(layers, seen, style, color=colour, marker="o", markersize=3, label=f"{name}: {what}")
        parts, width = shares_by(one, "kind"), 0.8 / len(found)
        right.bar([at + place * width for at in range(len(PARTS))], [parts[part] for part in PARTS], width,
                  color=colour, label=name)
    left.set_yscale("log")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set_xticks([at + 0.4 - 0.4 / len(found) for at in range(len(PARTS))], PARTS)
    name_axes(left, "Residual stream", "layer", "relative difference")
    name_axes(right, "Whose rounding", "", "part of the squared shares")
    legend(left), legend(right)
    return figure
