"""What every viewer draws: places of cells and boxes, colors that mean one thing, and what is left out and counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import viewers_scene

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Labels, PointCloud
from upcycle3d.perception.viewers.colors import SCALE, FeatureColors, height_span, scale_colors
from upcycle3d.perception.viewers.drawn_frame import DrawnFrame


def test_layers_stand_in_one_order_with_names_scores_and_what_is_ignored():
    truth, detections, teacher, pasted = viewers_scene.frame().layers()
    assert [truth.name, detections.name, teacher.name, pasted.name] == ["truth", "detections", "teacher", "pasted"]
    assert detections.captions() == ["Car 0.90", "Van 0.40"]
    assert teacher.captions() == ["Car (ignored)"]
    assert truth.captions() == ["Car"]


def test_the_tick_of_a_box_shows_where_it_heads():
    frame = DrawnFrame(id="a", class_names=("Car",), truth=viewers_scene.labels([[1.0, 2, 3, 4, 2, 1.5, np.pi / 2]]))
    outline = frame.layers()[0].outline()[0]
    np.testing.assert_allclose(outline[8], [1, 2, 3.75], atol=1e-6)
    np.testing.assert_allclose(outline[9], [1, 4, 3.75], atol=1e-6)  # heading to +y, left
    np.testing.assert_allclose(outline[:8].min(0), [0, 0, 2.25], atol=1e-6)
    np.testing.assert_allclose(outline[:8].max(0), [2, 4, 3.75], atol=1e-6)


def test_cells_lie_where_the_cut_says_and_divide_the_height():
    cells = viewers_scene.frame().cells_to_draw()
    assert cells is not None
    assert cells.size == (0.5, 0.5, 2.0)
    np.testing.assert_allclose(cells.centers, [[1.25, -7.25, -1.0], [15.75, 7.25, 1.0]])


def test_what_cannot_be_drawn_is_left_out_and_counted():
    points = PointCloud(xyz=torch.tensor([[1.0, 0, 0], [float("nan"), 0, 0]]), features=torch.tensor([[float("inf")], [0.0]]))
    boxes = torch.tensor([[1.0, 0, 0, 4, 2, 1, 0], [1.0, 0, 0, 0, 2, 1, 0], [1.0, float("inf"), 0, 4, 2, 1, 0]])
    labels = Labels.make(Boxes3D(data=boxes), torch.zeros(3, dtype=torch.int64))
    frame = DrawnFrame(id="a", class_names=("Car",), points=points, truth=labels)
    drawn = frame.points_to_draw()
    assert drawn is not None
    assert (len(drawn.xyz), drawn.left_out) == (1, 1)
    assert drawn.intensity is not None
    assert drawn.intensity.tolist() == [1.0]
    assert (len(frame.layers()[0]), frame.layers()[0].left_out) == (1, 2)


def test_what_nobody_knows_is_no_layer_and_an_empty_layer_is_one():
    nothing = DrawnFrame(id="a", class_names=())
    assert (nothing.layers(), nothing.points_to_draw(), nothing.cells_to_draw()) == ((), None, None)
    assert [len(layer) for layer in replace(nothing, truth=Labels.empty()).layers()] == [0]
    assert height_span([nothing]) == (-2.5, 1.5)
    assert FeatureColors.of([nothing]) is None


def test_a_class_without_a_name_and_a_batch_of_two_are_refused():
    with pytest.raises(InvalidInput, match="class number 0, and 0 classes have names"):
        DrawnFrame(id="a", class_names=(), truth=viewers_scene.labels(viewers_scene.CAR))
    one = viewers_scene.frame().features
    assert one is not None
    with pytest.raises(InvalidInput, match="found a batch of 2"):
        DrawnFrame(id="a", class_names=(), features=type(one).collate([one, one]))


def test_the_scale_ends_at_its_colors_and_equal_features_have_equal_colors_in_every_frame():
    assert scale_colors(np.array([-1.0, 0.25, 2.0], np.float32)).tolist() == [list(SCALE[0]), list(SCALE[1]), list(SCALE[4])]
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).tolist()
    cells = tiny.cells(torch.arange(50)).tolist()
    first = replace(viewers_scene.frame(), features=viewers_scene.features(cells, values))
    second = replace(first, features=viewers_scene.features(cells[:2], [values[7], values[7]]))
    colors = FeatureColors.of([first, second])
    assert colors is not None
    own = [colors.colors(frame.cells_to_draw().features) for frame in (first, second)]
    assert own[1].tolist() == [own[0][7].tolist()] * 2
    assert len(np.unique(own[0], axis=0)) > 40  # features that differ look different
    assert int(own[0].min()) >= 55
