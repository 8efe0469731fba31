"""Runs methods of a job: each trains from the source model, alone or in a pool of processes, and is scored on the validation frames.

Read next: `perception/server/trainer.py` (`upcycle`, the training itself) and `perception/server/methods.py` (the methods).
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch

from ...core.config_json import Json
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.strict_json import read_json
from ...core.structures import Labels
from ...datasets.data_split import DataSplit
from ..evaluation.score import Scores, score_detector
from ..models.detector import Detector
from ..server.methods import METHODS, Method
from ..server.trainer import upcycle
from ..server.upcycle_config import UpcycleConfig
from ..training.detector_files import TEACHER_FILE, load_detector, save_detector, save_run_detector
from ..training.run_folder import RunFolder
from .assembly import unlabeled_batches
from .fleet_sizes import settings_at_fleet_sizes
from .job_folder import JobFolder
from .labeled_half import LabeledHalf, TargetLabels


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """A method and the settings it runs with."""

    method: str
    """A name of `METHODS`."""
    upcycle: UpcycleConfig
    """Settings of the training."""
    target: TargetLabels | None = None
    """A few labeled frames of the target; None without them."""


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """The scores of one method with one seed."""

    student: Scores
    """Scores in percent of the network in training, after the last step. This is the result."""
    teacher: Scores
    """Scores in percent of its exponential moving average, after the last step."""
    history: tuple[tuple[int, Scores], ...]
    """(steps done, scores of the student) along the way, the last step included."""
    seconds: float
    """Duration of training and scoring."""

    def best(self) -> Scores:
        """For each metric the best value along the way.

        It is selected with the labels of the validation frames, so it is not a reportable result. Some papers report it.
        """
        return {name: max(scores.get(name, 0.0) for _, scores in self.history) for name in self.student}

    def to_json(self) -> dict[str, Json]:
        """The result as plain JSON values."""
        return {**asdict(self), "history": [[step, dict(scores)] for step, scores in self.history]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Json]) -> Self:
        """Read back what `to_json` gave.

        Args:
            stored: The JSON values.

        Returns:
            An equal result.
        """
        history = tuple((step, scores) for step, scores in stored["history"])
        return cls(student=stored["student"], teacher=stored["teacher"], history=history, seconds=stored["seconds"])


def run_methods(job: JobFolder, runs: Mapping[str, MethodRun]) -> Iterator[tuple[str, MethodResult]]:
    """Run several methods from the same source model, `options.processes` at a time.

    Args:
        job: Its source model must be there, and its store if a method learns from smashed scenes.
        runs: Methods by name. The name is also that of the method's folder in the job.

    Yields:
        Name and result of each method as soon as it is known; finished methods at once.
    """
    finished = [name for name in runs if _result_file(job, name).exists()]
    yield from ((name, _read_result(job, name)) for name in finished)
    todo = {name: run for name, run in runs.items() if name not in finished}
    with job.timed("trials"):
        _prepare_shared(job, todo.values())
        for name, result in _run_all(job, todo):
            job.options.say(f"{name}: {METHODS[todo[name].method].summary}")
            yield name, result


def run_method(job: JobFolder, name: str, run: MethodRun) -> MethodResult:
    """Train by one method from the source model, score it on the validation frames, and store the result.

    Args:
        job: Its source model must be there, and its store if the method learns from smashed scenes.
        name: Name of the method's folder in the job.
        run: The method with its settings.

    Returns:
        The scores.
    """
    start, folder = time.perf_counter(), job.method_folder(name)
    detector = load_detector(job.source_model).to(job.options.device)
    config = replace(run.upcycle, loop=replace(run.upcycle.loop, seed=job.config.seed))
    with RunFolder.create(folder, config, seed=job.config.seed, resume=True) as log:
        teacher = _train(job, detector, run, config, log)
        student_scores = _score(job, detector)
        along = [(line["step"] + 1, {k: line[k] for k in student_scores if k in line}) for line in log.metrics("validation")]
    save_run_detector(folder, detector.cpu())
    save_detector(folder / TEACHER_FILE, teacher.cpu())
    untrained = METHODS[run.method].trains == "nothing"
    teacher_scores = student_scores if untrained else _score(job, teacher.to(job.options.device))
    result = MethodResult(
        student=student_scores,
        teacher=teacher_scores,
        history=(*along, (0 if untrained else config.loop.total_steps, student_scores)),
        seconds=time.perf_counter() - start,
    )
    write_atomically(_result_file(job, name), json.dumps(result.to_json(), indent=1).encode())
    return result


def _train(job: JobFolder, detector: Detector, run: MethodRun, config: UpcycleConfig, log: RunFolder) -> Detector:
    """Train `detector` in place; returns its teacher."""
    c, total, method = job.config, config.loop.total_steps, METHODS[run.method]
    half = LabeledHalf(data=_labels_of(job, method), target=run.target)

    def score_along(step: int, student: Detector) -> None:
        done = step + 1
        if done % -(-total // job.options.scores_along) == 0 and done < total:
            log.log(step, _score(job, student), kind="validation")
            student.train()

    store = job.store(detector) if method.unlabeled == "smashed" else None
    truth = _truth(job, method)

    def objects(at: UpcycleConfig) -> Path:
        # Methods with the same labels share a database. That of the target's few labels is this method's own.
        return job.objects_folder(at.f_gt, within=None if run.target is None else log.path)

    def train(
        model: Detector, by: Method, at: UpcycleConfig, into: RunFolder, after_step: Callable[[int, Detector], None] | None = None
    ) -> Detector:
        scans = None
        if method.unlabeled == "raw":
            scans = unlabeled_batches(c.preset, c.fleet.open(), batch_size=at.unlabeled_batch, seed=c.seed)
        return upcycle(
            model,
            method=by,
            labeled=half.batches(c.preset, by, at, seed=c.seed),
            store=store,
            scans=scans,
            pasted_objects=half.objects_to_paste(objects(at), detector, at, codec=c.codec) if by.f_gt else None,
            config=at,
            codec=c.codec,
            truth=truth,
            run=into,
            after_step=after_step,
            workers=job.options.workers,
            progress=job.options.progress,
        )

    def train_shortly(model: Detector, by: Method, at: UpcycleConfig, folder: Path) -> None:
        with RunFolder.create(folder, at, seed=c.seed, resume=True) as short:
            train(model, by, at, short)

    config = settings_at_fleet_sizes(
        log.path,
        method,
        config,
        detector,
        c.labeled.open(),
        store,
        codec=c.codec,
        seed=c.seed,
        learn=train_shortly,
        say=job.options.say,
        asked=None if run.target is None else run.target.data.open(),
        truth=truth,
    )
    return train(detector, method, config, log, score_along)


def _labels_of(job: JobFolder, method: Method) -> DataSplit:
    return job.config.labeled if method.labeled == "source" else job.config.fleet


def _truth(job: JobFolder, method: Method) -> dict[str, Labels] | None:
    """Labels of the fleet, where it has them, by the id of the frame (raw) or the scene (smashed): they only measure pseudo labels."""
    if method.unlabeled == "none":
        return None
    fleet = job.config.fleet.open()
    labels = ((frame_id, fleet.labels(i)) for i, frame_id in enumerate(fleet.ids))
    by_frame = {frame_id: found for frame_id, found in labels if found is not None}
    if method.unlabeled == "raw":
        return by_frame
    receipts = read_json(
        job.receipts, "the receipts of an extraction", remedy="delete extraction.json beside it to extract again"
    )
    return {scene: by_frame[frame] for scene, frame in receipts.items() if frame in by_frame}


def _score(job: JobFolder, detector: Detector) -> Scores:
    return score_detector(detector, job.config.validation.open(), job.config.protocol).headline()


def _prepare_shared(job: JobFolder, runs: Collection[MethodRun]) -> None:
    """Make what several methods read, before they run at once."""
    for data in {_labels_of(job, METHODS[r.method]) for r in runs if METHODS[r.method].trains != "nothing"}:
        data.ensure_gt_database()
    # A method that estimates sizes cuts its own objects, once it knows them.
    shared = [r for r in runs if METHODS[r.method].f_gt and not METHODS[r.method].estimates_sizes and r.target is None]
    if shared:
        detector = load_detector(job.source_model)
        for config in {r.upcycle.f_gt: r.upcycle for r in shared}.values():
            half = LabeledHalf(data=job.config.labeled)
            half.objects_to_paste(job.objects_folder(config.f_gt), detector, config, codec=job.config.codec)
    for split in {r.target.data for r in runs if r.target is not None}:
        split.ensure_gt_database()


def _run_all(job: JobFolder, runs: Mapping[str, MethodRun]) -> Iterator[tuple[str, MethodResult]]:
    if job.options.processes < 2 or not runs:
        yield from ((name, run_method(job, name, run)) for name, run in runs.items())
        return
    context = multiprocessing.get_context("spawn")
    quiet = replace(job, options=replace(job.options, say=_nothing))
    with ProcessPoolExecutor(job.options.processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {pool.submit(run_method, quiet, name, run): name for name, run in runs.items()}
        for future in as_completed(running):
            yield running[future], future.result()


def _nothing(text: str) -> None:
    pass


def _result_file(job: JobFolder, name: str) -> Path:
    return job.method_folder(name) / "result.json"


def _read_result(job: JobFolder, name: str) -> MethodResult:
    remedy = "delete it, and its result is computed again"
    path = _result_file(job, name)
    try:
        return MethodResult.from_json(read_json(path, "a method's result", remedy=remedy, allow_nan=True))
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is damaged or was edited ({error!r}); {remedy}") from error
