"""``upcycle3d extract``: the vehicle side. Scans in, smashed shards out. Loads no decoder, label, server or training code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from ..core.errors import InvalidInput, UpcycleError
from ..core.files import write_atomically
from ..core.point_files import read_points, scan_files
from ..core.rig import RigSpec
from ..core.structures import PointCloud
from ..perception.vehicle.extractor import ExtractionReport, Extractor, extract
from ..perception.wire.encoder_file import load_encoder
from ..perception.wire.shards import ShardWriter
from .console import console, device, print_table, progress_bar, run_command, write_json

Scans = Mapping[str, Callable[[], PointCloud]]
"""Name of a scan -> what reads it."""


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Run the vehicle half of a detector over scans and write what may leave the vehicle: features at the cut, in shards."""

    encoder: Path
    """encoder.safetensors, or the run folder that holds it"""
    out: Path
    """folder for shards"""
    scans: tuple[Path, ...] = ()
    """scan files (.bin, .npy, .pcd) or folders of them, in this order"""
    data: Path | None = None
    """instead of --scans: a prepared dataset"""
    split: str | None = None
    """its split; every frame by default"""
    ids: Path | None = None
    """file of scan names (without suffix), one a line: take only these"""
    columns: tuple[str, ...] = ()
    """values of a row of --scans in file order, `_` skips one; x y z intensity by default"""
    drop_non_finite: bool = False
    """leave out points of --scans with NaN or inf instead of refusing the scan"""
    calib: Path | None = None
    """folder of KITTI calibration files, one a scan: keep only what the camera sees, for an encoder that learnt on such scans"""
    rig: RigSpec = field(default_factory=RigSpec)
    """how this vehicle's scans are brought to the encoder's: mounting height and intensity scale. With --data as prepared"""
    codec: Literal["fp16", "int8"] = "fp16"
    """how features are stored"""
    scenes_per_shard: int = 256
    """a shard is closed when it holds so many; more hide the order better, fewer lose less"""
    append: bool = False
    """add to the shards that --out holds already"""
    receipts: Path | None = None
    """keep a list of scan and scene id here. It stays with you: no shard links the two. For measuring pseudo labels"""
    device: str = "cpu"
    """cpu or cuda"""
    json: Path | None = None
    """also write the result for machines"""


def command(config: Extract) -> None:
    """Turn scans into smashed shards; a scan that cannot be read is reported and costs nothing else."""
    if bool(config.scans) == (config.data is not None):
        raise InvalidInput("give either --scans (files or folders) or --data (a prepared dataset)")
    if not config.append and next(config.out.glob("*.tar"), None) is not None:
        raise InvalidInput(
            f"{config.out} holds shards already. A scan extracted twice is two scenes to the server, for their identifiers are random: "
            "choose an empty folder, or give --append if these are other scans"
        )
    rig, scans = _scan_files(config) if config.data is None else _prepared_frames(config, config.data)
    if config.ids is not None:
        scans = _only(scans, config.ids)
    if config.calib is not None:
        scans = {name: partial(_camera_view, read, config.calib / f"{name}.txt") for name, read in scans.items()}
    names = tuple(scans)
    file = config.encoder / "encoder.safetensors" if config.encoder.is_dir() else config.encoder
    extractor = Extractor(load_encoder(file).to(device(config.device)), rig, config.codec)
    receipts = _earlier_receipts(config.receipts) if config.append and config.receipts is not None else {}
    writer = ShardWriter(
        config.out,
        spec=extractor.spec,
        fingerprint=extractor.fingerprint,
        codec=config.codec,
        scenes_per_shard=config.scenes_per_shard,
    )
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
        raise UpcycleError(f"none of {len(scans)} scans gave a scene, so nothing was written; the reasons stand above")
    options = "".join(f" --rig.{k.replace('_', '-')} {v}" for k, v in asdict(rig).items() if v != getattr(RigSpec(), k))
    console.print(
        f"encoder fingerprint {extractor.fingerprint[:16]}…; next: upcycle3d ingest {config.out} --encoder {config.encoder} "
        f"--store STORE{options}",
        soft_wrap=True,
    )


def _scan_files(config: Extract) -> tuple[RigSpec, Scans]:
    if config.split is not None:
        raise InvalidInput("--split names a split of --data; with --scans, name the wanted scans in a file for --ids")
    read = partial(  # the rig scales intensity and checks it
        read_points, columns=config.columns or None, intensity_scale=None, drop_non_finite=config.drop_non_finite
    )
    return config.rig, {path.stem: partial(read, path) for path in scan_files(config.scans)}


def _prepared_frames(config: Extract, data: Path) -> tuple[RigSpec, Scans]:
    """The rig that the dataset was prepared with, and its frames with that rig taken back: the extractor applies it once."""
    from ..datasets.prepared import PreparedDataset

    if config.columns or config.drop_non_finite:
        raise InvalidInput("--columns and --drop-non-finite say how --scans are read; --data was read when it was prepared")
    frames = PreparedDataset(data, config.split)
    rig = frames.rig
    if config.rig not in (RigSpec(), rig):
        raise InvalidInput(
            f"{data} was prepared with the rig {rig}, asked for {config.rig}; leave --rig out, or prepare the data with it"
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
        raise InvalidInput(f"{path} is no list of receipts ({error}); choose another file, or remove it") from error


def result_json(report: ExtractionReport) -> dict[str, object]:
    """The report for machines, with bytes a frame."""
    values = asdict(report) | {"shards": [str(p) for p in report.shards]}
    return values | {"bytes_per_frame": report.smashed_bytes_per_frame, "raw_bytes_per_frame": report.raw_bytes_per_frame}


def _print(report: ExtractionReport, names: Sequence[str]) -> None:
    stages = {"voxelize": report.voxelize, "backbone": report.backbone, "codec": report.codec, "write": report.write}
    rows = [(name, f"{s.median_ms:.1f}", f"{s.p95_ms:.1f}") for name, s in stages.items()]
    print_table("milliseconds a frame", ("stage", "median", "p95"), rows)
    ratio = report.smashed_bytes_per_frame / max(report.raw_bytes_per_frame, 1)
    console.print(
        f"{report.frames} frames in {len(report.shards)} shards; {report.smashed_bytes_per_frame:,.0f} bytes a frame, the raw scan has "
        f"{report.raw_bytes_per_frame:,.0f} ({ratio:.2f} of it)"
    )
    if report.failures:
        print_table("left out", ("scan", "why"), [(names[f.index], f.reason) for f in report.failures])


if __name__ == "__main__":
    sys.exit(run_command(command))
