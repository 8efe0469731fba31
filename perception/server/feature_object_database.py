"""The object database of F-GT: the features of labeled objects on disk.

A folder holds `database.json` (what it was made of), `index.parquet` (one row per object), and one file each for features and
coordinates of cells and of keypoints, in the order of the rows. An object reads only its own part of the files.
A database is bound to the labeled split and to the encoder: objects of another split could leak the labels of frames that are
meant to be unlabeled, and features of two encoders do not mix.

Read next: `feature_gt.py`, the method that cuts and pastes these objects; `recipes/assembly.py`, which builds or opens a database.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ...core.config_json import first_difference
from ...core.cut import CutSpec
from ...core.errors import InvalidInput
from ...core.features import Keypoints
from ...core.files import atomic_file, sync_folder, write_atomically
from ...core.frame import labels_of
from ...datasets.frame_source import FrameSource
from ...datasets.object_sizes import shift_sizes
from ..models.detector import Detector
from .feature_gt import FeatureObject, cut_objects
from .store import quantize_features
from .upcycle_config import FeatureGtConfig

_VERSION = 3
_FILES = ("features.f32", "coords.i32", "keypoint_xyz.f32", "keypoint_features.f32")
_SCHEMA = pa.schema(
    {
        "box": pa.list_(pa.float32(), 7),
        "class": pa.int64(),
        "num_points": pa.int64(),
        "start": pa.int64(),
        "count": pa.int64(),
        "keypoint_start": pa.int64(),
        "keypoint_count": pa.int64(),
    }
)


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

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> FeatureObject:
        keypoints = None
        if self._keypoint_channels:
            xyz = self._rows("keypoint_xyz.f32", np.float32, 3, self._keypoints, index)
            features = self._rows("keypoint_features.f32", np.float32, self._keypoint_channels, self._keypoints, index)
            keypoints = Keypoints(xyz=xyz, features=features, starts=(0, len(xyz)))
        return FeatureObject(
            box=self.boxes[index],
            class_index=int(self.classes[index]),
            num_points=int(self._num_points[index]),
            coords=self._rows("coords.i32", np.int32, 3, self._cells, index),
            features=self._rows("features.f32", np.float32, self._channels, self._cells, index),
            keypoints=keypoints,
        )

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
        table = _write_objects(temporary, objects)
        pq.write_table(table, temporary / "index.parquet")
        keypoint_channels = spec.keypoints.channels if spec.keypoints else 0
        meta = {
            "version": _VERSION,
            "channels": spec.channels,
            "keypoint_channels": keypoint_channels,
            "cutting": config.cutting(),
            "split_fingerprint": split_fingerprint,
            "encoder_fingerprint": encoder_fingerprint,
        }
        write_atomically(temporary / "database.json", json.dumps(meta, indent=1).encode())
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
        try:
            meta = json.loads((folder / "database.json").read_text())
        except (OSError, ValueError) as error:
            raise InvalidInput(f"no readable object database at {folder}: {error}; build it from the labeled split") from error
        if meta["version"] != _VERSION:
            raise InvalidInput(
                f"the object database at {folder} is of version {meta['version']}, this program reads {_VERSION}; "
                "delete it and build it again"
            )
        if meta["split_fingerprint"] != split_fingerprint:
            raise InvalidInput(
                f"the object database at {folder} was cut from another labeled split ({meta['split_fingerprint'][:12]}, this run "
                f"has {split_fingerprint[:12]}); using it would leak labels: build one from this split"
            )
        if meta["encoder_fingerprint"] != encoder_fingerprint:
            raise InvalidInput(
                f"the object database at {folder} was made by another encoder ({meta['encoder_fingerprint'][:12]}, this run has "
                f"{encoder_fingerprint[:12]}); features of two encoders do not mix: build it with this encoder"
            )
        difference = first_difference(meta["cutting"], config.cutting())
        if difference:
            raise InvalidInput(
                f"the object database at {folder} was cut with other settings ({difference}); delete it to build it again"
            )
        table = pq.read_table(folder / "index.parquet", schema=_SCHEMA)
        channels, keypoint_channels = int(meta["channels"]), int(meta["keypoint_channels"])
        cells, keypoints = (int(np.sum(table[name].to_numpy())) for name in ("count", "keypoint_count"))
        sizes = (cells * channels * 4, cells * 12, keypoints * 12, keypoints * keypoint_channels * 4)
        for name, size in zip(_FILES, sizes, strict=True):
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found != size:
                raise InvalidInput(
                    f"{folder / name} holds {found} bytes, its index says {size}; delete the database and build it again"
                )
        return FeatureObjectDatabase(folder, table, channels, keypoint_channels)


def _write_objects(folder: Path, objects: Iterable[FeatureObject]) -> pa.Table:
    """Append the objects to the four files of a folder, and return their index."""
    rows, start, keypoint_start = [], 0, 0
    with ExitStack() as stack:
        features, coords, xyz, keypoint_features = (stack.enter_context(atomic_file(folder / name)) for name in _FILES)
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
                }
            )
            features.write(o.features.float().contiguous().numpy().tobytes())
            coords.write(o.coords.contiguous().numpy().tobytes())
            if o.keypoints is not None:
                xyz.write(o.keypoints.xyz.float().contiguous().numpy().tobytes())
                keypoint_features.write(o.keypoints.features.float().contiguous().numpy().tobytes())
            start, keypoint_start = start + len(o.coords), keypoint_start + count
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


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
        config: Which objects are cut out, and how; `size_shift` resizes them before they are encoded.
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
