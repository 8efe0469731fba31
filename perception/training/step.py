"""One optimizer step: forward, backward, mean over ranks, check, clip, AdamW.

    seed(step) -> loss -> backward -> mean over ranks -> finite? -> clip -> AdamW -> mean of batch-norm statistics

A step whose loss or gradient is not finite changes nothing: weights, optimizer and batch-norm statistics stay as they were.

Read next: `loop.py`, which repeats the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from ...core.errors import InvalidInput, NonFiniteValue
from ...core.structures import LossTerms
from ..models.non_finite import FAILURES, name_non_finite
from ..moe.layers.unused_experts import keep_unused_experts
from .distributed import DistributedContext, all_reduce_gradients, average_statistics, training_buffers
from .optim import OneCycle, learning_rate, make_optimizer, set_schedule
from .progress import StopRequest

Batch = TypeVar("Batch")


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Make the seed of one step of one rank, well mixed, so that neighboring steps and seeds share nothing.

    Args:
        seed: Seed of the run.
        step: 0-based step.
        rank: Rank of the process.

    Returns:
        63 random-looking bits.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one optimizer step did."""

    terms: LossTerms
    """Loss terms of this rank."""

    grad_norm: Tensor
    """Scalar: L2 norm of the gradient over all parameters and ranks, before clipping."""

    fault: str
    """What was not finite, in which frames, on which rank; empty if the step was good. After a fault nothing has changed."""

    stopping: bool
    """Whether any rank was asked to stop."""


class OptimizerStep(Generic[Batch]):
    """The step of one run: it holds the optimizer and the loss scale, and nothing of the steps before.

    Args:
        modules: The modules that training changes, by name, e.g. student and teacher.
        parameters: The parameters to train; all belong to `modules`.
        loss: `loss(batch, step)` gives the weighted float32 terms of this rank.
        optim: The schedule.
        seed: Seed of the run.
        clip_norm: Largest L2 norm of the gradient over all parameters.
        amp: Mixed precision of the forward pass, on CUDA only.
        context: This process among the others.
        frame_ids: Names the frames of a batch, for messages.

    Raises:
        InvalidInput: There is no parameter, one is frozen, or one belongs to none of `modules`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parameters: Sequence[nn.Parameter],
        loss: Callable[[Batch, int], LossTerms],
        *,
        optim: OneCycle,
        seed: int,
        clip_norm: float,
        amp: Literal["off", "bf16", "fp16"],
        context: DistributedContext,
        frame_ids: Callable[[Batch], Sequence[str]] | None = None,
    ) -> None:
        self.optimizer = make_optimizer(parameters, optim)
        for module in modules.values():  # an expert that nothing chose stays as it is, as a layer without a gradient does
            keep_unused_experts(self.optimizer, module)
        self._names = _names(modules, parameters)
        self.device = parameters[0].device
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16" and self.device.type == "cuda")
        self._modules, self._parameters, self._loss = modules, parameters, loss
        self._optim, self._seed, self._clip_norm, self._amp = optim, seed, clip_norm, amp
        self._broken = ""  # what was not finite before there was a loss
        self._context, self._frame_ids = context, frame_ids

    def run(self, batch: Batch, step: int, stop: StopRequest) -> StepOutcome:
        """Take one step.

        Args:
            batch: The batch of this rank.
            step: 0-based step.
            stop: Looked at after the backward pass, so that all ranks agree on the last step.

        Returns:
            Losses, gradient norm, and what went wrong.

        Raises:
            InvalidInput: The loss terms cannot be trained on: there are none, they are not float32 scalars, or they do not depend
                on a parameter.
        """
        before = _Snapshot(self._modules.values())
        terms, norm, norms = self._forward_backward(batch, step, before)
        bad_loss, bad_gradient = self._non_finite(terms, norm, norms)
        flags = self._context.any([bool(bad_loss), bool(bad_gradient), stop.requested])
        any_bad_loss, any_bad_gradient, stopping = flags
        if any_bad_loss or any_bad_gradient:
            before.restore()
            fault = bad_loss if any_bad_loss else bad_gradient  # a bad loss on one rank spoils the gradients of all
            return StepOutcome(terms=terms, grad_norm=norm, fault=self._explain(fault, step, batch), stopping=stopping)
        _clip(self._parameters, norm, self._clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        average_statistics(self._modules.values(), self._context)
        return StepOutcome(terms=terms, grad_norm=norm, fault="", stopping=stopping)

    def _forward_backward(self, batch: Batch, step: int, before: _Snapshot) -> tuple[LossTerms, Tensor, list[Tensor]]:
        """Fill the gradients. Returns the loss terms, the L2 norm of the gradient, and the norm for each parameter."""
        torch.manual_seed(step_seed(self._seed, step, self._context.rank))
        set_schedule(self.optimizer, self._optim, step)
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._terms(batch, step, before)
        if self._broken:
            for parameter in self._parameters:  # so that every rank learns of it by the mean of the gradients
                parameter.grad = torch.full_like(parameter, torch.nan)
            all_reduce_gradients(self._parameters, self._context)
            norm = torch.full((), torch.nan, device=self.device)
            return terms, norm, [norm] * len(self._parameters)
        if not terms.terms:
            raise InvalidInput(f"the loss of step {step} has no term; a step with nothing to learn should return a zero term")
        for name, value in terms.terms.items():
            if value.ndim or value.dtype not in (torch.float32, torch.float64):
                raise InvalidInput(
                    f"the loss term {name!r} must be a float32 scalar, found {tuple(value.shape)} {value.dtype}; "
                    "cast the network's outputs with .float() before the losses"
                )
        total = terms.total()
        if not total.requires_grad:
            raise InvalidInput(
                f"no loss term of step {step} depends on a trainable parameter: {sorted(terms.terms)}; is the network frozen?"
            )
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        all_reduce_gradients(self._parameters, self._context)  # before unscaling: an overflow on one rank must reach all
        self.scaler.unscale_(self.optimizer)
        norms = torch._foreach_norm([p.grad if p.grad is not None else p.new_zeros(()) for p in self._parameters])
        return terms, torch.stack(list(norms)).norm(), list(norms)

    def _terms(self, batch: Batch, step: int, before: _Snapshot) -> LossTerms:
        """The loss terms. Where the forward pass fails because of NaN or infinite values, `_broken` says where they begin."""
        self._broken = ""

        def forward() -> LossTerms:
            with _autocast(self._amp, self.device):
                return self._loss(batch, step)

        try:
            return forward()
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            before.restore()  # the statistics of batch norm are spoiled too, and are not the cause
            found = name_non_finite(self._modules, forward)
            if not found and not isinstance(error, NonFiniteValue):
                raise
            self._broken = found or str(error)
            return LossTerms(terms={"loss": torch.full((), torch.nan, device=self.device)})

    def _non_finite(self, terms: LossTerms, norm: Tensor, norms: Sequence[Tensor]) -> tuple[str, str]:
        """Which loss term, and which parameter's gradient, is not finite; "" where all is well. One transfer from the device."""
        total, gradient = torch.stack([terms.total().detach().to(norm.dtype), norm]).isfinite().tolist()
        bad_loss = bad_gradient = ""
        if self._broken:
            bad_loss = self._broken
        elif not total:
            bad_loss = f"{terms.first_non_finite() or 'the sum of all terms'!r} is not finite"
        # GradScaler skips such a step by itself and lowers its scale, as long as it can.
        scale_can_shrink = self.scaler.is_enabled() and self.scaler.get_scale() > 1.0
        if not gradient and not scale_can_shrink:
            first = next(
                (n for n, value in zip(self._names, norms, strict=True) if not value.isfinite()), "all parameters together"
            )
            bad_gradient = f"'gradient of {first}' is not finite"
        return bad_loss, bad_gradient

    def _explain(self, fault: str, step: int, batch: Batch) -> str:
        """What was not finite on which rank, as a message. A collective: every rank calls it."""
        ids = tuple(self._frame_ids(batch)) if self._frame_ids is not None and fault else ()
        own = f"{fault}, frames: {', '.join(ids) or 'unknown'}" if fault else ""
        many = self._context.world_size > 1
        found = [f"rank {rank}: {m}" if many else m for rank, m in enumerate(self._context.gather(own)) if m]
        rate = learning_rate(self._optim, step)
        return f"training stopped at step {step} (0-based; learning rate {rate:.3g}): {'; '.join(found)}."


def _clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their common L2 norm is at most `limit`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


def _names(modules: Mapping[str, nn.Module], parameters: Sequence[nn.Parameter]) -> list[str]:
    known = {p: f"{key}.{name}" for key, module in modules.items() for name, p in module.named_parameters()}
    strangers = [tuple(p.shape) for p in parameters if p not in known]
    if strangers:
        raise InvalidInput(
            f"trainable parameters of shapes {strangers[:5]} belong to none of the modules {sorted(modules)}; add their module"
        )
    return [known[p] for p in parameters]


def _autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    if amp == "off" or device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16 if amp == "bf16" else torch.float16)


class _Snapshot:
    """The buffers that a forward pass changes (batch-norm statistics), to undo a step that is not finite."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._pairs = [(buffer, buffer.clone()) for buffer in training_buffers(modules)]

    def restore(self) -> None:
        for buffer, copy in self._pairs:
            buffer.copy_(copy)
