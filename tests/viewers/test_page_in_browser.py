"""The page in a real Chromium, without a network: it draws, a click selects a box, switches hide it, and the console has no error."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import viewers_scene

from upcycle3d.perception.viewers.html_page import write_viewer_page

playwright = pytest.importorskip("playwright.sync_api", reason="not checked: the page in a browser. It needs the extra `browser`")
BROWSER = viewers_scene.chromium()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="not checked: the page in a browser. It needs a Chromium (or $CHROMIUM)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page of two frames, in a browser without a network; what its console said is checked after all tests."""
    path: Path = tmp_path_factory.mktemp("page") / "page.html"
    write_viewer_page(path, [viewers_scene.frame("<b>first</b>"), viewers_scene.frame("second", points=90)], title="two frames")
    said: list[str] = []
    with playwright.sync_playwright() as program:
        software = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
        browser = program.chromium.launch(executable_path=BROWSER, args=software)
        context = browser.new_context(viewport={"width": 900, "height": 600}, offline=True)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
        tab.goto(path.as_uri())
        tab.wait_for_function("viewer.screenOf([0, 0, 0]) !== null")
        yield tab
        browser.close()
    assert said == []


def colors(page: Any) -> int:
    """How many colors the picture has."""
    from matplotlib.image import imread

    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    picture = imread(io.BytesIO(page.locator("canvas").screenshot()), format="png")
    return len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0))


def click(page: Any, point: list[float]) -> Any:
    """Click a place of the world, and say what is selected."""
    x, y = page.evaluate("(point) => viewer.screenOf(point)", point)
    page.mouse.click(x, y)
    return page.evaluate("viewer.selected()")


def test_the_picture_is_not_blank_and_switches_take_things_away(page):
    everything = colors(page)
    assert everything > 20
    names = ["points", "truth", "detections", "teacher", "pasted"]
    for name in names:
        page.uncheck(f"#switch-{name}")
    assert colors(page) < everything / 2
    page.check("#switch-cells")
    for name in names:
        page.check(f"#switch-{name}")
    assert colors(page) >= everything
    page.uncheck("#switch-cells")


def test_a_click_selects_a_box_and_shows_its_facts(page):
    assert click(page, [5.0, -3.0, 0.0]) == {"layer": "detections", "index": 1}
    facts = page.inner_text("#facts")
    for text in ("detections", "Van", "0.40", "4.00 × 2.00 × 1.50 m", "5.8 m"):
        assert text in facts
    assert click(page, [15.0, -7.5, 0.0]) is None
    assert page.inner_text("#facts").strip() == ""


def test_a_hidden_box_and_one_of_a_low_score_cannot_be_selected(page):
    page.uncheck("#switch-detections")
    assert click(page, [5.0, -3.0, 0.0]) is None
    page.check("#switch-detections")
    page.fill("#score", "0.5")
    assert click(page, [5.0, -3.0, 0.0]) is None
    page.fill("#score", "0")
    assert click(page, [5.0, -3.0, 0.0]) is not None
    page.keyboard.press("Escape")


def test_the_mouse_turns_moves_and_zooms_and_does_not_select(page):
    def camera() -> dict[str, Any]:
        return page.evaluate("({ ...viewer.camera })")

    before = camera()
    page.mouse.move(300, 300)
    page.mouse.down()
    page.mouse.move(380, 330, steps=4)
    page.mouse.up()
    turned = camera()
    assert turned["azimuth"] < before["azimuth"]
    assert turned["elevation"] > before["elevation"]
    page.mouse.down(button="right")
    page.mouse.move(340, 330, steps=4)
    page.mouse.up(button="right")
    assert camera()["target"] != turned["target"]
    page.mouse.wheel(0, -200)
    assert page.wait_for_function(f"viewer.camera.distance < {turned['distance']}")
    assert page.evaluate("viewer.selected()") is None
    page.click("#behind")
    assert camera() == before


def test_the_slider_changes_the_frame_and_names_are_text(page):
    assert page.inner_text("#frame-id") == "1 of 2: <b>first</b>"
    page.fill("#frame", "1")
    assert page.inner_text("#frame-id") == "2 of 2: second"
    assert page.inner_text("#count-points") == "90"
    page.focus("canvas")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#count-points") == "200"


def test_turning_says_how_many_pictures_a_second_it_draws(page):
    page.click("#turn")
    page.wait_for_function(
        "/^[1-9][0-9]* pictures a second, with [1-9][0-9]* % of the points$/.test(document.querySelector('#rate').textContent)"
    )
    page.click("#turn")
    assert page.inner_text("#rate") == ""
    page.click("#behind")
