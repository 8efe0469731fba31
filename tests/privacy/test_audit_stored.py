"""The stored cells of an audit: an interruption changes no number, and a file that nobody should have edited is named."""

import json
import shutil
from dataclasses import replace

import pytest

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.models.defences.cells import DropConfig
from upcycle3d.perception.recipes.audit import Audit
from upcycle3d.perception.recipes.audit_plan import AuditBudget, AuditPlan, AuditSetting
from upcycle3d.perception.recipes.audit_tables import summarize_audit
from upcycle3d.perception.training.detector_files import save_run_detector

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    data = tiny.prepared(folder / "data")
    save_run_detector(folder / "source", tiny.second_iou())
    return AuditPlan(
        detector=folder / "source",
        labeled=data,
        attacker=data,
        victims=replace(data, name="val"),
        settings=(AuditSetting(name="half", defences=(DropConfig(share=0.5),)),),
        attacks=("cells", "attributes"),
        budget=AuditBudget(attacker_frames=4, victim_frames=2),
    )


@pytest.fixture(scope="module")
def measured(plan, tmp_path_factory):
    audit = Audit(plan, tmp_path_factory.mktemp("out"), say=lambda text: None)
    return audit, list(audit.results())


def test_a_cell_that_is_measured_after_an_interruption_is_the_same(measured, plan, tmp_path):
    """Random defences draw the same numbers, whether the detector of the setting was loaded just before or cells ago."""
    audit, results = measured
    shutil.copytree(audit.folder, tmp_path / "killed")
    (tmp_path / "killed" / "cells" / "half__attributes_seed0.json").unlink()
    assert list(Audit(plan, tmp_path / "killed", say=lambda text: None).results()) == results


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("measured",), None, "half__cells_seed0.json is no cell of this version .* measured again"),
        (("measured", "more"), 1, "is no cell of this version .*unknown option `more`"),
        (("measured", "matched", "scene", "f_20cm", "total"), float("nan"), "is no cell of this version .*finite sum"),
        ((), [1], "is no cell of this version"),
    ],
    ids=["none", "version", "nan", "list"],
)
def test_a_cell_that_somebody_edited_is_named_with_the_remedy(measured, plan, tmp_path, where, value, message):
    audit, _ = measured
    shutil.copytree(audit.folder, tmp_path / "edited")
    path = tmp_path / "edited" / "cells" / "half__cells_seed0.json"
    stored = json.loads(path.read_text())
    inside, *keys = stored, *("result", *where)
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    path.write_text(json.dumps(stored))
    with pytest.raises(InvalidInput, match=message):
        list(Audit(plan, tmp_path / "edited").results())


def test_a_defended_detector_of_another_source_is_not_taken_for_this_one(measured, plan, tmp_path):
    """Whoever deletes the cells of an audit and gives another detector must not get numbers of the old one."""
    audit, _ = measured
    shutil.copytree(audit.folder, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "cells")
    save_run_detector(tmp_path / "source", tiny.second_iou(seed=3))
    other = Audit(replace(plan, detector=tmp_path / "source"), tmp_path / "old")
    with pytest.raises(InvalidInput, match="was made from another detector"):
        other.detector_folder(plan.settings[-1])


def test_numbers_that_no_attack_gives_are_not_summarized(measured):
    _, results = measured
    wrong = replace(results[1], sent=replace(results[1].sent, bytes_per_frame=-1.0))
    with pytest.raises(InvalidInput, match=r"the cells of the setting 'half' .* measured again"):
        summarize_audit([results[0], wrong])
