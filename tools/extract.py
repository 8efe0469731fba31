"""``upcycle3d extract``: the vehicle side. Scans in, smashed shards out. Loads no decoder, label, server or training code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ..datasets.point_files import read_points, scan_files
from ..perception.files import write_atomically
from ..perception.models.encoders.fingerprint import RigSpec
from ..perception.structures import InvalidInput, PointCloud
from ..perception.vehicle.encoder_file import load_encoder
from ..perception.vehicle.extractor import ExtractionReport, Extractor, extract
from ..perception.vehicle.shards import ShardWriter
from .console import console, print_table, progress_bar, write_json


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Run the vehicle half of a detector over scans and write what may leave the vehicle: features at the cut, in shards."""

    encoder: Path
    """encoder.safetensors, or the run folder that holds it"""
    scans: tuple[Path, ...]
    """scan files (.bin, .npy, .pcd) or folders of them, in this order"""
    out: Path
    """folder for shards"""
    ids: Path | None = None
    """file of scan names (without suffix), one a line: take only these"""
    rig: RigSpec = field(default_factory=RigSpec)
    """how this vehicle's scans are brought to the encoder's: mounting height and intensity scale"""
    codec: Literal["fp16", "int8"] = "fp16"
    """how features are stored"""
    scenes_per_shard: int = 256
    """a shard is closed when it holds so many; more hide the order better, fewer lose less"""
    receipts: Path | None = None
    """keep a list of scan and scene id here. It stays with you: no shard links the two. For measuring pseudo labels"""
    device: str = "cpu"
    """cpu or cuda"""
    json: Path | None = None
    """also write the result for machines"""


def command(config: Extract) -> None:
    """Turn scans into smashed shards; a scan that cannot be read is reported and costs nothing else."""
    paths = scan_files(config.scans)
    if config.ids is not None:
        wanted = set(config.ids.read_text().split())
        paths = tuple(p for p in paths if p.stem in wanted)
        if len(paths) < len(wanted):
            missing = sorted(wanted - {p.stem for p in paths})
            raise InvalidInput(
                f"{len(missing)} of the {len(wanted)} scans in {config.ids} are not in {config.scans}: {missing[:3]}"
            )
    file = config.encoder / "encoder.safetensors" if config.encoder.is_dir() else config.encoder
    extractor = Extractor(load_encoder(file).to(config.device), config.rig, config.codec)
    receipts: dict[str, str] = {}
    writer = ShardWriter(
        config.out,
        spec=extractor.spec,
        fingerprint=extractor.fingerprint,
        codec=config.codec,
        scenes_per_shard=config.scenes_per_shard,
    )
    with progress_bar("extract", len(paths)) as advance, writer:
        report = extract(
            (_reader(path) for path in paths),
            extractor,
            writer,
            on_frame=lambda done: advance(done, len(paths)),
            on_scene=lambda index, scene_id: receipts.update({scene_id: paths[index].stem}),
        )
    if config.receipts is not None:
        write_atomically(config.receipts, json.dumps(receipts, indent=1).encode())
    _print(report, paths)
    console.print(
        f"encoder fingerprint {extractor.fingerprint[:16]}…; next: upcycle3d ingest {config.out} --encoder {config.encoder} --store STORE"
    )
    write_json(config.json, result_json(report))


def result_json(report: ExtractionReport) -> dict[str, object]:
    """The report for machines, with bytes a frame."""
    values = asdict(report) | {"shards": [str(p) for p in report.shards]}
    return values | {"bytes_per_frame": report.smashed_bytes_per_frame, "raw_bytes_per_frame": report.raw_bytes_per_frame}


def _reader(path: Path) -> Callable[[], PointCloud]:
    return lambda: read_points(path)


def _print(report: ExtractionReport, paths: Sequence[Path]) -> None:
    stages = {"voxelize": report.voxelize, "sparse backbone": report.backbone, "codec": report.codec, "write": report.write}
    rows = [(name, f"{s.median_ms:.1f}", f"{s.p95_ms:.1f}") for name, s in stages.items()]
    print_table("milliseconds a frame", ("stage", "median", "p95"), rows)
    ratio = report.smashed_bytes_per_frame / max(report.raw_bytes_per_frame, 1)
    console.print(
        f"{report.frames} frames in {len(report.shards)} shards; {report.smashed_bytes_per_frame:,.0f} bytes a frame, the raw scan has "
        f"{report.raw_bytes_per_frame:,.0f} ({ratio:.2f} of it)"
    )
    if report.failures:
        print_table("left out", ("scan", "why"), [(paths[f.index].name, f.reason) for f in report.failures])
