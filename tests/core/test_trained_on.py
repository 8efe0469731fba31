"""Scans that differ from those of training are noticed, and scans that do not differ are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from upcycle3d.core.structures import PointCloud
from upcycle3d.core.trained_on import ScanMeasures, ScanStatistics, compare_scans, estimate_road_height, summarize_scans

TRAINED = ScanStatistics(scans=10, points=20_000, cells=6_000, ground_height=0.05, intensity=0.3)


def test_scans_like_those_of_training_give_no_warning():
    assert compare_scans(TRAINED, replace(TRAINED, points=30_000, ground_height=-0.2, intensity=0.2)) == ()


def test_a_forgotten_mounting_height_names_the_option_and_the_shift():
    (warning,) = compare_scans(TRAINED, replace(TRAINED, ground_height=-1.68))
    assert "--z-shift" in warning
    assert "+1.73" in warning


def test_a_wrong_intensity_scale_and_a_sparse_sensor_are_named():
    bytes_, sparse = replace(TRAINED, intensity=70.0), replace(TRAINED, points=3_000.0)
    assert "--intensity-scale" in compare_scans(TRAINED, bytes_)[0]
    assert "sensor" in compare_scans(TRAINED, sparse)[0]


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
