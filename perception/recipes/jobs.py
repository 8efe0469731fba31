"""The jobs that users start: train a preset, score a detector. Commands and Python programs call these functions.

Each takes names and folders, builds what the trainers need (`assembly.py`), runs, and leaves a run folder. `import upcycle3d` exports them as
`train` and `evaluate`; `upcycle` is in `upcycling_job.py`. Read next: `presets.py` for the settings, `pipeline.py` for all jobs in order.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.ledger_rules import judge, stop_if_absurd
from ..evaluation.score import EvaluationReport, Protocol
from ..models.detector import Detector
from ..models.upcycled import UpcycledDetectorConfig
from ..training.detector_files import load_detector, save_run_detector
from ..training.distributed import init_distributed, per_rank
from ..training.run_folder import check_unused
from ..training.starting_weights import StartingWeights, take_weights
from ..training.supervised import train_supervised
from ..training.trackers import TrackerName
from .assembly import check_classes, labeled_batches
from .encoder_note import encoder_note
from .job_inputs import Data, check_path, check_run_options, find_data, find_preset
from .job_records import TrainingRecord, plan_loop
from .job_start import JobStart, OnStart, announce, best_of, on_main, started_run, validation_note, warn_or_stop
from .own_classes import preset_for_classes
from .presets import Preset
from .scan_survey import Survey, check_labels, describe_training, road_warning, survey_split
from .scored_split import score_split
from .training_frames import shared_frames_note
from .validation import Validation, Validator


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
    weights: StartingWeights | None = None
    """Which weights the training started from; None for random ones."""
    best: Path | None = None
    """The detector that was best on the validation split, whose record says so; None without validation."""


def train_preset(
    preset: Preset | str,
    data: Data,
    out: str | Path,
    *,
    classes: Sequence[str] | None = None,
    init: str | Path | None = None,
    validate: Validation | None = None,
    seed: int = 0,
    steps: int | None = None,
    resume: bool = False,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    tracker: TrackerName = "tensorboard",
    on_start: OnStart = warn_or_stop,
) -> TrainOutcome:
    """Train a detector on the labeled frames of a prepared dataset.

    Under `torchrun` every process takes its own batches, and only the first one writes the run folder.

    Args:
        preset: Name of a preset, or a preset with your own settings.
        data: Labeled split, `DIR[:SPLIT]`; `train` where no split is named.
        out: Run folder to write: configuration, metrics, checkpoints, detector and encoder file.
        classes: Classes to find, the same that the dataset was prepared for, with anchors of their mean sizes in the labeled split. None
            takes the preset's own.
        init: Start from these weights: a run folder, a detector file or a checkpoint. With other classes, the parts of the detector that
            belong to classes start fresh.
        validate: Score the detector on another split on the way. It changes nothing in the training.
        seed: Decides the initial weights, the order of the frames and the augmentation.
        steps: Optimizer steps of the whole run, instead of the preset's number. With `resume`, a run that was planned for another number
            goes on to this one; its remaining steps are a new cycle of the learning rate.
        resume: Continue a run that was stopped. Its data may have been moved.
        workers: Processes that prepare batches. The result does not depend on their number.
        device: `cpu`, `cuda` or `cuda:N`.
        progress: Print a line every few steps.
        tracker: Where metrics are shown besides `metrics.jsonl`: `tensorboard`, `wandb`, `mlflow`, `trackio` or `none`.
        on_start: Is given what the data hold and which weights are taken, before the run folder is made. By default it prints warnings and
            stops where nothing of the data can be learned.

    Returns:
        The detector and what the training did.

    Raises:
        InvalidInput: An argument cannot be used, the dataset has other classes than the preset, no weight of `init` fits, or `out` holds
            another run.
        UpcycleError: Nothing of the data lies in the detector's range, or the disk is full.
        NonFiniteLoss: A loss became NaN or infinite; the message names the term and the frames.

    Example:
        outcome = upcycle3d.train("kitti_small", "data/kitti:train", "runs/source")
        found = outcome.detector.detect(scan)
    """
    device = check_run_options(seed=seed, steps=steps, workers=workers, device=device)
    preset, split = find_preset(preset), find_data(data, "train")
    out = check_path(out, "out", "the run folder to write")
    context = init_distributed()
    if not resume:
        on_main(lambda: check_unused(out, tracker), context)
    frames = split.open()
    check_labels(split, frames)
    if classes is not None:
        preset = preset_for_classes(preset, frames, classes)
    check_classes(preset, frames)
    preset_steps = preset.train.loop.total_steps
    loop, planned = plan_loop(out, "train", preset.train.loop, seed=seed, steps=steps, resume=resume)
    preset = replace(preset, train=replace(preset.train, loop=loop))
    if init is not None:
        preset = _with_head_of(preset, check_path(init, "init", "a run folder, a detector file or a checkpoint"))
    torch.manual_seed(seed)
    detector = preset.detector.build()
    weights = (
        None
        if init is None
        else take_weights(detector, check_path(init, "init", "a run folder, a detector file or a checkpoint"))
    )
    survey = survey_split(frames, detector.encoder)
    watch = None if validate is None else Validator(validate, total_steps=loop.total_steps, folder=out)
    notes = road_warning(detector, frames, survey.statistics, own_anchors=classes is not None)
    notes += validation_note(split, frames, watch)
    notes += () if init is None else encoder_note(Path(init), detector)
    announce(on_start, JobStart(ledger=survey.ledger, weights=weights, notes=notes), context)
    detector.trained_on = describe_training(detector, frames, survey)
    if preset.train.gt_sampling:
        on_main(split.ensure_gt_database, context)
    labeled = labeled_batches(preset, split, batch_size=preset.train.batch_size, seed=seed)
    detector = detector.to(context.device if context.world_size > 1 else device)
    record = TrainingRecord(
        preset=preset,
        data=split.resolved(),
        seed=seed,
        data_fingerprint=frames.split_fingerprint(),
        init=None if init is None else Path(init).resolve(),
        init_digest="" if weights is None else weights.digest,
        processes=context.world_size,
        trained_on=detector.trained_on,
        preset_steps=preset_steps,
    )
    own = per_rank(lambda step, rank, ranks: labeled(step * ranks + rank), context)

    def look(step: int) -> None:
        if watch is not None and context.is_main:
            watch.look(step, detector, run, progress=progress)

    with started_run(out, record, loop, planned, survey.ledger, context=context, resume=resume, tracker=tracker) as run:
        result = train_supervised(
            detector, own, loop, run=run, workers=workers, context=context, after_step=look, progress=progress
        )
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
        weights=weights,
        best=best_of(out, watch),
    )


def evaluate_on(detector: Detector | str | Path, data: Data, *, protocol: Protocol | None = None) -> EvaluationReport:
    """Score a detector on labeled frames of a prepared dataset.

    Args:
        detector: A detector in memory, the run folder of one, or its detector file.
        data: Labeled split, `DIR[:SPLIT]`; `val` where no split is named.
        protocol: `kitti`, `waymo`, `lyft` or `cross_dataset` (ST3D's); the dataset's own by default.

    Returns:
        All metrics; `headline()` gives the few numbers by which methods are compared. `account.warnings` has what the command would
        warn of.

    Warns:
        UserWarning: The split differs from the data of the training, or the counts deserve a warning: each sentence of
            `account.warnings`.

    Raises:
        InvalidInput: The dataset has no protocol of its own, or lacks what the protocol needs.
        UpcycleError: A rule of `core/ledger_rules.py` says that the score would be worthless: no point or no box lies in the range.

    Example:
        report = upcycle3d.evaluate("runs/source", "data/kitti:val")
        print(report.headline())  # {"Car 3D 0.7": 43.1, ...}
    """
    loaded = detector if isinstance(detector, Detector) else load_detector(detector)
    frames = find_data(data, "val").open()
    report = score_split(loaded, frames, protocol)
    if report.account is None:
        raise AssertionError("score_split gives an account")
    findings = judge(report.account.ledger)
    stop_if_absurd(findings)
    account = replace(report.account, warnings=(*report.account.warnings, *(finding.text for finding in findings)))
    note = None if isinstance(detector, Detector) else shared_frames_note(detector, frames)
    shared = [] if note is None else [note]
    for text in dict.fromkeys((*account.warnings, *shared)):
        warnings.warn(text, stacklevel=2)
    return replace(report, account=account.told(notes=shared))


def _with_head_of(preset: Preset, init: Path) -> Preset:
    """A preset whose detector has the upcycled head of the starting weights, where these are the preset's detector with such a head."""
    given = load_detector(init).config
    same = isinstance(given, UpcycledDetectorConfig) and given.detector == preset.detector
    return replace(preset, detector=given) if same and isinstance(given, UpcycledDetectorConfig) else preset
