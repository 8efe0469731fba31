"""A detector that the project does not have works everywhere: two halves, a configuration, and one line in each table."""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from upcycle3d.core import config_json
from upcycle3d.core.config_json import config_from_json, config_to_json
from upcycle3d.core.cut import CutSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Boxes3D, Labels, LossTerms, PointCloud, Predictions
from upcycle3d.ops.voxelize import voxelize
from upcycle3d.perception.evaluation.detect import detect_frames
from upcycle3d.perception.models.decoders.bev import height_compression
from upcycle3d.perception.models.decoders.decoder import Decoder
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.detectors import DetectorConfig
from upcycle3d.perception.models.encoders.encoder import Encoder
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.encoders.table import EncoderConfig
from upcycle3d.perception.models.openpcdet import openpcdet_state
from upcycle3d.perception.server.store import collate_scenes
from upcycle3d.perception.training import detector_files
from upcycle3d.perception.training.ema import make_teacher, update_ema
from upcycle3d.perception.training.loop import LoopConfig
from upcycle3d.perception.training.optim import OneCycle
from upcycle3d.perception.training.supervised import train_supervised
from upcycle3d.perception.vehicle.extractor import Extractor
from upcycle3d.perception.wire import encoder_file

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the vehicle half


@dataclass(frozen=True, kw_only=True)
class PillarEncoderConfig:
    grid: VoxelGrid
    channels: int = 8

    def build(self) -> "PillarEncoder":
        return PillarEncoder(self)


class PillarEncoder(Encoder):
    """Columns as high as the range, and a linear layer on their mean point."""

    def __init__(self, config: PillarEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(3, config.channels)
        shape = config.grid.shape
        self.spec = CutSpec(layer="linear", channels=config.channels, stride=(1, 1, 1), shape=shape, grid=config.grid)

    def voxelize(self, points: Sequence[PointCloud]) -> SparseVoxels:
        features, coords = [], []
        for batch, cloud in enumerate(points):
            grid = self.config.grid
            found = voxelize(cloud.xyz, point_range=grid.range, voxel_size=grid.voxel_size, max_points=32, max_voxels=4096)
            features.append(found.features)
            coords.append(F.pad(found.coords, (1, 0), value=batch))
        return SparseVoxels(features=torch.cat(features), coords=torch.cat(coords), shape=self.spec.shape, batch_size=len(points))

    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        return CutFeatures(voxels=dataclasses.replace(voxels, features=self.linear(voxels.features)), spec=self.spec)


# ---- the server half


@dataclass(frozen=True, kw_only=True)
class CenterConfig:
    classes: tuple[str, ...] = ("Car",)
    size: tuple[float, float, float] = (4.2, 1.9, 1.6)


class CenterDecoder(Decoder):
    """One stage: a map that says where the center of an object is, which has a fixed size and heading."""

    def __init__(self, spec: CutSpec, config: CenterConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.heat = nn.Conv2d(spec.channels * spec.shape[0], len(config.classes), 5, padding=2)

    def forward(self, features: CutFeatures, labels: Sequence[Labels] | None = None) -> Tensor:
        return self.heat(height_compression(features.voxels))

    def loss(self, outputs: Tensor, labels: Sequence[Labels]) -> LossTerms:
        target = torch.zeros_like(outputs)
        for b, scene in enumerate(labels):
            x, y = scene.boxes.data[:, 0], scene.boxes.data[:, 1]
            width, depth = self.spec.cell_size()
            row, column = ((y - self.spec.grid.range[1]) / depth).long(), ((x - self.spec.grid.range[0]) / width).long()
            target[b, scene.classes, row, column] = 1
        return LossTerms(terms={"heat": F.binary_cross_entropy_with_logits(outputs, target)})

    def predict(self, outputs: Tensor) -> list[Predictions]:
        found = []
        for heat in torch.sigmoid(outputs):
            score, place = heat.flatten().topk(3)
            cell = place % heat[0].numel()
            x, y = self.spec.position((cell // heat.shape[2]).float(), (cell % heat.shape[2]).float())
            boxes = torch.cat([torch.stack([x, y, x * 0], 1), x.new_tensor(self.config.size).expand(3, 3), x[:, None] * 0], 1)
            classes = place // heat[0].numel()
            found.append(
                Predictions(boxes=Boxes3D(data=boxes), classes=classes, scores=score, class_scores=score, iou_scores=score)
            )
        return found


# ---- both


@dataclass(frozen=True, kw_only=True)
class PillarCenterConfig:
    label: ClassVar[str] = "Pillars"

    encoder: PillarEncoderConfig
    decoder: CenterConfig = CenterConfig()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.decoder.classes

    def build(self) -> Detector:
        encoder = self.encoder.build()
        return Detector(encoder, CenterDecoder(encoder.spec, self.decoder), self.class_names, self.label, self)


GRID = VoxelGrid(range=(0.0, -6.4, -1.0, 12.8, 6.4, 3.0), voxel_size=(0.4, 0.4, 4.0))
CONFIG = PillarCenterConfig(encoder=PillarEncoderConfig(grid=GRID))
FRAMES = [tiny.frame_with_car(seed) for seed in range(2)]
CLOUDS = [f.points for f in FRAMES]
LABELS = [f.labels for f in FRAMES]


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return CONFIG.build()


@pytest.fixture
def in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line in each table, for the two modules that read them."""
    monkeypatch.setattr(detector_files, "DetectorConfig", DetectorConfig | PillarCenterConfig)
    monkeypatch.setattr(encoder_file, "EncoderConfig", EncoderConfig | PillarEncoderConfig)
    monkeypatch.setattr(config_json, "_hints", typing.get_type_hints)  # the tables of another test may be remembered


def test_it_learns_and_detects(detector):
    loop = LoopConfig(seed=0, optim=OneCycle(lr=0.05, total_steps=30), checkpoint_every=100, log_every=10)
    start = detector.loss(detector.decode(detector.encode(CLOUDS), LABELS), LABELS).total()
    train_supervised(detector, lambda step: tuple(FRAMES), loop, progress=False)
    assert not detector.training
    assert detector.loss(detector.decode(detector.encode(CLOUDS)), LABELS).total() < start
    found = list(detect_frames(detector, FRAMES))
    assert [len(p) for _, p in found] == [3, 3]
    assert torch.equal(found[0][1].scores, detector.detect(CLOUDS[0]).scores)
    assert [len(p) for p in detector(CLOUDS)] == [3, 3]


def test_a_vehicle_smashes_its_scenes_and_the_server_learns_from_them(detector, tmp_path):
    detector.eval().freeze_encoder()
    store = tiny.store(tmp_path, detector, CLOUDS)
    scenes = collate_scenes([store[i] for i in range(2)])
    assert scenes.spec == detector.spec
    detector.train()
    teacher = make_teacher(detector)
    found = teacher.predict(teacher.decode(scenes))
    pseudo = [Labels.make(p.boxes.data[:1], p.classes[:1], exact=False, complete=False) for p in found]
    batch = CutFeatures.collate([detector.encode(CLOUDS), scenes])
    detector.loss(detector.decode(batch, LABELS + pseudo), LABELS + pseudo).total().backward()
    assert all(p.grad is None for p in detector.encoder.parameters())
    assert all(p.grad.any() for p in detector.decoder.parameters())
    update_ema(teacher, detector, 0, 0.9)
    assert Extractor(detector.encoder, RigSpec(), "int8").fingerprint == encoder_fingerprint(teacher.encoder, RigSpec())


def test_its_files_come_back(detector, tmp_path, in_the_tables):
    detector_files.save_run_detector(tmp_path, detector)
    loaded = detector_files.load_detector(tmp_path)
    assert loaded.config == CONFIG
    assert loaded.label == "Pillars"
    encoder = encoder_file.load_encoder(tmp_path / detector_files.ENCODER_FILE)
    assert encoder.config == CONFIG.encoder
    assert encoder_fingerprint(encoder, RigSpec()) == encoder_fingerprint(detector.encoder, RigSpec())
    expected = detector.eval().detect(CLOUDS[0])
    assert torch.equal(loaded.detect(CLOUDS[0]).scores, expected.scores)


def test_an_encoder_that_is_not_in_the_table_is_not_written(detector, tmp_path):
    with pytest.raises(InvalidInput, match=r"cannot load a PillarEncoder .*models/encoders/table\.py"):
        encoder_file.save_encoder(tmp_path / "encoder.safetensors", detector.encoder)


def test_a_detector_that_is_not_in_the_table_or_has_no_configuration_is_not_written(detector, tmp_path):
    with pytest.raises(InvalidInput, match=r"a PillarCenterConfig, is not in .*models/detectors\.py"):
        detector_files.save_detector(tmp_path / "detector.safetensors", detector)
    by_hand = Detector(detector.encoder, detector.decoder, detector.class_names)
    with pytest.raises(InvalidInput, match=r"has no configuration.*config\.build"):
        detector_files.save_detector(tmp_path / "detector.safetensors", by_hand)


def test_what_it_does_not_have_is_refused_by_name(detector):
    with pytest.raises(InvalidInput, match="CenterDecoder has no second stage"):
        detector.proposals(detector.encode(CLOUDS))
    with pytest.raises(InvalidInput, match="the encoder of this Pillars has no counterpart in OpenPCDet"):
        openpcdet_state(detector)


def test_a_half_that_lacks_a_method_is_refused_where_it_is_made():
    class Half(Decoder):
        def forward(self, features: CutFeatures, labels: Sequence[Labels] | None = None) -> None: ...

    with pytest.raises(TypeError, match="loss"):
        Half()


def test_the_encoder_of_every_detector_is_in_the_vehicles_table():
    for config in typing.get_args(DetectorConfig):
        fields = typing.get_type_hints(config)
        encoder = fields["encoder"] if "encoder" in fields else typing.get_type_hints(config.encoder.fget)["return"]
        for one in typing.get_args(encoder) or (encoder,):
            assert one in typing.get_args(EncoderConfig)
            assert typing.get_type_hints(one.build)["return"].__mro__[1] is Encoder
        assert typing.get_type_hints(config.build)["return"] is Detector
        assert isinstance(config.label, str | property)


@dataclass(frozen=True)
class _Stored:
    detector: DetectorConfig | PillarCenterConfig


def test_its_configuration_is_written_with_its_kind():
    text = config_to_json(_Stored(CONFIG))
    assert text["detector"]["kind"] == "PillarCenterConfig"
    assert "label" not in text["detector"]
    assert config_from_json(_Stored, text).detector == CONFIG
