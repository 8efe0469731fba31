"""F-GT: ground-truth sampling on features (UpCycling, Hwang et al. 2023, known to us from its abstract; design.md section 5).

GT sampling pastes labelled objects into other scenes. On features it is safe where flips and rotations are not: an object keeps
its place, so its cells need no resampling, and the sparse convolutions spread an object by less than one cell. The objects are cut
from labelled scenes encoded by the same frozen encoder, so they are what the vehicle would have sent, and their boxes are exact.

    cut    cells of a labelled scene whose centre lies in an object's footprint, one cell wider on each side
    paste  the same footprint of an unlabelled scene is cleared, then the object's cells are written; never added
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ...datasets.frame_source import FrameSource
from ...ops.iou3d import iou_bev
from ..features import SplitFeatures, SplitSpec
from ..files import atomic_file, sync_folder, write_atomically
from ..models.detector import Detector
from ..structures import Boxes3D, InvalidInput, Labels
from ..vehicle.codec import round_trip

DATABASE_VERSION = 1
_SCHEMA = pa.schema(
    {"box": pa.list_(pa.float32(), 7), "class": pa.int64(), "num_points": pa.int64(), "start": pa.int64(), "count": pa.int64()}
)


def footprint(boxes: Tensor, spec: SplitSpec, margin_cells: float = 1.0) -> Tensor:
    """(N, H, W) bool: cells whose centre lies in each box (N, 7) seen from above, widened by ``margin_cells`` on each side.

    The centre of cell i is that of its receptive field, (i * stride + 1/2) voxels from the start of the range: strided
    convolutions with kernel 3 are centred on every second voxel.
    """
    _, height, width = spec.shape
    sx, sy = spec.grid.voxel_size[0], spec.grid.voxel_size[1]
    x = spec.grid.range[0] + (torch.arange(width, device=boxes.device) * spec.stride[2] + 0.5) * sx
    y = spec.grid.range[1] + (torch.arange(height, device=boxes.device) * spec.stride[1] + 0.5) * sy
    dx = x[None, None, :] - boxes[:, 0, None, None]
    dy = y[None, :, None] - boxes[:, 1, None, None]
    cos, sin = torch.cos(boxes[:, 6])[:, None, None], torch.sin(boxes[:, 6])[:, None, None]
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    cell_x, cell_y = spec.cell_size()
    half = boxes[:, 3:5, None, None] / 2 + margin_cells * max(cell_x, cell_y)
    return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1])


@dataclass(frozen=True, kw_only=True)
class FeatureGtConfig:
    """How F-GT pastes. max_objects: per class, up to this many a scene, in class order. margin_cells: how much wider than the box."""

    max_objects: tuple[int, ...]
    min_points: int = 5
    margin_cells: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FeatureObject:
    """One labelled object's features at their own place: box (7,), coords (K, 3) int32 z y x of the cut, features (K, C)."""

    box: Tensor
    class_index: int
    num_points: int
    coords: Tensor
    features: Tensor


def cut_objects(split: SplitFeatures, labels: Labels, *, min_points: int, margin_cells: float) -> list[FeatureObject]:
    """The learnable objects of one encoded labelled scene (a batch of one) that have cells and at least ``min_points`` points."""
    if split.batch_size != 1:
        raise InvalidInput(f"objects are cut from one scene at a time, found a batch of {split.batch_size}")
    coords = split.voxels.coords[:, 1:]
    masks = footprint(labels.boxes.data, split.spec, margin_cells)
    objects = []
    for i in range(len(labels)):
        rows = masks[i, coords[:, 1].long(), coords[:, 2].long()].nonzero().squeeze(1)
        if labels.weight[i] > 0 and labels.num_points[i] >= min_points and len(rows):
            objects.append(
                FeatureObject(
                    box=labels.boxes.data[i],
                    class_index=int(labels.classes[i]),
                    num_points=int(labels.num_points[i]),
                    coords=coords[rows],
                    features=split.voxels.features[rows],
                )
            )
    return objects


def paste_objects(
    split: SplitFeatures, labels: Labels, objects: Sequence[FeatureObject], *, margin_cells: float
) -> tuple[SplitFeatures, Labels]:
    """Write ``objects`` into one scene (a batch of one): their footprints are cleared first, other cells stay as they are.

    The pasted boxes join the labels as exact ones.
    """
    if not objects:
        return split, labels
    boxes = torch.stack([o.box for o in objects]).to(labels.boxes.data)
    coords, features = split.voxels.coords, split.voxels.features
    owner = footprint(boxes, split.spec, margin_cells)
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
    return replace(split, voxels=voxels), Labels.concatenate([labels, pasted])


class FeatureDatabase:
    """Labelled objects' features on disk, memory-mapped, bound to the labelled split and to the encoder."""

    def __init__(self, folder: Path, table: pa.Table, channels: int) -> None:
        self.folder = folder
        self.boxes = torch.from_numpy(table["box"].combine_chunks().flatten().to_numpy().reshape(-1, 7).copy())
        self.classes = torch.tensor(table["class"].to_numpy().astype(np.int64))
        self._num_points = table["num_points"].to_numpy()
        self._start, self._count = table["start"].to_numpy(), table["count"].to_numpy()
        self._channels = channels

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> FeatureObject:
        start, stop = int(self._start[index]), int(self._start[index] + self._count[index])
        features = np.memmap(self.folder / "features.f32", np.float32, "r").reshape(-1, self._channels)[start:stop]
        coords = np.memmap(self.folder / "coords.i32", np.int32, "r").reshape(-1, 3)[start:stop]
        return FeatureObject(
            box=self.boxes[index],
            class_index=int(self.classes[index]),
            num_points=int(self._num_points[index]),
            coords=torch.from_numpy(np.array(coords)),
            features=torch.from_numpy(np.array(features)),
        )

    @staticmethod
    def write(
        folder: Path, objects: Iterable[FeatureObject], *, channels: int, split_fingerprint: str, encoder_fingerprint: str
    ) -> FeatureDatabase:
        """Store ``objects`` one after the other; the folder appears under its name only when it is complete."""
        _refuse_existing(folder)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        rows = []
        start = 0
        with atomic_file(temporary / "features.f32") as features, atomic_file(temporary / "coords.i32") as coords:
            for o in objects:
                features.write(o.features.float().contiguous().numpy().tobytes())
                coords.write(o.coords.contiguous().numpy().tobytes())
                rows.append(
                    {
                        "box": o.box.tolist(),
                        "class": o.class_index,
                        "num_points": o.num_points,
                        "start": start,
                        "count": len(o.coords),
                    }
                )
                start += len(o.coords)
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        pq.write_table(table, temporary / "index.parquet")
        meta = {
            "version": DATABASE_VERSION,
            "channels": channels,
            "split_fingerprint": split_fingerprint,
            "encoder_fingerprint": encoder_fingerprint,
        }
        write_atomically(temporary / "database.json", json.dumps(meta, indent=1).encode())
        os.replace(temporary, folder)
        sync_folder(folder.parent)
        return FeatureDatabase(folder, table, channels)

    @staticmethod
    def open(folder: Path, *, split_fingerprint: str, encoder_fingerprint: str) -> FeatureDatabase:
        """Open a database, refusing one of another labelled split (it would leak labels) or of another encoder."""
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
        table, channels = pq.read_table(folder / "index.parquet", schema=_SCHEMA), int(meta["channels"])
        cells = int(np.sum(table["count"].to_numpy()))
        for name, size in (("features.f32", cells * channels * 4), ("coords.i32", cells * 12)):
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found != size:
                raise InvalidInput(
                    f"{folder / name} holds {found} bytes, its index says {size}; delete the database and build it again"
                )
        return FeatureDatabase(folder, table, channels)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise InvalidInput(f"a feature database already exists at {folder}; delete it to build it again")


def build_feature_database(
    folder: Path,
    frames: FrameSource,
    detector: Detector,
    *,
    codec: str,
    config: FeatureGtConfig,
    split_fingerprint: str,
    encoder_fingerprint: str,
) -> FeatureDatabase:
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
            with torch.no_grad():
                split = detector.encode([frame.points]).to("cpu")
            stored = replace(split.voxels, features=round_trip(split.voxels.features, codec))
            yield from cut_objects(
                replace(split, voxels=stored), frame.labels, min_points=config.min_points, margin_cells=config.margin_cells
            )

    return FeatureDatabase.write(
        folder,
        objects(),
        channels=detector.spec.channels,
        split_fingerprint=split_fingerprint,
        encoder_fingerprint=encoder_fingerprint,
    )


def sample_objects(
    database: FeatureDatabase, labels: Labels, obstacles: Boxes3D, config: FeatureGtConfig, rng: np.random.Generator
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
