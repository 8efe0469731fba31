"""Attack (d): compute single LiDAR points from the features of PV-RCNN's raw-point balls.

    features of a ball ─ a known perceptron of (dx, dy, dz, intensity), maximum over the points ─ least squares ─ the points
                                                                                               └─ residual: is the answer right?

The 16 numbers of a ball that holds one or two points are more than the points' coordinates, so a solver finds them. It needs the
upload and the encoder's weights, which the server and every vehicle have, and no training. `train` only chooses how large a residual
may be, on frames of the attacker.

Read next: `lone_voxels.py`, the same question to the features of voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput
from ....core.features import CutFeatures, Keypoints
from ....core.tensor_value import TensorValue
from ...models.encoders.pv_rcnn import PvRcnnEncoder
from ..exact_points import EXACT
from ..frames import AuditFrame, Rebuilt
from .point_solver import SURE, Model, rounding, solve


@dataclass(frozen=True, kw_only=True, repr=False)
class SolvedPoints(TensorValue):
    """Points that an attack computed from one upload, right ones and wrong ones."""

    xyz: Tensor
    """(N, 3) float32 x, y, z in meters, in the shifted frame."""

    point_features: Tensor
    """(N, F) float32 point features, such as the intensity."""

    residual: Tensor
    """(N,) float32 error per spare equation in units of the codec's rounding, infinite where none can check the answer. A right answer
    has about 1."""

    error: Tensor
    """(N,) float32 standard error of the position in meters, from the equations alone; infinite where they do not fix it."""

    source: Tensor
    """(N,) int64 row of the keypoint or of the cell that the answer belongs to."""

    size: Tensor
    """(N,) int64 points that the answer takes the source for: 1 or 2. An answer of 2 has two rows."""

    def accepted(self, thresholds: tuple[float, float]) -> SolvedPoints:
        """Keep the answers that look right.

        Args:
            thresholds: Largest residual of an answer of one point, and of two points.

        Returns:
            The answers with at most this residual whose equations fix the position.
        """
        limit = self.residual.new_tensor(thresholds)[self.size - 1]
        return self.select((self.residual <= limit) & (self.error <= SURE) & self.residual.isfinite())

    def select(self, mask_or_index: Tensor) -> SolvedPoints:
        """Select answers.

        Args:
            mask_or_index: (N,) bool, or int64 rows in the wanted order.

        Returns:
            The answers selected.
        """
        names = ("xyz", "point_features", "residual", "error", "source", "size")
        return SolvedPoints(**{name: getattr(self, name)[mask_or_index] for name in names})

    @staticmethod
    def concatenate(parts: Sequence[SolvedPoints]) -> SolvedPoints:
        """Join answers.

        Args:
            parts: At least one value.

        Returns:
            All answers, in order.
        """
        names = ("xyz", "point_features", "residual", "error", "source", "size")
        return SolvedPoints(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What an answer assumes about the nested balls of a keypoint."""

    members: tuple[int, ...]
    """Points in each ball, smallest radius first. The points of a ball are among those of the next."""
    exact: tuple[bool, ...]
    """Whether the ball holds nothing else. A ball with more points only gives a lower limit."""


_SPARE = (1, 6)
"""Equations that an answer of one point and of two points needs besides one per unknown. Two points explain the 16 numbers of one ball in
several ways; answers that two balls confirm are right."""
_MOST = 4.0
"""No threshold lies above this number; the residual of a right answer is about 1."""
_WALL = 0.001
"""Standard deviation in meters of a point that leaves the cell which it must lie in."""
_ONE_POINT = (
    _Contents(members=(1, 1), exact=(True, False)),
    _Contents(members=(1, 1), exact=(True, True)),
)
_TWO_POINTS = (
    _Contents(members=(2, 2), exact=(True, True)),
    _Contents(members=(1, 2), exact=(True, True)),
    _Contents(members=(2, 2), exact=(True, False)),
)


class _Ball:
    """The perceptron of one ball, batch norm folded in, in double precision."""

    def __init__(self, mlp: nn.Sequential) -> None:
        def folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
            weight, batch = cast(nn.Conv2d, conv).weight.detach().flatten(1).double(), cast(nn.BatchNorm2d, norm)
            mean, variance = cast(Tensor, batch.running_mean).double(), cast(Tensor, batch.running_var).double()
            scale = batch.weight.detach().double() * (variance + batch.eps).rsqrt()
            return weight * scale[:, None], batch.bias.detach().double() - mean * scale

        self.first, self.first_shift = folded(mlp[0], mlp[1])
        self.second, self.second_shift = folded(mlp[3], mlp[4])

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Values before the last ReLU (N, P, C) and derivatives (N, P, C, D) at points (N, P, D) about the center."""
        before = points @ self.first.T + self.first_shift
        alive = (before > 0).double()
        values = (before * alive) @ self.second.T + self.second_shift
        return values, self.second @ (alive[..., None] * self.first)


class ExactPoints:
    """Solves for the points in the raw-point balls of PV-RCNN's keypoints.

    Attributes:
        thresholds: Largest residuals of an answer of one point and of two points that counts as right; `train` chooses them.

    Args:
        encoder: The encoder that made the uploads.
        codec: "fp16" or "int8".
        levels: Levels per channel of each defence that rounds; the attacker knows them from the encoder file.
        seed: Draws the starts of the solver.
        starts: Starts per ball and assumption.
        iterations: Steps from each start.
    """

    def __init__(
        self,
        encoder: PvRcnnEncoder,
        codec: str,
        *,
        levels: Sequence[int] = (),
        seed: int = 0,
        starts: tuple[int, int] = (8, 8),
        iterations: int = 21,
    ) -> None:
        self.encoder, self.codec, self.levels = encoder, codec, levels
        self.seed, self.starts, self.iterations = seed, starts, iterations
        self.thresholds = (2.0, 2.0)

    def train(self, frames: Sequence[AuditFrame]) -> None:
        """Choose the largest residual that counts as right: the one at which at least 95 % of the answers are right within 1 cm.

        Args:
            frames: Frames of the attacker.
        """
        self.thresholds = choose_thresholds([(self.solve(frame.upload), frame.scan.xyz) for frame in frames])

    def rebuild(self, upload: CutFeatures) -> Rebuilt:
        """Compute the points that the attack is sure of.

        Args:
            upload: What left a vehicle, a batch of one.

        Returns:
            The points; the score is the residual with a minus sign.
        """
        found = self.solve(upload).accepted(self.thresholds)
        return Rebuilt(xyz=found.xyz, score=-found.residual)

    @torch.no_grad()
    def solve(self, upload: CutFeatures) -> SolvedPoints:
        """Answer for every keypoint: one point, or two points where one does not explain the features.

        Args:
            upload: What left a vehicle, a batch of one.

        Returns:
            The best answer of every keypoint; none where the encoder has no raw-point balls.

        Raises:
            InvalidInput: The upload is not one scene with keypoints.
        """
        keypoints = upload.keypoints
        if keypoints is None or keypoints.batch_size != 1:
            raise InvalidInput("the attack reads one upload with keypoints at a time: use an upload of PV-RCNN")
        features = _raw_ball_features(self.encoder, keypoints)
        if features is None or not len(keypoints.xyz):
            return no_answers(len(self.encoder.config.voxels.point_features))
        one = self._answers(keypoints, features, _ONE_POINT, points=1)
        rest = ~((one.residual <= self.thresholds[0]) & (one.error <= SURE))
        two = self._answers(keypoints, features, _TWO_POINTS, points=2, rows=rest.nonzero()[:, 0])
        return SolvedPoints.concatenate([one.select(~rest), two])

    def _answers(
        self,
        keypoints: Keypoints,
        features: Tensor,
        assumptions: tuple[_Contents, ...],
        *,
        points: int,
        rows: Tensor | None = None,
    ) -> SolvedPoints:
        """The best answer of each keypoint of `rows` over the assumptions; `points` rows per answer."""
        config, abstraction = self.encoder.config.raw_points, self.encoder.raw_abstraction
        assert config is not None  # `_raw_ball_features` has asked
        assert abstraction is not None
        rows = torch.arange(len(features)) if rows is None else rows
        noise = rounding(features, self.codec, self.levels)
        observed, noise = features.double()[rows], noise[rows]
        order = sorted(range(len(config.radii)), key=lambda k: config.radii[k])[:2]
        balls = [_Ball(cast(nn.Sequential, abstraction.mlps[k])) for k in order]
        channels = config.channels[1]
        parts = [(observed[:, k * channels : (k + 1) * channels], noise[:, k * channels : (k + 1) * channels]) for k in order]
        width = 3 + len(self.encoder.config.voxels.point_features)
        stride = self.encoder.config.keypoint_stride
        half_cell = torch.tensor(self.encoder.spec.grid.voxel_size, dtype=torch.float64) * (stride // 2 + 0.5)
        best: tuple[Tensor, ...] | None = None
        for assumed in _fitting(assumptions, len(order)):
            model = _ball_model(balls, parts, assumed, points, half_cell)
            blurred = [(values, noise.clamp_min(0.01)) for values, noise in parts]
            rough = _ball_model(balls, blurred, assumed, points, half_cell)
            start = self._start(len(rows), points, width, config.radii[order[-1]])
            x, rms, error = solve(model, start, iterations=self.iterations, spare=_SPARE[points - 1], rough=rough)
            position = error.view(-1, points, width)[:, :, :3].square().sum(2).sqrt().amax(1)
            wrong = ~_inside(x.view(-1, points, width), assumed, [config.radii[k] for k in order], half_cell)
            rank = rms + 1e3 * (position > SURE) + 1e6 * wrong
            found = (rank, x, torch.where(wrong, torch.inf, rms), position)
            if best is None:
                best = found
            else:
                better = rank < best[0]
                best = tuple(
                    torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(found, best, strict=True)
                )
        assert best is not None
        _, x, rms, position = best
        offsets = x.view(-1, points, width).float()
        xyz = keypoints.xyz[rows][:, None] + offsets[:, :, :3]
        return SolvedPoints(
            xyz=xyz.reshape(-1, 3),
            point_features=offsets[:, :, 3:].reshape(len(rows) * points, width - 3),
            residual=rms.float().repeat_interleave(points),
            error=position.float().repeat_interleave(points),
            source=rows.repeat_interleave(points),
            size=torch.full((len(rows) * points,), points),
        )

    def _start(self, problems: int, points: int, width: int, radius: float) -> Tensor:
        """(S, N, points * width) starts: the first point near the center, where the keypoint's own voxel is, others anywhere."""
        generator = torch.Generator().manual_seed(self.seed)
        starts = self.starts[points - 1]
        shape = (starts, problems, points, width)
        start = torch.rand(shape, generator=generator, dtype=torch.float64)
        start[..., :3] = (start[..., :3] * 2 - 1) * radius * 0.6
        start[: starts * 3 // 4, :, 0, :3] *= 0.15
        return start.view(starts, problems, points * width)


def _fitting(assumptions: tuple[_Contents, ...], radii: int) -> list[_Contents]:
    """The assumptions for an encoder with one or with two radii."""
    if radii == 2:
        return list(assumptions)
    most = max(a.members[0] for a in assumptions)
    return [_Contents(members=(most,), exact=(True,))]


def _inside(points: Tensor, assumed: _Contents, radii: list[float], half_cell: Tensor) -> Tensor:
    """(N,) whether each point of the answer lies in the balls that should hold it, outside those that should not, and whether the
    occupied voxel that the keypoint stands for holds one."""
    distance = points[:, :, :3].square().sum(2).sqrt()
    fits = (points[:, :, :3].abs() < half_cell + SURE).all(2).any(1)
    for members, radius in zip(assumed.members, radii, strict=True):
        fits &= (distance[:, :members] < radius + SURE).all(1) & (distance[:, members:] > radius - SURE).all(1)
    return fits


def _ball_model(
    balls: list[_Ball], parts: list[tuple[Tensor, Tensor]], assumed: _Contents, points: int, half_cell: Tensor
) -> Model:
    """Residuals of the balls' channels in units of rounding, and their Jacobian. The first point lies in the keypoint's own cell."""

    def model(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        given = x.view(len(x), points, -1)
        width = given.shape[2]
        out = given[:, 0, :3].abs() > half_cell
        outside = (given[:, 0, :3] - given[:, 0, :3].sign() * half_cell) * out / _WALL
        wall = torch.diag_embed(out.double() / _WALL)
        residuals, jacobians = [outside], [nn.functional.pad(wall, (0, x.shape[1] - 3))]
        for ball, (observed, noise), members, exact in zip(balls, parts, assumed.members, assumed.exact, strict=True):
            values, slopes = ball(given[:, :members])
            value, winner = values.max(1)
            slope = slopes.new_zeros(len(x), value.shape[1], points, width)
            index = winner[:, :, None, None].expand(-1, -1, 1, width)
            slope.scatter_(2, index, slopes.transpose(1, 2).gather(2, index))
            target, sigma = observed[rows], noise[rows]
            difference = (value - target) / sigma
            # A channel that is 0 says only that the value before the ReLU is not above 0; so does a ball with more points.
            limit = (target <= 0) if exact else torch.ones_like(target, dtype=torch.bool)
            live = ~limit | (difference > 0)
            residuals.append(difference * live)
            jacobians.append((slope / sigma[:, :, None, None] * live[:, :, None, None]).flatten(2))
        return torch.cat(residuals, 1), torch.cat(jacobians, 1)

    return model


def _raw_ball_features(encoder: PvRcnnEncoder, keypoints: Keypoints) -> Tensor | None:
    """The channels (K, C) of the keypoints that come from raw-point balls; None where there are none."""
    config = encoder.config.raw_points
    if config is None:
        return None
    return keypoints.features[:, slice(*encoder.upload_channels()["raw_points"])]


def no_answers(point_features: int) -> SolvedPoints:
    """Make an empty answer.

    Args:
        point_features: Number of point features.

    Returns:
        No points.
    """
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return SolvedPoints(
        xyz=torch.zeros(0, 3),
        point_features=torch.zeros(0, point_features),
        residual=nothing,
        error=nothing,
        source=none,
        size=none,
    )


def distance_to_nearest(points: Tensor, others: Tensor) -> Tensor:
    """Measure how far points lie from the nearest of other points.

    Args:
        points: (N, 3) in meters.
        others: (M, 3) in meters.

    Returns:
        (N,) float32 distances in meters, infinite where there is no other point.
    """
    if not len(others):
        return torch.full((len(points),), torch.inf)
    parts = [torch.cdist(part.double(), others.double()).amin(1) for part in points.split(512)]
    return torch.cat(parts).float() if parts else torch.zeros(0)


def choose_thresholds(solved: Sequence[tuple[SolvedPoints, Tensor]], *, precision: float = 0.95) -> tuple[float, float]:
    """Choose the largest residuals of answers that count as right.

    Args:
        solved: Answers of each frame, and the true points (N, 3) of its scan.
        precision: Share of the accepted answers that must lie within 1 cm of a true point.

    Returns:
        For answers of one point and of two points, the largest residual whose answers reach the share; 0 where none does.
    """
    found = []
    for size in (1, 2):
        answers = [(part.select(part.size == size).accepted((torch.inf, torch.inf)), truth) for part, truth in solved]
        residual = torch.cat([torch.zeros(0), *(part.residual for part, _ in answers)])
        right = torch.cat([torch.zeros(0), *((distance_to_nearest(part.xyz, truth) <= EXACT).float() for part, truth in answers)])
        values, order = residual.sort()
        share = right[order].cumsum(0) / torch.arange(1, len(values) + 1)
        good = ((share >= precision) & (values <= _MOST)).nonzero()
        found.append(float(values[good[-1, 0]]) if len(good) else 0.0)
    return found[0], found[1]
