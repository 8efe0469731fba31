"""Functions that make one FFN of another: draw hidden units again, scale the outputs, add hidden units.

Read next: `upcyclers.py`, which makes experts with them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ....core.errors import require_counts
from ..layers.dense_ffn import DenseFfn


def redraw_units(ffn: DenseFfn, share: float, generator: torch.Generator) -> DenseFfn:
    """Draw a share of the hidden units again, from normal distributions with the mean and deviation of the weights they replace.

    Args:
        ffn: The FFN.
        share: Share of the hidden units, 0..1.
        generator: Source of the numbers, on the CPU.

    Returns:
        A new FFN. One set of units is drawn for all its tensors, so the other units stay whole; the bias of the outputs stays.
    """
    units = torch.randperm(ffn.width_hidden, generator=generator)[: round(share * ffn.width_hidden)]
    made = ffn.clone()
    if not len(units):
        return made
    for name, tensor in made.tensors().items():
        if name == "down_bias":
            continue
        rows = tensor.T if name == "down" else tensor  # hidden units first
        block = rows[units.to(rows.device)].double()
        fresh = torch.randn(block.shape, generator=generator, dtype=torch.float64).to(block.device)
        rows[units.to(rows.device)] = (block.mean() + block.std(unbiased=False) * fresh).to(rows.dtype)
    return made


def scaled(ffn: DenseFfn, factor: float) -> DenseFfn:
    """Multiply the outputs of an FFN, exactly and for every activation.

    Args:
        ffn: The FFN.
        factor: The factor.

    Returns:
        An FFN whose last linear map is larger by the factor. It shares its other tensors.
    """
    if factor == 1:
        return ffn
    return replace(ffn, down=ffn.down * factor, down_bias=None if ffn.down_bias is None else ffn.down_bias * factor)


def widened(ffn: DenseFfn, times: int, generator: torch.Generator) -> DenseFfn:
    """Multiply the number of hidden units of an FFN without changing what it computes.

    Args:
        ffn: The FFN.
        times: Factor of the hidden width, 1 or more.
        generator: Source of the numbers, on the CPU.

    Returns:
        A new FFN. The first maps of the new units are drawn like the old ones, and zeros in the last map silence them until training.
        Copies of the old units would get equal gradients and stay copies for ever.

    Raises:
        InvalidInput: `times` is not a positive whole number.
    """
    require_counts("widened", times=times)
    parts = [ffn.clone(), *(redraw_units(ffn, 1.0, generator) for _ in range(times - 1))]

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([tensor for tensor in tensors if tensor is not None])

    return replace(
        parts[0],
        up=torch.cat([part.up for part in parts]),
        gate=joined([part.gate for part in parts]),
        up_bias=joined([part.up_bias for part in parts]),
        gate_bias=joined([part.gate_bias for part in parts]),
        down=torch.cat([parts[0].down, *(torch.zeros_like(part.down) for part in parts[1:])], dim=1),
    )
