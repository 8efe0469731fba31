"""F-GT: ground-truth sampling on features (UpCycling, Hwang et al. 2023, known to us from its abstract; design.md section 5).

GT sampling pastes labelled objects into other scenes. On features it is safe where flips and rotations are not: an object keeps
its place, so its cells need no resampling, and the sparse convolutions spread an object by less than one cell. The objects are cut
from labelled scenes encoded by the same frozen encoder, so they are what the vehicle would have sent, and their boxes are exact.

    cut    cells of a labelled scene whose centre lies in an object's footprint, one cell wider on each side;
           of PV-RCNN also the keypoints in its box, 0.2 m larger in each full dimension
    paste  the same cells and keypoints of an unlabelled scene are removed, then the object's are written; never added.
           Keypoints beyond the number that the scene had are taken from its background at random
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ...core.cut import CutSpec
from ...core.errors import InvalidInput
from ...core.features import CutFeatures, Keypoints
from ...core.files import atomic_file, sync_folder, write_atomically
from ...core.structures import Boxes3D, Labels
from ...datasets.frame_source import FrameSource
from ...datasets.object_sizes import shift_sizes
from ...ops.iou3d import iou_bev
from ...ops.points_in_boxes import points_in_boxes_mask
from ..models.detector import Detector
from .store import as_stored

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


def footprint(boxes: Tensor, spec: CutSpec, margin_cells: float = 1.0) -> Tensor:
    """(N, H, W) bool: cells whose centre (``CutSpec.position``) lies in each box (N, 7) seen from above, widened by ``margin_cells``
    on each side."""
    _, height, width = spec.shape
    x, y = spec.position(torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device))
    dx = x[None, None, :] - boxes[:, 0, None, None]
    dy = y[None, :, None] - boxes[:, 1, None, None]
    cos, sin = torch.cos(boxes[:, 6])[:, None, None], torch.sin(boxes[:, 6])[:, None, None]
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    cell_x, cell_y = spec.cell_size()
    half = boxes[:, 3:5, None, None] / 2 + margin_cells * max(cell_x, cell_y)
    return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1])


@dataclass(frozen=True, kw_only=True)
class FeatureGtConfig:
    """How F-GT pastes. max_objects: per class, up to this many a scene, in class order. margin_cells: how much wider than the box
    on each side, for cells; keypoint_margin: m added to each full size of the box, for keypoints. size_shift: m added to the length, width
    and height of labelled objects before they are encoded and cut out, where the fleet's objects are known to be of another size; the
    labelled half of a batch is resized likewise (our addition: statistical normalisation of F-GT)."""

    max_objects: tuple[int, ...]
    min_points: int = 5
    margin_cells: float = 1.0
    keypoint_margin: float = 0.2
    size_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def cutting(self) -> dict[str, float | list[float]]:
        """What decides which features a database holds, for its file."""
        return {
            "min_points": self.min_points,
            "margin_cells": self.margin_cells,
            "keypoint_margin": self.keypoint_margin,
            "size_shift": list(self.size_shift),
        }


@dataclass(frozen=True, kw_only=True)
class FeatureObject:
    """One labelled object's features at their own place: box (7,), coords (K, 3) int32 z y x of the cut, features (K, C), and its
    keypoints (a batch of one; None where the cut has none)."""

    box: Tensor
    class_index: int
    num_points: int
    coords: Tensor
    features: Tensor
    keypoints: Keypoints | None = None


def cut_objects(split: CutFeatures, labels: Labels, config: FeatureGtConfig) -> list[FeatureObject]:
    """The learnable objects of one encoded labelled scene (a batch of one) that have cells and enough points."""
    if split.batch_size != 1:
        raise InvalidInput(f"objects are cut from one scene at a time, found a batch of {split.batch_size}")
    coords = split.voxels.coords[:, 1:]
    masks = footprint(labels.boxes.data, split.spec, config.margin_cells)
    owned = None if split.keypoints is None else keypoints_near(split.keypoints, labels.boxes.data, config)
    objects = []
    for i in range(len(labels)):
        rows = masks[i, coords[:, 1].long(), coords[:, 2].long()].nonzero().squeeze(1)
        if labels.weight[i] > 0 and labels.num_points[i] >= config.min_points and len(rows):
            objects.append(
                FeatureObject(
                    box=labels.boxes.data[i],
                    class_index=int(labels.classes[i]),
                    num_points=int(labels.num_points[i]),
                    coords=coords[rows],
                    features=split.voxels.features[rows],
                    keypoints=None if owned is None or split.keypoints is None else split.keypoints.select(owned[i]),
                )
            )
    return objects


def keypoints_near(keypoints: Keypoints, boxes: Tensor, config: FeatureGtConfig) -> Tensor:
    """(N, K) bool: which keypoints lie in each box (N, 7) enlarged by the keypoint margin."""
    margin = config.keypoint_margin
    return points_in_boxes_mask(keypoints.xyz, boxes + boxes.new_tensor([0, 0, 0, margin, margin, margin, 0]))


def paste_objects(
    split: CutFeatures,
    labels: Labels,
    objects: Sequence[FeatureObject],
    config: FeatureGtConfig,
    rng: np.random.Generator,
) -> tuple[CutFeatures, Labels]:
    """Write ``objects`` into one scene (a batch of one): their places are cleared first, other cells stay as they are.

    The pasted boxes join the labels as exact ones. rng: which background keypoints make room, if there would be too many.
    """
    if not objects:
        return split, labels
    boxes = torch.stack([o.box for o in objects]).to(labels.boxes.data)
    coords, features = split.voxels.coords, split.voxels.features
    owner = footprint(boxes, split.spec, config.margin_cells)
    keep = ~owner.any(0)[coords[:, 2].long(), coords[:, 3].long()]
    parts_c, parts_f = [coords[keep]], [features[keep]]
    taken = torch.zeros(split.spec.shape[1:], dtype=torch.bool, device=coords.device)
    for index, item in enumerate(objects):
        c, f = item.coords.to(coords.device), item.features.to(features)
        free = ~taken[c[:, 1].long(), c[:, 2].long()]  # two neighbours' margins may meet: the first one keeps the cell
        parts_c.append(torch.nn.functional.pad(c[free], (1, 0)))
        parts_f.append(f[free])
        taken |= owner[index]
    voxels = replace(split.voxels, coords=torch.cat(parts_c), features=torch.cat(parts_f))
    pasted = Labels.make(
        boxes,
        torch.tensor([o.class_index for o in objects], device=boxes.device),
        num_points=torch.tensor([o.num_points for o in objects], device=boxes.device),
    )
    keypoints = None if split.keypoints is None else _paste_keypoints(split.keypoints, boxes, objects, config, rng)
    return replace(split, voxels=voxels, keypoints=keypoints), Labels.concatenate([labels, pasted])


def _paste_keypoints(
    scene: Keypoints, boxes: Tensor, objects: Sequence[FeatureObject], config: FeatureGtConfig, rng: np.random.Generator
) -> Keypoints:
    pasted: list[Keypoints] = []
    for index, item in enumerate(objects):
        if item.keypoints is not None:  # two neighbours' rims may meet: the first one keeps what lies in both
            own = item.keypoints.to(scene.xyz.device)
            pasted.append(own.select(~keypoints_near(own, boxes[:index], config).any(0)))
    # First, so that the first n of a ball around a pasted object are its own.
    xyz = torch.cat([k.xyz for k in pasted])[: len(scene.xyz)]
    features = torch.cat([k.features for k in pasted])[: len(scene.xyz)]
    background = (~keypoints_near(scene, boxes, config).any(0)).nonzero().squeeze(1)
    room = len(scene.xyz) - len(xyz)
    if len(background) > room:
        picked = np.sort(rng.permutation(len(background))[:room])
        background = background[torch.from_numpy(picked).to(background.device)]
    rest = scene.select(background)
    total = len(xyz) + len(background)
    return Keypoints(
        xyz=torch.cat([xyz, rest.xyz]), features=torch.cat([features.to(rest.features), rest.features]), starts=(0, total)
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
            yield from cut_objects(as_stored(split, codec), frame.labels, config)

    return FeatureObjectDatabase.write(
        folder,
        objects(),
        spec=detector.spec,
        config=config,
        split_fingerprint=split_fingerprint,
        encoder_fingerprint=encoder_fingerprint,
    )


def sample_objects(
    database: FeatureObjectDatabase, labels: Labels, obstacles: Boxes3D, config: FeatureGtConfig, rng: np.random.Generator
) -> list[FeatureObject]:
    """Objects for one scene, at their own places, touching no label, no obstacle and no other pasted object.

    obstacles: every box the teacher sees at all; what it half believes in may be a real object. Each class is filled up to its
    maximum, counting the labels already there.
    """
    blocked = torch.cat([labels.boxes.data, obstacles.data]).cpu()  # the database is on the CPU
    chosen: list[int] = []
    for class_index, maximum in enumerate(config.max_objects):
        wanted = maximum - int((labels.classes == class_index).sum())
        candidates = (database.classes == class_index).nonzero().squeeze(1).numpy()
        if wanted <= 0 or len(candidates) == 0:
            continue
        # Three times as many as wanted: some will collide. Chosen one by one, so that no two pasted objects meet.
        drawn = rng.permutation(candidates)[: 3 * wanted]
        free = (iou_bev(database.boxes[drawn], blocked).sum(1) == 0).numpy() if len(blocked) else np.ones(len(drawn), bool)
        for index in drawn[free]:
            if wanted == 0:
                break
            box = database.boxes[index : index + 1]
            if not chosen or float(iou_bev(box, database.boxes[chosen]).sum()) == 0:
                chosen.append(int(index))
                wanted -= 1
    return [database[i] for i in chosen]
