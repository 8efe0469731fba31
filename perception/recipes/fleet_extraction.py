"""The fleet of a job: its vehicles smash every scan into shards, and the server takes the shards in.

Read next: `perception/vehicle/extractor.py` (the vehicle's part) and `perception/server/ingest.py` (the server's part).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from ...core.errors import UpcycleError
from ...core.files import write_atomically
from ...core.ledger_rules import judge
from ...core.strict_json import read_json
from ...core.structures import PointCloud
from ..server.ingest import ingest
from ..training.detector_files import load_detector
from ..vehicle.extractor import ExtractionReport, Extractor, extract
from .job_folder import JobFolder


def extract_fleet(job: JobFolder) -> dict[str, float]:
    """Smash every scan of the fleet into shards and ingest them, unless that is done.

    Args:
        job: Its source model must be there.

    Returns:
        `bytes_per_frame` of the scenes, `raw_bytes_per_frame` of the scans, and the median milliseconds per frame of each stage:
        `voxelize_ms`, `backbone_ms`, `codec_ms`, `write_ms`. `cells` counts the cells at the cut of all scenes before the defences of the
        encoder, and `cells_sent` those that were sent; files of earlier versions lack these two.
    """
    summary = job.folder / "extraction.json"
    if not summary.exists():
        job.options.say("extracting the fleet's smashed scenes, then ingesting them")
        # Leftovers of a stopped run have other scene ids than the new receipts will have.
        for half in ("shards", "store"):
            shutil.rmtree(job.folder / half, ignore_errors=True)
        write_atomically(summary, json.dumps(_extract_and_ingest(job)).encode())
    found: dict[str, float] = read_json(summary, "the summary of an extraction", remedy="delete it to extract again")
    return found


def _extract_and_ingest(job: JobFolder) -> dict[str, float]:
    detector = load_detector(job.source_model)
    frames, rig, codec = job.config.fleet.open(), job.rig, job.config.codec
    extractor = Extractor(detector.encoder.to(job.options.device), rig, codec)
    receipts: dict[str, str] = {}

    def scan(index: int) -> Callable[[], PointCloud]:
        return lambda: rig.to_sensor(frames[index].points)

    def on_scene(index: int, scene_id: str) -> None:
        receipts[scene_id] = frames.ids[index]

    shards, store = job.folder / "shards", job.folder / "store"
    with job.timed("extract"), extractor.shard_writer(shards) as writer:
        report = extract([scan(i) for i in range(len(frames))], extractor, writer, on_scene=on_scene)
    for failure in report.failures[:3]:
        job.options.say(f"frame {frames.ids[failure.index]} gave no scene: {failure.reason}")
    if len(report.failures) > 3:
        job.options.say(f"{len(report.failures)} of {len(frames)} frames gave no scene")
    for finding in judge(report.ledger):
        job.options.say(f"warning: {finding.text}")
    if not report.frames:
        raise UpcycleError(f"none of the fleet's {len(frames)} frames gave a scene: {report.failures[0].reason}")
    with job.timed("ingest"):
        taken = ingest(shards, store, expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec, final=True)
    if taken.quarantined:
        raise UpcycleError(f"{len(taken.quarantined)} shards of this fleet were refused: {taken.quarantined[0].reason}")
    write_atomically(job.receipts, json.dumps(receipts).encode())
    return extraction_numbers(report)


def extraction_numbers(report: ExtractionReport) -> dict[str, float]:
    """The numbers of an extraction that reports show.

    Args:
        report: What `extract` returned.

    Returns:
        As `extract_fleet`.
    """
    stages = {"voxelize": report.voxelize, "backbone": report.backbone, "codec": report.codec, "write": report.write}
    values = {f"{name}_ms": stage.median_ms for name, stage in stages.items()}
    values |= {"bytes_per_frame": report.smashed_bytes_per_frame, "raw_bytes_per_frame": report.raw_bytes_per_frame}
    return values | {"cells": report.cells, "cells_sent": report.cells_sent}
