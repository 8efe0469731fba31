"""The database of labeled objects' features that F-GT pastes: reader, writer and builder (see `feature_gt.py`)."""

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

from ...core.cut import CutSpec
from ...core.errors import InvalidInput
from ...core.features import Keypoints
from ...core.files import atomic_file, sync_folder, write_atomically
from ...datasets.frame_source import FrameSource
from ...datasets.object_sizes import shift_sizes
from ..models.detector import Detector
from .feature_gt import FeatureObject, cut_objects
from .store import quantize_features
from .upcycle_config import FeatureGtConfig

DATABASE_VERSION = 3
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
    """Labelled objects' features on disk, memory-mapped, bound to the labelled split and to the encoder."""

    def __init__(self, folder: Path, table: pa.Table, channels: int, keypoint_channels: int) -> None:
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
        folder: Path,
        objects: Iterable[FeatureObject],
        *,
        spec: CutSpec,
        config: FeatureGtConfig,
        split_fingerprint: str,
        encoder_fingerprint: str,
    ) -> FeatureObjectDatabase:
        """Store ``objects`` one after the other; the folder appears under its name only when it is complete."""
        _refuse_existing(folder)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        rows, start, keypoint_start = [], 0, 0
        with ExitStack() as stack:
            features, coords, xyz, keypoint_features = (stack.enter_context(atomic_file(temporary / name)) for name in _FILES)
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
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        pq.write_table(table, temporary / "index.parquet")
        keypoint_channels = spec.keypoints.channels if spec.keypoints else 0
        meta = {
            "version": DATABASE_VERSION,
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
    def open(folder: Path, *, config: FeatureGtConfig, split_fingerprint: str, encoder_fingerprint: str) -> FeatureObjectDatabase:
        """Open a database, refusing one of another labelled split (it would leak labels), of another encoder, or cut otherwise."""
        try:
            meta = json.loads((folder / "database.json").read_text())
        except (OSError, ValueError) as error:
            raise InvalidInput(f"no readable feature database at {folder}: {error}; build it from the labelled split") from error
        if meta["version"] != DATABASE_VERSION:
            raise InvalidInput(
                f"the feature database at {folder} is of version {meta['version']}, this program reads {DATABASE_VERSION}; "
                "delete it and build it again"
            )
        if meta["split_fingerprint"] != split_fingerprint:
            raise InvalidInput(
                f"the feature database at {folder} was cut from another labelled split ({meta['split_fingerprint'][:12]}, this run "
                f"has {split_fingerprint[:12]}); using it would leak labels: build one from this split"
            )
        if meta["encoder_fingerprint"] != encoder_fingerprint:
            raise InvalidInput(
                f"the feature database at {folder} was made by another encoder ({meta['encoder_fingerprint'][:12]}, this run has "
                f"{encoder_fingerprint[:12]}); features of two encoders do not mix: build it with this encoder"
            )
        if meta["cutting"] != config.cutting():
            raise InvalidInput(
                f"the feature database at {folder} was cut with {meta['cutting']}, this run asks for {config.cutting()}; delete it and "
                "build it again"
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


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise InvalidInput(f"a feature database already exists at {folder}; delete it to build it again")


def build_feature_object_database(
    folder: Path,
    frames: FrameSource,
    detector: Detector,
    *,
    codec: str,
    config: FeatureGtConfig,
    split_fingerprint: str,
    encoder_fingerprint: str,
) -> FeatureObjectDatabase:
    """Encode every labelled frame as a vehicle would, codec included, and cut its objects out.

    Raises InvalidInput if ``folder`` exists.
    """
    _refuse_existing(folder)
    detector.eval()

    def objects() -> Iterator[FeatureObject]:
        for i in range(len(frames)):
            frame = frames[i]
            if frame.labels is None:
                continue
            if any(config.size_shift):
                frame = shift_sizes(frame, config.size_shift)
            assert frame.labels is not None
            with torch.no_grad():
                split = detector.encode([frame.points]).to("cpu")
            yield from cut_objects(quantize_features(split, codec), frame.labels, config)

    return FeatureObjectDatabase.write(
        folder,
        objects(),
        spec=detector.spec,
        config=config,
        split_fingerprint=split_fingerprint,
        encoder_fingerprint=encoder_fingerprint,
    )
