"""The summary of an audit may come from others: what it says reaches stores, terminals and pages only if an audit could have said it."""

import json
from dataclasses import replace

import pytest

from upcycle3d.core.config_json import config_to_json
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.recipes.audit_summary import SUMMARY_FILE, AttackStrength, SettingSummary, read_audit_summary, sentence

ROW = SettingSummary(
    name="region",
    what="region@int8",
    bytes_per_frame=1000.0,
    raw_bytes_per_frame=2000.0,
    cells_per_frame=500.0,
    encoder="0" * 64,
    codec="int8",
    noise_bound=None,
    f_nothing=0.4,
    f_scene=0.5,
    f_above_road=0.1,
    f_objects={"Car": 0.6, "Pedestrian": None},
    leak=0.2,
    bits_per_voxel=5.0,
    exact_per_scan=0.0,
    exact_chance=0.0,
    neighbor=None,
    neighbor_chance=None,
    ap={"Car_3D": (50.0, 51.0)},
)


STRENGTH = AttackStrength(attacker_frames=60, victim_frames=12, steps=200, seed=0, quick=True)


def read(folder, *rows, **changes):
    record = [config_to_json(row) | changes for row in rows or [ROW]]
    (folder / SUMMARY_FILE).write_text(json.dumps({"settings": record, "strength": config_to_json(STRENGTH)}))
    return read_audit_summary(folder)


def test_a_summary_is_read_as_it_was_written(tmp_path):
    low = replace(ROW, name="low", leak=-3.0, f_scene=0.0)  # an attack may do worse than a guess
    found = read(tmp_path, ROW, low)
    assert found.settings == (ROW, low)
    assert found.strength == STRENGTH


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x\nwarning: all is well"},
        {"name": "\x1b[2J"},
        {"codec": "fp16: nothing can be rebuilt"},
        {"encoder": "any"},
        {"f_objects": {"Car\n\nsecond line": 0.1}},
        {"f_objects": {"\x1b]0;title\x07": 0.1}},
        {"f_objects": {f"class {number}": 0.1 for number in range(2000)}},
        {"f_scene": -0.5},
        {"f_scene": 1e300},
        {"f_above_road": "nan"},
        {"exact_per_scan": -1.0},
        {"bytes_per_frame": "inf"},
        {"leak": "nan"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_summary_that_no_audit_wrote_is_refused(changes, tmp_path):
    with pytest.raises(InvalidInput, match="is no summary of an audit"):
        read(tmp_path, **changes)


def test_a_summary_of_ten_megabytes_is_refused_without_being_read(tmp_path):
    (tmp_path / SUMMARY_FILE).write_text(json.dumps({"settings": [], "more": "x" * 10_000_000}))
    with pytest.raises(InvalidInput, match="bytes, more than"):
        read_audit_summary(tmp_path)


def test_a_sentence_is_one_line():
    assert "\n" not in sentence(ROW)
    assert sentence(ROW).startswith("int8: a trained attack rebuilds scans with F@0.2 m 0.50, above the road 0.10, Car 0.60")


def test_weak_attacks_are_called_weak():
    """A store keeps the sentence for years; without this, numbers of a first look would pass for those of an audit."""
    assert "no ground to choose a defence: 200 steps on 60 frames" in str(STRENGTH)
    assert "first look" not in str(replace(STRENGTH, quick=False))
