"""`upcycle3d audit`: what uploads give away, with and without defences. Read next: `perception/recipes/audit.py`."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.errors import InvalidInput
from ..core.provenance import provenance_of_process
from ..datasets.data_split import DataSplit
from ..perception.models.defences.table import parse_defences
from ..perception.recipes.audit import Audit, SettingResult
from ..perception.recipes.audit_cells import REBUILDING, AttackName
from ..perception.recipes.audit_membership import MembershipPlan, ReferencePlan, membership_table
from ..perception.recipes.audit_plan import QUICK, AuditBudget, AuditPlan, AuditSetting, AuditUse
from ..perception.recipes.audit_report import write_audit_report
from ..perception.recipes.audit_tables import (
    LEAK_NOTE,
    attack_table,
    attribute_table,
    summarize_audit,
    summary_table,
    weak_attacks,
)
from ..perception.recipes.job_inputs import find_preset
from .console import console, print_table, print_warning, run_command
from .data_option import DataOption

QUICK_ATTACKS: tuple[AttackName, ...] = ("nothing", "cells", "occupancy", "voxels")
"""Attacks of a first look."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Measure what uploads of a detector give away: train attacks on frames of the attacker, score them on others."""

    detector: Path
    """Run folder or file of a detector without defences."""
    attacker: DataOption
    """Frames of the attacker, whose scans he knows, `train` where no split is named."""
    victims: DataOption
    """Frames that are attacked, `val` where no split is named. Neither detector nor attacker may have learned from them."""
    out: Path
    """Folder of the audit. What is measured there already is not measured again."""
    labeled: DataOption | None = None
    """Labeled frames that defences are fitted to; by default the attacker's, which is wrong where those have no labels."""
    settings: tuple[str, ...] = ()
    """Ways of uploading besides the undefended one, as NAME=DEFENCE+DEFENCE@CODEC: `small=region+noise:sigma=0.1@int8`, `int8=none@int8`."""
    attacks: tuple[AttackName, ...] | None = None
    """Attacks, which docs/privacy.md explains. By default all that rebuild a scan, and `exact`; with `--quick` four cheap ones; with
    `--drives` also `linkage`."""
    drives: Path | None = None
    """CSV file with the columns `id`, `drive` and perhaps `position` of the victims' frames; the attack `linkage` needs it."""
    members: DataOption | None = None
    """Labeled frames that the detector was trained on, `train` where no split is named. The audit then also attacks membership: do the
    weights tell these frames from the victims?"""
    references: tuple[str, ...] = ()
    """Detectors of the attacker for the attack on membership, as DETECTOR=MEMBERS=OTHERS: a run folder, the split that it was trained on, and a
    split that neither it nor the audited detector was trained on. Give two or more: without them a score may say no more than which
    frames are hard."""
    quick: bool = False
    """A first look in minutes, with weaker attacks. It takes no `--budget` options."""
    budget: AuditBudget = AuditBudget()
    """How much work the attackers put in."""
    preset: str | None = None
    """Measure AP after UpCycling too, with the settings of this preset; `--labeled`, `--fleet` and `--validation` are needed then."""
    fleet: DataOption | None = None
    """Frames of the fleet, which every setting smashes for UpCycling, `train` where no split is named."""
    validation: DataOption | None = None
    """Labeled frames to score on after UpCycling, `val` where no split is named."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of UpCycling."""
    seed: int = 0
    """Every other random draw."""


def command(config: AuditOptions) -> None:
    """Measure what uploads give away."""
    start = time.perf_counter()
    attacker, victims = _split(config.attacker, "train"), _split(config.victims, "val")
    attacks, budget = _attacks(config), _budget(config)
    plan = AuditPlan(
        detector=config.detector,
        labeled=attacker if config.labeled is None else _split(config.labeled, "train"),
        attacker=attacker,
        victims=victims,
        drives=config.drives,
        membership=_membership(config),
        settings=tuple(parse_setting(text) for text in config.settings),
        attacks=attacks,
        budget=budget,
        seed=config.seed,
    )
    audit = Audit(plan, config.out, use=_use(config, plan), say=lambda text: console.print(text, soft_wrap=True))
    results = list(audit.results())
    told = attribute_table(results)
    summary = summary_table(summarize_audit(results))
    print_table(summary.caption, summary.header, summary.rows)
    console.print(LEAK_NOTE, soft_wrap=True)
    member = audit.membership()
    more = [*([told] if told else []), *([membership_table(member)] if member else [])]
    for text in (*(attack_table(result) for result in results if result.rebuilt), *more):
        print_table(text.caption, text.header, text.rows)
    for warning in (*weak_attacks(results), *_not_measured(attacks, results)):
        print_warning(warning)
    if config.quick:
        print_warning(
            "these attacks were trained for a minute; the full ones find more, above all of defended uploads. Use --quick to see that everything "
            "works, not to choose a defence"
        )
    report = write_audit_report(audit, results, made_by=provenance_of_process())
    console.print(f"{time.perf_counter() - start:.0f} s; report: {report}; table: {config.out / 'audit.md'}", soft_wrap=True)


def parse_setting(text: str) -> AuditSetting:
    """Read a way of uploading from the command line.

    Args:
        text: NAME=DEFENCE+DEFENCE@CODEC; `none` for no defence; without @CODEC the codec is fp16.

    Returns:
        The setting.

    Raises:
        InvalidInput: The text has another form, or a defence or the codec is unknown.
    """
    match = re.fullmatch(r"([A-Za-z0-9_-]+)=([^@]+)(?:@(\w+))?", text)
    if not match:
        raise InvalidInput(f"a setting is NAME=DEFENCE+DEFENCE@CODEC, as in small=region+noise:sigma=0.1@int8; found {text!r}")
    name, defences, codec = match.groups()
    made = parse_defences(defences)
    codecs: dict[str, Literal["fp16", "int8"]] = {"fp16": "fp16", "int8": "int8"}
    if (codec or "fp16") not in codecs:
        raise InvalidInput(f"there is no codec {codec!r}; it is fp16 or int8")
    return AuditSetting(name=name, defences=made, codec=codecs[codec or "fp16"])


def parse_reference(text: str) -> ReferencePlan:
    """Read a reference detector from the command line.

    Args:
        text: DETECTOR=MEMBERS=OTHERS, the last two as `DIR:SPLIT`.

    Returns:
        The reference.

    Raises:
        InvalidInput: The text has another form.
    """
    parts = text.split("=")
    if len(parts) != 3 or not all(parts):
        raise InvalidInput(
            f"a reference is DETECTOR=MEMBERS=OTHERS, as in runs/mine=data/mine:train=data/mine:val; found {text!r}"
        )
    detector, members, others = parts
    return ReferencePlan(detector=Path(detector), members=DataSplit.parse(members), others=DataSplit.parse(others))


def _membership(config: AuditOptions) -> MembershipPlan | None:
    if config.members is None:
        if config.references:
            raise InvalidInput("--references belong to --members, the frames that the detector was trained on; give them too")
        return None
    references = tuple(parse_reference(text) for text in config.references)
    return MembershipPlan(members=_split(config.members, "train"), references=references)


def _attacks(config: AuditOptions) -> tuple[AttackName, ...]:
    """The attacks that run: `linkage` needs drives, and drives are given for `linkage`."""
    attacks = config.attacks
    if attacks is None:
        attacks = QUICK_ATTACKS if config.quick else (*REBUILDING, "exact")
        return attacks if config.drives is None else (*attacks, "linkage")
    if ("linkage" in attacks) != (config.drives is not None):
        given, missing = ("--attacks linkage", "--drives") if config.drives is None else ("--drives", "`linkage` among --attacks")
        raise InvalidInput(
            f"{given} is given without {missing}, so nothing can be said of order and drives; give both or neither"
        )
    return attacks


def _budget(config: AuditOptions) -> AuditBudget:
    if config.quick and config.budget != AuditBudget():
        raise InvalidInput("--quick sets the whole budget; leave out the --budget options, or leave out --quick")
    return QUICK if config.quick else config.budget


def _not_measured(attacks: tuple[AttackName, ...], results: list[SettingResult]) -> list[str]:
    """Attacks that were asked for and could not run, with the reason."""
    reasons = {
        "attributes": "a frame of the attacker or of the victims has no labels",
        "people": "the detector has no class Pedestrian, or a frame of the attacker or of the victims has no labels",
    }
    found = {
        "attributes": any(result.attributes is not None for result in results),
        "people": any(result.people is not None for result in results),
    }
    texts = [f"the attack {name} was not measured: {why}" for name, why in reasons.items() if name in attacks and not found[name]]
    unsolved = [
        r.setting.name for r in results if r.exact is not None and not r.exact.raw_balls.scans + r.exact.lone_voxels.scans
    ]
    if unsolved:
        texts.append(
            f"the attack exact was not run on {', '.join(unsolved)}: it cannot undo a defence that moves places or changes features other than by "
            "rounding them. This says nothing of an attacker who can"
        )
    return texts


def _split(data: DataOption, default: str) -> DataSplit:
    return data.or_split(default)


def _use(config: AuditOptions, plan: AuditPlan) -> AuditUse | None:
    if config.preset is None:
        if config.fleet is not None or config.validation is not None:
            raise InvalidInput(
                "--fleet and --validation belong to --preset, with which AP after UpCycling is measured; give it too"
            )
        return None
    if config.labeled is None or config.fleet is None or config.validation is None:
        raise InvalidInput("AP after UpCycling needs --labeled, --fleet and --validation besides --preset")
    return AuditUse(
        preset=find_preset(config.preset),
        labeled=plan.labeled,
        fleet=_split(config.fleet, "train"),
        validation=_split(config.validation, "val"),
        seeds=config.seeds,
    )


if __name__ == "__main__":
    sys.exit(run_command(command))
