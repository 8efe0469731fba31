"""The comparison's table: what a variant changes, that cells survive and are not run twice, and how they are summed up."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from upcycle3d.perception.experiments import (
    SCENARIOS,
    VARIANTS,
    Size,
    Variant,
    cell_path,
    preset_for,
    read_cells,
    run_cells,
    summarise,
)
from upcycle3d.perception.main_job import MethodResult, Scores
from upcycle3d.perception.presets import SMALL
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.structures import InvalidInput


def result(ap: float, seconds: float = 60.0) -> MethodResult:
    scores = Scores(ap_3d=ap, ap_bev=ap + 10, ap_3d_50=ap + 20, ap_bev_50=ap + 30)
    return MethodResult(student=scores, teacher=scores, seconds=seconds)


def write_cell(folder: Path, variant: str, seed: int, ap: float) -> None:
    folder.mkdir(exist_ok=True)
    cell_path(folder, variant, seed).write_text(json.dumps({"variant": variant, "seed": seed, **asdict(result(ap))}))


def test_every_method_is_a_variant_and_every_variant_a_method():
    assert set(METHODS) <= set(VARIANTS)
    assert all(v.method in METHODS for v in VARIANTS.values())


def test_the_size_shift_is_that_of_the_places():
    assert SCENARIOS["waymo_kitti"].size_shift() == pytest.approx((-0.91, -0.49, -0.26))
    assert SCENARIOS["waymo_lyft"].development
    assert not SCENARIOS["waymo_kitti"].development


def test_a_variant_changes_only_what_it_says():
    scenario = SCENARIOS["waymo_kitti"]
    assert preset_for(SMALL, Variant(method="upcycling"), scenario) == SMALL
    normalised = preset_for(SMALL, VARIANTS["sn"], scenario)
    assert normalised.train.augmentation.size_shift == scenario.size_shift()
    assert normalised.upcycle == SMALL.upcycle
    scaled = preset_for(SMALL, VARIANTS["ros"], scenario)
    assert scaled.train.augmentation == replace(SMALL.train.augmentation, object_scale=(0.75, 0.95))
    resized = preset_for(SMALL, VARIANTS["upcycling_sn"], scenario)
    assert resized.train == SMALL.train
    assert resized.upcycle == replace(SMALL.upcycle, f_gt=replace(SMALL.upcycle.f_gt, size_shift=scenario.size_shift()))


def test_finished_cells_are_not_run_again_and_unknown_variants_are_refused(tmp_path):
    write_cell(tmp_path / "cells", "source_only", 3, 10)
    options = {"size": Size(), "out": tmp_path / "out", "cells": tmp_path / "cells"}
    run_cells(SCENARIOS["waymo_lyft"], SMALL, ["source_only"], 3, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidInput, match="no variant"):
        run_cells(SCENARIOS["waymo_lyft"], SMALL, ["upcycle"], 3, **options)


def test_the_table_holds_mean_spread_and_closed_gap(tmp_path):
    for seed, (source, own, best) in enumerate([(10, 15, 30), (12, 21, 32)]):
        for variant, ap in (("source_only", source), ("upcycling", own), ("oracle_frozen", best)):
            write_cell(tmp_path, variant, seed, ap)
    rows = summarise(read_cells(tmp_path))
    assert list(rows) == ["source_only", "upcycling", "oracle_frozen"]
    assert rows["upcycling"].seeds == 2
    assert rows["upcycling"].mean["ap_3d"] == 18
    assert rows["upcycling"].spread["ap_bev"] == pytest.approx(4.2426, abs=1e-3)
    assert rows["upcycling"].closed["ap_3d_oracle_frozen"] == pytest.approx(100 * 7 / 20)
    assert rows["upcycling"].closed["ap_3d_oracle_full"] is None  # no such cell
    assert rows["upcycling"].minutes == 1.0


@pytest.mark.slow
def test_a_small_comparison_runs_from_data_to_table(tmp_path):
    def short(loop, steps):
        return replace(loop, optim=replace(loop.optim, total_steps=steps))

    preset = replace(
        SMALL,
        train=replace(SMALL.train, loop=short(SMALL.train.loop, 2)),
        upcycle=replace(SMALL.upcycle, loop=short(SMALL.upcycle.loop, 2)),
    )
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
    options = {"size": Size(labelled=4, fleet=4, validation=2), "out": tmp_path / "out", "cells": tmp_path / "cells"}
    run_cells(SCENARIOS["waymo_kitti"], preset, variants, 0, processes=1, say=lambda text: None, **options)
    assert set(read_cells(tmp_path / "cells")) == set(variants)
