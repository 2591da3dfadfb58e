"""Pages: nothing of a page is fetched, run or left unescaped, and figures follow its theme."""

import dataclasses

import pytest

from jaxrl_fp16.lab.figures import INK, THEME, colour_of, legend, name_axes, new_figure, save_png, svg_of
from jaxrl_fp16.lab.page import Figure, Section, Table, said_once, write_page


def two_plots():
    figure, axes = new_figure(1, 2, title="two plots")
    for place, name in enumerate(("fp16", "bf16")):
        axes[0, 0].plot([0, 1], [place, 1], color=colour_of(name), label=name)
    axes[0, 1].scatter(range(50), range(50), color=INK, rasterized=True)
    name_axes(axes[0, 0], "a line", "step", "reward")
    legend(axes[0, 0])
    return figure


@pytest.fixture
def drawn():
    return two_plots()


def test_a_page_is_whole_and_asks_for_nothing(tmp_path, drawn, read_page):
    section = Section("a <heading>", "one & two\n\nthree", [Table(("a", "b"), [("<x>", 1.5)], "caption")],
                      [Figure(svg_of(drawn), "seen")])
    path = write_page(tmp_path / "report.html", "title", ["lead"], [section])
    seen = read_page(path)
    assert {"svg", "table", "h2", "figcaption"} <= set(seen.tags)
    assert {"a <heading>", "one & two", "three", "<x>", "1.5"} <= set(seen.text)
    assert seen.tags.count("p") == 3


def test_what_is_folded_is_there_and_closed(tmp_path, read_page):
    sections = [Section("open", "seen"), Section("how", "by Student's t", [Table(("a",), [("b",)])], folded=True)]
    path = write_page(tmp_path / "report.html", "title", ["Who.", "By how much."], sections)
    seen = read_page(path)
    assert seen.text.index("Who.") < seen.text.index("By how much.") < seen.text.index("open")
    assert seen.tags.count("details") == seen.tags.count("summary") == 1
    assert "<details><summary><h2>how" in path.read_text()
    assert "by Student's t" in seen.text and seen.tags.index("details") < seen.tags.index("table")


def test_what_every_row_says_is_said_once():
    rows = [("a", 1, "-", "no difference"), ("b", 2, "-", "no difference")]
    table = Table(("", "value", "p", "verdict"), rows, "one against two")
    short = said_once(table, ("value", "p", "verdict"))
    assert (short.columns, short.rows) == (["", "value"], [["a", 1], ["b", 2]])
    assert short.caption == "one against two. In every row verdict: no difference."
    assert said_once(table, ("value",)) == table
    one = Table(table.columns, rows[:1])
    assert said_once(one, ("p", "verdict")) == one and said_once(Table(("a", "b"), []), ("b",)).rows == []
    other = dataclasses.replace(table, rows=[rows[0], (*rows[1][:3], "a difference")])
    assert said_once(other, ("verdict",)) == other


def test_a_figure_follows_the_theme(drawn):
    svg = svg_of(drawn)
    assert "var(--accent)" in svg and "var(--second)" in svg and "data:image/png;base64" in svg
    assert not [light for light, _ in THEME.values() if light in svg]
    assert ">reward</text>" in svg


def test_the_same_plots_give_the_same_bytes(drawn):
    assert svg_of(drawn) == svg_of(two_plots())


def test_precisions_keep_their_colours():
    colours = [colour_of(name) for name in ("fp16", "bf16", "fp32")]
    assert len({*colours, colour_of("else")}) == 4


def test_a_png_is_written(tmp_path, drawn):
    assert save_png(drawn, tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
