"""Scans that differ from those of training are noticed, and scans that do not differ are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.scan_comparison import (
    ScanWatch,
    compare_road,
    compare_scans,
    odd_scans,
    reaches_behind,
    rig_differences,
    rig_of_scans,
)
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.core.structures import PointCloud
from upcycle3d.core.trained_on import ScanMeasures, ScanStatistics, TrainedOn, estimate_road_height, summarize_scans
from upcycle3d.perception.models.encoders.scan_survey import measure_scan
from upcycle3d.perception.recipes.presets import PRESETS

TRAINED = ScanStatistics(scans=10, points=20_000, cells=6_000, ground_height=0.05, intensity=0.3)


def test_scans_like_those_of_training_give_no_warning():
    assert compare_scans(TRAINED, replace(TRAINED, points=30_000, ground_height=-0.2, intensity=0.2)) == ()


def test_a_forgotten_mounting_height_names_the_option_and_the_shift():
    (warning,) = compare_scans(TRAINED, replace(TRAINED, ground_height=-1.68))
    assert "--z-shift" in warning
    assert "+1.73" in warning
    (warning,) = compare_scans(TRAINED, replace(TRAINED, ground_height=-1.68), rig=RigSpec(z_shift=0.2))
    assert "--z-shift 1.93 instead of 0.2 would bring them together" in warning, "0.2 + 0.05 + 1.68"


def test_a_wrong_intensity_scale_and_a_sparse_sensor_are_named():
    bytes_, sparse = replace(TRAINED, intensity=70.0), replace(TRAINED, points=3_000.0)
    assert "--intensity-scale" in compare_scans(TRAINED, bytes_)[0]
    (warning,) = compare_scans(TRAINED, replace(sparse, cells=500))
    assert "points per scan: 3,000 in these scans, 20,000 in the training scans; a likely cause is another sensor" in warning
    assert compare_scans(TRAINED, replace(TRAINED, cells=500))[0].startswith("occupied cells per scan: 500 ")


def test_what_nobody_measured_is_not_compared():
    unknown = replace(TRAINED, ground_height=float("nan"), intensity=float("nan"))
    assert compare_scans(unknown, replace(TRAINED, ground_height=-5.0)) == ()


def test_the_road_is_found_below_walls_and_cars():
    rng = np.random.default_rng(0)
    road = np.c_[rng.uniform(-30, 30, (2000, 2)), rng.normal(-1.7, 0.03, 2000), np.zeros(2000)]
    walls = np.c_[rng.uniform(-30, 30, (1500, 2)), rng.uniform(-1.5, 3, 1500), np.zeros(1500)]
    scan = PointCloud.from_array(np.concatenate([road, walls]).astype(np.float32), columns=("x", "y", "z", "intensity"))
    assert abs(estimate_road_height(scan) + 1.7) < 0.1


def test_one_odd_scan_changes_nothing():
    usual = ScanMeasures(points=100, cells=50, ground_height=0.0, intensity=0.3)
    odd = ScanMeasures(points=1, cells=1, ground_height=float("nan"), intensity=9.0)
    assert summarize_scans([usual, usual, odd]) == ScanStatistics(scans=3, points=100, cells=50, ground_height=0.0, intensity=0.3)
    assert summarize_scans([]) is None


KNOWN = TrainedOn(
    rig=RigSpec(z_shift=1.73),
    feature_names=("intensity",),
    classes=("Car",),
    point_range=(0.0, -1.0, -1.0, 1.0, 1.0, 1.0),
    scans=TRAINED,
)


def test_the_rig_of_training_is_the_default_and_another_one_is_used_and_warned_of():
    assert rig_of_scans(ScanOptions(), KNOWN) == (RigSpec(z_shift=1.73), ())
    assert rig_of_scans(ScanOptions(z_shift=1.73), KNOWN) == (RigSpec(z_shift=1.73), ())
    rig, (warning,) = rig_of_scans(ScanOptions(z_shift=0.0), KNOWN)
    assert rig == RigSpec()
    assert "z_shift 0, intensity_scale 1; the training had z_shift 1.73, intensity_scale 1" in warning
    rig, (warning,) = rig_of_scans(ScanOptions(z_shift=1.6), None)
    assert rig == RigSpec(z_shift=1.6)
    assert "does not say with which rig it was trained; z_shift 1.6, intensity_scale 1 is used" in warning
    assert rig_of_scans(ScanOptions(z_shift=1.6, intensity_scale=1.0), None) == (RigSpec(z_shift=1.6), ())


def test_scans_are_compared_after_the_first_ones_and_at_the_end_and_each_difference_is_said_once():
    usual = ScanMeasures(points=20_000, cells=6_000, ground_height=0.0, intensity=0.3)
    said: list[str] = []
    watch = ScanWatch(KNOWN, said.append, first=2)
    watch.add(replace(usual, ground_height=-1.7))
    assert said == []
    watch.add(replace(usual, ground_height=-1.7))
    assert len(said) == 1
    for _ in range(5):
        watch.add(replace(usual, ground_height=-1.7, points=2_000))
    watch.finish()
    watch.finish()
    assert ["road" in text for text in said] == [True, False]
    said.clear()
    for quiet in (
        ScanWatch(None, said.append),
        ScanWatch(replace(KNOWN, scans=None), said.append),
        ScanWatch(KNOWN, said.append),
    ):
        quiet.add(usual)
        quiet.finish()
    ScanWatch(KNOWN, said.append).finish()
    assert said == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ground_height": 1.73}, "2 of 40 scans (b3, b7) have the road at another height than in most scans (0.00 m)"),
        ({"intensity": 0.3 / 255}, "2 of 40 scans (b3, b7) have another mean intensity than most scans (0.3)"),
        (
            {"points": 300},
            "2 of 40 scans (b3, b7) have ten times more or fewer points in the detector's range than most scans (20,000)",
        ),
    ],
)
@pytest.mark.parametrize("trained", [KNOWN, None])
def test_a_few_scans_that_are_unlike_the_others_are_counted_and_named(change, message, trained):
    usual = ScanMeasures(points=20_000, cells=6_000, ground_height=0.0, intensity=0.3)
    said: list[str] = []
    watch = ScanWatch(trained, said.append)
    for i in range(40):
        watch.add(replace(usual, **change) if i in (3, 7) else replace(usual, ground_height=0.4 * (i % 2)), f"b{i}")
    watch.finish()
    watch.finish()
    assert [message.partition(" (0.00")[0] in text for text in said] == [True]


def test_real_scans_of_one_sensor_do_not_warn_and_a_forgotten_mounting_height_or_crop_does():
    kitti = tiny.shared("data/kitti", "the tolerances fit the real KITTI scans")
    encoder = PRESETS["kitti_small"].detector.encoder.build()
    rig = RigSpec(z_shift=1.73)

    def measured(names: list[str], folder: str = "velodyne_reduced", rig: RigSpec = rig) -> list[ScanMeasures]:
        scans = (np.fromfile(kitti / "training" / folder / f"{name}.bin", np.float32).reshape(-1, 4) for name in names)
        return [measure_scan(rig.from_sensor(PointCloud.from_array(scan)), encoder)[0] for scan in scans]

    train, val = ((kitti / "ImageSets" / f"{split}.txt").read_text().split() for split in ("train", "val"))
    known = summarize_scans(measured(train[::4]))
    here = measured(val)
    for scans in (here, *([scan] for scan in here)):
        assert compare_scans(known, summarize_scans(scans)) == ()
    assert odd_scans(here, val) == {}
    for shift in (0.0, 1.0, 3.46):
        warnings = compare_scans(known, summarize_scans(measured(val[::4], rig=RigSpec(z_shift=shift))))
        assert "--z-shift" in warnings[0]
    full = [path.stem for path in sorted((kitti / "training" / "velodyne").glob("*.bin"))]
    (warning,) = compare_scans(known, summarize_scans(measured(full, "velodyne")))
    assert "--calib" in warning


def test_the_scale_that_the_reader_of_the_training_data_applied_is_no_other_scale():
    trained = TrainedOn(
        rig=RigSpec(z_shift=1.84),
        feature_names=("intensity",),
        classes=("Car",),
        point_range=(0, 0, 0, 1, 1, 1),
        reader_scale=1 / 255,
    )
    assert rig_differences(RigSpec(z_shift=1.84, intensity_scale=0.00392157), trained, "the rig given") == ()
    assert rig_differences(RigSpec(z_shift=1.84), trained, "the rig given") == ()
    for other in (RigSpec(z_shift=1.84, intensity_scale=1 / 256), RigSpec(intensity_scale=1 / 255)):
        assert len(rig_differences(other, trained, "the rig given")) == 1
    assert TrainedOn.from_json(trained.to_json()) == trained


def road(
    found: float, *, expected: float | None = 0.0, shift: float = 0.0, z: tuple[float, float] = (-1.0, 3.0)
) -> tuple[str, ...]:
    return compare_road(replace(TRAINED, ground_height=found), expected=expected, rig=RigSpec(z_shift=shift), z_range=z)


def test_a_road_at_another_height_than_the_anchors_names_both_heights_and_the_z_shift_that_fits():
    assert road(0.05, shift=1.73) == ()
    assert road(-0.43, shift=1.83) == ()  # the largest difference of real data with the shifts of the documentation
    assert road(float("nan")) == ()
    assert compare_road(None, expected=0.0, rig=RigSpec(), z_range=(-1.0, 3.0)) == ()
    (unshifted,) = road(-0.9, shift=1.0)
    assert "the road lies at z = -0.90 m in these scans, and this detector expects it at z = 0.00 m" in unshifted
    assert "--z-shift 1.90 (now 1)" in unshifted
    (shifted,) = road(-0.03, expected=-1.78, shift=1.73, z=(-3.0, 1.0))
    assert "without --z-shift (now 1.73)" in shifted


def test_with_anchors_of_the_data_itself_only_the_range_is_compared():
    assert road(-1.7, expected=None, z=(-3.0, 1.0)) == ()
    for found in (0.0, -3.5):
        (cut,) = road(found, expected=None, z=(-3.0, 1.0))
        assert "the detector's range goes from z = -3 to 1 m, so objects are cut off" in cut


def test_scans_that_are_read_in_another_way_than_those_of_training_are_warned_of():
    turned = replace(KNOWN, axes=("y", "-x", "z"), columns=("x", "y", "z", "_", "intensity"), dtype="float64")
    files = (Path("a.bin"),)
    said = rig_of_scans(ScanOptions(), turned, files)[1]
    assert [word in text for word, text in zip(("--axes y -x z", "--columns x y z _ intensity", "--dtype float64"), said)] == [
        True
    ] * 3
    assert len(said) == 3
    alike = ScanOptions(axes=("y", "-x", "z"), columns=("x", "y", "z", "_", "intensity"), dtype="float64")
    assert rig_of_scans(alike, turned, files)[1] == ()
    assert len(rig_of_scans(ScanOptions(), turned, (Path("a.pcd"),))[1]) == 1  # its header names columns and types
    plain = replace(KNOWN, axes=("x", "y", "z"), columns=(), dtype="float32")
    assert rig_of_scans(ScanOptions(columns=("x", "y", "z", "intensity")), plain, files)[1] == ()
    (said,) = rig_of_scans(ScanOptions(axes=("y", "-x", "z")), plain, files)[1]
    assert "give --axes x y z" in said


def test_a_file_of_before_without_axes_still_loads():
    old = {name: value for name, value in KNOWN.to_json().items() if name not in ("axes", "columns", "dtype")}
    assert TrainedOn.from_json(old) == KNOWN
    now = replace(KNOWN, axes=("y", "-x", "z"), columns=(), dtype=">f4")
    assert TrainedOn.from_json(now.to_json()) == now


def test_only_a_scan_that_holds_what_is_behind_the_sensor_reaches_behind():
    ahead = tiny.scan_with_car()
    assert not reaches_behind(ahead)
    assert not reaches_behind(tiny.NO_POINTS)
    assert reaches_behind(replace(ahead, xyz=torch.cat([ahead.xyz[::2], -ahead.xyz[1::2]])))
