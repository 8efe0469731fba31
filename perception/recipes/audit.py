"""The audit: what uploads of a detector give away, with and without defences, measured by attacks.

    setting (defences, codec) ─┬─ what is sent: bytes and cells per frame
                               ├─ each attack: trained on the attacker's frames, scored on the victims'
                               └─ AP after UpCycling on such uploads, where asked for

Each of these is a *cell*. It is stored as soon as it is known, so that an audit that was stopped goes on. Every attack learns from the
attacker's frames, chooses thresholds on the last tenth of them, and is scored on the victims' frames, which nothing else has seen.

Read next: `audit_plan.py`, which says what is measured, `audit_cells.py`, which measures one cell, and `audit_report.py`, which makes
tables, plots and pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from ...core.config_json import Json, config_from_json, config_to_json
from ...core.cut import VoxelGrid
from ...core.errors import InvalidInput
from ...core.rig import RigSpec
from ...datasets.data_split import DataSplit
from ..evaluation.score import own_protocol
from ..models.detector import Detector
from ..models.encoders.defended import DefendedEncoder
from ..models.encoders.fingerprint import encoder_fingerprint
from ..privacy.attacks.attributes import AttributeLeak
from ..privacy.attacks.membership import MembershipLeak
from ..privacy.attacks.people import PeopleLeak
from ..privacy.frames import AuditFrame, audit_frames
from ..training.detector_files import DETECTOR_FILE, load_detector
from .audit_cells import (
    WITHOUT_UPLOADS,
    AttackName,
    ExactMeasured,
    RebuildMeasured,
    SentMeasured,
    measure_attributes,
    measure_exact,
    measure_people,
    measure_rebuild,
    measure_sent,
)
from .audit_inputs import check_audit_defences, check_audit_inputs
from .audit_linkage import LinkageMeasured, measure_linkage
from .audit_membership import check_membership, measure_membership
from .audit_plan import AuditPlan, AuditSetting, AuditUse
from .defend import REPORT_FILE, defend_detector
from .job_folder import PipelineConfig, RunOptions
from .method_run import MethodResult, MethodRun
from .pipeline import Pipeline
from .result_cache import ResultCache

T = TypeVar("T")
Measured = RebuildMeasured | ExactMeasured | LinkageMeasured | AttributeLeak | PeopleLeak | None
"""What an attack may give."""


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """What was measured of one setting."""

    setting: AuditSetting
    """The setting."""
    sent: SentMeasured
    """What leaves the vehicle."""
    rebuilt: dict[AttackName, RebuildMeasured]
    """Results of the attacks that rebuild a scan."""
    exact: ExactMeasured | None
    """Points that were computed exactly; None where nobody tried."""
    linkage: LinkageMeasured | None
    """What the pile of uploads gave away about order and origin; None where nobody tried, or the frames have no drives."""
    attributes: AttributeLeak | None
    """What was told of intensity, class and size of objects; None where nobody tried, or there are no labels."""
    people: PeopleLeak | None
    """Whether pedestrians were found; None where nobody tried, or nobody labeled them."""
    used: dict[int, MethodResult]
    """AP after UpCycling by seed; empty where nobody trained."""


class Audit:
    """An audit in a folder.

    Example:
        audit = Audit(plan, Path("runs/audit"))
        for result in audit.results():
            print(result.setting.name, result.sent.bytes_per_frame)
    """

    def __init__(self, plan: AuditPlan, folder: Path, *, use: AuditUse | None = None, say: Callable[[str], None] = print) -> None:
        """Open the folder of an audit, or make it.

        Args:
            plan: What decides the numbers.
            folder: Folder of the audit.
            use: The training whose AP is measured; None measures none.
            say: Called with one line when something is measured, such as `3 of 27: small: occupancy`.

        Raises:
            InvalidInput: The folder holds another audit, a file of the plan cannot be read, the detector carries defences or cannot have
                those of a setting, or the frames cannot be used: a victim is a frame of the attacker too, labels have other classes
                than the detector, or there are none to fit defences to.
        """
        self.plan, self.folder, self.use, self.say = plan, folder, use, say
        self._counted = 0
        self._detector = load_detector(plan.detector)
        check_audit_inputs(
            self._detector, plan.detector, attacker=plan.attacker, labeled=plan.labeled, victims=plan.victims, warn=say
        )
        if plan.membership is not None:
            check_membership(plan.membership, self._detector, plan.detector, plan.victims)
        check_audit_defences(self._detector, {setting.name: setting.defences for setting in plan.settings}, plan.labeled)
        self.cache = ResultCache(folder / "cells", self._identity())

    def _identity(self) -> dict[str, Json]:
        plan = self.plan
        path = plan.detector / DETECTOR_FILE if plan.detector.is_dir() else plan.detector
        return {
            "detector": hashlib.sha256(path.read_bytes()).hexdigest(),
            **{name: getattr(plan, name).summary() for name in ("labeled", "attacker", "victims")},
            "drives": None if plan.drives is None else hashlib.sha256(plan.drives.read_bytes()).hexdigest(),
            "budget": config_to_json(plan.budget),
            "seed": plan.seed,
        }

    @property
    def grid(self) -> VoxelGrid:
        """The input grid of the detector."""
        return self._detector.spec.grid

    @property
    def cells(self) -> int:
        """Number of cells of the whole audit: for every setting what is sent, each attack, and each training on its uploads; and membership."""
        each = 1 + len(self.plan.attacks) + (0 if self.use is None else len(self.use.seeds))
        return len(self.plan.settings) * each + (self.plan.membership is not None)

    def results(self) -> Iterator[SettingResult]:
        """Measure what is missing, setting by setting.

        Yields:
            The result of each setting as soon as it is complete.
        """
        self._counted = 0
        for setting in self.plan.settings:
            yield self._result(setting)

    def membership(self) -> MembershipLeak | None:
        """Measure what the weights of the detector tell of the frames that it was trained on. No defence changes them, so this is one cell.

        Returns:
            The scores; None where the plan names no such frames.
        """
        if (plan := self.plan.membership) is None:
            return None

        def measure() -> Json:
            self.say(f"{self.cells} of {self.cells}: membership of frames in the training set")
            most = self.plan.budget.victim_frames
            return config_to_json(measure_membership(plan, self._detector, self.plan.victims, most=most, seed=self.plan.seed))

        name = f"membership_{plan.digest()}"
        return self._decoded(MembershipLeak, name, self.cache.read_or_make(name, self.plan.seed, measure))

    def _result(self, setting: AuditSetting) -> SettingResult:
        lazy = _Frames(self, setting)
        stored = self._cell(setting, "sent", lambda: measure_sent(lazy.detector, lazy.victims, setting.codec))
        sent = self._decoded(SentMeasured, f"{setting.name}__sent", stored)
        rebuilt: dict[AttackName, RebuildMeasured] = {}
        exact: ExactMeasured | None = None
        linkage: LinkageMeasured | None = None
        attributes: AttributeLeak | None = None
        people: PeopleLeak | None = None
        for name in self.plan.attacks:
            stored, key = self._cell(setting, name, partial(self._attack, name, lazy)), f"{setting.name}__{name}"
            if name == "exact":
                exact = self._decoded(ExactMeasured, key, stored)
            elif name == "linkage":
                linkage = self._decoded(LinkageMeasured, key, stored) if stored else None
            elif name == "attributes":
                attributes = self._decoded(AttributeLeak, key, stored) if stored else None
            elif name == "people":
                people = self._decoded(PeopleLeak, key, stored) if stored else None
            else:
                rebuilt[name] = self._decoded(RebuildMeasured, key, stored)
        return SettingResult(
            setting=setting,
            sent=sent,
            rebuilt=rebuilt,
            exact=exact,
            linkage=linkage,
            attributes=attributes,
            people=people,
            used=self._used(setting),
        )

    def _attack(self, name: AttackName, lazy: _Frames) -> Measured:
        budget = self.plan.budget
        if name == "exact":
            return measure_exact(lazy.detector, lazy.attacker, lazy.victims, lazy.setting.codec, budget.exact_frames)
        if name == "linkage":
            return measure_linkage(lazy.victims, self.plan.drives)
        if name == "attributes":
            return measure_attributes(self._detector, lazy.attacker, lazy.victims, seed=self.plan.seed)
        if name == "people":
            return measure_people(self._detector, lazy.attacker, lazy.victims, seed=self.plan.seed)
        return measure_rebuild(
            name,
            lazy.attacker,
            lazy.victims,
            detector=self._detector,
            steps=budget.steps,
            size=budget.size,
            seed=self.plan.seed,
            picture=self.folder / "scenes" / f"{lazy.setting.name}__{name}.npy",
        )

    def _cell(self, setting: AuditSetting, what: str, measure: Callable[[], object]) -> Json:
        self._counted += 1
        key = f"{setting.name}__{what}"
        stored = {"setting": config_to_json(setting)}
        if self.cache.has(key, self.plan.seed):
            found = self.cache.read(key, self.plan.seed)
            if not isinstance(found, dict) or found.keys() != {"setting", "measured"}:
                raise InvalidInput(self._damaged(key, "a setting and what was measured are not there"))
            if found["setting"] != json.loads(json.dumps(stored["setting"])):
                raise InvalidInput(
                    f"{self.cache.path(key, self.plan.seed)} is of another setting with the name {setting.name!r}; give the new "
                    "setting another name"
                )
            return found["measured"]
        place = f"{self._counted} of {self.cells}: {setting if what == 'sent' else setting.name}: {what}"
        known = self._measured_of_another(what)
        if known is None:
            self.say(place)
            measured = measure()
            found = None if measured is None else config_to_json(measured)
        else:
            self.say(f"{place}, the same as of {known.name}")
            found = self.cache.read(f"{known.name}__{what}", self.plan.seed)["measured"]
        self.cache.write(key, self.plan.seed, {**stored, "measured": found})
        return self.cache.read(key, self.plan.seed)["measured"]

    def _decoded(self, kind: type[T], key: str, stored: Json) -> T:
        """The value of a cell; a file that somebody edited, or another version wrote, is named."""
        try:
            return config_from_json(kind, stored)
        except InvalidInput as error:
            raise InvalidInput(self._damaged(key, str(error))) from error

    def _damaged(self, key: str, why: str) -> str:
        return f"{self.cache.path(key, self.plan.seed)} is no cell of this version ({why}); delete it, and it is measured again"

    def _measured_of_another(self, what: str) -> AuditSetting | None:
        """A setting whose cell of this name is there already and is that of every setting, because the attack looks at no upload."""
        if what not in WITHOUT_UPLOADS:
            return None
        return next((s for s in self.plan.settings if self.cache.has(f"{s.name}__{what}", self.plan.seed)), None)

    def detector_folder(self, setting: AuditSetting) -> Path:
        """Find the run folder of the detector of a setting; it is made if it is not there.

        Args:
            setting: The setting.

        Returns:
            The folder or file; that of the plan where there is no defence.
        """
        if not setting.defences:
            return self.plan.detector
        folder = self.folder / "detectors" / setting.name
        if not (folder / REPORT_FILE).exists():
            (folder / DETECTOR_FILE).unlink(missing_ok=True)  # of a run that was killed
            defend_detector(
                self.plan.detector,
                self.plan.labeled,
                folder,
                setting.defences,
                steps=self.plan.budget.defence_steps,
                seed=self.plan.seed,
            )
        encoder = load_detector(folder).encoder
        if not isinstance(encoder, DefendedEncoder) or encoder.config.defences != setting.defences:
            raise InvalidInput(
                f"{folder} is the detector of another setting with the name {setting.name!r}; give the new setting another name"
            )
        if encoder_fingerprint(encoder.encoder, RigSpec()) != encoder_fingerprint(self._detector.encoder, RigSpec()):
            raise InvalidInput(
                f"{folder} was made from another detector than {self.plan.detector}; choose another folder for the audit"
            )
        return folder

    def pipeline(self, setting: AuditSetting, seed: int) -> Pipeline:
        """Open the job that trains on uploads of a setting.

        Args:
            setting: The setting.
            seed: Seed of the training.

        Returns:
            The job, with the fleet's uploads in its store.

        Raises:
            InvalidInput: The audit trains nothing: it was opened without `use`.
        """
        if (use := self.use) is None:
            raise InvalidInput("the audit was opened without `use`, so nothing is trained")
        config = PipelineConfig(
            labeled=use.labeled,
            fleet=use.fleet,
            validation=use.validation,
            protocol=use.protocol or own_protocol(use.validation.open()),
            preset=use.preset,
            seed=seed,
            codec=setting.codec,
            source_model=self.detector_folder(setting),
        )
        folder = self.folder / "upcycling" / setting.name / f"seed{seed}"
        job = Pipeline(config, folder, RunOptions(say=self.say, processes=1))
        job.extract_fleet()
        return job

    def _used(self, setting: AuditSetting) -> dict[int, MethodResult]:
        """AP after UpCycling by seed."""
        if self.use is None:
            return {}
        run = {"upcycling": MethodRun(method="upcycling", upcycle=self.use.preset.upcycle)}
        found = {}
        for seed in self.use.seeds:
            self._counted += 1
            self.say(f"{self._counted} of {self.cells}: {setting.name}: UpCycling with seed {seed}")
            found[seed] = dict(self.pipeline(setting, seed).results(run))["upcycling"]
        return found


class _Frames:
    """The frames of one setting, smashed when they are first asked for."""

    def __init__(self, audit: Audit, setting: AuditSetting) -> None:
        self._audit, self.setting = audit, setting
        self._detector: Detector | None = None
        self._read: dict[str, list[AuditFrame]] = {}

    @property
    def detector(self) -> Detector:
        """The detector of the setting."""
        if self._detector is None:
            self._detector = load_detector(self._audit.detector_folder(self.setting)).eval()
        return self._detector

    @property
    def attacker(self) -> list[AuditFrame]:
        """The attacker's frames."""
        return self._frames("attacker", self._audit.plan.attacker, self._audit.plan.budget.attacker_frames)

    @property
    def victims(self) -> list[AuditFrame]:
        """The victims' frames."""
        return self._frames("victims", self._audit.plan.victims, self._audit.plan.budget.victim_frames)

    def _frames(self, role: str, split: DataSplit, most: int) -> list[AuditFrame]:
        if role not in self._read:
            frames = split.open()
            count = min(len(frames), most)
            rows = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]  # spread over the split
            encoder = self.detector.encoder  # making or loading it draws random numbers, so the seed is set afterwards
            torch.manual_seed(self._audit.plan.seed)
            self._read[role] = audit_frames((frames[i] for i in rows), encoder, self.setting.codec)
        return self._read[role]
