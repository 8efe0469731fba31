"""The fleet's jobs under kills: `extract` loses and doubles no scan, also when an uploader moves shards away; `ingest` no shard."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tiny
from faults.killing import KillCase, copied
from upcycle3d.core.point_files import write_bin
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.wire.codec import decode_scene
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.perception.wire.manifest import read_manifest
from upcycle3d.perception.wire.shards import read_members
from upcycle3d.tools import extract
from uploads import ENCODER, OTHER_ENCODER, SPEC, scene, upload

SCANS = 7


@cache
def _vehicle() -> Path:
    """An encoder and scans, made once; one extraction loads all code before the forks begin."""
    root = Path(tempfile.mkdtemp(prefix="faults_vehicle_"))
    save_encoder(root / "encoder.safetensors", tiny.source_model().encoder.eval())
    for i in range(SCANS):
        generator = torch.Generator().manual_seed(i)
        xyz = torch.rand(150, 3, generator=generator) * torch.tensor([12.0, 12.0, 3.0]) - torch.tensor([0.0, 6.0, 0.5])
        write_bin(root / "scans" / f"{i:04d}.bin", PointCloud(xyz=xyz, features=torch.rand(150, 1, generator=generator)))
    warm = root / "warm"
    copied(root / "scans", warm / "scans")
    shutil.copy(root / "encoder.safetensors", warm)
    with contextlib.redirect_stdout(io.StringIO()):  # its report does not belong into the campaign's
        _extract(warm)
    shutil.rmtree(warm)
    return root


def _extract_inputs(root: Path) -> None:
    copied(_vehicle(), root)


def _extract(root: Path) -> None:
    extract.command(
        extract.Extract(
            detector=root / "encoder.safetensors",
            out=root / "out",
            scans=(root / "scans",),
            receipts=root / "receipts.json",
            scenes_per_shard=2,
            resume=True,
            read=ScanOptions(z_shift=0.0, intensity_scale=1.0),
        )
    )


def _upload(root: Path) -> None:
    """Move finished shards away, as an uploader does: the tar, then its manifest."""
    target = root / "uploaded"
    target.mkdir(exist_ok=True)
    for manifest in (root / "out").glob("*.json") if (root / "out").is_dir() else ():
        if manifest.with_suffix(".tar").exists():  # an uploader that died between the two moves goes on
            os.replace(manifest.with_suffix(".tar"), target / f"{manifest.stem}.tar")
        os.replace(manifest, target / manifest.name)


def _upload_and_extract(root: Path) -> None:
    _upload(root)
    _extract(root)


def _extracted(root: Path) -> dict[str, Any]:
    """Content of every scene by scan. A scan without a scene, or with two, differs from an undisturbed run."""
    _upload(root)
    receipts: dict[str, str] = json.loads((root / "receipts.json").read_text())
    found: dict[str, Any] = {}
    for path in sorted((root / "uploaded").glob("*.json")):
        manifest = read_manifest(path)
        for _, blob in read_members(path.with_suffix(".tar"), manifest):
            smashed = decode_scene(blob, expected_spec=manifest.spec, expected_fingerprint=manifest.encoder_fingerprint)
            content = hashlib.sha256(smashed.coords.numpy().tobytes() + smashed.features.numpy().tobytes()).hexdigest()
            found.setdefault(receipts.get(smashed.scene_id, "no receipt"), []).append(content)
    left = sorted(p.name for p in (root / "out").iterdir() if p.name != ".lock")
    return found | {"receipts": sorted(receipts.values()), "left in the folder": left}


@cache
def _uploads() -> Path:
    """Two good shards, one of another encoder, one with a flipped bit, one that repeats a scene."""
    folder = Path(tempfile.mkdtemp(prefix="faults_uploads_"))
    first = scene(0)
    upload(folder, [first, scene(1)])
    upload(folder, [scene(2)])
    upload(folder, [scene(3, fingerprint=OTHER_ENCODER)])
    damaged = upload(folder, [scene(4)]).with_suffix(".tar")
    data = bytearray(damaged.read_bytes())
    data[600] ^= 4
    damaged.write_bytes(data)
    upload(folder, [scene(5), scene(6)])
    return folder


def _ingest_inputs(root: Path) -> None:
    copied(_uploads(), root / "incoming")


def _ingest(root: Path) -> None:
    ingest(root / "incoming", root / "store", expected_fingerprint=ENCODER, expected_spec=SPEC)


def _ingested(root: Path) -> dict[str, Any]:
    store = SmashedStore(root / "store")

    def files(folder: Path) -> list[str]:
        return sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix in (".tar", ".json"))

    return {
        "scenes": sorted(store[i].scene_id for i in range(len(store))),
        "shards": sorted(p.name for p in (root / "store" / "shards").iterdir()),
        "quarantine": files(root / "store" / "quarantine"),
        "incoming": sorted(p.name for p in (root / "incoming").iterdir()),
        "litter": sorted(p.name for p in (root / "store").rglob(".*.tmp")),
    }


EXTRACT = KillCase(name="extract", inputs=_extract_inputs, begin=_extract, go_on=_extract, result=_extracted)
EXTRACT_WITH_UPLOADS = replace(EXTRACT, name="extract while shards are moved away", go_on=_upload_and_extract)
INGEST = KillCase(name="ingest", inputs=_ingest_inputs, begin=_ingest, go_on=_ingest, result=_ingested)

FLEET_CASES: tuple[KillCase, ...] = (EXTRACT, EXTRACT_WITH_UPLOADS, INGEST)
