"""``upcycle3d upcycle PRESET``: train the server half on labelled frames and smashed scenes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from ..datasets.prepared import PreparedDataset
from ..perception.models.encoders.fingerprint import RigSpec, encoder_fingerprint
from ..perception.presets import Preset
from ..perception.server.feature_gt import FeatureDatabase, build_feature_database
from ..perception.server.methods import METHODS
from ..perception.server.store import SmashedStore
from ..perception.server.trainer import upcycle
from ..perception.structures import InvalidInput, Labels
from ..perception.training.detector_files import TEACHER_FILE, load_detector, save_detector, save_run_detector
from ..perception.training.run_folder import RunFolder
from .console import console, print_table, write_json
from .train import labelled_batches, preset_choices


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """Learn from unlabelled smashed scenes beside a few labelled frames, by UpCycling or by a baseline."""

    preset: Preset
    """detector and settings, as in training; override any field, as in --preset.upcycle.loop.optim.lr 0.001"""
    data: Path
    """prepared dataset with the labelled split (for the oracles: of the target)"""
    out: Path
    """run folder to write"""
    checkpoint: Path = Path("runs/source")
    """trained detector to start from: the encoder the fleet runs"""
    split: str = "train"
    """labelled split"""
    store: Path | None = None
    """store of smashed scenes"""
    method: Literal[tuple(METHODS)] = "upcycling"  # type: ignore[valid-type]
    """what to do with them; see docs/methods.md"""
    codec: Literal["fp16", "int8"] | None = None
    """codec round trip of labelled features; the store's own by default"""
    truth: tuple[Path, Path] | None = None
    """receipts of extract and the prepared dataset they speak of: log how good pseudo labels are. Never used for training"""
    seed: int = 0
    """order of frames and scenes, augmentation, pasting"""
    resume: bool = False
    """go on with a run that was stopped"""
    workers: int = 1
    """processes that prepare batches"""
    device: str = "cpu"
    """cpu or cuda"""
    json: Path | None = None
    """also write the result for machines"""


ARGUMENTS = tyro.extras.subcommand_type_from_defaults(preset_choices(Upcycle), prefix_names=False)


def command(config: Upcycle) -> None:
    """Train the server half on labelled frames and smashed scenes."""
    method = METHODS[config.method]
    settings = replace(config.preset.upcycle, loop=replace(config.preset.upcycle.loop, seed=config.seed))
    preset = replace(config.preset, upcycle=settings)
    detector, detector_config = load_detector(config.checkpoint)
    if detector_config != preset.detector:
        raise InvalidInput(f"{config.checkpoint} holds a detector other than the preset's; pass the preset it was trained with")
    detector.to(config.device)
    store = SmashedStore(config.store) if config.store is not None and method.unlabelled else None
    codec = config.codec or (store.codecs[0] if store is not None else "fp16")
    labelled = labelled_batches(preset, config.data, config.split, batch_size=settings.labelled_batch, seed=config.seed)
    frames = PreparedDataset(config.data, config.split)
    recorded = replace(config, preset=preset, resume=False, json=None, data=config.data.resolve(), out=config.out.resolve())
    run = RunFolder.create(config.out, recorded, seed=config.seed, resume=config.resume)
    features = None
    if method.f_gt:
        path, split = config.out / "feature_gt", frames.split_fingerprint()
        encoder = encoder_fingerprint(detector.encoder, RigSpec())
        if not path.exists():
            build_feature_database(
                path, frames, detector, codec=codec, config=settings.f_gt, split_fingerprint=split, encoder_fingerprint=encoder
            )
        features = FeatureDatabase.open(path, split_fingerprint=split, encoder_fingerprint=encoder)
    teacher = upcycle(
        detector,
        method=method,
        labelled=labelled,
        store=store,
        features=features,
        config=settings,
        codec=codec,
        truth=read_truth(*config.truth) if config.truth else None,
        run=run,
        workers=config.workers,
    )
    save_run_detector(config.out, detector.cpu(), preset.detector)
    save_detector(config.out / TEACHER_FILE, teacher.cpu(), preset.detector)
    scenes = 0 if store is None else len(store)
    print_table(
        "upcycled",
        ("method", "labelled frames", "smashed scenes", "steps"),
        [(config.method, len(frames), scenes, settings.loop.total_steps)],
    )
    console.print(
        f"student and teacher: {config.out}; next: upcycle3d evaluate run --detector {config.out} --data DATA --split val"
    )
    write_json(config.json, {"method": config.method, "labelled": len(frames), "scenes": scenes, "run": str(config.out)})


def read_truth(receipts: Path, data: Path) -> dict[str, Labels]:
    """True labels by scene id, from the receipts that ``extract`` left with its caller and the prepared frames."""
    frames = PreparedDataset(data)
    labels = {frame_id: frames.labels(i) for i, frame_id in enumerate(frames.ids)}
    found = {scene: labels.get(frame) for scene, frame in json.loads(receipts.read_text()).items()}
    known = {scene: truth for scene, truth in found.items() if truth is not None}
    if len(known) < len(found):
        raise InvalidInput(
            f"{len(found) - len(known)} of {len(found)} scans in {receipts} have no labels in {data}; prepare those frames too"
        )
    return known
