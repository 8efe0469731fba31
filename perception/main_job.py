"""The main job, end to end, on simulated data: what ``upcycle3d demo`` shows and ``benchmarks/claim.py`` repeats over seeds.

    simulate source and target ─ prepare ─ train on the labelled source ─ extract from the target's fleet ─ ingest
        ─ train by each method from the same checkpoint ─ score on the target's validation frames

Every stage leaves its result in a folder and is skipped if that is there, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ..datasets.batches import LabelledBatches, UnlabelledBatches
from ..datasets.gt_database import build_gt_database
from ..datasets.kitti import KittiDataset, read_ids
from ..datasets.prepared import PreparedDataset, prepare
from ..datasets.simulation.layout_kitti import write_kitti_layout
from ..datasets.simulation.places import Domain, Triple
from .assembly import feature_database, fleet_store, labelled_batches, unlabelled_batches
from .config_json import config_to_json, first_difference
from .evaluation.detect import detect_frames, kitti_detections
from .evaluation.kitti import LOOSE, OFFICIAL, KittiResult, MinOverlap, evaluate_kitti
from .files import write_atomically
from .models.detector import Detector
from .models.detectors import build_detector
from .models.encoders.fingerprint import RigSpec
from .presets import Preset
from .server.feature_gt import FeatureDatabase
from .server.ingest import ingest
from .server.methods import METHODS, Method
from .server.store import SmashedStore
from .server.trainer import upcycle
from .structures import InvalidInput, Labels, PointCloud
from .training.detector_files import TEACHER_FILE, load_detector, save_detector, save_run_detector
from .training.run_folder import RunFolder
from .training.supervised import train_supervised
from .vehicle.extractor import Extractor, extract
from .vehicle.shards import ShardWriter

_DATA = ("source_raw", "source", "source_gt", "target_raw", "target", "target_gt")
_MODEL = ("source_run", "store", "receipts.json", "extraction.json")


@dataclass(frozen=True, kw_only=True)
class MainJobConfig:
    """source, target: domains. labelled, fleet, validation: numbers of frames. seed: of the data and of every training."""

    source: Domain
    target: Domain
    labelled: int
    fleet: int
    validation: int
    seed: int
    preset: Preset
    codec: str = "fp16"
    workers: int = 2  # processes that simulate and prepare


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Car AP on the target's validation frames, moderate, R40, in percent: 3D and BEV at IoU 0.7 and at 0.5."""

    ap_3d: float
    ap_bev: float
    ap_3d_50: float
    ap_bev_50: float


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """student and teacher: the trained network and its EMA. The student is the result; the teacher is reported beside it."""

    student: Scores
    teacher: Scores
    seconds: float


@dataclass
class MainJob:
    """The stages of one job in one folder. ``seconds`` says where the time went."""

    config: MainJobConfig
    folder: Path
    say: Callable[[str], None] = print
    progress: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start, path = time.perf_counter(), self.folder / "seconds.json"
        yield
        if not self.seconds and path.exists():
            self.seconds = json.loads(path.read_text())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        write_atomically(path, json.dumps(self.seconds).encode())

    def _claim_folder(self) -> None:
        """Stages are skipped where their result is there, so a folder must belong to one configuration."""
        path, wanted = self.folder / "job.json", config_to_json(replace(self.config, workers=0))
        if path.exists():
            difference = first_difference(json.loads(path.read_text()), wanted)
            if difference:
                raise InvalidInput(f"{self.folder} holds a job with another configuration ({difference}); choose another folder")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InvalidInput(f"{self.folder} is not empty and holds no job; choose another folder")
        else:
            write_atomically(path, json.dumps(wanted, indent=1).encode())

    def share(self, other: Path, *, model: bool = True) -> None:
        """Use the data of the job in ``other`` by links and, with ``model``, its source model and smashed scenes too.

        Both may differ in ``preset.upcycle`` and, without ``model``, in ``preset.train``. Raises InvalidInput for a folder without a
        job, or a job that differs in anything else.
        """
        path = other / "job.json"
        if not path.exists():
            raise InvalidInput(f"{other} holds no job to share; run that one first")
        theirs, ours = json.loads(path.read_text()), config_to_json(replace(self.config, workers=0))
        free = ("upcycle",) if model else ("upcycle", "train")
        for job in (theirs, ours):
            job["preset"].update(dict.fromkeys(free))
        difference = first_difference(theirs, ours)
        if difference:
            raise InvalidInput(
                f"the job in {other} cannot be shared: {difference}; only {' and '.join(free)} settings may differ"
            )
        self._claim_folder()
        for name in _DATA + (_MODEL if model else ()):
            if not (self.folder / name).exists():
                (self.folder / name).symlink_to((other / name).resolve())

    # ---- data

    def _simulated(self, name: str, domain: Domain, splits: Mapping[str, int], seed: int) -> None:
        root = self.folder / f"{name}_raw"
        self.say(f"simulating and preparing the {name} domain, {domain.name}")
        with self._timed("simulate"):
            write_kitti_layout(
                root,
                domain,
                num_frames=sum(splits.values()),
                seed=seed,
                workers=self.config.workers,
                view="camera",
                splits=splits,
            )
        with self._timed("prepare"):
            ids = {split: read_ids(root / "ImageSets" / f"{split}.txt") for split in splits}
            every = tuple(i for part in ids.values() for i in part)
            names = self.config.preset.detector.class_names
            source = KittiDataset(root, every, classes=names, z_shift=domain.sensor.height)
            prepare(
                source,
                every,
                self.folder / name,
                splits=ids,
                classes=names,
                notes={"root": str(root.resolve()), "layout": "kitti", "z_shift": domain.sensor.height},
                workers=self.config.workers,
            )

    def data(self) -> None:
        """Simulate and prepare both domains; different seeds, so that no street is in both."""
        self._claim_folder()
        c = self.config
        self._simulated("source", c.source, {"train": c.labelled}, seed=1000 + 2 * c.seed)
        self._simulated("target", c.target, {"fleet": c.fleet, "val": c.validation}, seed=1001 + 2 * c.seed)

    def split(self, name: str, split: str) -> PreparedDataset:
        """A split of the prepared "source" or "target"."""
        return PreparedDataset(self.folder / name, split)

    # ---- training on the source

    def _labelled(self, name: str, split: str, batch_size: int, size_shift: Triple = (0.0, 0.0, 0.0)) -> LabelledBatches:
        frames, database = self.split(name, split), self.folder / f"{name}_gt"
        if not (database / "database.json").exists():
            build_gt_database(frames, database, class_names=frames.classes, fingerprint=frames.split_fingerprint())
        preset, seed = self.config.preset, self.config.seed
        return labelled_batches(preset, frames, database, batch_size=batch_size, seed=seed, size_shift=size_shift)

    def train_source(self) -> Path:
        """Supervised training on the labelled source; returns the run folder."""
        out, preset = self.folder / "source_run", self.config.preset
        with self._timed("train source"):
            if not (out / "detector.safetensors").exists():
                self.say("training on the labelled source frames")
                torch.manual_seed(self.config.seed)
                detector = build_detector(preset.detector)
                labelled = self._labelled("source", "train", preset.train.batch_size)
                loop = replace(preset.train.loop, seed=self.config.seed)
                run = RunFolder.create(out, replace(preset.train, loop=loop), seed=self.config.seed, resume=True)
                train_supervised(detector, labelled, loop, run=run, progress=self.progress)
                save_run_detector(out, detector, preset.detector)
        return out

    # ---- the fleet

    def rig(self) -> RigSpec:
        """What the target's vehicles do to a scan first: the known mounting height."""
        return RigSpec(z_shift=self.config.target.sensor.height)

    def extract_fleet(self) -> dict[str, float]:
        """Smash every scan of the fleet into shards and take them in. Returns bytes and milliseconds a frame."""
        receipts, summary = self.folder / "receipts.json", self.folder / "extraction.json"
        if not summary.exists():
            self.say("extracting the fleet's smashed scenes, then ingesting them")
            detector, _ = load_detector(self.folder / "source_run")
            extractor = Extractor(detector.encoder, self.rig(), self.config.codec)
            ids = self.split("target", "fleet").ids
            scans = KittiDataset(self.folder / "target_raw", ids, with_labels=False)
            made: dict[str, str] = {}

            def read(index: int) -> Callable[[], PointCloud]:
                return lambda: scans[index].points

            for half in ("shards", "store"):  # of a run that was stopped: its scenes have other ids than the receipts will
                shutil.rmtree(self.folder / half, ignore_errors=True)
            with self._timed("extract"):
                shards = ShardWriter(
                    self.folder / "shards", spec=extractor.spec, fingerprint=extractor.fingerprint, codec=self.config.codec
                )
                with shards as writer:
                    report = extract(
                        [read(i) for i in range(len(ids))],
                        extractor,
                        writer,
                        on_scene=lambda index, scene_id: made.update({scene_id: ids[index]}),
                    )
            with self._timed("ingest"):
                store = self.folder / "store"
                ingest(self.folder / "shards", store, expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
            write_atomically(receipts, json.dumps(made).encode())
            stages = {"voxelize": report.voxelize, "backbone": report.backbone, "codec": report.codec, "write": report.write}
            values = {f"{name}_ms": stage.median_ms for name, stage in stages.items()}
            values |= {"bytes_per_frame": report.smashed_bytes_per_frame, "raw_bytes_per_frame": report.raw_bytes_per_frame}
            write_atomically(summary, json.dumps(values).encode())
        return json.loads(summary.read_text())  # type: ignore[no-any-return]

    def store(self, detector: Detector) -> SmashedStore:
        """The fleet's verified scenes, made by this detector's encoder."""
        return fleet_store(self.folder / "store", detector, self.rig())

    def truth_of_scans(self) -> dict[str, Labels]:
        """True labels of the fleet by frame id. The simulator knows them; they only measure pseudo labels."""
        fleet = self.split("target", "fleet")
        found = ((frame_id, fleet.labels(i)) for i, frame_id in enumerate(fleet.ids))
        return {frame_id: labels for frame_id, labels in found if labels is not None}

    def truth(self) -> dict[str, Labels]:
        """The same by scene id."""
        by_frame = self.truth_of_scans()
        receipts = json.loads((self.folder / "receipts.json").read_text())
        return {scene: by_frame[frame] for scene, frame in receipts.items()}

    def _truth_for(self, method: Method) -> dict[str, Labels] | None:
        if method.unlabelled == "none":
            return None
        return self.truth_of_scans() if method.unlabelled == "raw" else self.truth()

    def _raw_scans(self, batch_size: int) -> UnlabelledBatches:
        """The fleet's raw scans, which UpCycling never sees: for the methods that need them."""
        return unlabelled_batches(self.config.preset, self.split("target", "fleet"), batch_size=batch_size, seed=self.config.seed)

    # ---- methods

    def _features(self, detector: Detector) -> FeatureDatabase:
        f_gt = self.config.preset.upcycle.f_gt
        return feature_database(
            self.folder / "feature_gt", self.split("source", "train"), detector, f_gt, codec=self.config.codec
        )

    def run_methods(self, names: Sequence[str], *, processes: int = 2) -> dict[str, MethodResult]:
        """Each method from the source checkpoint, ``processes`` at a time with one thread each: on few cores that is faster than
        threads, which wait for each other. Finished results are read back."""
        with self._timed("methods"):
            todo = [name for name in names if not (self._method_folder(name) / "result.json").exists()]
            if any(METHODS[name].f_gt for name in todo):
                self._features(load_detector(self.folder / "source_run")[0])
            if processes > 1 and todo:
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    running = {pool.submit(_run_method, self.config, self.folder, name): name for name in todo}
                    for future in as_completed(running):
                        future.result()
                        self.say(f"method {running[future]}: {METHODS[running[future]].summary}")
            return {name: self.run_method(name) for name in names}

    def _method_folder(self, name: str) -> Path:
        return self.folder / "methods" / name

    def run_method(self, name: str) -> MethodResult:
        """Train by one method from the source checkpoint and score it on the target. Finished results are read back."""
        out = self._method_folder(name)
        result_file = out / "result.json"
        if result_file.exists():
            stored = json.loads(result_file.read_text())
            return MethodResult(
                student=Scores(**stored["student"]), teacher=Scores(**stored["teacher"]), seconds=stored["seconds"]
            )
        method, preset = METHODS[name], self.config.preset
        start = time.perf_counter()
        with self._timed(name):
            detector, _ = load_detector(self.folder / "source_run")
            config = replace(preset.upcycle, loop=replace(preset.upcycle.loop, seed=self.config.seed))
            name_of, split = ("source", "train") if method.labelled == "source" else ("target", "fleet")
            shift = config.f_gt.size_shift if name_of == "source" else (0.0, 0.0, 0.0)
            labelled = self._labelled(name_of, split, config.labelled_batch, shift)
            run = RunFolder.create(out, config, seed=self.config.seed, resume=True)
            teacher = upcycle(
                detector,
                method=method,
                labelled=labelled,
                store=self.store(detector) if method.unlabelled == "smashed" else None,
                scans=self._raw_scans(config.unlabelled_batch) if method.unlabelled == "raw" else None,
                features=self._features(detector) if method.f_gt else None,
                config=config,
                codec=self.config.codec,
                truth=self._truth_for(method),
                run=run,
                progress=self.progress,
            )
            save_run_detector(out, detector, preset.detector)
            save_detector(out / TEACHER_FILE, teacher, preset.detector)
        with self._timed("evaluate"):
            student_scores = self.score(detector)
            teacher_scores = student_scores if method.trains == "nothing" else self.score(teacher)
        result = MethodResult(student=student_scores, teacher=teacher_scores, seconds=time.perf_counter() - start)
        write_atomically(result_file, json.dumps(asdict(result), indent=1).encode())
        return result

    # ---- scores

    def score(self, detector: Detector) -> Scores:
        """Car AP of a detector on the target's validation frames."""
        frames = self.split("target", "val")
        raw = KittiDataset(self.folder / "target_raw", frames.ids)
        found = list(detect_frames(detector, frames, batch_size=4))
        detections = [kitti_detections(frame, p, detector.class_names) for frame, p in found]
        truths = [raw.frame_objects(frame.id) for frame, _ in found]

        def ap(overlaps: Mapping[str, MinOverlap]) -> tuple[float, float]:
            result: KittiResult = evaluate_kitti(truths, detections, classes=("Car",), min_overlaps=overlaps)
            car = result.classes["Car"]
            return car.box_3d.r40[1], car.bev.r40[1]

        (ap_3d, ap_bev), (ap_3d_50, ap_bev_50) = ap(OFFICIAL), ap(LOOSE)
        return Scores(ap_3d=ap_3d, ap_bev=ap_bev, ap_3d_50=ap_3d_50, ap_bev_50=ap_bev_50)


def closed_gap(source: float, method: float, oracle: float, *, spread: float = 0.0) -> float | None:
    """(method - source) / (oracle - source) in percent; None when the gap is under 2 points or under the spread over seeds."""
    gap = oracle - source
    return None if gap < max(2.0, spread) else 100.0 * (method - source) / gap


def _run_method(config: MainJobConfig, folder: Path, name: str) -> None:
    MainJob(config=config, folder=folder).run_method(name)
