"""Not a script: how `moe_readme.py` reads texts with a model and its routers, and what it measures of their decisions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle3d.perception.moe.carving.distillation import accuracy_by_position
from upcycle3d.perception.moe.carving.locality import kept_share, mutual_information
from upcycle3d.perception.moe.carving.masked_ffn import MaskedFfn
from upcycle3d.perception.moe.layers.control_routers import given_routing
from upcycle3d.perception.moe.layers.precision import Precision, products_in
from upcycle3d.perception.moe.layers.routing import Routing

AT_ONCE = 8
"""Rows that are read together."""
AFTER = (0, 1, 4, 16, 64)
"""Tokens after the splice where the bins of its cost begin; the last bin goes to the end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A model, and what decides for it before it runs."""

    model: nn.Module
    """The model."""
    decide: Callable[[Tensor, Tensor], Routing] | None = None
    """Decides from (B, L) tokens and the true domain of each text (B,) or token (B, L); None where the layers decide, or nothing does."""

    def logits(self, ids: Tensor, truth: Tensor) -> Tensor:
        """Give the (B, L, V) logits of the next tokens."""
        model: Any = self.model
        if self.decide is None:
            found: Tensor = model(ids).logits
            return found
        with given_routing(model, self.decide(ids, truth)):
            found = model(ids).logits
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a reader did with some texts."""

    losses: Tensor
    """(B, L - 1) loss of each token but the first, in nats."""
    chosen: Tensor | None
    """(S, B, L) expert of each token in each masked FFN that has a choice; None without such."""


@torch.no_grad()
def read(reader: Reader, rows: Tensor, truth: Tensor, precision: Precision) -> Reading:
    """Read texts."""
    layers = [module for module in reader.model.modules() if isinstance(module, MaskedFfn)]
    losses, chosen = [], []
    with products_in(precision, "cpu"):
        for ids, true in zip(rows.split(AT_ONCE), truth.split(AT_ONCE)):
            logits = reader.logits(ids, true)[:, :-1].float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1))
            routings = [layer.take_routing() for layer in layers]
            made = [routing.top1 for routing in routings if routing is not None]
            if made:
                chosen.append(torch.stack(made).view(len(made), *ids.shape))
    return Reading(losses=torch.cat(losses), chosen=torch.cat(chosen, 1) if chosen else None)


def read_tests(
    reader: Reader, tests: Sequence[Tensor], precision: Precision, truth: Sequence[Tensor] | None = None
) -> tuple[Reading, ...]:
    """Read the test rows of each domain; the true domain of a row is its own unless others are given."""
    own = [torch.full((len(rows),), number) for number, rows in enumerate(tests)]
    return tuple(read(reader, rows, true, precision) for rows, true in zip(tests, own if truth is None else truth))


def mean_losses(readings: Sequence[Reading]) -> list[float]:
    """Mean loss of each domain."""
    return [float(reading.losses.double().mean()) for reading in readings]


def decision_measures(readings: Sequence[Reading], experts: int) -> dict[str, Any]:
    """How right the decisions on the test rows are, and how they hang together: means over layers that decide for themselves."""
    chosen = [reading.chosen for reading in readings]
    layers = torch.cat([one for one in chosen if one is not None], 1)
    truth = torch.cat([torch.full((one.shape[1],), number) for number, one in enumerate(chosen) if one is not None])
    if bool((layers == layers[0]).all()):
        layers = layers[:1]  # one decision for all layers
    accuracy = accuracy_by_position(layers.flatten(0, 1), truth.repeat(len(layers)))
    found: dict[str, Any] = {
        "accuracy": accuracy.total,
        "accuracy_from": dict(zip(map(str, accuracy.bounds), accuracy.shares)),
        "kept": kept_share(layers),
        "entropy": statistics.fmean(mutual_information(one, one, experts) for one in layers),
    }
    if len(layers) > 1:
        found["adjacent_information"] = statistics.fmean(mutual_information(*pair, experts) for pair in pairwise(layers))
    return found


def splice_measures(
    reader: Reader, oracle: Reader, tests: Sequence[Tensor], whole: Sequence[Reading], precision: Precision
) -> dict[str, dict[str, float]]:
    """The loss after a switch of the domain in the middle of a row.

    Half of the rows of each domain begin with the first half of a row of the next domain. The same tokens are read in the middle of their
    own document (`unspliced`), after the splice (`spliced`), and after the splice with the true domain as the decision (`oracle`).
    """
    length = tests[0].shape[1]
    half = length // 2
    rows, truth, losses = [], [], []
    for number, own in enumerate(tests):
        other = (number + 1) % len(tests)
        count = (min(len(own), len(tests[other])) + 1) // 2
        rows.append(torch.cat([tests[other][:count, :half], own[:count, half:]], 1))
        truth.append(torch.tensor([other] * half + [number] * (length - half)).expand(count, -1))
        losses.append(whole[number].losses[:count, half - 1 :])
    spliced, true = torch.cat(rows), torch.cat(truth)
    found = {"unspliced": torch.cat(losses)}
    for name, one in (("spliced", reader), ("oracle", replace(oracle, model=reader.model))):
        found[name] = read(one, spliced, true, precision).losses[:, half - 1 :]
    return {name: by_distance(values) for name, values in found.items()}


def by_distance(losses: Tensor) -> dict[str, float]:
    """Mean loss of the tokens at each distance from the splice; the first column is the first token after it."""
    ends = [*AFTER[1:], losses.shape[1]]
    bins = [(low, high) for low, high in zip(AFTER, ends) if low < losses.shape[1]]
    return {str(low): float(losses[:, low:high].double().mean()) for low, high in bins}
