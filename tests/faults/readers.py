"""Every kind of file that this program reads, with a valid example of it and what reads it.

A new kind of file joins `READERS`. Values that readers give are turned into hashes, so that two of them compare with `==`.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import tiny_readers
import tiny_waymo
import torch
from torch import nn

import tiny
from faults.fuzzing import Reader
from faults.kill_cases import CLASSES, SMALL, frames
from upcycle3d.core.config_json import config_from_json
from upcycle3d.core.cut import CutSpec
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.point_files import read_points, write_bin
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.strict_json import strict_json
from upcycle3d.core.structures import PointCloud
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.folder import read_labels
from upcycle3d.datasets.gt_database import GtDatabase, build_gt_database
from upcycle3d.datasets.kitti import read_calibration, read_ids
from upcycle3d.datasets.kitti_text import read_objects
from upcycle3d.datasets.layouts import open_kitti, open_nuscenes, open_waymo
from upcycle3d.datasets.nuscenes import LYFT_DIALECT
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.raw import RawDataset
from upcycle3d.datasets.readers.argoverse2 import open_argoverse2
from upcycle3d.datasets.readers.cvat import open_cvat
from upcycle3d.datasets.readers.labelcloud import open_labelcloud
from upcycle3d.datasets.readers.once import open_once
from upcycle3d.datasets.readers.pandaset import open_pandaset
from upcycle3d.datasets.readers.sustechpoints import open_sustechpoints
from upcycle3d.datasets.simulation.layout_kitti import write_kitti_layout
from upcycle3d.datasets.simulation.layout_lyft import write_lyft_layout
from upcycle3d.datasets.simulation.layout_waymo import write_waymo_layout
from upcycle3d.datasets.waymo_records import masked_crc32c
from upcycle3d.perception.adapt.glc.feature_file import read_target_features
from upcycle3d.perception.evaluation.lyft import read_lyft_boxes
from upcycle3d.perception.evaluation.waymo_json import read_waymo_detections, read_waymo_labels
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.openpcdet_file import read_openpcdet
from upcycle3d.perception.recipes.result_cache import ResultCache
from upcycle3d.perception.server.feature_object_database import FeatureObjectDatabase, build_feature_object_database
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.server.upcycle_config import FeatureGtConfig
from upcycle3d.perception.training.checkpoint import load_checkpoint, save_checkpoint
from upcycle3d.perception.training.detector_files import load_detector, save_detector
from upcycle3d.perception.training.optim import OneCycle, make_optimizer
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.encoder_file import load_encoder, save_encoder


def fingerprint(value: Any) -> str:
    """Hash a value of any kind that readers give."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes() if value.dtype != object else repr(value.tolist()).encode())
    elif isinstance(value, nn.Module):
        _feed(digest, dict(value.state_dict()))
        _feed(digest, repr(getattr(value, "config", None)))
        _feed(digest, repr(getattr(value, "trained_on", None)))
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            _feed(digest, f.name)
            _feed(digest, getattr(value, f.name))
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            _feed(digest, name)
            _feed(digest, value[name])
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)} values".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())


# ---- made once and copied: whole folders


def _copy_of(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A maker of a folder's content that runs `make` once and copies the result."""

    @cache
    def master() -> Path:
        folder = Path(mkdtemp(prefix="faults-"))
        make(folder)
        return folder

    def copy(folder: Path) -> None:
        shutil.copytree(master(), folder, dirs_exist_ok=True)

    return copy


def _bytes(name: str, make: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(make()) and None


# ---- scans


def _scan() -> PointCloud:
    return frames()[0].points


def _pcd(kind: str) -> bytes:
    rows = torch.cat([_scan().xyz, _scan().features], 1).numpy().astype("<f4")[:300]
    head = (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\nWIDTH {len(rows)}\nHEIGHT 1\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(rows)}\nDATA {kind}\n"
    ).encode()
    if kind == "ascii":
        return head + "".join(" ".join(f"{v:.4f}" for v in row) + "\n" for row in rows).encode()
    return head + rows.tobytes()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, torch.cat([_scan().xyz, _scan().features], 1).numpy()[:300])
    return buffer.getvalue()


# ---- text

_KITTI_LABELS = (
    "Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n"
    "Pedestrian 0.00 1 0.21 423.17 173.67 433.17 224.03 1.60 0.38 0.30 -5.87 1.63 23.11 -0.03\n"
    "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10\n"
)
_KITTI_CALIBRATION = (
    "P2: 721.5377 0 609.5593 44.85728 0 721.5377 172.854 0.2163791 0 0 1 0.002745884\n"
    "R0_rect: 0.9999239 0.00983776 -0.007445048 -0.009869795 0.9999421 -0.004278459 0.007402527 0.004351614 0.9999631\n"
    "Tr_velo_to_cam: 0.007533745 -0.9999714 -0.000616602 -0.004069766 0.01480249 0.0007280733 -0.9998902 -0.07631618 "
    "0.9998621 0.00752379 0.01480755 -0.2717806\n"
)
_FOLDER_LABELS = "# own labels\nCar 10.5 -2.0 0.8 4.2 1.8 1.6 0.1\nPedestrian 5 1 0.9 0.8 0.8 1.75 -3.0\n"


# ---- prepared data and databases


def _prepare(folder: Path) -> None:
    source = frames()[:3]
    ids = [frame.id for frame in source]
    prepare(source, ids, folder / "data", splits={"train": ids[:2], "val": ids[2:]}, classes=CLASSES, workers=0, chunk_frames=2)


def _read_prepared(folder: Path) -> str:
    data = PreparedDataset(folder / "data")
    return fingerprint([data.classes, data.rig, dict(data.splits), [data[i] for i in range(len(data))]])


def _read_split(folder: Path) -> str:
    data = DataSplit.parse(f"{folder / 'data'}:train").open()
    return fingerprint([data.ids, [data.labels(i) for i in range(len(data))]])


def _prepare_again(folder: Path) -> str:
    source = frames()[:3]
    ids = [frame.id for frame in source]
    prepare(source, ids, folder / "data", splits={"train": ids[:2], "val": ids[2:]}, classes=CLASSES, workers=0, chunk_frames=2)
    return _read_prepared(folder)


def _make_gt(folder: Path) -> None:
    data = PreparedDataset(_prepared_master() / "data", "train")
    build_gt_database(data, folder / "gt", class_names=CLASSES, fingerprint=data.split_fingerprint())


@cache
def _prepared_master() -> Path:
    folder = Path(mkdtemp(prefix="faults-"))
    _prepare(folder)
    return folder


def _read_gt(folder: Path) -> str:
    data = PreparedDataset(_prepared_master() / "data", "train")
    database = GtDatabase.open(folder / "gt", expected_fingerprint=data.split_fingerprint())
    return fingerprint([database[i] for i in range(len(database))])


# ---- models


@cache
def _detector() -> Any:
    return tiny.source_model().eval()


@cache
def _optimizer_of_network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make_optimizer(network.parameters(), OneCycle(lr=0.1, total_steps=10))
    network(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return network, optimizer


def _make_checkpoint(folder: Path) -> None:
    network, optimizer = _optimizer_of_network()
    save_checkpoint(folder, step=7, modules={"student": network}, optimizer=optimizer, meta={"note": [1, 2]})


def _read_checkpoint(folder: Path) -> str:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make_optimizer(network.parameters(), OneCycle(lr=0.1, total_steps=10))
    step, meta = load_checkpoint(folder / "step_00000007", {"student": network}, optimizer)
    return fingerprint([step, meta, network])


def _make_pth(folder: Path) -> None:
    state = {name: tensor for name, tensor in _optimizer_of_network()[0].state_dict().items()}
    torch.serialization.save({"model_state": state, "epoch": 3}, folder / "model.pth")


# ---- the fleet


def _make_store(folder: Path) -> None:
    tiny.store(folder, _detector(), [tiny.scan_with_car(seed) for seed in range(2)])


def _read_store(folder: Path) -> str:
    store = SmashedStore(folder / "store")
    return fingerprint([store.fingerprint, store.codecs, store.spec, [store[i] for i in range(len(store))]])


def _make_upload(folder: Path) -> None:
    extractor = Extractor(_detector().encoder, RigSpec(), "int8")
    with extractor.shard_writer(folder / "in") as writer:
        extract([tiny.scan_with_car(seed) for seed in range(2)], extractor, writer)


def _ingest(folder: Path) -> str:
    """What a store holds after an upload: the upload's scenes, or none of them."""
    from upcycle3d.perception.server.ingest import ingest

    encoder = _detector().encoder
    ingest(
        folder / "in", folder / "store", expected_fingerprint=encoder_fingerprint(encoder, RigSpec()), expected_spec=encoder.spec
    )
    store = SmashedStore(folder / "store")
    if not len(store):
        raise InvalidInput("the upload was refused, as it should be when it is damaged")
    return fingerprint(sorted(fingerprint(_without_id(store[i])) for i in range(len(store))))


def _without_id(scene: Any) -> list[Any]:
    """A scene without its random identifier."""
    return [scene.coords, scene.features, scene.codec, scene.encoder_fingerprint]


# ---- public layouts


def _make_lyft(folder: Path) -> None:
    from upcycle3d.datasets.simulation.places import LYFT

    write_lyft_layout(folder, LYFT, num_frames=1, seed=0, workers=1)


def _read_lyft(folder: Path) -> str:
    raw = open_nuscenes(folder, LYFT_DIALECT, classes=("Car",))
    return fingerprint([raw.source[i] for i in range(len(raw.source))])


def _make_waymo(folder: Path) -> None:
    write_waymo_layout(folder, tiny_waymo.SMALL, num_frames=2, seed=4, workers=1, splits={"train": 2})


def _read_waymo(folder: Path) -> str:
    raw = open_waymo(folder)
    return fingerprint([raw.source[i] for i in range(len(raw.source))])


def _waymo_message() -> bytes:
    """A `Frame` of Waymo's v1 with one laser and one box, written by hand; see `datasets/waymo_proto.py` for the fields."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3]) + _varint(value)
        return bytes([number << 3 | 2]) + _varint(len(value)) + value

    def doubles(values: Any) -> bytes:
        return field(1, np.asarray(values, "<f8").tobytes())

    image = np.full((4, 6, 4), -1, np.float32)
    image[..., 0] = np.random.default_rng(0).random((4, 6), np.float32) * 20 + 1
    shape = field(2, b"".join(field(1, size) for size in image.shape))
    stored = field(2, zlib.compress(field(1, image.astype("<f4").tobytes()) + shape))
    calibration = field(1, 2) + b"".join(
        bytes([number << 3 | 1]) + np.float64(v).tobytes() for number, v in ((3, -0.4), (4, 0.2))
    )
    calibration += field(5, doubles(np.eye(4).ravel()))
    box = b"".join(
        bytes([n << 3 | 1]) + np.float64(v).tobytes() for n, v in zip((1, 2, 3, 5, 4, 6, 7), (5, 1, 1, 4, 2, 1.5, 0.3))
    )
    label = field(1, box) + field(3, 1) + field(4, b"one") + field(5, 1) + field(7, 9)
    context = field(1, b"a_segment") + field(3, calibration)
    laser = field(1, 2) + field(2, stored)
    return field(1, context) + field(2, 1_500_000) + field(3, doubles(np.eye(4).ravel())) + field(5, laser) + field(6, label)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _read_waymo_message(folder: Path) -> str:
    """The message in a record whose checksums are right, as a hostile file has them."""
    data = (folder / "frame.message").read_bytes()
    head = struct.pack("<Q", len(data))
    record = b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (head, data))
    (folder / "segment-a.tfrecord").write_bytes(record)
    raw = open_waymo(folder)
    return fingerprint([raw.source[i] for i in range(len(raw.source))])


def _make_kitti(folder: Path) -> None:
    write_kitti_layout(folder, SMALL, num_frames=2, seed=0, workers=1)


def _read_kitti(folder: Path) -> str:
    raw = open_kitti(folder)
    return fingerprint([raw.source[i] for i in range(len(raw.source))])


# ---- databases and runs of a training


def _make_feature_database(folder: Path) -> None:
    data = PreparedDataset(_prepared_master() / "data", "train")
    config = FeatureGtConfig(max_objects=(2,))
    build_feature_object_database(
        folder / "feature_gt",
        data,
        _detector(),
        codec="fp16",
        config=config,
        split_fingerprint="ab" * 32,
        encoder_fingerprint="cd" * 32,
    )


def _read_feature_database(folder: Path) -> str:
    database = FeatureObjectDatabase.open(
        folder / "feature_gt",
        config=FeatureGtConfig(max_objects=(2,)),
        split_fingerprint="ab" * 32,
        encoder_fingerprint="cd" * 32,
    )
    return fingerprint([database[i] for i in range(len(database))])


def _make_run(folder: Path) -> None:
    with RunFolder.create(folder / "run", OneCycle(lr=0.1, total_steps=10), seed=0, tracker="none") as run:
        run.log(1, {"loss": 0.5})
        run.log(2, {"loss": 0.25})
        run.set_status("running", step=2, total_steps=10)


def _resume_run(folder: Path) -> str:
    with RunFolder.create(folder / "run", OneCycle(lr=0.1, total_steps=10), seed=0, resume=True, tracker="none") as run:
        run.rewind(2)
        run.log(3, {"loss": 0.1})
        return fingerprint([run.config_json(), run.metrics("train")])


def _make_results(folder: Path) -> None:
    ResultCache(folder, {"setting": 1}).write("upcycling", 0, {"ap": 50.0})


# ---- results and settings

_WAYMO_BOX = {"class": "Vehicle", "x": 1.0, "y": 2.0, "z": 1.0, "dx": 4.0, "dy": 2.0, "dz": 1.5, "yaw": 0.2}
_LYFT_BOX = {
    "sample_token": "a", "translation": [1.0, 2.0, 1.0], "size": [2.0, 4.0, 1.5], "rotation": [1.0, 0.0, 0.0, 0.0], "name": "car",
    "score": 0.5,
}  # fmt: skip


def _features() -> bytes:
    rng = np.random.default_rng(0)
    p = rng.random((20, 3)).astype(np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, features=rng.normal(size=(20, 4)).astype(np.float32), probabilities=p / p.sum(1, keepdims=True))
    return buffer.getvalue()


def _json_bytes(value: object) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()


def _frames_of(opener: Callable[[Path], RawDataset]) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        raw = opener(folder)
        return fingerprint([raw.source[i] for i in range(len(raw.source))])

    return read


_LAYOUTS: tuple[tuple[str, Callable[[Path], Any], Callable[[Path], RawDataset]], ...] = (
    ("Argoverse 2 log", tiny_readers.argoverse2, open_argoverse2),
    ("ONCE sequence", tiny_readers.once, open_once),
    ("PandaSet sequence", tiny_readers.pandaset, open_pandaset),
    ("SUSTechPOINTS scene", tiny_readers.sustechpoints, open_sustechpoints),
    ("CVAT export", tiny_readers.cvat, open_cvat),
    ("labelCloud folder", lambda folder: tiny_readers.labelcloud(folder, "vertices"), open_labelcloud),
)


READERS: tuple[Reader, ...] = (
    Reader(
        name="scan .bin", files=("*.bin",), protected=False,
        make=lambda folder: write_bin(folder / "a.bin", _scan()), read=lambda folder: fingerprint(read_points(folder / "a.bin")),
    ),
    Reader(
        name="scan .npy", files=("*.npy",), protected=False,
        make=_bytes("a.npy", _npy), read=lambda folder: fingerprint(read_points(folder / "a.npy")),
    ),
    *(
        Reader(
            name=f"scan .pcd {kind}", files=("*.pcd",), protected=False,
            make=_bytes("a.pcd", lambda kind=kind: _pcd(kind)), read=lambda folder: fingerprint(read_points(folder / "a.pcd")),
        )
        for kind in ("ascii", "binary")
    ),
    Reader(
        name="KITTI labels", files=("*.txt",), protected=False,
        make=_bytes("a.txt", _KITTI_LABELS.encode), read=lambda folder: fingerprint(read_objects(folder / "a.txt")),
    ),
    Reader(
        name="KITTI calibration", files=("*.txt",), protected=False,
        make=_bytes("a.txt", _KITTI_CALIBRATION.encode), read=lambda folder: fingerprint(read_calibration(folder / "a.txt")),
    ),
    Reader(
        name="list of frames", files=("*.txt",), protected=False,
        make=_bytes("a.txt", "000001\n000002\n000010\n".encode), read=lambda folder: fingerprint(read_ids(folder / "a.txt")),
    ),
    Reader(
        name="folder labels", files=("*.txt",), protected=False,
        make=_bytes("a.txt", _FOLDER_LABELS.encode), read=lambda folder: fingerprint(read_labels(folder / "a.txt", CLASSES)),
    ),
    Reader(
        name="KITTI folder", files=("training/*/*", "ImageSets/*"), protected=False, make=_copy_of(_make_kitti), read=_read_kitti,
    ),
    Reader(name="Lyft tables", files=("v1.01-train/*.json", "lidar/*.bin"), protected=False, make=_copy_of(_make_lyft), read=_read_lyft),
    *(
        Reader(name=name, files=("**/*.feather", "**/*.json", "**/*.bin"), protected=False, make=_copy_of(make), read=_frames_of(opener))
        for name, make, opener in _LAYOUTS
    ),
    Reader(
        name="Waymo message", files=("frame.message",), protected=False, make=_bytes("frame.message", _waymo_message),
        read=_read_waymo_message, writes=True,
    ),
    Reader(name="Waymo tables", files=("**/*.parquet",), protected=False, make=_copy_of(_make_waymo), read=_read_waymo),
    Reader(
        name="prepared data", files=("data/dataset.json", "data/index-*.parquet", "data/parts/*.f32"), protected=True,
        make=_copy_of(_prepare), read=_read_prepared,
    ),
    Reader(
        name="prepared split", files=("data/dataset.json", "data/index-*.parquet"), protected=True, make=_copy_of(_prepare),
        read=_read_split,
    ),
    Reader(
        name="prepare goes on", files=("data/preparation.json", "data/parts/*", "data/dataset.json", "data/index-*.parquet"),
        protected=True, make=_copy_of(_prepare), read=_prepare_again, writes=True,
    ),
    Reader(name="GT database", files=("gt/*",), protected=True, make=_copy_of(_make_gt), read=_read_gt),
    Reader(
        name="detector file", files=("*.safetensors",), protected=True,
        make=_copy_of(lambda folder: save_detector(folder / "detector.safetensors", _detector())),
        read=lambda folder: fingerprint(load_detector(folder)),
    ),
    Reader(
        name="encoder file", files=("*.safetensors",), protected=True,
        make=_copy_of(lambda folder: save_encoder(folder / "encoder.safetensors", _detector().encoder)),
        read=lambda folder: fingerprint(load_encoder(folder)),
    ),
    Reader(
        name="checkpoint", files=("step_*/*",), protected=True, make=_copy_of(_make_checkpoint), read=_read_checkpoint,
    ),
    Reader(
        name="weights .pth", files=("*.pth",), protected=True, make=_copy_of(_make_pth),
        read=lambda folder: fingerprint(read_openpcdet(folder / "model.pth")),
    ),
    Reader(name="store", files=("store/**/*.parquet", "store/**/*.json", "store/**/*.tar"), protected=True, make=_copy_of(_make_store), read=_read_store),
    Reader(name="uploaded shard", files=("in/*",), protected=True, make=_copy_of(_make_upload), read=_ingest, writes=True),
    Reader(
        name="feature database", files=("feature_gt/*",), protected=True, make=_copy_of(_make_feature_database),
        read=_read_feature_database,
    ),
    Reader(name="run folder", files=("run/*.json", "run/*.jsonl"), protected=False, make=_make_run, read=_resume_run, writes=True),
    Reader(
        name="stored result", files=("*.json",), protected=False, make=_make_results,
        read=lambda folder: fingerprint(ResultCache(folder, {"setting": 1}).read("upcycling", 0)),
    ),
    Reader(
        name="features .npz", files=("*.npz",), protected=False,
        make=_bytes("a.npz", _features), read=lambda folder: fingerprint(read_target_features(folder / "a.npz")),
    ),
    Reader(
        name="Waymo labels", files=("*.json",), protected=False,
        make=_bytes("a.json", _json_bytes([_WAYMO_BOX | {"level": 1}])),
        read=lambda folder: fingerprint(read_waymo_labels(folder / "a.json", classes=("Vehicle",))),
    ),
    Reader(
        name="Waymo detections", files=("*.json",), protected=False,
        make=_bytes("a.json", _json_bytes([_WAYMO_BOX | {"score": 0.5}])),
        read=lambda folder: fingerprint(read_waymo_detections(folder / "a.json", classes=("Vehicle",))),
    ),
    Reader(
        name="Lyft boxes", files=("*.json",), protected=False, make=_bytes("a.json", _json_bytes([_LYFT_BOX, _LYFT_BOX])),
        read=lambda folder: fingerprint(read_lyft_boxes(folder / "a.json", scored=True)),
    ),
    Reader(
        name="cut description", files=("*.json",), protected=False,
        make=_bytes("a.json", _json_bytes({
            "layer": "x", "channels": 4, "stride": [4, 1, 1], "shape": [2, 32, 32], "keypoints": None,
            "grid": {"range": [0.0, -8.0, -2.0, 16.0, 8.0, 2.0], "voxel_size": [0.5, 0.5, 0.5]},
        })),
        read=lambda folder: fingerprint(config_from_json(CutSpec, strict_json((folder / "a.json").read_bytes(), "the cut"))),
    ),
)  # fmt: skip
"""All readers of the campaign."""
