"""Pictures from above: everything is drawn where it is, the right way round, and the same input gives the same bytes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from upcycle3d.core.cut import CutSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.core.structures import Boxes3D, Labels, PointCloud, Predictions
from upcycle3d.perception.viz.bev import DETECTION, TRUTH, Panel, bev_features_png, bev_panels_png, bev_png, draw_bev

VIEW = (0.0, -20.0, 40.0, 20.0)
NAMES = ("Car", "Pedestrian")
LEFT, TOP, SIZE = 46, 30, 400  # where the drawn area lies in a picture of size_px=400


def pixels(png: bytes) -> np.ndarray:
    """(rows, columns, 3) int."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def of_color(image: np.ndarray, color: str, tolerance: int = 12) -> np.ndarray:
    """(N, 2) row, column of the pixels of this colour inside the drawn area."""
    rgb = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    hit = (np.abs(image - rgb) <= tolerance).all(-1)
    hit[:TOP], hit[TOP + SIZE :], hit[:, :LEFT], hit[:, LEFT + SIZE :] = False, False, False, False
    return np.argwhere(hit)


def at(x: float, y: float) -> tuple[float, float]:
    """Row and column of a place in metres."""
    return TOP + (VIEW[2] - x) * SIZE / 40, LEFT + (VIEW[3] - y) * SIZE / 40


def labels(*boxes: tuple[float, ...], weight: list[float] | None = None) -> Labels:
    data = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 7)
    return Labels.make(data, torch.zeros(len(data)), weight=None if weight is None else torch.tensor(weight))


def predictions(*boxes: tuple[float, ...], scores: list[float]) -> Predictions:
    data, s = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 7), torch.tensor(scores)
    return Predictions(boxes=Boxes3D(data=data), classes=torch.zeros(len(data)).long(), scores=s, class_scores=s, iou_scores=s)


def cloud(*points: tuple[float, float, float]) -> PointCloud:
    xyz = torch.tensor(points, dtype=torch.float32).reshape(-1, 3)
    return PointCloud(xyz=xyz, features=torch.zeros(len(xyz), 1))


def draw(points: PointCloud | None = None, **options: object) -> np.ndarray:
    return pixels(bev_png(points, class_names=NAMES, view_range=VIEW, size_px=SIZE, **options))  # type: ignore[arg-type]


def test_a_box_ahead_left_is_drawn_up_left_at_its_place() -> None:
    box = (30.0, 12.0, 0.0, 4.0, 2.0, 1.5, 0.0)
    # an empty list of detections, so that no text is written beside the truth
    found = of_color(draw(truth=labels(box), predictions=Predictions.empty()), TRUTH)
    row, column = at(30, 12)
    assert row < TOP + SIZE / 2
    assert column < LEFT + SIZE / 2
    assert found[:, 1].min() == pytest.approx(column - 10, abs=2)  # 2 m wide at 10 px a metre
    assert found[:, 1].max() == pytest.approx(column + 10, abs=2)
    assert found[:, 0].max() == pytest.approx(row + 20, abs=2)  # its rear; the tick reaches beyond its front


@pytest.mark.parametrize(("yaw", "down", "right"), [(0.0, -1, 0), (np.pi / 2, 0, -1), (-np.pi / 2, 0, 1), (-np.pi, 1, 0)])
def test_the_tick_points_where_the_box_heads(yaw: float, down: int, right: int) -> None:
    found = of_color(draw(truth=labels((20, 0, 0, 4, 2, 1.5, yaw)), predictions=Predictions.empty()), TRUTH)
    tip = np.array(at(20, 0)) + 27 * np.array([down, right])  # 0.35 of the half length beyond the front
    tail = np.array(at(20, 0)) - 27 * np.array([down, right])
    assert np.abs(found - tip).max(1).min() <= 2
    assert np.abs(found - tail).max(1).min() > 3


def test_a_point_is_painted_at_its_place_and_the_highest_wins() -> None:
    image = draw(
        cloud((10.05, -15.05, 3.0), (10.05, -15.05, 0.0), (30.05, -15.05, 0.0), (99.0, 0.0, 0.0), (float("nan"), 0.0, 0.0))
    )
    high, low = (image[tuple(int(v) for v in at(x, -15.05))] for x in (10.05, 30.05))
    assert high.sum() < low.sum() < 3 * 240  # darker is higher, both darker than paper
    assert at(30, -15)[1] > LEFT + SIZE / 2  # y < 0 is right


def test_detections_below_the_minimum_score_are_not_drawn_but_the_others_are() -> None:
    boxes = ((30.0, 10.0, 0.0, 4.0, 2.0, 1.5, 0.0), (10.0, -10.0, 0.0, 4.0, 2.0, 1.5, 0.0))
    found = of_color(draw(predictions=predictions(*boxes, scores=[0.2, 0.9])), DETECTION)
    assert len(found)
    assert found[:, 0].min() > TOP + SIZE / 2
    assert found[:, 1].min() > LEFT + SIZE / 2


def test_ignored_truth_is_dashed() -> None:
    box = (20.0, 0.0, 0.0, 8.0, 4.0, 1.5, 0.0)
    solid, dashed = (draw(truth=labels(box, weight=[w]), predictions=Predictions.empty()) for w in (1.0, 0.0))
    assert 0.3 < len(of_color(dashed, TRUTH)) / len(of_color(solid, TRUTH)) < 0.85


def smashed() -> SmashedScene:
    """One strong cell ahead left and one weak ahead right, on a 4 x 4 grid of 10 m cells."""
    grid = VoxelGrid(range=(0, -20, -2, 40, 20, 2), voxel_size=(5, 5, 1))
    spec = CutSpec(layer="cut", channels=2, stride=(2, 2, 2), shape=(2, 4, 4), grid=grid)
    coords = torch.tensor([[0, 0, 3], [0, 3, 3], [1, 3, 3]], dtype=torch.int32)  # z y x; y index 3 is 10..20 m left
    features = torch.tensor([[0.3, 0.0], [0.1, 0.0], [3.0, 4.0]])
    return SmashedScene(spec=spec, coords=coords, features=features, codec="fp16", encoder_fingerprint="0", scene_id="0")


def test_the_feature_map_is_dark_where_the_norm_is_large_and_empty_where_no_cell_is() -> None:
    image = pixels(bev_features_png(smashed(), class_names=NAMES, size_px=SIZE))
    strong, weak, none = (image[tuple(int(v) for v in at(x, y))].sum() for x, y in ((35.5, 15.5), (35.5, -15.5), (15.5, 5.5)))
    assert strong < 250 < weak < none
    assert (image[TOP + 3 : TOP + 97, LEFT + 3 : LEFT + 97].sum(-1) < 250).all()  # the whole cell, 10 m = 100 px


def test_live_features_give_the_picture_of_stored_ones_and_a_batch_is_refused() -> None:
    scene = smashed()
    coords = torch.cat([torch.zeros(3, 1, dtype=torch.int32), scene.coords], 1)
    voxels = SparseVoxels(features=scene.features.requires_grad_(), coords=coords, shape=scene.spec.shape, batch_size=1)
    live = CutFeatures(voxels=voxels, spec=scene.spec)
    assert bev_features_png(live, class_names=NAMES) == bev_features_png(smashed(), class_names=NAMES)
    with pytest.raises(InvalidInput, match="batch of 2"):
        bev_features_png(CutFeatures.collate([live, live]), class_names=NAMES)


def test_nothing_to_draw_still_gives_a_picture_of_the_stated_size() -> None:
    for options in ({}, {"truth": Labels.empty(), "predictions": Predictions.empty()}):
        png = bev_png(None, class_names=(), view_range=VIEW, size_px=SIZE, **options)
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        rows, columns, _ = pixels(png).shape
        assert columns == LEFT + SIZE + 12
        assert SIZE < rows < SIZE + 200
    assert len(bev_png(cloud(), class_names=(), view_range=VIEW)) > 1000


def test_panels_stand_side_by_side_in_one_scale_and_the_same_input_gives_the_same_bytes() -> None:
    truth = labels((20, 0, 0, 4, 2, 1.5, 0.3))
    panels = [Panel("before", None, truth, Predictions.empty()), ("after $x$", cloud((20, 0, 0)), truth, None)]
    once, again = (bev_panels_png(panels, class_names=NAMES, view_range=VIEW, panel_px=200) for _ in range(2))
    assert once == again
    blue = pixels(once)[:, :, 2] - pixels(once)[:, :, 0] > 120
    blue[230:] = False  # the legend
    columns = np.flatnonzero(blue.any(0))
    assert (columns < 258).any()
    assert (columns >= 258).any()
    assert b"Software" not in once


def test_a_class_without_a_name_and_an_empty_view_are_refused() -> None:
    with pytest.raises(InvalidInput, match="need names"):
        bev_png(None, truth=labels((20, 0, 0, 4, 2, 1.5, 0)), class_names=(), view_range=VIEW)
    with pytest.raises(InvalidInput, match="x1 > x0"):
        bev_png(None, class_names=(), view_range=(10, 0, 10, 5))


def test_draw_bev_names_the_argument_of_a_wrong_type_and_a_folder_given_as_file(tmp_path) -> None:
    scan, boxes = PointCloud.from_array([[1.0, 2.0, 0.0, 0.5]]), Boxes3D.empty()
    for arguments, options, message in (
        ((tmp_path / "x.png", np.zeros((3, 4))), {}, "draws a PointCloud, found .*numpy array"),
        ((tmp_path, scan), {}, "which is a folder"),
        ((tmp_path / "x.png", scan), {"labels": boxes}, "labels of draw_bev must be Labels or None"),
        ((tmp_path / "x.png", scan), {"predictions": boxes}, "predictions of draw_bev must be Predictions or None"),
    ):
        with pytest.raises(InvalidInput, match=message):
            draw_bev(*arguments, **options)
    assert list(tmp_path.iterdir()) == []
