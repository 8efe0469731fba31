"""Finds the device that a caller names, or says in a sentence that it is not there. Read next: `errors.py`."""

from __future__ import annotations

import torch

from .errors import InvalidInput


def find_device(device: str | torch.device) -> torch.device:
    """Find a device.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.

    Returns:
        The device.

    Raises:
        InvalidInput: This machine has no such device.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(f"{device!r} is not a device; give cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidInput(f"this program runs on cpu and cuda, found {str(found)!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(
            f"there is no device {str(found)!r} here: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "give the device cpu (option --device cpu of the commands), or install a CUDA build of torch"
        )
    return found
