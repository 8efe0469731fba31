"""The jobs that users start: train a preset, upcycle it, score a detector. Commands and Python programs call these functions.

Each takes names and folders, builds what the trainers need (`assembly.py`), runs, and leaves a run folder. `import upcycle3d` exports them as
`train`, `upcycle` and `evaluate`. Read next: `presets.py` for the settings, `pipeline.py` for all jobs in order.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.errors import InvalidInput
from ...core.rig import RigSpec
from ...datasets.data_split import DataSplit
from ..evaluation.score import EvaluationReport, Protocol, score_detector
from ..models.detector import Detector
from ..server.methods import Method, method_record
from ..server.store import SmashedStore
from ..server.trainer import upcycle
from ..training.detector_files import TEACHER_FILE, load_detector, save_detector, save_run_detector
from ..training.distributed import DistributedContext, init_distributed, per_rank
from ..training.loop import LoopConfig, create_run
from ..training.run_folder import RunFolder
from ..training.supervised import train_supervised
from ..wire.codec import check_codec
from .assembly import feature_object_database, fleet_store, labeled_batches, unlabeled_batches
from .job_inputs import Data, check_run_options, find_data, find_method, find_preset, read_truth
from .presets import Preset
from .scan_survey import Survey, data_warnings, describe_training, survey_split


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What decides a supervised training: stored in its run folder and compared when the run is resumed."""

    preset: Preset
    """Detector and training settings."""
    data: DataSplit
    """Labeled split, with an absolute folder."""
    seed: int
    """Seed of weights, order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What a supervised training gave."""

    detector: Detector
    """The trained detector, on the CPU, in evaluation mode."""
    steps: int
    """Optimizer steps done."""
    frames: int
    """Labeled frames in the split."""
    seconds: float
    """Duration of the training loop."""
    loss: Mapping[str, float]
    """Loss terms of the last step."""
    is_main: bool = True
    """Whether this process wrote the run folder; False in all but the first process of `torchrun`."""
    survey: Survey | None = None
    """Statistics and coverage of the labeled frames, measured before the training."""


@dataclass(frozen=True, kw_only=True)
class UpcyclingRecord:
    """What decides an upcycling run: stored in its run folder and compared when the run is resumed."""

    preset: Preset
    """Detector and upcycling settings."""
    method: str | Mapping[str, str | float | bool | None]
    """Name of the method, or the fields of the caller's own method (`method_record`)."""
    data: DataSplit
    """Labeled split, with an absolute folder."""
    detector: Path
    """Run folder of the source model."""
    store: Path | None
    """Store of smashed scenes."""
    raw: DataSplit | None
    """Raw unlabeled scans."""
    rig: RigSpec
    """Rig of the fleet."""
    codec: str | None
    """Codec of the labeled features; None takes the store's own."""
    seed: int
    """Seed of order, augmentation and pasting."""


@dataclass(frozen=True, kw_only=True)
class UpcycleOutcome:
    """What an upcycling run gave."""

    student: Detector
    """The trained detector after the last step, on the CPU, in evaluation mode. This is the result."""
    teacher: Detector
    """Its exponential moving average."""
    steps: int
    """Optimizer steps."""
    frames: int
    """Labeled frames."""
    scenes: int
    """Unlabeled scenes or scans that the method learned from."""


def train_preset(
    preset: Preset | str,
    data: Data,
    out: str | Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    resume: bool = False,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> TrainOutcome:
    """Train a detector on the labeled frames of a prepared dataset.

    Under `torchrun` every process takes its own batches, and only the first one writes the run folder.

    Args:
        preset: Name of a preset, or a preset with your own settings.
        data: Labeled split, `DIR[:SPLIT]`; `train` where no split is named.
        out: Run folder to write: configuration, metrics, checkpoints, detector and encoder file.
        seed: Decides the initial weights, the order of the frames and the augmentation.
        steps: Optimizer steps, instead of the preset's number.
        resume: Continue a run that was stopped.
        workers: Processes that prepare batches. The result does not depend on their number.
        device: `cpu`, `cuda` or `cuda:N`.
        progress: Print a line every few steps.

    Returns:
        The detector and what the training did.

    Raises:
        InvalidInput: An argument cannot be used, the dataset has other classes than the preset, or `out` holds another run.
        NonFiniteLoss: A loss became NaN or infinite; the message names the term and the frames.

    Example:
        outcome = upcycle3d.train("kitti_small", "data/kitti:train", "runs/source")
        found = outcome.detector.detect(scan)
    """
    device = check_run_options(seed=seed, steps=steps, workers=workers, device=device)
    preset, split, out = find_preset(preset), find_data(data, "train"), Path(out)
    loop = _loop(preset.train.loop, seed, steps)
    preset = replace(preset, train=replace(preset.train, loop=loop))
    context = init_distributed()
    if preset.train.gt_sampling:
        _ensure_gt_database(split, context)
    labeled = labeled_batches(preset, split, batch_size=preset.train.batch_size, seed=seed)
    torch.manual_seed(seed)
    detector = preset.detector.build().to(context.device if context.world_size > 1 else device)
    record = TrainingRecord(preset=preset, data=split.resolved(), seed=seed)
    run = create_run(out, record, seed=seed, context=context, resume=resume)
    frames = split.open()
    survey = survey_split(frames, detector.encoder)
    detector.trained_on = describe_training(detector, frames, survey)
    own = per_rank(lambda step, rank, ranks: labeled(step * ranks + rank), context)
    result = train_supervised(detector, own, loop, run=run, workers=workers, context=context, progress=progress)
    context.close()
    if context.is_main:
        save_run_detector(out, detector.cpu())
    return TrainOutcome(
        detector=detector.cpu(),
        steps=result.steps,
        frames=len(labeled.frames),
        seconds=result.seconds,
        loss=dict(result.terms),
        is_main=context.is_main,
        survey=survey,
    )


def upcycle_preset(
    preset: Preset | str,
    data: Data,
    detector: str | Path,
    out: str | Path,
    *,
    method: Method | str = "upcycling",
    store: str | Path | None = None,
    raw: Data | None = None,
    rig: RigSpec | None = None,
    codec: str | None = None,
    truth: tuple[Path, Data] | None = None,
    seed: int = 0,
    steps: int | None = None,
    resume: bool = False,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> UpcycleOutcome:
    """Train the server half of a detector on labeled frames and unlabeled smashed scenes.

    Args:
        preset: Name of a preset, or a preset with your own settings. Its detector must be the source model's.
        data: Labeled split, `DIR[:SPLIT]`; `train` where no split is named. The oracles take it from the target domain.
        detector: Run folder of the source model, from which every method starts. The fleet must run its encoder.
        out: Run folder to write.
        method: Name of a method (docs/methods.md), or your own `Method`.
        store: Store of the fleet's smashed scenes, for the methods that learn from them.
        raw: Raw unlabeled scans, for the methods that learn from them; `unlabelled` where no split is named.
        rig: The fleet's rig, as given to `extract` and `ingest`. None takes that of the source model's training data, or no z shift and
            intensity in 0..1 where its file does not say.
        codec: Codec round trip of labeled features, `fp16` or `int8`; None takes the store's own.
        truth: Receipts of `extract` and the prepared frames that were extracted. Their labels measure the pseudo labels and never train.
        seed: Decides the order of frames and scenes, augmentation and pasting.
        steps: Optimizer steps, instead of the preset's number.
        resume: Continue a run that was stopped.
        workers: Processes that prepare batches.
        device: `cpu`, `cuda` or `cuda:N`.
        progress: Print a line every few steps.

    Returns:
        Student, teacher and what they learned from.

    Raises:
        InvalidInput: An argument cannot be used; preset, store and source model do not fit; or the method lacks the data it learns from.
        NonFiniteLoss: A loss became NaN or infinite; the message names the term and the frames.

    Example:
        outcome = upcycle3d.upcycle("kitti_small", "data/kitti:train", "runs/source", "runs/upcycled", store="store")
        found = outcome.student.detect(scan)
    """
    device = check_run_options(seed=seed, steps=steps, workers=workers, device=device)
    if codec is not None:
        check_codec(codec)
    preset, split, out, detector = find_preset(preset), find_data(data, "train"), Path(out), Path(detector)
    chosen = find_method(method)
    name = method if isinstance(method, str) else chosen.summary
    loop = _loop(preset.upcycle.loop, seed, steps)
    settings = replace(preset.upcycle, loop=loop)
    preset = replace(preset, upcycle=settings)
    student = load_detector(detector)
    if student.config != preset.detector:
        raise InvalidInput(f"{detector} holds another detector than the preset; give the preset that it was trained with")
    rig = rig or (RigSpec() if student.trained_on is None else student.trained_on.rig)
    frames = split.open()
    said = data_warnings(student, frames, survey_split(frames, student.encoder).statistics)
    if store is not None and frames.rig != rig:
        said += (
            f"the labeled data {split} have the rig {frames.rig}, and the scenes of the store have {rig}; this is right only if the road "
            "lies at the same height and intensity has the same scale after both",
        )
    for text in said:
        warnings.warn(text, stacklevel=2)
    # F-GT's size shift is also right for the labeled half, but the oracles' labels have the target's sizes already.
    shift = settings.f_gt.size_shift if chosen.labeled == "source" else (0.0, 0.0, 0.0)
    if preset.train.gt_sampling:
        split.ensure_gt_database()
    labeled = labeled_batches(preset, split, batch_size=settings.labeled_batch, seed=seed, size_shift=shift)
    if chosen.unlabeled == "raw" and raw is None:
        raise InvalidInput(f"the method {name} learns from raw unlabeled scans; give raw=… (option --raw DIR[:SPLIT])")
    if chosen.unlabeled == "smashed" and store is None:
        raise InvalidInput(
            f"the method {name} learns from smashed scenes; give store=… (option --store), which `extract` and `ingest` make"
        )
    # A method without scenes still gets their codec, so that all methods see the same labeled features.
    scenes = None if store is None else fleet_store(Path(store), student, rig)
    codec_used = codec or _codec_of(scenes)
    fleet = None if raw is None or chosen.unlabeled != "raw" else find_data(raw, "unlabelled").open()
    scans = None if fleet is None else unlabeled_batches(preset, fleet, batch_size=settings.unlabeled_batch, seed=seed)
    record = UpcyclingRecord(
        preset=preset,
        method=method if isinstance(method, str) else method_record(chosen),
        data=split.resolved(),
        detector=detector.resolve(),
        store=None if store is None else Path(store).resolve(),
        raw=None if raw is None else find_data(raw, "unlabelled").resolved(),
        rig=rig,
        codec=codec,
        seed=seed,
    )
    truth_labels = None if truth is None else read_truth(*truth)
    # The folder is taken last: what is wrong with the arguments must not leave a folder that refuses the corrected ones.
    run = RunFolder.create(out, record, seed=seed, resume=resume)
    pasted_objects = None
    if chosen.f_gt:
        pasted_objects = feature_object_database(out / "feature_gt", split.open(), student, settings.f_gt, codec=codec_used)
    teacher = upcycle(
        student.to(device),
        method=chosen,
        labeled=labeled,
        store=scenes,
        pasted_objects=pasted_objects,
        config=settings,
        scans=scans,
        codec=codec_used,
        truth=truth_labels,
        run=run,
        workers=workers,
        progress=progress,
    )
    save_run_detector(out, student.cpu())
    save_detector(out / TEACHER_FILE, teacher.cpu())
    learned_from = fleet if chosen.unlabeled == "raw" else scenes if chosen.unlabeled == "smashed" else None
    return UpcycleOutcome(
        student=student.cpu(),
        teacher=teacher.cpu(),
        steps=loop.total_steps,
        frames=len(labeled.frames),
        scenes=0 if learned_from is None else len(learned_from),
    )


def evaluate_on(detector: Detector | str | Path, data: Data, *, protocol: Protocol | None = None) -> EvaluationReport:
    """Score a detector on labeled frames of a prepared dataset.

    Args:
        detector: A detector in memory, the run folder of one, or its detector file.
        data: Labeled split, `DIR[:SPLIT]`; `val` where no split is named.
        protocol: `kitti`, `waymo`, `lyft` or `cross_dataset` (ST3D's); the dataset's own by default.

    Returns:
        All metrics; `headline()` gives the few numbers by which methods are compared.

    Raises:
        InvalidInput: The dataset has no protocol of its own, or lacks what the protocol needs.

    Example:
        report = upcycle3d.evaluate("runs/source", "data/kitti:val")
        print(report.headline())  # {"Car 3D 0.7": 43.1, ...}
    """
    loaded = detector if isinstance(detector, Detector) else load_detector(detector)
    return score_detector(loaded, find_data(data, "val").open(), protocol)


def _loop(loop: LoopConfig, seed: int, steps: int | None) -> LoopConfig:
    """A preset's loop with the caller's seed and, where given, number of steps."""
    optim = loop.optim if steps is None else replace(loop.optim, total_steps=steps)
    return replace(loop, seed=seed, optim=optim)


def _ensure_gt_database(split: DataSplit, context: DistributedContext) -> None:
    """Let the first process build the object database while the others wait; an error reaches all of them."""
    message = ""
    if context.is_main:
        try:
            split.ensure_gt_database()
        except InvalidInput as error:
            message = str(error)
    failed = [m for m in context.gather(message) if m]
    if failed:
        raise InvalidInput(failed[0])


def _codec_of(store: SmashedStore | None) -> str:
    if store is None:
        return "fp16"
    if not store.codecs:
        raise InvalidInput(
            "the store holds no scene; look for reasons in its quarantine folder, then run `extract` and `ingest` again"
        )
    if len(store.codecs) > 1:
        raise InvalidInput(
            f"the store holds scenes of several codecs ({', '.join(store.codecs)}); choose one with codec=… (option --codec)"
        )
    return store.codecs[0]
