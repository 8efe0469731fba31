"""What the values of this project have in common: conversion of arrays, moving between devices, and a short `repr`.

Read next: `structures.py`, the values themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidInput


def shape_of(value: object) -> str:
    """Describe a tensor or array for a message.

    Args:
        value: Anything; meant for tensors and arrays.

    Returns:
        Shape and type, such as `(3, 4) float32`; for other values their type.
    """
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.ndarray):
        return f"{value.shape} {value.dtype} numpy array"
    return f"a value of type {type(value).__name__}"


def float32_tensor(value: object, name: str) -> Tensor:
    """Give numbers as a float32 tensor.

    Args:
        value: Tensor or numpy array of numbers. A float32 tensor is returned as it is, with its gradient; anything else is copied.
        name: What the value is called, for the message.

    Returns:
        float32 tensor of the same shape.

    Raises:
        InvalidInput: It is neither a tensor nor an array, or holds something other than real numbers.
    """
    if isinstance(value, Tensor):
        if value.dtype == torch.float32:
            return value
        if value.dtype != torch.bool and not value.is_complex():
            return value.to(torch.float32)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(np.array(value, dtype=np.float32))  # a copy: the caller may change the array afterwards
    raise InvalidInput(f"{name} must be a tensor or numpy array of numbers, found {shape_of(value)}; convert it first")


def float32_table(array: object, width: int, name: str) -> Tensor:
    """Give rows of numbers as a float32 tensor.

    Args:
        array: Tensor, numpy array or list of rows.
        width: Number of columns, for the message and for an empty list.
        name: What the value is called, for the message.

    Returns:
        float32 tensor. The number of columns is not checked.

    Raises:
        InvalidInput: The rows of a list differ in length or hold something other than numbers, or as for `float32_tensor`.
    """
    if isinstance(array, Sequence):
        try:
            array = np.array(array, dtype=np.float32).reshape(len(array), -1 if len(array) else width)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{name} must be rows of {width} numbers each ({error})") from error
    return float32_tensor(array, name)


class TensorValue:
    """Base class of the frozen values that hold tensors."""

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to a device.

        Args:
            device: Device of the result, such as `"cuda"`.

        Returns:
            The same value with every tensor on `device`.
        """
        moved: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor | TensorValue):
                moved[f.name] = value.to(device)
        return replace(self, **moved)  # type: ignore[type-var]

    def __repr__(self) -> str:
        parts = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            parts.append(f"{f.name}={shape_of(value) if isinstance(value, Tensor) else repr(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"
