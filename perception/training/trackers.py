"""Where a run also sends its metrics, for people to look at: TensorBoard, wandb, mlflow or trackio.

`metrics.jsonl` in the run folder always has every value; a tracker shows them and nothing reads them back. So a tracker that fails never
stops a training: `Tracking` reports the first failure, counts all of them, and the status of the run says their number.

All four write into the run folder and open no connection, unless the tracker's own environment variables say otherwise (`WANDB_MODE`,
`MLFLOW_TRACKING_URI`, `TRACKIO_DIR`). Their packages take seconds to import, so each is loaded with the first metric.

Read next: `run_folder.py`, which writes the metrics.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from ...core.config_json import Json
from ...core.errors import InvalidInput
from ...core.foreign_text import shown

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]
"""Which tracker a run has besides `metrics.jsonl`; `none` for no other."""


class Tracker(Protocol):
    """Shows the metrics of one run while it trains."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show values.

        Args:
            step: The step of these values. A later call may have a smaller one, as scores on the way have.
            values: Metrics by name, such as `train/total_loss`. They may be NaN or infinite.
        """

    def flush(self) -> None:
        """Write out what is held back."""

    def close(self) -> None:
        """Write out everything and let go of files and processes."""


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int, config: Mapping[str, Json]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class _Wandb:
    def __init__(self, folder: Path, first_step: int, config: Mapping[str, Json]) -> None:
        wandb: Any = importlib.import_module("wandb")
        (folder / "wandb").mkdir(exist_ok=True)  # without it wandb writes to the system's temporary folder
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "upcycle3d"),
            name=_name_of_start(folder, first_step),
            group=folder.name,
            dir=str(folder),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", silent=True),
        )
        # wandb drops values whose step is smaller than the last one, so the step is a value of its own.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        pass  # a process of its own writes

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, folder: Path, first_step: int, config: Mapping[str, Json]) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        place = folder / "mlflow"
        place.mkdir(exist_ok=True)
        own = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = mlflow.MlflowClient(tracking_uri=own or f"sqlite:///{place / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "upcycle3d")
        known = self._client.get_experiment_by_name(name)
        artifacts = None if own else (place / "artifacts").as_uri()
        experiment = known.experiment_id if known else self._client.create_experiment(name, artifact_location=artifacts)
        self._run = self._client.create_run(experiment, run_name=_name_of_start(folder, first_step)).info.run_id
        self._entities: Any = importlib.import_module("mlflow.entities")
        params = [self._entities.Param(key, str(value)) for key, value in config.items() if not isinstance(value, dict | list)]
        self._client.log_batch(self._run, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[self._entities.Metric(n, v, now, step) for n, v in values.items()])

    def flush(self) -> None:
        pass  # every call is a transaction

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Trackio:
    def __init__(self, folder: Path, first_step: int, config: Mapping[str, Json]) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it greets on the standard output
            self._run = _trackio_in(folder).init(
                project=os.environ.get("TRACKIO_PROJECT", "upcycle3d"),
                name=_name_of_start(folder, first_step),
                group=folder.name,
                config=dict(config),
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        pass  # a thread of its own writes

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


def _trackio_in(folder: Path) -> Any:
    """The package, which learns its folder when it is imported, and never again."""
    if "TRACKIO_DIR" in os.environ:
        return importlib.import_module("trackio")
    if "trackio" in sys.modules:
        raise RuntimeError(
            "trackio was imported before this run and keeps the folder of that time; set TRACKIO_DIR, or use a process per run"
        )
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    try:
        return importlib.import_module("trackio")
    finally:
        del os.environ["TRACKIO_DIR"]


_TRACKERS: Mapping[TrackerName, Callable[[Path, int, Mapping[str, Json]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def _name_of_start(folder: Path, first_step: int) -> str:
    """The name of a run in a tracker. Each resume is a run of its own there: none of the packages takes values back."""
    return folder.name if first_step <= 1 else f"{folder.name} from step {first_step}"


def require_tracker(name: TrackerName) -> None:
    """Refuse to start a run whose tracker is not installed: the package is loaded with the first metrics, after the first steps.

    Args:
        name: The tracker.

    Raises:
        InvalidInput: There is no such tracker, or its package is not installed here.
    """
    if name == "none":
        return
    if name not in _TRACKERS:
        raise InvalidInput(f"there is no tracker {shown(name)!r}; choose one of {', '.join(_TRACKERS)}, or none")
    if importlib.util.find_spec(name) is None:
        raise InvalidInput(
            f"a run shows its metrics with the package {name}, which is not installed for {sys.executable}: pip install {name}. With --log none, "
            "metrics.jsonl alone has them"
        )


class Tracking:
    """The tracker of a run, opened with the first values. Nothing that fails in it reaches the caller.

    Attributes:
        name: Which tracker it is.
        failures: How often a call of the tracker failed; each one is a line of metrics that the tracker may lack.

    Args:
        name: The tracker.
        folder: The run folder.
        config: The configuration of the run, which wandb, mlflow and trackio show beside the metrics.
    """

    def __init__(self, name: TrackerName, folder: Path, config: Mapping[str, Json]) -> None:
        self.name = name
        self.failures = 0
        self._folder, self._config = folder, config
        self._tracker: Tracker | None = None
        self._given_up = name == "none"
        self._told = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show values.

        Args:
            step: Their step.
            values: Metrics by name.
        """
        if self._given_up:
            self.failures += self.name != "none"
            return
        if self._tracker is None and not self._try(lambda: self._open(step)):
            self._given_up = True  # a tracker that cannot be opened is not tried again at every step
            return
        self._try(lambda: self._opened.log(step, values))

    def flush(self) -> None:
        """Write out what is held back."""
        if self._tracker is not None:
            self._try(self._opened.flush)

    def close(self) -> None:
        """Close the tracker, and say how many failures there were since the first was reported. The next value opens it again."""
        if self._tracker is not None:
            self._try(self._opened.close)
            self._tracker = None
        if self.failures > self._told:
            warnings.warn(
                f"the tracker {self.name} failed {self.failures} times in all; metrics.jsonl has every value", stacklevel=2
            )
            self._told = self.failures

    @property
    def _opened(self) -> Tracker:
        assert self._tracker is not None
        return self._tracker

    def _open(self, first_step: int) -> None:
        self._tracker = _TRACKERS[self.name](self._folder, first_step, self._config)

    def _try(self, call: Callable[[], None]) -> bool:
        """Whether a call of the tracker went well. A foreign package may raise anything; Ctrl-C still acts."""
        try:
            call()
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                self._told = 1
                warnings.warn(
                    f"the tracker {self.name} failed ({type(error).__name__}: {shown(str(error), most=300)}); the training goes on, and "
                    f"metrics.jsonl has every value",
                    stacklevel=4,
                )
            return False
        return True
