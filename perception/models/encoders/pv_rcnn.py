"""PV-RCNN's vehicle half: SECOND's sparse backbone, and keypoints that gather features from all of its stages and from the points.

    points ─┬─ voxels ─ sparse backbone: conv1 ─ conv2 ─ conv3 ─ conv4 ─ cut ──────────────┐
            │    └─ farthest point sampling ─ keypoints      │                             ├─ CutFeatures
            └──────────────── set abstraction around each keypoint, from points, conv1..conv4 and the BEV map at the cut

Source: Shi et al., PV-RCNN (2020), section 3.2; OpenPCDet `voxel_set_abstraction.py`. The cut lies before the fusion layer. OpenPCDet
samples keypoints from the raw points, which would put 2,048 exact LiDAR points into every smashed scene. Here a keypoint is the
center of an occupied voxel unless a configuration asks for "raw_points", which an extractor refuses. `second.py` has the backbone,
`set_abstraction.py` what gathers around a keypoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ....core.cut import CutSpec, KeypointSpec, VoxelGrid, cell_centers
from ....core.errors import InvalidInput, require_counts
from ....core.features import CutFeatures, Keypoints, SparseVoxels
from ....core.structures import PointCloud
from ....ops.bev_interpolate import bev_interpolate
from ....ops.farthest_point import farthest_point_sample
from .encoder import ADDED_LATER, Encoder
from .second import SecondEncoder, SecondEncoderConfig
from .set_abstraction import SetAbstraction, SetAbstractionConfig


@dataclass(frozen=True, kw_only=True)
class PvRcnnEncoderConfig:
    """Everything that shapes the vehicle half; defaults are the values of OpenPCDet's `kitti_models/pv_rcnn.yaml`.

    The encoder's fingerprint covers all of it, names included.
    """

    voxels: SecondEncoderConfig
    """The sparse backbone, which is SECOND's encoder."""
    keypoints: int = 2048
    """Maximum number of keypoints per scene. Fewer make smaller scenes."""
    keypoint_source: Literal["voxel_centers", "raw_points"] = "voxel_centers"
    """Where keypoints lie. "raw_points" compares with OpenPCDet only: such keypoints are points of the scan, so they never leave a
    vehicle."""
    raw_points: SetAbstractionConfig | None = SetAbstractionConfig(channels=(16, 16), radii=(0.4, 0.8), limits=(16, 16))
    """What keypoints gather from the points of the scan; None leaves it out."""
    conv1: SetAbstractionConfig | None = SetAbstractionConfig(channels=(16, 16), radii=(0.4, 0.8), limits=(16, 16))
    """What keypoints gather from the voxels after conv1 (stride 1); None leaves it out, which saves time."""
    conv2: SetAbstractionConfig | None = SetAbstractionConfig(channels=(32, 32), radii=(0.8, 1.2), limits=(16, 32))
    """The same after conv2 (stride 2)."""
    conv3: SetAbstractionConfig | None = SetAbstractionConfig(channels=(64, 64), radii=(1.2, 2.4), limits=(16, 32))
    """The same after conv3 (stride 4)."""
    conv4: SetAbstractionConfig | None = SetAbstractionConfig(channels=(64, 64), radii=(2.4, 4.8), limits=(16, 32))
    """The same after conv4 (stride 8)."""
    keypoint_stride: int = field(default=1, metadata=ADDED_LATER)
    """Input voxels along each side of the cells that keypoints stand for. At 1 the keypoints of a scene are a thinned scan. Larger
    cells say less about where points lie. Ignored for "raw_points"."""
    bev_map: bool = field(default=True, metadata=ADDED_LATER)
    """Whether keypoints carry the BEV map under them. Its values follow from the cells of the same scene: where this is False, set
    `bev_map` of the decoder, which computes them, and scenes are smaller."""

    def __post_init__(self) -> None:
        require_counts("PvRcnnEncoderConfig", most=1_000_000, keypoints=self.keypoints)
        require_counts("PvRcnnEncoderConfig", most=64, keypoint_stride=self.keypoint_stride)
        if not self.bev_map and not any((self.raw_points, *self.stages)):
            raise InvalidInput(
                "keypoints need features: give PvRcnnEncoderConfig one of raw_points and conv1 to conv4, or bev_map"
            )

    @property
    def grid(self) -> VoxelGrid:
        """Space and voxel size of the input."""
        return self.voxels.grid

    @property
    def stages(self) -> tuple[SetAbstractionConfig | None, ...]:
        """What keypoints gather from the voxels after conv1 to conv4; stage k has a stride of 2 ** k voxels."""
        return (self.conv1, self.conv2, self.conv3, self.conv4)

    def build(self) -> PvRcnnEncoder:
        """Make the encoder with fresh weights, drawn from torch's global generator.

        Returns:
            The encoder, in training mode.
        """
        return PvRcnnEncoder(self)


@dataclass(frozen=True, kw_only=True)
class NeighborSource:
    """Points of a batch that keypoints gather features from, the scenes in order."""

    xyz: Tensor
    """(N, 3) positions in meters."""
    features: Tensor
    """(N, C) features."""
    starts: tuple[int, ...]
    """B + 1 bounds of the scenes in the rows."""


class PvRcnnEncoder(Encoder):
    """Points to voxels and keypoints at the cut. Never rename this class or its modules: fingerprints and files hold the names."""

    config: PvRcnnEncoderConfig
    """The configuration that built this encoder."""
    openpcdet_parts: ClassVar[Mapping[str, str]] = {
        "second.sparse_backbone": "backbone_3d",
        "stage_abstractions": "pfe.SA_layers",
        "raw_abstraction": "pfe.SA_rawpoints",
    }
    """The submodules, each with its name in OpenPCDet's weights."""

    def __init__(self, config: PvRcnnEncoderConfig) -> None:
        """Make the layers with fresh weights.

        Args:
            config: sizes and settings.
        """
        super().__init__()
        self.config = config
        self.second = SecondEncoder(config.voxels)
        channels, cut = config.voxels.channels, self.second.spec
        self.raw_abstraction: SetAbstraction | None = None
        if config.raw_points is not None:
            self.raw_abstraction = SetAbstraction(len(config.voxels.point_features), config.raw_points)
        # Stages of the backbone that are used: place among its outputs, voxel stride, and what gathers from it.
        stages = [(k, 2**k, c) for k, c in enumerate(config.stages) if c]
        self._stages = [(k, stride) for k, stride, _ in stages]
        self.stage_abstractions = nn.ModuleList(SetAbstraction(channels[k], c) for k, _, c in stages)
        self.spec = replace(
            cut,
            keypoints=KeypointSpec(
                count=config.keypoints,
                channels=max(end for _, end in self.upload_channels().values()),
                source=config.keypoint_source,
            ),
        )

    @property
    def sends_fine_balls(self) -> bool:
        """True where keypoints gather from raw points or from the voxels after conv1 or conv2 (docs/privacy.md)."""
        return any((self.config.raw_points, self.config.conv1, self.config.conv2))

    def upload_channels(self) -> dict[str, tuple[int, int]]:
        """List which channels of a keypoint come from what.

        Returns:
            First channel and end of each part, in order: "bev", "raw_points", "conv1" to "conv4", those that there are.
        """
        c, cut = self.config, self.second.spec
        balls = {"raw_points": c.raw_points, "conv1": c.conv1, "conv2": c.conv2, "conv3": c.conv3, "conv4": c.conv4}
        sizes = {"bev": cut.channels * cut.shape[0]} if c.bev_map else {}
        sizes |= {name: ball.out_channels for name, ball in balls.items() if ball is not None}
        ends = list(accumulate(sizes.values()))
        return {name: (end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}

    def voxelize(self, points: Sequence[PointCloud]) -> SparseVoxels:
        """Average the points of each voxel, the same as SECOND's encoder.

        Args:
            points: one scan per scene, in the shifted frame.

        Returns:
            Occupied voxels ascending in (batch, z, y, x), because balls take their first neighbors in row order, and the counts of each
            scan.

        Raises:
            InvalidInput: There is no scan, or a scan lacks point features that the encoder reads.
        """
        return self.second.voxelize(points).sorted()

    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        """Run the sparse backbone and gather features around keypoints.

        Args:
            points: the scans that `voxels` were made from.
            voxels: what `voxelize` returned.

        Returns:
            Features at the cut: the voxels and the keypoints.
        """
        stages = self.second.sparse_backbone.stages(voxels)
        raw = self.raw_source(points)
        xyz, starts = self.sample(raw, voxels)
        return CutFeatures(voxels=stages[-1], spec=self.spec, keypoints=self.gather(xyz, starts, raw, stages))

    def gather(self, xyz: Tensor, starts: tuple[int, ...], raw: NeighborSource, stages: Sequence[SparseVoxels]) -> Keypoints:
        """Gather the features of keypoints from the map at the cut, the points of the scan, and the backbone's stages.

        Args:
            xyz: (K, 3) positions of the keypoints in meters.
            starts: B + 1 bounds of the scenes in the rows of `xyz`.
            raw: the points of the scans.
            stages: outputs of the backbone's stages.

        Returns:
            The keypoints with their features.
        """
        parts = [self._bev_features(stages[-1], xyz, starts)] if self.config.bev_map else []
        parts += [abstraction(xyz, starts, s.xyz, s.starts, s.features) for abstraction, s in self.sources(raw, stages)]
        return Keypoints(xyz=xyz, features=torch.cat(parts, 1), starts=starts)

    def sources(self, raw: NeighborSource, stages: Sequence[SparseVoxels]) -> list[tuple[SetAbstraction, NeighborSource]]:
        """List what keypoints gather from.

        Args:
            raw: the points of the scans.
            stages: outputs of the backbone's stages.

        Returns:
            Each source with its set abstraction, in the order of their channels.
        """
        found = [] if self.raw_abstraction is None else [(self.raw_abstraction, raw)]
        for (stage, stride), abstraction in zip(self._stages, self.stage_abstractions, strict=True):
            voxels = stages[stage]
            centers = cell_centers(voxels.coords[:, 1:], self.spec.grid, stride)
            found.append(
                (cast(SetAbstraction, abstraction), NeighborSource(xyz=centers, features=voxels.features, starts=voxels.starts()))
            )
        return found

    def raw_source(self, points: Sequence[PointCloud]) -> NeighborSource:
        """Take the points that lie in the range in BEV, in file order; the same as OpenPCDet, z is not tested.

        Args:
            points: the scans of a batch.

        Returns:
            Their points with the point features that the encoder reads.

        Raises:
            InvalidInput: A scan lacks point features that the encoder reads.
        """
        x0, y0, _, x1, y1, _ = self.spec.grid.range
        clouds, starts = [], [0]
        for cloud in points:
            columns = self.second.columns(cloud)
            x, y = columns[:, 0], columns[:, 1]
            clouds.append(columns[(x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)])
            starts.append(starts[-1] + len(clouds[-1]))
        columns = torch.cat(clouds)
        return NeighborSource(xyz=columns[:, :3].contiguous(), features=columns[:, 3:], starts=tuple(starts))

    def sample(self, raw: NeighborSource, voxels: SparseVoxels) -> tuple[Tensor, tuple[int, ...]]:
        """Choose keypoints by farthest point sampling.

        Args:
            raw: the points of the scans.
            voxels: the input voxels.

        Returns:
            (K, 3) positions in meters, and B + 1 bounds of the scenes in the rows. A scene with fewer candidates than
            `config.keypoints` has fewer keypoints.
        """
        if self.config.keypoint_source == "raw_points":
            xyz, starts = raw.xyz, raw.starts
        else:
            voxels = coarse_cells(voxels, self.config.keypoint_stride, self.spec.grid)
            xyz, starts = cell_centers(voxels.coords[:, 1:], self.spec.grid), voxels.starts()
        rows, starts = farthest_point_sample(xyz, starts, self.config.keypoints)
        return xyz[rows], starts

    def _bev_features(self, cut: SparseVoxels, xyz: Tensor, starts: tuple[int, ...]) -> Tensor:
        """The bird's-eye-view map at the cut under each keypoint."""
        return bev_under(xyz, starts, cut, self.spec)


def coarse_cells(voxels: SparseVoxels, stride: int, grid: VoxelGrid) -> SparseVoxels:
    """Find the occupied cells of a coarser grid, each as the voxel in its middle.

    Args:
        voxels: occupied voxels of the input grid, sorted.
        stride: voxels along each side of a cell; 1 gives `voxels` back.
        grid: the input grid. The cells at its end may be cut off, and then the last voxel stands for the middle.

    Returns:
        One voxel per occupied cell without features, sorted.
    """
    if stride == 1:
        return voxels
    coords = voxels.coords.clone()
    coords[:, 1:] = torch.div(coords[:, 1:], stride, rounding_mode="floor") * stride + stride // 2
    coords = coords.unique(dim=0)
    coords[:, 1:] = coords[:, 1:].minimum(coords.new_tensor(grid.shape) - 1)
    return replace(voxels, coords=coords, features=voxels.features.new_zeros(len(coords), 0))


def bev_under(xyz: Tensor, starts: tuple[int, ...], cut: SparseVoxels, spec: CutSpec) -> Tensor:
    """Interpolate the BEV map at the cut under keypoints.

    Args:
        xyz: (K, 3) positions of the keypoints in meters.
        starts: B + 1 bounds of the scenes in the rows of `xyz`.
        cut: the cells at the cut.
        spec: the cut.

    Returns:
        (K, C * Z) features, differentiable in those of the cells.
    """
    position = (xyz[:, :2] - xyz.new_tensor(spec.grid.range[:2])) / xyz.new_tensor(spec.cell_size())
    return bev_interpolate(cut.features, cut.coords, cut.shape, position, starts, cut.batch_size)
