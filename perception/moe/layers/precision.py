"""The type of a model's matrix products in training. Losses and routers compute in float32 whatever it is."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ....core.errors import require

Precision = Literal["float32", "bfloat16"]
"""`bfloat16` is faster where the processor has matrix units for it; the weights stay in float32."""


def products_in(precision: Precision, device: str | torch.device) -> torch.autocast:
    """Make the context in which a forward pass computes its matrix products in a type.

    Args:
        precision: The type.
        device: Where the model lies.

    Returns:
        The context: `with products_in("bfloat16", "cpu"): loss = ...`.

    Raises:
        InvalidInput: The type is unknown.
    """
    require(precision in get_args(Precision), f"precision must be one of {', '.join(get_args(Precision))}, found {precision!r}")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")
