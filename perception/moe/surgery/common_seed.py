"""May several models become one? They need the same structure, and weights that grew from the same start.

Two networks that were trained from different random weights may compute the same and still share no coordinate: their average is noise,
and experts of one cannot read the hidden states of the other. The cosine between their weight matrices tells them apart at once: it is
near 1 for branches of one seed and near 0 for strangers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ....core.errors import InvalidInput
from ....core.tensor_value import shape_of
from .ffn_sites import tensors_of

_STRANGERS = 0.3
"""Below this cosine models are refused. Independent matrices of 8 x 8 have a cosine of 0 +- 0.13, larger ones less."""
_FAR = 0.75
"""Below this cosine a warning tells that averages may be poor. Long training from one seed left 0.6 to 0.7 in published work."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How near a model's weight matrices are to those of the first model."""

    cosine: float
    """Mean cosine of the matrices outside the FFNs, weighted by their sizes; of all matrices where there is none outside."""
    lowest: float
    """Lowest cosine of one matrix."""
    lowest_name: str
    """Name of that matrix."""

    def __str__(self) -> str:
        return f"mean cosine of the weight matrices {self.cosine:.3f}, lowest {self.lowest:.3f} ({self.lowest_name})"


def require_same_structure(models: Sequence[nn.Module]) -> None:
    """Refuse models that differ in anything but the values of their tensors.

    Args:
        models: The models.

    Raises:
        InvalidInput: There is no model, or one differs; the message names the first difference.
    """
    if not models:
        raise InvalidInput("found no model: pass at least one")
    first = models[0]
    parts = dict(first.named_modules())
    state = first.state_dict()
    for number, other in enumerate(models[1:], start=1):
        theirs = dict(other.named_modules())
        for name in [*parts, *theirs]:
            mine_said, said = (_described(where.get(name)) for where in (parts, theirs))
            if mine_said != said:
                raise InvalidInput(
                    f"model {number} has another architecture than model 0: {name or 'the model itself'!r} is {said} there and "
                    f"{mine_said} in model 0"
                )
        other_state = other.state_dict()
        for name in [*state, *other_state]:
            if name not in state or name not in other_state:
                raise InvalidInput(f"only one of model 0 and model {number} has the tensor {name!r}")
            if state[name].shape != other_state[name].shape or state[name].dtype != other_state[name].dtype:
                raise InvalidInput(
                    f"tensor {name!r} is {shape_of(state[name])} in model 0 and {shape_of(other_state[name])} in model {number}"
                )


def _described(module: nn.Module | None) -> str:
    if module is None:
        return "missing"
    settings = "" if isinstance(module, nn.Dropout) else module.extra_repr()  # branches may be trained with other dropouts
    return f"{type(module).__name__}({settings})"


def alignment(seed: nn.Module, other: nn.Module, ffn_tensors: Sequence[str] = ()) -> Alignment:
    """Measure how near two models of one structure are.

    Args:
        seed: The first model.
        other: The second model.
        ffn_tensors: Names of tensors that belong to FFNs. They may differ freely where every other tensor is shared.

    Returns:
        The measure. It costs one pass over the weights.
    """
    mine, theirs, ffn = tensors_of(seed), tensors_of(other), frozenset(ffn_tensors)
    matrices = [n for n, t in mine.items() if t.ndim > 1 and t.is_floating_point() and min(t.shape[0], t[0].numel()) > 1]
    outside = [name for name in matrices if name not in ffn] or matrices
    cosines: list[tuple[float, int, str]] = []
    for name in outside:
        a, b = mine[name].double().flatten(), theirs[name].double().to(mine[name].device).flatten()
        equal = torch.equal(a, b)
        cosines.append((1.0 if equal else float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300)), a.numel(), name))
    if not cosines:
        return Alignment(cosine=1.0, lowest=1.0, lowest_name="the models have no matrix")
    lowest = min(cosines)
    mean = sum(c * size for c, size, _ in cosines) / sum(size for _, size, _ in cosines)
    return Alignment(cosine=mean, lowest=lowest[0], lowest_name=lowest[2])


def require_common_seed(models: Sequence[nn.Module], ffn_tensors: Sequence[str] = (), *, allow_strangers: bool = False) -> None:
    """Refuse models that did not grow from one seed, and warn of models that went far from each other.

    Args:
        models: Models of one structure; each is compared with the first.
        ffn_tensors: Names of tensors that belong to FFNs.
        allow_strangers: Warn where it would refuse.

    Raises:
        InvalidInput: A model shares no seed with the first; the message has the measure.
    """
    for number, other in enumerate(models[1:], start=1):
        found = alignment(models[0], other, ffn_tensors)
        if found.cosine >= _FAR:
            continue
        if found.cosine < _STRANGERS and not allow_strangers:
            raise InvalidInput(
                f"models 0 and {number} do not come from one seed: {found}, and branches of one seed stay near 1. Their average would be "
                "noise, and experts of one would not understand the other's hidden states. Branch all models from one checkpoint, or "
                "match their hidden units first; allow_strangers=True continues anyway"
            )
        warnings.warn(
            f"models 0 and {number} are far from each other: {found}. Compare the upcycled model with each dense one before training",
            stacklevel=3,
        )
