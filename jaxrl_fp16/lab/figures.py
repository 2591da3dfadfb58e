"""How every plot here looks: one colour a precision, one set of axes, light and dark.

A figure is drawn once, in the light colours. Inside a page `svg_of` turns each
colour into a CSS variable, so that the page's theme recolours it.
"""

import io
import re

INK, FAINT, GRID, PAPER = "#1f2933", "#9aa5b1", "#d9dee4", "#ffffff"
ACCENT, SECOND, THIRD, FOURTH = "#c2410c", "#1d4ed8", "#0f766e", "#7e22ce"
SERIES = (ACCENT, SECOND, THIRD, FOURTH)
PRECISIONS = {"fp16": ACCENT, "bf16": SECOND, "fp32": THIRD}

# CSS variable -> (light, dark). What is drawn in a light colour follows the theme.
THEME = {
    "--ink": (INK, "#e4e7eb"),
    "--faint": (FAINT, "#8593a3"),
    "--grid": (GRID, "#323f4b"),
    "--paper": (PAPER, "#151b22"),
    "--accent": (ACCENT, "#fb923c"),
    "--second": (SECOND, "#7aa7ff"),
    "--third": (THIRD, "#2dd4bf"),
    "--fourth": (FOURTH, "#d8b4fe"),
}


def colour_of(precision, place=0):
    """The colour of a precision's name, in every plot the same; of any other name the `place`-th that is free."""
    free = [colour for colour in SERIES if colour not in PRECISIONS.values()]
    return PRECISIONS.get(precision, free[place % len(free)])


def new_figure(rows=1, columns=1, *, title=None, width=10.0, height=3.2, **subplots):
    """`(figure, axes [rows, columns])` in the house look; sizes in inches, `height` of one row."""
    import matplotlib.figure  # here: it takes half a second, and only plots need it

    figure = matplotlib.figure.Figure(figsize=(width, rows * height), layout="constrained", facecolor=PAPER)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    for each in axes.flat:
        _dress(each)
    return figure, axes


def _dress(axes):
    axes.set_facecolor(PAPER)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=8)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.get_major_formatter().set_useOffset(False)   # a tick reads 0.9999, not 9 with 1e-5+9.999e-1 above it


def name_axes(axes, title, x=None, y=None):
    """What a plot shows, above it on the left, and along which axes."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x or "", color=INK, fontsize=9)
    axes.set_ylabel(y or "", color=INK, fontsize=9)


def legend(axes, **where):
    """A legend without a frame, in ink; `where` as matplotlib's `legend` takes it."""
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, **where)


def save_png(figure, path, dpi=120):
    """Writes `figure` in its light colours and gives the path."""
    figure.savefig(path, dpi=dpi, facecolor=PAPER)
    return path


def svg_of(figure):
    """`figure` as an `<svg>` element for a page: its text is text, its colours are the theme's variables.

    What is drawn with `rasterized=True`, as thousands of points should be, is embedded as a picture, which a
    dark page brightens: give such points a colour of SERIES, not INK.
    """
    import matplotlib

    out = io.StringIO()
    # A fixed salt: the same plots give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxrl_fp16"}):
        figure.savefig(out, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    text = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    for name, (light, _) in THEME.items():
        svg = svg.replace(light, f"var({name})")
    return svg
