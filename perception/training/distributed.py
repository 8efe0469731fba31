"""Several processes, one model: torchrun's environment, averaged gradients, averaged batch-norm statistics.

Every rank makes its own part of the batch of a step and then takes exactly the same path: the gradients, the statistics and
the decision to stop are reduced over all ranks first, so no rank can skip a collective that the others wait for (the usual
reason why DDP trainings of detectors hang). Gradients are averaged explicitly after `backward` and not by a DDP wrapper: a
detector is called through `encode` and `decode`, which DDP's hooks on `forward` do not see.

Start with `torchrun --nproc-per-node N -m upcycle3d.tools.main train ...`; without torchrun, everything here does nothing and
there is one process.

Read next: `step.py`, which calls these functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """Which of the processes of a training this process is."""

    rank: int = 0
    """Number of this process, from 0."""

    world_size: int = 1
    """Number of processes."""

    device: torch.device = torch.device("cpu")
    """Where the tensors of this process should live."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Ask for each flag whether it is set on any rank. A collective: every rank must call it.

        Args:
            flags: The flags of this rank; the same number on every rank.

        Returns:
            The flags, equal on all ranks.
        """
        if self.world_size == 1:
            return list(flags)
        tensor = torch.tensor([float(f) for f in flags], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [value > 0 for value in tensor.tolist()]

    def gather(self, message: str) -> list[str]:
        """Collect the messages of all ranks. A collective: every rank must call it.

        Args:
            message: The message of this rank.

        Returns:
            All messages in the order of the ranks.
        """
        if self.world_size == 1:
            return [message]
        gathered: list[str | None] = [None] * self.world_size
        dist.all_gather_object(gathered, message)
        return [m or "" for m in gathered]

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def init_distributed(device: torch.device | str | None = None) -> DistributedContext:
    """Join the process group that torchrun announces in the environment; a single process needs none.

    Args:
        device: Where this process computes. None takes the CUDA device of this rank if there is one, else the CPU. The backend
            is gloo for the CPU and nccl for CUDA.

    Returns:
        This process among the others.

    Raises:
        InvalidInput: Only part of torchrun's environment is set.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if world_size == 1:
        return DistributedContext(device=device)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InvalidInput(f"WORLD_SIZE is {world_size} but {missing} are not set; start several processes with torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A collective that waits longer raises instead of hanging for ever.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return DistributedContext(rank=dist.get_rank(), world_size=world_size, device=device)


def per_rank(batch_at: Callable[[int, int, int], T], context: DistributedContext) -> Callable[[int], T]:
    """Fix the rank of a function that makes batches.

    Args:
        batch_at: `batch_at(step, rank, world_size)` gives one rank's part of the batch of a step.
        context: This process among the others.

    Returns:
        The `batch_at(step)` of this rank.
    """
    return lambda step: batch_at(step, context.rank, context.world_size)


def all_reduce_gradients(parameters: Iterable[nn.Parameter], context: DistributedContext) -> None:
    """Replace every gradient by its mean over the ranks, in one collective.

    This is the gradient of the whole batch if the loss is a mean over equally many samples on each rank. A parameter without
    gradient counts as zero if another rank has a gradient for it; if no rank has one, it stays without (so weight decay leaves
    it alone).

    Args:
        parameters: The trained parameters, in the same order on every rank.
        context: This process among the others.
    """
    if context.world_size == 1:
        return
    chosen = list(parameters)
    present = torch.tensor([float(p.grad is not None) for p in chosen], device=context.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
    *means, present = _mean([*gradients, present], context)
    for parameter, mean, share in zip(chosen, means, present.tolist(), strict=True):
        parameter.grad = mean if share > 0 else None


def average_statistics(modules: Iterable[nn.Module], context: DistributedContext) -> None:
    """Average the float buffers of layers in training mode (batch norm) over the ranks, so that all ranks stay equal.

    Layers in evaluation mode are left alone: the statistics of a frozen encoder must not change by a rounding error.

    Args:
        modules: The modules, in the same order on every rank.
        context: This process among the others.
    """
    if context.world_size == 1:
        return
    buffers = [b for b in training_buffers(modules) if b.is_floating_point()]
    if buffers:
        for buffer, mean in zip(buffers, _mean(buffers, context), strict=True):
            buffer.copy_(mean)


def training_buffers(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Find the buffers that a forward pass may change.

    Args:
        modules: The modules to search.

    Returns:
        The buffers of layers in training mode, each once.
    """
    layers = [layer for module in modules for layer in module.modules() if layer.training]
    return list({id(b): b for layer in layers for b in layer.buffers(recurse=False)}.values())


def _mean(tensors: Sequence[Tensor], context: DistributedContext) -> list[Tensor]:
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= context.world_size
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]
