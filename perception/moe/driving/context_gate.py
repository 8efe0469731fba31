"""The pre-gate of a vehicle: finds the driving context of a scan before the network runs, and changes its mind slowly.

    scan ─ description ─ linear classifier ─ logits ─ hysteresis ─ decision
                                                         ^ state of the drive: the last decision, who wants to replace it, and counts

Frames follow each other, so a context lasts, and one odd frame must not load other weights. The decision changes when a context was the best
one for some frames in a row, or once it is better by a large margin. A frame without points says nothing, so the decision stays. Everything is
a pure function of the state and the scan. Read next: `drive_runtime.py`, which loads what was decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.structures import PointCloud
from ....core.tensor_value import shape_of
from ...models.decoders.scene_decision import FARTHEST
from .scan_descriptor import DescribedScan, ScanDescriptorConfig, describe_scan


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextGate:
    """A linear classifier of descriptions, as values."""

    contexts: tuple[str, ...]
    """Names of the M contexts."""
    descriptor: ScanDescriptorConfig
    """How scans are described by D numbers."""
    center: Tensor
    """(D,) float64 mean description."""
    spread: Tensor
    """(D,) float64 standard deviation, above 0."""
    weight: Tensor
    """(M, D) float64 weights."""
    bias: Tensor
    """(M,) float64 biases."""

    def __post_init__(self) -> None:
        require(
            bool(self.contexts) and len(set(self.contexts)) == len(self.contexts) and all(self.contexts),
            f"contexts need names of their own, found {self.contexts}",
        )
        count, width = len(self.contexts), self.descriptor.width
        wanted = {"center": (width,), "spread": (width,), "weight": (count, width), "bias": (count,)}
        for name, shape in wanted.items():
            value: Tensor = getattr(self, name)
            if value.shape != shape or value.dtype != torch.float64 or not bool(value.isfinite().all()):
                raise InvalidInput(f"the {name} of a gate must be finite float64 numbers {shape}, found {shape_of(value)}")
        require(bool((self.spread > 0).all()), "the spread of a gate must be above 0")

    def logits(self, described: DescribedScan) -> Tensor:
        """Compare a scan with the contexts.

        Args:
            described: The scan as numbers.

        Returns:
            (M,) float64 logits; differences are log odds.
        """
        return self.weight @ self.scaled(described.values) + self.bias

    def scaled(self, values: Tensor) -> Tensor:
        """Scale descriptions.

        Args:
            values: (..., D) descriptions.

        Returns:
            (..., D), within `FARTHEST`.
        """
        return ((values - self.center) / self.spread).clamp(-FARTHEST, FARTHEST)


def fit_context_gate(
    scans: Mapping[str, Sequence[DescribedScan]], descriptor: ScanDescriptorConfig, *, decay: float = 1e-3
) -> ContextGate:
    """Fit a gate to scans of known contexts. The problem is convex, so the result depends on nothing but the scans.

    Every context counts the same, whatever its number of scans. Scans without points are left out.

    Args:
        scans: Descriptions of some scans of each context.
        descriptor: How they were described.
        decay: Weight of the squared weights and biases beside the mean cross entropy. Without it, contexts that never look alike would get
            infinite weights.

    Returns:
        The gate.

    Raises:
        InvalidInput: A context has no scan with points, or a description has another width.

    Example:
        ```python
        config = ScanDescriptorConfig(sensor_height=1.73)
        scans = {name: [describe_scan(scan, config) for scan in own] for name, own in contexts.items()}
        gate = fit_context_gate(scans, config)
        ```
    """
    require_numbers("fit_context_gate", least=1e-9, most=1e3, decay=decay)
    require(bool(scans), "a gate needs scans of one context or more")
    rows: list[Tensor] = []
    label: list[int] = []
    for number, (name, own) in enumerate(scans.items()):
        used = [scan.values for scan in own if scan.points]
        require(bool(used), f"none of the {len(own)} scans of {name!r} has a point, so its place among the contexts is unknown")
        odd = [tuple(values.shape) for values in used if values.shape != (descriptor.width,)]
        require(not odd, f"scans of {name!r} are described by {odd[:1]} numbers, and the gate reads {descriptor.width}")
        rows += used
        label += [number] * len(used)
    values, target = torch.stack(rows), torch.tensor(label)
    weight = (1 / torch.bincount(target).double())[target] / len(scans)
    center = (weight[:, None] * values).sum(0)
    spread = (weight[:, None] * (values - center).square()).sum(0).sqrt().clamp_min(1e-3)
    gate = ContextGate(
        contexts=tuple(scans),
        descriptor=descriptor,
        center=center,
        spread=spread,
        weight=torch.zeros(len(scans), descriptor.width, dtype=torch.float64),
        bias=torch.zeros(len(scans), dtype=torch.float64),
    )
    fitted = _fit(gate.scaled(values), target, weight, len(scans), decay)
    return replace(gate, weight=fitted[:, :-1].contiguous(), bias=fitted[:, -1].contiguous())


@torch.enable_grad()
def _fit(x: Tensor, target: Tensor, weight: Tensor, classes: int, decay: float) -> Tensor:
    """(M, D + 1) weights and biases of the softmax regression."""
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    w = torch.zeros(classes, ones.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w], max_iter=500, history_size=20, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        entropy = torch.nn.functional.cross_entropy(ones @ w.T, target, reduction="none")
        value = (weight * entropy).sum() + decay * w.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[arg-type]
    return w.detach()


# ---- a drive


@dataclass(frozen=True, kw_only=True)
class Hysteresis:
    """How slowly a decision changes. `Hysteresis(frames=1)` is the control without it."""

    frames: int = 3
    """Frames in a row for which another context must be the best one before it is taken."""
    margin: float = 6.0
    """Difference of the logits at which one frame is enough: 6 is odds of 400 to 1. `inf` always waits."""
    stay: float = 0.0
    """What is added to the logit of the last decision before contexts are compared."""

    def __post_init__(self) -> None:
        require_counts("Hysteresis", frames=self.frames)
        require(self.margin > 0, f"Hysteresis.margin must be above 0, found {self.margin}")
        require_numbers("Hysteresis", least=0.0, most=1e6, stay=self.stay)


@dataclass(frozen=True, kw_only=True)
class DriveCounts:
    """What a gate has seen since the drive began."""

    frames: int = 0
    """Frames."""
    empty: int = 0
    """Frames without a usable point, in which the decision stayed."""
    non_finite: int = 0
    """Points that were left out, because a value of them is NaN or infinite."""
    switches: int = 0
    """Changes of the decision after the first one."""
    held_back: int = 0
    """Frames in which another context was the best one, and the decision stayed."""


@dataclass(frozen=True, kw_only=True)
class DriveState:
    """What is remembered from frame to frame. A drive begins with `DriveState()`."""

    context: int | None = None
    """The last decision; None before the first frame."""
    candidate: int | None = None
    """The context that wants to replace it: worth fetching ahead."""
    votes: int = 0
    """Frames in a row for which the candidate was the best one."""
    seen: bool = False
    """Whether the decision rests on a frame with points, or was assumed."""
    counts: DriveCounts = field(default_factory=DriveCounts)
    """What was seen."""


def decide(gate: ContextGate, rule: Hysteresis, state: DriveState, scan: PointCloud) -> DriveState:
    """Decide which context the next frame of a drive has.

    Args:
        gate: The classifier.
        rule: How slowly the decision changes.
        state: What is remembered of the frames before.
        scan: The frame, in the shifted frame.

    Returns:
        The new state; its `context` is the decision. A drive that begins without a point assumes context 0, and takes the best context at
        the first frame with points.

    Raises:
        InvalidInput: The scan lacks what the gate reads.

    Example:
        ```python
        state = DriveState()
        for scan in scans:
            state = decide(gate, Hysteresis(), state, scan)
            print(gate.contexts[state.context])
        ```
    """
    described = describe_scan(scan, gate.descriptor)
    state = replace(state, counts=replace(state.counts, non_finite=state.counts.non_finite + described.non_finite))
    return after_logits(rule, state, gate.logits(described).tolist() if described.points else None)


def after_logits(rule: Hysteresis, state: DriveState, logits: Sequence[float] | None) -> DriveState:
    """Apply the hysteresis to the logits of one frame.

    Args:
        rule: How slowly the decision changes.
        state: What is remembered of the frames before.
        logits: One number per context; None for a frame that says nothing.

    Returns:
        The new state. Of contexts with equal logits the last decision wins, and then the one with the smaller number.
    """
    counts = replace(state.counts, frames=state.counts.frames + 1)
    if logits is None:
        return replace(state, context=state.context or 0, counts=replace(counts, empty=counts.empty + 1))
    values = [value + (rule.stay if number == state.context else 0.0) for number, value in enumerate(logits)]
    best = values.index(max(values))
    now = state.context
    if now is None or not state.seen:
        changed = now is not None and now != best
        return DriveState(context=best, seen=True, counts=replace(counts, switches=counts.switches + changed))
    if values[best] == values[now]:
        return DriveState(context=now, seen=True, counts=counts)
    votes = state.votes + 1 if best == state.candidate else 1
    if votes >= rule.frames or values[best] - values[now] >= rule.margin:
        return DriveState(context=best, seen=True, counts=replace(counts, switches=counts.switches + 1))
    waits = replace(counts, held_back=counts.held_back + 1)
    return DriveState(context=now, candidate=best, votes=votes, seen=True, counts=waits)
