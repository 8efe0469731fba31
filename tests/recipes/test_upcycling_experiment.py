"""The upcycling experiment: what a compared method changes, that results survive and are not computed twice, and their summary."""

from dataclasses import replace
from pathlib import Path

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.perception.recipes.experiment_data import SimulationSize, simulated_adaptation, simulated_partial
from upcycle3d.perception.recipes.job_folder import RunOptions
from upcycle3d.perception.recipes.method_run import MethodResult
from upcycle3d.perception.recipes.presets import SMALL, Preset
from upcycle3d.perception.recipes.result_csv import publish, write_rows
from upcycle3d.perception.recipes.result_summary import closed_gap, differences, summarize
from upcycle3d.perception.recipes.upcycling_experiment import (
    COMPARED_METHODS,
    SCENARIOS,
    ComparedMethod,
    Comparison,
    method_run,
    run_comparison,
    source_preset,
    upcycling_results,
)
from upcycle3d.perception.recipes.upcycling_report import (
    difference_table,
    read_upcycling_csv,
    report_sections,
    upcycling_rows,
    upcycling_tables,
)
from upcycle3d.perception.server.methods import METHODS

QUIET = RunOptions(say=lambda text: None, processes=1, scores_along=2)
COMPARISON = Comparison(scenario=SCENARIOS["waymo_lyft"], preset=SMALL)


def a_result(ap: float) -> MethodResult:
    scores, best = {"Car 3D 0.7": ap, "Car BEV 0.7": ap + 10}, {"Car 3D 0.7": ap + 1, "Car BEV 0.7": ap}
    return MethodResult(student=scores, teacher=scores, history=((1, best), (2, scores)), seconds=60.0)


def test_every_method_is_compared_and_nothing_else():
    assert set(METHODS) <= set(COMPARED_METHODS)
    assert all(compared.method in METHODS for compared in COMPARED_METHODS.values())


@pytest.mark.parametrize("name", ["waymo_lyft", "waymo_compact", "waymo_large", "waymo_kitti"])
def test_the_size_shift_is_also_that_of_the_simulated_domains(name):
    scenario = SCENARIOS[name]
    source, target = (domain(place).place.sizes[0].mean for place in (scenario.source, scenario.target))
    assert [t - s for s, t in zip(source, target, strict=True)] == pytest.approx(scenario.size_shift)


def test_settings_may_be_chosen_on_the_development_scenarios_only():
    assert [name for name, s in SCENARIOS.items() if s.development] == ["waymo_lyft", "waymo_compact", "waymo_large"]


def test_a_compared_method_changes_only_what_it_says():
    scenario = SCENARIOS["waymo_kitti"]
    assert source_preset(SMALL, "plain", scenario) == SMALL
    assert method_run(SMALL, ComparedMethod(method="upcycling"), scenario).upcycle == SMALL.upcycle
    normalized = source_preset(SMALL, "sn", scenario)
    assert normalized.train.augmentation.size_shift == scenario.size_shift
    assert normalized.upcycle == SMALL.upcycle
    scaled = source_preset(SMALL, "ros", scenario)
    assert scaled.train.augmentation == replace(SMALL.train.augmentation, object_scale=(0.75, 0.95))
    untold = source_preset(SMALL, "random_sizes", scenario)
    assert untold.train.augmentation == replace(SMALL.train.augmentation, object_scale=(0.8, 1.25), side_scale=(0.88, 1.12))
    resized = method_run(SMALL, COMPARED_METHODS["upcycling_sn"], scenario)
    assert resized.upcycle == replace(SMALL.upcycle, f_gt=replace(SMALL.upcycle.f_gt, size_shift=scenario.size_shift))


def no_data(seed: int):
    raise AssertionError("nothing is left to run")


def test_finished_results_are_not_computed_again_and_useless_methods_are_refused(tmp_path):
    folders = {"jobs": tmp_path / "jobs", "results": tmp_path / "results", "options": QUIET}
    COMPARISON.cache(folders["results"]).write("source_only", 3, a_result(10).to_json())
    run_comparison(COMPARISON, no_data, ["source_only"], 3, **folders)
    with pytest.raises(InvalidInput, match="there is no method upcycle;"):
        run_comparison(COMPARISON, no_data, ["upcycle"], 3, **folders)
    partial = replace(COMPARISON, scenario=SCENARIOS["kitti_partial"])
    with pytest.raises(InvalidInput, match="object sizes do not differ"):
        run_comparison(partial, no_data, ["upcycling_sn"], 3, **folders)
    other = replace(COMPARISON, preset=replace(SMALL, upcycle=replace(SMALL.upcycle, unlabeled_batch=5)))
    with pytest.raises(InvalidInput, match="unlabeled_batch: stored 2, now 5"):
        run_comparison(other, no_data, ["source_only"], 3, **folders)


def three_methods() -> dict[str, dict[int, MethodResult]]:
    found: dict[str, dict[int, MethodResult]] = {"source_only": {}, "upcycling": {}, "oracle_frozen": {}}
    for seed, aps in enumerate([(10.0, 15.0, 30.0), (12.0, 21.0, 32.0)]):
        for name, ap in zip(found, aps, strict=True):
            found[name][seed] = a_result(ap)
    found["source_only"][7] = a_result(90.0)  # a seed that the others lack takes no part in the gap
    return found


def test_the_summary_holds_mean_spread_best_step_and_closed_gap():
    rows = summarize(three_methods())
    assert rows["upcycling"].seeds == 2
    assert rows["upcycling"].mean["Car 3D 0.7"] == 18
    assert rows["upcycling"].spread["Car BEV 0.7"] == pytest.approx(4.2426, abs=1e-3)
    assert rows["upcycling"].best == {"Car 3D 0.7": 19, "Car BEV 0.7": 28}
    assert rows["upcycling"].along == {1: {"Car 3D 0.7": 19, "Car BEV 0.7": 18}, 2: {"Car 3D 0.7": 18, "Car BEV 0.7": 28}}
    assert rows["upcycling"].closed["oracle_frozen"]["Car 3D 0.7"] == pytest.approx(100 * 7 / 20)
    assert rows["upcycling"].closed["oracle_full"]["Car 3D 0.7"] is None  # there is no result of this oracle
    assert rows["upcycling"].minutes == 1.0


def test_differences_are_by_seed_that_both_methods_have():
    assert differences(three_methods(), "upcycling", ["source_only"])["source_only"]["Car 3D 0.7"] == [5.0, 9.0]
    table = difference_table(three_methods(), "upcycling", ["source_only"])
    assert table.rows == [("source_only", "+5.0 +9.0, mean +7.0", "+5.0 +9.0, mean +7.0")]


def test_the_closed_gap_is_null_where_there_is_no_gap():
    assert closed_gap(10, 15, 30) == 25
    assert closed_gap(10, 15, 11.9) is None
    assert closed_gap(10, 15, 30, noise=25) is None


def test_published_results_are_read_back_with_all_digits_and_name_no_folder(tmp_path):
    cache, found = COMPARISON.cache(tmp_path / "results"), three_methods()
    found["upcycling"][0] = a_result(0.1 + 0.2)
    for name, by_seed in found.items():
        for seed, result in by_seed.items():
            cache.write(name, seed, result.to_json())
    publish(tmp_path / "out", cache, upcycling_rows)
    assert read_upcycling_csv(tmp_path / "out") == upcycling_results(cache) == found
    assert list(read_upcycling_csv(tmp_path / "out")) == ["source_only", "upcycling", "oracle_frozen"]
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path) not in path.read_text()


def test_a_result_that_stands_twice_or_was_edited_is_refused_by_its_row(tmp_path):
    rows = [row for seed in (0, 1) for row in upcycling_rows("upcycling", seed, a_result(30.0).to_json())]
    write_rows(tmp_path / "twice.csv", [*rows, rows[0]])
    with pytest.raises(InvalidInput, match=r"row 3 .*twice.csv is a second result of the method upcycling with seed 0"):
        read_upcycling_csv(tmp_path / "twice.csv")
    without_student = {name: value for name, value in rows[1].items() if not name.startswith("student/")}
    for number, edited in enumerate([without_student, {**rows[1], "seed": "one"}, {**rows[1], "student/Car 3D 0.7": "high"}]):
        path = tmp_path / f"{number}.csv"
        write_rows(path, [rows[0], edited])
        with pytest.raises(InvalidInput, match=rf"row 2 .*{number}.csv cannot be read"):
            read_upcycling_csv(path)
    write_rows(tmp_path / "other.csv", [{**rows[0], "method": "upcyclin"}])
    with pytest.raises(InvalidInput, match=r"row 1 .*other.csv is of the method 'upcyclin'"):
        read_upcycling_csv(tmp_path / "other.csv")
    write_rows(tmp_path / "wide.csv", rows)
    (tmp_path / "wide.csv").write_text((tmp_path / "wide.csv").read_text().rstrip() + ",5\n")
    with pytest.raises(InvalidInput, match=r"row 2 .*wide.csv cannot be read"):
        read_upcycling_csv(tmp_path / "wide.csv")


def test_the_report_has_a_table_and_a_chart_of_every_metric():
    rows = summarize(three_methods())
    assert [t.header[0] for t in upcycling_tables(rows)] == ["method", "method"]
    assert upcycling_tables(rows)[1].rows[1][1:3] == ("35 %", "-")
    tables, charts = report_sections(rows)
    assert len(charts.blocks) == 4  # bars and curves of both metrics
    assert len(tables.blocks) == 3


def short(preset: Preset, steps: int = 2) -> Preset:
    def shortened(loop):
        return replace(loop, optim=replace(loop.optim, total_steps=steps))

    return replace(
        preset,
        train=replace(preset.train, loop=shortened(preset.train.loop)),
        upcycle=replace(preset.upcycle, loop=shortened(preset.upcycle.loop)),
    )


SIZE = SimulationSize(labeled=4, fleet=4, validation=2)


@pytest.mark.slow
def test_a_small_comparison_runs_from_data_to_results(tmp_path):
    methods = ["source_only", "sn", "ros", "upcycling", "upcycling_sn", "upcycling_from_sn", "iou_match", "st3d", "oracle_frozen"]

    def data(seed: int):
        return simulated_adaptation(tmp_path / "data", "waymo", "kitti", size=SIZE, seed=seed, classes=("Car",), workers=1)

    comparison, results = Comparison(scenario=SCENARIOS["waymo_kitti"], preset=short(SMALL), size=SIZE), tmp_path / "results"
    run_comparison(comparison, data, methods, 0, jobs=tmp_path / "jobs", results=results, options=QUIET)
    found = upcycling_results(comparison.cache(results))
    assert set(found) == set(methods)
    assert [step for step, _ in found["upcycling"][0].history] == [1, 2]
    assert [step for step, _ in found["st3d"][0].history] == [1, 2]


@pytest.mark.slow
def test_partial_labels_run_with_the_draw_of_the_seed(tmp_path):
    def data(seed: int):
        found = simulated_partial(tmp_path / "data", "kitti", size=SIZE, share=0.5, seed=seed, classes=("Car",), workers=1)
        assert found.labeled.name == "train-0.5-1"
        assert not set(found.labeled.open().ids) & set(found.fleet.open().ids)
        return found

    comparison: Comparison = Comparison(scenario=SCENARIOS["kitti_partial"], preset=short(SMALL), share=0.5, size=SIZE)
    results: Path = tmp_path / "results"
    run_comparison(comparison, data, ["upcycling"], 4, jobs=tmp_path / "jobs", results=results, options=QUIET)
    assert set(upcycling_results(comparison.cache(results))) == {"upcycling"}
