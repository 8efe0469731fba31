"""Reads the weights in a checkpoint of OpenPCDet or mmdetection3d, without running code from the file; `openpcdet.py` copies them.

Such a checkpoint is a pickle. Only its tensors, plain values and numpy's numbers are read (`weights_only`), so a file from elsewhere runs
nothing here; one that needs more is refused, and the message says how to convert it where it was made. The checksums in the file are
compared first, because nothing else would notice a flipped bit in a weight.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.files import ZIP_FAULTS
from ...core.foreign_text import shown
from ...core.tensor_file import listed, read_tensors

LARGEST_FILE = 2 * 1024**3
"""Maximum size of a file in bytes, unpacked. PV-RCNN with the state of its optimizer has 0.16e9."""
LARGEST_WEIGHT = 1e6
"""Largest value of a weight. Published weights stay below 10; a flipped bit makes 1e30 of 0.01."""
LARGEST_STATISTIC = 1e12
"""Largest running mean or variance of a batch norm."""

_STATES = ("model_state", "state_dict", "model_state_dict", "model", "net", "network")
"""Where programs keep the weights in a checkpoint, the usual ones first."""
_PREFIXES = ("module.", "model.", "_orig_mod.")
"""What wrappers (parallel training, compilation, Lightning) put before every name."""
_NUMPY_NUMBERS = (
    "bool_",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file holds."""

    state: dict[str, Tensor]
    """The tensors, on the CPU, by the names of the program that wrote them."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What mmdetection3d stores beside them: its configuration as text, the classes, versions. Empty for other programs."""


class _Ignored:
    """Stands for the log and the arrays that mmengine stores beside the weights. Nothing of them is kept."""

    def __new__(cls, *_: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Drop the content."""


def _ignored(*_: object) -> _Ignored:
    return _Ignored()


def read_openpcdet(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name.

    Args:
        path: as for `read_foreign_checkpoint`.

    Returns:
        The tensors, on the CPU, by OpenPCDet's names.

    Raises:
        InvalidInput: As for `read_foreign_checkpoint`.
    """
    return read_foreign_checkpoint(path).state


def read_foreign_checkpoint(path: str | Path) -> Checkpoint:
    """Read the tensors of a file by name, and what was stored beside them.

    Args:
        path: a `.pth` that holds the weights under `model_state`, `state_dict`, `model` or the like, or is a state dict itself; or a
            `.safetensors` file of the tensors. A prefix such as `module.` before every name is taken off.

    Returns:
        The tensors and, where the file has it, mmdetection3d's description.

    Raises:
        InvalidInput: There is no such file, or it is too large, damaged, needs pickle, or holds no named weights or absurd ones.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"there is no file {path}; give a checkpoint (.pth) or its tensors (.safetensors)")
    _check_kind(path)
    if (size := _declared_size(path)) > LARGEST_FILE:
        raise InvalidInput(
            f"{path} holds {size:,} bytes, more than the {LARGEST_FILE:,} that are read; save its model_state alone, without optimizer"
        )
    content = None if path.suffix == ".safetensors" else _load_plain(path)
    state = dict(read_tensors(path).tensors) if content is None else _weights_in(content, path)
    state = _without_prefix(state)
    _check_values(state, path)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return Checkpoint(state=state, meta=meta if isinstance(meta, Mapping) else {})


def _check_kind(path: Path) -> None:
    """Refuse what is commonly there instead of the weights, because a download went wrong."""
    with path.open("rb") as file:
        start = file.read(512)
    text = start.decode("utf-8", "replace").lstrip().lower()
    if not start:
        raise InvalidInput(f"{path} is empty; get it again")
    if text.startswith("version https://git-lfs"):
        raise InvalidInput(
            f"{path} is a pointer of Git LFS and not the weights themselves; run `git lfs pull` where the repository was cloned"
        )
    if text.startswith(("<!doctype html", "<html", "<?xml")):
        raise InvalidInput(
            f"{path} is a web page and not weights: the download was answered with a page; download the file itself"
        )


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except ZIP_FAULTS as error:
        raise InvalidInput(f"{path} is damaged ({shown(error)}); get it again") from error


def _declared_size(path: Path) -> int:
    """Bytes of the file or, if that is more, of what a zip unpacks to."""
    size = path.stat().st_size
    if size > LARGEST_FILE or not _is_zip(path):
        return size
    try:
        with zipfile.ZipFile(path) as archive:
            return max(size, sum(member.file_size for member in archive.infolist()))
    except ZIP_FAULTS as error:
        raise InvalidInput(f"{path} is damaged ({shown(error)}); get it again") from error


def _checked_content(path: Path) -> BinaryIO:
    """The file to load. Of a zip it is a copy of the members whose checksums were compared.

    Torch compares no checksum, and finds the members of a damaged zip at other places than Python does. A copy holds exactly what was
    checked.
    """
    if not _is_zip(path):
        if path.read_bytes()[:2] == b"PK":
            raise InvalidInput(f"{path} is damaged: it begins like a checkpoint of torch and its end is missing; get it again")
        return path.open("rb")  # before torch 1.6; such files have no checksums
    copy = io.BytesIO()
    name = "the list of members"
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as checked:
            members = archive.infolist()
            if len({member.filename for member in members}) < len(members):
                raise zipfile.BadZipFile("a name stands twice")
            for member in members:
                name = member.filename
                checked.writestr(name, archive.read(member))
    except ZIP_FAULTS as error:
        raise InvalidInput(f"{path} is damaged: {shown(name)} in it cannot be read ({shown(error)}); get it again") from error
    copy.seek(0)
    return copy


def _load_plain(path: Path) -> Any:
    """The content of a .pth file, which may be tensors, plain values and numpy's numbers only."""
    numbers = [getattr(np, name) for name in _NUMPY_NUMBERS]
    kinds = [type(np.dtype(number)) for number in numbers]
    rebuild = np.float64(0).__reduce__()[0]  # its module has another name in numpy 1, which the second entry is for
    allowed: list[Any] = [np.dtype, *numbers, *kinds, rebuild, (rebuild, "numpy.core.multiarray.scalar"), np.ndarray, _Ignored]
    allowed += [(_Ignored, "mmengine.logging.history_buffer.HistoryBuffer")]
    # The log holds references to its own methods. What stands in their place calls and keeps nothing.
    allowed += [(_ignored, "builtins.getattr"), (_ignored, "__builtin__.getattr")]
    allowed += [(_ignored, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    file = _checked_content(path)
    try:
        with file, torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch asks for a report where a pickle is of another version; what counts is said below
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        asked = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        why = f"it holds a {shown(asked[1])}" if asked else type(error).__name__  # torch's own words advise what is not safe
        raise InvalidInput(
            f"{path} is damaged, or holds more than tensors and plain values ({why}). Nothing else is read, "
            "because a pickle may run any code. If you trust the file, run this where it was made, with the program that saved it, and "
            "import the result:\n"
            "  import torch\n"
            "  state = detector.state_dict()  # of the model in that program, with its weights loaded\n"
            "  torch.save({'model_state': {n: t.detach().cpu().clone() for n, t in state.items()}}, 'plain.pth')"
        ) from error


def _weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, wherever the program that wrote it keeps it."""
    state = content
    for _ in range(3):  # some keep a state dict inside a dictionary of models
        found = next((state[key] for key in _STATES if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)), None)
        if found is None:
            break
        state = found
    if not isinstance(state, Mapping) or not state or not all(isinstance(n, str) for n in state):
        raise InvalidInput(f"{path} holds no named weights but a {type(state).__name__}; give a checkpoint with model_state")
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InvalidInput(
            f"{path} has no model_state and is not a state dict: {', '.join(listed(others))} are not tensors; give a checkpoint with "
            f"one of {', '.join(_STATES)}"
        )
    return dict(state)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what a wrapper put before every name."""
    for _ in range(3):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state if name != "global_step")), None)
        if prefix is None or not state:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _check_values(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that no training gives: a file without checksums may be damaged unnoticed."""
    for name, value in state.items():
        if not value.is_floating_point() or value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            continue
        limit = LARGEST_STATISTIC if name.endswith(("running_mean", "running_var")) else LARGEST_WEIGHT
        if value.numel() and not bool((value.abs() <= limit).all()):
            worst = value.reshape(-1)[value.abs().nan_to_num(float("inf")).argmax()].item()
            raise InvalidInput(
                f"{path} is damaged, or its training went wrong: {shown(name)} holds {worst:g}, and weights stay within {limit:g}; get it again"
            )
