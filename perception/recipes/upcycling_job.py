"""The job `upcycle`: train the server half of a detector on labeled frames and smashed scenes.

Read next: `labeled_half.py` and `fleet_stores.py`, the two halves of its data; `perception/server/trainer.py`, the training.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ...core.errors import InvalidInput
from ...core.ledger import Ledger
from ...core.tensor_file import content_digest
from ..models.detector import Detector
from ..models.detectors import DetectorConfig
from ..server.feature_gt import ObjectDatabase
from ..server.methods import Method, method_record
from ..server.trainer import upcycle
from ..server.upcycle_config import UpcycleConfig
from ..training.checkpoint import latest_checkpoint
from ..training.detector_files import TEACHER_FILE, load_detector, save_detector, save_run_detector
from ..training.distributed import DistributedContext, init_distributed
from ..training.loop import create_run
from ..training.run_folder import RunFolder, check_unused
from ..training.trackers import TrackerName
from ..wire.codec import check_codec
from .assembly import check_classes, unlabeled_batches
from .encoder_note import encoder_note
from .fleet_sizes import ROUND_FOLDER, SIZES_FILE, settings_at_fleet_sizes
from .fleet_stores import (
    Rigs,
    Stores,
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
from .job_records import UpcyclingRecord, plan_loop
from .job_start import JobStart, OnStart, announce, best_of, on_main, started_run, validation_note, warn_or_stop
from .labeled_half import LabeledHalf, TargetLabels
from .presets import Preset
from .scan_survey import check_labels, data_warnings, survey_split
from .validation import Validation, Validator

OBJECTS_FOLDER = "feature_gt"
"""Name of the folder in a run that holds F-GT's objects."""
AfterStep = Callable[[int, Detector], None]
"""Called with each step and the student."""


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
    """Frames of the labeled split."""
    scenes: int
    """Unlabeled scenes or scans that the method learned from."""
    ledger: Ledger = Ledger()
    """What was read of the labeled frames and raw scans, and how much of it the detector sees."""
    is_main: bool = True
    """Whether this process wrote the run folder; False in all but the first process of `torchrun`."""
    best: Path | None = None
    """The student that was best on the validation split, whose record says so; None without validation."""
    target_frames: int = 0
    """Labeled frames of the target."""


def upcycle_preset(
    preset: Preset | str,
    data: Data,
    detector: str | Path,
    out: str | Path,
    *,
    method: Method | str = "upcycling",
    target_labels: Data | None = None,
    target_share: float = TargetLabels.share,
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
    tracker: TrackerName = "tensorboard",
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
        target_labels: A few labeled frames of the target, `DIR[:SPLIT]`, `train` where no split is named. F-GT pastes their objects too.
        target_share: Share of the labeled frames of the training that are drawn from them. With 1 no frame of `data` is drawn; F-GT still pastes
            its objects.
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
        tracker: Where metrics are shown besides `metrics.jsonl`: `tensorboard`, `wandb`, `mlflow`, `trackio` or `none`.
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
    few = None if target_labels is None else find_data(target_labels, "train")
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
        on_main(lambda: check_unused(out, tracker), context)
    student = load_detector(detector)
    rigs = rigs or (rig_of_training(student),) * max(1, len(stores))
    source_digest = content_digest(student.state_dict())
    preset_steps = preset.upcycle.loop.total_steps
    loop, planned = plan_loop(out, "upcycle", preset.upcycle.loop, seed=seed, steps=steps, resume=resume)
    settings = replace(preset.upcycle, loop=loop)
    preset = _with_detector_of(student, replace(preset, upcycle=settings), detector)
    half = LabeledHalf(data=split, target=None if few is None else TargetLabels(data=few, share=target_share))
    opened = [(each, each.open()) for each in half.splits]
    for each, frames in opened:
        check_labels(each, frames)
        check_classes(preset, frames)
    # A method without scenes still gets their codec, so that all methods see the same labeled features.
    scenes = open_fleet(stores, student, rigs[: len(stores)])
    codec_used = codec or codec_of(scenes)
    raw_split = None if raw is None else find_data(raw, "unlabelled")
    fleet = None if raw_split is None or chosen.unlabeled != "raw" else raw_split.open()
    scans = None if fleet is None else unlabeled_batches(preset, fleet, batch_size=settings.unlabeled_batch, seed=seed)
    truth_labels = None if truth is None else read_truth(*truth)
    watch = None if validate is None else Validator(validate, total_steps=loop.total_steps, folder=out)
    notes, ledger = codec_note(scenes, codec_used), Ledger()
    for each, frames in opened:
        survey = survey_split(frames, student.encoder)
        notes += data_warnings(student, frames, survey.statistics)
        notes += labeled_rig_note(each, frames.rig, student.trained_on, stores, rigs[: len(stores)])
        notes += validation_note(each, frames, watch)
        ledger = ledger + survey.ledger
    shares = shares_of(scenes, rigs) if chosen.unlabeled == "smashed" else ()
    notes += few_scenes_notes(shares)
    if fleet is not None:
        counted = survey_split(fleet, student.encoder)
        notes += data_warnings(student, fleet, counted.statistics)
        ledger = ledger + counted.ledger.without_labels()  # their labels are not used
    notes += encoder_note(detector, student) if chosen.trains == "all" else ()
    announce(on_start, JobStart(ledger=ledger, notes=notes, stores=shares), context)
    if preset.train.gt_sampling:
        on_main(half.ensure_gt_databases, context)
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
        data_fingerprint=opened[0][1].split_fingerprint(),
        detector_digest=source_digest,
        store_digest=digests[0] if digests else "",
        raw_fingerprint="" if raw_split is None else raw_split.open().split_fingerprint(),
        processes=context.world_size,
        trained_on=student.trained_on,
        preset_steps=preset_steps,
        further_stores=tuple(path.resolve() for path in stores[1:]),
        further_rigs=rigs[1:],
        further_digests=digests[1:],
        target_labels=None if few is None else few.resolved(),
        target_fingerprint="" if few is None else opened[-1][1].split_fingerprint(),
        target_share=0.0 if half.target is None else half.target.share,
    )

    def look(step: int, now: Detector) -> None:
        if watch is not None and context.is_main:
            watch.look(step, now, run, progress=progress)

    where = context.device if context.world_size > 1 else device

    def prepared(
        model: Detector, method: Method, at: UpcycleConfig, into: RunFolder, after_step: AfterStep | None = None
    ) -> Callable[[], Detector]:
        """Make the labeled half and the objects to paste at the sizes of `at`. What it gives trains the model and returns the teacher."""
        return partial(
            upcycle,
            model,
            method=method,
            labeled=half.batches(preset, method, at, seed=seed),
            store=scenes,
            pasted_objects=_objects_to_paste(into, half, model, at, codec_used, context) if method.f_gt else None,
            config=at,
            scans=scans,
            codec=codec_used,
            truth=truth_labels,
            run=into,
            after_step=after_step,
            workers=workers,
            context=context,
            progress=progress,
        )

    def train_shortly(model: Detector, method: Method, at: UpcycleConfig, folder: Path) -> None:
        with create_run(folder, at, seed=seed, context=context, resume=True) as short:
            prepared(model, method, at, short)()

    # The folder is taken last: what is wrong with the arguments must not leave a folder that refuses the corrected ones.
    with started_run(out, record, loop, planned, ledger, context=context, resume=resume, tracker=tracker) as run:
        with _freed_on_mistake(run):
            student.to(where)
            sized = settings_at_fleet_sizes(
                run.path,
                chosen,
                settings,
                student,
                opened[0][1],
                scenes,
                codec=codec_used,
                seed=seed,
                learn=train_shortly,
                say=print if context.is_main else _nothing,
                asked=None if few is None else opened[-1][1],
                truth=truth_labels,
                context=context,
            )
            train = prepared(student, chosen, sized, run, look)
        teacher = train()
        context.close()
        if context.is_main:
            save_run_detector(out, student.cpu())
            save_detector(out / TEACHER_FILE, teacher.cpu())
    learned_from = fleet if chosen.unlabeled == "raw" else scenes if chosen.unlabeled == "smashed" else None
    return UpcycleOutcome(
        student=student.cpu(),
        teacher=teacher.cpu(),
        steps=loop.total_steps,
        frames=len(opened[0][1]),
        target_frames=0 if few is None else len(opened[-1][1]),
        scenes=0 if learned_from is None else len(learned_from),
        ledger=ledger,
        is_main=context.is_main,
        best=best_of(out, watch),
    )


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


def _nothing(text: str) -> None:
    pass


def _objects_to_paste(
    run: RunFolder, half: LabeledHalf, student: Detector, settings: UpcycleConfig, codec: str, context: DistributedContext
) -> ObjectDatabase:
    """F-GT's databases, which the first process builds in the run folder."""

    def open_them() -> ObjectDatabase:
        return half.objects_to_paste(run.path / OBJECTS_FOLDER, student, settings, codec=codec)

    on_main(open_them, context)
    return open_them()


@contextmanager
def _freed_on_mistake(run: RunFolder) -> Iterator[None]:
    """Where what is asked for cannot be done, the folder is free again for the corrected command."""
    try:
        yield
    except InvalidInput:
        trained = (run.path, *run.path.glob(f"{ROUND_FOLDER}_*"))  # a short training may have taken hours, too
        if run.writable and not any(latest_checkpoint(folder / run.checkpoints.name) for folder in trained):
            run.abandon()
            (run.path / SIZES_FILE).unlink(missing_ok=True)
            for each in (*run.path.glob(f"{OBJECTS_FOLDER}*"), *run.path.glob(f"{ROUND_FOLDER}_*")):
                shutil.rmtree(each, ignore_errors=True)
        raise
