"""Which implementation of an operator runs: its compiled kernel where there is one for the input's device, else plain torch.

Every operator is one file of `ops/`: the public function, which dispatches; the function that calls the compiled kernel of
`ops/cpu/`; the reference in plain torch, which runs on any device and against which the kernel is tested.
Read next: `segment_max.py`, the shortest operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.errors import InvalidInput

_Implementation = TypeVar("_Implementation", bound=Callable[..., Any])


def dispatch(
    tensors: Sequence[Tensor],
    reference: _Implementation,
    *,
    cpu: _Implementation | None = None,
    cuda: _Implementation | None = None,
) -> _Implementation:
    """Choose the implementation of an operator for the device of its input.

    Args:
        tensors: All tensors of the input. They must lie on one device.
        reference: The implementation in plain torch, for every device.
        cpu: The implementation for the CPU. None where it does not serve this input, for example because of its type.
        cuda: The implementation for CUDA devices, or None.

    Returns:
        The implementation to call, with the arguments of the operator.

    Raises:
        InvalidInput: The tensors lie on different devices.
    """
    kind = device_of(*tensors).type
    return (cpu if kind == "cpu" else cuda if kind == "cuda" else None) or reference


def device_of(*tensors: Tensor) -> torch.device:
    """Find the device that tensors lie on.

    Args:
        tensors: One or more tensors.

    Returns:
        Their device.

    Raises:
        InvalidInput: They lie on different devices.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise InvalidInput(
            f"the tensors of one operator must lie on one device, but they lie on {found}; move them with .to(device)"
        )
    return devices.pop()
