"""Which tensors train in a stage, and the proof that the others stayed as they were, bit by bit.

Diversified multiplet upcycling trains only the FFNs in its contrastive stages and only the routers in its last one. The results of
a stage mean something only if nothing else moved: neither a weight nor a batch-norm statistic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require

Stage = Literal["ffn", "router", "all_but_router"]


@dataclass(frozen=True, kw_only=True)
class MixtureParts:
    """Names of the parts of a model that stages are about: modules or single parameters, as `named_modules` gives them."""

    ffn: tuple[str, ...] = ()
    """FFNs of a dense model, or expert banks of a mixture."""

    router: tuple[str, ...] = ()
    """Routers. A parameter such as `layers.0.attention.router` may be named, too."""


@dataclass(frozen=True, kw_only=True)
class StageTensors:
    """What trains and what does not; every tensor of the model's state has its place in one of the two."""

    trained: tuple[str, ...]
    """Names of the parameters that need a gradient."""

    frozen: tuple[str, ...]
    """Names of all other parameters and of all buffers that belong to no trained module."""

    elements: int
    """Number of values in the trained parameters."""

    def __str__(self) -> str:
        return f"{len(self.trained)} tensors with {self.elements:,} values train, {len(self.frozen)} tensors are frozen"


def modules_of(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> tuple[str, ...]:
    """Name the modules of some classes; a module inside such a module is not named again.

    Args:
        model: The model.
        kinds: Class or classes, such as an expert bank's.

    Returns:
        The names in the order of the model.
    """
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not any(_inside(name, outer) for outer in names):
            names.append(name)
    return tuple(names)


def freeze(model: nn.Module, stage: Stage, parts: MixtureParts) -> StageTensors:
    """Let exactly the tensors of one stage train, and freeze the others.

    Gradients of frozen parameters are removed: an optimizer would still apply them, and weight decay with them.

    Args:
        model: The model; `requires_grad` of its parameters changes.
        stage: "ffn" trains the FFNs alone, "router" the routers alone, "all_but_router" everything else than the routers.
        parts: Where FFNs and routers are.

    Returns:
        The names of what trains and of what does not. Keep it for `FrozenState`.

    Raises:
        InvalidInput: A name is not in the model, the stage has nothing to train, or one tensor under two names would both train and
            be frozen.
    """
    require(stage in get_args(Stage), f"stage must be one of {', '.join(get_args(Stage))}, found {stage!r}")
    named = parts.ffn if stage == "ffn" else parts.router
    _check_names(model, named)

    def trains(name: str) -> bool:
        return any(_inside(name, outer) for outer in named) != (stage == "all_but_router")

    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {name: tensor for name, tensor in parameters.items() if trains(name)}
    require(bool(trained), f"stage {stage!r} has no parameter to train; MixtureParts names {named or 'no module'}")
    ids = {id(tensor): name for name, tensor in trained.items()}
    for name, tensor in parameters.items():
        if name not in trained and id(tensor) in ids:
            raise InvalidInput(
                f"{ids[id(tensor)]} and {name} are one tensor; it would train and be frozen in stage {stage!r}. Untie it first, or "
                "name both in MixtureParts"
            )
    for name, tensor in parameters.items():
        tensor.requires_grad_(name in trained)
        if name not in trained:
            tensor.grad = None
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False) if not trains(name)]
    frozen = (*(name for name in parameters if name not in trained), *buffers)
    elements = sum(tensor.numel() for tensor in {id(t): t for t in trained.values()}.values())
    return StageTensors(trained=tuple(trained), frozen=frozen, elements=elements)


@dataclass(frozen=True, kw_only=True)
class FrozenState:
    """Digests of the tensors that must not change during a stage.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> stage = freeze(model, "ffn", MixtureParts(ffn=("1",)))
        >>> before = FrozenState.of(model, stage)
        >>> _ = nn.init.zeros_(model[1].weight)
        >>> before.check(model)
    """

    digests: tuple[tuple[str, str], ...]
    """Name and SHA-256 of type, shape and bytes of every frozen tensor."""

    @classmethod
    def of(cls, model: nn.Module, tensors: StageTensors) -> FrozenState:
        """Take the state before a stage.

        Args:
            model: The model.
            tensors: What trains and what does not.

        Returns:
            The digests of what does not train.
        """
        state = dict(_state(model))
        return cls(digests=tuple((name, _digest(state[name])) for name in tensors.frozen))

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """Find frozen tensors that are no longer what they were.

        Args:
            model: The model after, or during, the stage.

        Returns:
            Their names in the order of the model; a tensor that is gone counts as changed.
        """
        state = dict(_state(model))
        return tuple(name for name, digest in self.digests if name not in state or _digest(state[name]) != digest)

    def check(self, model: nn.Module) -> None:
        """Refuse a model in which a frozen tensor changed by a single bit.

        Args:
            model: The model after the stage.

        Raises:
            InvalidInput: A tensor changed; the message names the first one.
        """
        changed = self.changed(model)
        if changed:
            buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
            remedy = (
                "a buffer, so its module ran in training mode: call eval() on frozen batch norms in every step"
                if changed[0] in buffers
                else "a weight: give the optimizer only parameters that need a gradient"
            )
            raise InvalidInput(f"{len(changed)} frozen tensors changed during the stage, first {changed[0]!r}. It is {remedy}")


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in names:
        if not name or name not in known:
            raise InvalidInput(
                f"{type(model).__name__} has no part {name!r}; names are those of named_modules(), such as "
                f"{', '.join(sorted(known - {''})[:5]) or 'none'}"
            )
