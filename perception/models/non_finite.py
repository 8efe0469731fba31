"""Finds where a network begins to compute NaN or infinite values, after something went wrong.

A forward pass costs nothing extra. Only when it has failed is it repeated, with a hook on every layer, and the first layer whose
output is not finite is named. Usual causes are a learning rate that is too high and a damaged weight.

Read next: `detector.py` and `perception/training/step.py`, which ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .post_processing import Proposals

FAILURES = (ValueError, RuntimeError, IndexError, FloatingPointError, OverflowError)
"""What operators raise when they are given NaN or infinite values, besides the errors of this project, which are ValueErrors."""


def name_non_finite(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> str:
    """Name what is not finite in modules: a weight, or else the first layer whose output is not.

    Args:
        modules: The modules by name, e.g. student and teacher.
        forward: Runs the forward pass that failed once more. What it raises is ignored.

    Returns:
        The beginning of a sentence such as "the output of student.decoder.anchor_head holds NaN or infinite values (the largest weight
        is 3.2e+19, student.encoder.conv.weight)"; empty where everything is finite.
    """
    weights = [
        (f"{key}.{name}" if key else name, tensor.detach())
        for key, module in modules.items()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and tensor.numel()
    ]
    for name, tensor in weights:
        if not bool(tensor.isfinite().all()):
            return f"the weight {name} holds NaN or infinite values"
    layer = _first_layer(modules, forward)
    if not layer:
        return ""
    largest, name = max(((float(t.abs().max()), name) for name, t in weights), default=(0.0, ""))
    return f"the output of {layer} holds NaN or infinite values (all weights are finite; the largest is {largest:.2g}, in {name})"


def first_broken_weight(modules: Mapping[str, nn.Module]) -> str:
    """Look for a weight that is not finite.

    Args:
        modules: The modules by name.

    Returns:
        Name of the first parameter or buffer that holds NaN or an infinite value; empty where there is none.
    """
    named = [(f"{key}.{n}", t.detach()) for key, m in modules.items() for n, t in m.state_dict(keep_vars=True).items()]
    floats = [(name, t) for name, t in named if t.is_floating_point() and t.numel()]
    if not floats:
        return ""
    sums = torch.stack([t.to(torch.float64).abs().max() for _, t in floats])  # one transfer from the device
    return next((name for (name, _), good in zip(floats, sums.isfinite().tolist(), strict=True) if not good), "")


class _Found(Exception):
    """Ends the repeated forward pass at the first layer whose output is not finite."""


def _first_layer(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> str:
    found: list[str] = []

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if any(not bool(t.detach().isfinite().all()) for t in _tensors(output)):
                found.append(name)
                raise _Found

        return look

    handles = []
    try:
        for key, module in modules.items():
            for name, layer in module.named_modules():
                full = ".".join(part for part in (key, name) if part) or type(module).__name__
                handles.append(layer.register_forward_hook(hook_of(full)))
        forward()
    except (_Found, *FAILURES):
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in the output of a layer. Padded proposals have infinite logits on purpose and are left out."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Proposals):
        return
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors(item)
