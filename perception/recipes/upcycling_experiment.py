"""UpCycling and everything it is compared with, over seeds.

A *scenario* says where the labels are and where the fleet drives. A *compared method* is a method of `upcycle --method` with the
source model it starts from. A *result* is the scores of one compared method with one seed; each is stored as soon as it is known.

    seed ─ data ─┬─ source model "plain" ─ smashed scenes ─ methods
                 ├─ source model "sn"    ─ …                sizes of the labeled objects normalized to the target's mean
                 ├─ source model "ros"   ─ …                sizes of the labeled objects scaled at random, smaller
                 └─ source model "random_sizes" ─ …         sizes of the labeled objects scaled at random, either way

Read next: `pipeline.py`, which runs one seed, and `upcycling_report.py`, which makes tables of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from ...core.config_json import config_to_json
from ...core.errors import InvalidInput
from ...datasets.prepared import PreparedDataset
from ...datasets.simulation.places import Sizes3
from ..evaluation.score import Protocol, own_protocol
from ..server.methods import METHODS
from .experiment_data import DatasetName, ExperimentData, SimulationSize
from .job_folder import PipelineConfig, RunOptions
from .method_run import MethodResult, MethodRun
from .pipeline import Pipeline
from .presets import Preset
from .result_cache import ResultCache

SourceModel = Literal["plain", "sn", "ros", "random_sizes"]
RANDOM_SIZES = (0.75, 0.95)
"""Factors of random object scaling, from ST3D, for a source domain whose cars are the larger ones."""
ANY_SIZES, ANY_SIDES = (0.8, 1.25), (0.88, 1.12)
"""Factors of a source model that is told nothing of the target's sizes, not even which are larger."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Where the labels are and where the fleet drives."""

    source: DatasetName
    """Source domain, with labels."""
    target: DatasetName
    """Target domain, where the fleet drives. If it is the source domain, a share of the training frames has labels."""
    size_shift: Sizes3 = (0.0, 0.0, 0.0)
    """Mean car of the target minus mean car of the source: length, width, height in meters. The methods with size normalization are
    given it. ST3D's numbers for the real datasets; the simulated domains differ by the same."""
    development: bool = False
    """Settings may be chosen on this scenario. The others are run once, with frozen settings."""

    @property
    def partial(self) -> bool:
        """Whether source and target are one domain, and labels are partial."""
        return self.source == self.target


SCENARIOS = {
    "waymo_lyft": Scenario(source="waymo", target="lyft", size_shift=(-0.07, -0.2, -0.08), development=True),
    "waymo_compact": Scenario(source="waymo", target="compact", size_shift=(-0.65, -0.35, -0.29), development=True),
    "waymo_large": Scenario(source="waymo", target="large", size_shift=(0.55, 0.10, 0.16), development=True),
    "waymo_kitti": Scenario(source="waymo", target="kitti", size_shift=(-0.91, -0.49, -0.26)),
    "kitti_partial": Scenario(source="kitti", target="kitti"),
    "waymo_partial": Scenario(source="waymo", target="waymo"),
}


def protocol_for(scenario: Scenario, validation: PreparedDataset) -> Protocol:
    """The protocol that a scenario is scored by.

    Args:
        scenario: The scenario.
        validation: The frames to score on.

    Returns:
        The target's own protocol. Across datasets it is ST3D's, which is KITTI's own on KITTI.
    """
    own = own_protocol(validation)
    return own if scenario.partial or own == "kitti" else "cross_dataset"


# ---- methods


@dataclass(frozen=True, kw_only=True)
class ComparedMethod:
    """A method of `METHODS` with the source model it starts from: one row of the table."""

    method: str
    """A name of `METHODS`."""
    source_model: SourceModel = "plain"
    """How the source model is trained: `plain`; `sn` with size normalization; `ros` with ST3D's random object scaling, which knows that the
    target's objects are smaller; `random_sizes` with objects of any size."""
    resize: bool = False
    """Give the labeled half of a batch, and the objects that F-GT pastes, the target's mean size."""
    paste_any_size: bool = False
    """Resize labeled and pasted objects at random, as the source model `random_sizes` saw them."""


# Every method from the plain source model, and the ones that are given the target's object sizes.
COMPARED_METHODS: dict[str, ComparedMethod] = {name: ComparedMethod(method=name) for name in METHODS} | {
    "sn": ComparedMethod(method="source_only", source_model="sn"),
    "ros": ComparedMethod(method="source_only", source_model="ros"),
    "random_sizes": ComparedMethod(method="source_only", source_model="random_sizes"),
    "upcycling_random_sizes": ComparedMethod(method="upcycling", source_model="random_sizes"),
    "calibrated_random_sizes": ComparedMethod(method="upcycling_calibrated", source_model="random_sizes"),
    "told_random_sizes": ComparedMethod(method="upcycling", source_model="random_sizes", resize=True),
    "random_f_gt": ComparedMethod(method="upcycling", source_model="random_sizes", paste_any_size=True),
    "calibrated_random_f_gt": ComparedMethod(method="upcycling_calibrated", source_model="random_sizes", paste_any_size=True),
    "source_continued_sn": ComparedMethod(method="source_continued", resize=True),
    "iou_match_sn": ComparedMethod(method="iou_match", resize=True),
    "st3d_sn": ComparedMethod(method="st3d", source_model="sn"),
    "upcycling_sn": ComparedMethod(method="upcycling", resize=True),
    "upcycling_from_sn": ComparedMethod(method="upcycling", source_model="sn", resize=True),
}


def source_preset(preset: Preset, source_model: SourceModel, scenario: Scenario) -> Preset:
    """The preset by which a source model is trained. It also augments the labeled half of the methods that start from it.

    Args:
        preset: The preset of the experiment.
        source_model: Which source model.
        scenario: Says how the sizes of the two domains' cars differ.

    Returns:
        The preset with the source model's treatment of object sizes.
    """
    augmentation = preset.train.augmentation
    if source_model == "sn":
        augmentation = replace(augmentation, size_shift=scenario.size_shift)
    if source_model == "ros":
        augmentation = replace(augmentation, object_scale=RANDOM_SIZES)
    if source_model == "random_sizes":
        augmentation = replace(augmentation, object_scale=ANY_SIZES, side_scale=ANY_SIDES)
    return replace(preset, train=replace(preset.train, augmentation=augmentation))


def method_run(preset: Preset, compared: ComparedMethod, scenario: Scenario) -> MethodRun:
    """A compared method with the preset's settings.

    Args:
        preset: Its `upcycle` settings are taken.
        compared: The method, and how objects are resized.
        scenario: Says how the sizes of the two domains' cars differ.

    Returns:
        What the pipeline runs.
    """
    upcycle = preset.upcycle
    if compared.resize:
        upcycle = replace(upcycle, f_gt=replace(upcycle.f_gt, size_shift=scenario.size_shift))
    if compared.paste_any_size:
        upcycle = replace(upcycle, f_gt=replace(upcycle.f_gt, object_scale=ANY_SIZES, side_scale=ANY_SIDES))
    return MethodRun(method=compared.method, upcycle=upcycle)


# ---- the comparison


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all results of one comparison share. It is stored beside them as `comparison.json`."""

    scenario: Scenario
    """Where the labels are and where the fleet drives."""
    preset: Preset
    """Detector, training and settings of the methods."""
    share: float = 0.05
    """Share of the training frames that have labels, in a partial scenario."""
    size: SimulationSize | None = None
    """Numbers of frames of a simulated scenario. None for prepared datasets."""
    protocol: Protocol | None = None
    """How results are scored. None takes `protocol_for`."""

    def cache(self, folder: Path) -> ResultCache:
        """Open the folder with this comparison's results.

        Args:
            folder: Folder of the results.

        Returns:
            The results by compared method and seed.

        Raises:
            InvalidInput: The folder holds results of another comparison.
        """
        return ResultCache(folder, config_to_json(self))


def run_comparison(
    comparison: Comparison,
    data: Callable[[int], ExperimentData],
    methods: Sequence[str],
    seed: int,
    *,
    jobs: Path,
    results: Path,
    source_models: Mapping[SourceModel, Path] | None = None,
    options: RunOptions,
) -> None:
    """Run the missing results of one seed. Each is stored as soon as it is known.

    Args:
        comparison: What all results share.
        data: Called with the seed if something is missing; makes its frames.
        methods: Names of `COMPARED_METHODS`.
        seed: Seed of the frames and of every training.
        jobs: Folder for the pipelines, one for each seed and source model.
        results: Folder of the results.
        source_models: Run folders of trained source models to take instead of training them.
        options: How the pipelines run.

    Raises:
        InvalidInput: A method does not exist, or makes no sense in this scenario; or `results` belongs to another comparison.
    """
    scenario, preset = comparison.scenario, comparison.preset
    _check_methods(methods, scenario)
    cache = comparison.cache(results)
    missing = [name for name in methods if not cache.has(name, seed)]
    if not missing:
        return
    frames = data(seed)
    for source_model in get_args(SourceModel):
        runs = {
            name: method_run(preset, COMPARED_METHODS[name], scenario)
            for name in missing
            if COMPARED_METHODS[name].source_model == source_model
        }
        if not runs:
            continue
        config = PipelineConfig(
            labeled=frames.labeled,
            fleet=frames.fleet,
            validation=frames.validation,
            protocol=comparison.protocol or protocol_for(scenario, frames.validation.open()),
            preset=source_preset(preset, source_model, scenario),
            seed=seed,
            source_model=(source_models or {}).get(source_model),
        )
        pipeline = Pipeline(config, jobs / f"seed{seed}" / source_model, options)
        pipeline.train_source_model()
        if any(METHODS[run.method].unlabeled == "smashed" for run in runs.values()):
            pipeline.extract_fleet()
        for name, result in pipeline.results(runs):
            cache.write(name, seed, result.to_json())


def _check_methods(methods: Sequence[str], scenario: Scenario) -> None:
    unknown = [name for name in methods if name not in COMPARED_METHODS]
    if unknown:
        raise InvalidInput(f"there is no method {', '.join(unknown)}; choose among {', '.join(COMPARED_METHODS)}")
    compared = {name: COMPARED_METHODS[name] for name in methods}
    useless = [name for name, c in compared.items() if scenario.partial and (c.source_model != "plain" or c.resize)]
    if useless:
        raise InvalidInput(f"{', '.join(useless)}: within one domain object sizes do not differ; leave these methods out")


def upcycling_results(cache: ResultCache) -> dict[str, dict[int, MethodResult]]:
    """Read every finished result.

    Args:
        cache: Results of a comparison.

    Returns:
        Results by method and seed; methods in the order of `COMPARED_METHODS`.
    """
    found: dict[str, dict[int, MethodResult]] = {}
    for (name, seed), stored in cache.stored().items():
        found.setdefault(name, {})[seed] = MethodResult.from_json(stored["result"])
    return {name: found[name] for name in COMPARED_METHODS if name in found}
