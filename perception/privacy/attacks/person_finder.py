"""A small network that finds people on a BEV map, trained on frames of an attacker's own.

It is as good on the map of an upload, whose cells are 0.8 m wide, as on the map of a scan, because it answers in cells of about 0.4 m with
an offset. Read next: `people.py`, which scores it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scene_views import SceneView

FOUND_WITHIN = 0.5
"""Meters in BEV within which an answer is right."""
WIDTH = 32
HEAT = 0.3
"""Standard deviation in meters of the mark of one person."""
MOST_PER_FRAME = 60
CROP = 12.8
"""Side in meters of the parts of a map that the finder trains on; half of them hold a person."""
CROPS = 8
ANSWER_CELL = 0.45
"""The network answers in cells of at most this size in meters."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """One frame for the finder."""

    view: SceneView
    """What is seen."""

    people: Tensor
    """(P, 7) boxes of the people to find."""

    ignored: Tensor
    """(Q, 2) x, y of people that are too thin to count."""


class PersonFinder(nn.Module):
    """Marks people on a BEV map: one score and one offset for each answer cell."""

    def __init__(self, channels: int, cell: tuple[float, float], generator: torch.Generator) -> None:
        """Make the layers.

        Args:
            channels: Channels of the map; 2 more are added, which say where a cell lies.
            cell: x, y size of a cell of the map in meters.
            generator: Where fresh weights are drawn from.
        """
        super().__init__()
        self.up = max(1, math.ceil(max(cell) / ANSWER_CELL - 1e-6))
        self.down = max(1, int(ANSWER_CELL / max(cell) + 1e-6)) if self.up == 1 else 1
        self.mix = nn.Conv2d(channels + 2, WIDTH, 1)
        self.look = nn.Sequential(
            nn.ReLU(), *(layer for _ in range(3) for layer in (nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()))
        )
        self.scale = (
            nn.ConvTranspose2d(WIDTH, WIDTH, self.up, self.up) if self.up > 1 else nn.Conv2d(WIDTH, WIDTH, self.down, self.down)
        )
        self.say = nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, 3, 1))
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    fan = layer.in_channels * layer.kernel_size[0] ** (2 if isinstance(layer, nn.Conv2d) else 0)
                    layer.weight.normal_(0, (2 / fan) ** 0.5, generator=generator)
                    if layer.bias is not None:
                        layer.bias.zero_()
            last = self.say[-1]
            assert isinstance(last, nn.Conv2d)
            assert last.bias is not None
            last.weight.mul_(0.1)
            last.bias[0] = -4.0

    def forward(self, maps: Tensor) -> Tensor:
        """Mark people.

        Args:
            maps: (B, channels + 2, Y, X) standardized maps.

        Returns:
            (B, 3, Y', X') logit, and offset x, y in meters from the center of the answer cell.
        """
        mixed = self.mix(maps)
        # What has fine cells is made coarse first, what has coarse cells is looked at first: both cost the same.
        found: Tensor = self.say(self.scale(self.look(mixed)) if self.up > 1 else self.look(self.scale(mixed)))
        return found

    def centers(self, view: SceneView, shape: tuple[int, int]) -> Tensor:
        """Find the centers of the answer cells.

        Args:
            view: A scene with the finder's cell size.
            shape: Rows and columns of the answer.

        Returns:
            (2, Y', X') x, y in meters.
        """
        step = [c / self.up if self.up > 1 else c * self.down for c in view.cell]
        start = [o - c / 2 + s / 2 for o, c, s in zip(view.origin, view.cell, step)]
        y, x = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
        return torch.stack([start[0] + x * step[0], start[1] + y * step[1]])


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Where people are said to stand in one frame."""

    xy: Tensor
    """(A, 2) x, y in meters."""

    score: Tensor
    """(A,) how sure each answer is, 0 to 1."""


def train_finder(known: Sequence[Sight], generator: torch.Generator, steps: int) -> Callable[[Sight], Answers]:
    """Learn where people stand.

    Args:
        known: Frames of the attacker's own, all of one kind of view.
        generator: Draws weights and batches.
        steps: Training steps.

    Returns:
        What finds people in a frame; it does not look at `people`.
    """
    first = known[0].view.with_keypoints()
    maps = torch.stack([_with_place(s.view) for s in known])
    mean, spread = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True).clamp_min(1e-3)
    maps = ((maps - mean) / spread).clamp(-10, 10)
    net = PersonFinder(len(first.bev), first.cell, generator)
    with torch.no_grad():
        shape = net(maps[:1]).shape[2:]
    centers = net.centers(first, (shape[0], shape[1]))
    targets = [_targets(centers, s) for s in known]
    start = torch.tensor(first.origin)
    standing = [(i, *((p[:2] - start) / torch.tensor(first.cell)).tolist()) for i, s in enumerate(known) for p in s.people]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        crops = [_crop(net, maps, targets, standing, first.cell, generator, there=k % 2 == 0) for k in range(CROPS)]
        seen, heat, offset, weight = (torch.stack([crop[k] for crop in crops]) for k in range(4))
        loss = _finder_loss(net(seen), heat, offset, weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)

    def find(sight: Sight) -> Answers:
        out = net(((_with_place(sight.view)[None] - mean) / spread).clamp(-10, 10))[0]
        heat = out[0].sigmoid()
        peak = heat == F.max_pool2d(heat[None], 3, 1, 1)[0]
        score, row = torch.where(peak, heat, 0.0).flatten().topk(min(MOST_PER_FRAME, heat.numel()))
        xy = (centers + out[1:]).flatten(1).T[row]
        apart = torch.cdist(xy, xy) < FOUND_WITHIN
        keep = ~(torch.tril(apart, -1).any(1))  # a weaker answer beside a stronger one
        return Answers(xy=xy[keep], score=score[keep])

    return find


def _crop(
    net: PersonFinder,
    maps: Tensor,
    targets: Sequence[tuple[Tensor, Tensor, Tensor]],
    standing: Sequence[tuple[int, float, float]],
    cell: tuple[float, float],
    generator: torch.Generator,
    *,
    there: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A part of a map with its targets; `there` asks for one that holds a person. `standing` has map, column and row of every person."""
    drawn = torch.rand(4, generator=generator).tolist()
    rows, columns = maps.shape[2:]
    if there and standing:
        i, column, row = standing[int(drawn[0] * len(standing))]
    else:
        i, column, row = int(drawn[0] * len(maps)), drawn[3] * columns, drawn[1] * rows
    size = [min(round(CROP / c) // net.down * net.down, n // net.down * net.down) for c, n in zip(cell, (columns, rows))]
    begin = []
    for center, side, whole, chance in zip((column, row), size, (columns, rows), drawn[1:3]):
        first = round(center - (0.1 + 0.8 * chance) * side) // net.down * net.down
        begin.append(max(0, min(first, (whole - side) // net.down * net.down)))
    x, y = (slice(b, b + side) for b, side in zip(begin, size))
    answer = [slice(s.start * net.up // net.down, s.stop * net.up // net.down) for s in (y, x)]
    heat, offset, weight = (t[:, answer[0], answer[1]] for t in targets[i])
    return maps[i][:, y, x], heat, offset, weight


def _with_place(view: SceneView) -> Tensor:
    """(C + 2, Y, X) map with the place of every cell."""
    view = view.with_keypoints()
    rows, columns = view.bev.shape[1:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    return torch.cat([view.bev, x[None], y[None]])


def _targets(centers: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
    """(1, Y, X) heat, (2, Y, X) offset to the nearest person, (1, Y, X) weight, 0 at people that do not count."""
    flat = centers.flatten(1).T
    shape = centers.shape[1:]
    heat, offset, weight = flat.new_zeros(len(flat)), torch.zeros_like(flat), flat.new_ones(len(flat))
    if len(sight.ignored):
        weight[torch.cdist(flat, sight.ignored).amin(1) < 2 * FOUND_WITHIN] = 0.0
    if len(sight.people):
        distance, owner = torch.cdist(flat, sight.people[:, :2]).min(1)
        heat = (-0.5 * (distance / HEAT).square()).exp()
        heat[torch.cdist(sight.people[:, :2], flat).argmin(1)] = 1.0
        offset = sight.people[owner, :2] - flat
        weight[distance < 2 * FOUND_WITHIN] = 1.0
    return heat.view(1, *shape), offset.T.reshape(2, *shape), weight.view(1, *shape)


def _finder_loss(out: Tensor, heat: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """Focal loss of the heat (Law and Deng, CornerNet, 2018) and L1 loss of the offset near people."""
    logit = out[:, :1]
    p, peak = logit.sigmoid(), (heat == 1).float()
    positive = peak * (1 - p).square() * F.logsigmoid(logit)
    negative = (1 - peak) * (1 - heat).pow(4) * p.square() * F.logsigmoid(-logit)
    number = peak.sum().clamp_min(1)
    near = (heat > 0.3).float()
    move = ((out[:, 1:] - offset).abs() * near).sum() / near.sum().clamp_min(1)
    return -((positive + negative) * weight).sum() / number + move
