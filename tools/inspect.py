"""`upcycle3d inspect`: what a shard, a store, a run folder, a detector or a prepared dataset holds."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.cut import CutSpec
from ..core.errors import InvalidInput, UpcycleError
from ..core.foreign_text import shown
from ..core.rig import RigSpec
from ..core.tensor_file import read_tensors
from ..core.trained_on import TrainedOn
from ..datasets.fingerprint import short
from ..datasets.gt_database import GtDatabase
from ..datasets.prepared import PreparedDataset
from ..perception.models.encoders.defended import defences_of
from ..perception.models.encoders.fingerprint import encoder_fingerprint
from ..perception.models.upcycled import UpcycledDetectorConfig
from ..perception.recipes.upcycle_head import HEAD_FILE, RIGS
from ..perception.server.store import CATALOG, QUARANTINE, SmashedStore
from ..perception.server.store_note import read_store_note
from ..perception.training.detector_files import DETECTOR_FILE, load_detector
from ..perception.training.run_folder import RunFolder
from ..perception.wire.encoder_file import load_encoder
from ..perception.wire.manifest import read_manifest
from .console import print_table, run_command, write_json

_LISTED = 30


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a path holds: a shard (.tar or its .json), a folder of shards, a store, a run folder, weights, an encoder or a prepared dataset."""

    path: tyro.conf.Positional[Path]
    """The file or folder to look at."""
    verify: bool = False
    """Also read every point of a prepared dataset, every object of its GT databases, and compare checksums, to find a failing disk or
    a bad copy."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Inspect) -> None:
    """What a shard, a folder of shards, a store, a run folder, a detector or a prepared dataset holds."""
    path = config.path
    if not path.exists():
        raise InvalidInput(f"there is nothing at {path}")
    kind, facts = facts_of(path)
    damaged: tuple[str, ...] = ()
    broken: dict[str, str] = {}
    if config.verify:
        if kind != "prepared dataset":
            raise InvalidInput(f"--verify reads the points of a prepared dataset, and {path} is a {kind}; drop the option")
        damaged = PreparedDataset(path).verify()
        facts["damaged frames"] = ", ".join(damaged) or "none"
        broken = damaged_databases(path)
        facts["damaged GT databases"] = ", ".join(broken) or "none"
    print_table(f"{kind}: {path}", ("what", "value"), list(facts.items()))
    write_json(config.json, {"kind": kind, **facts})
    if damaged:
        raise UpcycleError(
            f"the points of {len(damaged)} frames in {path} have another checksum, the first is {damaged[0]}; give the same `upcycle3d "
            "prepare` command again, which reads only damaged parts again, or copy the dataset again"
        )
    if broken:
        raise UpcycleError("; ".join(broken.values()))


def damaged_databases(root: Path) -> dict[str, str]:
    """Read every object of the GT databases of a prepared dataset.

    Args:
        root: Folder of the dataset.

    Returns:
        What is wrong, by name of the split; empty where every database is whole.
    """
    found = {}
    for header in sorted(root.glob("gt_database/*/database.json")):
        try:
            damaged = GtDatabase(header.parent).verify()
        except InvalidInput as error:
            found[header.parent.name] = str(error)
            continue
        if damaged:
            found[header.parent.name] = (
                f"{len(damaged)} objects in {header.parent} have another checksum; delete this folder, and prepare again"
            )
    return found


def facts_of(path: Path) -> tuple[str, dict[str, object]]:
    """Find out what lies at a path.

    Args:
        path: A file or folder.

    Returns:
        Its kind in words, and facts about it by name.

    Raises:
        InvalidInput: It is nothing that this program writes.
    """
    if path.suffix in (".tar", ".json") and path.with_suffix(".json").exists():
        return "shard", _shard(path.with_suffix(".json"))
    if (path / CATALOG).exists():
        return "store of smashed scenes", _store(path)
    if (path / "config.json").exists():
        return "run folder", _run(path)
    if (path / "dataset.json").exists():
        return "prepared dataset", _prepared(path)
    if (path / DETECTOR_FILE).exists():
        return "folder of a detector", _weights(path / DETECTOR_FILE) | _specialists(path)
    if path.suffix == ".safetensors":
        return "weights", _weights(path)
    if path.is_dir() and (manifests := _manifests(path)):
        return "folder of shards", _shards(manifests)
    if path.is_dir() and not any(path.iterdir()):
        raise InvalidInput(f"the folder {path} is empty")
    raise InvalidInput(
        f"{path} is not a shard, folder of shards, store, run folder, prepared dataset or safetensors file of this program"
    )


def _shard(manifest_path: Path) -> dict[str, object]:
    manifest = read_manifest(manifest_path)
    sizes = [m.length for m in manifest.members]
    return {
        "scenes": len(sizes),
        "bytes per scene": round(sum(sizes) / max(len(sizes), 1)),
        "cut": manifest.spec.layer,
        "channels": manifest.spec.channels,
        "grid at the cut (z, y, x)": manifest.spec.shape,
        **_keypoints(manifest.spec),
        "codec": manifest.codec,
        "encoder fingerprint": manifest.encoder_fingerprint,
        **(
            {}
            if manifest.sampling.every_scan
            else {"sampling": f"gaps of {manifest.sampling.gap} scans, share {manifest.sampling.share:g}"}
        ),
        "tar file present": manifest_path.with_suffix(".tar").exists(),
    }


def _manifests(folder: Path) -> list[Path]:
    """The manifests among the files of a folder, by their names."""
    return sorted(path for path in folder.glob("*.json") if re.fullmatch(r"[0-9a-f]{32}", path.stem))


def _shards(manifests: Sequence[Path]) -> dict[str, object]:
    """All shards of a folder together, then one row for each; one that cannot be read has the reason in its row."""
    rows: dict[str, object] = {}
    scenes: Counter[str] = Counter()
    encoders: set[str] = set()
    for path in manifests:
        try:
            manifest = read_manifest(path)
        except UpcycleError as error:
            rows[path.name] = str(error)
            continue
        scenes[manifest.codec] += len(manifest.members)
        encoders.add(manifest.encoder_fingerprint)
        missing = "" if path.with_suffix(".tar").exists() else ", tar file missing"
        rows[path.name] = (
            f"{len(manifest.members)} scenes, {manifest.codec}, encoder {manifest.encoder_fingerprint[:16]}…{missing}"
        )
    left = len(rows) - _LISTED
    return {
        "shards": len(manifests),
        "scenes": sum(scenes.values()),
        "codecs": ", ".join(f"{codec} {count}" for codec, count in sorted(scenes.items())) or "none",
        "encoder fingerprints" if len(encoders) > 1 else "encoder fingerprint": ", ".join(sorted(encoders)) or "none",
        **dict(list(rows.items())[:_LISTED]),
        **({"more shards": left} if left > 0 else {}),
    }


def _keypoints(spec: CutSpec) -> dict[str, object]:
    """Facts about the keypoints of a cut; empty without keypoints."""
    return (
        {}
        if spec.keypoints is None
        else {"keypoints per scene, at most": spec.keypoints.count, "channels per keypoint": spec.keypoints.channels}
    )


def _store(path: Path) -> dict[str, object]:
    store = SmashedStore(path)
    quarantine = sorted((path / QUARANTINE).glob("*.reason.txt"))
    empty = int((store.voxels == 0).sum())
    facts: dict[str, object] = {
        "scenes": len(store),
        "cells per scene, median": int(store.voxels.median()) if len(store) else 0,
        **({"scenes without a cell": empty} if empty else {}),
        "codecs": ", ".join(store.codecs),
        "cut": store.spec.layer,
        **_keypoints(store.spec),
    }
    if store.spec.keypoints is not None and len(store):
        facts["keypoints per scene, median"] = int(store.keypoints.median())
    note = read_store_note(path)
    if note is not None:
        facts["defences of its uploads"] = note.defences
        known = "; ".join(note.about(store.codecs)) if note.measured else ""
        facts["what these give away"] = known or "not measured here; `upcycle3d audit`, then `ingest --audit`"
    return facts | {
        "encoder fingerprint": store.fingerprint,
        "quarantined shards": len(quarantine),
        **{f"quarantined {q.name.removesuffix('.reason.txt')[:40]}": _reason(q) for q in quarantine[:_LISTED]},
        **({"quarantined": f"and {len(quarantine) - _LISTED} more"} if len(quarantine) > _LISTED else {}),
    }


def _reason(path: Path) -> str:
    """Why a shard was refused: the line `Reason:` of the text beside it."""
    try:
        with path.open(encoding="utf-8", errors="backslashreplace") as file:
            text = file.read(20_000)
    except OSError as error:
        return f"the reason cannot be read: {error.strerror}"
    lines = [line.removeprefix("Reason: ") for line in text.splitlines() if line.startswith("Reason: ")]
    return shown(lines[0] if lines else text, most=1000)


def _run(path: Path) -> dict[str, object]:
    run = RunFolder.open(path)
    metrics = run.metrics()
    files = sorted(p.name for p in path.glob("*.safetensors"))
    status = {f"status {k}": v for k, v in run.status().items() if v not in ("", None)}
    return status | {
        "metrics": len(metrics),
        **{f"last {name}": _short(value) for name, value in (metrics[-1] if metrics else {}).items()},
        "files": ", ".join(files),
    }


def _prepared(path: Path) -> dict[str, object]:
    dataset = PreparedDataset(path)
    facts: dict[str, object] = {"frames": len(dataset), "classes": ", ".join(dataset.classes)}
    facts |= {
        f"split {name}": f"{n} frames, fingerprint {short(PreparedDataset(path, name).split_fingerprint(), 16)}"
        for name, n in dataset.splits.items()
    }
    facts |= {"point features": ", ".join(dataset.feature_names), "rig": str(dataset.rig), "layout": dataset.origin.layout}
    return facts | {"made from": str(dataset.origin.root or "-")} | {f"option {k}": v for k, v in dataset.origin.options}


def _weights(path: Path) -> dict[str, object]:
    file = read_tensors(path)
    tensors, meta = file.tensors, file.meta
    facts: dict[str, object] = {"tensors": len(tensors), "values": sum(t.numel() for t in tensors.values())}
    for name, value in meta.items():
        if name == "trained_on" and (trained := TrainedOn.from_metadata(file)) is not None:
            facts |= _training(trained)
        else:
            facts[name] = value if len(value) < 200 else f"{value[:200].rpartition(' ')[0] or value[:200]} …"
    if meta.get("format", "").startswith("upcycle3d detector"):
        detector = load_detector(path)
        facts["defences"] = defences_of(detector.encoder)
        if isinstance(detector.config, UpcycledDetectorConfig):
            facts |= {"detector": detector.config.label, "upcycled head": str(detector.config.head)}
    if meta.get("format", "").startswith("upcycle3d encoder"):
        encoder = load_encoder(path)
        facts["defences"] = defences_of(encoder)
        facts["fingerprint without a rig"] = encoder_fingerprint(encoder, RigSpec())
        if encoder.trained_on is not None:
            facts["fingerprint with the rig of the training"] = encoder_fingerprint(encoder, encoder.trained_on.rig)
    return facts


def _specialists(folder: Path) -> dict[str, object]:
    """What `moe detector` wrote of the specialists beside the detector: the file itself holds the rig of one training only."""
    path = folder / HEAD_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rigs = {str(name): str(rig) for name, rig in found[RIGS].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"rigs of the specialists": f"{HEAD_FILE} does not say"}
    return {f"rig of the specialist {shown(name, most=60)}": shown(rig, most=100) for name, rig in rigs.items()}


def _short(value: object) -> object:
    """A number as people read it; other values as they are."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _training(trained: TrainedOn) -> dict[str, object]:
    """What the training of weights knew, one fact per row."""
    facts: dict[str, object] = {
        "rig of the training": str(trained.rig),
        "classes": ", ".join(trained.classes),
        "point features": ", ".join(trained.feature_names) or "none",
        "range (x, y, z from; to)": "{:g}, {:g}, {:g}; {:g}, {:g}, {:g} m".format(*trained.point_range),
        "scans of the training": "what a camera sees" if trained.camera_view else "not cropped to a camera",
    }
    read = {"axes": trained.axes, "columns": trained.columns, "dtype": trained.dtype}
    facts |= {f"read with {name}": value if isinstance(value, str) else " ".join(value) for name, value in read.items() if value}
    if trained.reader_scale != 1:
        facts["intensity factor of the reader"] = f"{trained.reader_scale:.6g}"
    if trained.scans is not None:
        s = trained.scans
        facts["medians of the training"] = (
            f"{s.points:,.0f} points in range, {s.cells:,.0f} cells, road at z = {s.ground_height:.2f} m, intensity {s.intensity:.3g} "
            f"({s.scans} scans)"
        )
    return facts


if __name__ == "__main__":
    sys.exit(run_command(command))
