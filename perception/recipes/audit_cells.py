"""Measures one cell of an audit: what is sent, or what one attack makes of it.

Read next: `perception/privacy/attacks/`, the attacks, and `perception/privacy/geometry_metrics.py`, the scores.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ...core.cut import cell_centers, cells_of_centers
from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...core.files import write_atomically
from ...core.rig import RigSpec
from ...core.smashed_scene import SmashedScene
from ..models.defences.cells import DecoyCells, DropCells
from ..models.defences.noise import RoundedFeatures
from ..models.defences.region import RegionUpload
from ..models.detector import Detector
from ..models.encoders.defended import DefendedEncoder
from ..models.encoders.encoder import Encoder
from ..models.encoders.fingerprint import encoder_fingerprint
from ..models.encoders.pv_rcnn import PvRcnnEncoder
from ..models.encoders.second import SecondEncoder
from ..privacy.attacks.attributes import AttributeLeak, attack_attributes
from ..privacy.attacks.coordinates import CellCenters, MeanOccupancy, occupied_voxels, voxel_centers
from ..privacy.attacks.exact_points import ExactPoints
from ..privacy.attacks.lone_voxels import LoneVoxels
from ..privacy.attacks.occupancy import OccupancyAttack, OccupancyConfig
from ..privacy.attacks.occupancy_decoder import DecoderSize
from ..privacy.attacks.people import PeopleLeak, attack_people
from ..privacy.attacks.point_regression import PointRegressionAttack, PointRegressionConfig
from ..privacy.detection_on_rebuilt import DetectionAp, detection_ap, rebuilt_scan
from ..privacy.exact_points import ExactPointScore, score_exact_points
from ..privacy.frames import AuditFrame, RebuildAttack, Rebuilt
from ..privacy.geometry_metrics import MATCHED, GeometryScores, choose_best, score_all
from ..privacy.noise_bound import noise_bound
from ..privacy.true_scan import RegionRules, TrueScan
from ..wire.codec import encode_scene

AttackName = Literal[
    "nothing", "cells", "regression", "chamfer", "coordinates", "occupancy", "voxels", "exact", "linkage", "attributes", "people"
]
"""`nothing`: the typical scan, no upload. `cells`: centers of the cells. `regression`: points regressed from features by squared error, the
weak attack of the first paper. `chamfer`: the same by Chamfer distance, which is not weak. `coordinates`: the
occupancy attack shown cells without features. `occupancy`: the occupancy attack. `voxels`: no attack, the voxel centers of the raw scan,
which bound what can be rebuilt. `exact`: single points computed. `linkage`: order and origin of a pile of uploads. `attributes`: intensity, class and size of objects.
`people`: finding pedestrians and their height."""

REBUILDING: tuple[AttackName, ...] = ("nothing", "cells", "regression", "chamfer", "coordinates", "occupancy", "voxels")
"""Attacks that rebuild a scan."""
WITHOUT_UPLOADS: tuple[AttackName, ...] = ("nothing", "voxels")
"""Those that look at no upload: their rows are the same for every setting, so they are measured once."""
BOUND_FRAMES = 3
"""Frames for which the bound of a noise is computed; each takes a second."""
DEVELOPMENT_SHARE = 0.1
"""Share of the attacker's frames, the last ones, on which thresholds are chosen."""


@dataclass(frozen=True, kw_only=True)
class SentMeasured:
    """What leaves the vehicle, per frame."""

    frames: int
    """Number of frames."""
    raw_bytes_per_frame: float
    """Bytes of the points in the grid as float32 columns."""
    bytes_per_frame: float
    """Bytes of an encoded scene."""
    cells_per_frame: float
    """Cells that are sent."""
    keypoints_per_frame: float
    """Keypoints that are sent."""
    encoder: str
    """Fingerprint of the encoder and its defences, without a rig."""
    noise_bound: float | None
    """Least root mean squared error in meters per coordinate of an unbiased attacker who places the points of the voxels
    (`noise_bound`); None where no noise proves one."""


@dataclass(frozen=True, kw_only=True)
class RebuildMeasured:
    """What an attack that rebuilds scans reached."""

    matched: GeometryScores
    """Scores of as many points as the truth has occupied voxels."""
    best: GeometryScores
    """Scores of the points above the threshold that is best on the attacker's own frames."""
    bits_per_voxel: float | None
    """What a true scan costs to store for somebody who has upload and attack, in bits for each occupied voxel; None for an attack
    that gives no probabilities."""
    ap: DetectionAp | None
    """What the detector finds in the rebuilt scans, at matched density; None without labels."""
    training_seconds: float
    """Duration of the attack's training."""


@dataclass(frozen=True, kw_only=True)
class ExactMeasured:
    """Single points that were computed to the centimeter."""

    raw_balls: ExactPointScore
    """From balls of raw points around keypoints. No claims where the encoder has none."""
    lone_voxels: ExactPointScore
    """From everything else that was sent: voxels without neighbors."""


@torch.no_grad()
def measure_sent(detector: Detector, frames: Sequence[AuditFrame], codec: str) -> SentMeasured:
    """Measure what leaves the vehicle.

    Args:
        detector: Its encoder made the uploads.
        frames: The frames.
        codec: How features are stored.

    Returns:
        Means over the frames.
    """
    fingerprint = encoder_fingerprint(detector.encoder, RigSpec())
    sizes = [len(encode_scene(_at_rest(frame.upload, codec, fingerprint))) for frame in frames]
    raw = [len(frame.scan) * 4 * (3 + frame.scan.features.shape[1]) for frame in frames]
    bounds = [bound for frame in frames[:BOUND_FRAMES] if (bound := noise_bound(detector.encoder, frame.scan)) is not None]
    finite = [bound for bound in bounds if math.isfinite(bound)]
    return SentMeasured(
        frames=len(frames),
        raw_bytes_per_frame=float(np.mean(raw)),
        bytes_per_frame=float(np.mean(sizes)),
        cells_per_frame=float(np.mean([len(f.upload.voxels.coords) for f in frames])),
        keypoints_per_frame=float(np.mean([0 if f.upload.keypoints is None else len(f.upload.keypoints.xyz) for f in frames])),
        encoder=fingerprint,
        noise_bound=float(np.sqrt(np.mean(np.square(finite)))) if finite else None,
    )


def _at_rest(upload: CutFeatures, codec: str, fingerprint: str) -> SmashedScene:
    cells, keypoints = upload.voxels.sorted(), upload.keypoints
    scene = SmashedScene(
        spec=upload.spec if keypoints is None else replace(upload.spec, keypoints=None),
        coords=cells.coords[:, 1:].contiguous(),
        features=cells.features,
        codec=codec,
        encoder_fingerprint=fingerprint,
        scene_id="0" * 32,
    )
    if keypoints is None:
        return scene
    places = cells_of_centers(keypoints.xyz, upload.spec.grid)
    return replace(scene, spec=upload.spec, keypoint_cells=places, keypoint_features=keypoints.features)


def rebuild_attack(name: AttackName, *, steps: int, size: DecoderSize, seed: int) -> RebuildAttack:
    """Make an attack that rebuilds scans.

    Args:
        name: Its name.
        steps: Optimizer steps of an attack that learns.
        size: Size of the network of the occupancy attack.
        seed: Every random draw.

    Returns:
        The attack, not trained.

    Raises:
        InvalidInput: The name is that of another kind of attack.
    """
    match name:
        case "nothing":
            return MeanOccupancy()
        case "cells":
            return CellCenters()
        case "regression":
            return PointRegressionAttack(PointRegressionConfig(loss="mse", steps=min(steps, 400), seed=seed))
        case "chamfer":
            return PointRegressionAttack(PointRegressionConfig(loss="chamfer", steps=min(steps, 400), seed=seed))
        case "coordinates":
            return OccupancyAttack(OccupancyConfig(sees="coordinates", steps=steps, size=size, seed=seed))
        case "occupancy":
            return OccupancyAttack(OccupancyConfig(steps=steps, size=size, seed=seed))
    raise InvalidInput(f"the attack {name} rebuilds no scan")


def measure_rebuild(
    name: AttackName,
    attacker: Sequence[AuditFrame],
    victims: Sequence[AuditFrame],
    *,
    detector: Detector,
    steps: int,
    size: DecoderSize,
    seed: int,
    picture: Path | None = None,
) -> RebuildMeasured:
    """Train an attack on the attacker's frames and score it on the victims'.

    Args:
        name: The attack, or `voxels`, which is none: the voxel centers of the true scan.
        attacker: Frames of the attacker; the last tenth only chooses the threshold of the operating point "best".
        victims: Frames to score on.
        detector: The detector without defences, whose AP on rebuilt scans is measured.
        steps: Optimizer steps of an attack that learns.
        size: Size of the network of the occupancy attack.
        seed: Every random draw.
        picture: Where the rebuilt scan of the first victim is written, (N, 3) float32 at matched density; None writes none.

    Returns:
        The scores.

    Raises:
        InvalidInput: The attacker has fewer than two frames.
    """
    if len(attacker) < 2:
        raise InvalidInput(
            f"an attacker needs at least two frames, one to learn from and one to choose a threshold, found {len(attacker)}"
        )
    held = max(1, math.ceil(DEVELOPMENT_SHARE * len(attacker)))
    attack = None if name == "voxels" else rebuild_attack(name, steps=steps, size=size, seed=seed)
    start = time.perf_counter()
    if attack is not None:
        attack.train(attacker[:-held])
    seconds = time.perf_counter() - start
    rules = RegionRules(classes=detector.class_names)
    development = [(_rebuilt(attack, frame), TrueScan.of(frame, rules)) for frame in attacker[-held:]]
    best = choose_best(development)
    pairs = [(_rebuilt(attack, frame), TrueScan.of(frame, rules)) for frame in victims]
    selected = [torch.from_numpy(MATCHED.select(rebuilt, truth)).float() for rebuilt, truth in pairs]
    if picture is not None:
        _write_points(picture, selected[0])
    bits = None
    if isinstance(attack, OccupancyAttack):
        bits = float(np.mean([attack.code_length(frame.upload, frame.scan) for frame in victims]))
    return RebuildMeasured(
        matched=score_all(pairs),
        best=score_all(pairs, best),
        bits_per_voxel=bits,
        ap=_ap(detector, victims, selected, attacker),
        training_seconds=seconds,
    )


def _rebuilt(attack: RebuildAttack | None, frame: AuditFrame) -> Rebuilt:
    if attack is None:
        return voxel_centers(frame.scan, frame.upload.spec.grid)
    return attack.rebuild(frame.upload)


def _ap(
    detector: Detector, victims: Sequence[AuditFrame], points: Sequence[torch.Tensor], attacker: Sequence[AuditFrame]
) -> DetectionAp | None:
    if any(frame.labels is None for frame in victims):
        return None
    names = detector.point_features
    known = [f.scan.features.mean() for f in attacker if f.scan.features.numel()]
    constant = float(torch.stack(known).mean()) if known else 0.0
    return detection_ap(detector, victims, [rebuilt_scan(xyz, names, constant=constant) for xyz in points], detector.class_names)


def measure_exact(
    detector: Detector, attacker: Sequence[AuditFrame], victims: Sequence[AuditFrame], codec: str, frames: int
) -> ExactMeasured:
    """Compute single points of the victims' scans.

    Args:
        detector: Its encoder made the uploads. Points are computed where its defences leave out, add or round values, and no others.
        attacker: Frames that choose how large a residual may be.
        victims: Frames to score on.
        codec: How features were stored.
        frames: How many frames of each are used.

    Returns:
        Points computed from balls of raw points, and from voxels without neighbors; of no scan where a defence changes the features in
        another way, because the attack does not know how to undo that.
    """
    encoder, levels = _solvable(detector.encoder)
    balls = lone = ExactPointScore()
    if encoder is None:
        return ExactMeasured(raw_balls=balls, lone_voxels=lone)
    chosen, scored = attacker[:frames], victims[:frames]
    if isinstance(encoder, PvRcnnEncoder):
        attack = ExactPoints(encoder, codec, levels=levels)
        attack.train(chosen)
        balls = _exact(attack, scored)
    voxels = LoneVoxels(encoder, codec, levels=levels)
    voxels.train(chosen)
    return ExactMeasured(raw_balls=balls, lone_voxels=_exact(voxels, scored))


def _solvable(encoder: Encoder) -> tuple[SecondEncoder | PvRcnnEncoder | None, tuple[int, ...]]:
    """The encoder whose equations are solved and the levels that its defences round to; None where they change features or places."""
    levels: tuple[int, ...] = ()
    if isinstance(encoder, DefendedEncoder):
        if not all(isinstance(stage, RegionUpload | DropCells | DecoyCells | RoundedFeatures) for stage in encoder.stages):
            return None, ()
        levels = tuple(stage.config.levels for stage in encoder.stages if isinstance(stage, RoundedFeatures))
        encoder = encoder.encoder
    return (encoder if isinstance(encoder, SecondEncoder | PvRcnnEncoder) else None), levels


def _exact(attack: ExactPoints | LoneVoxels, frames: Sequence[AuditFrame]) -> ExactPointScore:
    total = ExactPointScore()
    for frame in frames:
        grid = frame.upload.spec.grid
        guesses = cell_centers(occupied_voxels(frame.scan, grid), grid)
        score = score_exact_points(attack.rebuild(frame.upload).xyz, frame.scan.xyz, guesses)
        tried, sources = attack.tried(frame.upload) if isinstance(attack, LoneVoxels) else (0, 0)
        total = total + replace(score, tried=tried, sources=sources)
    return total


def measure_attributes(
    detector: Detector, attacker: Sequence[AuditFrame], victims: Sequence[AuditFrame], *, seed: int
) -> AttributeLeak | None:
    """Look for intensity, class and size of objects in the uploads.

    Args:
        detector: Its classes are those of the labels.
        attacker: Labeled frames of the attacker.
        victims: Labeled frames to score on.
        seed: Every random draw.

    Returns:
        The scores; None where a frame has no labels.
    """
    if any(frame.labels is None for frame in (*attacker, *victims)):
        return None
    return attack_attributes(attacker, victims, class_names=detector.class_names, seed=seed)


def measure_people(
    detector: Detector, attacker: Sequence[AuditFrame], victims: Sequence[AuditFrame], *, seed: int
) -> PeopleLeak | None:
    """Look for pedestrians and their height in the uploads.

    Args:
        detector: Its classes are those of the labels.
        attacker: Labeled frames of the attacker.
        victims: Labeled frames to score on.
        seed: Every random draw.

    Returns:
        The scores; None where a frame has no labels or nobody labeled pedestrians.
    """
    names = [name.casefold() for name in detector.class_names]
    if "pedestrian" not in names or any(frame.labels is None for frame in (*attacker, *victims)):
        return None
    return attack_people(attacker, victims, person=names.index("pedestrian"), seed=seed)


def _write_points(path: Path, points: torch.Tensor) -> None:
    content = io.BytesIO()
    np.save(content, points.numpy())
    write_atomically(path, content.getvalue())
