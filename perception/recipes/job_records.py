"""What a run folder records of a job, and what a resumed run may change: the place of its data, and the number of steps.

A record decides the result of a run, so a run is resumed only with an equal one. Data is known by its content: a split by the fingerprint
of its frames, labels and points, a store by its scenes, a source model by its bytes. So data may be moved, and data that was changed in place is
noticed.

Read next: `jobs.py`, which makes the records, and `perception/training/run_folder.py`, which compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.config_json import config_from_json
from ...core.errors import InvalidInput
from ...core.rig import RigSpec
from ...core.trained_on import TrainedOn
from ...datasets.data_split import DataSplit
from ...datasets.fingerprint import same_split, short
from ..training.checkpoint import latest_checkpoint
from ..training.loop import LoopConfig
from ..training.optim import OneCycle
from ..training.run_folder import RunFolder
from .presets import Preset


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What decides a supervised training: stored in its run folder and compared when the run is resumed."""

    preset: Preset
    """Detector and training settings."""
    data: DataSplit
    """Labeled split, with an absolute folder."""
    seed: int
    """Seed of weights, order and augmentation."""
    data_fingerprint: str = ""
    """Fingerprint of the frames, labels and points of `data`; empty in runs of earlier versions."""
    init: Path | None = None
    """Where the first weights came from; None for random ones."""
    init_digest: str = ""
    """SHA-256 of the tensors that were taken from `init`."""
    processes: int = 1
    """Number of processes: each brings its own frames to a step."""
    trained_on: TrainedOn | None = None
    """What the detector's file will say about its training. It decides nothing."""
    preset_steps: int = 0
    """Steps of the preset, of which `--steps` makes others; 0 in runs of earlier versions. It decides nothing."""


@dataclass(frozen=True, kw_only=True)
class UpcyclingRecord:
    """What decides an upcycling run: stored in its run folder and compared when the run is resumed."""

    preset: Preset
    """Upcycling settings, with the detector of the source model."""
    method: str | Mapping[str, str | float | bool | None]
    """Name of the method, or the fields of the caller's own method (`method_record`)."""
    data: DataSplit
    """Labeled split, with an absolute folder."""
    detector: Path
    """Run folder of the source model."""
    store: Path | None
    """Store of smashed scenes; the first one where there are several."""
    raw: DataSplit | None
    """Raw unlabeled scans."""
    rig: RigSpec
    """Rig of the fleet that filled `store`."""
    codec: str | None
    """Codec of the labeled features; None takes the store's own."""
    seed: int
    """Seed of order, augmentation and pasting."""
    data_fingerprint: str = ""
    """Fingerprint of the frames, labels and points of `data`; empty in runs of earlier versions."""
    detector_digest: str = ""
    """SHA-256 of the tensors of the source model; empty in runs of earlier versions."""
    store_digest: str = ""
    """SHA-256 of the scenes of the store, in their order; empty without a store and in runs of earlier versions."""
    raw_fingerprint: str = ""
    """Fingerprint of the frames of `raw`; empty without raw scans and in runs of earlier versions."""
    processes: int = 1
    """Number of processes: each brings its own frames and scenes to a step."""
    trained_on: TrainedOn | None = None
    """What the detector's file will say about its training. It decides nothing."""
    preset_steps: int = 0
    """Steps of the preset, of which `--steps` makes others; 0 in runs of earlier versions. It decides nothing."""
    further_stores: tuple[Path, ...] = ()
    """The stores after the first one, in their order; none in runs of one store and of earlier versions."""
    further_rigs: tuple[RigSpec, ...] = ()
    """Rig of the fleet of each of them."""
    further_digests: tuple[str, ...] = ()
    """SHA-256 of the scenes of each of them."""
    target_labels: DataSplit | None = None
    """A few labeled frames of the target, with an absolute folder; None without them and in runs of earlier versions."""
    target_fingerprint: str = ""
    """Fingerprint of their frames, labels and points; empty without them."""
    target_share: float = 0.0
    """Share of the labeled frames that are drawn from them; 0 without them."""


_PLACES = {  # a place, the content there, what it is in messages, and the option that names it
    "data.root": ("data_fingerprint", "the labeled split", "--data"),
    "init": ("init_digest", "the detector that the training started from", "--init"),
    "detector": ("detector_digest", "the source model", "--detector"),
    "store": ("store_digest", "the store", "--store"),
    "raw.root": ("raw_fingerprint", "the split of raw scans", "--raw"),
    "target_labels.root": ("target_fingerprint", "the split of labeled target frames", "--target-labels"),
}


def what_may_differ(out: Path, record: TrainingRecord | UpcyclingRecord, *, resume: bool) -> tuple[str, ...]:
    """Find the fields in which a resumed run may differ from its stored record: places whose content is the same.

    Args:
        out: The run folder; it may not exist.
        record: What the run is asked for now.
        resume: Whether a run is resumed.

    Returns:
        Dotted names for `RunFolder.create`.

    Raises:
        InvalidInput: The content at a place is not what the run began with.
    """
    if not resume or not (out / "config.json").is_file():
        return ("preset_steps",)
    stored = RunFolder.open(out).config_json()
    allowed = ["trained_on", "preset_steps"]
    if isinstance(record, UpcyclingRecord):
        _require_as_many_stores(out, record, stored)
    for place, (content, what, option) in _PLACES.items():
        if not hasattr(record, content):
            continue
        before, now = stored.get(content, ""), getattr(record, content)
        if not before:  # a run of an earlier version: only the place can be compared
            allowed.append(content)
            continue
        if same_split(before, now):  # digests of other things are compared as they are
            allowed += [place, content]  # an earlier version recorded half of the fingerprint; the record takes over the whole
        elif now and place != "store":
            raise InvalidInput(
                f"{what} is not what the run in {out} began with ({option}): its content has the fingerprint {short(now)}…, and then it was "
                f"{short(before)}…. Resume with the same data, wherever it lies now, or choose a new folder"
            )
        elif now:
            order = ", and keep the order of the stores" if stored.get("further_stores") else ""
            _require_grown(out, str(getattr(record, "store", "")), str(stored.get("store")), order)
            allowed.append(content)
    if isinstance(record, UpcyclingRecord):
        before_and_now = zip(stored.get("further_digests", ()), record.further_digests, strict=False)
        for number, (before, now) in enumerate(before_and_now):
            if before != now:
                place = str(record.further_stores[number])
                _require_grown(out, place, stored["further_stores"][number], ", and keep the order of the stores")
        allowed += ["further_stores", "further_digests"]
    return tuple(allowed)


def _require_grown(out: Path, now: str, before: str, order: str = "") -> None:
    """Refuse a store with other scenes, unless it lies at its place: an ingest may add scenes while a run is stopped."""
    if now != before:
        raise InvalidInput(
            f"the store {now} holds other scenes than the one that the run in {out} began with, {before} (--store); resume with a copy of "
            f"that store{order}, or choose a new folder"
        )


def _require_as_many_stores(out: Path, record: UpcyclingRecord, stored: Mapping[str, Any]) -> None:
    """Name the stores that a run began with where another number is given now."""
    before = [*filter(None, [stored.get("store")]), *stored.get("further_stores", [])]
    now = [*filter(None, [record.store]), *record.further_stores]
    if before and now and len(before) != len(now):
        raise InvalidInput(
            f"the run in {out} began with {len(before)} {'store' if len(before) == 1 else 'stores'} ({', '.join(before)}), and {len(now)} "
            f"{'is' if len(now) == 1 else 'are'} given (--store); resume with the same stores in the same order, or choose a new folder"
        )


def plan_loop(
    out: Path, name: str, loop: LoopConfig, *, seed: int, steps: int | None, resume: bool
) -> tuple[LoopConfig, tuple[str, ...]]:
    """Decide the steps and the schedule of a run: those of the caller, or of the run that is resumed.

    Args:
        out: The run folder; it may not exist.
        name: Field of the preset that holds the loop: `train` or `upcycle`.
        loop: The preset's loop.
        seed: Seed of the run.
        steps: Steps of the whole run; None takes the preset's number, or for a resumed run its own.
        resume: Whether a run is resumed.

    Returns:
        The loop, and the fields that differ from the stored record because the number of steps was changed.

    Raises:
        InvalidInput: The run has done `steps` steps already.
    """
    optim = loop.optim if steps is None else replace(loop.optim, total_steps=steps, cycles=())
    record = _stored_record(out) if resume else {}
    stored = _stored_optim(record, name)
    changed: tuple[str, ...] = ()
    if stored is not None:
        newest = latest_checkpoint(out / "checkpoints")
        done = 0 if newest is None else int(newest.name[5:])
        if steps is None or steps == stored.total_steps:
            first = stored.cycles[0][1] if stored.cycles else stored.total_steps
            if optim.total_steps in (first, stored.total_steps, record.get("preset_steps")):
                optim = replace(optim, total_steps=stored.total_steps, cycles=stored.cycles)
        else:
            plan = stored.continued(done, steps)
            optim = replace(optim, total_steps=plan.total_steps, cycles=plan.cycles)
            changed = tuple(f"preset.{name}.loop.optim.{field}" for field in ("total_steps", "cycles"))
    return replace(loop, seed=seed, optim=optim), changed


def _stored_record(out: Path) -> dict[str, Any]:
    return dict(RunFolder.open(out).config_json()) if (out / "config.json").is_file() else {}


def _stored_optim(record: dict[str, Any], name: str) -> OneCycle | None:
    found: Any = record
    for key in ("preset", name, "loop", "optim"):
        found = found.get(key) if isinstance(found, dict) else None
    return config_from_json(OneCycle, found) if isinstance(found, dict) else None
