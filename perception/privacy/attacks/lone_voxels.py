"""Attack (d) on voxels: compute the mean point of a voxel that has no neighbors, from features after the sparse backbone.

The backbone reads the mean x, y, z and point features of every voxel. Around a voxel without neighbors, all of its outputs are a known
function of these few numbers, so the numbers can be solved for: from the balls of PV-RCNN's keypoints around conv1 to conv4, and
from the cells at the cut, which SECOND-IoU uploads too. All of them together are one problem per voxel. A voxel that holds one point
gives that point. `SolvedPoints.error` says how much the features tell: of a voxel of 10 cm, nothing is known where it is 5 cm.

Read next: `exact_points.py`, the same question to the raw-point balls, and `point_solver.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ....core.cut import CutSpec, cell_centers, cell_index, cells_of_centers
from ....core.features import CutFeatures, Keypoints, SparseVoxels
from ....ops.sparse_conv import submanifold_rulebook
from ...models.encoders.pv_rcnn import PvRcnnEncoder
from ...models.encoders.second import SecondEncoder, SparseBackbone
from ...models.encoders.set_abstraction import SetAbstraction, SetAbstractionConfig
from ..frames import AuditFrame, Rebuilt
from .exact_points import SolvedPoints, choose_thresholds, no_answers
from .point_solver import Model, rounding, solve

Part = Literal["conv1", "conv2", "conv3", "conv4", "cut"]
ALL_PARTS: tuple[Part, ...] = ("conv1", "conv2", "conv3", "conv4", "cut")
_STEP = 1e-3  # meters of the differences that replace derivatives
_FEATURE_STEP = 1e-2
_MOST_CELLS = 8  # a voxel reaches at most two cells along each axis
_AT_A_TIME = 512


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """Voxels that may stand alone, and the features that each explains if it does."""

    voxels: Tensor
    """(N, 3) int32 z, y, x of the input grid."""
    source: Tensor
    """(N,) int64 row of the keypoint, or number of the group of cells."""
    keypoints: Tensor
    """(N, 3) position of the keypoint."""
    cells: Tensor
    """(N, 8) int64 numbers of the cells at the cut that the voxel reaches, -1 for none."""
    observed: Tensor
    """(N, R) float64 features: the balls of the keypoint, then the cells."""
    noise: Tensor
    """(N, R) float64 standard deviations of their rounding, infinite where something else may have a part in a feature."""

    def select(self, rows: Tensor) -> _Questions:
        """The questions in these rows."""
        return _Questions(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


class LoneVoxels:
    """Solves for the mean points of voxels without neighbors.

    Attributes:
        threshold: Largest residual of an answer that counts as right; `train` chooses it.

    Args:
        encoder: The encoder that made the uploads, SECOND's or PV-RCNN's.
        codec: "fp16" or "int8".
        levels: Levels per channel of each defence that rounds; the attacker knows them from the encoder file.
        parts: Which features it reads: those of the keypoints' balls at stages of the backbone, and the cells at the cut.
        most: Groups of cells per upload that it looks at where no keypoint names the voxel; each costs some hundred solutions.
        most_voxels: Voxels per upload that it solves for around keypoints. A keypoint that stands for a coarse cell has one candidate for
            every voxel of the cell, so only a part of the keypoints, drawn at random, is looked at.
        iterations: Steps of the solver.
    """

    def __init__(
        self,
        encoder: PvRcnnEncoder | SecondEncoder,
        codec: str,
        *,
        levels: Sequence[int] = (),
        parts: tuple[Part, ...] = ALL_PARTS,
        most: int = 10,
        most_voxels: int = 2048,
        iterations: int = 8,
    ) -> None:
        self.encoder, self.codec, self.levels, self.iterations = encoder, codec, levels, iterations
        self.most, self.most_voxels = most, most_voxels
        self.second = encoder if isinstance(encoder, SecondEncoder) else encoder.second
        there = encoder.upload_channels() if isinstance(encoder, PvRcnnEncoder) else {}
        self.parts: tuple[Part, ...] = tuple(part for part in ALL_PARTS if part in parts and (part == "cut" or part in there))
        self.threshold = 2.0
        self._backbone = copy.deepcopy(self.second.sparse_backbone).double().eval()

    def train(self, frames: Sequence[AuditFrame]) -> None:
        """Choose the largest residual that counts as right: the one at which at least 95 % of the answers are right within 1 cm.

        Args:
            frames: Frames of the attacker.
        """
        self.threshold = choose_thresholds([(self.solve(frame.upload), frame.scan.xyz) for frame in frames])[0]

    def rebuild(self, upload: CutFeatures) -> Rebuilt:
        """Compute the points that the attack is sure of.

        Args:
            upload: What left a vehicle, a batch of one.

        Returns:
            The points; the score is the residual with a minus sign.
        """
        found = self.solve(upload).accepted((self.threshold, 0.0))
        return Rebuilt(xyz=found.xyz, score=-found.residual)

    @torch.no_grad()
    def solve(self, upload: CutFeatures) -> SolvedPoints:
        """Answer for keypoints, or groups of cells, that may belong to one voxel without neighbors; `tried` says for how many.

        Args:
            upload: What left a vehicle, a batch of one.

        Returns:
            The best answer of each.
        """
        asked = self._chosen(upload, self._questions(upload)) if len(upload.voxels.coords) else None
        if asked is None or not len(asked.voxels):
            return no_answers(len(self.second.config.point_features))
        spread = self._spread()
        parts = []
        for rows in torch.arange(len(asked.voxels)).split(_AT_A_TIME):
            start = self._middle(asked.voxels[rows])[None]
            x, rms, error = solve(self._model(asked.select(rows), spread), start, iterations=self.iterations)
            parts.append((x, rms, error[:, :3].square().sum(1).sqrt()))
        x, rms, error = (torch.cat(column) for column in zip(*parts, strict=True))
        order = rms.argsort(stable=True)  # the best candidate of a source comes first
        _, group = asked.source[order].unique(return_inverse=True)
        first = torch.full((int(group.max()) + 1,), len(order)).scatter_reduce(0, group, torch.arange(len(order)), "amin")
        best = order[first]
        return SolvedPoints(
            xyz=x[best, :3].float(),
            point_features=x[best, 3:].float(),
            residual=rms[best].float(),
            error=error[best].float(),
            source=asked.source[best],
            size=torch.ones(len(best), dtype=torch.int64),
        )

    @torch.no_grad()
    def tried(self, upload: CutFeatures) -> tuple[int, int]:
        """Count what `solve` looks at.

        Args:
            upload: What left a vehicle, a batch of one.

        Returns:
            Keypoints or groups of cells that it looks at, and all that it could look at.
        """
        if not len(upload.voxels.coords):
            return 0, 0
        if upload.keypoints is None:
            there = len(_lone_boxes(upload.voxels.coords[:, 1:]))
            return min(there, self.most), there
        asked = self._questions(upload)
        return len(self._chosen(upload, asked).source.unique()), len(asked.source.unique())

    def _chosen(self, upload: CutFeatures, asked: _Questions) -> _Questions:
        """As many questions as the attack has time for. Without keypoints, `_voxels_by_pattern` asks few already."""
        return asked if upload.keypoints is None else asked.select(_of_few_sources(asked.source, self.most_voxels))

    def _middle(self, voxels: Tensor) -> Tensor:
        """(N, D) what is expected without the features: the center of the voxel, and the middle of point features in 0..1."""
        centers = cell_centers(voxels, self.second.spec.grid).double()
        return nn.functional.pad(centers, (0, len(self.second.config.point_features)), value=0.5)

    def _spread(self) -> Tensor:
        """(D,) standard deviations of that expectation."""
        sides = [*self.second.spec.grid.voxel_size, *[1.0] * len(self.second.config.point_features)]
        return torch.tensor(sides, dtype=torch.float64) / 12**0.5

    def _model(self, asked: _Questions, spread: Tensor) -> Model:
        """Residuals in units of rounding. The derivatives are differences: between its corners, the network is linear."""
        steps = torch.tensor([_STEP] * 3 + [_FEATURE_STEP] * (len(spread) - 3), dtype=torch.float64)

        def model(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            width, mine = x.shape[1], asked.select(rows)
            moved = torch.cat([x, *(x + row for row in torch.diag(steps))])
            found = self._predict(moved, asked.select(rows.repeat(width + 1))).view(width + 1, len(x), -1)
            slope = ((found[1:] - found[0]) / steps[:, None, None] / mine.noise).permute(1, 2, 0)
            residual = torch.cat([(found[0] - mine.observed) / mine.noise, (x - self._middle(mine.voxels)) / spread], 1)
            return residual, torch.cat([slope, torch.diag(1 / spread).expand(len(x), -1, -1)], 1)

        return model

    def _predict(self, x: Tensor, asked: _Questions) -> Tensor:
        """(N, R) what the encoder makes of voxels with the means `x`, each in a scene of its own."""
        grid = self.second.spec.grid
        coords = nn.functional.pad(asked.voxels, (1, 0))
        coords[:, 0] = torch.arange(len(x))
        alone = SparseVoxels(features=x, coords=coords, shape=self.second.sparse_shape, batch_size=len(x))
        stages, found = self._stages(alone), []
        for part in self.parts:
            if part == "cut":
                found.append(_at_cells(stages[-1], asked.cells, self.second.spec))
                continue
            number = int(part[-1]) - 1
            stage = stages[number].sorted()
            _, abstraction = _abstraction(self.encoder, part)
            centers = cell_centers(stage.coords[:, 1:], grid, 2**number)
            starts = tuple(range(len(x) + 1))
            found.append(abstraction(asked.keypoints, starts, centers, stage.starts(), stage.features.float()).double())
        return torch.cat(found, 1)

    def _stages(self, alone: SparseVoxels) -> list[SparseVoxels]:
        if self.parts != ("conv1",):
            return cast(SparseBackbone, self._backbone).stages(alone)
        same = submanifold_rulebook(alone.coords, alone.shape, alone.batch_size, (3, 3, 3))
        first = self._backbone.conv_input(alone.features, same)
        return [replace(alone, features=self._backbone.conv1[0](first, same))]

    def _questions(self, upload: CutFeatures) -> _Questions:
        """One question for each voxel that a keypoint may stand for, or that may have made a group of cells."""
        if upload.keypoints is None:
            voxels, source = _voxels_by_pattern(upload, self.most)
            place = cell_centers(voxels, upload.spec.grid)
        else:
            voxels, source = _voxels_of_keypoints(upload.keypoints, upload.spec, self.encoder)
            place = upload.keypoints.xyz[source]
        observed, noise = [torch.zeros(len(voxels), 0)], [torch.zeros(len(voxels), 0)]
        for part in self.parts:
            if part != "cut" and upload.keypoints is not None:
                values, errors = self._balls(upload.keypoints, part)
                observed.append(values[source])
                noise.append(errors[source])
        cells, lone = _reached_cells(upload, voxels)
        if "cut" in self.parts:
            values, errors = _cell_features(upload, cells, self.codec, self.levels)
            observed.append(values)
            noise.append(torch.where(lone[:, None], errors, torch.inf))
        asked = _Questions(
            voxels=voxels,
            source=source,
            keypoints=place,
            cells=cells,
            observed=torch.cat(observed, 1).double(),
            noise=torch.cat(noise, 1).double(),
        )
        return asked.select(asked.noise.isfinite().any(1))

    def _balls(self, keypoints: Keypoints, part: Part) -> tuple[Tensor, Tensor]:
        """(K, C) features of the part's balls and their errors, infinite where another keypoint lies in the ball or close to it.

        Sampling keeps far voxels before near ones, so a ball without another keypoint often holds no other voxel.
        """
        encoder = cast(PvRcnnEncoder, self.encoder)
        config, _ = _abstraction(encoder, part)
        columns = slice(*encoder.upload_channels()[part])
        apart = torch.cdist(keypoints.xyz, keypoints.xyz).fill_diagonal_(torch.inf).amin(1)
        free = apart[:, None] > torch.tensor(config.radii).repeat_interleave(config.channels[1])
        noise = rounding(keypoints.features[:, columns], self.codec, self.levels)
        return keypoints.features[:, columns].double(), torch.where(free, noise, torch.inf)


def _abstraction(encoder: PvRcnnEncoder | SecondEncoder, part: Part) -> tuple[SetAbstractionConfig, SetAbstraction]:
    pv_rcnn = cast(PvRcnnEncoder, encoder)
    names = [name for name in ALL_PARTS[:-1] if getattr(pv_rcnn.config, name) is not None]
    return getattr(pv_rcnn.config, part), cast(SetAbstraction, pv_rcnn.stage_abstractions[names.index(part)])


def _voxels_of_keypoints(keypoints: Keypoints, spec: CutSpec, encoder: PvRcnnEncoder | SecondEncoder) -> tuple[Tensor, Tensor]:
    """The voxels (N, 3) of the cells that keypoints stand for, and the rows (N,) of the keypoints."""
    stride = cast(PvRcnnEncoder, encoder).config.keypoint_stride
    middle = cells_of_centers(keypoints.xyz, spec.grid)
    inside = torch.cartesian_prod(*[torch.arange(stride)] * 3).view(-1, 3)
    voxels = (torch.div(middle, stride, rounding_mode="floor") * stride)[:, None] + inside
    source = torch.arange(len(middle)).repeat_interleave(len(inside))
    voxels = voxels.view(-1, 3).to(torch.int32)
    fits = (voxels < torch.tensor(spec.grid.shape)).all(1)
    return voxels[fits], source[fits]


def _of_few_sources(source: Tensor, most: int) -> Tensor:
    """Rows of sources that are drawn at random, as many as have at most `most` rows together."""
    numbers, own, rows = source.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    drawn = torch.zeros(len(numbers), dtype=torch.bool)
    drawn[order[rows[order].cumsum(0) <= most]] = True
    return drawn[own].nonzero()[:, 0]


def _reach(voxels: Tensor, axis: int, spec: CutSpec) -> tuple[Tensor, Tensor]:
    """First and last cell at the cut that voxels (N,) reach along an axis (0 for z), by the backbone's kernels and strides."""
    low = high = voxels.long()
    for padding in (1, 1, 0, 0) if axis == 0 else (1, 1, 1):
        low, high = (low + padding - 1).div(2, rounding_mode="floor"), (high + padding).div(2, rounding_mode="floor")
    return low.clamp_min(0), high.clamp_max(spec.shape[axis] - 1)


def _reached_cells(upload: CutFeatures, voxels: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (N, 8) of the cells that each voxel reaches, and whether they are there and no other cell touches them (N,)."""
    spec = upload.spec
    size = torch.tensor(spec.shape)
    occupied = torch.zeros(*(size + 4).tolist(), dtype=torch.bool)
    z, y, x = (upload.voxels.coords[:, 1:].long() + 2).unbind(1)
    occupied[z, y, x] = True
    bounds = [_reach(voxels[:, axis], axis, spec) for axis in range(3)]
    low, high = (torch.stack([bound[k] for bound in bounds], 1) for k in (0, 1))
    cells, lone = torch.full((len(voxels), _MOST_CELLS), -1), (low <= high).all(1)
    for step in torch.cartesian_prod(*[torch.arange(-1, 3)] * 3):
        place = low + step
        own = ((place >= low) & (place <= high)).all(1)
        around = (place <= high + 1).all(1) & ~own
        there = occupied[tuple((place + 2).clamp_min(0).minimum(size + 3).unbind(1))]
        lone &= ~(own & ~there) & ~(around & there)
        if bool((step >= 0).all()) and bool((step < 2).all()):
            cells[:, int(step @ torch.tensor([1, 2, 4]))] = torch.where(own, cell_index(place, spec.shape), -1)
    return cells, lone


def _cell_features(upload: CutFeatures, cells: Tensor, codec: str, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(N, 8 * C) features of cells and their errors, one after the other, zeros without error where there is no cell."""
    numbers = cell_index(upload.voxels.coords[:, 1:], upload.spec.shape)
    row_of = torch.full((math.prod(upload.spec.shape),), len(numbers))
    row_of[numbers] = torch.arange(len(numbers))
    rows = torch.where(cells >= 0, row_of[cells], len(numbers))
    features = nn.functional.pad(upload.voxels.features.double(), (0, 0, 0, 1))
    noise = nn.functional.pad(rounding(upload.voxels.features, codec, levels), (0, 0, 0, 1), value=1.0)
    return features[rows].flatten(1), noise[rows].flatten(1)


def _at_cells(stage: SparseVoxels, cells: Tensor, spec: CutSpec) -> Tensor:
    """(N, 8 * C) features at the wanted cells of each scene, zeros where there is none."""
    size = math.prod(spec.shape)
    key, order = (stage.coords[:, 0].long() * size + cell_index(stage.coords[:, 1:], spec.shape)).sort()
    if not len(key):
        return stage.features.new_zeros(len(cells), _MOST_CELLS * spec.channels)
    wanted = torch.arange(len(cells))[:, None] * size + cells
    place = torch.searchsorted(key, wanted).clamp_max(len(key) - 1)
    there = (cells >= 0) & (key[place] == wanted)
    return (stage.features[order][place] * there[..., None]).flatten(1)


def _voxels_by_pattern(upload: CutFeatures, most: int) -> tuple[Tensor, Tensor]:
    """Voxels (N, 3) that would occupy exactly the cells of a group, and the number of the group, for at most `most` groups."""
    spec = upload.spec
    reach = [_reach(torch.arange(size), axis, spec) for axis, size in enumerate(spec.grid.shape)]
    groups = _lone_boxes(upload.voxels.coords[:, 1:])
    picked = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))[:most].tolist()
    voxels, source = [torch.zeros(0, 3, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int64)]
    for number in picked:
        axes = [
            ((low == box[0]) & (high == box[1])).nonzero()[:, 0] for (low, high), box in zip(reach, groups[number], strict=True)
        ]
        found = torch.cartesian_prod(*axes).view(-1, 3).to(torch.int32)
        voxels.append(found)
        source.append(torch.full((len(found),), number))
    return torch.cat(voxels), torch.cat(source)


def _lone_boxes(cells: Tensor) -> list[list[tuple[int, int]]]:
    """First and last cell along z, y, x of the groups of cells that fill a box of at most two cells along each axis."""
    left, found = {tuple(cell) for cell in cells.tolist()}, []
    while left:
        group, border = set(), [left.pop()]
        while border:
            z, y, x = cell = border.pop()
            group.add(cell)
            around = {(z + a, y + b, x + c) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)} & left
            left -= around
            border += around
        box = [(min(c[axis] for c in group), max(c[axis] for c in group)) for axis in range(3)]
        size = [high - low + 1 for low, high in box]
        if max(size) <= 2 and size[0] * size[1] * size[2] == len(group):
            found.append(box)
    return sorted(found)
