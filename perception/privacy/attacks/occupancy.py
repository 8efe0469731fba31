"""The strong attack on geometry: classify which voxels held a point, level by level, with a network trained on the attacker's own scans.

A server, and everybody who has the encoder file, can make pairs of scans and uploads and train this network. It reads everything that
was sent: cells, features, keypoints. The same network that is shown less says what the rest is worth: `sees="coordinates"` blanks the
features, and `sees="nothing"` is shown no upload at all, so that it gives what is typical of such streets and sensors.

Besides a rebuilt scan the attack gives the code length of a scan, in bits for each occupied voxel: what the scan costs to store for
somebody who has the upload. It needs no threshold. Read next: `occupancy_decoder.py`, the network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts
from ....core.features import CutFeatures
from ....core.structures import PointCloud
from ..frames import AuditFrame, Rebuilt, inside_grid
from ..geometry_metrics import harmonic_mean
from .coordinates import voxel_of_points
from .occupancy_decoder import DecoderSize, LevelGuess, OccupancyDecoder
from .occupancy_points import neighbors, worth_of_points
from .occupancy_tree import OccupancyTree, row_of

Sees = Literal["everything", "coordinates", "nothing"]
RECALL_WEIGHTS = (0.1, 0.25, 0.5, 0.8, 1.2)
"""Recall weights that an attacker tries."""
CALIBRATION_REBUILDS = 4
"""Frames on which they are tried; each costs seconds."""
MOST_CANDIDATES = 24
"""Candidates for each voxel that is expected to be occupied, the likeliest ones. More cost memory and add little."""


@dataclass(frozen=True, kw_only=True)
class OccupancyConfig:
    """How the occupancy attack is trained and used."""

    size: DecoderSize = DecoderSize()
    """How large the network is."""
    sees: Sees = "everything"
    """What the network is shown of an upload."""
    steps: int = 800
    """Optimizer steps. More steps and more frames make a stronger attack."""
    batch: int = 1
    """Frames per step. With one frame and twice as many steps the attack is stronger than with two, for the same work."""
    lr: float = 0.006
    """Highest learning rate."""
    focal_gamma: float = 0.5
    """How much less a node counts that is already classified well. 0 is cross entropy, the code length itself."""
    inside_weight: float = 0.1
    """Weight of the loss of places and numbers of points inside voxels."""
    keep: float = 0.02
    """Nodes with a lower probability are given up. A lower number costs time and finds more."""
    reach: float = 0.2
    """Distance in meters within which a claimed point should be right; points are ordered for it."""
    recall_weight: float | None = None
    """How much newly found points count against the chance to be right when points are ordered. None chooses it on the frames of the
    calibration: an attacker who knows little does better with the surest points."""
    calibration_share: float = 0.1
    """Share of the attacker's frames, the last ones, that the network does not learn from. On them probabilities are set right."""
    seed: int = 0
    """Decides the first weights and the order of the frames."""

    def __post_init__(self) -> None:
        require_counts("OccupancyConfig", most=10_000_000, steps=self.steps, batch=self.batch)
        require(self.sees in ("everything", "coordinates", "nothing"), f"OccupancyConfig.sees is unknown: {self.sees!r}")
        require(
            0 < self.keep < 1
            and 0 <= self.calibration_share < 1
            and self.lr > 0
            and min(self.focal_gamma, self.inside_weight) >= 0,
            f"OccupancyConfig needs keep between 0 and 1, a positive reach, calibration_share from 0 to below 1, a positive lr and weights of at least 0, "
            f"found {self}",
        )


class OccupancyAttack:
    """Occupancy classification with a sparse decoder."""

    def __init__(self, config: OccupancyConfig | None = None) -> None:
        """Choose the settings.

        Args:
            config: Settings; None takes the defaults.
        """
        self.config = config or OccupancyConfig()
        self.seconds = 0.0
        """Duration of the last training."""
        self.losses: list[float] = []
        """Mean loss of every twentieth of the last training."""
        self.recall_weight = 1.0
        """The recall weight that was chosen, see `OccupancyConfig`."""
        self._decoder: OccupancyDecoder | None = None

    @property
    def decoder(self) -> OccupancyDecoder:
        """The trained network.

        Raises:
            InvalidInput: The attack was not trained.
        """
        if self._decoder is None:
            raise InvalidInput("the occupancy attack was not trained; call `train` with frames of the attacker first")
        return self._decoder

    def train(self, frames: Sequence[AuditFrame]) -> None:
        """Learn from frames whose scans the attacker knows.

        Args:
            frames: Frames of the attacker's own, all of one cut.

        Raises:
            InvalidInput: There is no frame.
        """
        if not frames:
            raise InvalidInput("the occupancy attack needs at least one frame; give the attacker frames of its own")
        start, c = time.perf_counter(), self.config
        examples = [_Example.of(f.upload, f.scan, c.sees) for f in frames]
        held_out = int(c.calibration_share * len(examples))
        learned, calibration = examples[: len(examples) - held_out], examples[len(examples) - held_out :]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            decoder = OccupancyDecoder(c.size, examples[0].upload.spec)
        decoder.fit_scale([e.upload for e in learned])
        self._decoder, self.losses = decoder.train(), []
        self._optimize(learned)
        decoder.eval()
        self._calibrate(calibration or learned)
        self.recall_weight = self._best_recall_weight(calibration or learned) if c.recall_weight is None else c.recall_weight
        self.seconds = time.perf_counter() - start

    def _optimize(self, examples: Sequence[_Example]) -> None:
        c, decoder, recent = self.config, self.decoder, []
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=c.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, c.lr, total_steps=c.steps, pct_start=0.2)
        for step, batch in enumerate(_batches(examples, c)):
            loss = self._loss(batch, known=step % 3 == 0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            recent.append(loss.item())
            if len(recent) >= c.steps / 20 or step + 1 == c.steps:
                self.losses.append(sum(recent) / len(recent))
                recent = []

    def _loss(self, batch: _Example, *, known: bool) -> Tensor:
        """Focal loss of all levels, each divided by its number of occupied nodes, and the loss of what is inside voxels."""
        c, tree = self.config, self.decoder.tree
        truth = tree.truth(batch.voxels)
        total = torch.zeros(())
        guesses = self._guesses(batch, truth, known=known, most=2)
        for level, (guess, target) in guesses.items():
            total = total + focal_loss(guess.logit, target, c.focal_gamma).sum() / max(1, len(truth[level]))
        return total + c.inside_weight * _inside_loss(tree, batch, truth[0], guesses[0][0])

    def _guesses(
        self, example: _Example, truth: list[Tensor], *, known: bool, most: int | None = None
    ) -> dict[int, tuple[LevelGuess, Tensor]]:
        """For each level the guess and which candidates are occupied, as 0 and 1.

        The kept nodes are the occupied ones where they are known. Otherwise they are the likeliest ones, at most `most` times as many.
        """
        tree = self.decoder.tree

        def keep(level: int, guess: LevelGuess) -> Tensor:
            if known:
                return _occupied(tree, truth, level, guess)
            likely = guess.probability > self.config.keep
            if most is None or int(likely.sum()) <= (limit := most * len(truth[level]) + 64):
                return likely
            return torch.zeros_like(likely).index_fill(0, guess.logit.detach().topk(limit).indices, True)

        guesses = self.decoder(example.upload, keep, known=known)
        levels = range(tree.levels, -1, -1)
        return {k: (guess, _occupied(tree, truth, k, guess).float()) for k, guess in zip(levels, guesses, strict=True)}

    def _calibrate(self, examples: Sequence[_Example]) -> None:
        """Scale and shift the logits of each level so that they are probabilities on frames that the network did not learn from."""
        tree, calibration = self.decoder.tree, []
        for known in (True, False):
            logits: list[list[Tensor]] = [[] for _ in range(tree.levels + 1)]
            targets: list[list[Tensor]] = [[] for _ in range(tree.levels + 1)]
            with torch.no_grad():
                for example in examples:
                    for level, (guess, target) in self._guesses(example, tree.truth(example.voxels), known=known, most=4).items():
                        logits[level].append(guess.logit)
                        targets[level].append(target)
            calibration.append(torch.stack([_platt(torch.cat(x), torch.cat(y)) for x, y in zip(logits, targets, strict=True)]))
        self.decoder.calibration = torch.stack(calibration)

    @torch.no_grad()
    def rebuild(self, upload: CutFeatures) -> Rebuilt:
        """Rebuild a scan.

        Args:
            upload: What left a vehicle, a batch of one.

        Returns:
            One point in each voxel that may be occupied. The score is its worth by `worth_of_points`, between 0 and a few.
        """
        xyz, *chances = self._candidates(_shown(upload, self.config.sees))
        return Rebuilt(xyz=xyz, score=worth_of_points(*chances, recall_weight=self.recall_weight))

    def _candidates(self, shown: CutFeatures) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points x, y, z of voxels that may be occupied, how likely they are, what each counts, and which are within reach."""
        c, tree = self.config, self.decoder.tree
        voxels = self.decoder(shown, lambda level, guess: guess.probability > c.keep, known=False)[-1]
        chosen = voxels.probability * (voxels.probability > c.keep)
        chosen = chosen.topk(min(int((chosen > 0).sum()), int(MOST_CANDIDATES * chosen.sum()) + 64)).indices
        chosen = chosen[tree.keys(voxels.nodes[chosen], 0).argsort()]
        nodes = voxels.nodes[chosen]
        inside = torch.zeros(len(chosen), 4) if voxels.inside is None else voxels.inside[chosen]
        xyz = tree.centers(nodes, 0) + inside[:, :3].clamp(-0.5, 0.5) * torch.tensor(tree.grid.voxel_size)
        # The square root of the number of points: between a score over points and one over voxels.
        return xyz, voxels.probability[chosen], (inside[:, 3] / 2).clamp(0, 3).exp(), neighbors(nodes, tree, c.reach)

    @torch.no_grad()
    def _best_recall_weight(self, examples: Sequence[_Example]) -> float:
        """The recall weight with the best F-score, as many and twice as many points as occupied voxels being claimed."""
        tree, totals = self.decoder.tree, [0.0] * len(RECALL_WEIGHTS)
        size = torch.tensor(tree.grid.voxel_size)
        for example in examples[:CALIBRATION_REBUILDS]:
            xyz, *chances = self._candidates(example.upload)
            truth, count = tree.centers(example.voxels, 0) + example.inside[:, :3] * size, example.inside[:, 3].exp()
            for k, weight in enumerate(RECALL_WEIGHTS):
                order = worth_of_points(*chances, recall_weight=weight).argsort(descending=True)
                for share in (1, 2):
                    totals[k] += _f_score(xyz[order[: share * len(truth)]], truth, count, self.config.reach)
        return RECALL_WEIGHTS[max(range(len(totals)), key=totals.__getitem__)]

    @torch.no_grad()
    def code_length(self, upload: CutFeatures, scan: PointCloud) -> float:
        """Count the bits that a scan costs for somebody who has the upload and this network.

        Args:
            upload: What left a vehicle, a batch of one.
            scan: The true scan in the shifted frame.

        Returns:
            Bits for each occupied voxel of the scan. A scan without a point in the grid costs all its bits once.
        """
        example = _Example.of(upload, scan, self.config.sees)
        bits = 0.0
        for guess, target in self._guesses(example, self.decoder.tree.truth(example.voxels), known=True).values():
            bits += nn.functional.binary_cross_entropy_with_logits(guess.logit.double(), target.double(), reduction="sum").item()
        return bits / math.log(2) / max(1, len(example.voxels))


def focal_loss(logit: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Cross entropy of yes and no in which easy cases count less (Lin et al., 2017), without the factor alpha.

    Args:
        logit: (M,) logits.
        target: (M,) 0 or 1.
        gamma: 0 is cross entropy; higher numbers weigh easy cases less.

    Returns:
        (M,) losses.
    """
    loss = nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
    return loss if gamma == 0 else loss * (1 - (-loss).exp()).clamp(min=1e-6) ** gamma


@dataclass(frozen=True, kw_only=True)
class _Example:
    """What the network is shown, and the truth, of one or several frames."""

    upload: CutFeatures
    voxels: Tensor
    """(M, 4) int32 scene, z, y, x of the occupied voxels."""
    inside: Tensor
    """(M, 4) mean place x, y, z of the points of a voxel, in voxels from its center, and the logarithm of their number."""

    @classmethod
    def of(cls, upload: CutFeatures, scan: PointCloud, sees: Sees) -> _Example:
        grid, tree = upload.spec.grid, OccupancyTree.of(upload.spec)
        xyz = inside_grid(scan, grid).xyz
        of_points = nn.functional.pad(voxel_of_points(xyz, grid), (1, 0))
        voxels, row = torch.unique(of_points, dim=0, return_inverse=True)
        count = torch.bincount(row, minlength=len(voxels))[:, None]
        mean = torch.zeros(len(voxels), 3).index_add(0, row, xyz) / count
        places = (mean - tree.centers(voxels, 0)) / torch.tensor(grid.voxel_size)
        return cls(upload=_shown(upload, sees), voxels=voxels, inside=torch.cat([places, count.float().log()], 1))

    @staticmethod
    def collate(parts: Sequence[_Example]) -> _Example:
        voxels = torch.cat([p.voxels + torch.tensor([k, 0, 0, 0], dtype=torch.int32) for k, p in enumerate(parts)])
        upload = CutFeatures.collate([p.upload for p in parts])
        return _Example(upload=upload, voxels=voxels, inside=torch.cat([p.inside for p in parts]))


def _shown(upload: CutFeatures, sees: Sees) -> CutFeatures:
    voxels, keypoints = upload.voxels, upload.keypoints
    if sees == "everything":
        return upload
    if sees == "nothing":
        voxels = replace(voxels, features=voxels.features[:0], coords=voxels.coords[:0])
        if keypoints is not None:
            starts = (0,) * (keypoints.batch_size + 1)
            keypoints = replace(keypoints, xyz=keypoints.xyz[:0], features=keypoints.features[:0], starts=starts)
    blank = replace(voxels, features=torch.zeros_like(voxels.features))
    return replace(
        upload, voxels=blank, keypoints=keypoints and replace(keypoints, features=torch.zeros_like(keypoints.features))
    )


def _occupied(tree: OccupancyTree, truth: list[Tensor], level: int, guess: LevelGuess) -> Tensor:
    """(M,) bool: which candidates hold a point."""
    return row_of(truth[level], tree.keys(guess.nodes, level)) >= 0


def _inside_loss(tree: OccupancyTree, batch: _Example, truth: Tensor, guess: LevelGuess) -> Tensor:
    if guess.inside is None:
        return torch.zeros(())
    row = row_of(truth, tree.keys(guess.nodes, 0))
    found = row >= 0  # `truth` ascends like `batch.voxels`
    if not bool(found.any()):
        return torch.zeros(())
    return nn.functional.smooth_l1_loss(guess.inside[found], batch.inside[row[found]], beta=0.1) * 4


def _batches(examples: Sequence[_Example], c: OccupancyConfig) -> Iterator[_Example]:
    """`steps` batches; every frame comes once before any comes twice."""
    generator = torch.Generator().manual_seed(c.seed)
    waiting: list[int] = []
    for _ in range(c.steps):
        while len(waiting) < min(c.batch, len(examples)):
            waiting += torch.randperm(len(examples), generator=generator).tolist()
        chosen, waiting = waiting[: c.batch], waiting[c.batch :]
        yield _Example.collate([examples[k] for k in chosen])


def _f_score(claimed: Tensor, truth: Tensor, count: Tensor, reach: float) -> float:
    """F-score within `reach` meters; each true point counts `count` times in the recall."""
    if not len(claimed) or not len(truth):
        return 0.0
    precision = float((cKDTree(truth).query(claimed)[0] <= reach).mean())
    found = torch.from_numpy(cKDTree(claimed).query(truth)[0] <= reach)
    return harmonic_mean(precision, float(count[found].sum() / count.sum()))


def _platt(logit: Tensor, target: Tensor) -> Tensor:
    """(2,) factor and shift that make logits probabilities, by Newton's method with a small pull towards no change."""
    x, y = logit.double(), target.double()
    w = torch.tensor([1.0, 0.0], dtype=torch.float64)
    design = torch.stack([x, torch.ones_like(x)], 1)
    for _ in range(20):
        p = (design @ w).sigmoid()
        pull = w - w.new_tensor([1.0, 0.0])
        slope = design.t() @ (p - y) + pull
        curve = design.t() @ (design * (p * (1 - p))[:, None]) + torch.eye(2, dtype=torch.float64)
        w = w - torch.linalg.solve(curve, slope)
    return w.float()
