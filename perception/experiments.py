"""UpCycling and what it is compared with, over seeds: scenarios, variants, and the cells of their table.

A *scenario* is a pair of places. A *variant* is a method with the source model it starts from. A *cell* is one variant with one seed; it
leaves a result file of its own, so hours of work survive an interruption, and a variant can be added later.

    seed ─ data ─┬─ source model "plain" ─ smashed scenes ─ variants
                 ├─ source model "sn"    ─ …                 sizes of the labelled objects normalised to the target's mean
                 └─ source model "ros"   ─ …                 sizes of the labelled objects scaled at random
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..datasets.simulation.places import Domain, Triple, domain
from .files import write_atomically
from .main_job import MainJob, MainJobConfig, MethodResult, Scores, closed_gap
from .presets import Preset
from .server.methods import METHODS
from .structures import InvalidInput

Source = Literal["plain", "sn", "ros"]
RANDOM_SIZES = (0.75, 0.95)  # ST3D's random object scaling, for a source whose cars are the larger ones
METRICS = ("ap_3d", "ap_bev", "ap_3d_50", "ap_bev_50")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Labels at one place, a fleet at another. ``development`` scenarios may be tuned on; the others are run once, after a freeze."""

    source: Domain
    target: Domain
    development: bool

    def size_shift(self) -> Triple:
        """Mean car of the target minus mean car of the source (length, width, height, m): what SN is told about the target."""
        ours, theirs = self.target.place.sizes[0].mean, self.source.place.sizes[0].mean
        return (ours[0] - theirs[0], ours[1] - theirs[1], ours[2] - theirs[2])


SCENARIOS = {
    "waymo_lyft": Scenario(source=domain("waymo"), target=domain("lyft"), development=True),
    "waymo_kitti": Scenario(source=domain("waymo"), target=domain("kitti"), development=False),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table. method: of ``upcycle --method``. source: which source model. resize: F-GT's objects and the labelled half have
    the target's mean size."""

    method: str
    source: Source = "plain"
    resize: bool = False


# Every method from the plain source model, and what changes the sizes.
VARIANTS: dict[str, Variant] = {name: Variant(method=name) for name in METHODS} | {
    "sn": Variant(method="source_only", source="sn"),
    "ros": Variant(method="source_only", source="ros"),
    "st3d_sn": Variant(method="st3d", source="sn"),
    "upcycling_sn": Variant(method="upcycling", resize=True),
    "upcycling_from_sn": Variant(method="upcycling", source="sn", resize=True),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Numbers of labelled source frames, unlabelled target frames and scored target frames."""

    labelled: int = 100
    fleet: int = 200
    validation: int = 100


def preset_for(preset: Preset, variant: Variant, scenario: Scenario) -> Preset:
    """The preset as this variant trains."""
    augmentation, f_gt = preset.train.augmentation, preset.upcycle.f_gt
    if variant.source == "sn":
        augmentation = replace(augmentation, size_shift=scenario.size_shift())
    if variant.source == "ros":
        augmentation = replace(augmentation, object_scale=RANDOM_SIZES)
    if variant.resize:
        f_gt = replace(f_gt, size_shift=scenario.size_shift())
    return replace(
        preset,
        train=replace(preset.train, augmentation=augmentation),
        upcycle=replace(preset.upcycle, f_gt=f_gt),
    )


def run_cells(
    scenario: Scenario,
    preset: Preset,
    variants: Sequence[str],
    seed: int,
    *,
    size: Size,
    out: Path,
    cells: Path,
    processes: int = 2,
    say: Callable[[str], None] = print,
) -> None:
    """Run the missing cells of one seed; each result is written to ``cells/<variant>_seed<seed>.json`` as soon as it is known."""
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown:
        raise InvalidInput(f"no variant {unknown}; known are {', '.join(VARIANTS)}")
    todo = [v for v in variants if not cell_path(cells, v, seed).exists()]
    if not todo:
        return

    def job(name: str, like: Variant) -> MainJob:
        config = MainJobConfig(
            source=scenario.source,
            target=scenario.target,
            labelled=size.labelled,
            fleet=size.fleet,
            validation=size.validation,
            seed=seed,
            preset=preset_for(preset, like, scenario),
        )
        return MainJob(config=config, folder=out / f"seed{seed}" / name, say=lambda text: say(f"seed {seed}, {name}: {text}"))

    plain = job("plain", Variant(method="source_only"))
    plain.data()
    for source in ("plain", "sn", "ros"):
        mine = [v for v in todo if VARIANTS[v].source == source]
        if not mine:
            continue
        start = plain if source == "plain" else job(source, Variant(method="source_only", source=source))
        if start is not plain:
            start.share(plain.folder, model=False)
        start.train_source()
        start.extract_fleet()
        for resize in (False, True):
            group = {v: VARIANTS[v].method for v in mine if VARIANTS[v].resize == resize}
            if not group:
                continue
            runner = start
            if resize:
                runner = job(f"{source}_resized", Variant(method="upcycling", source=source, resize=True))
                runner.share(start.folder)
            found = runner.run_methods(list(group.values()), processes=processes)
            for variant, method in group.items():
                record = {"variant": variant, "seed": seed, **asdict(found[method])}
                write_atomically(cell_path(cells, variant, seed), json.dumps(record, indent=1).encode())


def cell_path(cells: Path, variant: str, seed: int) -> Path:
    """Where the result of one cell lies."""
    return cells / f"{variant}_seed{seed}.json"


def read_cells(cells: Path) -> dict[str, dict[int, MethodResult]]:
    """Every finished cell by variant and seed, variants in the order of ``VARIANTS``."""
    found: dict[str, dict[int, MethodResult]] = {}
    for path in sorted(cells.glob("*_seed*.json")):
        record = json.loads(path.read_text())
        result = MethodResult(student=Scores(**record["student"]), teacher=Scores(**record["teacher"]), seconds=record["seconds"])
        found.setdefault(record["variant"], {})[int(record["seed"])] = result
    return {name: found[name] for name in VARIANTS if name in found}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant over its seeds: mean and standard deviation of each metric of the last step's student, the gap it closes (None where there is
    none, or an oracle is missing), and minutes of a cell."""

    seeds: int
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    closed: Mapping[str, float | None]
    minutes: float


def summarise(found: Mapping[str, Mapping[int, MethodResult]]) -> dict[str, Row]:
    """A row for every variant with a finished cell. Closed gaps are of the means, in 3D and BEV at IoU 0.7, against both oracles."""

    def of(variant: str, metric: str) -> list[float]:
        return [float(getattr(r.student, metric)) for r in found.get(variant, {}).values()]

    def spread(values: Sequence[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def gaps(variant: str) -> Iterable[tuple[str, float | None]]:
        for oracle in ("oracle_frozen", "oracle_full"):
            for metric in METRICS[:2]:
                source, own, best = (of(v, metric) for v in ("source_only", variant, oracle))
                known = bool(source and own and best)
                yield (
                    f"{metric}_{oracle}",
                    (
                        closed_gap(*map(statistics.fmean, (source, own, best)), spread=max(spread(source), spread(best)))
                        if known
                        else None
                    ),
                )

    return {
        variant: Row(
            seeds=len(by_seed),
            mean={m: statistics.fmean(of(variant, m)) for m in METRICS},
            spread={m: spread(of(variant, m)) for m in METRICS},
            closed=dict(gaps(variant)),
            minutes=statistics.fmean(r.seconds for r in by_seed.values()) / 60,
        )
        for variant, by_seed in found.items()
    }
