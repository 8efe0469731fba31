"""Which uploads belong together: the frames before and after, one drive, one place. From features alone, without names or order.

Two maps of each upload are compared. On the fine map a cell meets the same cell of the other upload, which finds scenes that are a
meter apart. On the second map one upload is turned and pushed over the other, and the best of all turns and shifts counts, which finds
scenes of a vehicle that moved on. Both maps hold whitened features and which cells are occupied. The attack learns nothing from
frames with known scans: all it needs is the pile of uploads. Whoever has the encoder can put scans of a known place into the pile.

Read next: `../linkage_metrics.py`, which scores the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csgraph
from torch import Tensor

from ....core.cut import CutSpec, cell_index
from ....core.errors import require
from ....core.features import CutFeatures
from ..linkage_metrics import LinkageScores, ordered_drives, score_linkage

_BLOCK_BYTES = 1 << 28  # memory of one block of correlations
_FLOOR = 1e-6  # distance of two equal scenes: a graph takes 0 for "no edge"


@dataclass(frozen=True, kw_only=True)
class LinkageConfig:
    """How thoroughly two uploads are compared."""

    channels: int = 16
    """Principal directions of the features that are compared, at most; the rest is mostly noise."""

    coarse_cell: float = 0.8
    """Side in meters of a cell of the second map. Larger ones cost less time and find less."""

    reach: float = 40.0
    """Farthest shift ahead and back in meters. A vehicle that moved farther between two uploads is compared only up to it."""

    sideways: float = 4.0
    """Farthest shift to a side in meters."""

    turns: tuple[float, ...] = (-4.0, 0.0, 4.0)
    """Turns in degrees that are tried. More of them find scenes of a curve."""

    def __post_init__(self) -> None:
        require(
            self.channels >= 1 and self.coarse_cell > 0 and self.reach >= 0 and self.sideways >= 0 and len(self.turns) > 0,
            f"LinkageConfig needs a channel, a cell size, shifts of 0 or more and a turn, found {self}",
        )


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike the uploads of two piles are; in both matrices higher means more alike."""

    fine: Tensor
    """(Q, N) mean cosine of features and of occupancy, cell by cell. 0 for an upload without a cell."""

    aligned: Tensor
    """(Q, N) the same on the coarse map, at the best turn and shift."""

    @property
    def score(self) -> Tensor:
        """(Q, N) the mean of both: best for scenes a few meters apart. `aligned` alone is better from about 10 m on, so an audit reports the
        best of the three."""
        return (self.fine + self.aligned) / 2


def pile_likeness(uploads: Sequence[CutFeatures], config: LinkageConfig = LinkageConfig()) -> Likeness:
    """Compare every upload of a pile with every other.

    Args:
        uploads: Uploads of one cut, each a batch of one, in any order.
        config: How thoroughly.

    Returns:
        Likeness (N, N), symmetric up to rounding.

    Raises:
        InvalidInput: There is no upload, or their cuts differ.
    """
    return cross_likeness(uploads, uploads, config)


def cross_likeness(
    queries: Sequence[CutFeatures], candidates: Sequence[CutFeatures], config: LinkageConfig = LinkageConfig()
) -> Likeness:
    """Compare every upload of one pile with every upload of another, such as scans of known places with what a fleet sent.

    Args:
        queries: Uploads of one cut, each a batch of one. An attacker makes them from scans of his own with the fleet's encoder.
        candidates: Uploads of the same cut.
        config: How thoroughly.

    Returns:
        Likeness (Q, N).

    Raises:
        InvalidInput: A pile is empty, or cuts differ.
    """
    same = queries is candidates
    uploads = [*queries] if same else [*queries, *candidates]
    require(len(queries) > 0 and len(candidates) > 0, "linkage needs uploads to compare, found an empty pile")
    spec = uploads[0].spec
    require(
        all(u.spec == spec and u.batch_size == 1 for u in uploads),
        "linkage compares uploads of one cut, each a batch of one; encode all with one encoder and defence",
    )
    scenes = _Scenes(uploads, spec, config)
    rows = slice(0, len(queries))
    columns = rows if same else slice(len(queries), len(uploads))
    fine = scenes.fine(rows, columns)
    aligned = scenes.aligned(rows, columns)
    if same:  # turns of one side only are tried: keep the better way round
        fine, aligned = (fine + fine.T) / 2, torch.maximum(aligned, aligned.T)
    return Likeness(fine=fine, aligned=aligned)


class _Scenes:
    """The cells of a pile, whitened: what both maps are made of."""

    def __init__(self, uploads: Sequence[CutFeatures], spec: CutSpec, config: LinkageConfig) -> None:
        self.config, self.spec, self.count = config, spec, len(uploads)
        cells = [u.voxels.coords[:, 1:].long() for u in uploads]
        self.owner = torch.repeat_interleave(torch.arange(len(uploads)), torch.tensor([len(c) for c in cells]))
        self.cells = torch.cat(cells)
        features = torch.cat([u.voxels.features.float() for u in uploads])
        self.values = _whiten(features.nan_to_num(0.0, 0.0, 0.0), config.channels)

    def fine(self, rows: slice, columns: slice) -> Tensor:
        """(Q, N) likeness cell by cell; one dense map of one channel is in memory at a time."""
        used, place = cell_index(self.cells, self.spec.shape).unique(return_inverse=True)
        position = self.owner * len(used) + place
        size = self.count * len(used)
        occupied = self._without_mean(_scattered(position, torch.ones(len(position)), size).view(self.count, -1).T).T
        products = torch.zeros(self.count, self.count)[rows, columns]
        energy = torch.zeros(self.count)
        for channel in self.values.T:
            block = self._without_mean(_scattered(position, channel, size).view(self.count, -1).T).T
            products += block[rows] @ block[columns].T
            energy += block.square().sum(1)
        features = products * _inverse(energy[rows])[:, None] * _inverse(energy[columns])
        energy = occupied.square().sum(1)
        shape = (occupied[rows] @ occupied[columns].T) * _inverse(energy[rows])[:, None] * _inverse(energy[columns])
        return (features + shape) / 2

    def aligned(self, rows: slice, columns: slice) -> Tensor:
        """(Q, N) highest correlation of the coarse maps over all turns and shifts, by a Fourier transform of the shifts.

        What all scenes share, such as the road ahead, is subtracted, and fine structure counts as much as coarse: the correlation of two
        views of one place has a sharp peak then, and that of two streets has none.
        """
        c = self.config
        height, width = (math.ceil(side / c.coarse_cell) + 1 for side in self._extent())
        down, along = (math.floor(reach / c.coarse_cell) for reach in (c.sideways, c.reach))
        shape = (_fast(height + down), _fast(width + along))
        sides, ways = _shifts(down, shape[0]), _shifts(along, shape[1])
        pile = self._spectrum(0.0, shape)
        power = pile.abs().square().mean((1, 2))
        weight = (power + 0.05 * power.mean() + 1e-12).rsqrt()[:, None, None]
        right = _of_norm_1(weight * self._without_mean(pile), shape)[:, :, columns].contiguous()
        best = torch.full((rows.stop - rows.start, columns.stop - columns.start), -1.0)
        step = max(1, _BLOCK_BYTES // (right.shape[0] * right.shape[2] * 16))
        for turn in c.turns:
            turned = self._spectrum(math.radians(turn), shape)
            left = _of_norm_1(weight * self._without_mean(turned), shape)[:, :, rows].conj().transpose(1, 2)  # (F, Q, C)
            for first in range(0, len(best), step):
                cross = torch.bmm(left[:, first : first + step], right).permute(1, 2, 0)  # (q, N, F)
                maps = torch.fft.irfft2(cross.reshape(*cross.shape[:2], shape[0], -1), s=shape)
                found = maps[:, :, sides][..., ways].amax((2, 3))
                best[first : first + step] = torch.maximum(best[first : first + step], found)
        return best.clamp_min(0.0)

    def _without_mean(self, maps: Tensor) -> Tensor:
        """Subtract what the scenes (..., N) have in common; of few scenes little can be told to be common. Empty scenes stay empty."""
        filled = torch.bincount(self.owner, minlength=self.count) > 0
        count = int(filled.sum())
        return (maps - maps.sum(-1, keepdim=True) / (count + 10)) * filled

    def _extent(self) -> tuple[float, float]:
        """Sides y, x in meters that turned cells may take."""
        low_x, low_y, _, high_x, high_y, _ = self.spec.grid.range
        widest = max(abs(math.sin(math.radians(t))) for t in self.config.turns)
        return (high_y - low_y) + 2 * widest * max(abs(low_x), abs(high_x)), (high_x - low_x) + 2 * widest * max(
            abs(low_y), abs(high_y)
        )

    def _spectrum(self, turn: float, shape: tuple[int, int]) -> Tensor:
        """(F, C, N) Fourier transform of the turned coarse maps."""
        cells, owner, count = self.cells, self.owner, self.count
        x, y = self.spec.position(cells[:, 1].float(), cells[:, 2].float())
        x, y = math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y
        low = self.spec.grid.range
        height, width = self._extent()
        start_y, start_x = (low[1] + low[4] - height) / 2, (low[0] + low[3] - width) / 2
        row, column = ((at - start) / self.config.coarse_cell for at, start in ((y, start_y), (x, start_x)))
        levels, channels = self.spec.shape[0], self.values.shape[1]
        bins = shape[0] * shape[1]
        values = torch.cat([self.values, torch.ones(len(cells), 1)], 1)
        maps = torch.zeros(count * levels * bins, channels + 1)
        for corner_row, row_share in _corners(row, shape[0]):  # a cell is shared out to four bins: shifts between bins fit too
            for corner_column, column_share in _corners(column, shape[1]):
                position = (owner * levels + cells[:, 0]) * bins + corner_row * shape[1] + corner_column
                maps.index_add_(0, position, values * (row_share * column_share)[:, None])
        maps = maps.view(count, levels, bins, channels + 1)
        features, occupied = maps[..., :-1], maps[..., -1:].sqrt()
        norms = [_inverse(part.square().sum((1, 2, 3))).view(-1, 1, 1, 1) / math.sqrt(2) for part in (features, occupied)]
        maps = torch.cat([features * norms[0], occupied * norms[1]], 3)
        maps = maps.permute(1, 3, 0, 2).reshape(levels * (channels + 1), count, *shape)
        return torch.fft.rfft2(maps).flatten(2).permute(2, 0, 1).contiguous()


def _of_norm_1(spectrum: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scale each scene of a spectrum (F, C, N) so that its maps have norm 1; an empty scene has none and becomes 0."""
    twice = torch.full((shape[0], shape[1] // 2 + 1), 2.0)  # the half of a real spectrum that is not stored
    twice[:, 0] = 1.0
    if shape[1] % 2 == 0:
        twice[:, -1] = 1.0
    energy = (spectrum.abs().square().sum(1) * twice.view(-1, 1)).sum(0) / math.prod(shape)
    return spectrum * _inverse(energy)


def _whiten(features: Tensor, channels: int) -> Tensor:
    """(M, K) features along their strongest directions, each scaled to the same strength; directions without any are left out."""
    if not len(features):
        return torch.zeros(0, 1)
    centered = (features - features.mean(0)).double()
    strength, directions = torch.linalg.eigh(centered.T @ centered / len(features))
    strength, directions = strength.flip(0)[:channels], directions.flip(1)[:, :channels]
    kept = strength > 1e-9 * strength[0].clamp_min(1e-12)
    if not kept.any():  # all cells are equal: only their places can tell anything
        return torch.zeros(len(features), 1)
    scale = (strength[kept] + 1e-3 * strength[0]).rsqrt()
    return (centered @ (directions[:, kept] * scale)).float()


def _scattered(position: Tensor, values: Tensor, size: int) -> Tensor:
    return torch.zeros(size).index_put_((position,), values)


def _corners(at: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The bins before and after a place, each with its share."""
    first = (at - 0.5).floor()
    share = at - 0.5 - first
    return (first.long().clamp(0, size - 1), 1 - share), ((first.long() + 1).clamp(0, size - 1), share)


def _inverse(energy: Tensor) -> Tensor:
    """1 / norm, 0 for an empty scene."""
    return torch.where(energy > 0, energy.clamp_min(1e-12).rsqrt(), 0.0)


def _fast(size: int) -> int:
    """A size from `size` on whose Fourier transform is fast: a product of 2, 3 and 5."""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def _shifts(most: int, size: int) -> Tensor:
    """Rows of a circular correlation that hold the shifts -most to most."""
    return torch.arange(-most, most + 1) % size


# ------------------------------------------------------------------------------------------------------------ conclusions


def chain_likeness(score: Tensor) -> Tensor:
    """Judge two scenes by the best chain of scenes between them: its weakest link is their likeness.

    Scenes of one drive that show different places are linked by the scenes between them.

    Args:
        score: (N, N) symmetric likeness.

    Returns:
        (N, N) likeness of the weakest link of the best chain. The diagonal is infinite.
    """
    distance = _distance(score)
    tree = csgraph.minimum_spanning_tree(distance)
    parts = tree.tocoo()
    result = np.full(distance.shape, -np.inf)
    np.fill_diagonal(result, np.inf)
    group = {i: [i] for i in range(len(distance))}
    member = np.arange(len(distance))
    for k in np.argsort(parts.data, kind="stable"):
        one, other = member[parts.row[k]], member[parts.col[k]]
        value = score[parts.row[k], parts.col[k]].item()
        rows, columns = group[one], group.pop(other)
        result[np.ix_(rows, columns)] = result[np.ix_(columns, rows)] = value
        group[one] = rows + columns
        member[columns] = one
    return torch.from_numpy(result)


def recovered_order(score: Tensor) -> Tensor:
    """Put the scenes of one drive in order. Which end comes first stays open.

    The scenes are joined by their strongest links to a tree. The two scenes that lie farthest apart along the tree are the ends; a scene
    stands where it is nearer to one of them.

    Args:
        score: (N, N) symmetric likeness of the scenes of one drive.

    Returns:
        (N,) float64 place of each scene along the drive.
    """
    if len(score) < 2:
        return torch.zeros(len(score), dtype=torch.float64)
    along = csgraph.shortest_path(csgraph.minimum_spanning_tree(_distance(score)), directed=False)
    first, last = np.unravel_index(along.argmax(), along.shape)
    return torch.from_numpy(along[first] - along[last])


def _distance(score: Tensor) -> np.ndarray:
    """(N, N) distances for a graph: positive, 0 on the diagonal only."""
    distance = (2 - 2 * score.double()).clamp_min(0).sqrt().clamp_min(_FLOOR).numpy()
    np.fill_diagonal(distance, 0.0)
    return distance


def attack_linkage(uploads: Sequence[CutFeatures], drives: Sequence[str], positions: Sequence[int | None]) -> LinkageScores:
    """Look for order and origin in a pile of uploads, by each measure of likeness.

    Args:
        uploads: Uploads of one cut, each a batch of one, in an order that tells nothing.
        drives: Drive of each, for scoring.
        positions: Place of each in its drive, for scoring; None where nobody knows it.

    Returns:
        The scores of the measure that finds most neighbors in time.
    """
    likeness, named, found = pile_likeness(uploads), ordered_drives(drives, positions), []
    for score in (likeness.score, likeness.fine, likeness.aligned):
        orders = [recovered_order(score[rows][:, rows]) for rows in named.values()]
        found.append(score_linkage(score, chain_likeness(score), orders, drives, positions))
    return max(found, key=lambda scores: scores.neighbor.found if scores.neighbor.asked else scores.same_drive.found)
