"""The network of the occupancy attack: which cubes of space hold a point, from the cells of the cut down to single voxels.

    upload ── BEV map (dense, so that cells which were not sent are guessed from their surroundings) ── roots
    kept nodes ── sparse convolutions ── which of the 8 children hold a point ── kept children ── ... ── voxels with offsets

Only children of kept nodes are computed. In a third of the training steps the kept nodes are those that hold a point ("known"), in the
others those that the network keeps itself. It reads which of the two it is. The idea is ConcreTizer's (ICLR 2025): classify occupancy block by block with a focal loss, instead
of regressing points. Keypoints, where the cut has them, enter on every level. Read next: `occupancy.py`, which trains and uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ....core.cut import CutSpec
from ....core.errors import InvalidInput, require_counts
from ....core.features import CutFeatures, Keypoints
from ....ops.sparse_conv import Rulebook, SubmanifoldConv3d, submanifold_rulebook
from .coordinates import voxel_of_points
from .occupancy_tree import CHILDREN, OccupancyTree, children_of, row_of


@dataclass(frozen=True, kw_only=True)
class DecoderSize:
    """How large the attacker's network is. A defence that was trained against one size is judged with a larger one."""

    bev_channels: int = 64
    """Channels of the BEV map."""
    bev_blocks: int = 3
    """Residual blocks on the BEV map; two thirds of what they see beyond a few cells comes from a map at half the resolution."""
    node_channels: int = 48
    """Channels of a node on the levels between roots and voxels."""
    node_blocks: int = 2
    """Sparse convolutions on each level."""
    keypoint_channels: int = 48
    """Channels of a keypoint; without meaning for a cut without keypoints."""
    frequencies: int = 24
    """Waves of the elevation angle that every node reads, with which the network can learn the pattern of a sensor's beams."""

    def __post_init__(self) -> None:
        require_counts("DecoderSize", most=100_000, **{name: getattr(self, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class LevelGuess:
    """What the network says about the candidates of one level."""

    nodes: Tensor
    """(M, 4) int32 scene, z, y, x of the candidates: all roots, or the children of the kept nodes above."""
    logit: Tensor
    """(M,) logit that a candidate holds a point."""
    inside: Tensor | None = None
    """(M, 4) mean place x, y, z of the points in the voxel, in voxels from its center, and the logarithm of their number; only on
    level 0."""

    @property
    def probability(self) -> Tensor:
        """(M,) how likely each candidate holds a point, without gradient."""
        return self.logit.detach().sigmoid()


Keep = Callable[[int, LevelGuess], Tensor]
"""Chooses the nodes whose children are looked at: given a level and its candidates, (M,) bool."""


class OccupancyDecoder(nn.Module):
    """Upload in, occupancy of every level out."""

    cell_scale: Tensor
    """(2, C) mean and spread of the channels of cells."""
    keypoint_scale: Tensor | None
    """(2, C) the same of keypoints."""
    calibration: Tensor
    """(2, levels + 1, 2) for known and for guessed parents, per level from the voxels up: factor and shift of the logits."""

    def __init__(self, size: DecoderSize, spec: CutSpec) -> None:
        """Make the layers with fresh weights.

        Args:
            size: Numbers of channels and blocks.
            spec: The cut of the uploads.
        """
        super().__init__()
        self.tree, self.spec = OccupancyTree.of(spec), spec
        cells, c, n = spec.shape[0], size.bev_channels, size.node_channels
        self.register_buffer("cell_scale", torch.stack([torch.zeros(spec.channels), torch.ones(spec.channels)]))
        kp = spec.keypoints
        self.register_buffer("keypoint_scale", torch.stack([torch.zeros(kp.channels), torch.ones(kp.channels)]) if kp else None)
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]).repeat(2, self.tree.levels + 1, 1))
        self.keypoint_layers = _KeypointLayers(kp.channels, size.keypoint_channels) if kp else None
        extra = size.keypoint_channels if kp else 0
        self.position = _Position(size.frequencies)
        self.bev = _BevNetwork((spec.channels + 1) * cells + extra + self.position.channels, c, size.bev_blocks)
        slabs = self.tree.shape(self.tree.levels)[0]
        self.root_logits = nn.Conv2d(c, slabs * (5 if self.tree.levels == 0 else 1), 1)
        self.root_features = nn.Parameter(torch.randn(slabs, c, n) / math.sqrt(c))
        self.stages = nn.ModuleList(
            _Stage(n, size.node_blocks, self.position.channels, extra, last=level == 1)
            for level in range(self.tree.levels, 0, -1)
        )
        nn.init.constant_(cast(Tensor, self.root_logits.bias), -2.0)

    def fit_scale(self, uploads: list[CutFeatures]) -> None:
        """Learn mean and spread of every channel, so that no encoder's scale matters.

        Args:
            uploads: Uploads of the attacker's own frames.
        """
        self.cell_scale = _scale(torch.cat([u.voxels.features for u in uploads]))
        if self.keypoint_scale is not None:
            self.keypoint_scale = _scale(torch.cat([u.keypoints.features for u in uploads if u.keypoints is not None]))

    def forward(self, upload: CutFeatures, keep: Keep, *, known: bool) -> list[LevelGuess]:
        """Guess the occupancy of all levels.

        Args:
            upload: Uploads of one or several scenes.
            keep: Chooses the nodes to go on with.
            known: The kept nodes are known to hold a point, as somebody knows who decodes a scan level by level. Otherwise they are
                guesses, each node reads how likely it is, and its children's logits count that it may be empty.

        Returns:
            The guesses, roots first. With nothing kept, the levels below have no candidates.

        Raises:
            InvalidInput: The upload is of another cut.
        """
        if upload.spec != self.spec:
            raise InvalidInput(
                f"the occupancy attack was made for another cut: expected {self.spec}, found {upload.spec}; train one for each cut"
            )
        tree, keypoints = self.tree, self._keypoint_rows(upload.keypoints)
        bev = self.bev(self._bev_input(upload, keypoints))
        guess = self._roots(bev, upload.batch_size, known)
        guesses = [guess]

        def of_roots(rows: Tensor) -> Tensor:
            scene, z, y, x = guesses[0].nodes[rows].long().unbind(1)
            return _by_kind(bev.permute(0, 2, 3, 1)[scene, y, x], z, self.root_features)

        features_of: Callable[[Tensor], Tensor] = of_roots
        for level, stage in zip(range(tree.levels, 0, -1), cast(list[_Stage], list(self.stages)), strict=True):
            kept = keep(level, guess).nonzero()[:, 0]
            kept = kept[tree.keys(guess.nodes[kept], level).argsort()]  # kernels are fastest in the order of the grid
            nodes = guess.nodes[kept]
            position = self.position(tree.centers(nodes, level))
            gathered = None if keypoints is None else keypoints.gather(tree, nodes, level)
            rulebook = submanifold_rulebook(nodes, tree.shape(level), upload.batch_size)
            evidence = torch.zeros(len(kept)) if known else guess.logit.detach()[kept] / 4
            evidence = torch.stack([evidence, torch.full_like(evidence, float(known))], 1)
            features = stage(features_of(kept), torch.cat([position, evidence], 1), gathered, rulebook)
            guess, features_of = self._children(stage, features, nodes, level - 1, known)
            guesses.append(guess)
        return guesses

    def _roots(self, bev: Tensor, scenes: int, known: bool) -> LevelGuess:
        slabs = self.tree.shape(self.tree.levels)[0]
        out = self.root_logits(bev)
        logit = self._calibrated(out[:, :slabs].reshape(-1), self.tree.levels, known)
        inside = None
        if self.tree.levels == 0:
            inside = out[:, slabs:].unflatten(1, (4, slabs)).permute(0, 2, 3, 4, 1).reshape(-1, 4)
        return LevelGuess(nodes=self.tree.roots(scenes), logit=logit, inside=inside)

    def _children(
        self, stage: _Stage, features: Tensor, nodes: Tensor, level: int, known: bool
    ) -> tuple[LevelGuess, Callable[[Tensor], Tensor]]:
        """The candidates below some nodes, and what gives the features of chosen candidates."""
        logit, inside = stage.heads(features)
        candidates = children_of(nodes).view(-1, 4)
        real = self.tree.inside(candidates, level).nonzero()[:, 0]
        parent, child = real // CHILDREN, real % CHILDREN
        guess = LevelGuess(
            nodes=candidates[real],
            logit=self._calibrated(logit.reshape(-1)[real], level, known),
            inside=None if inside is None else inside.reshape(-1, 4)[real],
        )
        return guess, lambda rows: stage.descend(features, parent[rows], child[rows])

    def _calibrated(self, logit: Tensor, level: int, known: bool) -> Tensor:
        factor, shift = self.calibration[0 if known else 1, level]
        return logit * factor + shift

    def _bev_input(self, upload: CutFeatures, keypoints: _KeypointRows | None) -> Tensor:
        """(B, C, Y, X) of the roots' columns: features of the cut, which cells were sent, keypoints, positions."""
        mean, spread = self.cell_scale
        cells = upload.voxels
        rows = torch.cat([(cells.features - mean) / spread, torch.ones(len(cells.features), 1)], 1)
        depth, height, width = upload.spec.shape
        dense = rows.new_zeros(upload.batch_size, height, width, depth, rows.shape[1])
        scene, z, y, x = cells.coords.long().unbind(1)
        dense[scene, y, x, z] = rows
        level, (_, rows_y, rows_x) = self.tree.levels, self.tree.shape(self.tree.levels)
        at_y, at_x = (
            (torch.arange(n) * 2**level // stride).clamp(max=most - 1)
            for n, stride, most in zip((rows_y, rows_x), upload.spec.stride[1:], (height, width))
        )
        dense = dense[:, at_y[:, None], at_x].flatten(3)
        floor = nn.functional.pad(torch.cartesian_prod(torch.arange(rows_y), torch.arange(rows_x)), (2, 0))
        position = (
            self.position(self.tree.centers(floor, level)).view(1, rows_y, rows_x, -1).expand(upload.batch_size, -1, -1, -1)
        )
        parts = [dense, position]
        if keypoints is not None:
            parts.append(keypoints.columns(self.tree, upload.batch_size))
        return torch.cat(parts, 3).permute(0, 3, 1, 2)

    def _keypoint_rows(self, keypoints: Keypoints | None) -> _KeypointRows | None:
        if keypoints is None or self.keypoint_layers is None or self.keypoint_scale is None:
            return None
        mean, spread = self.keypoint_scale
        scene = torch.repeat_interleave(torch.arange(keypoints.batch_size), torch.tensor(keypoints.starts).diff())
        low, high = (keypoints.xyz.new_tensor(side) for side in (self.spec.grid.range[:3], self.spec.grid.range[3:]))
        inside = ((keypoints.xyz >= low) & (keypoints.xyz <= high)).all(1)
        voxels = torch.cat([scene[inside, None].to(torch.int32), voxel_of_points(keypoints.xyz[inside], self.spec.grid)], 1)
        features = self.keypoint_layers((keypoints.features[inside] - mean) / spread)
        return _KeypointRows(voxels=voxels, features=features)


@dataclass(frozen=True, kw_only=True)
class _KeypointRows:
    """Keypoints of a batch inside the grid."""

    voxels: Tensor
    """(K, 4) int32 scene, z, y, x of the voxel that each lies in."""
    features: Tensor
    """(K, C) features made for the decoder."""

    def gather(self, tree: OccupancyTree, nodes: Tensor, level: int) -> Tensor:
        """(M, C + 8): per node the mean feature of its keypoints, and which children hold one. Nodes ascend."""
        own = torch.cat([self.voxels[:, :1], self.voxels[:, 1:] >> level], 1)
        row = row_of(tree.keys(nodes, level), tree.keys(own, level))
        found = (row >= 0).nonzero()[:, 0]
        z, y, x = (self.voxels[found, 1:] >> (level - 1) & 1).long().unbind(1)
        marks = nn.functional.one_hot(z * 4 + y * 2 + x, CHILDREN).float()
        return _mean_rows(torch.cat([self.features[found], marks], 1), row[found], len(nodes))

    def columns(self, tree: OccupancyTree, scenes: int) -> Tensor:
        """(B, Y, X, C): per column of roots the mean feature of its keypoints."""
        _, height, width = tree.shape(tree.levels)
        scene, _, y, x = self.voxels.long().unbind(1)
        row = (scene * height + (y >> tree.levels)) * width + (x >> tree.levels)
        return _mean_rows(self.features, row, scenes * height * width).view(scenes, height, width, -1)


class _KeypointLayers(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__(nn.Linear(channels, 2 * out), nn.ReLU(), nn.Linear(2 * out, out))


class _Position(nn.Module):
    """What the place of a node alone says: coordinates, distance, angles, and waves of the elevation seen from a sensor height."""

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.channels = 7 + 2 * frequencies
        # The waves read z / r and 1 / r, whose sum with the right weights is the elevation angle seen from the sensor.
        waves = torch.logspace(1.0, 3.0, frequencies)
        self.waves = nn.Parameter(torch.stack([waves, -1.7 * waves], 1))

    def forward(self, xyz: Tensor) -> Tensor:
        x, y, z = xyz.unbind(1)
        r = torch.hypot(x, y).clamp(min=1.0)
        plain = torch.stack([x / 40, y / 20, z / 2, r / 40, 3 / r, z / r, torch.atan2(y, x.abs().clamp(min=1e-3))], 1)
        phase = torch.stack([z / r, 1 / r], 1) @ self.waves.t()
        return torch.cat([plain, phase.sin(), phase.cos()], 1)


class _BevBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class _BevNetwork(nn.Module):
    """A residual network on the BEV map with a branch at half the resolution."""

    def __init__(self, channels_in: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 1)
        self.down = nn.Conv2d(channels, channels, 2, stride=2)
        self.coarse = nn.Sequential(*(_BevBlock(channels) for _ in range(blocks)))
        self.fine = nn.Sequential(*(_BevBlock(channels) for _ in range(max(1, blocks // 2))), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        height, width = x.shape[2:]
        even = nn.functional.pad(x, (0, width % 2, 0, height % 2))
        coarse = self.coarse(self.down(even))
        wide = nn.functional.interpolate(coarse, scale_factor=2.0, mode="nearest")[:, :, :height, :width]
        return self.fine(x + wide)


class _Stage(nn.Module):
    """The nodes of one level: what they learn from each other, and what they say about their children."""

    def __init__(self, channels: int, blocks: int, position: int, keypoints: int, *, last: bool) -> None:
        super().__init__()
        self.position = nn.Linear(position + 2, channels)
        self.keypoints = nn.Linear(keypoints + CHILDREN, channels) if keypoints else None
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(blocks))
        self.convs = nn.ModuleList(SubmanifoldConv3d(channels, channels) for _ in range(blocks))
        self.out = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.ReLU())
        self.occupied = nn.Linear(channels, CHILDREN)
        self.inside = nn.Linear(channels, CHILDREN * 4) if last else None
        self.below = None if last else nn.Parameter(torch.randn(CHILDREN, channels, channels) / math.sqrt(channels))

    def forward(self, features: Tensor, position: Tensor, keypoints: Tensor | None, rulebook: Rulebook) -> Tensor:
        x = features + self.position(position)
        if keypoints is not None and self.keypoints is not None:
            x = x + self.keypoints(keypoints)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + cast(SubmanifoldConv3d, conv)(torch.relu(norm(x)), rulebook)
        return self.out(x)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.occupied(x), None if self.inside is None else self.inside(x)

    def descend(self, x: Tensor, parent: Tensor, child: Tensor) -> Tensor:
        return _by_kind(x[parent], child, cast(Tensor, self.below))


def _by_kind(rows: Tensor, kind: Tensor, matrices: Tensor) -> Tensor:
    """(M, D): each row times the matrix of its kind."""
    out = rows.new_zeros(len(rows), matrices.shape[2])
    for k, matrix in enumerate(matrices):
        own = (kind == k).nonzero()[:, 0]
        out = out.index_copy(0, own, rows[own] @ matrix)
    return out


def _mean_rows(rows: Tensor, target: Tensor, count: int) -> Tensor:
    total = rows.new_zeros(count, rows.shape[1]).index_add(0, target, rows)
    number = rows.new_zeros(count).index_add(0, target, rows.new_ones(len(rows)))
    return total / number.clamp(min=1)[:, None]


def _scale(rows: Tensor) -> Tensor:
    """(2, C) mean and spread; a channel that never changes gets the spread 1."""
    if len(rows) < 2:
        return torch.stack([torch.zeros(rows.shape[1]), torch.ones(rows.shape[1])])
    spread = rows.std(0)
    return torch.stack([rows.mean(0), torch.where(spread > 1e-6, spread, torch.ones_like(spread))])
