"""`upcycle3d defend`: defences are fitted, written, and read from a command line."""

import inspect
import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Labels
from upcycle3d.perception.models.defences.bottleneck import BottleneckConfig
from upcycle3d.perception.models.defences.cells import DropConfig
from upcycle3d.perception.models.defences.noise import NoiseConfig
from upcycle3d.perception.models.defences.obfuscator import Obfuscator, ObfuscatorConfig
from upcycle3d.perception.models.defences.region import RegionConfig, RegionUpload
from upcycle3d.perception.models.defences.table import (
    DefenceConfig,
    defence_name,
    describe_defences,
    parse_defence,
    parse_defences,
)
from upcycle3d.perception.privacy.obfuscator_training import ObfuscatorReport, ObfuscatorTraining, train_obfuscator
from upcycle3d.perception.recipes.defend import DefendOutcome, FitReport, defend_detector
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.training.objectness import LabeledScene, ObjectnessReport, train_objectness
from upcycle3d.tools.defend import Defend, command

pytestmark = pytest.mark.usefixtures("one_thread")


def test_defences_are_written_as_they_are_read():
    configs = [RegionConfig(margin_cells=2, background_share=0.1), NoiseConfig(sigma=0.25), DropConfig(share=0.12345678)]
    text = describe_defences(configs)
    assert text == "region:margin_cells=2,background_share=0.1+noise:sigma=0.25+drop:share=0.12345678"
    assert list(parse_defences(text)) == configs
    assert parse_defences(text.replace("+", " + ")) == parse_defences(text)
    assert describe_defences([RegionConfig(), NoiseConfig()]) == "region+noise"
    assert describe_defences([]) == "none"
    assert parse_defences("none") == ()


@pytest.mark.parametrize("sigma", [0.0, 1e-07, 1, 123.4567891234, 1000.0])
def test_no_number_is_written_so_that_it_is_read_as_two_defences(sigma):
    text = describe_defences([NoiseConfig(sigma=sigma), BottleneckConfig(channels=65536)])
    assert parse_defences(text) == (NoiseConfig(sigma=sigma), BottleneckConfig(channels=65536))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("regoin", "did you mean 'region'"),
        ("noise:sgima=1", "has no setting 'sgima'; it has sigma"),
        ("noise:sigma=much", "needs a number"),
        ("region:margin_cells=1.5", "needs a whole number"),
        ("drop:share=2", "share"),
        ("drop:share=nan", "share"),
        ("drop:share=0.1,share=0.9", "twice"),
    ],
)
def test_a_mistyped_defence_is_named(text, message):
    with pytest.raises(InvalidInput, match=message):
        parse_defence(text)


def test_the_head_finds_cells_that_differ_and_keeps_the_stated_share():
    """Objects are planted: their cells have one channel set, which no other cell has."""
    detector = tiny.second_iou().eval()
    spec = detector.spec
    rng = np.random.default_rng(0)
    scenes = []
    with torch.no_grad():
        template = detector.encode([tiny.scan_with_car(0)])
    for _ in range(16):
        _, height, width = spec.shape
        dense = torch.from_numpy(rng.random((height, width)) < 0.5)
        row, column = int(rng.integers(2, height - 2)), int(rng.integers(2, width - 2))
        dense[row, column] = True
        rows, columns = dense.nonzero().unbind(1)
        zero = torch.zeros_like(rows)
        coords = torch.stack([zero, zero, rows, columns], 1).int()
        features = torch.rand(len(coords), spec.channels) * 0.1
        x, y = spec.position(torch.tensor(float(row)), torch.tensor(float(column)))
        features[(rows == row) & (columns == column), 0] = 5.0
        cell_x, cell_y = spec.cell_size()
        box = torch.tensor([[float(x), float(y), 0.0, cell_x * 0.5, cell_y * 0.5, 1.0, 0.0]])
        voxels = replace(template.voxels, features=features, coords=coords)
        scenes.append(
            LabeledScene(
                features=replace(template, voxels=voxels), labels=Labels.make(Boxes3D(data=box), [0]), scan=tiny.scan_with_car(0)
            )
        )
    torch.manual_seed(0)
    defence = RegionUpload(spec, RegionConfig(margin_cells=0, background_share=0.0, recall=1.0, hidden=8))
    found = train_objectness(defence, scenes, steps=150, seed=0)
    assert (found.objects, found.objects_kept) == (4, 4)
    assert found.object_cells_kept == 1.0
    assert found.cells_kept < 0.2
    with pytest.raises(InvalidInput, match="needs labeled objects"):
        train_objectness(defence, [replace(s, labels=Labels.empty()) for s in scenes], steps=1, seed=0)


def test_the_command_writes_a_detector_whose_encoder_is_defended(tmp_path, capsys):
    data = tiny.prepared(tmp_path / "data")
    save_run_detector(tmp_path / "source", tiny.second_iou())
    options = Defend(detector=tmp_path / "source", data=data, out=tmp_path / "out", defences=("drop:share=0.5", "noise"), steps=1)
    command(options)
    told = " ".join(capsys.readouterr().out.split())
    assert "cells that are sent" in told
    assert f"run `upcycle3d audit --detector {tmp_path / 'source'} --settings defended=drop:share=0.5+noise`" in told
    record = json.loads((tmp_path / "out" / "defences.json").read_text())
    assert record["defences"] == "drop:share=0.5+noise"
    assert 0 < record["cells_sent"] < record["cells"]
    with pytest.raises(InvalidInput, match="already"):
        command(options)
    with pytest.raises(InvalidInput, match="without any"):
        defend_detector(tmp_path / "out", data, tmp_path / "again", [DropConfig()])


def test_what_defend_prints_can_be_given_to_it_again(tmp_path, capsys):
    data = tiny.prepared(tmp_path / "data")
    save_run_detector(tmp_path / "source", tiny.second_iou())
    configs = (DropConfig(share=0.5), NoiseConfig())
    options = Defend(
        detector=tmp_path / "source", data=data, out=tmp_path / "out", defences=(describe_defences(configs),), steps=1
    )
    command(options)
    printed = next(word for word in capsys.readouterr().out.split() if word.startswith("drop:"))
    assert parse_defences(printed) == load_detector(tmp_path / "out").config.defences == configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bottleneck:channels=4+obfuscator", "must stand before defences that change the channels"),
        ("obfuscator:channels=4+obfuscator", "must stand before defences that change the channels"),
        ("region+bottleneck:channels=999", "at most as many channels as there are"),
        ("obfuscator:channels=4+bottleneck:channels=5", "at most as many channels as there are"),
        ("none", "1 to 16 defences"),
        ("+".join(["drop"] * 17), "1 to 16 defences"),
    ],
)
def test_defences_that_cannot_be_fitted_are_refused_before_a_frame_is_read(tmp_path, text, message):
    """Oracle: the folder of frames does not exist, so only a check that comes before reading them can name the defences."""
    save_run_detector(tmp_path / "source", tiny.second_iou())
    with pytest.raises(InvalidInput, match=message):
        defend_detector(tmp_path / "source", tmp_path / "nowhere", tmp_path / "out", parse_defences(text))
    assert not (tmp_path / "out").exists()


def test_the_command_tells_objects_kept_from_cells_kept(tmp_path, capsys, monkeypatch):
    """Half of the objects' cells may be enough for all objects, so the two shares have rows of their own words."""
    found = ObjectnessReport(objects=40, objects_kept=39, object_cells_kept=0.512, cells_kept=0.1, threshold=0.2)
    outcome = DefendOutcome(
        detector=tiny.second_iou(), frames=8, cells=100.0, cells_sent=20.0, fitted=FitReport(objectness=found)
    )
    monkeypatch.setattr("upcycle3d.tools.defend.defend_detector", lambda *args, **kwargs: outcome)
    data = tiny.prepared(tmp_path / "data")
    command(Defend(detector=tmp_path, data=data, out=tmp_path, defences=("region:recall=0.95",)))
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "held-out objects of which at least one cell is sent 39 of 40 (97.5%); `recall` asked for 95.0%" in told
    assert "share of all cells inside these objects that is sent 51.2%" in told


@pytest.mark.parametrize("kind", ["second_iou", "pv_rcnn"])
def test_an_obfuscator_learns_to_serve_the_detector_and_to_tell_its_adversary_less(kind):
    detector, scans = getattr(tiny, kind)(), [tiny.scan_with_car(i) for i in range(3)]
    with torch.no_grad():
        for _ in range(40):  # an untrained encoder gives features near 0 until its batch norms have seen scans
            detector.train().encode(scans)
        scenes = [(detector.eval().encode([scan]), scan) for scan in scans]

    def trained(weight: float, steps: int) -> ObfuscatorReport:
        torch.manual_seed(0)
        defence = Obfuscator(detector.spec, ObfuscatorConfig(channels=4, keypoint_channels=4, hidden=16, sigma=0.05))
        training = ObfuscatorTraining(steps=steps, adversary_weight=weight, lr=0.01)
        return train_obfuscator(defence, detector, scenes, training, seed=0)

    begun, served, fought = trained(0.0, 5), trained(0.0, 60), trained(100.0, 60)
    assert served.detector_loss < begun.detector_loss
    assert fought.adversary_bits > served.adversary_bits
    assert served.adversary_bits < served.blind_bits


def test_the_help_of_the_command_names_every_defence():
    text = inspect.getsource(Defend)
    assert [defence_name(kind) for kind in get_args(DefenceConfig) if defence_name(kind) not in text] == []
