"""``upcycle3d upcycle PRESET``: train the server half on labelled frames and smashed scenes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from ..core.errors import InvalidInput
from ..core.rig import RigSpec
from ..core.structures import Labels
from ..datasets.data_split import DataSplit
from ..perception.recipes.assembly import feature_object_database, fleet_store, labeled_batches, unlabeled_batches
from ..perception.recipes.presets import Preset
from ..perception.server.methods import METHODS
from ..perception.server.store import SmashedStore
from ..perception.server.trainer import upcycle
from ..perception.training.detector_files import TEACHER_FILE, load_detector, save_detector, save_run_detector
from ..perception.training.run_folder import RunFolder
from .console import console, device, print_table, run_command, write_json
from .data_option import DataOption
from .train import preset_choices


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """Learn from unlabelled smashed scenes beside a few labelled frames, by UpCycling or by a baseline."""

    preset: Preset
    """detector and settings, as in training; override any field, as in --preset.upcycle.loop.optim.lr 0.001"""
    data: DataOption
    """Labeled split of a prepared dataset, `train` where no split is named. The oracles take it from the target domain."""
    out: Path
    """Run folder to write."""
    detector: Path = Path("runs/source")
    """Run folder of the source model, from which every method starts. The fleet must run its encoder."""
    store: Path | None = None
    """Store of the fleet's smashed scenes, for the methods that learn from them."""
    raw: DataOption | None = None
    """Raw unlabeled scans, for the methods that learn from them; `unlabelled` where no split is named. Labels are not read."""
    rig: RigSpec = field(default_factory=RigSpec)
    """the fleet's rig, as given to extract and ingest: the store must be of this encoder behind this rig"""
    method: Literal[tuple(METHODS)] = "upcycling"  # type: ignore[valid-type]
    """what to do with them; see docs/methods.md"""
    codec: Literal["fp16", "int8"] | None = None
    """codec round trip of labelled features; the store's own by default"""
    truth: tuple[Path, DataOption] | None = None
    """Receipts of `extract` and the prepared frames that were extracted: their labels measure the pseudo labels and never train."""
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
    config, method = replace(config, data=config.data.or_split("train")), METHODS[config.method]
    settings = replace(config.preset.upcycle, loop=replace(config.preset.upcycle.loop, seed=config.seed))
    preset = replace(config.preset, upcycle=settings)
    detector, detector_config = load_detector(config.detector)
    if detector_config != preset.detector:
        raise InvalidInput(f"{config.detector} holds a detector other than the preset's; pass the preset it was trained with")
    # F-GT's size normalisation holds for the labelled half too, but the oracles' labels have the right size already.
    shift = settings.f_gt.size_shift if method.labeled == "source" else (0.0, 0.0, 0.0)
    labeled = labeled_batches(preset, config.data, batch_size=settings.labeled_batch, seed=config.seed, size_shift=shift)
    if method.unlabeled == "raw" and config.raw is None:
        raise InvalidInput(f"{config.method} learns from raw unlabelled scans: give --raw DIR[:SPLIT]")
    if method.unlabeled == "smashed" and config.store is None:
        raise InvalidInput(f"{config.method} learns from smashed scenes: give --store; `upcycle3d extract` and `ingest` make one")
    # A method without scenes still gets their codec, so that all methods see the same labelled features.
    store = None if config.store is None else fleet_store(config.store, detector, config.rig)
    codec = config.codec or _codec_of(store)
    raw = None if config.raw is None or method.unlabeled != "raw" else config.raw.or_split("unlabelled").open()
    scans = None if raw is None else unlabeled_batches(preset, raw, batch_size=settings.unlabeled_batch, seed=config.seed)
    truth = read_truth(*config.truth) if config.truth else None
    run = RunFolder.create(config.out, replace(_what_decides(config), preset=preset), seed=config.seed, resume=config.resume)
    features = (
        feature_object_database(config.out / "feature_gt", config.data.open(), detector, settings.f_gt, codec=codec)
        if method.f_gt
        else None
    )
    teacher = upcycle(
        detector.to(device(config.device)),
        method=method,
        labeled=labeled,
        store=store,
        pasted_objects=features,
        config=settings,
        scans=scans,
        codec=codec,
        truth=truth,
        run=run,
        workers=config.workers,
    )
    save_run_detector(config.out, detector.cpu(), preset.detector)
    save_detector(config.out / TEACHER_FILE, teacher.cpu(), preset.detector)
    scenes = len(raw) if raw is not None else len(store) if store is not None and method.unlabeled == "smashed" else 0
    steps = settings.loop.total_steps
    print_table(
        "upcycled",
        ("method", "labelled frames", "unlabelled scenes", "steps"),
        [(config.method, len(labeled.frames), scenes, steps)],
    )
    console.print(f"student and teacher: {config.out}; next: upcycle3d evaluate run --detector {config.out} --data DIR:val")
    write_json(config.json, {"method": config.method, "labelled": len(labeled.frames), "scenes": scenes, "run": str(config.out)})


def _codec_of(store: SmashedStore | None) -> str:
    if store is None:
        return "fp16"
    if len(store.codecs) > 1:
        raise InvalidInput(f"the store holds scenes of several codecs ({', '.join(store.codecs)}); choose one with --codec")
    return store.codecs[0]


def _what_decides(config: Upcycle) -> Upcycle:
    """The configuration without what does not change the result: a run may be resumed with other workers, and may be moved."""
    return replace(
        config,
        data=config.data.resolved(),
        detector=config.detector.resolve(),
        store=None if config.store is None else config.store.resolve(),
        raw=None if config.raw is None else config.raw.resolved(),
        out=Path("."),
        truth=None,
        resume=False,
        workers=0,
        device="",
        json=None,
    )


def read_truth(receipts: Path, data: DataSplit) -> dict[str, Labels]:
    """True labels by scene id, from the receipts that ``extract`` left with its caller and the prepared frames."""
    frames = data.open()
    labels = {frame_id: frames.labels(i) for i, frame_id in enumerate(frames.ids)}
    try:
        frame_of = json.loads(receipts.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read the receipts {receipts}: {error}; `upcycle3d extract --receipts` writes them") from error
    found = {scene: labels.get(frame) for scene, frame in frame_of.items()}
    known = {scene: truth for scene, truth in found.items() if truth is not None}
    if len(known) < len(found):
        raise InvalidInput(
            f"{len(found) - len(known)} of {len(found)} scans in {receipts} have no labels in {data}; prepare those frames too"
        )
    return known


if __name__ == "__main__":
    sys.exit(run_command(command, parsed_as=ARGUMENTS))
