"""One job: its configuration, its folder and where things lie in it.

    job.json            the configuration; a folder of another one is refused
    source_run/         run folder of the source model, unless a trained one was given
    shards/, store/     the fleet's smashed scenes as they leave the vehicle, and as the server took them in
    receipts.json       scene id -> frame id; no shard holds this, and it only serves to measure pseudo labels
    extraction.json     bytes and milliseconds per frame; written last, so it says that the fleet is finished
    feature_gt_KEY/     F-GT's object database, one per setting of F-GT
    methods/NAME/       run folder of a method; its result.json is written last
    seconds.json        seconds by stage, over all starts of the job

Read next: `pipeline.py`, which fills the folder stage by stage.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...core.config_json import Json, config_to_json, first_difference
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.rig import RigSpec
from ...core.strict_json import read_json
from ...datasets.data_split import DataSplit
from ...datasets.fingerprint import as_recorded
from ..evaluation.score import Protocol
from ..models.detector import Detector
from ..server.store import SmashedStore
from ..server.upcycle_config import FeatureGtConfig
from .assembly import fleet_store
from .presets import Preset


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What decides every result of a job, except the settings of each method."""

    labeled: DataSplit
    """Labeled frames of the source domain: the source model and the labeled half of every batch learn from them."""
    fleet: DataSplit
    """Frames of the fleet, which are smashed. Their labels serve the oracles, and to measure pseudo labels."""
    validation: DataSplit
    """Frames to score on."""
    protocol: Protocol
    """How detections are scored."""
    preset: Preset
    """The detector, how the source model is trained, and how labeled frames are augmented. `preset.upcycle` is not used: each method
    brings its own settings."""
    seed: int
    """Seed of every training."""
    codec: str = "fp16"
    """How features are stored: `fp16` or `int8`."""
    source_model: Path | None = None
    """Run folder of a trained detector to start from. None trains one on `labeled`."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a job runs. None of these changes a result.

    Raises:
        InvalidInput: `scores_along` is below 1.
    """

    say: Callable[[str], None] = print
    """Called with one line when a stage begins and when a result is known."""
    scores_along: int = 1
    """How often a method is scored on the way, the last step included: the number of entries of `MethodResult.history`."""
    device: torch.device = torch.device("cpu")
    """Where networks run."""
    workers: int = 0
    """Processes that prepare batches, for each method; 0 prepares them in the training process."""
    processes: int = 2
    """Methods that run at a time. With more than one, each has one thread: on few cores that is faster than several threads."""
    progress: bool = False
    """Show a progress bar of each training."""

    def __post_init__(self) -> None:
        if self.scores_along < 1:
            raise InvalidInput(
                f"a method is scored at least once, after its last step; found scores_along = {self.scores_along}, give 1 or more"
            )


@dataclass(kw_only=True)
class JobFolder:
    """The folder of one configuration and the same frames.

    Stages are skipped where their result is there, so a folder of another configuration must not be used.

    Raises:
        InvalidInput: The folder belongs to another configuration, or the frames have changed. The message names the difference.
    """

    config: PipelineConfig
    """What decides the results."""
    folder: Path
    """Where they lie."""
    options: RunOptions = RunOptions()
    """How the job runs."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, over all starts of the job, as far as this object has read or added them."""

    def __post_init__(self) -> None:
        path, wanted = self.folder / "job.json", self._identity()
        if path.exists():
            stored = read_json(path, "the configuration of a job", remedy="choose another folder")
            difference = first_difference(stored, json.loads(as_recorded(json.dumps(wanted), json.dumps(stored))))
            if difference:
                raise InvalidInput(f"{self.folder} holds a job with another configuration ({difference}); choose another folder")
        else:
            write_atomically(path, json.dumps(wanted, indent=1).encode())

    def _identity(self) -> dict[str, Json]:
        c = self.config
        return {
            "detector": config_to_json(c.preset.detector),
            "train": None if c.source_model else config_to_json(c.preset.train),
            "checkpoint": c.source_model and _sha256(c.source_model / "detector.safetensors"),
            "seed": c.seed,
            "codec": c.codec,
            "protocol": c.protocol,
            **{name: getattr(c, name).summary() for name in ("labeled", "fleet", "validation")},
        }

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a `with` block to `seconds`.

        Args:
            stage: Name of the stage.

        Yields:
            Nothing.
        """
        start = time.perf_counter()
        yield
        self.add_seconds(stage, time.perf_counter() - start)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to `seconds` and to its file, which survives a stopped job.

        Args:
            stage: Name of the stage.
            seconds: Time to add.
        """
        path = self.folder / "seconds.json"
        if not self.seconds and path.exists():
            self.seconds = read_json(path, "the seconds by stage of a job", remedy="delete it; only times are lost")
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        write_atomically(path, json.dumps(self.seconds).encode())

    @property
    def source_model(self) -> Path:
        """The run folder of the source model."""
        return self.config.source_model or self.folder / "source_run"

    @property
    def rig(self) -> RigSpec:
        """The rig with which the fleet's frames were prepared: what its vehicles do to a scan first."""
        return self.config.fleet.open().rig

    @property
    def receipts(self) -> Path:
        """JSON file with the frame id of each scene id."""
        return self.folder / "receipts.json"

    def method_folder(self, name: str) -> Path:
        """The run folder of a method.

        Args:
            name: Name of the method in this job.

        Returns:
            The folder, which may not exist.
        """
        return self.folder / "methods" / name

    def store(self, detector: Detector) -> SmashedStore:
        """Open the store of the fleet's scenes.

        Args:
            detector: Its encoder must have made the scenes.

        Returns:
            The verified scenes.
        """
        return fleet_store(self.folder / "store", detector, self.rig)

    def objects_folder(self, config: FeatureGtConfig, *, within: Path | None = None) -> Path:
        """The folder of F-GT's database of labeled objects.

        Args:
            config: F-GT's settings. Each setting has a database of its own.
            within: Folder that holds it; None takes that of the job, whose methods share it.

        Returns:
            The folder, which may not exist.
        """
        key = hashlib.sha256(json.dumps(config_to_json(config), sort_keys=True).encode()).hexdigest()[:12]
        return (within or self.folder) / f"feature_gt_{key}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
