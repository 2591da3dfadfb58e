"""A report as one HTML file: sections of text, tables, figures, light or dark, that loads nothing from a network."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import jinja2
from markupsafe import Markup

from jaxrl_fp16.lab.figures import THEME


NUMBER = 26     # letters at most in a column of numbers; one with a longer cell is of sentences, which may be wrapped


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells are shown as text; the first column names the row, numbers in the others are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """An `<svg>` element, as `figures.svg_of` gives it, and what is to be seen in it."""

    svg: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    heading: str
    text: str = ""                       # paragraphs, an empty line between two
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    folded: bool = False                 # seen once its heading is clicked: how it was found, and every number


def said_once(table, names):
    """`table` without those of its columns `names` that say the same in every row of several: its caption says it.

    A column of dashes alone says nothing, and is left out without a word.
    """
    seen = {name: {str(cell) for cell in cells} for name, cells in zip(table.columns, zip(*table.rows))}
    same = {name: seen[name].pop() for name in names if len(table.rows) > 1 and len(seen.get(name, ())) == 1}
    kept = [place for place, name in enumerate(table.columns) if name not in same]
    said = "; ".join(f"{name}: {text}" for name, text in same.items() if text != "-")
    caption = ". ".join(filter(None, [table.caption.rstrip("."), f"In every row {said}" if said else ""]))
    rows = [[row[place] for place in kept] for row in table.rows]
    return Table([table.columns[place] for place in kept], rows, f"{caption}." if caption else "") if same else table


def write_page(path, title, lead, sections):
    """Writes the page and gives its path. Text is escaped everywhere; an SVG is taken as it is.

    lead: the answer in a few sentences, each a paragraph above everything. Its policy forbids
    the page to load or run anything.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["paragraphs"] = lambda text: [part.strip() for part in text.split("\n\n") if part.strip()]
    environment.filters["drawing"] = Markup
    environment.filters["kinds"] = _kinds
    light, dark = (_variables(place) for place in range(2))
    page = environment.from_string(PAGE).render(title=title, lead=lead, sections=sections, light=light, dark=dark)
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _kinds(table):
    """Of each column, the attribute of its cells: whether they are sentences."""
    longest = [max((len(str(row[place])) for row in table.rows), default=0) for place in range(len(table.columns))]
    return [Markup(' class="words"') if place and length > NUMBER else "" for place, length in enumerate(longest)]


def _variables(place):
    return " ".join(f"{name}: {colours[place]};" for name, colours in THEME.items())


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
:root { {{ light }} color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { {{ dark }} } figure svg image { filter: brightness(1.7); } }
body { margin: 2.5rem auto; max-width: 72rem; padding: 0 1.25rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--grid); padding-top: 1.25rem; }
p { max-width: 46rem; margin: .5rem 0; }
p.lead { font-size: 1.1rem; }
figure { margin: 1.25rem 0; }
figure svg { width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption, caption { color: var(--ink); opacity: .75; font-size: .875rem; text-align: left; padding: .25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom-color: var(--faint); }
td:not(.words) { white-space: nowrap; }
th.words, td.words { text-align: left; min-width: 10rem; }
summary { cursor: pointer; }
summary h2 { display: inline; border: 0; margin: 0; padding: 0; }
details { margin-top: 2.5rem; border-top: 1px solid var(--grid); padding-top: 1.25rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for sentence in lead %}
<p class="lead">{{ sentence }}</p>
{% endfor %}
{% for section in sections %}
<section>
{% if section.folded %}
<details><summary><h2>{{ section.heading }}</h2></summary>
{% else %}
<h2>{{ section.heading }}</h2>
{% endif %}
{% for paragraph in section.text | paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
<div class="wide"><table>
{% if table.caption %}<caption>{{ table.caption }}</caption>{% endif %}
{% set kinds = table | kinds %}
<thead><tr>
{% for name in table.columns %}<th scope="col"{{ kinds[loop.index0] }}>{{ name }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td{{ kinds[loop.index0] }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% for figure in section.figures %}
<figure>{{ figure.svg | drawing }}
{% if figure.caption %}<figcaption>{{ figure.caption }}</figcaption>{% endif %}
</figure>
{% endfor %}
{% if section.folded %}
</details>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
