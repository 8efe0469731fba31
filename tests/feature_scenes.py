"""Scenes whose features are random numbers, and objects cut out of them, for the tests of F-GT. No network is needed.

Cells are 1 m wide and their centers lie at i + 1/16 m. `full_scene(0)` is a scene with every cell; `cut(0, box(6.0, 1.0))` is the
object of that box in it.
"""

from dataclasses import replace

import torch

from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid
from upcycle3d.core.features import CutFeatures, Keypoints, SparseVoxels
from upcycle3d.core.structures import Labels
from upcycle3d.perception.server.feature_gt import FeatureObject, cut_objects
from upcycle3d.perception.server.upcycle_config import FeatureGtConfig

GRID = VoxelGrid(range=(0.0, -8.0, -1.0, 16.0, 8.0, 3.0), voxel_size=(0.125, 0.125, 0.125))
SPEC = CutSpec(layer="cut", channels=3, stride=(16, 8, 8), shape=(2, 16, 16), grid=GRID)  # cells of 1 m, centers at i + 1/16
CONFIG = FeatureGtConfig(max_objects=(5,))


def box(x: float, y: float, yaw: float = 0.0, size: tuple[float, float, float] = (4.0, 2.0, 1.5)) -> list[float]:
    """A box on the plane z = 0."""
    return [x, y, 0.0, *size, yaw]


def labels(*boxes: list[float], points: int = 50, **options) -> Labels:
    """Labels of class 0 with these boxes; `options` are those of `Labels.make`."""
    data = torch.tensor(boxes).view(-1, 7)
    counts = torch.full((len(data),), points, dtype=torch.int64)
    return Labels.make(data, torch.zeros(len(data), dtype=torch.int64), num_points=counts, **options)


def full_scene(seed: int, share: float = 1.0, batch_size: int = 1) -> CutFeatures:
    """A scene whose cells are active with probability `share`, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(512, generator=generator)[: int(512 * share)]
    coords = torch.stack([cells * 0, cells // 256, cells // 16 % 16, cells % 16], 1).int()
    voxels = SparseVoxels(
        features=torch.randn(len(cells), 3, generator=generator), coords=coords, shape=SPEC.shape, batch_size=batch_size
    )
    return CutFeatures(voxels=voxels, spec=SPEC)


def cut(seed: int, *boxes: list[float], share: float = 1.0) -> list[FeatureObject]:
    """The objects of these boxes in `full_scene(seed, share)`."""
    return cut_objects(full_scene(seed, share), labels(*boxes), CONFIG)


KEYPOINT_SPEC = replace(SPEC, keypoints=KeypointSpec(count=40, channels=2))


def with_keypoints(scene: CutFeatures, xyz: torch.Tensor, seed: int = 0) -> CutFeatures:
    """The scene with keypoints (K, 3) at these places, and random features."""
    features = torch.randn(len(xyz), 2, generator=torch.Generator().manual_seed(seed))
    keypoints = Keypoints(xyz=xyz, features=features, starts=(0, len(xyz)))
    return CutFeatures(voxels=scene.voxels, spec=KEYPOINT_SPEC, keypoints=keypoints)


def spread(count: int, seed: int) -> torch.Tensor:
    """`count` places in the scene, (count, 3) x, y, z in m."""
    places = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))
    return places * torch.tensor([16.0, 16, 1]) - torch.tensor([0, 8, 0.5])
