"""What runs on a vehicle: scans to scenes, a stream that no bad scan stops, and a fingerprint that tells encoders apart."""

import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
import zstandard
from torch import nn

import tiny
from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid, cell_centers, cells_of_centers
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, Keypoints, SparseVoxels
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.models.encoders.encoder import Encoder
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoder, PvRcnnEncoderConfig
from upcycle3d.perception.models.encoders.second import SecondEncoder, SecondEncoderConfig
from upcycle3d.perception.recipes.fleet_extraction import extraction_numbers
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.codec import decode_scene, encode_scene, round_trip
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.perception.wire.manifest import read_manifest
from upcycle3d.perception.wire.shards import ShardWriteError, ShardWriter, read_members

GRID = VoxelGrid(range=(0.0, -8.0, -2.0, 16.0, 8.0, 2.0), voxel_size=(1.0, 1.0, 1.0))
FINE_GRID = replace(GRID, voxel_size=(0.25, 0.25, 0.1))


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    grid: VoxelGrid = GRID
    point_features: tuple[str, ...] = ("intensity",)
    max_points: float = 5.0


class TinyEncoder(Encoder):
    """Mean x, y, z, intensity of each occupied cell, a linear layer, batch norm, ReLU; cells in the order points come."""

    def __init__(self, config: TinyConfig | None = None) -> None:
        super().__init__()
        self.config = config or TinyConfig()
        self.linear = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.spec = CutSpec(layer="norm", channels=8, stride=(1, 1, 1), shape=GRID.shape, grid=GRID)

    def voxelize(self, points: Sequence[PointCloud]) -> SparseVoxels:
        features, coords = [], []
        for batch, cloud in enumerate(points):
            cell = (cloud.xyz - torch.tensor(GRID.range[:3])).floor().long().flip(1)
            inside = ((cell >= 0) & (cell < torch.tensor(GRID.shape))).all(1)
            cells, owner = cell[inside].unique(dim=0, return_inverse=True)
            columns = torch.cat([cloud.xyz, cloud.features], 1)[inside]
            sums = torch.zeros(len(cells), 4).index_add_(0, owner, columns)
            back = torch.arange(len(cells)).flip(0)  # not sorted, as real encoders give them
            features.append((sums / torch.bincount(owner, minlength=len(cells))[:, None])[back])
            coords.append(nn.functional.pad(cells[back].int(), (1, 0), value=batch))
        return SparseVoxels(features=torch.cat(features), coords=torch.cat(coords), shape=GRID.shape, batch_size=len(points))

    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        return CutFeatures(voxels=self.backbone(voxels), spec=self.spec)

    def backbone(self, voxels: SparseVoxels) -> SparseVoxels:
        return replace(voxels, features=self.norm(self.linear(voxels.features)).relu())

    def forward(self, points: Sequence[PointCloud]) -> CutFeatures:
        return self.features(points, self.voxelize(points))


class KeypointEncoder(TinyEncoder):
    """With every 7th voxel, counted backwards, as a keypoint that knows the mean of its scan's intensity; or points themselves."""

    def __init__(self, declared: str = "voxel_centers", given: str = "voxel_centers") -> None:
        super().__init__()
        self.given = given
        self.spec = replace(self.spec, keypoints=KeypointSpec(count=64, channels=8, source=declared))

    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        parts = []
        for batch, cloud in enumerate(points):
            cells = voxels.scene(batch).coords[:, 1:].flip(0)[::7]
            xyz = cell_centers(cells, GRID) if self.given == "voxel_centers" else cloud.xyz[: len(cells)]
            known = torch.arange(8.0).expand(len(cells), 8) + cloud.features.mean()
            parts.append(Keypoints(xyz=xyz, features=known, starts=(0, len(cells))))
        return CutFeatures(voxels=self.backbone(voxels), spec=self.spec, keypoints=Keypoints.collate(parts))


def encoder(seed: int = 0) -> TinyEncoder:
    torch.manual_seed(seed)
    return TinyEncoder()


def scan(seed: int, n: int = 300) -> PointCloud:
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(n, 3, generator=generator) * torch.tensor([18.0, 18.0, 5.0]) - torch.tensor([1.0, 9.0, 2.5])
    return PointCloud(xyz=xyz, features=torch.rand(n, 1, generator=generator))


def test_a_smashed_scene_is_what_the_encoder_gives_sorted():
    model = encoder()
    extractor = Extractor(model, RigSpec(), "fp16")
    scene, times = extractor.smash(scan(1))
    with torch.no_grad():
        expected = model.eval()([scan(1)]).voxels
    c = expected.coords.long()
    order = ((c[:, 1] * 16 + c[:, 2]) * 16 + c[:, 3]).argsort()
    assert torch.equal(scene.coords, expected.coords[order, 1:])
    assert torch.equal(scene.features, expected.features[order])
    assert times.voxelize_ms > 0
    assert times.backbone_ms > 0
    assert not scene.features.is_inference()


def test_smashing_twice_gives_the_same_features_under_unrelated_random_names():
    extractor = Extractor(encoder(), RigSpec(), "int8")
    first, second = extractor.smash(scan(1))[0], extractor.smash(scan(1))[0]
    assert torch.equal(first.features, second.features)
    assert first.scene_id != second.scene_id
    assert len(first.scene_id) == 32


def test_the_extractor_keeps_a_frozen_copy_so_its_fingerprint_stays_true():
    model = encoder().train()
    extractor = Extractor(model, RigSpec(), "fp16")
    before = extractor.smash(scan(1))[0]
    with torch.no_grad():
        model.linear.weight.mul_(2)
    assert model.training
    assert model.linear.weight.requires_grad
    assert torch.equal(extractor.smash(scan(1))[0].features, before.features)
    assert extractor.fingerprint == before.encoder_fingerprint == encoder_fingerprint(encoder(), RigSpec())


def test_the_rig_shifts_z_scales_intensity_and_leaves_its_argument_alone():
    points = PointCloud(
        xyz=torch.zeros(2, 3), features=torch.tensor([[255.0, 7.0], [51.0, 8.0]]), feature_names=("intensity", "time")
    )
    moved = RigSpec(z_shift=1.5, intensity_scale=1 / 255).from_sensor(points)
    assert moved.xyz[:, 2].tolist() == [1.5, 1.5]
    assert torch.allclose(moved.features, torch.tensor([[1.0, 7.0], [0.2, 8.0]]))
    assert points.features[0, 0] == 255
    with pytest.raises(InvalidInput, match="--intensity-scale 1/255"):
        RigSpec().from_sensor(points)
    with pytest.raises(InvalidInput, match="intensity_scale"):
        RigSpec(intensity_scale=0.0)


def test_a_scan_of_one_point_is_a_scene(tmp_path):
    extractor = Extractor(encoder(), RigSpec(), "int8")
    with extractor.shard_writer(tmp_path) as writer:
        report = extract([PointCloud(xyz=torch.full((1, 3), 0.5), features=torch.full((1, 1), 0.5))], extractor, writer)
    assert (report.frames, report.failures, report.raw_bytes) == (1, (), 16)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1)), "no point left"),
        (PointCloud(xyz=torch.full((7, 3), 5e4), features=torch.zeros(7, 1)), "none of its 7 points"),
    ],
)
def test_a_scan_without_a_cell_is_a_failure_of_that_scan_and_nothing_of_it_is_uploaded(tmp_path, points, reason):
    extractor = Extractor(encoder(), RigSpec(), "int8")
    with extractor.shard_writer(tmp_path) as writer:
        report = extract([scan(0), points], extractor, writer)
    assert (report.frames, [f.index for f in report.failures]) == (1, [1])
    assert reason in report.failures[0].reason
    assert (report.ledger.scans, report.ledger.scans_failed, report.ledger.scans_without_points) == (1, 1, 1)
    assert [len(read_manifest(path).members) for path in report.shards] == [1]


def test_points_that_are_not_finite_are_counted_and_refused():
    points = scan(0)
    points.xyz[5, 1] = float("nan")
    points.features[7] = float("inf")
    with pytest.raises(InvalidInput, match="2 of 300 points"):
        Extractor(encoder(), RigSpec(), "fp16").smash(points)


def test_what_is_no_scan_is_refused_by_its_type():
    with pytest.raises(InvalidInput, match="smash takes one PointCloud, found Tensor"):
        Extractor(encoder(), RigSpec(), "fp16").smash(torch.zeros(3, 4))


def test_a_module_that_is_no_vehicle_encoder_is_refused():
    with pytest.raises(InvalidInput, match="no spec, voxelize, features"):
        Extractor(nn.Linear(1, 1), RigSpec(), "fp16")
    with pytest.raises(InvalidInput, match="fp16"):
        Extractor(encoder(), RigSpec(), "fp8")


def test_what_is_no_rig_and_a_device_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="needs the rig of the vehicle, found NoneType"):
        Extractor(encoder(), None, "fp16")
    save_encoder(tmp_path / "encoder.safetensors", tiny.source_model().encoder)
    with pytest.raises(InvalidInput, match="'foo' is not a device"):
        Extractor.from_file(tmp_path, rig=RigSpec(), codec="fp16", device="foo")


def test_keypoints_leave_as_cells_in_the_encoders_order(tmp_path):
    extractor = Extractor(KeypointEncoder(), RigSpec(z_shift=0.3), "fp16")
    scene, _ = extractor.smash(scan(1))
    with torch.no_grad():
        expected = KeypointEncoder().eval()([RigSpec(z_shift=0.3).from_sensor(scan(1))]).keypoints
    assert 20 < len(scene.keypoint_cells) <= 64
    assert torch.equal(scene.keypoint_cells, cells_of_centers(expected.xyz, GRID))
    assert torch.equal(scene.keypoint_features, expected.features)
    assert not scene.keypoint_features.is_inference()
    with extractor.shard_writer(tmp_path) as writer:
        report = extract([scan(1), PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1)), scan(2)], extractor, writer)
    assert (report.frames, [f.index for f in report.failures]) == (2, [1])


def test_an_encoder_whose_keypoints_are_raw_points_never_runs_on_a_vehicle():
    with pytest.raises(InvalidInput, match=r'exact LiDAR points.*uploading raw points.*keypoint_source="voxel_centers"'):
        Extractor(KeypointEncoder(declared="raw_points", given="raw_points"), RigSpec(), "fp16")


def test_an_encoder_that_lies_about_where_its_keypoints_lie_uploads_none_of_them():
    with pytest.raises(InvalidInput, match="off the center of its voxel; only voxel centers leave a vehicle"):
        Extractor(KeypointEncoder(given="raw_points"), RigSpec(), "fp16").smash(scan(1))


def test_an_encoder_that_forgets_its_keypoints_is_refused():
    model = encoder()
    model.spec = replace(model.spec, keypoints=KeypointSpec(count=4, channels=8))
    with pytest.raises(InvalidInput, match="the features have none"):
        Extractor(model, RigSpec(), "fp16").smash(scan(1))


@pytest.mark.parametrize("model", [TinyEncoder, KeypointEncoder])
def test_nothing_but_cells_features_fingerprint_and_a_random_name_leaves(model):
    points = scan(3, n=150)
    extractor = Extractor(model(), RigSpec(), "int8")
    scene = extractor.smash(points)[0]
    assert scene.coords.dtype == scene.keypoint_cells.dtype == torch.int32
    assert (len(scene.keypoint_cells) > 0) == (model is KeypointEncoder)
    raw = zstandard.ZstdDecompressor().decompress(encode_scene(scene))
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + size])
    said = json.loads(entries.pop("__metadata__")["smashed_scene"])
    assert said.keys() == {"schema_version", "codec", "split", "encoder_fingerprint", "scene_id"}
    keypoints = {"keypoint_cells", "keypoint_features", "keypoint_feature_low", "keypoint_feature_scale"}
    expected = {"coord_gaps", "features", "feature_low", "feature_scale"} | (keypoints if model is KeypointEncoder else set())
    assert entries.keys() == expected
    for value in points.xyz[:50].flatten():
        assert struct.pack("<f", value.item()) not in raw


def unreadable(path: str) -> PointCloud:
    raise OSError(f"{path} is cut off")


def test_bad_scans_are_reported_with_their_place_and_cost_no_other_scan(tmp_path):
    nan = scan(3)
    nan.xyz[0] = float("nan")
    strange = PointCloud(xyz=torch.zeros(4, 3), features=torch.zeros(4, 0), feature_names=())
    stream = [scan(0), nan, partial(unreadable, "0001.bin"), strange, lambda: scan(4), scan(5)]
    extractor = Extractor(encoder(), RigSpec(), "fp16")
    seen: list[int] = []
    with extractor.shard_writer(tmp_path, scenes_per_shard=2) as writer:
        report = extract(stream, extractor, writer, on_frame=seen.append)
    assert report.frames == 3
    assert [f.index for f in report.failures] == [1, 2, 3]
    assert "NaN" in report.failures[0].reason
    assert "OSError: 0001.bin is cut off" in report.failures[1].reason
    assert seen == [1, 2, 3, 4, 5, 6]
    assert sum(len(read_manifest(path).members) for path in report.shards) == 3


def test_the_report_counts_bytes_and_times_of_every_stage(tmp_path):
    extractor = Extractor(encoder(), RigSpec(), "int8")
    with extractor.shard_writer(tmp_path, scenes_per_shard=2) as writer:
        report = extract((scan(i) for i in range(5)), extractor, writer)
    assert report.raw_bytes_per_frame == 300 * 4 * 4
    stored = [m.length for path in report.shards for m in read_manifest(path).members]
    assert report.smashed_bytes == sum(stored)
    assert report.smashed_bytes_per_frame == sum(stored) / 5
    assert len(report.shards) == 3
    assert report.cells == report.cells_sent > 0  # no defence
    numbers = extraction_numbers(report)  # `extraction.json` of a job
    assert (numbers["cells"], numbers["cells_sent"]) == (report.cells, report.cells_sent)
    for stage in (report.voxelize, report.backbone, report.codec, report.write):
        assert 0 <= stage.median_ms <= stage.p95_ms
    assert min(report.voxelize.mean_ms, report.backbone.mean_ms, report.codec.mean_ms, report.write.mean_ms) > 0


def test_an_empty_stream_gives_an_empty_report(tmp_path):
    extractor = Extractor(encoder(), RigSpec(), "int8")
    with extractor.shard_writer(tmp_path) as writer:
        report = extract([], extractor, writer)
    assert (report.frames, report.shards, report.smashed_bytes_per_frame, report.codec.p95_ms) == (0, (), 0.0, 0.0)


def test_a_stream_that_breaks_raises_after_its_scenes_are_safe(tmp_path):
    def stream():
        yield scan(0)
        raise OSError("the bag ends here")

    extractor = Extractor(encoder(), RigSpec(), "int8")
    writer = extractor.shard_writer(tmp_path)
    with pytest.raises(OSError, match="the bag ends here"):
        extract(stream(), extractor, writer)
    assert len(writer.shards) == 1


def test_a_full_disk_stops_the_run(tmp_path, monkeypatch):
    def full(self: ShardWriter) -> None:
        raise ShardWriteError("no room")

    extractor = Extractor(encoder(), RigSpec(), "int8")
    writer = extractor.shard_writer(tmp_path, scenes_per_shard=1)
    monkeypatch.setattr(ShardWriter, "flush", full)
    with pytest.raises(ShardWriteError):
        extract([scan(0), scan(1)], extractor, writer)


def test_a_writer_for_another_encoder_is_refused_before_any_scan(tmp_path):
    extractor, other = Extractor(encoder(0), RigSpec(), "int8"), Extractor(encoder(1), RigSpec(), "int8")
    with pytest.raises(
        InvalidInput, match=r"the extractor makes: encoder fingerprint \w{8}…, expected \w{8}…; make the writer with"
    ) as error:
        extract([scan(0)], extractor, other.shard_writer(tmp_path))
    assert len(str(error.value)) < 250


def test_what_is_stored_equals_the_round_trip_that_labeled_batches_get(tmp_path):
    extractor = Extractor(encoder(), RigSpec(), "int8")
    with extractor.shard_writer(tmp_path) as writer:
        (path,) = extract([scan(0)], extractor, writer).shards
    manifest = read_manifest(path)
    ((_, blob),) = read_members(tmp_path / manifest.tar_name, manifest)
    stored = decode_scene(blob, expected_spec=extractor.spec, expected_fingerprint=extractor.fingerprint)
    assert torch.equal(stored.features, round_trip(extractor.smash(scan(0))[0].features, "int8"))


# ------------------------------------------------------------------------------------------------------- what was dropped


def small_grid_encoder(limit: int) -> SecondEncoder:
    torch.manual_seed(0)
    return SecondEncoder(SecondEncoderConfig(grid=FINE_GRID, channels=(4, 4, 4, 4, 8), max_voxels=limit)).eval()


def test_points_and_cells_of_every_scan_are_counted(tmp_path):
    extractor = Extractor(small_grid_encoder(250), RigSpec(), "int8")
    read = Ledger(scans=1, points=320, points_non_finite=20)
    with extractor.shard_writer(tmp_path) as writer:
        report = extract([scan(0), lambda: (scan(1), read)], extractor, writer)
    counts = report.ledger
    assert (counts.scans, counts.scans_failed, counts.points, counts.points_non_finite) == (2, 0, 620, 20)
    assert 50 < counts.points_outside_range < 300
    assert counts.cells_over_limit == 0
    assert report.scans.scans == 2
    assert report.scans.points == (600 - counts.points_outside_range) / 2


def test_a_scan_of_which_the_picture_leaves_almost_nothing_names_the_size_of_the_picture_and_not_the_z_shift(tmp_path):
    extractor = Extractor(small_grid_encoder(250), RigSpec(z_shift=500.0), "int8")
    cropped = Ledger(scans=1, points=58304, points_outside_camera=58004)
    with extractor.shard_writer(tmp_path) as writer:
        report = extract([lambda: (scan(0), cropped), scan(1)], extractor, writer)
    first, second = (failure.reason for failure in report.failures)
    assert "58,004 of 58,304 points lie outside the camera's view" in first
    assert "--image-size" in first
    assert "z-shift" not in first
    assert "lie below or above it (z)" in second
    assert "--z-shift" in second
    assert report.ledger.points_outside_height > 0


@pytest.mark.parametrize(("scenes_per_shard", "scans"), [(256, 40), (256, 3), (1, 3), (4, 9)])
def test_scans_that_lose_many_cells_are_refused_before_anything_is_written(tmp_path, scenes_per_shard, scans):
    extractor = Extractor(small_grid_encoder(100), RigSpec(), "int8")
    seen: list[int] = []
    with extractor.shard_writer(tmp_path, scenes_per_shard=scenes_per_shard) as writer:
        report = extract([scan(i) for i in range(scans)], extractor, writer, on_frame=seen.append, refuse_lost_cells=True)
    assert report.refused
    assert (report.frames, report.shards, list(tmp_path.iterdir()), len(seen)) == (0, (), [], min(scans, 8, scenes_per_shard))
    assert report.ledger.cells_over_limit > 0.1 * report.ledger.cells
    with extractor.shard_writer(tmp_path) as writer:
        report = extract([scan(i) for i in range(3)], extractor, writer)
    assert (report.refused, report.frames) == (False, 3)


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_stable_and_ignores_mode_gradients_and_step_counters():
    model = encoder()
    fingerprint = encoder_fingerprint(model, RigSpec())
    assert len(fingerprint) == 64
    model.eval().requires_grad_(False)
    model.norm.num_batches_tracked += 5
    model.config = TinyConfig(max_points=5, point_features=["intensity"])  # equal values, another spelling
    assert encoder_fingerprint(model, RigSpec(z_shift=0)) == fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.linear.weight.data[0, 0].add_(1e-6),
        lambda m: m.norm.running_mean[3].add_(1e-6),
        lambda m: m.norm.running_var[3].add_(1e-6),
        lambda m: setattr(m, "config", replace(m.config, max_points=4)),
        lambda m: setattr(m, "config", replace(m.config, point_features=("intensity", "time"))),
        lambda m: setattr(m, "spec", replace(m.spec, layer="linear")),
        lambda m: setattr(m, "spec", replace(m.spec, keypoints=KeypointSpec(count=1, channels=1))),
        lambda m: m.register_buffer("extra", torch.zeros(1), persistent=False),
        lambda m: m.double(),
    ],
)
def test_the_fingerprint_changes_with_everything_that_shapes_a_feature(change):
    model = encoder()
    before = encoder_fingerprint(model, RigSpec())
    change(model)
    assert encoder_fingerprint(model, RigSpec()) != before


def test_the_fingerprint_covers_the_rig_and_names_what_it_cannot_cover():
    model = encoder()
    rigs = [RigSpec(), RigSpec(z_shift=1.6), RigSpec(intensity_scale=1 / 255)]
    assert len({encoder_fingerprint(model, rig) for rig in rigs}) == 3
    model.config = replace(model.config, max_points=float("nan"))
    with pytest.raises(InvalidInput, match="max_points"):
        encoder_fingerprint(model, RigSpec())
    model.config = {"max_points": 5}
    with pytest.raises(InvalidInput, match="config"):
        encoder_fingerprint(model, RigSpec())


def test_a_vehicle_loads_no_decoder_server_label_or_training_code():
    code = (
        "import json, sys\n"
        "import upcycle3d.perception.vehicle.extractor, upcycle3d.perception.wire.shards, upcycle3d.perception.wire.codec\n"
        "print(json.dumps([m for m in sys.modules if m.startswith('upcycle3d')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = json.loads(done.stdout)
    assert "upcycle3d.perception.vehicle.extractor" in loaded
    for forbidden in (".decoders", ".server", ".datasets", ".training", ".evaluation"):
        assert not [m for m in loaded if forbidden in m]


def test_the_reference_encoder_is_a_vehicle_encoder():
    torch.manual_seed(0)
    model = SecondEncoder(SecondEncoderConfig(grid=FINE_GRID, channels=(4, 4, 4, 4, 8))).eval()
    scene, _ = Extractor(model, RigSpec(), "fp16").smash(scan(2))
    with torch.no_grad():
        expected = model([scan(2)]).voxels
    assert len(scene.coords) == len(expected.coords) > 0
    assert np.allclose(scene.features.sum(), expected.features.sum(), rtol=1e-4)


def test_pv_rcnns_encoder_is_a_vehicle_encoder_unless_its_keypoints_are_raw_points():
    torch.manual_seed(0)
    voxels = SecondEncoderConfig(grid=FINE_GRID, channels=(4, 4, 4, 4, 8))
    model = PvRcnnEncoder(PvRcnnEncoderConfig(voxels=voxels, keypoints=40)).eval()
    scene, _ = Extractor(model, RigSpec(), "fp16").smash(scan(2))
    with torch.no_grad():
        expected = model([scan(2)]).keypoints
    assert len(scene.keypoint_cells) == 40
    assert torch.equal(cell_centers(scene.keypoint_cells, FINE_GRID), expected.xyz)
    assert torch.allclose(scene.keypoint_features, expected.features, rtol=1e-4, atol=1e-5)
    empty, _ = Extractor(model, RigSpec(), "int8").smash(PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1)))
    assert len(empty.keypoint_cells) == 0
    encode_scene(empty)
    raw = PvRcnnEncoder(PvRcnnEncoderConfig(voxels=voxels, keypoints=40, keypoint_source="raw_points"))
    with pytest.raises(InvalidInput, match="uploading up to 40 of them per scan is uploading raw points"):
        Extractor(raw, RigSpec(), "fp16")
