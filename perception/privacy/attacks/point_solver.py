"""Damped least squares on many small problems at a time, and what a codec's rounding allows for.

`exact_points.py` and `lone_voxels.py` ask: which point makes these numbers? Each question has a few unknowns and some tens of
equations. Levenberg and Marquardt's method answers thousands of them together; every problem keeps its own damping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes unknowns (N, U) and the numbers (N,) of the problems that they belong to. Gives the residuals (N, R) and the Jacobian (N, R, U)."""

HOPELESS = 200.0
"""Sum of squares of the rough equations above which a problem is given up: no start has come near an answer."""
SURE = 0.005
"""Standard error in meters below which a solution counts as fixed by its equations."""


def solve(
    model: Model, start: Tensor, *, iterations: int, spare: int = 1, kept: int = 3, rough: Model | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimize the squared residuals of many problems from many starts, and keep the best start of each problem.

    Args:
        model: residuals and Jacobian.
        start: (S, N, U) float64, S starts of N problems.
        iterations: steps; after a third of them, only the best starts go on.
        spare: equations that an answer needs besides one per unknown. With fewer, something always fits.
        kept: starts per problem that go on.
        rough: the same equations with larger errors, for the first third; exact equations hold a solver fast in wrong corners.

    Returns:
        (N, U) best unknowns; (N,) their residuals: the root of the sum of squares per spare equation, infinite where there are fewer
        than `spare`; (N, U) standard errors of the unknowns if an equation's error has
        standard deviation 1, infinite where the equations do not fix them.
    """
    starts, problems, unknowns = start.shape
    if not problems:
        return start[0], start.new_zeros(0), start[0]
    first = iterations // 3
    x, cost = _descend(model if rough is None else rough, start, first)
    best = cost.topk(min(kept, starts), dim=0, largest=False)
    x = x.gather(0, best.indices[:, :, None].expand(-1, -1, unknowns))
    answer = x[0].clone()
    going = (best.values[0] <= (torch.inf if rough is None else HOPELESS)).nonzero()[:, 0]
    if len(going):
        x, cost = _descend(lambda u, rows: model(u, going[rows]), x[:, going], iterations - first)
        answer[going] = x[cost.argmin(0), torch.arange(len(going), device=x.device)]
    x, rows = answer, torch.arange(problems, device=x.device)
    residual, jacobian = model(x, rows)
    left = (jacobian != 0).any(2).sum(1) - unknowns
    rms = (residual.square().sum(1) / left.clamp_min(1)).sqrt()
    return x, torch.where(left >= spare, rms, torch.inf), standard_errors(jacobian)


def _descend(model: Model, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Unknowns (S, N, U) after Levenberg and Marquardt's steps, and their sums of squares (S, N)."""
    x = start.reshape(-1, start.shape[2]).clone()
    rows = torch.arange(start.shape[1], device=x.device).repeat(len(start))
    damping = x.new_full((len(x),), 1e-2)
    residual, jacobian = model(x, rows)
    cost = residual.square().sum(1)
    for _ in range(iterations):
        normal = jacobian.mT @ jacobian
        diagonal = normal.diagonal(dim1=1, dim2=2)
        lift = damping[:, None] * (diagonal + 1e-9 * diagonal.amax(1, keepdim=True) + 1e-12)
        step = torch.linalg.solve_ex(normal + torch.diag_embed(lift), jacobian.mT @ residual[..., None])[0][..., 0]
        tried = x - step.nan_to_num(0.0, 0.0, 0.0)
        tried_residual, tried_jacobian = model(tried, rows)
        tried_cost = tried_residual.square().sum(1)
        better = tried_cost < cost
        x = torch.where(better[:, None], tried, x)
        residual = torch.where(better[:, None], tried_residual, residual)
        jacobian = torch.where(better[:, None, None], tried_jacobian, jacobian)
        cost = torch.where(better, tried_cost, cost)
        damping = torch.where(better, damping * 0.2, damping * 5).clamp(1e-9, 1e9)
    return x.view(start.shape), cost.view(start.shape[:2])


def standard_errors(jacobian: Tensor) -> Tensor:
    """Compute how well equations fix their unknowns.

    Args:
        jacobian: (N, R, U) derivatives of residuals whose standard deviation is 1.

    Returns:
        (N, U) standard errors of the unknowns.
    """
    values, vectors = torch.linalg.eigh(jacobian.mT @ jacobian)
    weak = values <= 1e-12 * values[:, -1:].clamp_min(1e-30)
    inverse = torch.where(weak, torch.inf, 1 / values.clamp_min(1e-300))
    parts = torch.where(vectors.square() > 1e-12, vectors.square() * inverse[:, None, :], 0)
    return parts.nan_to_num(0.0, posinf=torch.inf).sum(2).sqrt()


def rounding(features: Tensor, codec: str, levels: Sequence[int] = ()) -> Tensor:
    """Estimate the error that a codec, and defences that round, left in the features of a scene.

    Args:
        features: (M, C) features of one scene after the codec's round trip.
        codec: "fp16" or "int8".
        levels: Levels per channel of each defence that rounds (`RoundingConfig.levels`).

    Returns:
        (M, C) float64 standard deviations.
    """
    wide = features.double()
    # Half precision keeps 11 binary digits. The encoder itself computes with 24, on coordinates of tens of meters.
    error = (wide.abs() * 2.0**-11 / 3**0.5).clamp_min(1e-5)
    if not len(wide):
        return error
    span = wide.amax(0) - wide.amin(0)
    if codec == "int8":
        error = (span / 255 / 12**0.5).clamp_min(1e-6).expand_as(wide)
    for number in levels:
        error = torch.hypot(error, span / (number - 1) / 12**0.5)
    return error
