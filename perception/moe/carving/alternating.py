"""Alternating training (Read-ME): in each round the router learns from the model, and then everything but the router learns the task.

The router and the experts depend on each other: the overlaps that teach the router come from the model, and the experts see the tokens
that the router sends them. A round has a router phase and an expert phase; both use the same code here for every arm of a comparison:

| arm | how |
|---|---|
| alternating | `AlternatingConfig(rounds=2, ...)` |
| without alternation | `config.once()`: all router steps, then all expert steps |
| oracle router, pooled pruning, dense model | `router_steps=0` |
| layer-wise routers | `routers` are the layers' routers |

A batch is a function of the phase's kind and the number of the step, so a job that was stopped goes on with the same batches. Finished
phases are kept in one file, and a phase that was stopped in its middle starts again.

Read next: `distillation.py`, the loss of the router phase.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ....core.config_json import config_from_json, config_to_json
from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.tensor_file import TensorFileKind, content_digest, fill_module, read_tensors, write_tensors
from ..layers.descent import descend
from ..layers.precision import Precision, products_in

_B = TypeVar("_B")
PhaseKind = Literal["router", "experts"]

ALTERNATING_FILE = TensorFileKind(
    name="alternating training", format="upcycle3d alternating training 1", advice="delete it, and the training starts again"
)
FILE_NAME = "alternating.safetensors"


@dataclass(frozen=True, kw_only=True)
class AlternatingConfig:
    """Lengths and rates of an alternating training. The rates are the paper's."""

    rounds: int = 2
    """Number of rounds. The paper uses 8 and sees no gain for the router after two."""
    router_steps: int = 100
    """Steps of each router phase; 0 leaves the phases out."""
    expert_steps: int = 200
    """Steps of each expert phase; 0 leaves the phases out."""
    router_lr: float = 5e-4
    """First learning rate of a router phase."""
    expert_lr: float = 5e-5
    """First learning rate of an expert phase."""
    warmup: int = 10
    """Steps over which the rate of a phase rises from 0; from there it falls to 0 as a cosine."""
    decay_per_round: float = 0.8
    """Factor of both rates from round to round."""
    routers_first: bool = False
    """Whether the router phases of all rounds come before the expert phases: the control without alternation."""
    weight_decay: float = 0.01
    """Decay of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "float32"
    """Type of the matrix products."""
    seed: int = 0
    """Number that dropout depends on; the batches are the caller's."""

    def __post_init__(self) -> None:
        require_counts("AlternatingConfig", rounds=self.rounds)
        steps = {"router_steps": self.router_steps, "expert_steps": self.expert_steps, "warmup": self.warmup, "seed": self.seed}
        require_counts("AlternatingConfig", least=0, most=10**9, **steps)
        require_numbers("AlternatingConfig", least=0.0, most=1e6, router_lr=self.router_lr, expert_lr=self.expert_lr)
        require_numbers("AlternatingConfig", least=0.0, most=1e6, weight_decay=self.weight_decay, clip=self.clip)
        require_numbers("AlternatingConfig", least=1e-6, most=1.0, decay_per_round=self.decay_per_round)

    def once(self) -> AlternatingConfig:
        """Make the control without alternation: the same phases with the same rates, all router phases first.

        Returns:
            The configuration.
        """
        return replace(self, routers_first=True)

    def phases(self) -> tuple[Phase, ...]:
        """List the phases that have a step.

        Returns:
            The phases in order. The steps of each kind are numbered on from round to round.
        """
        found = []
        for number in range(self.rounds):
            decay = self.decay_per_round**number
            for kind, steps, lr in (
                ("router", self.router_steps, self.router_lr),
                ("experts", self.expert_steps, self.expert_lr),
            ):
                if steps:
                    found.append(Phase(kind=kind, round=number, first=number * steps, steps=steps, lr=lr * decay))  # type: ignore[arg-type]
        return tuple(sorted(found, key=lambda phase: phase.kind == "experts") if self.routers_first else found)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a round."""

    kind: PhaseKind
    """What trains: the routers, or everything else."""
    round: int
    """Number of the round, from 0."""
    first: int
    """Number of its first step among all steps of its kind."""
    steps: int
    """Number of steps."""
    lr: float
    """Learning rate after the warm-up."""

    def rate(self, step: int, warmup: int) -> float:
        """Get the learning rate of a step.

        Args:
            step: Number of the step in the phase, from 0.
            warmup: Steps over which the rate rises.

        Returns:
            The rate.
        """
        rise = min(1.0, (step + 1) / max(1, warmup))
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, kw_only=True)
class CarvingPhaseRecord:
    """What a phase did."""

    phase: Phase
    """The phase."""
    losses: tuple[float, ...]
    """Loss of each step."""
    cpu_seconds: float
    """CPU time of the process in training steps."""
    trained: int
    """Number of values that were trained."""

    def __str__(self) -> str:
        p = self.phase
        went = f"{self.losses[0]:.4f} -> {self.losses[-1]:.4f}" if self.losses else "no step"
        return (
            f"round {p.round + 1}, {p.kind}: loss {went}, {p.steps} steps, {self.trained:,} values, {self.cpu_seconds:.0f} CPU-s"
        )


@dataclass(frozen=True, kw_only=True)
class AlternatingRecord:
    """What an alternating training did. `print(record)` shows a line per phase."""

    config: AlternatingConfig
    """Its configuration."""
    phases: tuple[CarvingPhaseRecord, ...]
    """The finished phases."""

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all phases, those before an interruption included."""
        return sum(phase.cpu_seconds for phase in self.phases)

    def __str__(self) -> str:
        return "\n".join(map(str, self.phases))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A training that may go on from a file."""

    identity: str
    path: Path | None

    def load(self, model: nn.Module, routers: nn.ModuleList) -> tuple[CarvingPhaseRecord, ...]:
        if self.path is None or not self.path.exists():
            return ()
        file = read_tensors(self.path, ALTERNATING_FILE)
        if file.meta.get("job") != self.identity:
            raise InvalidInput(
                f"{self.path} belongs to another training (other options, weights or data); give another folder, or "
                f"{ALTERNATING_FILE.advice}"
            )
        record = config_from_json(AlternatingRecord, file.described("record"))
        for name, module in (("model", model), ("routers", routers)):
            own = {key.removeprefix(f"{name}."): t for key, t in file.tensors.items() if key.startswith(f"{name}.")}
            fill_module(module, own, self.path)
        return record.phases

    def save(self, model: nn.Module, routers: nn.ModuleList, record: AlternatingRecord) -> None:
        if self.path is None:
            return
        both = (("model", model), ("routers", routers))
        tensors = {f"{name}.{key}": tensor for name, module in both for key, tensor in module.state_dict().items()}
        meta = {"job": self.identity, "record": json.dumps(config_to_json(record))}
        write_tensors(self.path, tensors, meta, ALTERNATING_FILE)


def alternate(
    model: nn.Module,
    routers: Sequence[nn.Module],
    config: AlternatingConfig,
    batch_of: Callable[[PhaseKind, int], _B],
    router_loss: Callable[[_B], Tensor],
    expert_loss: Callable[[_B], Tensor],
    *,
    folder: str | Path | None = None,
    job: str = "",
    say: Callable[[str], None] | None = None,
) -> AlternatingRecord:
    """Train routers and experts in turn. Both are changed in place, and are in evaluation mode afterwards.

    Args:
        model: A masked model, or any model for the baselines. In an expert phase all its parameters train but those of the routers.
            What needs no gradient before stays frozen in every phase. To go on with a stopped job, give model and routers as they were at
            its start: the weights of the finished phases come from the folder.
        routers: A pre-gate, or the layers' routers; none for the baselines.
        config: Rounds, steps and rates.
        batch_of: Gives the batch of a kind of phase and a step. It must depend on nothing else, or a continued job sees other data.
        router_loss: Gives the loss of a router phase, from `DistillLoss`.
        expert_loss: Gives the loss of an expert phase: the task's loss under the decision of the routers.
        folder: Where finished phases are kept, so that a stopped job goes on; None keeps nothing.
        job: What else the result depends on, such as a hash of the data and the arguments of the losses: a folder of another job is
            refused.
        say: Is told about every finished phase, and gets a line after every tenth of its steps.

    Returns:
        What every phase did.

    Raises:
        InvalidInput: A phase has nothing to train, a loss is not finite, or the folder belongs to another job.
    """
    together = nn.ModuleList(routers)
    wanted = [(p, p.requires_grad) for module in (model, together) for p in module.parameters()]
    identity = _identity(model, together, config, job) if folder is not None else ""
    keeper = _Job(identity=identity, path=None if folder is None else Path(folder) / FILE_NAME)
    records = list(keeper.load(model, together))
    of_router = {id(p) for p in together.parameters()}
    try:
        for number, phase in enumerate(config.phases()):
            if number < len(records):
                continue
            trained = [p for p, wants in _unique(wanted) if wants and ((id(p) in of_router) == (phase.kind == "router"))]
            require(bool(trained), f"no parameter is left to train in the {phase.kind} phase; set its steps to 0")
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            model.train(phase.kind == "experts")
            together.train(phase.kind == "router")
            loss_of = router_loss if phase.kind == "router" else expert_loss
            records.append(_train(trained, phase, number, config, batch_of, loss_of, say))
            keeper.save(model, together, AlternatingRecord(config=config, phases=tuple(records)))
            if say is not None:
                say(str(records[-1]))
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
        model.eval()
        together.eval()
    return AlternatingRecord(config=config, phases=tuple(records))


def _unique(pairs: list[tuple[nn.Parameter, bool]]) -> list[tuple[nn.Parameter, bool]]:
    return list({id(parameter): (parameter, wants) for parameter, wants in pairs}.values())


def _train(
    trained: list[nn.Parameter],
    phase: Phase,
    number: int,
    config: AlternatingConfig,
    batch_of: Callable[[PhaseKind, int], _B],
    loss_of: Callable[[_B], Tensor],
    say: Callable[[str], None] | None,
) -> CarvingPhaseRecord:
    """One phase with an optimizer of its own. Dropout depends on the seed and the number of the phase only."""
    optimizer = torch.optim.AdamW(trained, lr=phase.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95), fused=True)
    losses = []
    start = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed * 1_000_003 + number)
        for step in range(phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = phase.rate(step, config.warmup)
            batch = batch_of(phase.kind, phase.first + step)
            with products_in(config.precision, trained[0].device):
                loss = loss_of(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InvalidInput(f"the loss is {value} at step {step} of a {phase.kind} phase; lower its rate ({phase.lr:g})")
            descend(loss, optimizer, clip=config.clip, step=step)
            losses.append(value)
            if say is not None and step + 1 < phase.steps and 10 * (step + 1) // phase.steps > 10 * step // phase.steps:
                say(f"round {phase.round + 1}, {phase.kind}: step {step + 1} of {phase.steps}, loss {value:.4f}")
    seconds = time.process_time() - start
    return CarvingPhaseRecord(phase=phase, losses=tuple(losses), cpu_seconds=seconds, trained=sum(p.numel() for p in trained))


def _identity(model: nn.Module, routers: nn.ModuleList, config: AlternatingConfig, job: str) -> str:
    """Hash of what a training depends on: the weights that it starts from, its options, and what the caller adds."""
    depends: list[Any] = [content_digest(dict(module.state_dict())) for module in (model, routers)]
    depends += [config_to_json(config), job]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
