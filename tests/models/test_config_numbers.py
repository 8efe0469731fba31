"""Configurations of detectors check their numbers and names when they are made, so a file of others cannot bring absurd ones."""

import copy
import json
from dataclasses import replace

import pytest

import tiny
from upcycle3d.core.config_json import config_to_json
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.tensor_file import read_tensors, write_tensors
from upcycle3d.core.trained_on import ScanStatistics, TrainedOn
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.wire.encoder_file import load_encoder

CHANGES = [
    (("final", "score"), "nan"),
    (("final", "score"), 2.0),
    (("final", "iou"), -3.0),
    (("final", "iou"), "inf"),
    (("train_proposals", "iou"), 1.5),
    (("test_proposals", "iou"), "nan"),
    (("roi_sampling", "count"), 10**9),
    (("roi_sampling", "foreground_share"), -0.1),
    (("roi_sampling", "easy_background_iou"), "nan"),
    (("dense_weights", "box"), "nan"),
    (("dense_weights", "direction"), -1.0),
    (("iou_target",), [0.5, 0.5]),
    (("iou_target",), ["nan", 1.0]),
    (("iou_weight",), "inf"),
    (("anchors", 0, "name"), "\x1b[31mCar"),
    (("anchors", 0, "name"), "Car\n"),
    (("anchors", 0, "name"), ""),
    (("anchors", 0, "name"), "C" * 1000),
    (("anchors", 0, "size"), [1e30, 2.0, 1.0]),
    (("anchors", 0, "bottom_z"), 1e30),
]


def edited(folder, entry: str, change) -> None:
    """Change one entry of the metadata of both files in a run folder; the digest is that of the changed file."""
    for name in ("detector.safetensors", "encoder.safetensors"):
        file = read_tensors(folder / name)
        value = json.loads(file.meta[entry])
        change(value)
        meta = {key: file.meta[key] for key in ("format", "config", "trained_on") if key in file.meta} | {
            entry: json.dumps(value)
        }
        write_tensors(folder / name, file.tensors, meta)


@pytest.mark.parametrize(("where", "value"), CHANGES)
def test_a_file_with_an_absurd_number_or_name_is_refused_and_the_field_is_named(tmp_path, where, value):
    save_run_detector(tmp_path, tiny.second_iou())

    def change(config):
        if "detector" not in config:
            return
        inside = config["detector"]["decoder"]
        for key in where[:-1]:
            inside = inside[key]
        inside[where[-1]] = value

    load_detector(tmp_path)
    edited(tmp_path, "config", change)
    with pytest.raises(InvalidInput, match=r"the configuration in .*cannot be used") as error:
        load_detector(tmp_path)
    assert str(where[-1]) in str(error.value)
    assert "\x1b" not in str(error.value)


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(InvalidInput, match="name a class twice"):
        tiny.second_iou_config(anchors=(tiny.CAR_ANCHOR, tiny.CAR_ANCHOR))
    with pytest.raises(InvalidInput, match="name a class twice"):
        tiny.pv_rcnn_config(anchors=(tiny.CAR_ANCHOR, tiny.CAR_ANCHOR))
    with pytest.raises(InvalidInput, match="quality_target"):
        tiny.pv_rcnn_config(quality_target=(0.7, 0.2))


KNOWN = TrainedOn(
    rig=RigSpec(z_shift=1.73),
    feature_names=("intensity",),
    classes=("Car",),
    point_range=tiny.GRID.range,
    scans=ScanStatistics(scans=3, points=550.0, cells=400.5, ground_height=float("nan"), intensity=0.25),
)


@pytest.mark.parametrize(
    "changed",
    [
        {"point_range": [0, 0, 0, 0, 0, 0]},
        {"point_range": [0, 0, 0, "inf", 1, 1]},
        {"point_range": [0.0, -6.4, -1.0, 50.0, 6.4, 3.0]},
        {"feature_names": ["a"] * 100_000},
        {"feature_names": [f"f{i}" for i in range(100_000)]},
        {"feature_names": ["\x1b[31m"]},
        {"rig": {"z_shift": 1e30, "intensity_scale": 1.0}},
        {"rig": {"z_shift": "nan", "intensity_scale": 1.0}},
        {"classes": ["Car\n"]},
        *({"scans": {"ground_height": value}} for value in ("inf", -1e30)),
        *({"scans": {"cells": value}} for value in (1e308, -1, "inf")),
        *({"scans": {"points": value}} for value in (-5, 1e30)),
        {"scans": {"intensity": "inf"}},
        {"scans": {"scans": -1}},
    ],
)
def test_absurd_words_about_the_training_are_refused_in_both_files(tmp_path, changed):
    model = tiny.second_iou()
    model.trained_on = KNOWN
    save_run_detector(tmp_path, model)

    def change(trained):
        for name, value in copy.deepcopy(changed).items():
            trained[name] = trained[name] | value if name == "scans" else value

    edited(tmp_path, "trained_on", change)
    for load in (load_detector, load_encoder):
        with pytest.raises(InvalidInput, match="says about its training") as error:
            load(tmp_path)
        assert "\x1b" not in str(error.value)
        assert len(str(error.value)) < 2000


@pytest.mark.parametrize("classes", [["Pedestrian"], [], ["Car", "Van"]])
def test_a_detector_whose_training_had_other_classes_is_refused(tmp_path, classes):
    model = tiny.second_iou()
    model.trained_on = KNOWN
    save_run_detector(tmp_path, model)
    edited(tmp_path, "trained_on", lambda trained: trained.update(classes=classes))
    with pytest.raises(InvalidInput, match=r"belongs to another network: its classes are .*, and the network has Car"):
        load_detector(tmp_path)


def test_a_training_without_a_point_feature_that_the_network_reads_is_refused():
    with pytest.raises(InvalidInput, match="the network reads elongation too"):
        KNOWN.check_fits("a file", point_range=KNOWN.point_range, features=("intensity", "elongation"))


def test_unknown_values_stay_legal():
    unknown = ScanStatistics(scans=0, points=float("nan"), cells=float("nan"), ground_height=float("nan"), intensity=float("nan"))
    known = replace(KNOWN, scans=unknown, feature_names=())
    assert repr(TrainedOn.from_json(config_to_json(known))) == repr(known)
