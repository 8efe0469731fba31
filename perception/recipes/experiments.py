"""UpCycling and what it is compared with, over seeds: scenarios, variants, and the cells of their table.

A *scenario* says where the labels are and where the fleet is. A *variant* is a method with the source model it starts from. A *cell* is
one variant with one seed; it leaves a result file of its own, so hours of work survive an interruption, and a variant can be added later.

    seed ─ data ─┬─ source model "plain" ─ smashed scenes ─ variants
                 ├─ source model "sn"    ─ …                 sizes of the labelled objects normalised to the target's mean
                 └─ source model "ros"   ─ …                 sizes of the labelled objects scaled at random
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...core.config_json import config_to_json, first_difference
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...datasets.data_split import DataSplit
from ...datasets.label_shares import DRAWS, labeled_split
from ...datasets.prepared import PreparedDataset
from ...datasets.simulation.places import Triple, domain
from ...datasets.simulation.stand_in import prepared_stand_in
from ..evaluation.headline import Protocol, own_protocol
from ..server.methods import METHODS
from .pipeline import Pipeline, PipelineConfig, RunOptions, Trial, TrialResult, closed_gap
from .presets import Preset

Place = Literal["waymo", "lyft", "kitti"]
Source = Literal["plain", "sn", "ros"]
RANDOM_SIZES = (0.75, 0.95)  # ST3D's random object scaling, for a source whose cars are the larger ones


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Labels at one place, a fleet at another; where both are one place, a share of its training frames has labels.

    size_shift: mean car of the target minus mean car of the source (length, width, height, m), what SN is told: ST3D's numbers for the
    real datasets, and those of the simulated ones. development: may be tuned on; the others are run once, after a freeze.
    """

    source: Place
    target: Place
    size_shift: Triple = (0.0, 0.0, 0.0)
    development: bool = False

    @property
    def partial(self) -> bool:
        """Partial labels, not two places."""
        return self.source == self.target


SCENARIOS = {
    "waymo_lyft": Scenario(source="waymo", target="lyft", size_shift=(-0.07, -0.2, -0.08), development=True),
    "waymo_kitti": Scenario(source="waymo", target="kitti", size_shift=(-0.91, -0.49, -0.26)),
    "kitti_partial": Scenario(source="kitti", target="kitti"),
    "waymo_partial": Scenario(source="waymo", target="waymo"),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Prepared frames of one seed: labelled, of the fleet, and to score on."""

    labeled: DataSplit
    fleet: DataSplit
    validation: DataSplit


@dataclass(frozen=True, kw_only=True)
class Size:
    """Numbers of labelled source frames, unlabelled target frames and scored target frames of a simulated scenario. With partial labels
    the first two together are the training frames, of which a share has labels."""

    labeled: int = 100
    fleet: int = 200
    validation: int = 100


def simulated_adaptation(
    folder: Path, source: Place, target: Place, *, size: Size, seed: int, classes: tuple[str, ...], workers: int = 2
) -> Data:
    """Simulate and prepare two places in ``folder``; the places and other seeds have no street in common."""
    labeled, streets = {"train": size.labeled}, (1000 + 2 * seed, 1001 + 2 * seed)
    unlabeled = {"train": size.fleet, "val": size.validation}
    roots = [
        prepared_stand_in(folder / role, domain(place), splits, seed=street, classes=classes, workers=workers)
        for role, place, splits, street in zip(("source", "target"), (source, target), (labeled, unlabeled), streets, strict=True)
    ]
    return adaptation_data(*roots)


def simulated_partial(
    folder: Path, place: Place, *, size: Size, share: float, seed: int, classes: tuple[str, ...], workers: int = 2
) -> Data:
    """Simulate and prepare one place in ``folder``, a share of whose training frames has labels."""
    splits = {"train": size.labeled + size.fleet, "val": size.validation}
    street = 1000 + 2 * seed
    root = prepared_stand_in(folder, domain(place), splits, seed=street, classes=classes, label_shares=(share,), workers=workers)
    return partial_data(root, share=share, seed=seed)


def adaptation_data(source: Path, target: Path) -> Data:
    """Prepared datasets: the source's ``train`` has labels, the target's ``train`` is the fleet, its ``val`` is scored."""
    return Data(
        labeled=DataSplit(root=source, name="train"),
        fleet=DataSplit(root=target, name="train"),
        validation=DataSplit(root=target, name="val"),
    )


def partial_data(root: Path, *, share: float, seed: int) -> Data:
    """A dataset prepared with ``--label-shares``: the draw is the seed modulo three."""
    name = labeled_split(share, DRAWS[seed % len(DRAWS)])
    return Data(
        labeled=DataSplit(root=root, name=name),
        fleet=DataSplit(root=root, name=f"{name}-rest"),
        validation=DataSplit(root=root, name="val"),
    )


def protocol_for(scenario: Scenario, validation: PreparedDataset) -> Protocol:
    """The target's own protocol; across datasets, ST3D's, which is KITTI's own on KITTI."""
    own = own_protocol(validation)
    return own if scenario.partial or own == "kitti" else "cross_dataset"


# ---- variants


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table. method: of ``upcycle --method``. source: which source model. resize: the labelled half of a batch, and the
    objects that F-GT pastes, have the target's mean size."""

    method: str
    source: Source = "plain"
    resize: bool = False


# Every method from the plain source model, and what is told the target's sizes.
VARIANTS: dict[str, Variant] = {name: Variant(method=name) for name in METHODS} | {
    "sn": Variant(method="source_only", source="sn"),
    "ros": Variant(method="source_only", source="ros"),
    "source_continued_sn": Variant(method="source_continued", resize=True),
    "iou_match_sn": Variant(method="iou_match", resize=True),
    "st3d_sn": Variant(method="st3d", source="sn"),
    "upcycling_sn": Variant(method="upcycling", resize=True),
    "upcycling_from_sn": Variant(method="upcycling", source="sn", resize=True),
}


def source_preset(preset: Preset, source: Source, scenario: Scenario) -> Preset:
    """The preset by which a source model is trained, and its trials' labelled half augmented."""
    augmentation = preset.train.augmentation
    if source == "sn":
        augmentation = replace(augmentation, size_shift=scenario.size_shift)
    if source == "ros":
        augmentation = replace(augmentation, object_scale=RANDOM_SIZES)
    return replace(preset, train=replace(preset.train, augmentation=augmentation))


def trial_for(preset: Preset, variant: Variant, scenario: Scenario) -> Trial:
    """The method with the preset's settings, resizing as the variant says."""
    upcycle = preset.upcycle
    if variant.resize:
        upcycle = replace(upcycle, f_gt=replace(upcycle.f_gt, size_shift=scenario.size_shift))
    return Trial(method=variant.method, upcycle=upcycle)


# ---- cells


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all cells of a folder share. share: of labels, with partial labels. size: of a simulated scenario, None for given data.
    protocol: None takes ``protocol_for``'s."""

    scenario: Scenario
    preset: Preset
    share: float = 0.05
    size: Size | None = None
    protocol: Protocol | None = None

    def claim(self, cells: Path) -> None:
        """Make ``cells`` this comparison's folder. Raises InvalidInput if it is another's."""
        path = cells / "comparison.json"
        wanted = config_to_json(self)
        if not path.exists():
            write_atomically(path, json.dumps(wanted, indent=1).encode())
            return
        difference = first_difference(json.loads(path.read_text()), wanted)
        if difference:
            raise InvalidInput(f"{cells} holds cells of another comparison ({difference}); choose another folder")


def run_cells(
    comparison: Comparison,
    data: Callable[[int], Data],
    variants: Sequence[str],
    seed: int,
    *,
    out: Path,
    cells: Path,
    checkpoints: Mapping[Source, Path] | None = None,
    record: Mapping[str, object] | None = None,
    options: RunOptions,
) -> None:
    """Run the missing cells of one seed; each result is written to ``cells/<variant>_seed<seed>.json`` as soon as it is known.

    data: the frames of a seed. checkpoints: source models to take instead of training them. record: written into each cell, beside
    the result. Raises InvalidInput for a variant that does not exist or makes no sense here, and for a folder of another comparison.
    """
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown:
        raise InvalidInput(f"no variant {unknown}; known are {', '.join(VARIANTS)}")
    scenario, preset = comparison.scenario, comparison.preset
    useless = [v for v in variants if scenario.partial and (VARIANTS[v].source != "plain" or VARIANTS[v].resize)]
    if useless:
        raise InvalidInput(f"{', '.join(useless)}: at one place there is no difference in size; leave them out")
    comparison.claim(cells)
    todo = [v for v in variants if not cell_path(cells, v, seed).exists()]
    if not todo:
        return
    frames = data(seed)
    for source in ("plain", "sn", "ros"):
        mine = {v: trial_for(preset, VARIANTS[v], scenario) for v in todo if VARIANTS[v].source == source}
        if not mine:
            continue
        config = PipelineConfig(
            labeled=frames.labeled,
            fleet=frames.fleet,
            validation=frames.validation,
            protocol=comparison.protocol or protocol_for(scenario, frames.validation.open()),
            preset=source_preset(preset, source, scenario),
            seed=seed,
            checkpoint=(checkpoints or {}).get(source),
        )
        job = Pipeline(config=config, folder=out / f"seed{seed}" / source, options=options)
        job.train_source()
        if any(METHODS[trial.method].unlabeled == "smashed" for trial in mine.values()):
            job.extract_fleet()
        for variant, result in job.results(mine):
            result.write(cell_path(cells, variant, seed), variant=variant, seed=seed, **(record or {}))


def cell_path(cells: Path, variant: str, seed: int) -> Path:
    """Where the result of one cell lies."""
    return cells / f"{variant}_seed{seed}.json"


def read_cells(cells: Path) -> dict[str, dict[int, TrialResult]]:
    """Every finished cell by variant and seed, variants in the order of ``VARIANTS``."""
    found: dict[str, dict[int, TrialResult]] = {}
    for path in sorted(cells.glob("*_seed*.json")):
        variant, _, seed = path.stem.rpartition("_seed")
        found.setdefault(variant, {})[int(seed)] = TrialResult.read(path)
    return {name: found[name] for name in VARIANTS if name in found}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant over its seeds: mean and standard deviation of each metric of the last step's student; the mean over seeds of the best
    value along the way, chosen by the target's labels; means by steps done; the gap it closes of each metric by oracle (None where there
    is none, or an oracle is missing); minutes of a cell."""

    seeds: int
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    best: Mapping[str, float]
    along: Mapping[int, Mapping[str, float]]
    closed: Mapping[str, Mapping[str, float | None]]
    minutes: float


ORACLES = ("oracle_frozen", "oracle_full")


def summarise(found: Mapping[str, Mapping[int, TrialResult]]) -> dict[str, Row]:
    """A row for every variant with a finished cell. Closed gaps are of means over the seeds that source, variant and oracle share."""
    metrics = list(dict.fromkeys(m for by_seed in found.values() for r in by_seed.values() for m in r.student))

    def of(variant: str, metric: str, seeds: Sequence[int]) -> list[float]:
        return [found[variant][s].student.get(metric, 0.0) for s in seeds]

    def gap(variant: str, oracle: str, metric: str) -> float | None:
        seeds = sorted(set.intersection(*(set(found.get(v, {})) for v in ("source_only", variant, oracle))))
        if not seeds:
            return None
        source, own, best = (of(v, metric, seeds) for v in ("source_only", variant, oracle))
        return closed_gap(*map(statistics.fmean, (source, own, best)), spread=max(_spread(source), _spread(best)))

    rows = {}
    for variant, by_seed in found.items():
        values = {m: of(variant, m, list(by_seed)) for m in metrics}
        best = {m: statistics.fmean(r.best().get(m, 0.0) for r in by_seed.values()) for m in metrics}
        steps = set.intersection(*({step for step, _ in r.history} for r in by_seed.values()))
        along = [dict(r.history) for r in by_seed.values()]
        rows[variant] = Row(
            seeds=len(by_seed),
            mean={m: statistics.fmean(v) for m, v in values.items()},
            spread={m: _spread(v) for m, v in values.items()},
            best=best,
            along={s: {m: statistics.fmean(h[s].get(m, 0.0) for h in along) for m in metrics} for s in sorted(steps)},
            closed={oracle: {m: gap(variant, oracle, m) for m in metrics} for oracle in ORACLES},
            minutes=statistics.fmean(r.seconds for r in by_seed.values()) / 60,
        )
    return rows


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
