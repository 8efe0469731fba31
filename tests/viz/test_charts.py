"""Charts: well-formed and repeatable SVG, values at their places, names that cannot become markup, honest about what is left out."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.recipes.method_styles import METHOD_STYLES, style_of
from upcycle3d.perception.viz.charts import Series, bar_chart, gap_chart, line_chart, number_text, numbers_text, stacked_bars
from upcycle3d.perception.viz.svg import _log_ticks, color_of

NS = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{NS}text")]


def place(svg: str, text: str) -> tuple[float, float]:
    """x, y of the text element that says exactly ``text``."""
    found = [e for e in ElementTree.fromstring(svg).iter(f"{NS}text") if e.text == text]
    assert len(found) == 1, (text, texts(svg))
    return float(found[0].get("x", "nan")), float(found[0].get("y", "nan"))


def paths(svg: str) -> list[list[tuple[float, float]]]:
    drawn = [e.get("d", "") for e in ElementTree.fromstring(svg).iter(f"{NS}path")]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", d)] for d in drawn]


def all_charts(name: str = "a") -> list[str]:
    return [
        line_chart([Series(name, [0, 1, 2], [3.0, 1.0, 2.0])], "step", "loss", name, smooth=3),
        bar_chart([name, "b"], [1.0, -2.0], [0.1, 0.2], value_label="kB per frame", title=name, highlight=0),
        gap_chart(40.0, [(name, 50.0)], 60.0, value_label="AP (%)", title=name),
        stacked_bars([name], [(name, [1.0]), ("zstd", [2.0])], value_label="ms", title=name),
    ]


def test_every_chart_is_well_formed_and_the_same_input_gives_the_same_text() -> None:
    for once, again in zip(all_charts(), all_charts(), strict=True):
        assert ElementTree.fromstring(once).tag == f"{NS}svg"
        assert once == again


def test_a_name_cannot_become_markup() -> None:
    name = '<script>"&\x00'
    for svg in all_charts(name):
        assert "<script" not in svg
        tags = {element.tag.removeprefix(NS) for element in ElementTree.fromstring(svg).iter()}
        assert tags <= {"svg", "text", "line", "rect", "circle", "polyline", "path"}
        assert any('<script>"&' in text for text in texts(svg))


def test_no_data_gives_a_chart_that_says_so() -> None:
    for svg in (
        line_chart([], "step", "loss", "t"),
        line_chart([Series("a", [], [])], "step", "loss", "t"),
        line_chart([Series("a", [1], [math.nan])], "step", "loss", "t", log_y=True),
        bar_chart([], [], value_label="kB", title="t"),
        stacked_bars([], [], value_label="ms", title="t"),
    ):
        assert "no data" in texts(svg)
    ElementTree.fromstring(gap_chart(1.0, [], 2.0, value_label="AP", title="t"))


def test_a_line_runs_left_to_right_up_where_it_grows_and_breaks_where_a_value_is_missing() -> None:
    svg = line_chart([Series("a", [0, 1, 2, 3, 4], [0.0, 1.0, math.nan, 3.0, 4.0])], "x", "y", "t")
    (points,) = paths(svg)
    assert len(points) == 4
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    assert svg.count("M") == 2
    assert place(svg, "a")[0] > points[-1][0]  # named at its end


def test_a_logarithmic_axis_gives_equal_steps_to_equal_ratios_and_counts_what_it_cannot_show() -> None:
    svg = line_chart([Series("a", [0, 1, 2, 3], [1.0, 10.0, 100.0, 0.0])], "x", "y", "t", log_y=True)
    ys = [y for _, y in paths(svg)[0]]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert any(text.startswith("1 values of 0 or less") for text in texts(svg))


def test_smoothing_is_a_centerd_running_mean_that_the_chart_states() -> None:
    raw, smooth = paths(line_chart([Series("a", range(5), [0.0, 3.0, 0.0, 3.0, 0.0])], "x", "y", "t", smooth=3))
    top, bottom = raw[1][1], raw[0][1]
    heights = [(bottom - y) / (bottom - top) * 3 for _, y in smooth]
    assert heights == pytest.approx([1.5, 1, 2, 1, 1.5], abs=0.02)
    assert any("running mean of 3 points" in t for t in texts(line_chart([Series("a", [0], [1])], "x", "y", "t", smooth=3)))


def test_a_long_run_keeps_its_spike_in_a_small_file() -> None:
    y = np.ones(20_000)
    y[12_345] = 50.0
    svg = line_chart([Series("a", np.arange(20_000).tolist(), y.tolist())], "x", "y", "t")
    (points,) = paths(svg)
    assert len(svg) < 15_000
    assert min(p[1] for p in points) < max(p[1] for p in points) - 200


def test_names_at_line_ends_do_not_overlap() -> None:
    svg = line_chart([Series(f"s{k}", [0, 1], [0.0, 1.0 + k * 1e-3]) for k in range(8)], "x", "y", "t")
    ys = sorted(place(svg, f"s{k}")[1] for k in range(8))
    assert min(np.diff(ys)) >= 15.9


def test_bars_are_as_long_as_their_values_and_the_highlight_is_colored() -> None:
    svg = bar_chart(["a", "b"], [10.0, 40.0], value_label="kB", title="t", highlight=1)
    a, b = list(ElementTree.fromstring(svg).iter(f"{NS}rect"))
    assert float(b.get("width", 0)) == pytest.approx(4 * float(a.get("width", 0)), abs=0.5)
    assert a.get("fill") != b.get("fill")


def test_the_closed_gap_is_the_share_of_the_way_to_the_oracle() -> None:
    svg = gap_chart(40.0, [("ours", 54.6), ("worse", 39.1)], 60.0, value_label="AP (%)", title="t")
    assert {"73 %", "\u22124 %", "source-only 40.0", "oracle 60.0"} <= set(texts(svg))
    assert place(svg, "54.6")[0] > place(svg, "39.1")[0]


def test_where_there_is_no_gap_no_share_is_given() -> None:
    said = texts(gap_chart(60.0, [("ours", 55.0)], 60.0, value_label="AP (%)", title="t"))
    assert not any(text.endswith(" %") for text in said)
    assert any("no gap to close" in text for text in said)


def test_stacked_parts_follow_one_another_and_end_with_their_sum() -> None:
    svg = stacked_bars(["frame"], [("voxelise", [10.0]), ("backbone", [30.0])], value_label="ms", title="t")
    parts = [r for r in ElementTree.fromstring(svg).iter(f"{NS}rect") if float(r.get("height", 0)) > 15]
    first, second = [(float(r.get("x", 0)), float(r.get("width", 0))) for r in parts]
    assert second[0] == pytest.approx(first[0] + first[1], abs=0.2)
    assert second[1] == pytest.approx(3 * first[1], abs=0.5)
    assert "40" in texts(svg)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Series("a", [1], [1, 2]),
        lambda: bar_chart(["a"], [1.0, 2.0], value_label="", title=""),
        lambda: bar_chart(["a"], [math.nan], value_label="", title=""),
        lambda: gap_chart(1.0, [("a", 1.0)], math.inf, value_label="", title=""),
        lambda: gap_chart(1.0, [("a", 1.0)], 2.0, value_label="", title="", errors=[]),
        lambda: stacked_bars(["a"], [("s", [-1.0])], value_label="", title=""),
        lambda: stacked_bars(["a"], [("s", [])], value_label="", title=""),
        lambda: line_chart([], "", "", "", smooth=0),
    ],
)
def test_contradictions_are_refused(make) -> None:
    with pytest.raises(InvalidInput):
        make()


@pytest.mark.parametrize("value", [0.0, 1e-9, -3.0, 7.0, 1e9])
def test_equal_values_have_an_axis(value: float) -> None:
    ElementTree.fromstring(line_chart([Series("a", [5, 5], [value, value])], "x", "y", "t"))
    ElementTree.fromstring(line_chart([Series("a", [5, 6], [value, value])], "x", "y", "t", log_y=True))
    ElementTree.fromstring(bar_chart(["a"], [value], value_label="v", title="t"))
    ElementTree.fromstring(gap_chart(value, [("a", value)], value, value_label="v", title="t"))


def test_numbers_are_written_as_a_person_would() -> None:
    assert [number_text(v) for v in (0, 12, 3.14159, 61.06, 1920.4, 0.4, -2.5)] == [
        "0", "12", "3.14", "61.1", "1\u2009920", "0.400", "\u22122.50",
    ]  # fmt: skip
    assert number_text(math.nan) == "\u2013"
    assert numbers_text([38.21, 21.0, math.nan]) == ["38.2", "21.0", "\u2013"]
    assert numbers_text([120.0, 0.004]) == ["120", "0.004"]  # not "0"


@pytest.mark.parametrize(("low", "high"), [(9.999999999999999e-4, 1e-3), (0.05, 3.0), (1.0, 1e12), (1e-9, 1.0), (2.0, 2.0)])
def test_a_logarithmic_axis_covers_its_values_with_few_round_numbers(low: float, high: float) -> None:
    ticks = _log_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 1 <= len(ticks) <= 8
    assert all(f"{tick:.0e}"[0] in "125" for tick in ticks)


def test_a_method_keeps_its_color_in_every_chart() -> None:
    def colors(svg: str, kind: str, attribute: str) -> set[str]:
        return {e.get(attribute, "") for e in ElementTree.fromstring(svg).iter(f"{NS}{kind}")}

    wanted = color_of(style_of("upcycling"))
    alone = line_chart([Series("upcycling", [0, 1], [1.0, 2.0], style_of("upcycling"))], "x", "y", "t")
    second = line_chart(
        [
            Series("hybrid", [0, 1], [2.0, 1.0], style_of("hybrid")),
            Series("upcycling", [0, 1], [1.0, 2.0], style_of("upcycling")),
        ],
        "x",
        "y",
        "t",
    )
    assert colors(alone, "path", "stroke") == {wanted}
    assert wanted in colors(second, "path", "stroke")
    assert wanted in colors(
        gap_chart(1.0, [("hybrid", 2.0), ("upcycling", 3.0)], 4.0, value_label="AP", title="t", styles=METHOD_STYLES),
        "circle",
        "fill",
    )
    assert wanted in colors(
        bar_chart(["upcycling"], [1.0], value_label="AP", title="t", styles=[style_of("upcycling")]), "rect", "fill"
    )
    assert style_of("source training") == style_of("source_only")
    assert len(set(METHOD_STYLES.values())) == len(METHOD_STYLES)
