"""How large the page of `upcycle3d view --html` is, and how many pictures a second Chromium draws of it.

    python benchmarks/speed/viewer_page.py --browser /usr/bin/chromium

The scan is drawn at random: 150,000 points around the sensor and 100 boxes. Without a graphics card Chromium draws with its own software
(SwiftShader), which is the slowest case. Needs the extra `browser`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from upcycle3d.core.structures import Boxes3D, PointCloud, Predictions
from upcycle3d.perception.viewers.drawn_frame import DrawnFrame
from upcycle3d.perception.viewers.html_page import write_viewer_page

# Draws the page's picture with all points for some seconds, as quickly as the browser allows, and gives the pictures a second.
_ALL_POINTS = """async (seconds) => {
  const times = [await new Promise(requestAnimationFrame)];
  while (times.at(-1) - times[0] < 1000 * seconds) {
    viewer.camera.orbit(4, 0);
    painter.draw(viewer.camera, () => true, { size: 2, byIntensity: 0 }, 1);
    times.push(await new Promise(requestAnimationFrame));
  }
  return (1000 * (times.length - 1)) / (times.at(-1) - times[0]);
}"""


def random_frame(points: int, boxes: int) -> DrawnFrame:
    """A scan and detections at random places around the sensor."""
    rng = np.random.default_rng(0)
    distance, angle = rng.uniform(2, 80, points), rng.uniform(-np.pi, np.pi, points)
    height = rng.normal(-1.7, 0.1, points) + (rng.random(points) < 0.2) * rng.uniform(0, 4, points)
    rows = np.stack([distance * np.cos(angle), distance * np.sin(angle), height, rng.random(points)], 1)
    places = np.concatenate(
        [rng.uniform(-40, 40, (boxes, 2)), np.tile([-1.0, 4.0, 1.8, 1.5], (boxes, 1)), rng.uniform(-3, 3, (boxes, 1))], 1
    )
    scores = torch.rand(boxes, generator=torch.Generator().manual_seed(0))
    kinds = torch.zeros(boxes, dtype=torch.int64)
    found = Predictions(boxes=Boxes3D.from_array(places), classes=kinds, scores=scores, class_scores=scores, iou_scores=scores)
    return DrawnFrame(id="random", class_names=("Car",), points=PointCloud.from_array(rows), detections=found)


def main() -> None:
    """Write the page, open it and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", required=True, help="program of a Chromium")
    parser.add_argument("--points", type=int, default=150_000)
    parser.add_argument("--boxes", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as program:
        path = Path(folder) / "page.html"
        page = write_viewer_page(path, [random_frame(options.points, options.boxes)], title="speed", most_points=options.points)
        print(f"page of {options.points:,} points and {options.boxes} boxes: {page.bytes / 1e6:.2f} MB")
        software = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
        browser = program.chromium.launch(executable_path=options.browser, args=software)
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.goto(path.as_uri())
        print(f"all points, all the time: {tab.evaluate(_ALL_POINTS, options.seconds):.1f} pictures a second")
        tab.click("#turn")
        tab.wait_for_timeout(1000 * options.seconds)
        print(f"as the page draws while the camera moves: {tab.inner_text('#rate')}")
        browser.close()


if __name__ == "__main__":
    main()
