"""A report as one HTML file with text, tables, key numbers and pictures. It fetches nothing and runs nothing.

Every string is escaped here, so a frame name or a path cannot become markup. Pictures are embedded; an SVG is parsed, checked against the few
elements that a chart needs, and written anew. A content security policy tells the browser to load nothing else. The page follows the reader's light
or dark scheme, fits narrow and wide windows, and prints. Read next: `charts.py` for the pictures.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.provenance import Provenance
from .charts import number_text, numbers_text

_SVG = "{http://www.w3.org/2000/svg}"
_SVG_ELEMENTS = {
    *("svg", "g", "defs", "clipPath", "path", "line", "rect", "circle", "ellipse", "polyline", "polygon", "text", "tspan"),
    *("title", "desc"),
}
MOST_TABS = 40
_CHART = "<figure class=chart>"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Block:
    """A checked piece of HTML. Only the functions below make one."""

    html: str
    """Markup, written into the page as it is."""


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it."""

    title: str
    """Text of the heading."""
    blocks: Sequence[Block]
    """What stands under the heading, in order."""


def paragraph(text: str) -> Block:
    """Plain text.

    Args:
        text: The text; an empty line starts a new paragraph.

    Returns:
        One block.
    """
    return Block("".join(f"<p>{_text(part)}</p>" for part in text.split("\n\n") if part.strip()))


def table(header: Sequence[str], rows: Sequence[Sequence[str | int | float]], caption: str) -> Block:
    """A table. Numbers are short, aligned to the right, and have equal decimals within a column.

    Args:
        header: One name per column.
        rows: One value per column in each row; text stays as it is.
        caption: What the table shows.

    Returns:
        One block.

    Raises:
        InvalidInput: A row has another length than the header.
    """
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise InvalidInput(f"table {caption!r}: row {index} has {len(row)} cells, the header {len(header)}")
    numeric = [bool(rows) and all(not isinstance(row[k], str) for row in rows) for k in range(len(header))]
    head = "".join(f"<th scope=col{' class=number' if n else ''}>{_text(h)}</th>" for h, n in zip(header, numeric, strict=True))
    cells = zip(*(_column([row[k] for row in rows]) for k in range(len(header))), strict=True)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    body = body or f"<tr><td colspan={max(1, len(header))} class=quiet>no rows</td></tr>"
    return Block(
        f"<div class=scroll><table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure_png(png: bytes, caption: str, *, alt: str | None = None) -> Block:
    """An embedded PNG picture.

    Args:
        png: Bytes of the file.
        caption: Text under the picture.
        alt: What the picture shows, for a reader who cannot see it; the caption by default.

    Returns:
        One block.

    Raises:
        InvalidInput: The bytes are not a PNG file.
    """
    if not png.startswith(_PNG_SIGNATURE):
        raise InvalidInput(f"figure {caption!r}: expected the bytes of a PNG file, found {len(png)} bytes starting {png[:8]!r}")
    data = base64.b64encode(png).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{_text(alt if alt is not None else caption)}">'
    return Block(f"<figure class=picture>{image}<figcaption>{_text(caption)}</figcaption></figure>")


def figure_svg(svg: str, caption: str, *, alt: str | None = None) -> Block:
    """A chart as inline SVG, so that it takes the colors of the page.

    Args:
        svg: Text of one SVG element.
        caption: Text under the chart.
        alt: What the chart shows, for a reader who cannot see it; the chart's own title by default.

    Returns:
        One block.

    Raises:
        InvalidInput: The text is not well-formed, or holds an element, a link or a handler that a chart does not need.
    """
    if "<!" in svg:
        raise InvalidInput(f"figure {caption!r}: SVG with a document type, comment or CDATA section is not accepted")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise InvalidInput(f"figure {caption!r}: not well-formed SVG: {error}") from error
    for element in root.iter():
        _check_svg_element(element, caption)
    root.set("role", "img")
    root.set("aria-label", alt if alt is not None else root.get("aria-label") or caption)
    for element in root.iter():  # the HTML parser knows SVG without prefixes
        element.tag = element.tag.removeprefix(_SVG)
    inline = ElementTree.tostring(root, encoding="unicode")
    return Block(f"{_CHART}<div class=scroll>{inline}</div><figcaption>{_text(caption)}</figcaption></figure>")


def key_numbers(numbers: Sequence[tuple[str, str | int | float, str, str]]) -> Block:
    """The few numbers to read first.

    Args:
        numbers: (label, value, unit, note) each; unit and note may be empty.

    Returns:
        One block.
    """
    tiles = "".join(
        f"<div><dt>{_text(label)}</dt><dd><b>{_text(_value(value))}</b>"
        f"{f' <span class=unit>{_text(unit)}</span>' if unit else ''}"
        f"{f'<small>{_text(note)}</small>' if note else ''}</dd></div>"
        for label, value, unit, note in numbers
    )
    return Block(f"<dl class=key>{tiles}</dl>")


def columns(blocks: Sequence[Block]) -> Block:
    """Put blocks next to each other where the window is wide enough, else below each other.

    Args:
        blocks: The blocks, from left to right.

    Returns:
        One block.
    """
    return Block(f"<div class=columns>{''.join(f'<div>{block.html}</div>' for block in blocks)}</div>")


def tabs(parts: Sequence[tuple[str, Block]]) -> Block:
    """Show one of several blocks at a time; the reader chooses. It works without a script.

    Args:
        parts: (name, block) each, at most 40.

    Returns:
        One block.

    Raises:
        InvalidInput: There is no part, or there are too many.
    """
    if not 1 <= len(parts) <= MOST_TABS:
        raise InvalidInput(f"tabs need 1 to {MOST_TABS} parts, found {len(parts)}")
    group = hashlib.sha256("".join(name + block.html for name, block in parts).encode()).hexdigest()[:12]
    choices = "".join(
        f"<input type=radio name=t{group} id=t{group}-{i}{' checked' if i == 0 else ''}><label for=t{group}-{i}>{_text(name)}</label>"
        for i, (name, _) in enumerate(parts)
    )
    bodies = "".join(f"<div>{block.html}</div>" for _, block in parts)
    shown = ",".join(f"#t{group}-{i}:checked~.bodies>div:nth-child({i + 1})" for i in range(len(parts)))
    style = f"<style>.tabs .bodies>div{{display:none}}{shown}{{display:block}}</style>"
    return Block(f"{style}<div class=tabs>{choices}<div class=bodies>{bodies}</div></div>")


def page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    made_by: Provenance | None = None,
    next_steps: Sequence[tuple[str, str]] = (),
) -> str:
    """Join sections into a whole document. More than three sections get a list of contents. Charts that follow each other share the width.

    Args:
        title: Title of the page.
        sections: The sections in order.
        subtitle: One sentence under the title.
        made_by: Command, version, commit and date, which stand at the end.
        next_steps: What to do next with one's own data: (sentence, command) each; a command may be empty.

    Returns:
        The HTML document.
    """
    if next_steps:
        sections = [*sections, Section("What to do next with your own data", [_steps(next_steps)])]
    body = "".join(
        f"<section id=s{index}><h2>{_text(section.title)}</h2>{_side_by_side(section.blocks)}</section>"
        for index, section in enumerate(sections)
    )
    foot = ""
    if made_by is not None:
        foot = f"<footer><p>{_text(made_by.sentence())}</p><pre>{_text(made_by.command)}</pre></footer>"
    links = "".join(f"<li><a href=#s{index}>{_text(section.title)}</a></li>" for index, section in enumerate(sections))
    contents = f"<nav aria-label=Contents><ul>{links}</ul></nav>" if len(sections) > 3 else ""
    lead = f"<p class=lead>{_text(subtitle)}</p>" if subtitle else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><main><header><h1>{_text(title)}</h1>{lead}{contents}</header>\n{body}\n{foot}</main></body></html>\n"
    )


def _steps(steps: Sequence[tuple[str, str]]) -> Block:
    items = "".join(f"<li>{_text(text)}{f'<pre>{_text(command)}</pre>' if command else ''}</li>" for text, command in steps)
    return Block(f"<ol>{items}</ol>")


def _side_by_side(blocks: Sequence[Block]) -> str:
    """The blocks in order; charts that follow each other stand next to each other where the window is wide enough."""
    parts: list[str] = []
    for charts, run in itertools.groupby(blocks, key=lambda block: block.html.startswith(_CHART)):
        html = [block.html for block in run]
        parts.append(
            f"<div class={'charts' if len(html) > 1 else 'chart-alone'}>{''.join(html)}</div>" if charts else "".join(html)
        )
    return "".join(parts)


def write_html(path: Path | str, html: str) -> None:
    """Write a page atomically, so that nobody sees half a report.

    Args:
        path: File to write.
        html: What `page` returned.
    """
    write_atomically(Path(path), html.encode("utf-8"))


def _text(text: str) -> str:
    """Escaped for text and for quoted attributes, without lone surrogates or control characters."""
    clean = "".join(c if c in "\n\t" or (c >= " " and not 0xD800 <= ord(c) <= 0xDFFF) else "\ufffd" for c in text)
    return escape(clean, quote=True)


def _value(value: str | int | float) -> str:
    return value if isinstance(value, str) else number_text(value)


def _column(values: Sequence[str | int | float]) -> list[str]:
    """The cells of one column of a table."""
    numbers = iter(numbers_text([value for value in values if not isinstance(value, str)]))
    return [
        f"<td>{_text(value)}</td>" if isinstance(value, str) else f"<td class=number>{_text(next(numbers))}</td>"
        for value in values
    ]


def _check_svg_element(element: ElementTree.Element, caption: str) -> None:
    tag = str(element.tag)
    if tag.removeprefix(_SVG) not in _SVG_ELEMENTS:
        raise InvalidInput(f"figure {caption!r}: SVG element {tag!r} is not accepted; allowed: {sorted(_SVG_ELEMENTS)}")
    for name, value in element.attrib.items():
        outside = "url(" in value.lower().replace("url(#", "")
        if name.startswith(("{", "on")) or name in ("href", "src", "style") or outside:
            raise InvalidInput(f"figure {caption!r}: SVG attribute {name}={value[:40]!r} is not accepted in a report")


_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#1b2228;--quiet:#5b6670;--line:#d9dee3;--accent:#0072b2}
@media (prefers-color-scheme:dark){:root{--page:#12161a;--card:#1b2127;--ink:#e6eaee;--quiet:#9aa5b0;--line:#333c45;--accent:#56b4e9}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 8px}h2{font-size:1.3rem;margin:0 0 12px}
p{max-width:75ch;margin:0 0 14px;overflow-wrap:anywhere}.lead,.quiet,figcaption,caption,small,.unit{color:var(--quiet)}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:12px 0 0}a{color:var(--accent)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px;margin-top:20px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:4px 24px;align-items:start}
.columns>div{min-width:0}
figure{margin:0 0 18px}figcaption{font-size:.88rem;margin-top:6px;max-width:75ch;overflow-wrap:anywhere}
.picture img{display:block;max-width:100%;height:auto;border-radius:6px;border:1px solid var(--line)}
.chart svg{display:block;width:100%;min-width:400px;height:auto;color:var(--ink)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:4px 24px;align-items:start}
.charts>figure{min-width:0}.chart-alone{max-width:820px}
footer{margin-top:24px;color:var(--quiet);font-size:.88rem}
pre{margin:4px 0 12px;padding:8px 10px;background:var(--page);border:1px solid var(--line);border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.93rem;margin:0 0 18px;min-width:50%}
caption{text-align:left;padding-bottom:6px;font-size:.88rem}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600;border-bottom-width:2px}.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.key{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px;margin:0 0 18px}
.key>div{border-left:3px solid var(--accent);padding:2px 0 2px 12px}.key dt{font-size:.88rem;color:var(--quiet)}
.key dd{margin:0}.key b{font-size:1.7rem;line-height:1.25;font-variant-numeric:tabular-nums}.key small{display:block}
@media (max-width:560px){main{padding:16px 10px 40px}section{padding:14px 12px}h1{font-size:1.5rem}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--quiet:#444;--line:#bbb;--accent:#005a8c}
body{font-size:11pt}main{max-width:none;padding:0}section{border:0;padding:0}nav{display:none}
figure,table,.key>div{break-inside:avoid}h2{break-after:avoid}.chart svg{min-width:0;max-width:560px}}
"""
