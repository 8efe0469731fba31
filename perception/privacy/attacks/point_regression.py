"""Attack (b): a network regresses the points of each cell from the features of the cells around it.

This is how feature uploads were first tested, and its failure was taken as a sign that features cannot be turned back. The failure lies in
the first form of the loss: each cell gets the same number of places for points, those that are left over are filled with zeros, and an
order is demanded that points do not have. With another loss the same network is a serious attack. Both forms are here, so that a table
can show the difference; `occupancy.py` is the attack that classifies instead.

The points of a scan are thinned to one per input voxel and belong to the cell in whose box they lie; boxes part the grid among the cells.
Two losses can be chosen:

* `"mse"`: the points of a cell in a fixed order (z, y, x), then zeros, compared place by place. This is the form of the first test, and
  weak: do not take its failure for safety;
* `"chamfer"`: the nearest place for each true point and the nearest true point for each place. There is no order and no padding, and a
  second output learns which places lie within 0.2 m of a true point. It is the stronger of the two and the default.

Keypoints of an upload are not looked at. Read next: `../frames.py` for what an attack gets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ....core.cut import CutSpec, cell_index
from ....core.errors import InvalidInput, require, require_counts
from ....core.features import CutFeatures, SparseVoxels
from ....core.structures import PointCloud
from ....ops.rulebook import Rulebook, submanifold_rulebook
from ....ops.sparse_conv import SubmanifoldConv3d
from ..frames import AuditFrame, Rebuilt, inside_grid

Loss = Literal["chamfer", "mse"]

NEAR = 0.2
"""Meters from a true point within which a place counts as right."""
ABOVE_PADDING = 0.5
"""Places lie in 0.5..1.5 sizes of the cell from the zero of the padding, so that no true point looks like padding."""


@dataclass(frozen=True, kw_only=True)
class PointRegressionConfig:
    """How the attack by point regression is trained."""

    loss: Loss = "chamfer"
    """How guessed and true points of a cell are compared. "mse" is the form of the first test, with zeros for padding."""
    points_per_cell: int = 32
    """Places for points in each cell. Cells with more points are thinned evenly; more places cost time."""
    channels: int = 96
    """Channels of the network."""
    blocks: int = 3
    """Residual blocks of two sparse convolutions; each sees two cells further."""
    steps: int = 400
    """Optimizer steps. More steps make the attack stronger until it has learned its frames by heart."""
    batch: int = 2
    """Frames per step."""
    lr: float = 0.002
    """Highest learning rate. Lower it when the loss becomes NaN."""
    seed: int = 0
    """Decides the first weights and the order of the frames."""

    def __post_init__(self) -> None:
        require_counts(
            "PointRegressionConfig",
            most=10_000_000,
            points_per_cell=self.points_per_cell,
            channels=self.channels,
            blocks=self.blocks,
            steps=self.steps,
            batch=self.batch,
        )
        require(self.loss in ("chamfer", "mse"), f"PointRegressionConfig.loss must be 'chamfer' or 'mse', found {self.loss!r}")
        require(self.lr > 0, f"PointRegressionConfig.lr must be positive, found {self.lr}")


class PointRegressionAttack:
    """The attack; see the top of this file.

    Example:
        ```python
        attack = PointRegressionAttack(PointRegressionConfig(seed=1))
        attack.train(frames_of_the_attacker)
        rebuilt = attack.rebuild(frame.upload)
        ```
    """

    def __init__(self, config: PointRegressionConfig | None = None) -> None:
        """Make an attack that knows nothing.

        Args:
            config: How it is trained.
        """
        self.config = config or PointRegressionConfig()
        self._network: _Network | None = None
        self._knows_nothing = False

    def train(self, frames: Sequence[AuditFrame]) -> None:
        """Learn from frames whose scans the attacker knows. The same frames and the same seed give the same network.

        Where no cell of any of them holds a point, as where a defence sends nothing, there is nothing to learn, and no point is rebuilt.

        Args:
            frames: Frames of the attacker's own, all of one cut.

        Raises:
            InvalidInput: There is no frame.
        """
        require(len(frames) > 0, "point regression needs at least one frame; give the attacker frames of its own")
        config, spec = self.config, frames[0].upload.spec
        examples = [_Example.of(frame.upload, frame.scan, config.points_per_cell) for frame in frames]
        if not any(bool(e.filled.any()) for e in examples):
            self._knows_nothing = True
            return
        self._knows_nothing = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = _Network(spec, config)
        network.fit_scale(torch.cat([e.voxels.features for e in examples]))
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / config.steps))
        for batch in itertools.islice(_batches(examples, config), config.steps):
            optimizer.zero_grad()
            loss = _loss(network, batch, config.loss)
            if loss.requires_grad:
                loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        self._network = network.eval()

    @torch.no_grad()
    def rebuild(self, upload: CutFeatures) -> Rebuilt:
        """Rebuild a scan.

        Args:
            upload: What left a vehicle, a batch of one, of the cut that the attack was trained for.

        Returns:
            The places of all cells that lie inside the grid, the surest one of every input voxel: with the probability that a true point is
            near ("chamfer"), or with how far they are from padding, 0 to 1 ("mse", where places nearer to padding than to the cell are left
            out).

        Raises:
            InvalidInput: The attack was not trained, or was trained for another cut.
        """
        network = self._network
        if self._knows_nothing:
            return Rebuilt(xyz=torch.zeros(0, 3), score=torch.zeros(0))
        if network is None:
            raise InvalidInput("the attack by point regression was not trained; call `train` with frames of the attacker first")
        require(
            upload.spec == network.spec, "this upload has another cut than the attack was trained for; train it on such uploads"
        )
        places, logit = network(upload.voxels)
        boxes = cell_boxes(upload.voxels.coords, upload.spec)
        xyz = (boxes.low[:, None] + (places - ABOVE_PADDING) * boxes.size[:, None]).flatten(0, 1)
        if self.config.loss == "chamfer":
            score = logit.sigmoid().flatten()
            keep = torch.ones_like(score, dtype=torch.bool)
        else:
            score = (places.amin(2) / ABOVE_PADDING).clamp(0, 1).flatten()
            keep = score > 0.5
        low, high = (xyz.new_tensor(side) for side in (upload.spec.grid.range[:3], upload.spec.grid.range[3:]))
        keep &= ((xyz >= low) & (xyz < high)).all(1)
        xyz, score = xyz[keep], score[keep]
        order = score.argsort(
            descending=True, stable=True
        )  # cells with few points repeat them, so each voxel keeps the surest place
        kept = order[_first_of_each_voxel(xyz[order], upload.spec)]
        return Rebuilt(xyz=xyz[kept], score=score[kept])


@dataclass(frozen=True, kw_only=True)
class CellBoxes:
    """The part of the grid that belongs to each cell."""

    low: Tensor
    """(M, 3) x, y, z of the lowest corner in meters."""
    size: Tensor
    """(M, 3) size along x, y, z in meters."""


def cell_boxes(coords: Tensor, spec: CutSpec) -> CellBoxes:
    """Find the box of each cell. Around a cell's center it is one stride wide along x and y; along z the cells part the grid evenly.

    Args:
        coords: (M, 4) batch, z, y, x of the cells.
        spec: The cut.

    Returns:
        The boxes. Together the boxes of all cells cover the grid, but for less than half a stride at its far sides.
    """
    cells = coords[:, 1:].flip(1).float()  # x, y, z
    width, depth = spec.cell_size()
    height = (spec.grid.range[5] - spec.grid.range[2]) / spec.shape[0]
    size = cells.new_tensor([width, depth, height])
    x, y = spec.position(cells[:, 1], cells[:, 0])
    low = torch.stack([x - width / 2, y - depth / 2, spec.grid.range[2] + cells[:, 2] * height], 1)
    return CellBoxes(low=low, size=size.expand_as(low))


def points_of_cells(xyz: Tensor, coords: Tensor, spec: CutSpec) -> Tensor:
    """Find the cell that each point belongs to.

    Args:
        xyz: (N, 3) points inside the grid.
        coords: (M, 4) batch, z, y, x of the cells of one scene.
        spec: The cut.

    Returns:
        (N,) int64 row of `coords`, -1 for points whose cell is not there.
    """
    rows = xyz.new_full((len(xyz),), -1, dtype=torch.int64)
    if not len(coords) or not len(xyz):
        return rows
    width, depth = spec.cell_size()
    x, y = spec.position(0.0, 0.0)
    start = xyz.new_tensor([x - width / 2, y - depth / 2, spec.grid.range[2]])
    size = xyz.new_tensor([width, depth, (spec.grid.range[5] - spec.grid.range[2]) / spec.shape[0]])
    cells = ((xyz - start) / size).floor().long().flip(1)
    inside = ((cells >= 0) & (cells < cells.new_tensor(spec.shape))).all(1)
    keys, order = cell_index(coords[:, 1:], spec.shape).sort()
    wanted = cell_index(cells[inside], spec.shape)
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    rows[inside] = torch.where(keys[at] == wanted, order[at], -1)
    return rows


@dataclass(frozen=True)
class _Example:
    """Some uploads and where the points of their cells lie."""

    voxels: SparseVoxels
    places: Tensor
    """(M, K, 3) places of the points in their cells, from 0.5 to 1.5, in the order z, y, x; zeros after the last."""
    filled: Tensor
    """(M, K) bool, which places hold a point."""
    size: Tensor
    """(M, 3) meters of a cell along x, y, z."""

    @staticmethod
    def of(upload: CutFeatures, scan: PointCloud, points_per_cell: int) -> _Example:
        spec, coords = upload.spec, upload.voxels.coords
        xyz = inside_grid(scan, spec.grid).xyz
        xyz = xyz[_first_of_each_voxel(xyz, spec)]
        rows = points_of_cells(xyz, coords, spec)
        xyz, rows = xyz[rows >= 0], rows[rows >= 0]
        order = rows.argsort(stable=True)  # the points come in the order z, y, x
        xyz, rows = xyz[order], rows[order]
        count = torch.bincount(rows, minlength=len(coords))
        number = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
        slot = number  # a cell with too many points keeps an even choice: the first point of each of K equal parts
        crowded = count[rows] > points_per_cell
        part = number * points_per_cell // count[rows].clamp(min=1)
        first = torch.cat([part.new_ones(1, dtype=torch.bool), (part[1:] != part[:-1]) | (rows[1:] != rows[:-1])])[: len(rows)]
        slot = torch.where(crowded, part, slot)
        keep = ~crowded | first
        boxes = cell_boxes(coords, spec)
        places = torch.zeros(len(coords), points_per_cell, 3)
        filled = torch.zeros(len(coords), points_per_cell, dtype=torch.bool)
        rows, slot = rows[keep], slot[keep]
        places[rows, slot] = (xyz[keep] - boxes.low[rows]) / boxes.size[rows] + ABOVE_PADDING
        filled[rows, slot] = True
        return _Example(upload.voxels, places, filled, boxes.size)

    @staticmethod
    def collate(parts: Sequence[_Example]) -> _Example:
        voxels = SparseVoxels.collate([p.voxels for p in parts])
        places, filled, size = (torch.cat([getattr(p, name) for p in parts]) for name in ("places", "filled", "size"))
        return _Example(voxels, places, filled, size)


class _Network(nn.Module):
    """Features of cells to places of points: residual blocks of sparse convolutions, then one layer per cell."""

    mean: Tensor
    spread: Tensor

    def __init__(self, spec: CutSpec, config: PointRegressionConfig) -> None:
        super().__init__()
        self.spec, self.points = spec, config.points_per_cell
        self.register_buffer("mean", torch.zeros(spec.channels))
        self.register_buffer("spread", torch.ones(spec.channels))
        self.first = nn.Linear(spec.channels + 4, config.channels)
        self.blocks = nn.ModuleList(_Block(config.channels) for _ in range(config.blocks))
        self.hidden = nn.Sequential(nn.LayerNorm(config.channels), nn.Linear(config.channels, 2 * config.channels), nn.ReLU())
        self.last = nn.Linear(2 * config.channels, 4 * self.points)
        with torch.no_grad():  # the first guess spreads the places over the cell
            self.last.weight.mul_(0.1)
            self.last.bias.view(self.points, 4)[:, :3] = torch.rand(self.points, 3) + ABOVE_PADDING

    def fit_scale(self, features: Tensor) -> None:
        """Learn mean and spread of every channel, so that the scale of the encoder does not matter."""
        if len(features) > 1:
            self.mean, self.spread = features.mean(0), features.std(0).clamp(min=1e-3)

    def forward(self, voxels: SparseVoxels) -> tuple[Tensor, Tensor]:
        """(M, K, 3) places and (M, K) logits of being right."""
        boxes = cell_boxes(voxels.coords, self.spec)
        center, far = boxes.low + boxes.size / 2, max(map(abs, self.spec.grid.range))
        position = torch.cat([center / far, center[:, :2].norm(dim=1, keepdim=True) / far], 1)
        x = self.first(torch.cat([(voxels.features - self.mean) / self.spread, position], 1))
        same = submanifold_rulebook(voxels.coords, voxels.shape, voxels.batch_size, (3, 3, 3))
        for block in self.blocks:
            x = block(x, same)
        out = self.last(self.hidden(x)).view(len(x), self.points, 4)
        return out[..., :3], out[..., 3]


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.convs = nn.ModuleList(SubmanifoldConv3d(channels, channels) for _ in range(2))

    def forward(self, x: Tensor, same: Rulebook) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(nn.functional.relu(norm(y)), same)
        return x + y


def _loss(network: _Network, batch: _Example, kind: Loss) -> Tensor:
    places, logit = network(batch.voxels)
    if kind == "mse":
        return ((places - batch.places) ** 2).sum(2).mean() if len(places) else places.sum()
    held = batch.filled.any(1)
    right = torch.zeros_like(logit)
    if not bool(held.any()):
        return nn.functional.binary_cross_entropy_with_logits(logit, right, reduction="sum") / max(1, logit.numel())
    guess, true, size = places[held], batch.places[held], batch.size[held][:, None]
    table = torch.cdist(guess * size, true * size)  # (held, K guessed, K true) meters
    table = table.masked_fill(~batch.filled[held][:, None], math.inf)
    to_true, to_guess = table.amin(2), table.amin(1)[batch.filled[held]]
    right[held] = (to_true.detach() < NEAR).float()
    surely = nn.functional.binary_cross_entropy_with_logits(logit, right)
    return to_true.mean() + to_guess.mean() + 0.2 * surely


def _rate(progress: float) -> float:
    """Share of the highest learning rate: up along a line for the first tenth of the training, then down along a cosine."""
    return 0.1 + 9 * progress if progress < 0.1 else 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - 0.1) / 0.9))


def _first_of_each_voxel(xyz: Tensor, spec: CutSpec) -> Tensor:
    """Rows of the first point of every occupied voxel of the input grid, in the order z, y, x of the voxels."""
    start, size = xyz.new_tensor(spec.grid.range[:3]), xyz.new_tensor(spec.grid.voxel_size)
    cells = ((xyz - start) / size).floor().long().flip(1).clamp(min=0)
    number = cell_index(torch.minimum(cells, cells.new_tensor(spec.grid.shape) - 1), spec.grid.shape)
    number, order = number.sort(stable=True)
    return order[torch.cat([number.new_ones(1, dtype=torch.bool), number[1:] != number[:-1]])[: len(number)]]


def _batches(examples: Sequence[_Example], config: PointRegressionConfig) -> Iterator[_Example]:
    """Batches without end; every frame comes once before any comes again."""
    generator = torch.Generator().manual_seed(config.seed)
    rows: list[int] = []
    while True:
        while len(rows) < config.batch:
            rows += torch.randperm(len(examples), generator=generator).tolist()
        yield _Example.collate([examples[row] for row in rows[: config.batch]])
        rows = rows[config.batch :]
