"""The published CSV files give the tables that stand in docs/results.md, and the ones that the stored results gave when they were new."""

import json
import re
import statistics
from pathlib import Path

import pytest

import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.recipes import category_shift_report
from upcycle3d.perception.recipes.published_results import published_tables
from upcycle3d.perception.recipes.result_summary import differences, summarize
from upcycle3d.perception.recipes.upcycling_report import read_upcycling_csv

DOCS = Path(upcycle3d.__file__).parent / "docs"
EXPECTED = json.loads((Path(__file__).parent / "published_tables.json").read_text())
METRICS = ("Car 3D 0.7", "Car BEV 0.7", "Car 3D 0.5", "Car BEV 0.5")
UPCYCLING = ("waymo_kitti_small", "waymo_kitti_small_pv_rcnn")
SHIFTS = ("category_shift_kitti", "category_shift_lyft")


def section_of(experiment: str) -> str:
    """The section of docs/results.md that names the command which prints an experiment's tables."""
    sections = re.split(r"^## ", (DOCS / "results.md").read_text(), flags=re.MULTILINE)
    (found,) = [s for s in sections if re.search(rf"experiment report docs/experiments/{experiment}\b(?!_)", s)]
    return found


def rows_of(text: str) -> list[list[str]]:
    """Cells of every table row, without bold type."""
    lines = [line.replace("**", "") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("experiment", [*UPCYCLING, *SHIFTS])
def test_the_tables_are_the_ones_that_the_stored_results_gave(experiment):
    tables = published_tables(DOCS / "experiments" / experiment)
    assert [[list(row) for row in table.rows] for table in tables][:2] == EXPECTED[experiment]


@pytest.mark.parametrize(("experiment", "methods"), [("waymo_kitti_small", 28), ("waymo_kitti_small_pv_rcnn", 4)])
def test_means_and_spreads_of_every_method_stand_in_the_results(experiment, methods):
    rows, checked = summarize(read_upcycling_csv(DOCS / "experiments" / experiment)), set()
    for cells in rows_of(section_of(experiment)):
        name, values = cells[0].split(" ")[0], [cell for cell in cells if "±" in cell]
        if name not in rows or len(values) != len(METRICS):
            continue
        assert values == [f"{rows[name].mean[m]:.1f} ± {rows[name].spread[m]:.1f}" for m in METRICS], name
        counts = [int(cell) for cell in cells if cell.isdecimal()]
        assert counts in ([], [rows[name].seeds]), name
        checked.add(name)
    assert len(checked) == methods


def test_differences_by_seed_stand_in_the_results():
    found = differences(
        read_upcycling_csv(DOCS / "experiments" / "waymo_kitti_small"), "upcycling", ("cell_dropout", "mean_teacher")
    )
    rows = {cells[0]: cells[1:] for cells in rows_of(section_of("waymo_kitti_small")) if re.match(r"[+-]\d", cells[1])}
    assert rows == {other: [" ".join(f"{v:+.1f}" for v in by_metric[m]) for m in METRICS] for other, by_metric in found.items()}


def test_the_closed_gap_and_the_gain_of_f_gt_stand_in_the_results():
    results, text = (
        read_upcycling_csv(DOCS / "experiments" / "waymo_kitti_small"),
        " ".join(section_of("waymo_kitti_small").split()),
    )
    closed = summarize(results)["upcycling"].closed["oracle_frozen"]
    assert f"closes {closed['Car 3D 0.7']:.0f} % (3D) and {closed['Car BEV 0.7']:.0f} % (BEV) of the gap to oracle_frozen" in text
    gain = {m: statistics.fmean(v) for m, v in differences(results, "upcycling", ["hybrid"])["hybrid"].items()}
    assert f"F-GT adds {gain['Car 3D 0.7']:.1f} (3D) and {gain['Car BEV 0.7']:.1f} (BEV) points" in text


@pytest.mark.parametrize("folder", [*UPCYCLING, *SHIFTS])
def test_published_files_are_few_and_name_no_folder_of_a_machine(folder):
    files = sorted((DOCS / "experiments" / folder).iterdir())
    assert [path.name for path in files] == ["comparison.json", "environment.json", "results.csv"]
    for path in files:
        assert not re.search(r"/(root|home|tmp|work|mnt|Users)/", path.read_text()), path


def short(value: str) -> str:
    """A score as docs/results.md writes it: `.763 ± .024` for `0.763 ± 0.024`."""
    return re.sub(r"\b0\.", ".", value)


def test_scores_of_every_category_shift_stand_in_the_results():
    open_set, *_ = published_tables(DOCS / "experiments" / "category_shift_kitti")
    values = {(row[0], row[1]): dict(zip(open_set.header, row, strict=True)) for row in open_set.rows}
    written = [" | ".join(cells) for cells in rows_of(section_of("category_shift_kitti"))]
    classifiers = ("source, entropy > 0.55", "detector's score alone", "source, judged as adapted", "adapted")
    for name in (*classifiers, "source, entropy among known > 0.55"):
        row = values["open_partial", name]
        shown = [short(row[c]) for c in ("OS*", "UNK", "H", "AUROC", "FPR95")] + [row["known AP"]]
        assert any(line.endswith(" | ".join(shown)) for line in written), name
    for scenario, column in (("open", "H"), ("closed", "accuracy"), ("partial", "accuracy")):
        shown = [short(values[scenario, name][column]) for name in classifiers] + [values[scenario, "adapted"]["known AP"]]
        assert any(line.endswith(" | ".join(shown)) for line in written), scenario


def test_the_gain_of_adaptation_by_seed_stands_in_the_results():
    found = category_shift_report.read_category_shift_csv(DOCS / "experiments" / "category_shift_kitti")
    by_seed = [values for (scenario, _), values in found.items() if scenario == "open_partial"]
    gain = statistics.fmean(v["adapted"]["matched/h"] - v["source, entropy > 0.55"]["matched/h"] for v in by_seed)
    assert f"H rises by {short(f'{gain:.3f}')} " in section_of("category_shift_kitti")
    assert all(v["adapted"]["matched/auroc"] > v["detector's score alone"]["matched/auroc"] for v in by_seed)


def test_methods_to_subtract_must_be_there():
    with pytest.raises(InvalidInput, match="has no result of no_such; it has source_only, upcycling"):
        published_tables(DOCS / "experiments" / "waymo_kitti_small_pv_rcnn", minus=["no_such"])
    with pytest.raises(InvalidInput, match="leave --minus out"):
        published_tables(DOCS / "experiments" / "category_shift_lyft", minus=["upcycling"])
