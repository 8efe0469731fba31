"""The report: one file that fetches nothing and runs nothing, whatever the strings in it say."""

import io
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.provenance import Provenance
from upcycle3d.perception.viz.charts import Series, bar_chart, line_chart
from upcycle3d.perception.viz.html import (
    Section,
    columns,
    figure_png,
    figure_svg,
    key_numbers,
    page,
    paragraph,
    table,
    write_html,
)

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)> \x00 ' &amp;"


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "png")
    return out.getvalue()


class Document(HTMLParser):
    """The elements and attributes that a browser would see, and whether they close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(text: str) -> str:
    svg = line_chart([Series(text, [0, 1], [1.0, 2.0])], text, text, text)
    blocks = [
        paragraph(text),
        table([text, "b"], [[text, 1.5]], text),
        figure_png(png(), text, alt=text),
        columns([figure_svg(svg, text, alt=text), figure_svg(bar_chart([text], [1.0], value_label=text, title=text), text)]),
        key_numbers([(text, text, text, text)]),
    ]
    return page(text, [Section(text, blocks)] * 4, subtitle=text)


def test_no_string_can_become_markup() -> None:
    plain, evil = Document(report(re.sub(r"\S", "x", EVIL))), Document(report(EVIL))
    assert evil.tags == plain.tags
    assert [name for name, _ in evil.attributes] == [name for name, _ in plain.attributes]
    assert "script" not in evil.tags
    assert EVIL.replace("\x00", "\ufffd") in evil.text
    assert not evil.open


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    html = report("plain")
    for name, value in Document(html).attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "#")), value
    assert not re.search(r"@import|url\(|https?://", html)
    assert "default-src 'none'" in html


def test_pictures_have_an_alternative_text() -> None:
    html = page("t", [Section("s", [figure_png(png(), "a scene"), figure_svg("<svg/>", "a chart")])])
    assert '<img src="data:image/png;base64,' in html
    assert 'alt="a scene"' in html
    assert 'aria-label="a chart"' in html


@pytest.mark.parametrize(
    "svg",
    [
        "<svg",
        "<svg><script>1</script></svg>",
        '<svg xmlns="http://www.w3.org/2000/svg"><foreignObject/></svg>',
        '<svg onload="x()"/>',
        '<svg><text style="background:url(http://x)">a</text></svg>',
        '<svg><rect fill="url(http://x/)"/></svg>',
        '<svg xmlns:x="http://www.w3.org/1999/xlink"><g x:href="http://x"/></svg>',
        '<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>',
        "<svg><text><![CDATA[<script>]]></text></svg>",
        "<html/>",
        "<svg><style>*{}</style></svg>",
    ],
)
def test_an_svg_that_is_more_than_a_chart_is_refused(svg: str) -> None:
    with pytest.raises(InvalidInput, match="figure 'c'"):
        figure_svg(svg, "c")


def test_what_is_not_a_png_and_a_row_of_another_length_are_refused() -> None:
    with pytest.raises(InvalidInput, match="PNG"):
        figure_png(b"GIF89a", "c")
    with pytest.raises(InvalidInput, match="row 1 has 1 cells"):
        table(["a", "b"], [["1", "2"], ["1"]], "c")


def test_a_table_aligns_numbers_and_writes_missing_ones_as_a_dash() -> None:
    html = table(["method", "AP (%)"], [["ours", 52.94], ["other", math.nan], ["third", 7]], "c").html
    assert "<th scope=col>method</th><th scope=col class=number>AP (%)</th>" in html
    assert [cell for cell in re.findall(r"<td class=number>(.*?)</td>", html)] == ["52.9", "\u2013", "7.0"]
    assert "no rows" in table(["a"], [], "c").html
    assert "no rows" in table([], [], "c").html


def test_an_empty_page_is_a_page() -> None:
    document = Document(page("t", []))
    assert not document.open
    assert "nav" not in document.tags
    assert paragraph("").html == ""
    assert paragraph("a\n\nb").html == "<p>a</p><p>b</p>"


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "demo" / "report.html"
    write_html(target, "first \u00e9")
    assert target.read_text(encoding="utf-8") == "first \u00e9"

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_html(target, "second")
    assert target.read_text(encoding="utf-8") == "first \u00e9"
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


def test_a_page_says_what_made_it_and_what_to_do_next() -> None:
    made = Provenance(
        command="upcycle3d demo --out <x>", version="0.2.0", commit="abc with changed files", date="2026-11-29 22:17 +0000"
    )
    html = page("t", [], made_by=made, next_steps=[("Train on yours.", "upcycle3d train small")])
    assert "Made on 2026-11-29 22:17 +0000 with upcycle3d 0.2.0, commit abc with changed files." in html
    assert "<pre>upcycle3d demo --out &lt;x&gt;</pre>" in html
    assert "What to do next with your own data" in html
    assert "<pre>upcycle3d train small</pre>" in html


def test_charts_that_follow_each_other_share_the_width() -> None:
    chart = figure_svg("<svg/>", "a chart")
    html = page("t", [Section("s", [paragraph("x"), chart, chart]), Section("u", [chart])])
    assert html.count("<div class=charts>") == 1
    assert html.count("<div class=chart-alone>") == 1
