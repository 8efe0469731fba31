"""The whole story on prepared data, in order: what `upcycle3d demo` shows and `upcycle3d experiment upcycling` repeats over seeds.

    labeled frames ─ source model ─┬─ the fleet's smashed scenes, ingested ─┬─ each method ─ scored on the validation frames
                                   └────────────────────────────────────────┘

Every stage leaves its result in a folder and is skipped if that is there, so a job that was stopped goes on.

Read next, stage by stage: `job_folder.py` (the folder and the configuration), `fleet_extraction.py` and `method_run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ...core.errors import InvalidInput
from ...datasets.data_split import DataSplit
from ..training.detector_files import load_detector, save_run_detector
from ..training.run_folder import RunFolder
from ..training.supervised import train_supervised
from .assembly import labeled_batches
from .fleet_extraction import extract_fleet
from .job_folder import JobFolder, PipelineConfig, RunOptions
from .method_run import MethodResult, MethodRun, run_methods
from .presets import Preset


class Pipeline:
    """The stages of one job in one folder.

    Example:
        pipeline = Pipeline(config, Path("runs/job"))
        pipeline.train_source_model()
        pipeline.extract_fleet()
        results = dict(pipeline.results({"upcycling": MethodRun(method="upcycling", upcycle=config.preset.upcycle)}))
    """

    def __init__(self, config: PipelineConfig, folder: Path, options: RunOptions | None = None) -> None:
        """Open the folder of a job, or make it.

        Args:
            config: What decides the results.
            folder: Folder of the job.
            options: How the job runs; the defaults of `RunOptions` if None.

        Raises:
            InvalidInput: The folder holds a job with another configuration or other frames.
        """
        self.job = JobFolder(config=config, folder=folder, options=options or RunOptions())

    def train_source_model(self) -> Path:
        """Train the source model on the labeled frames, unless it is there or a trained one was given.

        Returns:
            Its run folder.

        Raises:
            InvalidInput: The given source model is another detector than the preset's.
        """
        c, folder, options = self.job.config, self.job.source_model, self.job.options
        if c.source_model is not None:
            if load_detector(folder).config != c.preset.detector:
                raise InvalidInput(f"{folder} holds a detector other than the preset's; pass the preset it was trained with")
        elif not (folder / "detector.safetensors").exists():
            options.say("training on the labeled frames")
            with self.job.timed("train source"):
                train_source_model(folder, c.labeled, c.preset, seed=c.seed, options=options)
        return folder

    def extract_fleet(self) -> dict[str, float]:
        """Smash every scan of the fleet and ingest the scenes, unless that is done.

        Returns:
            Bytes and milliseconds per frame; see `fleet_extraction.extract_fleet`.
        """
        return extract_fleet(self.job)

    def results(self, runs: Mapping[str, MethodRun]) -> Iterator[tuple[str, MethodResult]]:
        """Run methods from the source model and score them; finished ones are not run again.

        Args:
            runs: Methods with their settings, by name.

        Returns:
            Name and result of each method, as soon as it is known.
        """
        return run_methods(self.job, runs)


def train_source_model(folder: Path, data: DataSplit, preset: Preset, *, seed: int, options: RunOptions) -> None:
    """Train a detector on a labeled split, unless the run folder holds a finished one.

    Args:
        folder: Run folder to write.
        data: The labeled split. Its GT database is built if it is not there.
        preset: Detector and training.
        seed: Decides initial weights, order of frames and augmentation.
        options: How it runs.
    """
    if (folder / "detector.safetensors").exists():
        return
    torch.manual_seed(seed)
    detector = preset.detector.build().to(options.device)
    data.ensure_gt_database()
    labeled = labeled_batches(preset, data, batch_size=preset.train.batch_size, seed=seed)
    train = replace(preset.train, loop=replace(preset.train.loop, seed=seed))
    with RunFolder.create(folder, train, seed=seed, resume=True) as run:
        train_supervised(detector, labeled, train.loop, run=run, workers=options.workers, progress=options.progress)
    save_run_detector(folder, detector.cpu())
