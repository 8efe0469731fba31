"""The page's geometry, run by node: boxes have the corners of ours, rays hit what is under them. Independent oracle: numpy."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import upcycle3d
from upcycle3d.core.boxes import corners_3d

WEB = Path(upcycle3d.__file__).parent / "perception/viewers/web"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(
    NODE is None, reason="not checked: the geometry of the page. It needs node, which is not installed"
)
BOXES = [[10.0, 2.0, 0.5, 4.0, 2.0, 1.5, 0.5], [20.0, -3.0, 0.0, 1.0, 0.6, 1.7, -2.0], [0.0, 0.0, 0.0, 8.0, 3.0, 3.0, 7.0]]


def node(program: str) -> Any:
    """What a program gives that knows the camera and the boxes."""
    text = "\n".join(
        [
            (WEB / "camera.js").read_text(),
            (WEB / "boxes.js").read_text(),
            f"console.log(JSON.stringify((() => {{ {program} }})()))",
        ]
    )
    done = subprocess.run([str(NODE), "-e", text], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_corners_are_those_of_our_convention():
    found = np.array(node(f"return {BOXES}.map(outlineOf)"))
    np.testing.assert_allclose(found[:, :8], corners_3d(torch.tensor(BOXES)).numpy(), atol=1e-5)


def test_a_point_is_drawn_where_the_matrix_and_the_ray_say():
    program = """
      const camera = new OrbitCamera([10, 1, 0], 30);
      camera.orbit(70, -25); camera.pan(12, -7, 600); camera.zoom(0.8);
      const points = [[12, 3, 1], [3, -2, 0], [40, 5, -1]];
      return { matrix: [...camera.matrix(800, 600)], screen: points.map((p) => camera.screenOf(p, 800, 600)), points,
               rays: points.map((p) => camera.ray(...camera.screenOf(p, 800, 600), 800, 600)), behind: camera.screenOf(along(camera.axes().eye, camera.axes().forward, -5), 800, 600) };
    """
    found = node(program)
    matrix = np.array(found["matrix"]).reshape(4, 4).T
    clip = np.concatenate([np.array(found["points"]), np.ones((3, 1))], 1) @ matrix.T
    pixels = (clip[:, :2] / clip[:, 3:] * [1, -1] + 1) / 2 * [800, 600]
    np.testing.assert_allclose(pixels, found["screen"], atol=1e-3)
    assert (np.abs(clip[:, 2] / clip[:, 3]) < 1).all()  # between the nearest and the farthest that is drawn
    for point, ray in zip(found["points"], found["rays"], strict=True):
        offset = np.array(point) - ray["origin"]
        np.testing.assert_allclose(np.cross(offset, ray["direction"]), 0, atol=1e-6 * np.linalg.norm(offset))
    assert found["behind"] is None


def test_from_behind_looks_ahead_and_from_above_has_x_up():
    program = """
      const camera = new OrbitCamera([0, 0, 0], 30);
      const at = () => [[5, 0, 0], [0, 5, 0]].map((p) => camera.screenOf(p, 800, 600));
      const behind = at(); camera.fromAbove();
      return [behind, at()];
    """
    for ahead, left in node(program):
        assert ahead[1] < 300  # ahead is up in the picture
        assert left[0] < 400  # left is left
        assert abs(ahead[0] - 400) < 1e-6


def test_rays_hit_boxes_as_points_on_a_fine_line_do():
    rng = np.random.default_rng(0)
    boxes = np.array([*BOXES, [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 0.0]])
    origins = rng.uniform(-15, 30, (40, 3))
    directions = boxes[rng.integers(0, 4, 40), :3] + rng.normal(size=(40, 3)) - origins  # near the middle of a box
    directions[:5, 0] = 0  # beside the sides of a box that is not turned
    rays = [{"origin": o, "direction": d} for o, d in zip(origins.tolist(), directions.tolist(), strict=True)]
    found = node(f"return {json.dumps(rays)}.map((ray) => {json.dumps(boxes.tolist())}.map((box) => distanceToBox(ray, box)))")
    steps = np.linspace(0, 3, 6001)
    outcomes = {True: 0, False: 0}
    for origin, direction, distances in zip(origins, directions, found, strict=True):
        line = origin + steps[:, None] * direction
        for box, distance in zip(boxes, distances, strict=True):
            local, (cos, sin) = line - box[:3], (np.cos(box[6]), np.sin(box[6]))
            turned = np.stack([local[:, 0] * cos + local[:, 1] * sin, local[:, 1] * cos - local[:, 0] * sin, local[:, 2]], 1)
            inside = (np.abs(turned) <= box[3:6] / 2).all(1)
            outcomes[bool(inside.any())] += 1
            if inside.any():
                assert distance == pytest.approx(steps[inside.argmax()], abs=6e-4)
            else:
                assert distance is None or distance > 3
    assert min(outcomes.values()) > 20, outcomes


def test_the_nearest_box_on_a_ray_is_picked():
    ray = {"origin": [-20, 0, 0], "direction": [1, 0, 0]}
    row = [[x, 0, 0, 2, 2, 2, 0] for x in (5, -5, 30)]
    assert node(f"return [firstBoxOnRay({json.dumps(ray)}, {json.dumps(row)}), firstBoxOnRay({json.dumps(ray)}, [])]") == [1, -1]
