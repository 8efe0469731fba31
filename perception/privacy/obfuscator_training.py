"""Trains a learned obfuscator: what it sends should serve the detector and fail an attacker.

    features ─ sender ─ noise ─┬─ receiver ─ the detector's own decoder, frozen ─ outputs like those of the true features
                               └─ adversary ─ which voxels of each cell held points?   (trained at the same time, and fought)

The adversary is small: it looks at each cell and its neighbors and names the occupied voxels of the cell in one step, so that it keeps
up with every step of the sender. It is weaker than the occupancy attack of the audit, which starts afresh on what is sent and alone
says what the obfuscator is worth.

Read next: `perception/models/defences/obfuscator.py`, the network that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.cut import CutSpec, cell_index
from ...core.errors import require, require_counts, require_numbers
from ...core.features import CutFeatures, SparseVoxels
from ...core.structures import PointCloud
from ...ops.rulebook import submanifold_rulebook
from ...ops.sparse_conv import SubmanifoldConv3d
from ..models.defences.obfuscator import Obfuscator
from ..models.detector import Detector
from .frames import inside_grid
from .true_scan import occupied_cells


@dataclass(frozen=True, kw_only=True)
class ObfuscatorTraining:
    """How an obfuscator is trained."""

    steps: int = 300
    """Optimizer steps."""
    batch: int = 2
    """Scenes per step."""
    adversary_weight: float = 1.0
    """How much fighting the adversary counts beside serving the detector. Raise it to give away less and lose more AP."""
    lr: float = 2e-3
    """Highest learning rate of sender and receiver; that of the adversary is the same."""

    def __post_init__(self) -> None:
        require_counts("ObfuscatorTraining", most=10_000_000, steps=self.steps, batch=self.batch)
        require_numbers("ObfuscatorTraining", least=0, most=1e6, adversary_weight=self.adversary_weight, lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class ObfuscatorReport:
    """How the training ended: means over its last tenth."""

    detector_loss: float
    """Distance of the detector's outputs on restored features from those on true ones."""
    adversary_bits: float
    """Bits that the adversary needs for the voxels of a cell."""
    blind_bits: float
    """Bits that the mean occupancy of the voxels of a cell needs: what an adversary without features reaches."""


def train_obfuscator(
    defence: Obfuscator,
    detector: Detector,
    scenes: Sequence[tuple[CutFeatures, PointCloud]],
    training: ObfuscatorTraining,
    *,
    seed: int,
) -> ObfuscatorReport:
    """Train an obfuscator in place.

    Args:
        defence: The obfuscator with fresh weights.
        detector: Its decoder judges what is restored. It is not changed.
        scenes: Features as the obfuscator is given them, each a batch of one, with the scan they were made from.
        training: Steps and weights.
        seed: Every random draw.

    Returns:
        How it ended.

    Raises:
        InvalidInput: There is no scene.
    """
    require(len(scenes) > 0, "an obfuscator needs scenes to learn from, found none")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    spec = defence.spec
    _scale_to(defence, scenes)
    adversary = _Adversary(spec, defence.config.channels)
    with torch.no_grad():
        truths = [_occupancy(features, scan) for features, scan in scenes]
    everything = torch.cat(truths)
    adversary.set_rate(everything.float().mean(0))
    blind = _bits(adversary.rate.expand(len(everything), -1), everything)
    detector.eval()
    own = torch.optim.Adam(defence.parameters(), lr=training.lr)
    other = torch.optim.Adam(adversary.parameters(), lr=training.lr)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=training.lr, total_steps=training.steps + 1) for o in (own, other)]
    losses: list[tuple[float, float]] = []
    for _ in range(training.steps):
        rows = rng.integers(0, len(scenes), training.batch).tolist()
        batch, truth = CutFeatures.collate([scenes[r][0] for r in rows]), torch.cat([truths[r] for r in rows])
        sent = defence.send(batch, rng)
        bits = _bits(adversary(sent.voxels.coords, sent.voxels.features.detach(), spec), truth)
        other.zero_grad()
        bits.backward()
        other.step()
        serves = _serves(detector, defence.restore(sent), batch)
        told = blind - _bits(adversary(sent.voxels.coords, sent.voxels.features, spec), truth)
        own.zero_grad()
        (serves + training.adversary_weight * torch.relu(told) / blind).backward()
        own.step()
        for schedule in schedules:
            schedule.step()
        losses.append((float(serves.detach()), float(bits.detach())))
    tail = np.array(losses[-max(1, len(losses) // 10) :]).mean(0)
    return ObfuscatorReport(detector_loss=float(tail[0]), adversary_bits=float(tail[1]), blind_bits=float(blind))


def _serves(detector: Detector, restored: CutFeatures, true: CutFeatures) -> Tensor:
    """How far the detector's outputs on restored features are from those on the true ones."""
    with torch.no_grad():
        wanted = detector.decode(true).dense
    found = detector.decode(restored).dense
    score, target = found.class_logits.sigmoid(), wanted.class_logits.sigmoid()
    sure = target.amax(-1, keepdim=True) > 0.1
    weight = 0.01 + target
    scores = (weight * (score - target).square()).sum() / target.sum().clamp_min(1)
    boxes = (F.smooth_l1_loss(found.box_codes, wanted.box_codes, reduction="none") * sure).sum() / sure.sum().clamp_min(1)
    loss = 10 * scores + boxes + _relative(restored.voxels.features, true.voxels.features)
    if restored.keypoints is not None and true.keypoints is not None:
        loss = loss + _relative(restored.keypoints.features, true.keypoints.features)
    return cast(Tensor, loss)


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error as a share of the squares."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-6)


def _bits(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean bits per cell."""
    loss = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="sum")
    return loss / max(1, len(truth)) / float(np.log(2))


def _occupancy(features: CutFeatures, scan: PointCloud) -> Tensor:
    """(M, V) bool: which of the V input voxels of each cell hold a point."""
    spec = features.spec
    points = inside_grid(scan, spec.grid).xyz.double().numpy()
    voxels = torch.from_numpy(occupied_cells(points, spec.grid)).flip(1)  # z, y, x
    stride = torch.tensor(spec.stride)
    cells, inside = torch.div(voxels, stride, rounding_mode="floor"), voxels % stride
    shape = spec.shape
    keep = (cells < torch.tensor(shape)).all(1)
    cells, inside = cells[keep], inside[keep]
    number = cell_index(cells, shape)
    own = cell_index(features.voxels.coords[:, 1:], shape)
    order = own.argsort()
    row = torch.searchsorted(own[order], number).clamp_max(max(0, len(own) - 1))
    found = torch.zeros(len(own), spec.stride[0] * spec.stride[1] * spec.stride[2], dtype=torch.bool)
    if len(own):
        hit = own[order][row] == number
        found[order[row[hit]], cell_index(inside[hit], spec.stride)] = True
    return found


def _scale_to(defence: Obfuscator, scenes: Sequence[tuple[CutFeatures, PointCloud]]) -> None:
    """Divide the first layers' weights by the spread of the channels, so that no channel drowns the others."""
    features = torch.cat([scene.voxels.features for scene, _ in scenes[:20]])
    pairs: list[tuple[nn.Module | None, Tensor]] = [(defence.sender, features)]
    keypoints = [scene.keypoints.features for scene, _ in scenes[:20] if scene.keypoints is not None]
    if keypoints:
        pairs.append((defence.keypoint_sender, torch.cat(keypoints)))
    for sender, values in pairs:
        if sender is not None and len(values) > 1:
            first = cast(nn.Linear, cast(nn.Sequential, sender)[0])
            spread = values.std(0)
            with torch.no_grad():  # a channel that hardly varies must not drive tanh to its ends
                first.weight.div_(spread.clamp_min(0.3 * float(spread.mean())).clamp_min(1e-12))


class _Adversary(nn.Module):
    """Names the occupied voxels of each cell from the features of the cell and of its neighbors."""

    def __init__(self, spec: CutSpec, channels: int) -> None:
        super().__init__()
        self.near = SubmanifoldConv3d(channels, 64, (3, 3, 3))
        self.hidden = nn.Linear(64, 128)
        self.out = nn.Linear(128, spec.stride[0] * spec.stride[1] * spec.stride[2])
        self.rate: Tensor
        self.register_buffer("rate", torch.zeros(self.out.out_features))

    def set_rate(self, rate: Tensor) -> None:
        """Begin with the mean occupancy."""
        clamped = rate.clamp(1e-4, 1 - 1e-4)
        self.rate.copy_((clamped / (1 - clamped)).log())
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            self.out.bias.zero_()

    def forward(self, coords: Tensor, features: Tensor, spec: CutSpec) -> Tensor:
        """(M, V) logits."""
        voxels = SparseVoxels(features=features, coords=coords, shape=spec.shape, batch_size=int(coords[:, 0].max()) + 1)
        same = submanifold_rulebook(voxels.coords, voxels.shape, voxels.batch_size, (3, 3, 3))
        x = F.relu(self.near(features, same))
        return cast(Tensor, self.out(F.relu(self.hidden(x))) + self.rate)
