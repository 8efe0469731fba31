"""The audit: every cell is measured once, stored, and shown; a setting without defences is always there to compare with."""

import json
from dataclasses import replace

import pytest

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.models.defences.cells import DropConfig
from upcycle3d.perception.models.defences.noise import NoiseConfig
from upcycle3d.perception.models.defences.region import RegionConfig
from upcycle3d.perception.privacy.attacks.occupancy_decoder import DecoderSize
from upcycle3d.perception.recipes.audit import UNDEFENDED, Audit, AuditBudget, AuditPlan, AuditSetting
from upcycle3d.perception.recipes.audit_cells import measure_linkage, read_drives
from upcycle3d.perception.recipes.audit_report import summarize_audit, summary_table, write_audit_report
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.tools import ingest, inspect
from upcycle3d.tools.audit import parse_setting
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = AuditBudget(attacker_frames=4, victim_frames=2, steps=2, size=DecoderSize(), exact_frames=1, defence_steps=1)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    data = tiny.prepared(folder / "data")
    save_run_detector(folder / "source", tiny.second_iou())
    return AuditPlan(
        detector=folder / "source",
        labeled=data,
        attacker=data,
        victims=data,
        settings=(AuditSetting(name="half", defences=(DropConfig(share=0.5),)),),
        attacks=("nothing", "cells", "voxels", "exact", "attributes", "people"),
        budget=BUDGET,
    )


@pytest.fixture(scope="module")
def measured(plan, tmp_path_factory):
    said: list[str] = []
    folder = tmp_path_factory.mktemp("out")
    audit = Audit(plan, folder, say=said.append)
    return audit, list(audit.results()), said


def test_every_setting_is_measured_and_the_undefended_one_is_among_them(measured):
    _, results, said = measured
    assert [r.setting.name for r in results] == [UNDEFENDED, "half"]
    plain, half = results
    assert half.sent.cells_per_frame < plain.sent.cells_per_frame
    assert half.sent.bytes_per_frame < plain.sent.bytes_per_frame
    for result in results:
        assert result.rebuilt["voxels"].matched.scene.f_20cm.mean == 1.0  # the upper bound is the scan itself
        assert result.exact is not None
        assert result.attributes is not None
        assert result.people is None  # nobody labeled pedestrians
    assert len(said) == 2 * (1 + 6)


def test_an_audit_goes_on_where_it_was_and_measures_nothing_twice(measured, plan):
    audit, results, _ = measured
    said: list[str] = []
    again = Audit(plan, audit.folder, say=said.append)
    assert list(again.results()) == results
    assert said == []
    more = replace(plan, settings=(*plan.settings, AuditSetting(name="noise", defences=(NoiseConfig(),))))
    assert len(list(Audit(more, audit.folder, say=said.append).results())) == 3
    assert all(text.startswith("noise") for text in said)
    with pytest.raises(InvalidInput, match="another configuration"):
        Audit(replace(plan, seed=1), audit.folder)
    other = replace(plan, settings=(AuditSetting(name="half", defences=(DropConfig(share=0.4),)),))
    with pytest.raises(InvalidInput, match="another setting with the name 'half'"):
        list(Audit(other, audit.folder).results())


def test_the_report_shows_every_setting_and_attack(measured):
    audit, results, _ = measured
    rows = summarize_audit(results)
    assert [row.name for row in rows] == [UNDEFENDED, "half"]
    assert len(summary_table(rows).rows) == 2
    page = write_audit_report(audit, results).read_text()
    for wanted in ("half", "upper bound: voxels of the raw scan", "lower bounds", "cells of Car, AUC"):
        assert wanted in page
    record = json.loads((audit.folder / "summary.json").read_text())
    assert [row["name"] for row in record["settings"]] == [UNDEFENDED, "half"]
    assert (audit.folder / "audit.md").read_text().count("| half |") >= 1
    assert "anonym" not in page.lower()


def test_settings_are_read_from_the_command_line():
    assert parse_setting("a=region:margin_cells=2+noise@int8") == AuditSetting(
        name="a", defences=(RegionConfig(margin_cells=2), NoiseConfig()), codec="int8"
    )
    assert parse_setting("b=none@int8") == AuditSetting(name="b", codec="int8")
    for text, message in (("region", "NAME=DEFENCE"), ("a=nothing", "there is no defence"), ("a=none@int4", "no codec")):
        with pytest.raises(InvalidInput, match=message):
            parse_setting(text)


def test_drives_are_read_and_frames_without_one_are_named(tmp_path):
    path = tmp_path / "frames.csv"
    path.write_text("id,drive\n000002,a\n000001,a\n000003,b\n")
    assert read_drives(path) == {"000002": ("a", 1), "000001": ("a", 0), "000003": ("b", 2)}
    path.write_text("id,drive,position\n1,a,x\n")
    with pytest.raises(InvalidInput, match="whole number"):
        read_drives(path)
    path.write_text("name\n1\n")
    with pytest.raises(InvalidInput, match="needs the columns"):
        read_drives(path)
    assert measure_linkage([], None) is None


def test_a_store_says_which_defences_its_uploads_passed_and_what_the_audit_measured(measured, plan, tmp_path):
    audit, results, _ = measured
    write_audit_report(audit, results)
    detector = audit.detector_folder(plan.settings[-1])
    extractor = Extractor(load_detector(detector).encoder, RigSpec(), "fp16")
    with extractor.shard_writer(tmp_path / "in") as writer:
        extract([tiny.scan_with_car(0)], extractor, writer)
    words = [tmp_path / "in", "--store", tmp_path / "store", "--detector", detector]
    assert run_command(ingest.command, [*map(str, words), "--audit", str(audit.folder)]) == 0
    assert run_command(inspect.command, [str(tmp_path / "store"), "--json", str(tmp_path / "j")]) == 0
    facts = json.loads((tmp_path / "j").read_text())
    assert facts["defences of its uploads"] == "drop:share=0.5"
    assert facts["what these give away"].startswith("fp16: no trained attack on geometry was run; 0.0 single points")
    assert run_command(ingest.command, list(map(str, words))) == 0  # another day, without the audit: the note stays
    assert run_command(inspect.command, [str(tmp_path / "store"), "--json", str(tmp_path / "j")]) == 0
    assert json.loads((tmp_path / "j").read_text()) == facts


def test_ingest_warns_where_the_audit_measured_another_encoder(measured, plan, tmp_path, capsys):
    audit, results, _ = measured
    write_audit_report(audit, results)
    encoder = tiny.second_iou(seed=5).encoder.eval()
    extractor = Extractor(encoder, RigSpec(), "fp16")
    save_encoder(tmp_path / "encoder.safetensors", encoder)
    with extractor.shard_writer(tmp_path / "in") as writer:
        extract([tiny.scan_with_car(0)], extractor, writer)
    words = [tmp_path / "in", "--store", tmp_path / "store", "--detector", tmp_path / "encoder.safetensors"]
    assert run_command(ingest.command, [*map(str, words), "--audit", str(audit.folder)]) == 0
    assert "has the encoder of" in capsys.readouterr().err
    assert run_command(ingest.command, [*map(str, words), "--audit", str(tmp_path)]) == 2
    assert "holds no finished audit" in capsys.readouterr().err
