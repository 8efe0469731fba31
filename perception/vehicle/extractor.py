"""The vehicle's part of the work: a scan in, a smashed scene out, and a stream of scans into shards.

    PointCloud ─ rig (z shift, intensity scale) ─ voxelize ─ features ─ SmashedScene ─ codec ─ shard

The encoder is a frozen copy in evaluation mode, so the fingerprint taken at the start stays true. Only what stands in
``SmashedScene`` leaves: cells, features, the encoder's fingerprint and a random identifier. Keypoints (PV-RCNN) leave as cells
of the input grid, never as points.
"""

from __future__ import annotations

import copy
import secrets
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...core.cut import cells_of_centers
from ...core.errors import InvalidInput
from ...core.features import Keypoints
from ...core.rig import RigSpec
from ...core.smashed_scene import SmashedScene
from ...core.structures import PointCloud
from ..models.encoders.encoder import Encoder
from ..models.encoders.fingerprint import encoder_fingerprint
from ..wire.codec import CODECS
from ..wire.shards import ShardWriteError, ShardWriter


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Milliseconds of one scan. voxelize includes the rig and the copy to the encoder's device, backbone the set abstraction
    where there is one, and the copy back."""

    voxelize_ms: float
    backbone_ms: float


class Extractor:
    """Turns scans into smashed scenes with a frozen copy of ``encoder``.

    rig: what is done to a scan first. codec: how its features will be stored, "fp16" or "int8".
    ``fingerprint`` is that of encoder and rig; the server must expect the same.
    Raises ``InvalidInput`` for an encoder whose keypoints are raw points of the scan.
    """

    def __init__(self, encoder: Encoder, rig: RigSpec, codec: str) -> None:
        if codec not in CODECS:
            raise InvalidInput(f"unknown codec {codec!r}; choose one of {CODECS}")
        missing = [name for name in ("spec", "voxelize", "features") if not hasattr(encoder, name)]
        if missing:
            raise InvalidInput(f"{type(encoder).__name__} cannot run on a vehicle: it has no {', '.join(missing)}")
        spec = encoder.spec
        if spec.keypoints is not None and spec.keypoints.source == "raw_points":
            raise InvalidInput(
                f"{type(encoder).__name__} cannot run on a vehicle: its keypoints are exact LiDAR points of the scan, as in the "
                f"reference PV-RCNN, and uploading up to {spec.keypoints.count} of them a scan is uploading raw points; train and "
                'extract with keypoint_source="voxel_centers"'
            )
        frozen = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.fingerprint = encoder_fingerprint(frozen, rig)
        self._encoder = frozen
        self._device = next((t.device for t in frozen.state_dict().values()), torch.device("cpu"))
        self.spec = spec
        self.rig = rig
        self.codec = codec

    def smash(self, points: PointCloud) -> tuple[SmashedScene, StageTimes]:
        """The features of one scan at the cut, not yet quantised, on the CPU, and what they cost. No points: no cells.

        Raises ``InvalidInput`` for points that are not finite or lack what the encoder reads, and for an encoder whose keypoints
        are no voxel centres, whatever its ``spec`` says.
        """
        bad = ~(points.xyz.isfinite().all(1) & points.features.isfinite().all(1))
        if bad.any():
            raise InvalidInput(f"{int(bad.sum())} of {len(points)} points hold NaN or inf; drop them where the scan is read")
        start = self._now()
        with torch.inference_mode():
            clouds = [self.rig.apply(points).to(self._device)]
            voxels = self._encoder.voxelize(clouds)
            voxelized = self._now()
            cut = self._encoder.features(clouds, voxels).to("cpu")
        done = self._now()
        cells = cut.voxels.sorted()
        keypoint_cells, keypoint_features = self._at_rest(cut.keypoints)
        scene = SmashedScene(
            spec=self.spec,
            coords=cells.coords[:, 1:].contiguous(),
            features=cells.features.float().clone(),  # the clone is no inference tensor any more
            keypoint_cells=keypoint_cells,
            keypoint_features=keypoint_features,
            codec=self.codec,
            encoder_fingerprint=self.fingerprint,
            scene_id=secrets.token_hex(16),
        )
        return scene, StageTimes(voxelize_ms=1e3 * (voxelized - start), backbone_ms=1e3 * (done - voxelized))

    def _at_rest(self, keypoints: Keypoints | None) -> tuple[Tensor, Tensor]:
        """Cells (K, 3) of the input grid and features (K, C) of keypoints, in their order; none without."""
        if keypoints is None:
            return torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, 0)
        return cells_of_centers(keypoints.xyz, self.spec.grid), keypoints.features.float().clone()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """One stage over all good scans, milliseconds a frame. A shard is written once for many frames: see the mean there."""

    median_ms: float
    p95_ms: float
    mean_ms: float


@dataclass(frozen=True, kw_only=True)
class ScanFailure:
    """A scan that gave no scene: its place in the stream, from 0, and why."""

    index: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ExtractionReport:
    """What one run of ``extract`` did.

    frames: scenes written. raw_bytes: their scans as float32 columns (N * 4 * columns). smashed_bytes: their encoded scenes.
    shards: manifests finished during the run. With no frame the summaries are zero.
    """

    frames: int
    failures: tuple[ScanFailure, ...]
    raw_bytes: int
    smashed_bytes: int
    voxelize: StageSummary
    backbone: StageSummary
    codec: StageSummary
    write: StageSummary
    shards: tuple[Path, ...]

    @property
    def raw_bytes_per_frame(self) -> float:
        return self.raw_bytes / max(self.frames, 1)

    @property
    def smashed_bytes_per_frame(self) -> float:
        return self.smashed_bytes / max(self.frames, 1)


def _summary(times_ms: array[float]) -> StageSummary:
    if not times_ms:
        return StageSummary(median_ms=0.0, p95_ms=0.0, mean_ms=0.0)
    values = np.frombuffer(times_ms)
    median, p95 = np.percentile(values, [50, 95])
    return StageSummary(median_ms=float(median), p95_ms=float(p95), mean_ms=float(values.mean()))


def extract(
    scans: Iterable[PointCloud | Callable[[], PointCloud]],
    extractor: Extractor,
    writer: ShardWriter,
    *,
    on_frame: Callable[[int], None] | None = None,
    on_scene: Callable[[int, str], None] | None = None,
) -> ExtractionReport:
    """Smash every scan of a stream and write the scenes; a bad scan is reported and costs nothing else.

    scans: point clouds as they arrive, or functions that read one (``partial(read_bin, path)``), so that a file which cannot be
    read counts as that scan's failure; an error of the iterable itself ends the stream and is raised, after all scenes before it
    were written. writer: made with the extractor's spec, fingerprint and codec. on_frame: called with the number of scans seen.
    on_scene: called with a scan's index and its scene id, which the vehicle may keep to itself; no shard links the two.
    Raises ``InvalidInput`` for another extractor's writer, ``ShardWriteError`` when the disk takes no more; shards finished before are intact.
    """
    kind = (extractor.spec, extractor.fingerprint, extractor.codec)
    if writer.kind != kind:
        raise InvalidInput(
            f"the extractor makes scenes of {kind}, the writer's shards are of {writer.kind}; make the writer from it"
        )
    times: dict[str, array[float]] = {name: array("d") for name in ("voxelize", "backbone", "codec", "write")}
    failures: list[ScanFailure] = []
    raw_bytes = smashed_bytes = 0
    finished_before = len(writer.shards)
    try:
        for index, scan in enumerate(scans):
            try:
                points = scan() if callable(scan) else scan
                scene, stage = extractor.smash(points)
                written = writer.add(scene)
                if on_scene is not None:
                    on_scene(index, scene.scene_id)
            except ShardWriteError:
                raise
            except Exception as error:  # whatever is wrong with one scan, the stream goes on; the report says so
                failures.append(ScanFailure(index=index, reason=f"{type(error).__name__}: {error}"))
                continue
            finally:
                if on_frame is not None:
                    on_frame(index + 1)
            raw_bytes += len(points) * 4 * (3 + points.features.shape[1])
            smashed_bytes += written.length
            row = (stage.voxelize_ms, stage.backbone_ms, written.encode_ms, written.write_ms)
            for series, value in zip(times.values(), row, strict=True):
                series.append(value)
    except ShardWriteError:
        raise
    except Exception:
        writer.flush()
        raise
    start = time.perf_counter()
    writer.flush()
    if times["write"]:
        times["write"][-1] += 1e3 * (time.perf_counter() - start)  # the last shard is closed on the last frame's account
    return ExtractionReport(
        frames=len(times["write"]),
        failures=tuple(failures),
        raw_bytes=raw_bytes,
        smashed_bytes=smashed_bytes,
        **{name: _summary(series) for name, series in times.items()},
        shards=writer.shards[finished_before:],
    )
