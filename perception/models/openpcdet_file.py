"""Reads the weights in a checkpoint of OpenPCDet, without running code from the file; `openpcdet.py` copies them into a detector.

Such a checkpoint is a pickle. Only its tensors and plain values are read (`weights_only`), so a file from elsewhere runs nothing
here; one that needs more is refused, and the message says how to convert it where it was made.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.tensor_file import read_tensors

LARGEST_FILE = 2 * 1024**3
"""Maximum size of a file in bytes, unpacked. PV-RCNN with the state of its optimizer has 0.16e9."""


def read_openpcdet(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name.

    Args:
        path: a `.pth` that holds `model_state` or is a state dict itself, or a `.safetensors` file of the tensors.

    Returns:
        The tensors, on the CPU, by the names in the file.

    Raises:
        InvalidInput: There is no such file, or it is too large, damaged, needs pickle, or holds no named weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"there is no file {path}; give a checkpoint of OpenPCDet (.pth) or its tensors (.safetensors)")
    if (size := _declared_size(path)) > LARGEST_FILE:
        raise InvalidInput(
            f"{path} holds {size:,} bytes, more than the {LARGEST_FILE:,} that are read; save its model_state alone, without optimizer"
        )
    if path.suffix == ".safetensors":
        return dict(read_tensors(path).tensors)
    content = _load_plain(path)
    state = content.get("model_state", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(n, str) for n in state):
        raise InvalidInput(f"{path} holds no named weights but a {type(state).__name__}; give a checkpoint with model_state")
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InvalidInput(
            f"{path} has no model_state and is not a state dict: {', '.join(others[:8])} are not tensors; give a checkpoint with model_state"
        )
    return dict(state)


def _declared_size(path: Path) -> int:
    """Bytes of the file or, if that is more, of what a zip unpacks to."""
    size = path.stat().st_size
    if size > LARGEST_FILE or not zipfile.is_zipfile(path):
        return size
    try:
        with zipfile.ZipFile(path) as archive:
            return max(size, sum(member.file_size for member in archive.infolist()))
    except zipfile.BadZipFile as error:
        raise InvalidInput(f"{path} is damaged ({error}); get it again") from error


def _load_plain(path: Path) -> Any:
    """The content of a .pth file, which may be tensors and plain values only."""
    file = path.open("rb")  # outside the try: a file that may not be read is not a damaged one
    try:
        with file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        first = str(error).strip().split("\n")[0]
        raise InvalidInput(
            f"{path} is damaged, or holds more than tensors and plain values ({type(error).__name__}: {first}). Nothing else is read, "
            "because a pickle may run any code. If you trust the file, run this in the environment that saved it (from torch 2.6 on "
            "with weights_only=False) and import the result:\n"
            "  import torch\n"
            f"  state = torch.load({str(path)!r}, map_location='cpu')['model_state']\n"
            "  torch.save({'model_state': {n: t.detach().clone() for n, t in state.items()}}, 'plain.pth')"
        ) from error
