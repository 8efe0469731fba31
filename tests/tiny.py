"""Small detectors, scans and stores that many tests share. A test writes `import tiny` and calls, for example:

    detector = tiny.second_iou()                    # a SECOND-IoU that trains in milliseconds; weights from seed 0
    detector = tiny.pv_rcnn(seed=1)                 # the same for PV-RCNN
    config = tiny.second_iou_config(width=8)        # its configuration, for changes with `dataclasses.replace`
    scan = tiny.scan_with_car()                     # a road and the sides of one car, `tiny.CAR`
    frame = tiny.frame_with_car(seed=3)             # a labeled frame with a car somewhere
    store = tiny.store(folder, detector, [scan])    # the scenes that a vehicle makes of scans, ingested on a server
    coords = tiny.cells(index)                      # cells of `tiny.CUT`, a cut for scenes that no network made
    data = tiny.prepared(folder)                    # the split `train` of a prepared dataset
    preset = tiny.preset(steps=4)                   # what `train_preset` and `upcycle_preset` take
    config = tiny.upcycle_config(steps=3)           # settings of a training of `tiny.source_model()`, the smallest detector
    path = tiny.shared("data/kitti", "the reader gives the numbers of the real KITTI files")  # skips without the files
    arrays = tiny.golden("pv_rcnn_kitti.npz", "our picks are those of OpenPCDet")  # likewise
    one, two = tiny.for_thread_counts(lambda: iou_bev(a, b))  # the same call with 1 and with 2 torch threads

All scans lie in `tiny.GRID`: 12.8 m ahead, 6.4 m to each side. Tests that train add
`pytestmark = pytest.mark.usefixtures("one_thread")`, a fixture of `conftest.py`.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from upcycle3d.core.boxes import rotate_z
from upcycle3d.core.cut import CutSpec, VoxelGrid
from upcycle3d.core.features import SparseVoxels
from upcycle3d.core.frame import Frame
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.datasets.augment import AugmentationRanges
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.prepare import prepare
from upcycle3d.perception.models.anchors import AnchorClass
from upcycle3d.perception.models.decoders.bev import BevBackboneConfig
from upcycle3d.perception.models.decoders.pv_rcnn import PvRcnnConfig
from upcycle3d.perception.models.decoders.second_iou import SecondIouConfig
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoderConfig
from upcycle3d.perception.models.encoders.second import SecondEncoderConfig
from upcycle3d.perception.models.encoders.set_abstraction import SetAbstractionConfig
from upcycle3d.perception.models.post_processing import FinalNms, ProposalNms
from upcycle3d.perception.models.pv_rcnn import PvRcnnDetectorConfig
from upcycle3d.perception.models.second_iou import SecondIouDetectorConfig
from upcycle3d.perception.models.targets import RoiSampling
from upcycle3d.perception.recipes.presets import Preset
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.server.upcycle_config import FeatureGtConfig, ScoreThresholds, UpcycleConfig
from upcycle3d.perception.training.loop import LoopConfig
from upcycle3d.perception.training.optim import OneCycle
from upcycle3d.perception.training.supervised import SupervisedConfig
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.shards import ShardWriter

T = TypeVar("T")

# ---- detectors

GRID = VoxelGrid(range=(0.0, -6.4, -1.0, 12.8, 6.4, 3.0), voxel_size=(0.1, 0.1, 0.1))
CAR_ANCHOR = AnchorClass(name="Car", size=(4.0, 2.0, 1.6), bottom_z=0.0, matched=0.55, unmatched=0.40)
PEDESTRIAN_ANCHOR = AnchorClass(name="Pedestrian", size=(0.8, 0.8, 1.7), bottom_z=0.0, matched=0.35, unmatched=0.2)
BALLS = SetAbstractionConfig(channels=(4, 4), radii=(0.6, 1.2), limits=(4, 8))
"""Two small balls for every set abstraction of the tiny PV-RCNN."""


def _encoder(width: int) -> SecondEncoderConfig:
    return SecondEncoderConfig(grid=GRID, point_features=(), channels=(width // 4, *[width // 2] * 3, width))


def _bev(width: int) -> BevBackboneConfig:
    return BevBackboneConfig(layers=(1, 1), channels=(width, width), up_channels=(width, width))


def second_iou_config(
    *, width: int = 16, anchors: tuple[AnchorClass, ...] = (CAR_ANCHOR,), **decoder: Any
) -> SecondIouDetectorConfig:
    """A SECOND-IoU of `width` channels; `decoder` replaces fields of its `SecondIouConfig`. No dropout, and it drops no box."""
    fields: dict[str, Any] = {
        "head_channels": width,
        "pool_size": 3,
        "dropout": 0.0,
        "train_proposals": ProposalNms(pre=256, iou=0.8, post=64),
        "test_proposals": ProposalNms(pre=128, iou=0.7, post=32),
        "roi_sampling": RoiSampling(count=32),
        "iou_target": (0.0, 1.0),
        "final": FinalNms(score=0.0),
    }
    return SecondIouDetectorConfig(
        encoder=_encoder(width), decoder=SecondIouConfig(anchors=anchors, bev=_bev(width), **fields | decoder)
    )


def pv_rcnn_config(
    *, width: int = 16, keypoints: int = 96, anchors: tuple[AnchorClass, ...] = (CAR_ANCHOR,), **decoder: Any
) -> PvRcnnDetectorConfig:
    """A PV-RCNN of `width` channels whose keypoints see points and levels 1, 3 and 4; `decoder` as for `second_iou_config`."""
    fields: dict[str, Any] = {
        "fused_channels": width,
        "keypoint_channels": width,
        "grid_size": 3,
        "grid_pooling": SetAbstractionConfig(channels=(8, 8), radii=(0.8, 1.6), limits=(8, 8)),
        "head_channels": width,
        "dropout": 0.0,
        "train_proposals": ProposalNms(pre=256, iou=0.8, post=64),
        "test_proposals": ProposalNms(pre=128, iou=0.7, post=32),
        "roi_sampling": RoiSampling(count=32),
        "quality_target": (0.0, 1.0),
        "final": FinalNms(score=0.0, iou=0.1),
    }
    encoder = PvRcnnEncoderConfig(
        voxels=_encoder(width), keypoints=keypoints, raw_points=BALLS, conv1=BALLS, conv2=None, conv3=BALLS, conv4=BALLS
    )
    return PvRcnnDetectorConfig(encoder=encoder, decoder=PvRcnnConfig(anchors=anchors, bev=_bev(width), **fields | decoder))


def second_iou(config: SecondIouDetectorConfig | None = None, *, seed: int = 0) -> Detector:
    """An untrained SECOND-IoU in training mode, of `second_iou_config()` unless `config` says otherwise."""
    torch.manual_seed(seed)
    return (config or second_iou_config()).build()


def pv_rcnn(config: PvRcnnDetectorConfig | None = None, *, seed: int = 0) -> Detector:
    """An untrained PV-RCNN in training mode, of `pv_rcnn_config()` unless `config` says otherwise."""
    torch.manual_seed(seed)
    return (config or pv_rcnn_config()).build()


# ---- scans

CAR = torch.tensor([[6.3, 1.1, 0.8, 4.2, 1.9, 1.6, 0.4]])
CAR_LABEL = Labels.make(CAR, torch.zeros(1, dtype=torch.int64))


def cloud(xyz: Tensor) -> PointCloud:
    """A scan of these points with intensity 0."""
    return PointCloud(xyz=xyz, features=torch.zeros(len(xyz), 1))


NO_POINTS = cloud(torch.zeros(0, 3))


def scan_with_car(seed: int = 0, *, boxes: Tensor = CAR, road: int = 150) -> PointCloud:
    """A sparse road of `road` points, and 400 points on the faces of each box of `boxes` (N, 7); N may be 0."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(road, 3, generator=generator) * torch.tensor([12.8, 12.8, 0.05]) - torch.tensor([0.0, 6.4, 0.0])]
    for box in boxes:
        side = torch.rand(400, 3, generator=generator) - 0.5
        axis = torch.randint(2, (400,), generator=generator)
        side[torch.arange(400), axis] = 0.5 * torch.sign(side[torch.arange(400), axis])
        parts.append(rotate_z(side * box[3:6], box[6]) + box[:3])
    return cloud(torch.cat(parts))


def frame_with_car(seed: int) -> Frame:
    """A labeled frame: a sparse road and 150 points in one car, whose place and heading follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    road = torch.rand(100, 3, generator=generator) * torch.tensor([12.8, 12.8, 0.05]) - torch.tensor([0.0, 6.4, 0.0])
    x, y, yaw = (torch.rand(3, generator=generator) * torch.tensor([6.0, 6.0, 6.0]) + torch.tensor([3.0, -3.0, -3.0])).tolist()
    box = torch.tensor([[x, y, 0.8, 3.0, 1.6, 1.5, yaw]])
    body = (torch.rand(150, 3, generator=generator) - 0.5) * box[0, 3:6]
    xyz = torch.cat([road, rotate_z(body, box[0, 6]) + box[0, :3]])
    labels = Labels.make(box, torch.zeros(1), num_points=torch.full((1,), 150))
    return Frame(id=f"frame{seed}", points=cloud(xyz), labels=labels)


def assert_in_grid(voxels: SparseVoxels) -> None:
    """Every voxel lies in its grid and in a scene of its batch."""
    limits = torch.tensor([voxels.batch_size, *voxels.shape])
    assert bool(((voxels.coords >= 0) & (voxels.coords < limits)).all())


# ---- threads


def for_thread_counts(call: Callable[[], T], counts: Sequence[int] = (1, 2)) -> list[T]:
    """Results of `call` with each of these numbers of torch threads; afterwards the number is what it was."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
        return results
    finally:
        torch.set_num_threads(before)


# ---- scenes without a network

CUT_GRID = VoxelGrid(range=(0.0, -8.0, -2.0, 16.0, 8.0, 2.0), voxel_size=(0.5, 0.5, 0.5))
CUT = CutSpec(layer="backbone.out", channels=4, stride=(4, 1, 1), shape=(2, 32, 32), grid=CUT_GRID)
FINGERPRINT = "ab" * 32


def cells(index: Tensor) -> Tensor:
    """The cells (N, 3) int32 z, y, x with these numbers (N,) in a grid of (z, 32, 32), as `CUT` and `CUT_GRID` have."""
    return torch.stack([index // 1024, index // 32 % 32, index % 32], 1).to(torch.int32)


# ---- stores


def store(
    folder: Path, detector: Detector, scans: Sequence[PointCloud], *, codec: str = "fp16", rig: RigSpec | None = None
) -> SmashedStore:
    """The store that a server has in `folder` after a vehicle of a rig extracted `scans` with the detector's encoder, in that order.

    `scans` are in the sensor frame of the rig, which is the shifted frame without one."""
    extractor = Extractor(detector.encoder, rig or RigSpec(), codec)
    with ShardWriter(folder / "in", spec=extractor.spec, fingerprint=extractor.fingerprint, codec=codec) as writer:
        extract(scans, extractor, writer)
    ingest(folder / "in", folder / "store", expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
    return SmashedStore(folder / "store")


# ---- training on the server

EVERYTHING = (ScoreThresholds(iou_score=0.0, class_score=0.0, ignore=0.0),)
"""An untrained teacher is sure of nothing. With these thresholds every box that it finds is a label."""
NOTHING = (ScoreThresholds(iou_score=1.0, class_score=1.0, ignore=1.0),)
"""With these thresholds no box of an untrained teacher is a label."""


def source_model() -> Detector:
    """The smallest detector to train: a SECOND-IoU of 8 channels, with dropout, so that repeated trainings test its seed too."""
    fields = {"train_proposals": ProposalNms(pre=64, iou=0.8, post=32), "test_proposals": ProposalNms(pre=64, iou=0.5, post=16)}
    return second_iou(second_iou_config(width=8, dropout=0.3, roi_sampling=RoiSampling(count=16), **fields))


def upcycle_config(
    *, steps: int = 2, thresholds: tuple[ScoreThresholds, ...] = EVERYTHING, seed: int = 0, **changes: Any
) -> UpcycleConfig:
    """Settings of a training of `steps` steps with 2 + 2 scenes; `changes` replaces fields of `UpcycleConfig`."""
    fields: dict[str, Any] = {
        "loop": LoopConfig(seed=seed, optim=OneCycle(lr=0.01, total_steps=steps), log_every=1, checkpoint_every=2),
        "labeled_batch": 2,
        "unlabeled_batch": 2,
        "thresholds": thresholds,
        "f_gt": FeatureGtConfig(max_objects=(2,)),
        "obstacle_score": 1.0,
        "round_steps": 1,
    }
    return UpcycleConfig(**fields | changes)


def preset(*, steps: int = 4, anchors: tuple[AnchorClass, ...] = (CAR_ANCHOR,), width: int = 8) -> Preset:
    """A preset of the smallest detector: `steps` steps of two frames, a checkpoint after every second."""
    loop = LoopConfig(seed=0, optim=OneCycle(lr=0.003, total_steps=steps), log_every=1, checkpoint_every=2)
    detector = second_iou_config(width=width, anchors=anchors, roi_sampling=RoiSampling(count=16))
    return Preset(
        detector=detector,
        train=SupervisedConfig(loop=loop, batch_size=2, augmentation=AugmentationRanges(), gt_sampling=tuple(3 for _ in anchors)),
        upcycle=upcycle_config(
            steps=steps, thresholds=EVERYTHING * len(anchors), f_gt=FeatureGtConfig(max_objects=tuple(2 for _ in anchors))
        ),
    )


def prepared(folder: Path, *, frames: int = 6, classes: tuple[str, ...] = ("Car",)) -> DataSplit:
    """A prepared dataset of frames with one car each; returns its split `train`, the last two frames are `val`."""
    source = [frame_with_car(i) for i in range(frames)]
    ids = [frame.id for frame in source]
    prepare(source, ids, folder, splits={"train": ids[:-2], "val": ids[-2:]}, classes=classes, workers=0)
    return DataSplit(root=folder, name="train")


# ---- files that are not in the repository

_REPOSITORY = Path(__file__).resolve().parents[1]
_SHARED = Path(os.environ.get("UPCYCLE3D_REFERENCE_FILES", _REPOSITORY.parent / "shared"))


def shared(path: str, what: str) -> Path:
    """A file or folder of the reference files, or a skip of the test (or of the module) that says what is not checked.

    The reference files are real samples of KITTI, nuScenes, Waymo and Lyft and outputs of OpenPCDet. Their licenses do not allow
    a copy in the repository. They are looked for in the folder of the environment variable UPCYCLE3D_REFERENCE_FILES, otherwise
    in `shared/` next to the repository.

    Args:
        path: Place below that folder: `reference/golden/second_iou_kitti.npz`.
        what: What the test checks with it, as the end of "not checked: ...".
    """
    found = _SHARED / path
    if not found.exists():
        pytest.skip(
            f"not checked: {what}. It needs the reference files `{path}`, which are not on this machine", allow_module_level=True
        )
    return found


def golden(name: str, what: str) -> dict[str, np.ndarray]:
    """Arrays that OpenPCDet computed on one KITTI scan, from `reference/golden/`; skips like `shared` without them."""
    return dict(np.load(shared(f"reference/golden/{name}", what)))
