"""The jobs that users start: train a preset, upcycle it, score a detector. Commands and Python programs call these functions.

Each takes names and folders, builds what the trainers need (`assembly.py`), runs, and leaves a run folder. `import upcycle3d` exports them as
`train`, `upcycle` and `evaluate`. Read next: `presets.py` for the settings, `pipeline.py` for all jobs in order.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.ledger import Ledger
from ...core.ledger_rules import judge, stop_if_absurd
from ...core.tensor_file import content_digest
from ...datasets.data_split import DataSplit
from ...datasets.prepared import PreparedDataset
from ..evaluation.score import EvaluationReport, Protocol
from ..models.detector import Detector
from ..models.detectors import DetectorConfig
from ..models.upcycled import UpcycledDetectorConfig
from ..server.feature_object_database import FeatureObjectDatabase
from ..server.methods import Method, method_record
from ..server.trainer import upcycle
from ..server.upcycle_config import UpcycleConfig
from ..training.checkpoint import latest_checkpoint
from ..training.detector_files import DETECTOR_FILE, TEACHER_FILE, load_detector, save_detector, save_run_detector
from ..training.distributed import DistributedContext, init_distributed, per_rank
from ..training.loop import LoopConfig, create_run
from ..training.run_folder import RunFolder, check_unused
from ..training.starting_weights import StartingWeights, take_weights
from ..training.supervised import train_supervised
from ..wire.codec import check_codec
from ..wire.encoder_file import ENCODER_FILE
from .assembly import check_classes, feature_object_database, labeled_batches, method_batches, unlabeled_batches
from .encoder_note import encoder_note
from .fleet_stores import (
    Rigs,
    Stores,
    StoreShare,
    check_rigs,
    check_stores,
    codec_note,
    codec_of,
    digests_of,
    few_scenes_notes,
    labeled_rig_note,
    open_fleet,
    rig_of_training,
    shares_of,
)
from .job_inputs import Data, check_path, check_run_options, find_data, find_method, find_preset, read_truth
from .job_records import TrainingRecord, UpcyclingRecord, plan_loop, what_may_differ
from .own_classes import preset_for_classes
from .presets import Preset
from .scan_survey import Survey, check_labels, data_warnings, describe_training, road_warning, survey_split
from .scored_split import score_split
from .training_frames import shared_frames_note, shared_with
from .validation import BEST_FILE, Validation, Validator


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


@dataclass(frozen=True, kw_only=True)
class JobStart:
    """What is known before the first step of a job; nothing is written yet."""

    ledger: Ledger
    """What was read of the data, and how much of it the detector sees."""
    weights: StartingWeights | None = None
    """Which weights the training starts from; None for random ones, and for `upcycle`, which takes all of the source model."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader should see."""
    stores: tuple[StoreShare, ...] = ()
    """What each of several stores brings to the unlabeled scenes of the training; empty for a single store."""


OnStart = Callable[[JobStart], None]
"""Is given what is known before the first step, and may raise to stop the job. It leaves the run folder free then."""


def warn_or_stop(start: JobStart) -> None:
    """Warn about the data, as Python warns, and stop where nothing of it could be learned.

    Args:
        start: What is known before the first step.

    Raises:
        UpcycleError: A rule of `core/ledger_rules.py` stops the job.
    """
    findings = judge(start.ledger)
    stop_if_absurd(findings)
    for text in (*start.notes, *(finding.text for finding in findings)):
        warnings.warn(text, stacklevel=3)


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
    ledger: Ledger = Ledger()
    """What was read of the labeled frames and raw scans, and how much of it the detector sees."""
    is_main: bool = True
    """Whether this process wrote the run folder; False in all but the first process of `torchrun`."""
    best: Path | None = None
    """The student that was best on the validation split, whose record says so; None without validation."""


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
        on_main(lambda: check_unused(out), context)
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
    notes += _validation_note(split, frames, watch)
    notes += () if init is None else encoder_note(Path(init), detector)
    _start(on_start, JobStart(ledger=survey.ledger, weights=weights, notes=notes), context)
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

    with _started_run(out, record, loop, planned, survey.ledger, context=context, resume=resume) as run:
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
        best=_best_of(out, watch),
    )


def upcycle_preset(
    preset: Preset | str,
    data: Data,
    detector: str | Path,
    out: str | Path,
    *,
    method: Method | str = "upcycling",
    store: Stores | None = None,
    raw: Data | None = None,
    rig: Rigs | None = None,
    codec: str | None = None,
    truth: tuple[Path, Data] | None = None,
    validate: Validation | None = None,
    seed: int = 0,
    steps: int | None = None,
    resume: bool = False,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    on_start: OnStart = warn_or_stop,
) -> UpcycleOutcome:
    """Train the server half of a detector on labeled frames and unlabeled smashed scenes.

    Under `torchrun` every process takes its own frames and scenes, and only the first one writes the run folder.

    Args:
        preset: Name of a preset, or a preset with your own settings. Its detector is not used: the source model brings its own. Settings
            with one entry per class must fit the classes of the source model.
        data: Labeled split, `DIR[:SPLIT]`; `train` where no split is named. The oracles take it from the target domain.
        detector: Run folder of the source model, from which every method starts. The fleet must run its encoder.
        out: Run folder to write.
        method: Name of a method (docs/methods.md), or your own `Method`.
        store: Store of the fleet's smashed scenes, for the methods that learn from them; or several stores, for fleets of several kinds of
            vehicles that run one encoder. Scenes are drawn in proportion to their number, so an epoch sees every scene of every store once.
        raw: Raw unlabeled scans, for the methods that learn from them; `unlabelled` where no split is named.
        rig: The fleet's rig, as given to `extract` and `ingest`; with several stores one rig for all, or one per store in their order. None
            takes that of the source model's training data, or no z shift and intensity in 0..1 where its file does not say.
        codec: Codec round trip of labeled features, `fp16` or `int8`; None takes the store's own.
        truth: Receipts of `extract` and the prepared frames that were extracted. Their labels measure the pseudo labels and never train.
        validate: Score the student on another split on the way. It changes nothing in the training.
        seed: Decides the order of frames and scenes, augmentation and pasting.
        steps: Optimizer steps of the whole run, instead of the preset's number. With `resume`, a run that was planned for another number
            goes on to this one; its remaining steps are a new cycle of the learning rate.
        resume: Continue a run that was stopped. Its data, stores and source model may have been moved; the order of the stores stays.
        workers: Processes that prepare batches.
        device: `cpu`, `cuda` or `cuda:N`.
        progress: Print a line every few steps.
        on_start: Is given what the data hold, before the run folder is made. By default it prints warnings and stops where nothing of the
            data can be learned.

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
    preset, split, chosen = find_preset(preset), find_data(data, "train"), find_method(method)
    out = check_path(out, "out", "the run folder to write")
    detector = check_path(detector, "detector", "the source model: a run folder or a detector file")
    stores = check_stores(store)
    rigs = check_rigs(rig, stores)
    name = method if isinstance(method, str) else chosen.summary
    if chosen.unlabeled == "raw" and raw is None:
        raise InvalidInput(f"the method {name} learns from raw unlabeled scans; give raw=… (option --raw DIR[:SPLIT])")
    if chosen.unlabeled == "smashed" and not stores:
        raise InvalidInput(
            f"the method {name} learns from smashed scenes; give store=… (option --store), which `extract` and `ingest` make"
        )
    context = init_distributed()
    if not resume:
        on_main(lambda: check_unused(out), context)
    student = load_detector(detector)
    rigs = rigs or (rig_of_training(student),) * max(1, len(stores))
    source_digest = content_digest(student.state_dict())
    preset_steps = preset.upcycle.loop.total_steps
    loop, planned = plan_loop(out, "upcycle", preset.upcycle.loop, seed=seed, steps=steps, resume=resume)
    settings = replace(preset.upcycle, loop=loop)
    preset = _with_detector_of(student, replace(preset, upcycle=settings), detector)
    frames = split.open()
    check_labels(split, frames)
    check_classes(preset, frames)
    # A method without scenes still gets their codec, so that all methods see the same labeled features.
    scenes = open_fleet(stores, student, rigs[: len(stores)])
    codec_used = codec or codec_of(scenes)
    raw_split = None if raw is None else find_data(raw, "unlabelled")
    fleet = None if raw_split is None or chosen.unlabeled != "raw" else raw_split.open()
    scans = None if fleet is None else unlabeled_batches(preset, fleet, batch_size=settings.unlabeled_batch, seed=seed)
    truth_labels = None if truth is None else read_truth(*truth)
    survey = survey_split(frames, student.encoder)
    notes, ledger = data_warnings(student, frames, survey.statistics) + codec_note(scenes, codec_used), survey.ledger
    notes += labeled_rig_note(split, frames.rig, student.trained_on, stores, rigs[: len(stores)])
    shares = shares_of(scenes, rigs) if chosen.unlabeled == "smashed" else ()
    notes += few_scenes_notes(shares)
    if fleet is not None:
        counted = survey_split(fleet, student.encoder)
        notes += data_warnings(student, fleet, counted.statistics)
        ledger = ledger + counted.ledger.without_labels()  # their labels are not used
    watch = None if validate is None else Validator(validate, total_steps=loop.total_steps, folder=out)
    notes += _validation_note(split, frames, watch)
    notes += encoder_note(detector, student) if chosen.trains == "all" else ()
    _start(on_start, JobStart(ledger=ledger, notes=notes, stores=shares), context)
    if preset.train.gt_sampling:
        on_main(split.ensure_gt_database, context)
    labeled = method_batches(preset, chosen, split, settings, seed=seed)
    digests = digests_of(scenes)
    record = UpcyclingRecord(
        preset=preset,
        method=method if isinstance(method, str) else method_record(chosen),
        data=split.resolved(),
        detector=detector.resolve(),
        store=stores[0].resolve() if stores else None,
        raw=None if raw_split is None else raw_split.resolved(),
        rig=rigs[0],
        codec=codec,
        seed=seed,
        data_fingerprint=frames.split_fingerprint(),
        detector_digest=source_digest,
        store_digest=digests[0] if digests else "",
        raw_fingerprint="" if raw_split is None else raw_split.open().split_fingerprint(),
        processes=context.world_size,
        trained_on=student.trained_on,
        preset_steps=preset_steps,
        further_stores=tuple(path.resolve() for path in stores[1:]),
        further_rigs=rigs[1:],
        further_digests=digests[1:],
    )

    def look(step: int, now: Detector) -> None:
        if watch is not None and context.is_main:
            watch.look(step, now, run, progress=progress)

    # The folder is taken last: what is wrong with the arguments must not leave a folder that refuses the corrected ones.
    with _started_run(out, record, loop, planned, ledger, context=context, resume=resume) as run:
        pasted_objects = None
        if chosen.f_gt:
            pasted_objects = _objects_to_paste(run, split, student, settings, codec_used, context)
        teacher = upcycle(
            student.to(context.device if context.world_size > 1 else device),
            method=chosen,
            labeled=labeled,
            store=scenes,
            pasted_objects=pasted_objects,
            config=settings,
            scans=scans,
            codec=codec_used,
            truth=truth_labels,
            run=run,
            after_step=look,
            workers=workers,
            context=context,
            progress=progress,
        )
        context.close()
        if context.is_main:
            save_run_detector(out, student.cpu())
            save_detector(out / TEACHER_FILE, teacher.cpu())
    learned_from = fleet if chosen.unlabeled == "raw" else scenes if chosen.unlabeled == "smashed" else None
    return UpcycleOutcome(
        student=student.cpu(),
        teacher=teacher.cpu(),
        steps=loop.total_steps,
        frames=len(labeled.frames),
        scenes=0 if learned_from is None else len(learned_from),
        ledger=ledger,
        is_main=context.is_main,
        best=_best_of(out, watch),
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


def _validation_note(split: DataSplit, frames: PreparedDataset, watch: Validator | None) -> tuple[str, ...]:
    """A sentence where validation scores frames that the training learns from."""
    shared = 0 if watch is None else shared_with(frames, watch.frames)
    if watch is None or not shared:
        return ()
    return (
        f"{shared} of {len(watch.frames)} frames of {watch.data} (--validate) are also in the training split {split}: scores on them say "
        "nothing about new frames",
    )


def _start(on_start: OnStart, start: JobStart, context: DistributedContext) -> None:
    """Say what is known before the first step, once; every process stops for the same reason."""
    if context.is_main:
        on_start(start)
    else:
        stop_if_absurd(judge(start.ledger))


def write_ledger(folder: Path, ledger: Ledger) -> None:
    """Write what a job read into its run folder.

    Args:
        folder: The run folder.
        ledger: The counts.
    """
    write_atomically(folder / "ledger.json", (json.dumps(ledger.to_json(), indent=1) + "\n").encode())


def _with_detector_of(student: Detector, preset: Preset, source: Path) -> Preset:
    """A preset with the detector of the source model."""
    if not isinstance(student.config, DetectorConfig):  # load_detector gives no other
        raise InvalidInput(f"{source} holds a {student.label}, which no preset can train")
    try:
        return replace(preset, detector=student.config)
    except InvalidInput as error:
        raise InvalidInput(
            f"the preset does not fit the classes of {source} ({', '.join(student.class_names)}): {error}. Give a preset with as many "
            "classes, or these settings with one entry per class: --preset.upcycle.thresholds, --preset.upcycle.f-gt.max-objects, "
            "--preset.train.gt-sampling"
        ) from error


def _with_head_of(preset: Preset, init: Path) -> Preset:
    """A preset whose detector has the upcycled head of the starting weights, where these are the preset's detector with such a head."""
    given = load_detector(init).config
    same = isinstance(given, UpcycledDetectorConfig) and given.detector == preset.detector
    return replace(preset, detector=given) if same and isinstance(given, UpcycledDetectorConfig) else preset


def _objects_to_paste(
    run: RunFolder, split: DataSplit, student: Detector, settings: UpcycleConfig, codec: str, context: DistributedContext
) -> FeatureObjectDatabase:
    """F-GT's database, which the first process builds in the run folder. Where it cannot be built, the folder is free again."""

    folder = run.path / "feature_gt"

    def open_it() -> FeatureObjectDatabase:
        found = feature_object_database(folder, split.open(), student, settings.f_gt, codec=codec)
        if not len(found):
            raise InvalidInput(
                f"F-GT needs objects to paste, and {split} has none with {settings.f_gt.min_points} or more points; lower "
                "--preset.upcycle.f-gt.min-points, or take a method without F-GT (--method hybrid)"
            )
        return found

    try:
        on_main(open_it, context)
        return open_it()
    except InvalidInput:
        if run.writable and latest_checkpoint(run.checkpoints) is None:
            run.abandon()
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _started_run(
    out: Path,
    record: TrainingRecord | UpcyclingRecord,
    loop: LoopConfig,
    planned: tuple[str, ...],
    ledger: Ledger,
    *,
    context: DistributedContext,
    resume: bool,
) -> Iterator[RunFolder]:
    """Take the run folder of a job, which then says how the job ended, and write the ledger into it."""
    may_differ = (*planned, *what_may_differ(out, record, resume=resume))
    with (
        create_run(out, record, seed=record.seed, context=context, resume=resume, may_differ=may_differ) as run,
        run.reporting_failure(loop.total_steps),
    ):
        if context.is_main:
            _set_result_aside(out, planned)
            write_ledger(out, ledger)
        yield run


def _set_result_aside(out: Path, planned: tuple[str, ...]) -> None:
    """Give the files of a result another name when the run goes on for more steps: until then the run has none."""
    if not planned:
        return
    newest = latest_checkpoint(out / "checkpoints")
    for name in (DETECTOR_FILE, TEACHER_FILE, ENCODER_FILE):
        path = out / name
        if newest is not None and path.exists():
            path.rename(out / f"{path.stem}_{newest.name}{path.suffix}")


def _best_of(out: Path, watch: Validator | None) -> Path | None:
    best = out / BEST_FILE
    return best if watch is not None and best.exists() else None


def on_main(action: Callable[[], object], context: DistributedContext) -> None:
    """Let the first process do something while the others wait; an error reaches all of them.

    Args:
        action: What is done once.
        context: This process among the others.

    Raises:
        InvalidInput: The action raised it.
    """
    message = ""
    if context.is_main:
        try:
            action()
        except InvalidInput as error:
            if context.world_size == 1:
                raise
            message = str(error)
    failed = [m for m in context.gather(message) if m]
    if failed:
        raise InvalidInput(failed[0])
