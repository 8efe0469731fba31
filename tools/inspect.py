"""`upcycle3d inspect`: what a shard, a store, a run folder, a detector or a prepared dataset holds."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.cut import CutSpec
from ..core.errors import InvalidInput, UpcycleError
from ..core.foreign_text import shown
from ..core.rig import RigSpec
from ..core.tensor_file import read_tensors
from ..datasets.fingerprint import short
from ..datasets.gt_database import GtDatabase
from ..datasets.prepared import PreparedDataset
from ..perception.models.encoders.fingerprint import encoder_fingerprint
from ..perception.server.store import CATALOG, QUARANTINE, SmashedStore
from ..perception.training.run_folder import RunFolder
from ..perception.wire.encoder_file import load_encoder
from ..perception.wire.manifest import read_manifest
from .console import print_table, run_command, write_json

_LISTED = 30


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a path holds: a shard (.tar or its .json), a store, a run folder, weights, an encoder or a prepared dataset."""

    path: tyro.conf.Positional[Path]
    """The file or folder to look at."""
    verify: bool = False
    """Also read every point of a prepared dataset, every object of its GT databases, and compare checksums, to find a failing disk or
    a bad copy."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Inspect) -> None:
    """What a shard, a store, a run folder, a detector or a prepared dataset holds."""
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
    if path.suffix == ".safetensors":
        return "weights", _weights(path)
    raise InvalidInput(f"{path} is not a shard, store, run folder, prepared dataset or safetensors file of this program")


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
        "last metrics": json.dumps(metrics[-1] if metrics else {}),
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
    facts |= {name: value if len(value) < 200 else value[:200] + "…" for name, value in meta.items()}
    if meta.get("format", "").startswith("upcycle3d encoder"):
        encoder = load_encoder(path)
        facts["fingerprint without a rig"] = encoder_fingerprint(encoder, RigSpec())
        if encoder.trained_on is not None:
            facts["fingerprint with the rig of the training"] = encoder_fingerprint(encoder, encoder.trained_on.rig)
    return facts


if __name__ == "__main__":
    sys.exit(run_command(command))
