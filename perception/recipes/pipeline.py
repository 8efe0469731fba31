"""The main job, end to end, on prepared data: what ``upcycle3d demo`` shows and ``upcycle3d bench upcycling`` repeats over seeds.

    labelled frames ─ source model ─┬─ the fleet's smashed scenes, ingested ─┬─ trial by each method ─ scored on the validation frames
                                    └────────────────────────────────────────┘

Every stage leaves its result in a folder and is skipped if that is there, so a job that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ...core.config_json import config_to_json, first_difference
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.rig import RigSpec
from ...core.structures import Labels, PointCloud
from ...datasets.batches import LabeledBatches
from ...datasets.data_split import DataSplit
from ..evaluation.headline import Protocol, Scores, headline
from ..models.detector import Detector
from ..server.feature_object_database import FeatureObjectDatabase
from ..server.ingest import ingest
from ..server.methods import METHODS, Method
from ..server.store import SmashedStore
from ..server.trainer import upcycle
from ..server.upcycle_config import UpcycleConfig
from ..training.detector_files import TEACHER_FILE, load_detector, save_detector, save_run_detector
from ..training.run_folder import RunFolder
from ..training.supervised import train_supervised
from ..vehicle.extractor import Extractor, extract
from ..wire.shards import ShardWriter
from .assembly import feature_object_database, fleet_store, labeled_batches, unlabeled_batches
from .presets import Preset


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """labelled: whose labels are learnt from. fleet: whose scans are smashed; its labels are for the oracles, and to measure pseudo
    labels. validation: scored by ``protocol``. preset: the detector, how the source model is trained, and the augmentation of every
    labelled batch; ``preset.upcycle`` is a trial's own. seed: of every training. checkpoint: a run folder to take as the source model instead of training one.
    """

    labeled: DataSplit
    fleet: DataSplit
    validation: DataSplit
    protocol: Protocol
    preset: Preset
    seed: int
    codec: str = "fp16"
    checkpoint: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A method (of ``METHODS``) with its settings."""

    method: str
    upcycle: UpcycleConfig


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """student, teacher: scores of the trained network and its EMA after the last step; the student is the result.

    history: (steps done, scores of the student) along the way, the last step included.
    """

    student: Scores
    teacher: Scores
    history: tuple[tuple[int, Scores], ...]
    seconds: float

    def best(self) -> Scores:
        """For each metric its best value along the way: chosen by the target's labels, so no result, but what some papers report."""
        return {name: max(scores.get(name, 0.0) for _, scores in self.history) for name in self.student}

    @classmethod
    def read(cls, path: Path) -> TrialResult:
        """From a file of ``write``."""
        stored = json.loads(path.read_text())
        history = tuple((step, scores) for step, scores in stored["history"])
        return cls(student=stored["student"], teacher=stored["teacher"], history=history, seconds=stored["seconds"])

    def write(self, path: Path, **more: object) -> None:
        """As JSON, beside what ``more`` names."""
        write_atomically(path, json.dumps({**more, **asdict(self)}, indent=1).encode())


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What does not change a result. scores_along: entries of ``TrialResult.history``, the last step included.
    workers: processes that prepare batches. processes: trials at a time, with one thread each beyond one."""

    say: Callable[[str], None] = print
    scores_along: int = 1
    device: torch.device = torch.device("cpu")
    workers: int = 0
    processes: int = 2
    progress: bool = False

    def __post_init__(self) -> None:
        if self.scores_along < 1:
            raise InvalidInput(f"a trial is scored once at least, after its last step; found scores_along = {self.scores_along}")


def train_source_model(out: Path, data: DataSplit, preset: Preset, *, seed: int, options: RunOptions) -> None:
    """Supervised training of ``preset`` on a labelled split into the run folder ``out``; a finished one is left as it is."""
    if (out / "detector.safetensors").exists():
        return
    torch.manual_seed(seed)
    detector = preset.detector.build().to(options.device)
    data.ensure_gt_database()
    labeled = labeled_batches(preset, data, batch_size=preset.train.batch_size, seed=seed)
    train = replace(preset.train, loop=replace(preset.train.loop, seed=seed))
    with RunFolder.create(out, train, seed=seed, resume=True) as run:
        train_supervised(detector, labeled, train.loop, run=run, workers=options.workers, progress=options.progress)
    save_run_detector(out, detector.cpu(), preset.detector)


@dataclass
class Pipeline:
    """The stages of one job in one folder. ``seconds`` says where the time went."""

    config: PipelineConfig
    folder: Path
    options: RunOptions = RunOptions()
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Stages are skipped where their result is there, so a folder must belong to one configuration and the same frames."""
        path, c = self.folder / "job.json", self.config
        wanted = {
            "detector": config_to_json(c.preset.detector),
            "train": None if c.checkpoint else config_to_json(c.preset.train),
            "checkpoint": c.checkpoint and _sha256(c.checkpoint / "detector.safetensors"),
            "seed": c.seed,
            "codec": c.codec,
            "protocol": c.protocol,
            **{name: getattr(c, name).summary() for name in ("labeled", "fleet", "validation")},
        }
        if path.exists():
            difference = first_difference(json.loads(path.read_text()), wanted)
            if difference:
                raise InvalidInput(f"{self.folder} holds a job with another configuration ({difference}); choose another folder")
        else:
            write_atomically(path, json.dumps(wanted, indent=1).encode())

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to ``seconds``."""
        start = time.perf_counter()
        yield
        self.add_seconds(stage, time.perf_counter() - start)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds to ``seconds`` and its file, which outlives a stopped job."""
        path = self.folder / "seconds.json"
        if not self.seconds and path.exists():
            self.seconds = json.loads(path.read_text())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        write_atomically(path, json.dumps(self.seconds).encode())

    # ---- training on the labelled frames

    @property
    def source(self) -> Path:
        """The run folder of the source model."""
        return self.config.checkpoint or self.folder / "source_run"

    def train_source(self) -> Path:
        """Supervised training on the labelled frames; returns the run folder."""
        c = self.config
        if c.checkpoint is not None:
            if load_detector(self.source)[1] != c.preset.detector:
                raise InvalidInput(f"{self.source} holds a detector other than the preset's; pass the preset it was trained with")
        elif not (self.source / "detector.safetensors").exists():
            self.options.say("training on the labelled frames")
            with self.timed("train source"):
                train_source_model(self.source, c.labeled, c.preset, seed=c.seed, options=self.options)
        return self.source

    # ---- the fleet

    def rig(self) -> RigSpec:
        """What the fleet's vehicles do to a scan first, as its frames were prepared."""
        return self.config.fleet.open().rig

    def extract_fleet(self) -> dict[str, float]:
        """Smash every scan of the fleet into shards and take them in. Returns bytes and milliseconds a frame."""
        summary = self.folder / "extraction.json"
        if not summary.exists():
            self.options.say("extracting the fleet's smashed scenes, then ingesting them")
            detector, _ = load_detector(self.source)
            frames, rig, codec = self.config.fleet.open(), self.rig(), self.config.codec
            extractor = Extractor(detector.encoder.to(self.options.device), rig, codec)
            made: dict[str, str] = {}

            def read(index: int) -> Callable[[], PointCloud]:
                return lambda: rig.to_sensor(frames[index].points)

            for half in ("shards", "store"):  # of a run that was stopped: its scenes have other ids than the receipts will
                shutil.rmtree(self.folder / half, ignore_errors=True)
            with self.timed("extract"):
                shards = ShardWriter(self.folder / "shards", spec=extractor.spec, fingerprint=extractor.fingerprint, codec=codec)
                with shards as writer:
                    report = extract(
                        [read(i) for i in range(len(frames))],
                        extractor,
                        writer,
                        on_scene=lambda index, scene_id: made.update({scene_id: frames.ids[index]}),
                    )
            with self.timed("ingest"):
                store = self.folder / "store"
                ingest(self.folder / "shards", store, expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
            write_atomically(self.folder / "receipts.json", json.dumps(made).encode())
            stages = {"voxelize": report.voxelize, "backbone": report.backbone, "codec": report.codec, "write": report.write}
            values = {f"{name}_ms": stage.median_ms for name, stage in stages.items()}
            values |= {"bytes_per_frame": report.smashed_bytes_per_frame, "raw_bytes_per_frame": report.raw_bytes_per_frame}
            write_atomically(summary, json.dumps(values).encode())
        return json.loads(summary.read_text())  # type: ignore[no-any-return]

    def store(self, detector: Detector) -> SmashedStore:
        """The fleet's verified scenes, made by this detector's encoder."""
        return fleet_store(self.folder / "store", detector, self.rig())

    def _truth(self, method: Method) -> dict[str, Labels] | None:
        """Labels of the fleet, where it has them, by the id of the frame (raw) or the scene: they only measure pseudo labels."""
        if method.unlabeled == "none":
            return None
        fleet = self.config.fleet.open()
        labels = ((frame_id, fleet.labels(i)) for i, frame_id in enumerate(fleet.ids))
        by_frame = {frame_id: found for frame_id, found in labels if found is not None}
        if method.unlabeled == "raw":
            return by_frame
        receipts = json.loads((self.folder / "receipts.json").read_text())
        return {scene: by_frame[frame] for scene, frame in receipts.items() if frame in by_frame}

    # ---- trials

    def results(self, trials: Mapping[str, Trial]) -> Iterator[tuple[str, TrialResult]]:
        """Every trial, by name, from the source checkpoint; each as soon as it is finished, finished ones at once.

        ``processes`` at a time with one thread each: on few cores that is faster than threads, which wait for each other.
        """
        finished = [name for name in trials if (self._trial_folder(name) / "result.json").exists()]
        yield from ((name, TrialResult.read(self._trial_folder(name) / "result.json")) for name in finished)
        todo = [name for name in trials if name not in finished]
        with self.timed("trials"):
            self._shared_by([trials[name] for name in todo])
            for name, result in self._run_all({name: trials[name] for name in todo}):
                self.options.say(f"{name}: {METHODS[trials[name].method].summary}")
                yield name, result

    def _run_all(self, trials: Mapping[str, Trial]) -> Iterator[tuple[str, TrialResult]]:
        if self.options.processes < 2 or not trials:
            yield from ((name, self.run(name, trial)) for name, trial in trials.items())
            return
        context = multiprocessing.get_context("spawn")
        quiet = replace(self, options=replace(self.options, say=_nothing))
        with ProcessPoolExecutor(self.options.processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = {pool.submit(_run, quiet, name, trial): name for name, trial in trials.items()}
            for future in as_completed(running):
                yield running[future], future.result()

    def _labels_from(self, method: Method) -> DataSplit:
        return self.config.labeled if method.labeled == "source" else self.config.fleet

    def _shared_by(self, trials: Collection[Trial]) -> None:
        """Make what several trials read, before they run at once."""
        for split in {self._labels_from(METHODS[t.method]) for t in trials if METHODS[t.method].trains != "nothing"}:
            split.ensure_gt_database()
        pasting = {t.upcycle.f_gt: t.upcycle for t in trials if METHODS[t.method].f_gt}
        if pasting:
            detector, _ = load_detector(self.source)
            for upcycle in pasting.values():
                self._features(detector, upcycle)

    def _features(self, detector: Detector, upcycle: UpcycleConfig) -> FeatureObjectDatabase:
        key = hashlib.sha256(json.dumps(config_to_json(upcycle.f_gt), sort_keys=True).encode()).hexdigest()[:12]
        return feature_object_database(
            self.folder / f"feature_gt_{key}", self.config.labeled.open(), detector, upcycle.f_gt, codec=self.config.codec
        )

    def _labeled(self, method: Method, upcycle: UpcycleConfig) -> LabeledBatches:
        split, c = self._labels_from(method), self.config
        # F-GT's size normalisation holds for the labelled half too, but the oracles' labels have the right size already.
        shift = upcycle.f_gt.size_shift if method.labeled == "source" else (0.0, 0.0, 0.0)
        split.ensure_gt_database()
        return labeled_batches(c.preset, split, batch_size=upcycle.labeled_batch, seed=c.seed, size_shift=shift)

    def _trial_folder(self, name: str) -> Path:
        return self.folder / "methods" / name

    def run(self, name: str, trial: Trial) -> TrialResult:
        """Train by one method from the source checkpoint and score it on the validation frames."""
        out, method, preset, c = self._trial_folder(name), METHODS[trial.method], self.config.preset, self.config
        start = time.perf_counter()
        detector = load_detector(self.source)[0].to(self.options.device)
        loop = replace(trial.upcycle.loop, seed=c.seed)
        config = replace(trial.upcycle, loop=loop)
        with RunFolder.create(out, config, seed=c.seed, resume=True) as run:

            def score_along(step: int, student: Detector) -> None:
                done = step + 1
                if done % -(-loop.total_steps // self.options.scores_along) == 0 and done < loop.total_steps:
                    run.log(step, self.score(student), kind="validation")
                    student.train()

            teacher = upcycle(
                detector,
                method=method,
                labeled=self._labeled(method, config),
                store=self.store(detector) if method.unlabeled == "smashed" else None,
                scans=unlabeled_batches(preset, c.fleet.open(), batch_size=config.unlabeled_batch, seed=c.seed)
                if method.unlabeled == "raw"
                else None,
                pasted_objects=self._features(detector, config) if method.f_gt else None,
                config=config,
                codec=c.codec,
                truth=self._truth(method),
                run=run,
                after_step=score_along,
                workers=self.options.workers,
                progress=self.options.progress,
            )
            student_scores = self.score(detector)
            along = [(line["step"] + 1, {k: line[k] for k in student_scores if k in line}) for line in run.metrics("validation")]
        save_run_detector(out, detector.cpu(), preset.detector)
        save_detector(out / TEACHER_FILE, teacher.cpu(), preset.detector)
        teacher_scores = student_scores if method.trains == "nothing" else self.score(teacher.to(self.options.device))
        steps = 0 if method.trains == "nothing" else loop.total_steps
        result = TrialResult(
            student=student_scores,
            teacher=teacher_scores,
            history=(*along, (steps, student_scores)),
            seconds=time.perf_counter() - start,
        )
        result.write(out / "result.json")
        return result

    def score(self, detector: Detector) -> Scores:
        """Scores of a detector on the validation frames."""
        return headline(detector, self.config.validation.open(), self.config.protocol)


def closed_gap(source: float, method: float, oracle: float, *, spread: float = 0.0) -> float | None:
    """(method - source) / (oracle - source) in percent; None when the gap is under 2 points or under the spread over seeds."""
    gap = oracle - source
    return None if gap < max(2.0, spread) else 100.0 * (method - source) / gap


def _run(job: Pipeline, name: str, trial: Trial) -> TrialResult:
    return job.run(name, trial)


def _nothing(text: str) -> None:
    pass


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
