"""The page is small, says how it rounds, loads nothing, and no text from data becomes markup or script."""

import base64
import hashlib
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import viewers_scene

import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.viewers import html_page
from upcycle3d.perception.viewers.drawn_frame import DrawnFrame
from upcycle3d.perception.viewers.html_page import write_viewer_page


def frames_of(path: Path) -> Any:
    """What the page holds, as its script reads it."""
    (text,) = re.findall(r'<script type="application/json" id="frames">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def places(packed: dict[str, Any], name: str) -> np.ndarray:
    whole = np.frombuffer(base64.b64decode(packed[name]), "<u2").reshape(-1, 3)
    return np.array(packed["origin"]) + whole * np.array(packed["steps"])


def test_a_page_of_150_000_points_and_100_boxes_is_below_8_megabytes(tmp_path):
    boxes = [[float(i), 0.0, 0.0, 4.0, 2.0, 1.5, 0.1] for i in range(100)]
    frame = replace(viewers_scene.frame(points=150_000), detections=viewers_scene.predictions(boxes, [0.5] * 100))
    page = write_viewer_page(tmp_path / "page.html", [frame], title="size")
    assert page.bytes == (tmp_path / "page.html").stat().st_size < 8_000_000
    assert (page.points, page.points_left_out) == (150_000, 0)


def test_points_and_cells_are_rounded_by_no_more_than_the_page_says(tmp_path):
    frame = replace(viewers_scene.frame(), detections=viewers_scene.predictions([[1 / 3, 0.0, 0.0, 4.0, 2.0, 1.5, 0.5]], [0.5]))
    page = write_viewer_page(tmp_path / "page.html", [frame], title="rounding")
    data = frames_of(tmp_path / "page.html")
    packed = data["frames"][0]
    drawn, points = places(packed["points"], "xyz"), frame.points_to_draw()
    nearest = np.abs(drawn[:, None] - points.xyz[None]).max(2)
    off = nearest.min(1)
    assert off.max() <= page.rounding * 1.01
    assert sorted(nearest.argmin(1)) == list(range(200))  # every point once, in another order
    assert f"{1000 * page.rounding:.2g} mm" in data["rounding"]
    written = [layer["boxes"] for layer in packed["layers"]]
    exact = [layer.boxes for layer in frame.layers()]
    off = max(float(np.abs(np.array(a) - b).max()) for a, b in zip(written, exact, strict=True) if len(b))
    assert 0 < off <= 0.00005 + 1e-9
    assert "those of boxes by 0.05 mm" in data["rounding"]
    shades = np.frombuffer(base64.b64decode(packed["points"]["intensity"]), np.uint8)
    np.testing.assert_allclose(shades / 255, points.intensity[nearest.argmin(1)], atol=0.5 / 255 + 1e-6)
    assert sorted(places(packed["cells"], "centers").round(3).tolist()) == frame.cells_to_draw().centers.tolist()


def test_thinning_keeps_a_share_of_the_points_and_counts_the_rest(tmp_path):
    page = write_viewer_page(tmp_path / "page.html", [viewers_scene.frame(points=500)], title="thin", most_points=120)
    assert (page.points, page.points_left_out) == (120, 380)
    packed = frames_of(tmp_path / "page.html")["frames"][0]["points"]
    assert (packed["count"], packed["of"]) == (120, 500)
    again = write_viewer_page(tmp_path / "again.html", [viewers_scene.frame(points=500)], title="thin", most_points=120)
    assert (tmp_path / "page.html").read_bytes() == (tmp_path / "again.html").read_bytes(), again


def test_text_from_data_is_neither_markup_nor_script(tmp_path):
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{script}}'
    frame = replace(viewers_scene.frame(evil), class_names=(evil, "\x1b[2J"))
    write_viewer_page(tmp_path / "page.html", [frame], title=evil, source=evil)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2  # the data and the program
    assert "<img" not in text
    assert "\x1b" not in text
    assert frames_of(tmp_path / "page.html")["frames"][0]["id"] == evil


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path):
    write_viewer_page(tmp_path / "page.html", [viewers_scene.frame()], title="policy")
    text = (tmp_path / "page.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest[0]}'; style-src 'sha256-{digest[1]}'")
    assert not re.search(r"https?://|src=|@import|url\(|innerHTML|eval\(|fetch\(|XMLHttpRequest|WebSocket|import\(", text)


def test_frames_without_points_or_boxes_make_a_page(tmp_path):
    nothing = DrawnFrame(id="nothing", class_names=())
    page = write_viewer_page(tmp_path / "page.html", [nothing, replace(viewers_scene.frame(), points=None)], title="empty")
    assert (page.points, page.points_left_out) == (0, 0)
    empty, other = frames_of(tmp_path / "page.html")["frames"]
    assert (empty["points"], empty["cells"], empty["layers"]) == (None, None, [])
    assert (other["points"], other["cells"]["count"]) == (None, 2)


def test_pages_that_no_browser_opens_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="at least one frame"):
        write_viewer_page(tmp_path / "page.html", [], title="none")
    with pytest.raises(InvalidInput, match="must be at least 1, found 0"):
        write_viewer_page(tmp_path / "page.html", [viewers_scene.frame()], title="none", most_points=0)
    monkeypatch.setattr(html_page, "MOST_PAGE_BYTES", 1000)
    with pytest.raises(InvalidInput, match="fewer frames"):
        write_viewer_page(tmp_path / "page.html", [viewers_scene.frame()], title="large")
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_the_page_are_in_the_package():
    root = Path(upcycle3d.__file__).parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    inside = {
        path.name for pattern in listed["upcycle3d.perception.viewers"] for path in (root / "perception/viewers").glob(pattern)
    }
    assert inside == {"page.html", "page.css", "camera.js", "boxes.js", "painter.js", "page.js"}
