"""The object database of F-GT: the features of labeled objects on disk.

A folder holds `database.json` (what it was made of), `index.parquet` (one row per object), and one file each for features and
coordinates of cells and of keypoints, in the order of the rows. An object reads only its own part of the files.
A database is bound to the labeled split and to the encoder: objects of another split could leak the labels of frames that are
meant to be unlabeled, and features of two encoders do not mix.

Read next: `feature_gt.py`, the method that cuts and pastes these objects; `recipes/assembly.py`, which builds or opens a database.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ...core.config_json import config_from_json, first_difference
from ...core.cut import CutSpec
from ...core.errors import InvalidInput, require_counts
from ...core.features import Keypoints
from ...core.files import atomic_file, sync_folder, write_atomically
from ...core.foreign_text import shown
from ...core.frame import labels_of
from ...core.strict_json import json_digest, read_json, write_json_file
from ...datasets.fingerprint import same_split, short
from ...datasets.frame_source import FrameSource
from ...datasets.object_sizes import scale_sizes, shift_sizes
from ...datasets.parquet import read_parquet
from ..models.detector import Detector
from .feature_gt import FeatureObject, cut_objects
from .store import quantize_features
from .upcycle_config import FeatureGtConfig

_VERSION = 4
"""Version 4 added checksums of all files and a digest of the header; version 3 is still read."""
_CHECKED_WHEN_OPENED = 1 << 30  # bytes of features that are compared with their checksums at once; larger ones object by object
_REMEDY = "delete this folder: it is built again from the labeled split"
_INDEX = "index.parquet"
_FILES = ("features.f32", "coords.i32", "keypoint_xyz.f32", "keypoint_features.f32")
_COLUMNS_OF_VERSION_3 = {
    "box": pa.list_(pa.float32(), 7),
    "class": pa.int64(),
    "num_points": pa.int64(),
    "start": pa.int64(),
    "count": pa.int64(),
    "keypoint_start": pa.int64(),
    "keypoint_count": pa.int64(),
}
_SCHEMA = pa.schema(_COLUMNS_OF_VERSION_3 | {"crc32": pa.int64()})
_SCHEMAS = {3: pa.schema(_COLUMNS_OF_VERSION_3), 4: _SCHEMA}


@dataclass(frozen=True, kw_only=True)
class _Meta:
    """What `database.json` must say, and of which type."""

    version: int
    channels: int
    keypoint_channels: int
    cutting: Mapping[str, Any]
    split_fingerprint: str
    encoder_fingerprint: str
    files: Mapping[str, int] = field(default_factory=dict)
    """CRC-32 of each file by name."""
    digest: str = ""

    def __post_init__(self) -> None:
        require_counts("database.json", channels=self.channels)
        require_counts("database.json", least=0, keypoint_channels=self.keypoint_channels)
        if self.version > 3 and self.files.keys() != {*_FILES, _INDEX}:
            raise InvalidInput("it does not name the files of a database")


class FeatureObjectDatabase:
    """Labeled objects by position, read from disk one by one. It satisfies `feature_gt.ObjectDatabase`.

    `boxes` (M, 7) and `classes` (M,) of all objects are in memory. Get a database with `open`, or with
    `build_feature_object_database`.

    Example:
        database = FeatureObjectDatabase.open(folder, config=config.f_gt, split_fingerprint=split, encoder_fingerprint=encoder)
        database[0].features.shape  # (cells of the object, channels)
    """

    def __init__(self, folder: Path, table: pa.Table, channels: int, keypoint_channels: int) -> None:
        """Wrap a folder whose files were checked.

        Args:
            folder: The folder.
            table: Its index.
            channels: Channels of the features of cells.
            keypoint_channels: Channels of the features of keypoints; 0 where the cut has no keypoints.
        """
        self.folder = folder
        self.boxes = torch.from_numpy(table["box"].combine_chunks().flatten().to_numpy().reshape(-1, 7).copy())
        self.classes = torch.tensor(table["class"].to_numpy().astype(np.int64))
        self._num_points = table["num_points"].to_numpy()
        self._cells = table["start"].to_numpy(), table["count"].to_numpy()
        self._keypoints = table["keypoint_start"].to_numpy(), table["keypoint_count"].to_numpy()
        self._channels, self._keypoint_channels = channels, keypoint_channels
        self._checksums = table["crc32"].to_numpy() if "crc32" in table.column_names else None

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> FeatureObject:
        """Read object `index`. Raises `InvalidInput` if it has another checksum."""
        keypoints = None
        if self._keypoint_channels:
            xyz = self._rows("keypoint_xyz.f32", np.float32, 3, self._keypoints, index)
            features = self._rows("keypoint_features.f32", np.float32, self._keypoint_channels, self._keypoints, index)
            keypoints = Keypoints(xyz=xyz, features=features, starts=(0, len(xyz)))
        found = FeatureObject(
            box=self.boxes[index],
            class_index=int(self.classes[index]),
            num_points=int(self._num_points[index]),
            coords=self._rows("coords.i32", np.int32, 3, self._cells, index),
            features=self._rows("features.f32", np.float32, self._channels, self._cells, index),
            keypoints=keypoints,
        )
        if self._checksums is not None and _checksum(found) != self._checksums[index]:
            raise InvalidInput(f"object {index} of {self.folder} is damaged: it has another checksum; {_REMEDY}")
        return found

    def _rows(self, file: str, dtype: type, columns: int, bounds: tuple[Any, Any], index: int) -> Tensor:
        start, count = (int(column[index]) for column in bounds)
        if count == 0:  # an empty file cannot be mapped
            return torch.from_numpy(np.zeros((0, columns), dtype))
        mapped = np.memmap(self.folder / file, dtype, "r").reshape(-1, columns)
        return torch.from_numpy(np.array(mapped[start : start + count]))

    @staticmethod
    def write(
        folder: str | Path,
        objects: Iterable[FeatureObject],
        *,
        spec: CutSpec,
        config: FeatureGtConfig,
        split_fingerprint: str,
        encoder_fingerprint: str,
    ) -> FeatureObjectDatabase:
        """Write objects into a new database. The folder appears under its name only when it is complete.

        Args:
            folder: Folder to make.
            objects: The objects, written in this order.
            spec: The cut at which they were made.
            config: What they were cut with.
            split_fingerprint: Fingerprint of the labeled split that they come from.
            encoder_fingerprint: Fingerprint of the encoder that made their features.

        Returns:
            The database.

        Raises:
            InvalidInput: The folder exists.
        """
        folder = Path(folder)
        _refuse_existing(folder)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        table, checksums = _write_objects(temporary, objects)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        index = sink.getvalue().to_pybytes()
        write_atomically(temporary / _INDEX, index)
        keypoint_channels = spec.keypoints.channels if spec.keypoints else 0
        meta = {
            "version": _VERSION,
            "channels": spec.channels,
            "keypoint_channels": keypoint_channels,
            "cutting": config.cutting(),
            "split_fingerprint": split_fingerprint,
            "encoder_fingerprint": encoder_fingerprint,
            "files": checksums | {_INDEX: zlib.crc32(index)},
        }
        write_json_file(temporary / "database.json", meta | {"digest": json_digest(meta)})
        os.replace(temporary, folder)
        sync_folder(folder.parent)
        return FeatureObjectDatabase(folder, table, spec.channels, keypoint_channels)

    @staticmethod
    def open(
        folder: str | Path, *, config: FeatureGtConfig, split_fingerprint: str, encoder_fingerprint: str
    ) -> FeatureObjectDatabase:
        """Open a database after checking what it was made of and the sizes of its files.

        Args:
            folder: Folder of the database.
            config: What its objects must have been cut with; `max_objects` does not matter.
            split_fingerprint: Fingerprint of the labeled split that they must come from.
            encoder_fingerprint: Fingerprint of the encoder that must have made them.

        Returns:
            The database.

        Raises:
            InvalidInput: There is none, it is damaged or of another version, or it was made of something else.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        if not same_split(meta.split_fingerprint, split_fingerprint):
            raise InvalidInput(
                f"the object database at {folder} was cut from another labeled split ({short(meta.split_fingerprint)}, this run "
                f"has {short(split_fingerprint)}); using it would leak labels: build one from this split"
            )
        if meta.encoder_fingerprint != encoder_fingerprint:
            raise InvalidInput(
                f"the object database at {folder} was made by another encoder ({meta.encoder_fingerprint[:12]}, this run has "
                f"{encoder_fingerprint[:12]}); features of two encoders do not mix: build it with this encoder"
            )
        difference = first_difference(meta.cutting, config.cutting())
        if difference:
            raise InvalidInput(
                f"the object database at {folder} was cut with other settings ({difference}); delete it to build it again"
            )
        table = read_parquet(
            folder / _INDEX, _SCHEMAS[meta.version], remedy=_REMEDY, checksum=meta.files.get(_INDEX)
        ).combine_chunks()
        _check_index(table, folder / _INDEX)
        channels, keypoint_channels = meta.channels, meta.keypoint_channels
        cells, keypoints = (int(np.sum(table[name].to_numpy())) for name in ("count", "keypoint_count"))
        sizes = (cells * channels * 4, cells * 12, keypoints * 12, keypoints * keypoint_channels * 4)
        for name, size in zip(_FILES, sizes, strict=True):
            found = (folder / name).stat().st_size if (folder / name).is_file() else 0
            if found != size:
                raise InvalidInput(f"{folder / name} holds {found} bytes, its index says {size}; {_REMEDY}")
            if meta.files and sum(sizes) <= _CHECKED_WHEN_OPENED and _checksum_of_file(folder / name) != meta.files[name]:
                raise InvalidInput(f"{folder / name} is damaged: its bytes have another checksum; {_REMEDY}")
        return FeatureObjectDatabase(folder, table, channels, keypoint_channels)


def _read_meta(folder: Path) -> _Meta:
    path = folder / "database.json"
    values = read_json(path, "the header of an object database", remedy=_REMEDY)
    version = values.get("version")
    if type(version) is not int or version not in _SCHEMAS:
        raise InvalidInput(
            f"the object database at {folder} is of version {shown(version, most=20)}, this program reads "
            f"{', '.join(map(str, _SCHEMAS))}; delete it and build it again"
        )
    try:
        meta = config_from_json(_Meta, values)
        if version > 3 and meta.digest != json_digest(values):
            raise InvalidInput("its content has another digest than the one it names")
    except InvalidInput as error:
        raise InvalidInput(f"{path} is damaged or was edited: {error}; {_REMEDY}") from error
    return meta


def _check_index(table: pa.Table, path: Path) -> None:
    """Every row must follow the one before it, whatever program wrote it."""
    fault = next(
        (f"{name} is empty in {table[name].null_count} rows" for name in table.column_names if table[name].null_count), ""
    )
    boxes = pc.list_flatten(table["box"])
    if boxes.null_count or not np.isfinite(boxes.to_numpy()).all():
        fault = fault or "a box is not finite"
    for start, count in (("start", "count"), ("keypoint_start", "keypoint_count")):
        starts, counts = (table[name].fill_null(-1).to_numpy() for name in (start, count))
        if (counts < 0).any() or (counts > 1 << 32).any() or not np.array_equal(starts, np.cumsum(counts) - counts):
            fault = fault or f"{start} and {count} do not follow each other"
    if fault:
        raise InvalidInput(f"{path} is damaged or was edited: {fault}; {_REMEDY}")


def _checksum(o: FeatureObject) -> int:
    """CRC-32 of the numbers of an object."""
    tensors = [o.coords, o.features, *([] if o.keypoints is None else [o.keypoints.xyz, o.keypoints.features])]
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.contiguous().numpy().data, found) if tensor.numel() else found
    return found


def _checksum_of_file(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def _write_objects(folder: Path, objects: Iterable[FeatureObject]) -> tuple[pa.Table, dict[str, int]]:
    """Append the objects to the four files of a folder, and return their index and the checksums of the files."""
    rows, start, keypoint_start = [], 0, 0
    checksums = dict.fromkeys(_FILES, 0)
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(folder / name)) for name in _FILES]
        for o in objects:
            count = 0 if o.keypoints is None else len(o.keypoints.xyz)
            rows.append(
                {
                    "box": o.box.tolist(),
                    "class": o.class_index,
                    "num_points": o.num_points,
                    "start": start,
                    "count": len(o.coords),
                    "keypoint_start": keypoint_start,
                    "keypoint_count": count,
                    "crc32": _checksum(_stored(o)),
                }
            )
            parts = [
                o.features.float(),
                o.coords,
                *([] if o.keypoints is None else [o.keypoints.xyz.float(), o.keypoints.features.float()]),
            ]
            for name, file, tensor in zip(_FILES, files, parts):
                data = tensor.contiguous().numpy().tobytes()
                file.write(data)
                checksums[name] = zlib.crc32(data, checksums[name])
            start, keypoint_start = start + len(o.coords), keypoint_start + count
    return pa.Table.from_pylist(rows, schema=_SCHEMA), checksums


def _stored(o: FeatureObject) -> FeatureObject:
    """An object with the number types that its files hold."""
    keypoints = o.keypoints and replace(o.keypoints, xyz=o.keypoints.xyz.float(), features=o.keypoints.features.float())
    return replace(o, coords=o.coords.int(), features=o.features.float(), keypoints=keypoints)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise InvalidInput(f"an object database already exists at {folder}; delete it to build it again")


def build_feature_object_database(
    folder: str | Path,
    frames: FrameSource,
    detector: Detector,
    *,
    codec: str,
    config: FeatureGtConfig,
    split_fingerprint: str,
    encoder_fingerprint: str,
) -> FeatureObjectDatabase:
    """Encode every labeled frame as a vehicle would, codec included, cut its objects out and write them into a new database.

    Args:
        folder: Folder to make.
        frames: The labeled split. Frames without labels are left out.
        detector: Its encoder must be the one that the fleet runs. The detector is put into evaluation mode.
        codec: Codec of the fleet's scenes.
        config: Which objects are cut out, and how; shift and scales resize them before they are encoded.
        split_fingerprint: Fingerprint of the labeled split.
        encoder_fingerprint: Fingerprint of the encoder.

    Returns:
        The database.

    Raises:
        InvalidInput: The folder exists.
    """
    _refuse_existing(Path(folder))
    detector.eval()

    def objects() -> Iterator[FeatureObject]:
        for i in range(len(frames)):
            frame = frames[i]
            if frame.labels is None:
                continue
            if any(config.size_shift):
                frame = shift_sizes(frame, config.size_shift)
            if config.scales_objects:
                frame = scale_sizes(frame, config.object_scale, np.random.default_rng([i, 11]), sides=config.side_scale)
            [labels] = labels_of([frame])
            with torch.no_grad():
                scene = detector.encode([frame.points]).to("cpu")
            yield from cut_objects(quantize_features(scene, codec), labels, config)

    return FeatureObjectDatabase.write(
        folder,
        objects(),
        spec=detector.spec,
        config=config,
        split_fingerprint=split_fingerprint,
        encoder_fingerprint=encoder_fingerprint,
    )
