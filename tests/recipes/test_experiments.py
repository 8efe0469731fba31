"""The comparison's table: what a variant changes, that cells survive and are not run twice, and how they are summed up."""

from dataclasses import replace
from pathlib import Path

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.perception.recipes.experiments import (
    SCENARIOS,
    VARIANTS,
    Comparison,
    Size,
    Variant,
    cell_path,
    read_cells,
    run_cells,
    simulated_adaptation,
    simulated_partial,
    source_preset,
    summarise,
    trial_for,
)
from upcycle3d.perception.recipes.pipeline import RunOptions, TrialResult
from upcycle3d.perception.recipes.presets import SMALL, Preset
from upcycle3d.perception.server.methods import METHODS

QUIET = RunOptions(say=lambda text: None, processes=1, scores_along=2)


def write_cell(folder: Path, variant: str, seed: int, ap: float) -> None:
    folder.mkdir(exist_ok=True)
    scores, best = {"Car 3D 0.7": ap, "Car BEV 0.7": ap + 10}, {"Car 3D 0.7": ap + 1, "Car BEV 0.7": ap}
    result = TrialResult(student=scores, teacher=scores, history=((1, best), (2, scores)), seconds=60.0)
    result.write(cell_path(folder, variant, seed), variant=variant, seed=seed)


def test_every_method_is_a_variant_and_every_variant_a_method():
    assert set(METHODS) <= set(VARIANTS)
    assert all(v.method in METHODS for v in VARIANTS.values())


@pytest.mark.parametrize("name", ["waymo_lyft", "waymo_kitti"])
def test_the_size_shift_is_that_of_the_simulated_places_too(name):
    scenario = SCENARIOS[name]
    source, target = (domain(place).place.sizes[0].mean for place in (scenario.source, scenario.target))
    assert [t - s for s, t in zip(source, target, strict=True)] == pytest.approx(scenario.size_shift)


def test_only_the_development_scenario_may_be_tuned_on():
    assert [name for name, s in SCENARIOS.items() if s.development] == ["waymo_lyft"]


def test_a_variant_changes_only_what_it_says():
    scenario = SCENARIOS["waymo_kitti"]
    assert source_preset(SMALL, "plain", scenario) == SMALL
    assert trial_for(SMALL, Variant(method="upcycling"), scenario).upcycle == SMALL.upcycle
    normalized = source_preset(SMALL, "sn", scenario)
    assert normalized.train.augmentation.size_shift == scenario.size_shift
    assert normalized.upcycle == SMALL.upcycle
    scaled = source_preset(SMALL, "ros", scenario)
    assert scaled.train.augmentation == replace(SMALL.train.augmentation, object_scale=(0.75, 0.95))
    resized = trial_for(SMALL, VARIANTS["upcycling_sn"], scenario)
    assert resized.upcycle == replace(SMALL.upcycle, f_gt=replace(SMALL.upcycle.f_gt, size_shift=scenario.size_shift))


def no_data(seed: int):
    raise AssertionError("nothing is left to run")


def test_finished_cells_are_not_run_again_and_senseless_ones_are_refused(tmp_path):
    write_cell(tmp_path / "cells", "source_only", 3, 10)
    comparison, where = (
        Comparison(scenario=SCENARIOS["waymo_lyft"], preset=SMALL),
        {"out": tmp_path / "out", "cells": tmp_path / "cells", "options": QUIET},
    )
    run_cells(comparison, no_data, ["source_only"], 3, **where)
    with pytest.raises(InvalidInput, match="no variant"):
        run_cells(comparison, no_data, ["upcycle"], 3, **where)
    with pytest.raises(InvalidInput, match="no difference in size"):
        run_cells(replace(comparison, scenario=SCENARIOS["kitti_partial"]), no_data, ["upcycling_sn"], 3, **where)
    other = replace(comparison, preset=replace(SMALL, upcycle=replace(SMALL.upcycle, unlabeled_batch=5)))
    with pytest.raises(InvalidInput, match="unlabeled_batch: stored 2, now 5"):
        run_cells(other, no_data, ["source_only"], 3, **where)


def test_the_table_holds_mean_spread_best_step_and_closed_gap(tmp_path):
    for seed, (source, own, best) in enumerate([(10, 15, 30), (12, 21, 32)]):
        for variant, ap in (("source_only", source), ("upcycling", own), ("oracle_frozen", best)):
            write_cell(tmp_path, variant, seed, ap)
    write_cell(tmp_path, "source_only", 7, 90)  # a seed that the others lack takes no part in the gap
    rows = summarise(read_cells(tmp_path))
    assert list(rows) == ["source_only", "upcycling", "oracle_frozen"]
    assert rows["upcycling"].seeds == 2
    assert rows["upcycling"].mean["Car 3D 0.7"] == 18
    assert rows["upcycling"].spread["Car BEV 0.7"] == pytest.approx(4.2426, abs=1e-3)
    assert rows["upcycling"].best == {"Car 3D 0.7": 19, "Car BEV 0.7": 28}
    assert rows["upcycling"].closed["oracle_frozen"]["Car 3D 0.7"] == pytest.approx(100 * 7 / 20)
    assert rows["upcycling"].closed["oracle_full"]["Car 3D 0.7"] is None  # no such cell
    assert rows["upcycling"].minutes == 1.0


def short(preset: Preset, steps: int = 2) -> Preset:
    def shortened(loop):
        return replace(loop, optim=replace(loop.optim, total_steps=steps))

    return replace(
        preset,
        train=replace(preset.train, loop=shortened(preset.train.loop)),
        upcycle=replace(preset.upcycle, loop=shortened(preset.upcycle.loop)),
    )


SIZE = Size(labeled=4, fleet=4, validation=2)


@pytest.mark.slow
def test_a_small_comparison_runs_from_data_to_table(tmp_path):
    variants = [
        "source_only",
        "sn",
        "ros",
        "upcycling",
        "upcycling_sn",
        "upcycling_from_sn",
        "iou_match",
        "st3d",
        "oracle_frozen",
    ]

    def data(seed: int):
        return simulated_adaptation(tmp_path / "data", "waymo", "kitti", size=SIZE, seed=seed, classes=("Car",), workers=1)

    comparison, cells = Comparison(scenario=SCENARIOS["waymo_kitti"], preset=short(SMALL), size=SIZE), tmp_path / "cells"
    run_cells(comparison, data, variants, 0, out=tmp_path / "out", cells=cells, options=QUIET)
    found = read_cells(cells)
    assert set(found) == set(variants)
    assert [step for step, _ in found["upcycling"][0].history] == [1, 2]
    assert [step for step, _ in found["st3d"][0].history] == [1, 2]


@pytest.mark.slow
def test_partial_labels_run_with_the_draw_of_the_seed(tmp_path):
    def data(seed: int):
        found = simulated_partial(tmp_path / "data", "kitti", size=SIZE, share=0.5, seed=seed, classes=("Car",), workers=1)
        assert found.labeled.name == "train-0.5-1"
        assert not set(found.labeled.open().ids) & set(found.fleet.open().ids)
        return found

    comparison = Comparison(scenario=SCENARIOS["kitti_partial"], preset=short(SMALL), share=0.5, size=SIZE)
    run_cells(comparison, data, ["upcycling"], 4, out=tmp_path / "out", cells=tmp_path / "cells", options=QUIET)
    assert set(read_cells(tmp_path / "cells")) == {"upcycling"}
