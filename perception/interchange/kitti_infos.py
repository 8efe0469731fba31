"""The parts of KITTI's info files that both programs score with: every line of a label file, its picture and its calibration.

A prepared dataset of KITTI holds the label files as they were, so nothing is lost on the way: 2D boxes, occlusion and DontCare included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...core.boxes import kitti_camera_to_lidar
from ...core.frame import Calibration, Frame
from ...datasets.kitti_text import KittiObjects, is_dont_care
from ...datasets.prepared import PreparedDataset
from ...ops.points_in_boxes import count_points_in_boxes

MMDET3D_KITTI = ("Pedestrian", "Cyclist", "Car", "Van", "Truck", "Person_sitting", "Tram", "Misc")
"""The types of KITTI's labels in the order of mmdetection3d's info files."""


def is_kitti(data: PreparedDataset) -> bool:
    """Whether frames have label files and cameras of KITTI.

    Args:
        data: a prepared dataset.

    Returns:
        True for one that was prepared from KITTI's layout.
    """
    return data.origin.layout == "kitti"


def sensor_calibration(frame: Frame) -> Calibration:
    """Find the way from the unshifted scan to the picture.

    Args:
        frame: a frame with a camera.

    Returns:
        Its calibration for points in the frame of the sensor.
    """
    assert frame.calibration is not None
    shift = torch.eye(4, dtype=torch.float64)
    shift[2, 3] = frame.rig.z_shift
    given = frame.calibration
    return Calibration(
        lidar_to_camera=given.lidar_to_camera.double() @ shift, projection=given.projection, image_size=given.image_size
    )


def _matrices(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Projection and LiDAR to camera, both (4, 4)."""
    calibration = sensor_calibration(frame)
    projection = np.vstack([calibration.projection.double().numpy(), [0.0, 0.0, 0.0, 1.0]])
    return projection, calibration.lidar_to_camera.numpy()


def openpcdet_camera(frame: Frame) -> dict[str, Any]:
    """Describe picture and calibration in OpenPCDet's schema.

    Args:
        frame: a frame with a camera.

    Returns:
        The entries `image` and `calib`. The two matrices of KITTI are one product here, so the rectification is the identity.
    """
    projection, matrix = _matrices(frame)
    assert frame.calibration is not None
    width, height = frame.calibration.image_size
    return {
        "image": {"image_idx": frame.id, "image_shape": np.asarray([height, width], np.int32)},
        "calib": {"P2": projection, "R0_rect": np.eye(4), "Tr_velo_to_cam": matrix},
    }


def _ordered(data: PreparedDataset, frame: Frame) -> tuple[KittiObjects, int]:
    """The lines of the label file with DontCare last, and how many lines come before it."""
    objects = data.kitti_objects(frame.id)
    ignored = torch.tensor([is_dont_care(kind) for kind in objects.types], dtype=torch.bool)
    own = int((~ignored).sum())
    return objects.select(torch.cat([(~ignored).nonzero().flatten(), ignored.nonzero().flatten()])), own


def _boxes(objects: KittiObjects, frame: Frame) -> torch.Tensor:
    matrix = sensor_calibration(frame).lidar_to_camera
    return kitti_camera_to_lidar(objects.location, objects.dimensions, objects.rotation_y, matrix).double()


def _counts(frame: Frame, boxes: torch.Tensor) -> np.ndarray:
    points = frame.rig.to_sensor(frame.points)
    return count_points_in_boxes(points.xyz, boxes.float()).numpy().astype(np.int32)


def openpcdet_kitti_annos(data: PreparedDataset, frame: Frame) -> dict[str, Any]:
    """Describe the labels of a frame in OpenPCDet's schema for KITTI.

    Args:
        data: a prepared dataset of KITTI.
        frame: one of its frames.

    Returns:
        The entry `annos`.
    """
    objects, own = _ordered(data, frame)
    boxes = _boxes(objects.select(torch.arange(own)), frame)
    rest = len(objects) - own
    return {
        "name": np.asarray(objects.types, dtype="U") if len(objects) else np.asarray([], "U1"),
        "truncated": objects.truncated.numpy(),
        "occluded": objects.occluded.double().numpy(),
        "alpha": objects.alpha.numpy(),
        "bbox": objects.bbox.numpy(),
        "dimensions": objects.dimensions[:, [2, 0, 1]].numpy(),  # length height width
        "location": objects.location.numpy(),
        "rotation_y": objects.rotation_y.numpy(),
        "score": np.full(len(objects), -1.0),
        "difficulty": objects.difficulty().numpy().astype(np.int32),
        "index": np.asarray([*range(own), *[-1] * rest], np.int32),
        "gt_boxes_lidar": boxes.numpy(),
        "num_points_in_gt": np.concatenate([_counts(frame, boxes), np.full(rest, -1, np.int32)]),
    }


def mmdet3d_camera(frame: Frame) -> dict[str, Any]:
    """Describe picture and calibration in mmdetection3d's schema.

    Args:
        frame: a frame with a camera.

    Returns:
        The entry `images`.
    """
    projection, matrix = _matrices(frame)
    assert frame.calibration is not None
    width, height = frame.calibration.image_size
    camera = {"img_path": f"{frame.id}.png", "height": height, "width": width, "cam2img": projection.tolist()}
    return {
        "CAM2": camera | {"lidar2cam": matrix.tolist(), "lidar2img": (projection @ matrix).tolist()},
        "R0_rect": np.eye(4).tolist(),
    }


def mmdet3d_kitti_instances(data: PreparedDataset, frame: Frame) -> list[dict[str, Any]]:
    """Describe the labels of a frame in mmdetection3d's schema for KITTI, in the camera frame.

    Args:
        data: a prepared dataset of KITTI.
        frame: one of its frames.

    Returns:
        One entry per line of the label file; DontCare has the label -1.
    """
    objects, own = _ordered(data, frame)
    counts = [*_counts(frame, _boxes(objects.select(torch.arange(own)), frame)).tolist(), *[-1] * (len(objects) - own)]
    sizes = objects.dimensions[:, [2, 0, 1]]
    boxes = torch.cat([objects.location, sizes, objects.rotation_y[:, None]], 1).tolist()
    numbers = {name: number for number, name in enumerate(MMDET3D_KITTI)}
    return [
        {
            "bbox": objects.bbox[i].tolist(),
            "bbox_label": numbers.get(kind, -1),
            "bbox_3d": boxes[i],
            "bbox_label_3d": numbers.get(kind, -1),
            "truncated": float(objects.truncated[i]),
            "occluded": int(objects.occluded[i]),
            "alpha": float(objects.alpha[i]),
            "score": -1.0,
            "index": i if i < own else -1,
            "group_id": i,
            "difficulty": int(level),
            "num_lidar_pts": counts[i],
        }
        for i, (kind, level) in enumerate(zip(objects.types, objects.difficulty().tolist(), strict=True))
    ]
