"""Draws docs/house.png from the code: rooms on their floors, wider the more lines they have, and what they import.

    python docs/house.py

Rooms and arrows are read from the source by `ast`, floors from ORDER in tests/test_layout.py.
"""

import ast
from pathlib import Path
import random
import re
import textwrap

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
import numpy as np
from scipy.optimize import isotonic_regression

from jaxrl_fp16.lab.figures import ACCENT, FAINT, INK, PAPER, new_figure, save_png

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxrl_fp16"
# What goes round in one RL iteration: out of a room, into a room, as what.
ROUND = (
    ("sampling", "training/rollouts", "Rollout"), ("training/rollouts", "training/loops", "Graded"),
    ("training/loops", "training/updates", "Batch"), ("training/updates", "sampling", "params"),
)
TINT, BAND = "#fdf0e8", "#f5f6f8"  # of the rooms on that way, and of a floor
WIDTH, PER_LINE, SHAFT, GAP = 1.75, 0.45e-3, 0.1, 0.16  # inches: of a room, more for each line; of a shaft; between
HEIGHT, STOREY, EDGE = 0.78, 1.22, 0.62  # inches: of a room, of a floor; from a floor's middle to the picture's edge


# -- the code ------------------------------------------------------------------------------------


def room_of(name):
    """The room of a module, `training/loops/learn`: its folder or file at the root. Of a folder that holds folders
    alone each one is a room. None for such a folder's own `__init__`, and for the package's."""
    first, *rest = name.split("/")
    if [path.name for path in (PACKAGE / first).glob("*.py")] == ["__init__.py"]:
        return f"{first}/{rest[0]}" if rest else None
    return first or None


def imported(tree):
    """Dotted names that a module imports, by a statement or by `import_module` of a text or its beginning."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            yield next(part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))


def read_rooms():
    """`(lines, what it says of itself, rooms that it imports)`, each by room."""
    lines, about, imports = {}, {}, {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("__init__").rstrip("/")
        if (room := room_of(name)) is None:
            continue
        tree = ast.parse(path.read_text())
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
        about.setdefault(room, ast.get_docstring(tree))  # a folder's `__init__` comes first
        parts = (found.split(".") for found in imported(tree))
        others = {room_of("/".join(filter(None, rest))) for first, *rest in parts if first == PACKAGE.name}
        imports[room] = imports.get(room, set()) | others - {room, None}
    return lines, about, imports


def below(imports, room):
    """The rooms that `room` imports, by way of others too."""
    return imports[room].union(*(below(imports, other) for other in imports[room]))


def read_floors(imports):
    """Rooms from the bottom up, in ORDER's order: the next floor begins with a room that imports one of this floor."""
    tree = ast.parse((ROOT / "tests" / "test_layout.py").read_text())
    order = next(node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "ORDER")
    floors = [[]]
    for line in next(node.value for node in ast.walk(order) if isinstance(node, ast.Constant)).splitlines():
        rooms = {room_of(name) for name in line.split()}.difference([None], *floors)
        for room in sorted(rooms, key=lambda room: (len(below(imports, room)), room)):
            if imports[room] & set(floors[-1]):
                floors.append([])
            floors[-1].append(room)
    return floors


# -- where things are ----------------------------------------------------------------------------


def with_shafts(floors, imports):
    """`(nodes of each floor, pieces)`: an arrow passes a floor through a shaft there, which arrows to one room share.

    A node is a room or a shaft, (what passes it, floor). A piece of an arrow, (node above, node below, word, up), runs
    between two floors; word is one of ROUND's, or None. Arrows that a way over other rooms implies are left out.
    """
    level = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
    arrows = [(room, other, other, None, False) for room, found in imports.items()
              for other in found - set().union(*(below(imports, nearer) for nearer in found))]
    arrows += [(start, end, word, word, False) if level[start] > level[end] else (end, start, word, word, True)
               for start, end, word in ROUND]
    pieces = set()
    for top, bottom, passes, *look in arrows:
        stops = [top, *((passes, floor) for floor in range(level[top] - 1, level[bottom], -1)), bottom]
        pieces |= {(*ends, *look) for ends in zip(stops, stops[1:])}
    shafts = {node for piece in pieces for node in piece[:2] if isinstance(node, tuple)}
    nodes = [{*rooms, *(shaft for shaft in shafts if shaft[1] == floor)} for floor, rooms in enumerate(floors)]
    return [sorted(floor, key=str) for floor in nodes], sorted(pieces, key=str)


def place(floors, pieces, widths, tries=200):
    """The middle of every node, near those that pieces join it to: of many random beginnings what ends shortest."""
    joined = {node: [] for nodes in floors for node in nodes}
    for top, bottom, word, _ in pieces:
        joined[top] += [bottom] * (6 if word else 1)
        joined[bottom] += [top] * (6 if word else 1)

    def settled(seed):
        chance = random.Random(seed)
        middle = {node: chance.uniform(-5, 5) for node in joined}
        for nodes in floors * 30:
            wanted = {node: np.mean([middle[other] for other in joined[node]]) for node in nodes}
            middle |= spread(sorted(nodes, key=wanted.get), wanted, widths)
        return middle

    return min(map(settled, range(tries)),
               key=lambda middle: sum(abs(middle[node] - middle[other]) for node in joined for other in joined[node]))


def spread(nodes, wanted, widths):
    """Middles in the order of `nodes` that leave room for every width, by least squares nearest to `wanted`."""
    sizes = np.array([widths[node] + GAP for node in nodes])
    starts = np.cumsum(sizes) - sizes / 2
    return dict(zip(nodes, starts + isotonic_regression([wanted[node] for node in nodes] - starts).x))


def ports(pieces, end, middle, widths):
    """Where each piece is joined to its node at `end` (0: top, 1: bottom): along the room's edge, in the order of what
    the pieces lead to."""
    found = {}
    for node in {piece[end] for piece in pieces}:
        joined = sorted((piece for piece in pieces if piece[end] == node), key=lambda piece: middle[piece[1 - end]])
        for number, piece in enumerate(joined, 1):
            found[piece] = middle[node] + (number / (len(joined) + 1) - 0.5) * 0.6 * (widths[node] - SHAFT)
    return found


# -- the picture ---------------------------------------------------------------------------------


def draw():
    """Writes docs/house.png."""
    lines, about, imports = read_rooms()
    floors, pieces = with_shafts(read_floors(imports), imports)
    height = {node: STOREY * floor for floor, nodes in enumerate(floors) for node in nodes}
    widths = {node: WIDTH + PER_LINE * lines[node] if node in lines else SHAFT for node in height}
    middle = place(floors, pieces, widths)
    left, right = (f(middle[n] + side * (widths[n] / 2 + 0.15) for n in height) for f, side in ((min, -1), (max, 1)))
    top = STOREY * (len(floors) - 1) + EDGE
    figure, [[axes]] = new_figure(width=right - left, height=top + EDGE)
    axes.axis("off")
    axes.set(xlim=(left, right), ylim=(-EDGE, top))
    for floor in range(len(floors)):
        axes.axhspan(*(STOREY * floor + side * (HEIGHT / 2 + 0.07) for side in (-1, 1)), color=BAND, linewidth=0)
    starts, ends = (ports(pieces, end, middle, widths) for end in (0, 1))
    for piece in pieces:
        draw_piece(axes, piece, (starts[piece], height[piece[0]]), (ends[piece], height[piece[1]]))
    for room in lines:
        draw_room(axes, room, (middle[room], height[room]), widths[room], about[room])
    draw_key(axes, left + 0.2, top - 0.32, lines)
    save_png(figure, ROOT / "docs" / "house.png")


def draw_piece(axes, piece, start, end):
    """Down from a room's lower edge, or through a shaft, and on to the next floor; the head is where a room is."""
    (x, y), (u, v), (*nodes, word, up) = start, end, piece
    look = dict(color=ACCENT, linewidth=2.2, zorder=2) if word else dict(color=FAINT, linewidth=1.1, zorder=1)
    bend, in_shaft = (y - HEIGHT / 2 + v + HEIGHT / 2) / 2, isinstance(nodes[0], tuple)
    if in_shaft:
        axes.plot([x, x], [y - HEIGHT / 2, y + HEIGHT / 2], **look)
    points = [(x, y - HEIGHT / 2), (x, bend), (u, bend), (u, v + HEIGHT / 2)]
    curve = Curve(points[::-1] if up else points, [Curve.MOVETO, *[Curve.CURVE4] * 3])
    style = "-" if isinstance(nodes[0 if up else 1], tuple) else "-|>"
    axes.add_patch(FancyArrowPatch(path=curve, arrowstyle=style, mutation_scale=11, **look))
    if word and isinstance(nodes[1], str):
        axes.text(*((x, y) if in_shaft else ((x + u) / 2, bend)), word, ha="center", va="center", fontsize=9,
                  color=ACCENT, zorder=5, bbox=dict(facecolor=BAND if in_shaft else PAPER, edgecolor="none", pad=1))


def draw_room(axes, room, at, width, about):
    """Its name, and as much of what it says of itself as has room."""
    on, (x, y), text = any(room in arrow for arrow in ROUND), at, dict(ha="center", va="center", color=INK, zorder=4)
    axes.add_patch(FancyBboxPatch(
        (x - width / 2, y - HEIGHT / 2), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08", zorder=3,
        facecolor=TINT if on else PAPER, edgecolor=ACCENT if on else INK, linewidth=1.2,
    ))
    axes.text(x, y + 0.22, room, fontsize=11, weight="bold", **text)
    axes.text(x, y - 0.12, shortened(about, int(width * 15)), fontsize=8.5, **text)


def shortened(text, columns):
    """Two lines of the first sentence at most: as many of its clauses as they hold."""
    clauses = re.split(r"(?<=[,:;]) ", " ".join(text.replace("`", "").split()).split(". ")[0].rstrip("."))
    shown = [textwrap.fill(" ".join(clauses[:count]).rstrip(",:;"), columns, break_on_hyphens=False)
             for count in range(1, len(clauses) + 1)]
    return max((each for each in shown if each.count("\n") < 2), key=len, default=shown[0])


def draw_key(axes, x, y, lines):
    """What is to be seen, in the corner at the top that no room takes."""
    small, large = min(lines, key=lines.get), max(lines, key=lines.get)
    axes.text(x, y, "The house", fontsize=15, weight="bold", color=INK, va="center")
    for row, (colour, text) in enumerate((
        (FAINT, "imports (left out where another way leads there)"), (ACCENT, "what goes round in one RL iteration"),
        (None, f"a wider room has more lines: {small} {lines[small]:,}, {large} {lines[large]:,}"),
    ), 1):
        if colour is not None:
            axes.add_patch(FancyArrowPatch((x, y - 0.24 * row), (x + 0.45, y - 0.24 * row), arrowstyle="-|>",
                                           mutation_scale=11, color=colour, linewidth=1.6))
        axes.text(x + 0.5, y - 0.24 * row, text, fontsize=9, color=INK, va="center")


if __name__ == "__main__":
    draw()
