"""The vehicle's part of the work: a scan in, a smashed scene out, and a stream of scans into shards.

    PointCloud ─ rig (z shift, intensity scale) ─ voxelize ─ features ─ SmashedScene ─ codec ─ shard

The encoder is a frozen copy in evaluation mode, so the fingerprint computed at the start stays true.

Only the fields of `SmashedScene` leave: cells, features, the encoder fingerprint and a random identifier. No raw point, time,
pose or name is among them. This says what is written, not what can be computed from it: a scene is a coarse scan with features,
and `perception/wire/codec.py` and `perception/wire/shards.py` say what was rebuilt from such scenes. Keypoints (PV-RCNN) leave as
cells of the input grid, and an encoder whose keypoints are raw points is refused; the features of a keypoint of PV-RCNN as
published still describe the points around it precisely enough to compute some of them, so the presets leave these features out.

Read next: `perception/wire/shards.py`, where the scenes go.
"""

from __future__ import annotations

import copy
import secrets
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ...core.cut import cells_of_centers
from ...core.device import find_device
from ...core.errors import InvalidInput, UpcycleError
from ...core.features import Keypoints, VoxelCounts
from ...core.foreign_text import shown
from ...core.ledger import Ledger
from ...core.ledger_rules import CELLS_STOP, judge
from ...core.rig import RigSpec
from ...core.smashed_scene import SmashedScene
from ...core.structures import PointCloud
from ...core.trained_on import ScanMeasures, ScanStatistics, TrainedOn, summarize_scans
from ..models.encoders.encoder import Encoder
from ..models.encoders.fingerprint import encoder_fingerprint
from ..models.encoders.scan_survey import measures_of, points_outside_height
from ..wire.codec import check_codec
from ..wire.encoder_file import check_fingerprint, load_encoder
from ..wire.sampling import EVERY_SCAN, SceneSampling
from ..wire.shards import AddedScene, SceneKind, ShardJournal, ShardWriteError, ShardWriter


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """What smashing one scan cost, and what was found on the way."""

    voxelize_ms: float
    """Milliseconds for the rig, the copy to the encoder's device, and the voxels."""

    backbone_ms: float
    """Milliseconds for the features at the cut (set abstraction included, where there is one), and the copy back to the CPU."""

    counts: VoxelCounts | None = None
    """What became of the points of the scan; None for an encoder that does not count."""

    measures: ScanMeasures | None = None
    """Measures of the scan to compare with those of training; None for an encoder that does not count."""

    points_outside_height: int = 0
    """Points that lie within the sides of the range, and below or above it; 0 for an encoder that does not count."""

    cells: int = 0
    """Cells at the cut before the defences of the encoder; the scene holds those that are sent."""


class Extractor:
    """Turns scans into smashed scenes with a frozen copy of an encoder.

    Attributes:
        spec: The cut of the encoder, as its defences leave it.
        rig: What is done to a scan first.
        codec: How the features will be stored.
        defended: Whether what leaves is not what the network computes, because the encoder carries defences.
        fingerprint: The fingerprint of encoder and rig. The server must expect the same.
        trained_on: What the training of the encoder knew about its scans; None for an encoder without such notes.

    Args:
        encoder: The encoder; it is copied.
        rig: Mounting height and intensity scale of this kind of vehicle.
        codec: "fp16" or "int8".

    Raises:
        InvalidInput: The module is not an encoder, its keypoints are raw points of the scan, the rig is no `RigSpec`, or the codec is
            unknown.

    Example:
        ```python
        extractor = Extractor.from_file("runs/source", rig=RigSpec(z_shift=1.73), codec="int8")
        scene, times = extractor.smash(scan)
        ```
    """

    def __init__(self, encoder: Encoder, rig: RigSpec, codec: str) -> None:
        check_codec(codec)
        missing = [name for name in ("spec", "voxelize", "features") if not hasattr(encoder, name)]
        if missing:
            raise InvalidInput(f"{type(encoder).__name__} cannot run on a vehicle: it has no {', '.join(missing)}")
        if not isinstance(rig, RigSpec):
            raise InvalidInput(f"an extractor needs the rig of the vehicle, found {type(rig).__name__}; give a RigSpec")
        spec = encoder.upload_spec
        if spec.keypoints is not None and spec.keypoints.source == "raw_points":
            raise InvalidInput(
                f"{type(encoder).__name__} cannot run on a vehicle: its keypoints are exact LiDAR points of the scan, as in the "
                f"reference PV-RCNN, and uploading up to {spec.keypoints.count} of them per scan is uploading raw points; train and "
                'extract with keypoint_source="voxel_centers"'
            )
        frozen = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.fingerprint = encoder_fingerprint(frozen, rig)
        self._encoder = frozen
        self._device = next((t.device for t in frozen.state_dict().values()), torch.device("cpu"))
        self.spec = spec
        self.rig = rig
        self.trained_on: TrainedOn | None = getattr(encoder, "trained_on", None)
        self.codec = codec
        self.defended = encoder.defended

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        rig: RigSpec | None,
        codec: str,
        device: torch.device | str = "cpu",
        expected_fingerprint: str | None = None,
    ) -> Self:
        """Load the encoder that the server handed out, and make an extractor of it.

        Args:
            path: The encoder file, or the run folder that holds it.
            rig: Mounting height and intensity scale of this kind of vehicle. None takes the rig of the training data.
            codec: "fp16" or "int8".
            device: Where the encoder runs.
            expected_fingerprint: The fingerprint that encoder and rig must have, as the server told the fleet, or its first digits.

        Returns:
            The extractor.

        Raises:
            InvalidInput: The file is missing, damaged or of another kind, the encoder cannot run on a vehicle or has another
                fingerprint, or this machine has no such device.
        """
        encoder = load_encoder(path)
        if rig is None:
            rig = RigSpec() if encoder.trained_on is None else encoder.trained_on.rig
        extractor = cls(encoder.to(find_device(device)), rig, codec)
        if expected_fingerprint is not None:
            check_fingerprint(extractor.fingerprint, expected_fingerprint, rig, encoder=encoder)
        return extractor

    @property
    def kind(self) -> SceneKind:
        """The kind of its scenes: cut, fingerprint and codec."""
        return SceneKind(spec=self.spec, encoder_fingerprint=self.fingerprint, codec=self.codec)

    def shard_writer(
        self,
        folder: str | Path,
        *,
        scenes_per_shard: int = 256,
        max_seconds: float | None = None,
        journal: ShardJournal | None = None,
        sampling: SceneSampling = EVERY_SCAN,
    ) -> ShardWriter:
        """Make a writer for the scenes of this extractor.

        Args:
            folder: Where the shards are written; it is made where needed.
            scenes_per_shard: Number of scenes after which a shard is written.
            max_seconds: Seconds after which a shard is written, also with fewer scenes. None means no limit.
            journal: Told about every shard before and after it appears, such as the progress of `extract`.
            sampling: The rule by which the caller leaves scans out (`choose_scans`); the manifests record it.

        Returns:
            The writer, for `extract`. Use it as a context manager.

        Raises:
            InvalidInput: `scenes_per_shard` or `max_seconds` is outside its limits.
            ShardWriteError: The folder cannot be made.
        """
        return ShardWriter(
            folder,
            spec=self.spec,
            fingerprint=self.fingerprint,
            codec=self.codec,
            scenes_per_shard=scenes_per_shard,
            max_seconds=max_seconds,
            journal=journal,
            sampling=sampling,
        )

    def smash(self, points: PointCloud) -> tuple[SmashedScene, StageTimes]:
        """Compute the features of one scan at the cut.

        Args:
            points: One scan in the sensor frame, on any device. A scan without points gives a scene without cells.

        Returns:
            The scene, on the CPU and not yet quantized, and what it cost.

        Raises:
            InvalidInput: `points` is not a `PointCloud`, holds NaN or infinity, or lacks point features that the encoder reads; or
                the keypoints of the encoder are not centers of voxels, whatever its `spec` says.
        """
        if not isinstance(points, PointCloud):
            raise InvalidInput(f"smash takes one PointCloud, found {type(points).__name__}; make a PointCloud of the scan first")
        bad = ~(points.xyz.isfinite().all(1) & points.features.isfinite().all(1))
        if bad.any():
            raise InvalidInput(f"{int(bad.sum())} of {len(points)} points hold NaN or inf; drop them where the scan is read")
        start = self._now()
        with torch.inference_mode():
            shifted = self.rig.from_sensor(points)
            clouds = [shifted.to(self._device)]
            voxels = self._encoder.voxelize(clouds)
            voxelized = self._now()
            # 128 bits of the operating system for every scan: who knows the numbers could take a defence's noise away again.
            rng = np.random.default_rng(secrets.randbits(128))
            computed = self._encoder.before_defences(clouds, voxels)
            features = self._encoder.after_defences(computed, rng).to("cpu")
        done = self._now()
        cells = features.voxels.sorted()
        keypoint_cells, keypoint_features = self._keypoints_at_rest(features.keypoints)
        scene = SmashedScene(
            spec=self.spec,
            coords=cells.coords[:, 1:].contiguous(),
            features=cells.features.float().clone(),  # the clone is no longer an inference tensor
            keypoint_cells=keypoint_cells,
            keypoint_features=keypoint_features,
            codec=self.codec,
            encoder_fingerprint=self.fingerprint,
            scene_id=secrets.token_hex(16),
        )
        counts = voxels.counts[0] if voxels.counts else None
        return scene, StageTimes(
            voxelize_ms=1e3 * (voxelized - start),
            backbone_ms=1e3 * (done - voxelized),
            counts=counts,
            measures=None if counts is None else measures_of(shifted.to("cpu"), counts),
            points_outside_height=0 if counts is None else points_outside_height(shifted, self._encoder),
            cells=len(computed.voxels.coords),
        )

    def _keypoints_at_rest(self, keypoints: Keypoints | None) -> tuple[Tensor, Tensor]:
        """Cells (K, 3) of the input grid and features (K, C) of keypoints, in their order; empty for a cut without keypoints."""
        if keypoints is None:
            return torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, 0)
        return cells_of_centers(keypoints.xyz, self.spec.grid), keypoints.features.float().clone()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """The cost of one stage over all scenes written, in milliseconds per frame; all zero without a scene."""

    median_ms: float
    """Median. For the stage `write` it is near 0, because a shard is written once for many frames; read its mean."""

    p95_ms: float
    """95th percentile."""

    mean_ms: float
    """Mean."""


@dataclass(frozen=True, kw_only=True)
class ScanFailure:
    """A scan that gave no scene."""

    index: int
    """Its place in the stream, from 0."""

    reason: str
    """Class and message of the error."""


@dataclass(frozen=True, kw_only=True)
class ExtractionReport:
    """What one run of `extract` did."""

    frames: int
    """Number of scenes written."""

    failures: tuple[ScanFailure, ...]
    """Scans that gave no scene, in the order of the stream."""

    raw_bytes: int
    """Bytes of the scans of all scenes written, as float32 columns (points * 4 * columns)."""

    smashed_bytes: int
    """Bytes of their encoded scenes, without the tar around them."""

    voxelize: StageSummary
    """The stage of `StageTimes.voxelize_ms`."""

    backbone: StageSummary
    """The stage of `StageTimes.backbone_ms`."""

    codec: StageSummary
    """Quantizing and encoding."""

    write: StageSummary
    """Writing shards to the disk."""

    shards: tuple[Path, ...]
    """Manifest files of the shards finished during the run."""

    ledger: Ledger = Ledger()
    """What was read and dropped: points, cells over the voxel limit, scans that failed."""

    scans: ScanStatistics | None = None
    """Medians of the first `MEASURED_SCANS` scans in the frame of the encoder, to compare with those of training."""

    cells: int = 0
    """Cells at the cut of all scenes written, before the defences of the encoder."""

    cells_sent: int = 0
    """Cells that these scenes hold. A defence that adds false cells can make this the larger number."""

    refused: bool = False
    """Whether the run ended because too many cells were lost to the voxel limit (`refuse_lost_cells`)."""

    @property
    def raw_bytes_per_frame(self) -> float:
        """Mean bytes of a scan; 0 without a scene."""
        return self.raw_bytes / max(self.frames, 1)

    @property
    def smashed_bytes_per_frame(self) -> float:
        """Mean bytes of an encoded scene; 0 without a scene."""
        return self.smashed_bytes / max(self.frames, 1)


class _Tally:
    """What `extract` counts on its way."""

    def __init__(self) -> None:
        self._times: dict[str, array[float]] = {name: array("d") for name in ("voxelize", "backbone", "codec", "write")}
        self._sizes: list[tuple[int, int, int, int]] = []  # bytes of scan and scene, cells before the defences and sent
        self._measures: list[ScanMeasures] = []
        self.failures: list[ScanFailure] = []
        self.ledger = Ledger()

    def fail(self, index: int, error: Exception, read: Ledger) -> None:
        empty = isinstance(error, _NothingToUpload)
        reason = str(error) if isinstance(error, UpcycleError) else f"{type(error).__name__}: {error}"
        self.failures.append(ScanFailure(index=index, reason=shown(reason, most=2000)))
        self.ledger = self.ledger + replace(read, scans=0, scans_failed=1, scans_without_points=int(empty))

    def count(self, points: PointCloud, scene: SmashedScene, stage: StageTimes, added: AddedScene, total: Ledger) -> None:
        self.ledger = total
        if stage.measures is not None and len(self._measures) < MEASURED_SCANS:
            self._measures.append(stage.measures)
        raw = len(points) * 4 * (3 + points.features.shape[1])
        self._sizes.append((raw, added.length, stage.cells, len(scene.coords)))
        row = (stage.voxelize_ms, stage.backbone_ms, added.encode_ms, added.write_ms)
        for series, value in zip(self._times.values(), row, strict=True):
            series.append(value)

    def drop(self, scenes: int) -> None:
        """Leave the last scenes out of the counts of what was written."""
        kept = len(self._sizes) - scenes
        del self._sizes[kept:]
        for series in self._times.values():
            del series[kept:]

    def add_to_last_write(self, milliseconds: float) -> None:
        if self._times["write"]:
            self._times["write"][-1] += milliseconds

    def report(self, shards: tuple[Path, ...], *, refused: bool = False, ledger: Ledger | None = None) -> ExtractionReport:
        raw, smashed, cells, sent = (sum(column) for column in zip((0, 0, 0, 0), *self._sizes, strict=True))
        return ExtractionReport(
            frames=len(self._times["write"]),
            failures=tuple(self.failures),
            raw_bytes=raw,
            smashed_bytes=smashed,
            **{name: _summary(series) for name, series in self._times.items()},
            shards=shards,
            ledger=ledger or self.ledger,
            scans=summarize_scans(self._measures),
            cells=cells,
            cells_sent=sent,
            refused=refused,
        )


def _summary(times_ms: array[float]) -> StageSummary:
    if not times_ms:
        return StageSummary(median_ms=0.0, p95_ms=0.0, mean_ms=0.0)
    values = np.frombuffer(times_ms)
    median, p95 = np.percentile(values, [50, 95])
    return StageSummary(median_ms=float(median), p95_ms=float(p95), mean_ms=float(values.mean()))


EARLY_SCANS = 8
"""Scans after which `extract` decides whether too many cells are lost, before much is written."""
MEASURED_SCANS = 200
"""Scans whose measures are compared with those of training."""

ScanSource = PointCloud | Callable[[], PointCloud | tuple[PointCloud, Ledger]]
"""A scan, or a function that reads one and may count what it dropped."""


def _read_one(scan: ScanSource) -> tuple[PointCloud, Ledger]:
    found = scan() if callable(scan) else scan
    return found if isinstance(found, tuple) else (found, Ledger())


def _without_cells(points: PointCloud, ledger: Ledger) -> str:
    if not len(points):
        return (
            "the scan has no point left, so there is nothing to upload; a wrong picture size (--image-size) crops all points away"
        )
    for finding in judge(replace(ledger, scans_failed=0)):
        if finding.stops:
            return f"there is nothing to upload: {finding.text}"
    return f"none of its {len(points)} points gave a feature at the cut, so there is nothing to upload"


def extract(
    scans: Iterable[ScanSource],
    extractor: Extractor,
    writer: ShardWriter,
    *,
    on_frame: Callable[[int], None] | None = None,
    on_scene: Callable[[int, str], None] | None = None,
    on_smashed: Callable[[int, str], None] | None = None,
    on_measures: Callable[[ScanMeasures], None] | None = None,
    refuse_lost_cells: bool = False,
) -> ExtractionReport:
    """Smash every scan of a stream and write the scenes; a bad scan is reported and costs no other scan.

    A scan without a cell in the detector's range is such a bad scan: nobody learns from an empty scene, and a wrong rig or crop gives
    nothing else.

    Args:
        scans: Scans in the sensor frame as they arrive, or functions that read one (`partial(read_scan, path)`), so that a file
            which cannot be read counts as the failure of that scan. A function may return the counts of its reader as well. An error
            of the iterable itself ends the stream and is raised, after all scenes before it were written.
        extractor: Makes the scenes.
        writer: Takes them; made with `extractor.shard_writer(folder)`.
        on_frame: Called after every scan with the number of scans seen.
        on_scene: Called with the index of a scan and its scene identifier, after the scene was added to a shard. The vehicle may keep
            this list to itself; no shard links the two.
        on_smashed: Called likewise before the scene is added, as the journal of the writer needs it.
        on_measures: Called with the measures of every scan that gave a scene, to compare with those of training (`ScanWatch.add`).
        refuse_lost_cells: End the run where more than `CELLS_STOP` of the cells so far are over the voxel limit. This is looked at
            from the first `EARLY_SCANS` scans on, and before a shard is full. Scenes that are in no finished shard are dropped.

    Returns:
        Counts, sizes and times.

    Raises:
        InvalidInput: The writer was made for another extractor.
        ShardWriteError: The disk takes no more; shards finished before are intact.

    Example:
        ```python
        extractor = Extractor.from_file("runs/source", rig=RigSpec(z_shift=1.73), codec="int8")
        with extractor.shard_writer("upload") as writer:
            report = extract(scans, extractor, writer)
        print(report.smashed_bytes_per_frame, report.backbone.median_ms)
        ```
    """
    if writer.kind != extractor.kind:
        raise InvalidInput(
            f"the writer was made for other scenes than the extractor makes: {extractor.kind.differences(writer.kind)}; make the "
            "writer with extractor.shard_writer(folder)"
        )
    tally, finished_before = _Tally(), len(writer.shards)
    refused = False
    try:
        for index, scan in enumerate(scans):
            read = Ledger()
            try:
                points, read = _read_one(scan)
                scene, stage = extractor.smash(points)
                if stage.counts is not None:
                    read = stage.counts.ledger(read) + Ledger(points_outside_height=stage.points_outside_height)
                if not len(scene.coords):
                    if stage.cells:
                        raise InvalidInput(f"the defences left out all of its {stage.cells} cells, so there is nothing to upload")
                    raise _NothingToUpload(_without_cells(points, read))
                total = tally.ledger + (read if read.scans else replace(read, scans=1))
                if refuse_lost_cells and (index + 1 >= EARLY_SCANS or writer.next_fills) and _too_many_lost(total):
                    refused = True
                    break
                if on_smashed is not None:
                    on_smashed(index, scene.scene_id)
                added = writer.add(scene)
                if on_scene is not None:
                    on_scene(index, scene.scene_id)
            except ShardWriteError:
                raise
            except Exception as error:  # whatever is wrong with one scan, the stream goes on; the report says so
                tally.fail(index, error, read)
                continue
            finally:
                if on_frame is not None:
                    on_frame(index + 1)
            if on_measures is not None and stage.measures is not None:
                on_measures(stage.measures)
            tally.count(points, scene, stage, added, total)
    except ShardWriteError:
        raise
    except Exception:
        writer.flush()
        raise
    if refused or (refuse_lost_cells and _too_many_lost(tally.ledger)):
        tally.drop(writer.discard())
        return tally.report(writer.shards[finished_before:], refused=True, ledger=total if refused else tally.ledger)
    start = time.perf_counter()
    writer.flush()
    tally.add_to_last_write(1e3 * (time.perf_counter() - start))  # the last shard counts as the last frame's writing
    return tally.report(writer.shards[finished_before:])


def _too_many_lost(ledger: Ledger) -> bool:
    return ledger.cells_over_limit > CELLS_STOP * ledger.cells


class _NothingToUpload(InvalidInput):
    """A scan without a cell."""
