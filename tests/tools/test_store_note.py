"""What a store says of its uploads belongs to the encoder of these uploads, not to another one with defences of the same name."""

import json

import pytest
import torch

import tiny
from upcycle3d.core.config_json import config_to_json
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.models.defences.region import RegionConfig
from upcycle3d.perception.models.defended import defended
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.recipes.audit_summary import SUMMARY_FILE, SettingSummary
from upcycle3d.perception.server.store_note import read_store_note
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.tools import ingest
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")


def summary(encoder: str) -> SettingSummary:
    names = "noise_bound f_nothing f_scene f_above_road leak bits_per_voxel exact_per_scan exact_chance neighbor neighbor_chance"
    none = dict.fromkeys(names.split())
    return SettingSummary(
        name="a", what="region@fp16", bytes_per_frame=1.0, raw_bytes_per_frame=2.0, encoder=encoder, codec="fp16",
        f_objects={}, ap={}, **none,
    )  # type: ignore[arg-type]  # fmt: skip


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
    (tmp_path / SUMMARY_FILE).write_text(json.dumps({"settings": [config_to_json(row)]}))
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
