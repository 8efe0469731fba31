"""What a training knew about its data is kept beside the weights and comes back; files that say nothing are read too."""

from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import SparseVoxels
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.core.tensor_file import read_tensors, write_tensors
from upcycle3d.core.trained_on import ScanStatistics, TrainedOn
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoderConfig
from upcycle3d.perception.models.encoders.scan_survey import measure_scan, measures_of
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.training.ema import make_teacher
from upcycle3d.perception.wire.encoder_file import load_encoder

KNOWN = TrainedOn(
    rig=RigSpec(z_shift=1.73, intensity_scale=1 / 255),
    feature_names=("intensity",),
    classes=("Car",),
    point_range=tiny.GRID.range,
    scans=ScanStatistics(scans=3, points=550.0, cells=400.5, ground_height=float("nan"), intensity=0.25),
    camera_view=True,
)


def test_detector_and_encoder_files_keep_what_the_training_knew_and_their_fingerprint_does_not_change(tmp_path):
    model = tiny.second_iou()
    before = encoder_fingerprint(model.encoder, RigSpec())
    model.trained_on = KNOWN
    assert encoder_fingerprint(model.encoder, RigSpec()) == before
    assert make_teacher(model).trained_on == KNOWN
    save_run_detector(tmp_path, model)
    for loaded in (load_detector(tmp_path).trained_on, load_encoder(tmp_path).trained_on):
        assert repr(loaded) == repr(KNOWN)  # NaN is not equal to itself


def test_a_file_that_says_nothing_of_its_training_is_read(tmp_path):
    save_run_detector(tmp_path, tiny.second_iou())
    assert load_detector(tmp_path).trained_on is None
    assert load_encoder(tmp_path).trained_on is None


def test_an_entry_that_cannot_be_used_is_refused_with_the_file(tmp_path):
    model = tiny.second_iou()
    model.trained_on = KNOWN
    save_run_detector(tmp_path, model)
    file = read_tensors(tmp_path / "encoder.safetensors")
    meta = {name: file.meta[name] for name in ("format", "config")} | {"trained_on": '{"rig": 3}'}
    write_tensors(tmp_path / "encoder.safetensors", file.tensors, meta)
    with pytest.raises(InvalidInput, match=r"what .*encoder.safetensors says about its training cannot be used"):
        load_encoder(tmp_path)


def test_one_scan_is_measured_with_the_encoders_grid():
    scan = tiny.scan_with_car()
    measures, ledger = measure_scan(scan, tiny.second_iou().encoder)
    assert measures.points == len(scan) == ledger.points
    assert 0 < measures.cells <= measures.points
    assert ledger.cells == measures.cells
    assert ledger.points_outside_range == ledger.cells_over_limit == 0
    empty, counts = measure_scan(tiny.NO_POINTS, tiny.second_iou().encoder)
    assert (empty.points, empty.cells, counts.scans_without_points) == (0, 0, 1)


@pytest.mark.parametrize("make", [tiny.second_iou, tiny.pv_rcnn])
def test_an_encoder_counts_the_cells_over_its_limit_and_the_points_outside_while_it_sorts_them(make):
    inside = tiny.scan_with_car()
    scan = PointCloud(
        xyz=torch.cat([inside.xyz, torch.full((7, 3), 500.0)]),
        features=torch.cat([inside.features, torch.zeros(7, inside.features.shape[1])]),
        feature_names=inside.feature_names,
    )
    whole = make().encoder
    _, everything = measure_scan(scan, whole)
    config = whole.config
    if isinstance(config, PvRcnnEncoderConfig):
        encoder = replace(config, voxels=replace(config.voxels, max_voxels=50)).build()
    else:
        encoder = replace(config, max_voxels=50).build()
    measures, ledger = measure_scan(scan, encoder)
    voxels = encoder.voxelize([inside, scan])
    assert ledger.points_outside_range == 7
    assert (ledger.cells, ledger.cells_over_limit) == (everything.cells, everything.cells - 50)
    assert len(voxels.coords) == 2 * 50
    assert [c.points_outside for c in voxels.counts] == [0, 7]
    assert voxels.counts[1].ledger() == ledger
    assert measures_of(scan, voxels.counts[1]) == measures
    assert voxels.scene(1).counts == voxels.counts[1:]
    assert SparseVoxels.collate([voxels.scene(0), voxels.scene(1)]).counts == voxels.counts


def test_counts_of_the_grid_join_those_of_the_reader_without_counting_points_twice():
    scan = tiny.scan_with_car()
    reading = Ledger(scans=1, points=len(scan) + 9, points_non_finite=9)
    _, ledger = measure_scan(scan, tiny.second_iou().encoder, reading)
    assert (ledger.scans, ledger.points, ledger.points_non_finite) == (1, len(scan) + 9, 9)
