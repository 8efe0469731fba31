"""Stages of diversified multiplet upcycling on disk: a stopped job goes on where it was, and never mixes two jobs.

A job's folder holds one file per finished stage (`expert1.safetensors`, ...) and one with the trained routers. Each file records a hash of
what it depends on: the base's weights, the data, and the options that the stage uses. So routers may be trained again with other
options without the experts, and a fourth stage may be added to three. Files appear complete or not at all.

Read next: `dmu.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ....core.config_json import config_from_json, config_to_json
from ....core.errors import InvalidInput
from ....core.tensor_file import TensorFile, TensorFileKind, content_digest, fill_module, not_finite, read_tensors, write_tensors
from ..layers.moe_ffn import moe_layers
from ..surgery.replacement import ReplacementPlan
from ..upcycling.upcyclers import Upcycled, saved_tensors
from .cluster_batches import BatchAccount
from .expert_stages import DmuConfig, ExpertStage
from .pair_training import PairTrainingReport
from .pairs import PairData, PairTowers

EXPERT_FILE = TensorFileKind(
    name="expert stage", format="upcycle3d expert stage 1", advice="delete it, and the job computes the stage again"
)
ROUTER_FILE = TensorFileKind(
    name="router stage", format="upcycle3d router stage 1", advice="delete it, and the job trains the routers again"
)


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a stage file says besides its tensors."""

    job: str
    """Hash of what the stage depends on."""
    losses: tuple[float, ...]
    """Loss of every step."""
    balances: tuple[float, ...]
    """Balance loss of every step."""
    account: BatchAccount
    """Where the samples of an epoch went."""
    trained: int
    """Number of values that were trained."""
    cpu_seconds: float
    """CPU time of the training."""
    clusters: int = 0
    """Number of clusters before small ones were merged."""
    moved: int = 0
    """Number of pairs in merged clusters."""
    encoding_seconds: float = 0.0
    """CPU time of encoding and clustering."""

    def report(self) -> PairTrainingReport:
        """Get the training report.

        Returns:
            The report that was stored.
        """
        return PairTrainingReport(
            losses=self.losses,
            balances=self.balances,
            account=self.account,
            trained=self.trained,
            cpu_seconds=self.cpu_seconds,
        )


class StageFolder:
    """The folder of one job."""

    def __init__(self, folder: Path, expert_job: str, router_options: str, plan: ReplacementPlan) -> None:
        self.folder, self.expert_job, self.router_options, self.plan = folder, expert_job, router_options, plan
        self._encoding: dict[int, float] = {}

    @classmethod
    def open(cls, folder: str | Path, base: PairTowers, data: PairData, config: DmuConfig, plan: ReplacementPlan) -> StageFolder:
        """Make or find the folder of a job.

        Args:
            folder: The folder.
            base: The dense model.
            data: The pairs.
            config: The method.
            plan: The FFNs.

        Returns:
            The folder.

        Raises:
            InvalidInput: Stages in it belong to another job.
        """
        options = config_to_json(config)
        for name in ("router", "rule", "router_loss", "router_std", "stages"):  # no expert depends on them
            del options[name]
        depends = [content_digest(saved_tensors(base)), data.fingerprint(), options, [site.name for site in plan.sites]]
        routers = {name: config_to_json(config)[name] for name in ("router", "rule", "router_loss", "router_std", "stages")}
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, _digest(depends), _digest(routers), plan)

    def stage(self, number: int) -> ExpertStage | None:
        """Read a finished stage.

        Args:
            number: Number of the stage, from 1.

        Returns:
            The stage, or None if it is not finished.

        Raises:
            InvalidInput: The file is damaged, or belongs to another job.
        """
        path = self._expert_path(number)
        if not path.exists():
            return None
        file = read_tensors(path, EXPERT_FILE)
        record = _record(file, self.expert_job)
        (labels,) = file.named("labels")
        names = [name for site in self.plan.sites for name in site.tensors]
        ffns = dict(zip(names, file.named(*(f"ffn.{name}" for name in names))))
        self._encoding[number] = record.encoding_seconds
        return ExpertStage(ffns=ffns, labels=labels, clusters=record.clusters, moved=record.moved, report=record.report())

    def encoding_seconds(self, number: int) -> float:
        """Tell what encoding and clustering for a stored stage took.

        Args:
            number: Number of the stage, after `stage` read it.

        Returns:
            CPU seconds.
        """
        return self._encoding.get(number, 0.0)

    def keep(self, number: int, stage: ExpertStage, encoding_seconds: float) -> None:
        """Write a finished stage. The stages after it, and the routers, were made from another one and are removed.

        Args:
            number: Number of the stage.
            stage: The stage.
            encoding_seconds: CPU time of encoding and clustering.
        """
        tensors: dict[str, Tensor] = {f"ffn.{name}": tensor for name, tensor in stage.ffns.items()}
        record = StageRecord(
            **_report_fields(stage.report),
            job=self.expert_job,
            clusters=stage.clusters,
            moved=stage.moved,
            encoding_seconds=encoding_seconds,
        )
        later = number + 1
        while (path := self._expert_path(later)).exists():
            path.unlink()
            later += 1
        self._router_path.unlink(missing_ok=True)
        _write(self._expert_path(number), {**tensors, "labels": stage.labels}, record, EXPERT_FILE)

    def routers(self, made: Upcycled) -> PairTrainingReport | None:
        """Put trained routers into a mixture, if they are there.

        Args:
            made: The mixture of the stages; its routers change.

        Returns:
            The report of their training, or None if they are not trained yet.

        Raises:
            InvalidInput: The file is damaged, or its routers do not fit.
        """
        if not self._router_path.exists():
            return None
        file = read_tensors(self._router_path, ROUTER_FILE)
        try:
            record = _record(file, self._router_job)
        except OtherJob:  # other options for the routers: they are trained again, and the experts stay
            return None
        for name, layer in moe_layers(made.model):
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in file.tensors.items() if key.startswith(f"{name}.")}
            fill_module(layer.router, own, file.path)
        return record.report()

    def keep_routers(self, made: Upcycled, report: PairTrainingReport) -> None:
        """Write the trained routers.

        Args:
            made: The mixture.
            report: The report of their training.
        """
        tensors = {
            f"{name}.{key}": tensor for name, layer in moe_layers(made.model) for key, tensor in layer.router.state_dict().items()
        }
        _write(self._router_path, tensors, StageRecord(**_report_fields(report), job=self._router_job), ROUTER_FILE)

    def _expert_path(self, number: int) -> Path:
        return self.folder / f"expert{number}.safetensors"

    @property
    def _router_path(self) -> Path:
        return self.folder / "routers.safetensors"

    @property
    def _router_job(self) -> str:
        return _digest([self.expert_job, self.router_options])


class OtherJob(InvalidInput):
    """A file was made by another job."""


def _write(path: Path, tensors: Mapping[str, Tensor], record: StageRecord, kind: TensorFileKind) -> None:
    write_tensors(path, {name: t.detach() for name, t in tensors.items()}, {"record": json.dumps(config_to_json(record))}, kind)


def _record(file: TensorFile, job: str) -> StageRecord:
    record = config_from_json(StageRecord, file.described("record"))
    if record.job != job:
        raise OtherJob(
            f"{file.path} was made by another job: other base weights, other data, or other options of the experts. Give the job its own "
            "folder, or delete the files of the old one"
        )
    bad = not_finite(file.tensors)
    if bad:
        raise InvalidInput(f"{file.path} holds NaN or inf in {bad[0]!r}; delete it, and the job computes it again")
    return record


def _report_fields(report: PairTrainingReport) -> dict[str, Any]:
    fields = asdict(report)
    return {**fields, "account": report.account}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
