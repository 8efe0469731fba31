"""The cut of a network as JSON, in the header of every scene and every shard, and checked when it comes from outside.

Read next: `core/strict_json.py` for the reading and writing of JSON itself, and `codec.py` for the scene around it.
"""

from __future__ import annotations

import re
from typing import Any

from ...core.cut import CutSpec, KeypointSpec, VoxelGrid
from ...core.errors import InvalidInput, UpcycleError
from ...core.foreign_text import shown


class CorruptScene(UpcycleError):
    """Bytes that are damaged, or that never were a smashed scene."""


def cut_to_json(spec: CutSpec) -> dict[str, Any]:
    """Describe a cut with plain JSON values.

    Args:
        spec: The cut.

    Returns:
        layer, channels, stride, shape, grid and keypoints. A cut without keypoints has None there.

    Raises:
        InvalidInput: The keypoints of the cut are raw points of the scan. The format cannot express them, on purpose.
    """
    keypoints = spec.keypoints
    if keypoints is not None and keypoints.source != "voxel_centers":
        raise InvalidInput(
            f"the keypoints of the cut {spec.layer!r} are raw points of the scan; only voxel centers are stored and uploaded: train "
            'and extract with keypoint_source="voxel_centers"'
        )
    return {
        "layer": spec.layer,
        "channels": spec.channels,
        "stride": list(spec.stride),
        "shape": list(spec.shape),
        "grid": {"range": [float(v) for v in spec.grid.range], "voxel_size": [float(v) for v in spec.grid.voxel_size]},
        "keypoints": None if keypoints is None else {"count": keypoints.count, "channels": keypoints.channels},
    }


def cut_from_json(record: Any, what: str) -> CutSpec:
    """Read the description of a cut that comes from outside; the inverse of `cut_to_json`.

    Args:
        record: What was read from JSON.
        what: Where it was read, for messages: "the manifest's split".

    Returns:
        The cut.

    Raises:
        CorruptScene: A field is missing, is of another type, or is outside its limits.
        InvalidInput: The numbers do not fit together, e.g. a range that is not a whole number of voxels.
    """

    def numbers(value: Any, count: int, kinds: tuple[type, ...], low: float, high: float) -> tuple[Any, ...]:
        fits = isinstance(value, list) and len(value) == count and all(type(v) in kinds and low <= v <= high for v in value)
        if not fits:
            raise CorruptScene(f"{what}: expected {count} numbers in {low:g}..{high:g}, found {shown(value, most=80)}")
        return tuple(value)

    if not isinstance(record, dict) or record.keys() != {"layer", "channels", "stride", "shape", "grid", "keypoints"}:
        raise CorruptScene(f"{what}: expected layer, channels, stride, shape, grid and keypoints, found {shown(record, most=80)}")
    grid, layer, keypoints = record["grid"], record["layer"], record["keypoints"]
    if not isinstance(grid, dict) or grid.keys() != {"range", "voxel_size"}:
        raise CorruptScene(f"{what}: expected a grid of range and voxel_size, found {shown(grid, most=80)}")
    if not isinstance(layer, str) or not re.fullmatch(r"[\w.]{1,128}", layer):
        raise CorruptScene(f"{what}: expected the name of a layer, found {shown(layer, most=80)}")
    if keypoints is not None:
        if not isinstance(keypoints, dict) or keypoints.keys() != {"count", "channels"}:
            raise CorruptScene(f"{what}: expected keypoints of count and channels, or null, found {shown(keypoints, most=80)}")
        count, of_each = numbers([keypoints["count"], keypoints["channels"]], 2, (int,), 1, 1 << 16)
        keypoints = KeypointSpec(count=count, channels=of_each)
    (channels,) = numbers([record["channels"]], 1, (int,), 1, 1 << 16)
    stride = numbers(record["stride"], 3, (int,), 1, 1 << 16)
    shape = numbers(record["shape"], 3, (int,), 1, 1 << 20)
    extent = numbers(grid["range"], 6, (int, float), -1e6, 1e6)
    voxel_size = numbers(grid["voxel_size"], 3, (int, float), 1e-6, 1e6)
    voxel_grid = VoxelGrid(range=extent, voxel_size=voxel_size)  # type: ignore[arg-type]
    return CutSpec(
        layer=layer,
        channels=channels,
        stride=stride,  # type: ignore[arg-type]
        shape=shape,  # type: ignore[arg-type]
        grid=voxel_grid,
        keypoints=keypoints,
    )
