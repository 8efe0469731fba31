"""How the files of scans are to be read: the same options, with the same names, in every command that reads scans.

`read_scan` in `point_files.py` takes them. A command adds them flat, as `--columns`, `--dtype` and so on (`tools/scan_option.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import InvalidInput, require
from .rig import RigSpec
from .structures import column_names

NumberType = Literal["float32", "float64", "float16", "int16", "int32", "uint16", "uint8", ">f4", ">f8", ">i2", ">i4"]
"""Type of the numbers in a `.bin` file; those with `>` are big-endian, all others little-endian."""
Axis = Literal["x", "y", "z", "-x", "-y", "-z"]
"""One axis of the file, with its sign."""


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """How the files of one source of scans are read.

    Raises:
        InvalidInput: A value cannot be used; the message names the option.
    """

    columns: tuple[str, ...] = ()
    """Names of the values in one row, in file order; `_` skips one. By default x y z intensity, or the fields that a `.pcd` names."""
    dtype: NumberType = "float32"
    """Type of the numbers in a `.bin` file. `.npy` and `.pcd` files name their own."""
    intensity_scale: float | None = None
    """Factor that brings intensity to 0..1, for example 1/255 for a sensor that counts to 255. By default 1 where a
    dataset is prepared; a command with a detector takes that of its training data."""
    z_shift: float | None = None
    """Mounting height of the sensor in meters, added to z so that the road lies near 0. By default 0 where a dataset is prepared;
    a command with a detector takes that of its training data."""
    axes: tuple[Axis, Axis, Axis] = ("x", "y", "z")
    """Which axis of the file points forward, left and up: `y -x z` for a file with x to the right and y forward."""
    image_size: tuple[int, int] | None = None
    """Width and height in pixels of the camera picture to which scans are cropped. By default the size of the picture itself."""
    drop_non_finite: bool = False
    """Leave out points with a NaN or infinite value instead of refusing the scan."""

    def __post_init__(self) -> None:
        if self.columns:
            column_names(self.columns, "columns")
            require(all(axis in self.columns for axis in "xyz"), f"the columns must hold x, y and z, found {self.columns}")
        if self.dtype not in get_args(NumberType):
            raise InvalidInput(f"dtype must be one of {', '.join(get_args(NumberType))}, found {self.dtype!r}")
        if sorted(axis.lstrip("-") for axis in self.axes) != ["x", "y", "z"]:
            raise InvalidInput(f"axes must name x, y and z once each, with or without a minus, found {' '.join(self.axes)}")
        if self.intensity_scale is not None and not (math.isfinite(self.intensity_scale) and self.intensity_scale > 0):
            raise InvalidInput(f"the intensity scale must be a positive number, found {self.intensity_scale}")
        if self.z_shift is not None and not math.isfinite(self.z_shift):
            raise InvalidInput(f"the z shift must be a finite number of meters, found {self.z_shift}")
        if self.image_size is not None and not all(0 < side <= 65_536 for side in self.image_size):
            raise InvalidInput(f"the image size must be two numbers of pixels in 1..65536, found {self.image_size}")

    @property
    def mirrors(self) -> bool:
        """Whether the axes mirror the scene: they make a right-handed frame left-handed, and the other way round."""
        letters = [axis.lstrip("-") for axis in self.axes]
        turns = letters in (["x", "y", "z"], ["y", "z", "x"], ["z", "x", "y"])
        return turns == (sum(axis.startswith("-") for axis in self.axes) % 2 == 1)

    def refuse_image_size(self, why: str) -> None:
        """Refuse an image size where nothing is cropped to a camera; it would do nothing.

        Args:
            why: Why there is no camera, and what to do.

        Raises:
            InvalidInput: An image size is given.
        """
        if self.image_size is not None:
            raise InvalidInput(f"an image size (--image-size) is given, but {why}")

    def rig(self, default: RigSpec | None = None) -> RigSpec:
        """Give the rig that these options describe.

        Args:
            default: The rig of the detector's training data; it fills in what the options leave open. None means no shift, scale 1.

        Returns:
            The rig.
        """
        base = default or RigSpec()
        return RigSpec(
            z_shift=base.z_shift if self.z_shift is None else self.z_shift,
            intensity_scale=base.intensity_scale if self.intensity_scale is None else self.intensity_scale,
        )
