"""`upcycle3d extract`: the vehicle side. Scans come in, shards of smashed scenes go out.

It loads no decoder, label, server or training code. Read next: `perception/vehicle/extractor.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from ..core.device import find_device
from ..core.errors import InvalidInput, UpcycleError
from ..core.files import write_atomically
from ..core.point_files import read_points, scan_files
from ..core.rig import RigSpec
from ..core.structures import PointCloud
from ..perception.vehicle.extractor import ExtractionReport, Extractor, extract
from .console import console, print_table, progress_bar, run_command, write_json

Scans = Mapping[str, Callable[[], PointCloud]]
"""Name of a scan to the function that reads it."""


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Run the vehicle half of a detector over scans and write what may leave the vehicle: features at the cut, in shards."""

    detector: Path
    """Run folder of the detector whose encoder the fleet runs, or the encoder file alone (`encoder.safetensors`)."""
    out: Path
    """Folder for the shards."""
    scans: tuple[Path, ...] = ()
    """Scan files (.bin, .npy, .pcd) or folders of them, in this order."""
    data: str | None = None
    """Instead of `--scans`: a prepared dataset, `DIR[:SPLIT]`; all frames where no split is named. Its rig is used."""
    ids: Path | None = None
    """File with one scan name (without suffix) per line. Only these scans are extracted."""
    columns: tuple[str, ...] = ()
    """Names of the values in one row of `--scans`, in file order; `_` skips one. By default x y z intensity."""
    drop_non_finite: bool = False
    """Leave out points of `--scans` with NaN or inf. Without this option such a scan is refused."""
    calib: Path | None = None
    """Folder of KITTI calibration files, one per scan. Only points that the camera sees are kept; needed for an encoder that was
    trained on such scans."""
    rig: RigSpec = field(default_factory=RigSpec)
    """Mounting height and intensity scale of this vehicle. `--data` brings its own."""
    codec: Literal["fp16", "int8"] = "fp16"
    """How features are stored. `int8` halves the upload."""
    scenes_per_shard: int = 256
    """Scenes per shard. A large shard loses more scenes when the vehicle loses power before it is closed."""
    append: bool = False
    """Add to the shards that `--out` holds already. Use it only for other scans: one scan extracted twice is two scenes to the server."""
    receipts: Path | None = None
    """File for a list of scan names and scene ids. Keep it: no shard links the two. `upcycle --truth` measures pseudo labels with it."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Extract) -> None:
    """Turn scans into shards of smashed scenes. A scan that cannot be read is reported, and the others go on."""
    if bool(config.scans) == (config.data is not None):
        raise InvalidInput("give either --scans (files or folders) or --data (a prepared dataset)")
    if not config.append and next(config.out.glob("*.tar"), None) is not None:
        raise InvalidInput(
            f"{config.out} already holds shards. A scan that is extracted twice becomes two scenes on the server, because scene ids are "
            "random; choose an empty folder, or give --append if these are other scans"
        )
    rig, scans = _scan_files(config) if config.data is None else _prepared_frames(config, config.data)
    if config.ids is not None:
        scans = _only(scans, config.ids)
    if config.calib is not None:
        scans = {name: partial(_camera_view, read, config.calib / f"{name}.txt") for name, read in scans.items()}
    names = tuple(scans)
    extractor = Extractor.from_file(config.detector, rig=rig, codec=config.codec, device=find_device(config.device))
    receipts = _earlier_receipts(config.receipts) if config.append and config.receipts is not None else {}
    writer = extractor.shard_writer(config.out, scenes_per_shard=config.scenes_per_shard)
    with progress_bar("extract", len(scans)) as advance, writer:
        report = extract(
            scans.values(),
            extractor,
            writer,
            on_frame=lambda done: advance(done, len(scans)),
            on_scene=lambda index, scene_id: receipts.update({scene_id: names[index]}),
        )
    if config.receipts is not None:
        write_atomically(config.receipts, json.dumps(receipts, indent=1).encode())
    _print(report, names)
    write_json(config.json, result_json(report))
    if report.frames == 0:
        raise UpcycleError(f"none of {len(scans)} scans gave a scene, so nothing was written; the reasons are listed above")
    options = "".join(f" --rig.{k.replace('_', '-')} {v}" for k, v in asdict(rig).items() if v != getattr(RigSpec(), k))
    console.print(
        f"encoder fingerprint {extractor.fingerprint[:16]}…; next: upcycle3d ingest {config.out} --detector {config.detector} "
        f"--store STORE{options}",
        soft_wrap=True,
    )


def _scan_files(config: Extract) -> tuple[RigSpec, Scans]:
    read = partial(  # the rig scales intensity and checks it
        read_points, columns=config.columns or None, intensity_scale=None, drop_non_finite=config.drop_non_finite
    )
    return config.rig, {path.stem: partial(read, path) for path in scan_files(config.scans)}


def _prepared_frames(config: Extract, data: str) -> tuple[RigSpec, Scans]:
    """The rig that the dataset was prepared with, and its frames with that rig taken back: the extractor applies it once."""
    from ..datasets.data_split import DataSplit

    if config.columns or config.drop_non_finite:
        raise InvalidInput("--columns and --drop-non-finite belong to --scans; --data was read when it was prepared")
    frames = DataSplit.parse(data).open()
    rig = frames.rig
    if config.rig not in (RigSpec(), rig):
        raise InvalidInput(
            f"{data} was prepared with the rig {rig}, but --rig says {config.rig}; leave --rig out, or prepare the data again with it"
        )

    def read(index: int) -> PointCloud:
        return rig.to_sensor(frames[index].points)

    return rig, {name: partial(read, index) for index, name in enumerate(frames.ids)}


def _only(scans: Scans, ids: Path) -> Scans:
    from ..datasets.kitti import read_ids

    wanted = read_ids(ids)
    missing = [name for name in wanted if name not in scans]
    if missing:
        raise InvalidInput(f"{len(missing)} of the {len(wanted)} scans named in {ids} are not among those given: {missing[:3]}")
    return {name: scans[name] for name in wanted}


def _camera_view(read: Callable[[], PointCloud], calibration: Path) -> PointCloud:
    from ..datasets.kitti import crop_to_camera, read_calibration

    return crop_to_camera(read(), read_calibration(calibration))


def _earlier_receipts(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except ValueError as error:
        raise InvalidInput(f"{path} is not a list of receipts ({error}); choose another file, or remove it") from error


def result_json(report: ExtractionReport) -> dict[str, object]:
    """The report as JSON values.

    Args:
        report: What `extract` returned.

    Returns:
        All its fields, and the bytes per frame.
    """
    values = asdict(report) | {"shards": [str(p) for p in report.shards]}
    return values | {"bytes_per_frame": report.smashed_bytes_per_frame, "raw_bytes_per_frame": report.raw_bytes_per_frame}


def _print(report: ExtractionReport, names: Sequence[str]) -> None:
    stages = {"voxelize": report.voxelize, "backbone": report.backbone, "codec": report.codec, "write": report.write}
    rows = [(name, f"{s.median_ms:.1f}", f"{s.p95_ms:.1f}") for name, s in stages.items()]
    print_table("milliseconds per frame", ("stage", "median", "p95"), rows)
    ratio = report.smashed_bytes_per_frame / max(report.raw_bytes_per_frame, 1)
    console.print(
        f"{report.frames} frames; shards: {len(report.shards)}; {report.smashed_bytes_per_frame:,.0f} bytes per frame; the raw scan has "
        f"{report.raw_bytes_per_frame:,.0f} ({ratio:.2f} of it)"
    )
    if report.failures:
        print_table("left out", ("scan", "why"), [(names[f.index], f.reason) for f in report.failures])


if __name__ == "__main__":
    sys.exit(run_command(command))
