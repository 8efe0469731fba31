"""What a store says of its uploads belongs to the encoder of these uploads, not to another one with defences of the same name."""

import json
from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.config_json import config_to_json
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.models.defences.region import RegionConfig
from upcycle3d.perception.models.defended import defended
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.recipes.audit_summary import SUMMARY_FILE, AttackStrength, AuditSummary, SettingSummary
from upcycle3d.perception.server.store_note import read_store_note
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.tools import ingest, inspect
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")


def summary(encoder: str) -> SettingSummary:
    names = "noise_bound f_nothing f_scene f_above_road leak bits_per_voxel exact_per_scan exact_chance neighbor neighbor_chance"
    none = dict.fromkeys(names.split())
    return SettingSummary(
        name="a", what="region@fp16", bytes_per_frame=1.0, raw_bytes_per_frame=2.0, cells_per_frame=3.0, encoder=encoder, codec="fp16",
        f_objects={}, ap={}, **none,
    )  # type: ignore[arg-type]  # fmt: skip


def audit_of(*rows: SettingSummary) -> AuditSummary:
    return AuditSummary(settings=rows, strength=AttackStrength(attacker_frames=9, victim_frames=5, steps=7, seed=0, quick=False))


def test_what_was_measured_of_an_encoder_is_not_said_of_one_that_was_fitted_differently(tmp_path):
    """The first shards were refused, so the store is still free for another encoder, but a note is there already."""
    encoders, source = {}, tiny.second_iou()
    for number in (1, 2):
        torch.manual_seed(number)
        encoders[number] = defended(source, (RegionConfig(),)).encoder.eval()
        save_encoder(tmp_path / f"{number}.safetensors", encoders[number])
    with Extractor(encoders[2], RigSpec(), "fp16").shard_writer(tmp_path / "in") as writer:
        extract([tiny.scan_with_car(0)], Extractor(encoders[2], RigSpec(), "fp16"), writer)
    row = summary(encoder_fingerprint(encoders[1], RigSpec()))
    (tmp_path / SUMMARY_FILE).write_text(json.dumps(config_to_json(audit_of(row))))
    words = [str(tmp_path / "in"), "--store", str(tmp_path / "store"), "--detector"]
    run_command(ingest.command, [*words, str(tmp_path / "1.safetensors"), "--audit", str(tmp_path)])
    before = read_store_note(tmp_path / "store")
    assert before is None or before.measured
    assert run_command(ingest.command, [*words, str(tmp_path / "2.safetensors")]) == 0
    note = read_store_note(tmp_path / "store")
    assert note is not None
    assert (note.defences, note.measured) == ("region", ())
    assert run_command(ingest.command, [*words, str(tmp_path / "2.safetensors"), "--audit", str(tmp_path)]) == 0
    note = read_store_note(tmp_path / "store")
    assert note is not None
    assert note.measured == ()


def test_what_was_measured_in_a_codec_is_not_said_of_scenes_in_another(tmp_path, capsys):
    """An audit of region@int8 says nothing of the fp16 uploads that `extract` makes by default."""
    encoder = tiny.second_iou().encoder.eval()
    save_encoder(tmp_path / "e.safetensors", encoder)
    with Extractor(encoder, RigSpec(), "fp16").shard_writer(tmp_path / "in") as writer:
        extract([tiny.scan_with_car(0)], Extractor(encoder, RigSpec(), "fp16"), writer)
    row = replace(summary(encoder_fingerprint(encoder, RigSpec())), codec="int8", name="int8", what="none@int8")
    (tmp_path / SUMMARY_FILE).write_text(json.dumps(config_to_json(audit_of(row))))
    words = [str(tmp_path / "in"), "--store", str(tmp_path / "store"), "--detector", str(tmp_path / "e.safetensors")]
    assert run_command(ingest.command, [*words, "--audit", str(tmp_path)]) == 0
    assert "Extract with --codec int8, or audit a setting with @fp16" in " ".join(capsys.readouterr().err.split())
    assert run_command(inspect.command, [str(tmp_path / "store")]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "fp16: not measured; an audit measured int8 of this encoder" in shown
    note = read_store_note(tmp_path / "store")
    assert note is not None
    assert note.about(["int8"])[0].endswith("(7 steps on 9 frames of the attacker, scored on 5 other frames, seed 0)")
