"""Find out by running it what a part of a model computes: is it an FFN, with which activation, and which half is the gate?

Names and classes only suggest where an FFN is. A swapped gate changes every output and raises no error, and a normalization between
the linear maps is easily overlooked. So every candidate is run with random weights in float64 and compared with `DenseFfn.apply`; what
does not agree is refused. The model's own weights take no part and are not touched.

Read next: `ffn_search.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput
from ..layers.dense_ffn import ACTIVATIONS, Activation
from .ffn_sites import FfnSite

_TOKENS = 3
_AGREES = 1e-9  # float64 leaves 1e-15; two of the activations differ by 4e-4


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a probe found out about an FFN."""

    hypothesis: int
    """Number of the hypothesis that agrees."""
    activation: Activation
    """The activation that agrees."""
    dropout: float
    """Dropout of the hidden units."""
    dropout_after: float
    """Dropout of the outputs."""


class ModelPart(nn.Module):
    """A part of a model that can be run alone: some modules and the order in which they are called."""

    def __init__(self, modules: Mapping[str, nn.Module], run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names = dict(zip((f"m{i}" for i in range(len(modules))), modules))
        for short, module in zip(self.names, modules.values()):
            self.add_module(short, module)
        self.run = (run,)  # in a tuple: a module must not be registered a second time

    def forward(self, x: Tensor) -> Tensor:
        """Run the part.

        Args:
            x: Tokens, as the part takes them.

        Returns:
            Tokens.
        """
        return self.run[0](x)

    def full_name(self, name: str) -> str:
        """Translate the name of a tensor of this part.

        Args:
            name: Name within the part.

        Returns:
            Name within the model.
        """
        short, _, rest = name.partition(".")
        prefix = self.names[short]
        return f"{prefix}.{rest}" if prefix else rest


def random_tensors(part: nn.Module) -> dict[str, Tensor]:
    """Draw weights for a probe, always the same ones.

    Args:
        part: Modules whose tensors are replaced.

    Returns:
        Name to a float64 tensor on the CPU; running variances are positive and whole numbers stay.
    """
    draw = torch.Generator().manual_seed(20)
    made: dict[str, Tensor] = {}
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        if not tensor.is_floating_point():
            made[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            continue
        value = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        made[name] = value.abs() + 0.5 if name.endswith("running_var") else value * (1.5 / fan_in**0.5)
    return made


def probe(part: ModelPart, hypotheses: Sequence[FfnSite]) -> Verdict | str:
    """Run a part of a model and find the FFN that it is equal to.

    Args:
        part: The part, called with one tensor.
        hypotheses: Sites to try; each is tried with every activation.

    Returns:
        The hypothesis and the activation that agree, and the dropouts; or the reason why none agrees.
    """
    first = hypotheses[0]
    tensors = random_tensors(part)
    x = torch.randn(_TOKENS, first.width_in, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
    flat = first.channel_dim is None
    inputs = [x, x[None]] if flat else [x.reshape(_TOKENS, first.width_in, *[1] * (-1 - (first.channel_dim or 0)))]
    seen: list[tuple[nn.Dropout, Tensor]] = []
    out, problem = None, ""
    for given in inputs:
        seen.clear()
        try:
            with torch.no_grad(), _evaluation(part), _other_tensors(part, tensors), _watched(part, seen):
                out = part(given)
            break
        except Exception as error:  # anything may go wrong inside a stranger's module
            problem = problem or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
    else:
        return f"it could not be run with one tensor of tokens ({problem})"
    if not isinstance(out, Tensor):
        return f"it returns {type(out).__name__} and not one tensor"
    y = out.reshape(_TOKENS, -1) if out.numel() == _TOKENS * first.width_out else out
    if y.shape != (_TOKENS, first.width_out):
        return (
            f"it turns tokens {tuple(given.shape)} into {tuple(out.shape)}, and its last linear map has {first.width_out} outputs"
        )
    by_full_name = {part.full_name(name): tensor for name, tensor in tensors.items()}
    best = float("inf")
    for number, hypothesis in enumerate(hypotheses):
        for activation in ACTIVATIONS:
            site = replace(hypothesis, activation=activation)
            try:
                difference = float((site.read(by_full_name).apply(x) - y).abs().max() / y.abs().max())
            except InvalidInput as error:
                return str(error)
            best = min(best, difference)
            if difference < _AGREES:
                return _verdict(number, activation, seen, y)
    return (
        f"its linear maps fit together, but it computes something else than down(act(up x)) or down(act(gate x) * up x) with act among "
        f"{', '.join(ACTIVATIONS)}: with random weights the nearest of them differs by {best:.1%} of the largest output"
    )


def _verdict(number: int, activation: Activation, seen: Sequence[tuple[nn.Dropout, Tensor]], y: Tensor) -> Verdict | str:
    """Tell dropout of the outputs from dropout of the hidden units, by what went into it."""
    hidden: list[float] = []
    after: list[float] = []
    for module, value in seen:
        at_end = value.numel() == y.numel() and torch.equal(value.reshape(y.shape), y)
        (after if at_end else hidden).append(module.p)
    if sum(p > 0 for p in hidden) > 1 or sum(p > 0 for p in after) > 1:
        return "it has several dropouts in one place, which a mixture has not"
    return Verdict(
        hypothesis=number,
        activation=activation,
        dropout=max(hidden, default=0.0),
        dropout_after=max(after, default=0.0),
    )


@contextmanager
def _evaluation(part: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in part.modules()]
    part.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _other_tensors(part: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other weights. `torch.func.functional_call` does not restore modules that are registered under two names."""
    named = (*part.named_parameters(), *part.named_buffers())
    other = {id(tensor): tensors[name] for name, tensor in named}
    before: list[tuple[Any, str, Tensor]] = []
    try:
        for module in part.modules():
            places: tuple[Any, ...] = (module._parameters, module._buffers)  # plain tensors stand in for parameters here
            for place in places:
                for name, tensor in place.items():
                    if tensor is not None:
                        before.append((place, name, tensor))
                        place[name] = other[id(tensor)]
        yield
    finally:
        for place, name, tensor in before:
            place[name] = tensor


@contextmanager
def _watched(part: nn.Module, seen: list[tuple[nn.Dropout, Tensor]]) -> Iterator[None]:
    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Dropout)
        seen.append((module, given[0]))

    hooks = [m.register_forward_pre_hook(note) for m in part.modules() if isinstance(m, nn.Dropout)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
