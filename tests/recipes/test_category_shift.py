"""The category-shift experiment: its numbers survive the CSV file, and a small run goes from data to tables and is resumed."""

from dataclasses import replace

import pytest

from upcycle3d.perception.recipes.category_shift import CategoryShiftComparison, run_category_shift
from upcycle3d.perception.recipes.category_shift_report import (
    category_shift_results,
    category_shift_rows,
    category_shift_tables,
    measurements,
    read_category_shift_csv,
)
from upcycle3d.perception.recipes.job_folder import RunOptions
from upcycle3d.perception.recipes.presets import SMALL_THREE_CLASSES
from upcycle3d.perception.recipes.result_csv import publish

COMPARISON = CategoryShiftComparison()
FRAMES, STEPS = 30, 60


def a_report(h: float | None, ap: float) -> dict:
    return {
        "matched": {"known": 10, "unknown": 4, "accuracy": 0.8, "closed_accuracy": 0.9, "known_accuracy": {"Car": 0.9}, "os_star": h, "unk": h, "h": h, "auroc": h, "fpr95": h},
        "ranges": {"0-20 m": {"known": 3}},
        "private": {} if h is None else {"Truck": {"objects": 5, "proposed": 2, "proposals": 4, "unknown": 0.75}},
        "called_unknown": {"private": 3, "known": 1, "background": 2},
        "novel_category_accuracy": None,
        "known_ap": {"Car 3D 0.7": ap},
        "threshold": 0.4,
    }  # fmt: skip


def a_result(h: float | None, ap: float) -> dict:
    metrics = {"source, entropy > 0.55": a_report(h, ap - 9), "adapted": a_report(h, ap - 1)}
    return {"class_number": 12, "epochs": [{"pseudo": 1.0}], "detector_ap": {"Car 3D 0.7": ap}, "metrics": metrics}


def test_measurements_survive_the_csv_file(tmp_path):
    cache = COMPARISON.cache(tmp_path / "results")
    for scenario, h in (("open", 0.7), ("closed", None)):
        for seed in (0, 10, 2):
            cache.write(scenario, seed, a_result(h and h + 0.01 * seed, 50.0 + seed))
    publish(tmp_path, cache, category_shift_rows)
    assert read_category_shift_csv(tmp_path) == category_shift_results(cache)
    assert list(read_category_shift_csv(tmp_path)) == [
        ("closed", 0),
        ("closed", 2),
        ("closed", 10),
        ("open", 0),
        ("open", 2),
        ("open", 10),
    ]
    assert "matched/h" not in read_category_shift_csv(tmp_path)["closed", 0]["adapted"]


def test_tables_hold_what_there_is(tmp_path):
    cache = COMPARISON.cache(tmp_path)
    cache.write("open", 0, a_result(0.7, 50.0))
    cache.write("closed", 0, a_result(None, 60.0))
    open_set, known_ap, by_seed, private = category_shift_tables(category_shift_results(cache))
    rows = {row[:2]: dict(zip(open_set.header, row, strict=True)) for row in open_set.rows}
    assert rows["open", "adapted"]["H"] == "0.700"
    assert rows["open", "adapted"]["known AP"] == "-1.0"
    assert rows["open", "adapted"]["proposed"] == "0.400"
    assert rows["open", "adapted"]["private among unknown"] == "0.500"
    assert rows["closed", "adapted"]["H"] == "-"
    assert known_ap.rows[0] == ("closed", "Car 3D 0.7", "60.0", "59.0", "-1.0")
    assert by_seed.rows[-1] == ("open", "adapted", "0", "H: 0.700", "-1.0")
    assert private.rows == [("open", "Truck", "0.40 to 0.40", "0.75 to 0.75")]


def test_values_by_distance_and_epochs_are_left_out():
    assert not any(
        name.startswith(("ranges", "epochs")) for values in measurements(a_result(0.7, 1.0)).values() for name in values
    )


@pytest.mark.slow
def test_a_small_run_goes_from_data_to_tables_and_is_not_repeated(tmp_path):
    loop = SMALL_THREE_CLASSES.train.loop
    short = replace(SMALL_THREE_CLASSES.train, loop=replace(loop, optim=replace(loop.optim, total_steps=STEPS)))
    comparison = replace(COMPARISON, source_frames=FRAMES, target_frames=6, preset=replace(SMALL_THREE_CLASSES, train=short))
    folders = {"jobs": tmp_path / "jobs", "results": tmp_path / "results", "options": RunOptions(say=lambda text: None)}
    run_category_shift(comparison, ["open_partial", "closed"], 0, **folders)
    found = category_shift_results(comparison.cache(tmp_path / "results"))
    assert list(found) == [("closed", 0), ("open_partial", 0)]
    assert len(category_shift_tables(found)) == 4
    before = comparison.cache(tmp_path / "results").stored()
    run_category_shift(comparison, ["open_partial", "closed"], 0, **folders)
    assert comparison.cache(tmp_path / "results").stored() == before
