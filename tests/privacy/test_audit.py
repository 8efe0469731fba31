"""The audit: every cell is measured once, stored, and shown; a setting without defences is always there to compare with."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from upcycle3d.core.config_json import config_to_json
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.perception.models.defences.cells import DropConfig
from upcycle3d.perception.models.defences.noise import NoiseConfig
from upcycle3d.perception.models.defences.region import RegionConfig
from upcycle3d.perception.models.defended import defended
from upcycle3d.perception.privacy.attacks.occupancy_decoder import DecoderSize
from upcycle3d.perception.privacy.exact_points import ExactPointScore
from upcycle3d.perception.recipes.audit import Audit
from upcycle3d.perception.recipes.audit_cells import WITHOUT_UPLOADS, ExactMeasured
from upcycle3d.perception.recipes.audit_linkage import measure_linkage, read_drives
from upcycle3d.perception.recipes.audit_membership import MembershipPlan, ReferencePlan
from upcycle3d.perception.recipes.audit_plan import UNDEFENDED, AuditBudget, AuditPlan, AuditSetting
from upcycle3d.perception.recipes.audit_report import attack_strength, write_audit_report
from upcycle3d.perception.recipes.audit_summary import AuditSummary, sentence
from upcycle3d.perception.recipes.audit_tables import LEAK_NOTE, summarize_audit, summary_table, weak_attacks
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.tools import ingest, inspect
from upcycle3d.tools.audit import AuditOptions, _attacks, _budget, _not_measured, parse_reference, parse_setting
from upcycle3d.tools.audit import command as audit_command
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
        victims=replace(data, name="val"),
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


def test_the_progress_counts_all_cells_and_names_a_setting_as_it_is_given(measured):
    audit, _, said = measured
    assert [text.split(": ")[0] for text in said] == [f"{n} of 14" for n in range(1, 15)]
    assert said[0] == "1 of 14: undefended=none@fp16: sent"
    assert said[7] == "8 of 14: half=drop:share=0.5@fp16: sent"
    assert audit.cells == 14


def test_rows_that_no_upload_decides_are_measured_once_and_stand_in_every_table(measured, plan, tmp_path, monkeypatch):
    """Oracle: measuring them again for the defended setting gives the same scores."""
    _, results, said = measured
    assert [text for text in said if "the same as" in text] == [
        "9 of 14: half: nothing, the same as of undefended", "11 of 14: half: voxels, the same as of undefended"
    ]  # fmt: skip
    plain, half = results
    for name in WITHOUT_UPLOADS:
        assert half.rebuilt[name] == plain.rebuilt[name]
    alone = Audit(replace(plan, attacks=WITHOUT_UPLOADS), tmp_path)
    monkeypatch.setattr(alone, "_measured_of_another", lambda what: None)
    for result in alone.results():
        for name in WITHOUT_UPLOADS:
            assert replace(result.rebuilt[name], training_seconds=0) == replace(plain.rebuilt[name], training_seconds=0)


def test_cells_of_a_folder_in_which_they_were_measured_for_each_setting_are_taken(measured, plan, tmp_path):
    audit, results, _ = measured
    shutil.copytree(audit.folder, tmp_path / "old")
    (tmp_path / "old" / "cells" / "undefended__nothing_seed0.json").unlink()
    said: list[str] = []
    assert list(Audit(plan, tmp_path / "old", say=said.append).results()) == results
    assert said == ["2 of 14: undefended: nothing, the same as of half"]


def test_an_audit_goes_on_where_it_was_and_measures_nothing_twice(measured, plan):
    audit, results, _ = measured
    said: list[str] = []
    again = Audit(plan, audit.folder, say=said.append)
    assert list(again.results()) == results
    assert said == []
    more = replace(plan, settings=(*plan.settings, AuditSetting(name="noise", defences=(NoiseConfig(),))))
    assert len(list(Audit(more, audit.folder, say=said.append).results())) == 3
    assert all(" of 21: noise" in text for text in said)
    with pytest.raises(InvalidInput, match="another configuration"):
        Audit(replace(plan, seed=1), audit.folder)
    other = replace(plan, settings=(AuditSetting(name="half", defences=(DropConfig(share=0.4),)),))
    with pytest.raises(InvalidInput, match="another setting with the name 'half'"):
        list(Audit(other, audit.folder).results())


def test_an_audit_whose_numbers_would_be_wrong_is_refused(plan, tmp_path):
    with pytest.raises(InvalidInput, match="2 frames of the victims"):
        Audit(replace(plan, attacker=replace(plan.attacker, name=None)), tmp_path / "a")
    alone = tiny.prepared(tmp_path / "alone", frames=3)
    with pytest.raises(InvalidInput, match="has 1 frames; an attack needs two"):
        Audit(replace(plan, attacker=alone), tmp_path / "a")
    other = tiny.prepared(tmp_path / "other", classes=("Pedestrian", "Car"))
    with pytest.raises(InvalidInput, match="prepared for the classes Pedestrian, Car"):
        Audit(replace(plan, victims=replace(other, name="val")), tmp_path / "b")
    save_run_detector(tmp_path / "defended", defended(load_detector(plan.detector), (DropConfig(),)))
    with pytest.raises(InvalidInput, match="carries defences already"):
        Audit(replace(plan, detector=tmp_path / "defended"), tmp_path / "c")
    with pytest.raises(InvalidInput, match="has no defences"):
        replace(plan, settings=(AuditSetting(name=UNDEFENDED, defences=(DropConfig(),)),))


def test_a_setting_that_cannot_be_made_is_refused_before_anything_is_measured(plan, tmp_path):
    for text, message in (
        ("late=bottleneck:channels=4+obfuscator", "the setting 'late': a learned obfuscator must stand before"),
        ("wide=bottleneck:channels=999", "the setting 'wide': a bottleneck sends at most"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Audit(replace(plan, settings=(parse_setting(text),)), tmp_path)
    assert not (tmp_path / "cells").exists()


def test_the_detector_of_a_killed_run_is_made_again_and_that_of_another_setting_is_refused(plan, tmp_path):
    audit, setting = Audit(plan, tmp_path), plan.settings[-1]
    folder = audit.detector_folder(setting)
    (folder / "defences.json").unlink()
    assert (audit.detector_folder(setting) / "defences.json").exists()
    with pytest.raises(InvalidInput, match="of another setting"):
        audit.detector_folder(replace(setting, defences=(DropConfig(share=0.1),)))


def test_points_that_nobody_solved_for_are_not_reported_as_none_found(measured):
    _, results, _ = measured
    unsolved = replace(results[0], exact=ExactMeasured(raw_balls=ExactPointScore(), lone_voxels=ExactPointScore()))
    row = summarize_audit([unsolved, *results[1:]])[0]
    assert row.exact_per_scan is None
    assert row.exact_chance is None
    assert "single points were not computed" in sentence(row)


def test_the_report_shows_every_setting_and_attack(measured):
    audit, results, _ = measured
    rows = summarize_audit(results)
    assert [row.name for row in rows] == [UNDEFENDED, "half"]
    table = summary_table(rows)
    assert len(table.rows) == 2
    always = ("setting", "kB per frame", "share of raw bytes", "cells per frame", "F@0.2 m whole scene", "leak share L")
    assert table.header[:6] == always
    assert table.header[6:] == (
        "exact points (by chance)",
        "places tried",
    )  # nobody attacked order, and no network rebuilt objects
    page = write_audit_report(audit, results).read_text()
    for wanted in (LEAK_NOTE, "half", "the voxel centers of the raw scan", "lower bounds", "cells of Car, AUC"):
        assert wanted in page
    record = json.loads((audit.folder / "summary.json").read_text())
    assert [row["name"] for row in record["settings"]] == [UNDEFENDED, "half"]
    text = (audit.folder / "audit.md").read_text()
    assert text.count("| half |") >= 1
    assert "2 steps on 4 frames of the attacker, scored on 2 other frames" in text
    assert "neighbors:" not in text  # only columns that are there are explained
    assert text.index("| half |") < text.index(LEAK_NOTE) < text.index("Attacks on")
    assert "anonym" not in page.lower()


def test_settings_are_read_from_the_command_line():
    assert parse_setting("a=region:margin_cells=2+noise@int8") == AuditSetting(
        name="a", defences=(RegionConfig(margin_cells=2), NoiseConfig()), codec="int8"
    )
    assert parse_setting("b=none@int8") == AuditSetting(name="b", codec="int8")
    for name in ("a=region:margin_cells=2+noise@int8", "undefended=none@fp16"):
        assert str(parse_setting(name)) == name
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
    path.write_text("id,drive\n10,a\n9,a\n")
    assert read_drives(path) == {"10": ("a", 1), "9": ("a", 0)}
    for text, message in (("1,a,1\n1,b,2\n", "twice"), ("1,a,1\n2,a,\n", "1 of 2"), ("1,,1\n", "names no drive")):
        path.write_text(f"id,drive,position\n{text}")
        with pytest.raises(InvalidInput, match=message):
            read_drives(path)
    path.write_text("name\n1\n")
    with pytest.raises(InvalidInput, match="needs the columns"):
        read_drives(path)
    assert measure_linkage([], None) is None


def test_a_store_says_which_defences_its_uploads_passed_and_what_the_audit_measured(measured, plan, tmp_path, capsys):
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
    other = replace(summarize_audit(results)[0], encoder="0" * 64, name="elsewhere")
    (tmp_path / "other").mkdir()
    summary = AuditSummary(settings=(other,), strength=attack_strength(audit, results))
    (tmp_path / "other" / "summary.json").write_text(json.dumps(config_to_json(summary)))
    capsys.readouterr()
    assert run_command(ingest.command, [*map(str, words), "--audit", str(tmp_path / "other")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "it measured elsewhere" in told
    assert "says of an earlier audit stays there" in told
    assert run_command(inspect.command, [str(tmp_path / "store"), "--json", str(tmp_path / "j")]) == 0
    assert json.loads((tmp_path / "j").read_text()) == facts
    (tmp_path / "store" / "uploads.json").write_text('{"defences": 1}')
    for call, given in ((ingest.command, list(map(str, words))), (inspect.command, [str(tmp_path / "store")])):
        assert run_command(call, given) == 2
        assert "uploads.json" in capsys.readouterr().err


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
    told = capsys.readouterr().err
    assert "has the encoder of" in told
    assert "earlier audit" not in told
    assert run_command(ingest.command, [*map(str, words), "--audit", str(tmp_path)]) == 2
    assert "holds no finished audit" in capsys.readouterr().err


def _with_f20(measured, mean):
    scene = measured.matched.scene
    scores = replace(measured.matched, scene=replace(scene, f_20cm=replace(scene.f_20cm, total=mean * scene.f_20cm.frames)))
    return replace(measured, matched=scores)


def test_an_occupancy_attack_below_another_row_is_named_as_too_weak(measured, tmp_path):
    audit, results, _ = measured
    plain = results[0]
    weak, strong = (
        replace(
            plain,
            rebuilt={
                "nothing": _with_f20(plain.rebuilt["nothing"], 0.2),
                "occupancy": _with_f20(plain.rebuilt["nothing"], value),
                "voxels": plain.rebuilt["voxels"],
            },
        )
        for value in (0.1, 0.3)
    )
    (text,) = weak_attacks([weak])
    assert "'undefended' scores F@0.2 0.100, less than `nothing` with 0.200" in text
    assert weak_attacks([strong]) == weak_attacks([plain]) == []
    assert "the attack learned too little" in sentence(summarize_audit([weak])[0])
    assert "too little" not in sentence(summarize_audit([strong])[0])
    shown = Audit(audit.plan, audit.folder)
    shown.folder = tmp_path
    assert "do not read its low score as protection" in write_audit_report(shown, [weak]).read_text()
    assert (tmp_path / "audit.md").read_text().split("\n\n")[1].startswith("Warning: the occupancy attack")


def test_options_that_contradict_each_other_are_refused_before_anything_is_measured(plan, tmp_path, capsys):
    drives = tmp_path / "frames.csv"
    base = ["--detector", str(plan.detector), "--out", str(tmp_path / "out"), "--attacker", str(plan.attacker)]
    for more, message in (
        (["--victims", str(plan.victims), "--attacks", "linkage"], "--attacks linkage is given without --drives"),
        (["--victims", str(plan.victims), "--attacks", "cells", "--drives", str(drives)], "without `linkage` among --attacks"),
    ):
        assert run_command(audit_command, [*base, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    options = AuditOptions(detector=plan.detector, attacker=plan.attacker, victims=plan.victims, out=tmp_path, drives=drives)
    assert _attacks(options)[-1] == "linkage"
    with pytest.raises(InvalidInput, match="--quick sets the whole budget"):
        _budget(replace(options, quick=True, budget=AuditBudget(steps=3)))


def test_attacks_that_were_asked_for_and_could_not_run_are_named(measured):
    _, results, _ = measured
    (text,) = _not_measured(("attributes", "people"), results)
    assert text.startswith("the attack people was not measured: the detector has no class Pedestrian")
    assert _not_measured(("cells",), results) == []
    unsolved = replace(results[1], exact=ExactMeasured(raw_balls=ExactPointScore(), lone_voxels=ExactPointScore()))
    (text,) = _not_measured(("exact",), [results[0], unsolved])
    assert text.startswith("the attack exact was not run on half: ")


@pytest.fixture(scope="module")
def attacked(plan, tmp_path_factory):
    """A plan whose attacker has a detector of its own, with frames of its own."""
    folder = tmp_path_factory.mktemp("references")
    own = tiny.prepared(folder / "own")
    save_run_detector(folder / "own_detector", tiny.second_iou(seed=7))
    words = parse_reference(f"{folder / 'own_detector'}={own.root}:train={own.root}:val")
    return replace(plan, attacks=("nothing",), membership=MembershipPlan(members=plan.attacker, references=(words,)))


def test_membership_is_measured_once_stored_and_shown(attacked, measured, tmp_path):
    """It belongs to the weights, which no defence changes, and a folder of before takes it without measuring the rest again."""
    audit, _, _ = measured
    shutil.copytree(audit.folder, tmp_path / "old")
    said: list[str] = []
    again = Audit(attacked, tmp_path / "old", say=said.append)
    results, leak = list(again.results()), again.membership()
    assert said == ["5 of 5: membership of frames in the training set"]
    assert (leak.members, leak.others, leak.references) == (2, 2, 1)  # the budget has two frames of a split
    assert leak.calibrated is not None
    assert "encoder file compared with the references" in write_audit_report(again, results).read_text()
    assert "2 members, 2 others, 1 reference detectors" in (tmp_path / "old" / "audit.md").read_text()
    assert len(said) == 1
    without = replace(attacked, membership=replace(attacked.membership, references=()))
    alone = Audit(without, tmp_path / "old", say=said.append).membership()  # another attacker: not the stored cell
    assert (alone.references, alone.calibrated, len(said)) == (0, None, 2)
    assert audit.membership() is None


def test_a_membership_whose_numbers_would_be_wrong_is_refused(attacked, tmp_path):
    membership = attacked.membership
    (reference,) = membership.references
    for wrong, message in (
        (replace(membership, members=attacked.victims), "frames of --victims .* are among --members"),
        (
            replace(membership, references=(replace(reference, members=membership.members),)),
            "frames of the members of .* are among --members",
        ),
        (
            replace(membership, references=(replace(reference, others=reference.members),)),
            "are among the members of",
        ),
    ):
        with pytest.raises(InvalidInput, match=message):
            Audit(replace(attacked, membership=wrong), tmp_path)
    wide = tiny.second_iou(tiny.second_iou_config(width=8))
    save_run_detector(tmp_path / "wide", wide)
    with pytest.raises(InvalidInput, match="other classes or another cut"):
        Audit(
            replace(attacked, membership=replace(membership, references=(replace(reference, detector=tmp_path / "wide"),))),
            tmp_path,
        )


def test_references_are_read_from_the_command_line_and_belong_to_members(plan, tmp_path):
    assert parse_reference("runs/mine=data/mine:a=data/mine:b") == ReferencePlan(
        detector=Path("runs/mine"), members=DataSplit.parse("data/mine:a"), others=DataSplit.parse("data/mine:b")
    )
    for text in ("runs/mine", "runs/mine=data:a", "=data:a=data:b", "a=b=c=d"):
        with pytest.raises(InvalidInput, match="DETECTOR=MEMBERS=OTHERS"):
            parse_reference(text)
    options = AuditOptions(
        detector=plan.detector, attacker=plan.attacker, victims=plan.victims, out=tmp_path, references=("a=b:c=d:e",)
    )
    with pytest.raises(InvalidInput, match="--references belong to --members"):
        audit_command(options)
