"""Pages: nothing of a page is fetched, run or left unescaped, and figures follow its theme."""

import pytest

from jaxrl_fp16.lab.figures import INK, THEME, colour_of, legend, name_axes, new_figure, save_png, svg_of
from jaxrl_fp16.lab.page import Figure, Section, Table, write_page


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
    path = write_page(tmp_path / "report.html", "title", "lead", [section])
    seen = read_page(path)
    assert {"svg", "table", "h2", "figcaption"} <= set(seen.tags)
    assert {"a <heading>", "one & two", "three", "<x>", "1.5"} <= set(seen.text)
    assert seen.tags.count("p") == 3


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
