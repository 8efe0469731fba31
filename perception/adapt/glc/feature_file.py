"""Features that somebody else extracted, as one npz file: read with checks, and the labels written back.

    FILE.npz   `features` (N, D), `probabilities` (N, C); optional `labels` (N,), `weight` (C, D) of the classifier for LEAD

The file comes from outside: nothing is unpickled, and every declared size is checked against the file before memory is allocated.

Read next: `feature_labels.py`, which labels what was read.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.files import NPY_FAULTS, ZIP_FAULTS, check_input_file
from .pseudo_labels import check_target

_KINDS = {"features": "f", "probabilities": "f", "labels": "iu", "weight": "f"}
_MOST_BYTES = 16 << 30  # largest array that is read
_FREE_BYTES, _MOST_SHRUNK = 256 << 20, 50  # from this number of bytes on, a file must not unpack to more than 50 times its size


@dataclass(frozen=True, kw_only=True)
class TargetFeatures:
    """Features and class probabilities of N samples of a target domain.

    Raises:
        InvalidInput: `check_target` refuses features and probabilities, or there is not one label per sample.
    """

    features: Tensor
    """(N, D) float32 of any length."""

    probabilities: Tensor
    """(N, C) float32 softmax of the source's classifier."""

    labels: np.ndarray | None = None
    """(N,) int64: 0..C-1 a source class, C and above target-private, negative ignored. Only used to report metrics."""

    weight: Tensor | None = None
    """(C, D) float32 weight of the source's classifier, for LEAD; None otherwise."""

    def __post_init__(self) -> None:
        check_target(self.features, self.probabilities)
        if not bool(self.features.any()):
            raise InvalidInput(
                f"all {len(self.features)} features are zero, so nothing tells the samples apart; extract them again"
            )
        if len(self.features) > 1 and bool((self.features == self.features[0]).all()):
            raise InvalidInput(
                f"all {len(self.features)} features are equal, so nothing tells the samples apart; extract them again"
            )
        if self.labels is not None and self.labels.shape != (len(self.features),):
            raise InvalidInput(f"labels must be ({len(self.features)},) like the features, found {self.labels.shape}")


def at_one_scale(features: Tensor) -> Tensor:
    """Bring every feature to a length near 1 without changing its direction, so that its square neither overflows nor vanishes.

    Args:
        features: (N, D) features of any length.

    Returns:
        (N, D) float32; each row is multiplied by a power of two, so that no digit of a normal number changes.
    """
    wide = features.double()
    _, exponent = torch.frexp(wide.abs().amax(1, keepdim=True))
    return torch.ldexp(wide, -exponent).float()


def read_target_features(path: str | Path) -> TargetFeatures:
    """Read and check one npz file.

    Args:
        path: The file.

    Returns:
        Its arrays; other arrays of the file are not read.

    Raises:
        InvalidInput: The file is no npz, lacks an array, or an array has a wrong type or shape. The message names the file.
        OSError: The file cannot be opened.
    """
    arrays, found = _read_npz(Path(path))
    missing = [name for name in ("features", "probabilities") if name not in arrays]
    if missing:
        raise InvalidInput(f"{path}: no array {' and no array '.join(missing)}; found {found}")
    for name, array in arrays.items():
        if array.dtype.kind not in _KINDS[name]:
            raise InvalidInput(f"{path}: {name} must be {'integers' if 'i' in _KINDS[name] else 'floats'}, found {array.dtype}")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite and is refused
        tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items() if name != "labels"}
    wide = torch.from_numpy(arrays["features"].astype(np.float64))
    if wide.ndim == 2 and wide.numel() and bool(wide.isfinite().all()):
        tensors["features"] = at_one_scale(wide)  # float32 does not hold every length that a file may have
    labels = arrays["labels"].astype(np.int64) if "labels" in arrays else None
    try:
        return TargetFeatures(labels=labels, **tensors)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of `_KINDS` that the file holds, and the names of all its arrays."""
    check_input_file(path, "features")
    size = path.stat().st_size  # a missing file is its own error
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(archive.getinfo(f"{n}.npy").file_size for n in _KINDS if f"{n}.npy" in archive.NameToInfo)
            if unpacked > max(_FREE_BYTES, _MOST_SHRUNK * size):
                raise ValueError(f"{size:,} bytes that unpack to {unpacked:,} are no measured features")
            names = [member.filename.removesuffix(".npy") for member in archive.infolist()]
            arrays = {name: _read_member(archive, name) for name in _KINDS if name in names}
    except (*ZIP_FAULTS, *NPY_FAULTS) as error:
        raise InvalidInput(f"{path}: not a readable npz file ({error}); write it with numpy.savez") from error
    return arrays, names


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array. Its shape is checked against the size of the member before memory is allocated."""
    size = archive.getinfo(f"{name}.npy").file_size
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    if math.prod(shape) * dtype.itemsize > size or size > _MOST_BYTES:
        raise ValueError(f"{name} declares {shape} {dtype} in {size} bytes; at most {_MOST_BYTES} are read")
    with archive.open(f"{name}.npy") as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array
