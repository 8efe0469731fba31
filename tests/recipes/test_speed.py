"""Measurements of speed: what is called, how often, and that every operator runs at its real size."""

import pytest
import torch

import tiny
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.recipes.operator_speed import operator_calls
from upcycle3d.perception.recipes.speed import (
    WARM_UP,
    detectors_to_measure,
    extraction_speed,
    machine,
    measure_in_turns,
    rig_for,
    training_frames,
    training_step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_calls_take_turns_and_the_first_rounds_do_not_count():
    order: list[str] = []
    found = measure_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * (3 + WARM_UP)
    assert set(found) == {"a", "b"}
    assert found["a"].median_ms >= 0


def test_the_machine_is_described():
    assert {"cpu", "cpus", "load", "torch_threads", "python", "packages", "git"} <= set(machine())


def test_every_operator_runs_at_its_real_size():
    for call in operator_calls().values():
        call()


def test_a_training_step_trains():
    detector = tiny.second_iou()
    frames = [tiny.frame_with_car(0), tiny.frame_with_car(1)]
    before = [p.detach().clone() for p in detector.parameters()]
    training_step(detector, frames)()
    assert any(not torch.equal(a, b) for a, b in zip(before, detector.parameters(), strict=True))


@pytest.mark.parametrize("make", [tiny.second_iou, tiny.pv_rcnn])
def test_an_extraction_is_measured_beside_the_raw_scan(make):
    scan = tiny.scan_with_car()
    found = extraction_speed(make(), [scan], RigSpec(), "int8")
    assert found.raw_bytes_per_scan == len(scan) * 4 * 4
    assert found.bytes_per_scene > 0
    assert found.cells > 0
    assert (found.keypoints > 0) == (make is tiny.pv_rcnn)


def test_a_detector_sees_simulated_scans_as_it_was_trained():
    found = detectors_to_measure([], ["small", "kitti_small"])
    assert [rig_for(d, "kitti") for d in found.values()] == [RigSpec(z_shift=1.73), RigSpec()]
    (frame,) = training_frames(found["small (random weights)"], "kitti", 1)
    assert frame.rig == RigSpec(z_shift=1.73)
    assert frame.points.xyz[:, 2].quantile(0.05).abs() < 0.3  # the road
    assert frame.labels is not None
