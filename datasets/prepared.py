"""Reading a prepared dataset: frames out of a few large files, fast and with flat memory.

The index is held in Arrow buffers, which forked workers share. Points are mapped frame by frame, only while they are copied out,
so memory does not grow with what was read, and no open file is handed to a worker.

Read next: `prepared_format.py` for the files, `prepare.py` for how they are made, `batches.py` for what training draws from them.
"""

from __future__ import annotations

import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..core.frame import Frame
from ..core.ledger import Ledger
from ..core.rig import RigSpec
from ..core.structures import Labels, PointCloud
from .fingerprint import split_fingerprint, with_points
from .frame_source import DatasetOrigin
from .kitti_text import KittiObjects
from .label_shares import label_share_of
from .prepared_format import (
    KITTI_COLUMNS,
    check_rows,
    read_header,
    read_index,
    row_calibration,
    row_kitti_objects,
    row_labels,
    row_reading,
)


class PreparedDataset:
    """A prepared dataset, or the frames of one split of it, as a `FrameSource`.

    The folder may be moved or copied; the raw data is not needed any more, not even for scoring.

    Attributes:
        root: The folder.
        ids: Ids of the frames, in order.
        classes: Names of the class numbers of the labels.
        feature_names: What the point features are.
        rig: What was done to every scan and its labels; `rig.to_sensor` brings them back to the sensor frame.
        origin: Which data this was made from. For information, except that `origin.layout` decides how it is scored.
        splits: Number of frames by name of every split.

    Example:
        frames = PreparedDataset("data/kitti", "train")
        frame = frames[0]
        print(len(frames), frame.id, len(frame.points), frames.rig)
    """

    def __init__(self, root: Path | str, split: str | None = None) -> None:
        """Open a dataset.

        Args:
            root: Folder that `prepare` wrote.
            split: Name of a split; None takes every frame.

        Raises:
            InvalidInput: The folder is not a finished prepared dataset, is damaged or was edited, or lacks the split.
        """
        self.root = Path(root)
        header = read_header(self.root)
        self.classes: tuple[str, ...] = header.classes
        self.feature_names: tuple[str, ...] = header.feature_names
        self.rig: RigSpec = header.rig
        self.origin: DatasetOrigin = header.origin
        self.splits: dict[str, int] = {name: len(names) for name, names in header.splits.items()}
        if split is not None and split not in header.splits:
            raise InvalidInput(f"{self.root} has no split {split!r}; it has {sorted(header.splits)}")
        table = read_index(self.root / header.index, header.version)
        check_rows(table, header, self.root / header.index)
        position = {frame_id: i for i, frame_id in enumerate(table["id"].to_pylist())}
        self.ids: tuple[str, ...] = tuple(position if split is None else header.splits[split])
        unknown = [frame_id for frame_id in self.ids if frame_id not in position]
        if unknown or not self.ids:
            raise InvalidInput(f"{len(unknown)} of {len(self.ids)} frames asked of {self.root} are not in it: {unknown[:3]}")
        twice = len(self.ids) - len(set(self.ids)) + (len(table) - len(position))
        if twice:
            raise InvalidInput(
                f"{self.root} names {twice} frames twice, which training would see twice; its files were edited: prepare the dataset again"
            )
        self._split = split
        self._unlabeled = _unlabeled_splits(header.splits, table)
        table = table.take([position[frame_id] for frame_id in self.ids])
        self._table: pa.Table = table.drop_columns(list(KITTI_COLUMNS[1:])).combine_chunks()
        self._kitti: pa.Table = table.select(list(KITTI_COLUMNS)).combine_chunks()
        self._check_parts()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Frame:
        """Read frame `index`; the tensors are the caller's own. Raises `InvalidInput` if the points have another checksum."""
        row = self._row(index)
        rows = self._points(row)
        if zlib.crc32(rows.data) != row["crc32"]:
            raise InvalidInput(
                f"the points of frame {row['id']} in {self.root / 'parts' / row['part']} are damaged: they have another checksum than the "
                "index names; give the same `upcycle3d prepare` command again, which reads only the damaged part again, or copy the "
                "dataset again"
            )
        points = PointCloud(
            xyz=torch.from_numpy(np.array(rows[:, :3], np.float32, order="C")),
            features=torch.from_numpy(np.array(rows[:, 3:], np.float32, order="C")),
            feature_names=self.feature_names,
        )
        return Frame(
            id=row["id"],
            points=points,
            labels=row_labels(row),
            calibration=row_calibration(row),
            rig=self.rig,
            reading=row_reading(row),
        )

    def labels(self, index: int) -> Labels | None:
        """Read the labels of a frame without its points.

        Args:
            index: Position of the frame.

        Returns:
            The labels, or None where nobody labeled.
        """
        return row_labels(self._row(index))

    @property
    def labeled(self) -> bool:
        """Whether any frame has labels."""
        return bool(self._table["classes"].null_count < len(self))

    def check_labeled(self) -> None:
        """Refuse a split that nobody labeled, before any work on it.

        Raises:
            InvalidInput: No frame has labels. The message names the split and those that have labels.
        """
        if self.labeled:
            return
        what = f"{self.root} has no labels" if self._split is None else f"the split {self._split} of {self.root} has no labels"
        others = [name for name in self.splits if name not in self._unlabeled and name != self._split]
        if others:
            raise InvalidInput(f"{what}; choose another split: {', '.join(map(shown, others))}")
        raise InvalidInput(f"{what}, and neither has any other split; prepare labeled frames first")

    def reading(self) -> Ledger:
        """Add up what the reader counted and dropped for these frames when they were prepared, without opening their points.

        Returns:
            The sum; all zero where an earlier version of this program prepared the dataset.
        """
        return Ledger.total(row_reading({"reading": text}) for text in self._table["reading"].to_pylist())

    def kitti_objects(self, frame_id: str) -> KittiObjects:
        """Read a frame's KITTI label file as it was, DontCare included: what KITTI's protocol compares detections with.

        Args:
            frame_id: Id of a frame of this dataset or split.

        Returns:
            Every line of the label file, in its order.

        Raises:
            InvalidInput: There is no such frame, or no label file was stored for it.
        """
        if frame_id not in self._position:
            raise InvalidInput(f"{self.root} has no frame {frame_id!r} in this split")
        found = row_kitti_objects(self._kitti.slice(self._position[frame_id], 1).to_pylist()[0])
        if found is not None:
            return found
        if self.origin.layout == "kitti":
            hidden = row_labels(self._row(self._position[frame_id])) is None
            if hidden and ("with_labels", "False") not in self.origin.options:
                raise InvalidInput(f"frame {frame_id} of {self.root} has no labels to score against; choose a labeled split")
            raise InvalidInput(
                f"{self.root} holds no label file of frame {frame_id}: it was prepared without labels, or by an earlier version of "
                f"this program. Prepare it again with `{self._kitti_command()}`"
            )
        raise InvalidInput(
            f"{self.root} was not prepared from a KITTI-layout folder, so it has no label files for KITTI's protocol; "
            "--protocol cross_dataset is KITTI's AP without them"
        )

    def _kitti_command(self) -> str:
        """The command that prepares the same frames, classes and rig again from KITTI's files. Other options give other scores."""
        options = dict(self.origin.options)
        words = ["upcycle3d", "prepare", "kitti", str(self.origin.root or "ROOT"), "--out", "NEW_FOLDER"]
        words += ["--classes", *self.classes, "--z-shift", repr(self.rig.z_shift)]
        if options.get("points", "auto") != "auto":
            words += ["--points", options["points"]]
        if options.get("crop_to_camera") == "False":
            words.append("--no-crop-to-camera")
        if pairs := [word for pair in options.get("class_map", "").split() for word in pair.split("=", 1)]:
            words += ["--class-map", *pairs]
        for name in ("columns", "image_size"):
            if options.get(name):
                words += [f"--{name.replace('_', '-')}", *options[name].split()]
        if options.get("dtype", "float32") != "float32":
            words += ["--dtype", options["dtype"]]
        if self.rig.intensity_scale != 1:
            words += ["--intensity-scale", repr(self.rig.intensity_scale)]
        if options.get("drop_non_finite") == "True":
            words.append("--drop-non-finite")
        if len({number for numbers in self._table["classes"].to_pylist() for number in numbers or ()}) < len(self.classes):
            words.append("--allow-absent-classes")
        if ("with_labels", "False") not in self.origin.options and (hidden := [n for n in self._unlabeled if n != "test"]):
            words += ["--unlabeled", *hidden]
        # A split of label shares may be drawn or be a published list in ImageSets. All lists are taken then, so that both come back.
        shares = [share for share in map(label_share_of, self.splits) if share is not None]
        if shares:
            words += ["--label-shares", *(f"{share:g}" for share in dict.fromkeys(shares))]
        else:
            words += ["--splits", *self.splits]
        return shlex.join(words)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {frame_id: i for i, frame_id in enumerate(self.ids)}

    def split_fingerprint(self) -> str:
        """Return the fingerprint of these frames, their labels and their points, which the checksums of the index stand for."""
        labels = split_fingerprint(self.ids, (self.labels(i) for i in range(len(self))), classes=self.classes)
        return with_points(labels, zip(self.ids, self._table["crc32"].to_pylist(), strict=True))

    def verify(self) -> tuple[str, ...]:
        """Read every point and compare checksums, to find a failing disk or a bad copy. `upcycle3d inspect --verify` calls it.

        Returns:
            Ids of the frames whose points are damaged.
        """
        rows = (self._row(i) for i in range(len(self)))
        return tuple(row["id"] for row in rows if zlib.crc32(self._points(row).data) != row["crc32"])

    def _row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        return self._table.slice(index, 1).to_pylist()[0]

    def _points(self, row: dict[str, Any]) -> np.ndarray:
        """(N, 3 + C) float32, mapped."""
        shape = (row["num_points"], 3 + len(self.feature_names))
        if shape[0] == 0:
            return np.zeros(shape, np.float32)  # an empty range cannot be mapped
        return np.memmap(str(self.root / "parts" / row["part"]), "<f4", mode="r", offset=row["offset"] * 4, shape=shape)

    def _check_parts(self) -> None:
        """Every frame must lie inside its part file, and every part file inside the folder."""
        ends = pc.add(self._table["offset"], pc.multiply(self._table["num_points"], 3 + len(self.feature_names)))
        needed = pa.table({"part": self._table["part"], "end": ends}).group_by("part").aggregate([("end", "max")])
        for part, end in zip(needed["part"].to_pylist(), needed["end_max"].to_pylist()):
            path = self.root / "parts" / part
            if not re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{8}\.f32", part) or not path.exists() or path.stat().st_size < end * 4:
                raise InvalidInput(f"{path} is missing or shorter than the index says ({end * 4} bytes); copy the dataset again")


def _unlabeled_splits(splits: Mapping[str, Sequence[str]], table: pa.Table) -> tuple[str, ...]:
    """Names of the splits in which no frame has labels."""
    if not table["classes"].null_count:
        return ()
    labeled = set(table.filter(pc.is_valid(table["classes"]))["id"].to_pylist())
    return tuple(name for name, ids in splits.items() if labeled.isdisjoint(ids))
