"""Info files of OpenPCDet and mmdetection3d: lists of frames with their labels, read as plain data and written from prepared datasets.

Box conventions, all translated here:

    ours, OpenPCDet        x y z of the center, dx dy dz, yaw counter-clockwise from +x
    mmdetection3d          the same, but z is that of the bottom face; nuScenes and Lyft have the center; KITTI the camera frame:
                           location of the bottom face, length height width, rotation about the camera's y axis

Boxes stay in the axes of the scans, and those of nuScenes have x to the right and y forward: `described` says so. Waymo's infos are in the
frame of a camera in some versions of mmdetection3d and in that of the LiDAR in others, and do not say in which, so they are refused.

Read next: `plain_pickle.py` for how the files are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.boxes import kitti_camera_to_lidar
from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.frame import Frame
from ...core.structures import Labels
from ...datasets.prepared import PreparedDataset
from .kitti_infos import (
    MMDET3D_KITTI,
    is_kitti,
    mmdet3d_camera,
    mmdet3d_kitti_instances,
    openpcdet_camera,
    openpcdet_kitti_annos,
)

_CENTERED = ("nuscenes", "lyft")
"""Datasets whose infos in mmdetection3d name the center of a box."""
_REFUSED = {"waymo": "prepare the dataset itself with `upcycle3d prepare waymo`"}
"""Datasets whose infos in mmdetection3d do not say what frame boxes are in, and what to do instead."""
_UNKNOWN = "DontCare"


@dataclass(frozen=True, kw_only=True)
class InfoFrame:
    """The labels of one frame, in our convention and in the frame of the LiDAR."""

    id: str
    """Id of the frame, as the name of its scan without suffix."""
    types: tuple[str, ...]
    """N names of classes."""
    boxes: np.ndarray
    """(N, 7) float64 boxes: x y z of the center, dx dy dz, yaw."""
    dropped: int = 0
    """Objects without a box: DontCare regions, and labels of no class."""
    labeled: bool = True
    """Whether the file holds labels of this frame."""


def frames_of(content: Any) -> list[InfoFrame]:
    """Take the labels out of the content of an info file.

    Args:
        content: what `read_plain_pickle` returned.

    Returns:
        The frames in file order.

    Raises:
        InvalidInput: It is no info file of OpenPCDet (KITTI or custom) or of mmdetection3d 1.x, or a frame is damaged.
    """
    if isinstance(content, Mapping) and isinstance(content.get("data_list"), list):
        return _mmdet3d_frames(content)
    if isinstance(content, list) and content and all(isinstance(info, Mapping) and "point_cloud" in info for info in content):
        return [_in_words(_openpcdet_frame, info, number) for number, info in enumerate(content)]
    if isinstance(content, Mapping) and all(isinstance(value, list) for value in content.values()):
        raise InvalidInput("this is a file of objects to paste (dbinfos) and not of frames; give the infos of a split")
    raise InvalidInput(
        f"the content is a {type(content).__name__} and no info file that is known: a list of frames with point_cloud and annos (OpenPCDet), "
        "or a dictionary with metainfo and data_list (mmdetection3d 1.x)"
    )


def described(content: Any) -> str:
    """Say how the boxes of an info file were understood, because most files do not say it themselves.

    Args:
        content: what `frames_of` read.

    Returns:
        One sentence.
    """
    if not isinstance(content, Mapping):
        return "boxes were read as OpenPCDet's: their center, in the axes of the scans"
    dataset = _dataset(content)
    where = {
        "kitti": "bottom face, in the frame of the camera CAM2, from which they were brought to the LiDAR's",
        "nuscenes": "center, in the axes of the scans, where x points to the right and y forward: give `prepare folder` --axes y -x z",
        "lyft": "center, in the axes of the scans; `upcycle3d view` shows whether x points forward, and --axes of `prepare folder` turns them",
    }
    usual = (
        f"bottom face, in the axes of the scans, as of data of your own (the file names the dataset {shown(repr(dataset))[:60]})"
    )
    return f"boxes were read as mmdetection3d's: {where.get(dataset, usual)}"


def _dataset(content: Mapping[str, Any]) -> str:
    """Name of the dataset in small letters; empty where the file has none."""
    meta = content.get("metainfo")
    return str(meta.get("dataset", "")).lower() if isinstance(meta, Mapping) else ""


def _in_words(reader: Any, info: Any, number: int) -> InfoFrame:
    try:
        frame: InfoFrame = reader(info)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"frame {number} of the file has another form than an info ({shown(repr(error))[:200]})") from error
    if frame.boxes.shape != (len(frame.types), 7) or not np.isfinite(frame.boxes).all() or (frame.boxes[:, 3:6] <= 0).any():
        raise InvalidInput(f"frame {shown(frame.id)} of the file has boxes that are not finite, or sizes that are not positive")
    return frame


def _openpcdet_frame(info: Mapping[str, Any]) -> InfoFrame:
    cloud = info["point_cloud"]
    name = str(cloud["lidar_idx"] if "lidar_idx" in cloud else info["frame_id"])
    annos = info.get("annos")
    if annos is None:
        return InfoFrame(id=name, types=(), boxes=np.zeros((0, 7)), labeled=False)
    types = [str(entry) for entry in annos["name"]]
    boxes = np.asarray(annos["gt_boxes_lidar"], np.float64).reshape(-1, np.asarray(annos["gt_boxes_lidar"]).shape[-1])[:, :7]
    own = [i for i, entry in enumerate(types) if entry != _UNKNOWN]
    if len(boxes) not in (len(own), len(types)):
        raise InvalidInput(f"frame {shown(name)} of the file has {len(types)} names and {len(boxes)} boxes")
    rows = list(range(len(own))) if len(boxes) == len(own) else own  # KITTI's infos leave DontCare out of the boxes
    return InfoFrame(id=name, types=tuple(types[i] for i in own), boxes=boxes[rows].reshape(-1, 7), dropped=len(types) - len(own))


def _mmdet3d_frames(content: Mapping[str, Any]) -> list[InfoFrame]:
    meta, dataset = content.get("metainfo") or {}, _dataset(content)
    if dataset in _REFUSED:
        raise InvalidInput(
            f"infos of {dataset} do not say whether boxes are in the frame of a camera or of the LiDAR; {_REFUSED[dataset]}"
        )
    if not content["data_list"]:
        raise InvalidInput("the file holds no frame (data_list is empty)")
    categories = meta.get("categories") or meta.get("classes") or {}
    names = dict(enumerate(categories)) if not isinstance(categories, Mapping) else {n: c for c, n in categories.items()}
    if not names and any(isinstance(info, Mapping) and info.get("instances") for info in content["data_list"]):
        raise InvalidInput("the file does not name its classes (metainfo has no categories), so no label means anything")

    def frame(info: Mapping[str, Any]) -> InfoFrame:
        path = info["lidar_points"]["lidar_path"]
        rows, types, dropped = [], [], 0
        for instance in info.get("instances") or []:
            number = instance["bbox_label_3d"]
            if number not in names or number < 0:
                dropped += 1
                continue
            types.append(str(names[number]))
            rows.append([float(value) for value in instance["bbox_3d"][:7]])
        boxes = _from_mmdet3d(np.asarray(rows, np.float64).reshape(-1, 7), dataset, info)
        return InfoFrame(id=Path(str(path)).stem, types=tuple(types), boxes=boxes, dropped=dropped, labeled="instances" in info)

    return [_in_words(frame, info, number) for number, info in enumerate(content["data_list"])]


def _from_mmdet3d(boxes: np.ndarray, dataset: str, info: Mapping[str, Any]) -> np.ndarray:
    if dataset == "kitti":
        matrix = torch.tensor(info["images"]["CAM2"]["lidar2cam"], dtype=torch.float64)
        given = torch.from_numpy(boxes)
        sizes = given[:, [4, 5, 3]]  # length height width -> height width length
        return kitti_camera_to_lidar(given[:, :3], sizes, given[:, 6], matrix).double().numpy()
    if dataset not in _CENTERED:
        boxes[:, 2] += boxes[:, 5] / 2
    return boxes


def openpcdet_infos(data: PreparedDataset) -> Iterator[dict[str, Any]]:
    """Describe the frames of a prepared dataset in OpenPCDet's schema: KITTI's for data of KITTI, else that of its custom data.

    Args:
        data: a split. Boxes and points are brought back to the frame of the sensor.

    Yields:
        One info per frame.
    """
    for index in range(len(data)):
        frame = data[index]
        info: dict[str, Any] = {"point_cloud": {"num_features": 3 + len(data.feature_names), "lidar_idx": frame.id}}
        if is_kitti(data):
            info |= openpcdet_camera(frame)
        if frame.labels is not None:
            info["annos"] = openpcdet_kitti_annos(data, frame) if is_kitti(data) else _openpcdet_annos(frame, data.classes)
        yield info


def _openpcdet_annos(frame: Frame, classes: Sequence[str]) -> dict[str, Any]:
    labels = _own_labels(frame)
    types = (
        np.asarray([classes[number] for number in labels.classes.tolist()], dtype="U") if len(labels) else np.asarray([], "U1")
    )
    boxes = frame.rig.to_sensor(labels.boxes.data.double())
    return {"name": types, "gt_boxes_lidar": boxes.numpy(), "num_points_in_gt": labels.num_points.numpy().astype(np.int32)}


def _own_labels(frame: Frame) -> Labels:
    """The labels without those of weight 0: a van is no car there."""
    assert frame.labels is not None
    return frame.labels.select(frame.labels.weight > 0)


def mmdet3d_infos(data: PreparedDataset) -> dict[str, Any]:
    """Describe the frames of a prepared dataset in mmdetection3d's schema, version 1.1: KITTI's for data of KITTI.

    Args:
        data: a split. Boxes are brought back to the frame of the sensor; z is that of the bottom face.

    Returns:
        The content of an info file.
    """
    kitti, entries = is_kitti(data), []
    for index in range(len(data)):
        frame = data[index]
        entry: dict[str, Any] = {
            "sample_idx": int(frame.id) if frame.id.isdecimal() and frame.id.isascii() else index,
            "lidar_points": {"num_pts_feats": 3 + len(data.feature_names), "lidar_path": f"{frame.id}.bin"},
            "images": mmdet3d_camera(frame) if kitti else {},
        }
        if frame.labels is not None:
            entry["instances"] = mmdet3d_kitti_instances(data, frame) if kitti else _mmdet3d_instances(frame)
        entries.append(entry)
    names = MMDET3D_KITTI if kitti else data.classes
    meta = {
        "categories": {name: i for i, name in enumerate(names)},
        "dataset": "kitti" if kitti else "custom",
        "info_version": "1.1",
    }
    return {"metainfo": meta, "data_list": entries}


def _mmdet3d_instances(frame: Frame) -> list[dict[str, Any]]:
    labels = _own_labels(frame)
    boxes = frame.rig.to_sensor(labels.boxes.data.double())
    bottom = torch.cat([boxes[:, :2], boxes[:, 2:3] - boxes[:, 5:6] / 2, boxes[:, 3:]], 1)
    rows = zip(bottom.tolist(), labels.classes.tolist(), labels.num_points.tolist(), labels.difficulty.tolist(), strict=True)
    return [
        {"bbox_3d": box, "bbox_label_3d": number, "bbox_label": number, "num_lidar_pts": points, "difficulty": level}
        for box, number, points, level in rows
    ]
