"""Pictures name what a detector finds by the detector's own classes, and the table counts what is drawn."""

import torch

import tiny
from upcycle3d.core.structures import Boxes3D, Predictions
from upcycle3d.perception.viz.bev import in_view, renumbered


def found(*classes: int) -> Predictions:
    ones = torch.ones(len(classes))
    return Predictions(
        boxes=Boxes3D(data=tiny.CAR.repeat(len(classes), 1)),
        classes=torch.tensor(classes, dtype=torch.int64),
        scores=ones,
        class_scores=ones,
        iou_scores=ones,
    )


def test_detections_keep_their_names_where_the_labels_have_other_numbers():
    predictions, names = renumbered(found(0, 1, 2), ("Car", "Tram", "pedestrian"), ("Pedestrian", "Car"))
    assert names == ("Pedestrian", "Car", "Tram")
    assert [names[c] for c in predictions.classes.tolist()] == ["Car", "Tram", "Pedestrian"]
    predictions, names = renumbered(found(), ("Car",), ())
    assert (len(predictions), names) == (0, ("Car",))


def test_boxes_outside_the_picture_are_not_counted():
    boxes = Boxes3D(data=tiny.CAR + torch.tensor([[0.0] * 7, [3.0, 0, 0, 0, 0, 0, 0], [60.0, 0, 0, 0, 0, 0, 0]]))
    assert in_view(boxes, (0.0, -6.4, 8.0, 6.4)).tolist() == [True, True, False]
