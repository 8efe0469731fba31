"""The mean teacher: an exponential moving average (EMA) of the student, which makes the pseudo labels.

    teacher <- d * teacher + (1 - d) * student,    d = min(1 - 1 / (step + 1), max_decay)

The ramp makes the first teachers plain averages of the students so far. Batch-norm statistics are already moving averages:
they are copied, not averaged a second time. Forgetting them is the usual fault (lightly's `update_momentum`, 3DIoUMatch): the
teacher then normalizes with the statistics that it had when it was made.

Read next: `perception/server/trainer.py`, where the teacher is used.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...core.errors import InvalidInput

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """Copy a student.

    Args:
        student: The network in training.

    Returns:
        A deep copy in evaluation mode that never needs a gradient.
    """
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher.eval()


def ema_decay(step: int, max_decay: float = 0.999) -> float:
    """Compute the weight of the old teacher.

    Args:
        step: 0-based step.
        max_decay: Upper limit of the decay.

    Returns:
        The weight: 0 at the first step, so that the teacher becomes the student, then rising to `max_decay`.
    """
    return min(1.0 - 1.0 / (step + 1), max_decay)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, step: int, max_decay: float = 0.999) -> None:
    """Move the teacher towards the student, in place, after the student's optimizer step.

    Buffers (batch-norm statistics) are copied, and so are parameters that are not trained: the average of -0 and -0 is +0, and a frozen
    encoder must keep every bit of its fingerprint. Tensors that both modules share are left alone.
    Source: Tarvainen and Valpola 2017; ramp and decay of 3DIoUMatch (`pv_rcnn_ssl.py`).

    Args:
        teacher: The module to change.
        student: A module of the same names and shapes.
        step: 0-based step.
        max_decay: Upper limit of the decay.

    Raises:
        InvalidInput: Names or shapes differ.
    """
    weight = 1.0 - ema_decay(step, max_decay)
    parameters = _pairs(dict(teacher.named_parameters()), dict(student.named_parameters()), "parameters")
    statistics = _pairs(dict(teacher.named_buffers()), dict(student.named_buffers()), "buffers")
    trained = [pair for pair in parameters if pair[1].requires_grad]
    if trained:
        torch._foreach_lerp_([old for old, _ in trained], [new for _, new in trained], weight)
    for old, new in statistics + [pair for pair in parameters if not pair[1].requires_grad]:
        old.copy_(new)


def _pairs(teacher: dict[str, Tensor], student: dict[str, Tensor], what: str) -> list[tuple[Tensor, Tensor]]:
    """(teacher, student) tensors by name, without tensors that both share."""
    if teacher.keys() != student.keys():
        raise InvalidInput(
            f"teacher and student have different {what}: only the teacher has {sorted(teacher.keys() - student.keys())}, "
            f"only the student has {sorted(student.keys() - teacher.keys())}; make the teacher with make_teacher(student)"
        )
    for name, old in teacher.items():
        if old.shape != student[name].shape:
            raise InvalidInput(f"{name!r} is {tuple(old.shape)} in the teacher and {tuple(student[name].shape)} in the student")
    return [(old, student[name]) for name, old in teacher.items() if old is not student[name]]
