"""The jobs that users start: what is wrong with their arguments is said before a run folder is taken."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import tiny_layouts
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.recipes import assembly, jobs, labeled_half
from upcycle3d.perception.recipes.experiment_data import SimulationSize, simulated_adaptation
from upcycle3d.perception.recipes.job_inputs import find_data
from upcycle3d.perception.recipes.own_classes import preset_for_classes
from upcycle3d.perception.recipes.presets import SMALL
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.server.methods import METHODS, method_record
from upcycle3d.perception.server.pseudo_labels import hybrid_labels, trusted_labels
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.wire.encoder_file import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

WRONG = [
    ({"seed": -1}, "seed must be a whole number of at least 0, found -1"),
    ({"workers": -2}, "workers must be a whole number of at least 0, found -2"),
    ({"steps": 0}, "steps must be a whole number of at least 1, found 0"),
    ({"steps": "3"}, "steps must be a whole number of at least 1, found '3'"),
    ({"device": "cuda:99"}, "no device 'cuda:99'"),
    ({"device": "foo"}, "'foo' is not a device"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSplit:
    size = SimulationSize(labeled=2, fleet=1, validation=1)
    folder = tmp_path_factory.mktemp("data")
    return simulated_adaptation(folder, "waymo", "lyft", size=size, seed=0, classes=("Car",), workers=1).labeled


@pytest.fixture(scope="module")
def source(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "source"
    jobs.train_preset(SMALL, data, folder, steps=1, progress=False)
    return folder


def test_a_training_writes_into_its_files_what_it_knew_about_its_data(data, source):
    frames = data.open()
    for known in (load_detector(source).trained_on, load_encoder(source).trained_on):
        assert known is not None
        assert (known.rig, known.feature_names, known.classes) == (frames.rig, frames.feature_names, ("Car",))
        assert known.point_range == SMALL.detector.encoder.grid.range
        assert known.scans is not None
        assert known.scans.scans == len(frames) == 2
        assert 0 < known.scans.cells <= known.scans.points
        assert abs(known.scans.ground_height) < 0.5


def test_upcycling_warns_of_labeled_data_with_another_rig_or_road_than_in_training(data, source, tmp_path):
    detector = load_detector(source)
    known = detector.trained_on
    assert known is not None
    scans = known.scans
    assert scans is not None
    other = replace(
        known, rig=RigSpec(z_shift=1.7), scans=replace(scans, ground_height=scans.ground_height + 1.73, intensity=0.0)
    )
    detector.trained_on = other
    save_run_detector(tmp_path / "other", detector)
    with pytest.warns(UserWarning, match="the training had z_shift") as said:
        outcome = upcycle_preset(
            SMALL, data, tmp_path / "other", tmp_path / "run", method="source_continued", steps=1, progress=False
        )
    texts = [str(warning.message) for warning in said]
    assert sum("the training had z_shift 1.7" in text for text in texts) == 1
    assert sum("the road lies at z =" in text for text in texts) == 1
    assert outcome.student.trained_on == other
    assert load_detector(tmp_path / "run" / "teacher.safetensors").trained_on == other


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_training_refuses_wrong_options_and_leaves_the_folder_free(data, tmp_path, wrong, message):
    with pytest.raises(InvalidInput, match=message):
        jobs.train_preset(SMALL, data, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *WRONG,
        ({"codec": "fp9"}, "unknown codec 'fp9'"),
        ({"method": None}, "a method is given by its name or as a Method"),
        ({"truth": ("nowhere.json", "nowhere")}, "nowhere"),
    ],
)
def test_upcycling_refuses_wrong_options_and_leaves_the_folder_free(data, source, tmp_path, wrong, message):
    with pytest.raises(InvalidInput, match=message):
        upcycle_preset(SMALL, data, source, tmp_path / "run", **{"method": "source_only", **wrong})
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_own_method_is_resumed_with_the_same_functions_only(data, source, tmp_path):
    def upcycle(method, *, resume=False):
        upcycle_preset(SMALL, data, source, tmp_path, method=method, steps=1, resume=resume, progress=False)

    own = replace(METHODS["source_continued"], summary="mine", label_rule=hybrid_labels)
    upcycle(own)
    upcycle(own, resume=True)
    with pytest.raises(InvalidInput, match=r"method\.label_rule: stored .*hybrid_labels', now .*trusted_labels'"):
        upcycle(replace(own, label_rule=trusted_labels), resume=True)
    with pytest.raises(InvalidInput, match=r"method\.trains: stored 'decoder', now 'all'"):
        upcycle(replace(own, trains="all"), resume=True)


def test_the_record_of_a_method_names_functions_and_the_arguments_of_partial_ones():
    @dataclass
    class Rule:
        share: float

        def __call__(self, predictions, config):
            return hybrid_labels(predictions, config)

    rule = partial(hybrid_labels, config=METHODS, limit=0.5)
    found = method_record(replace(METHODS["f_rot"], label_rule=rule, augmentation=Rule(1.0)))
    assert found["label_rule"] == "upcycle3d.perception.server.pseudo_labels.hybrid_labels(config=<dict>, limit=0.5)"
    assert found["augmentation"].endswith("<locals>.Rule")
    assert found["mixing"] is None
    assert found["max_paste_rotation"] == METHODS["f_rot"].max_paste_rotation


class Stopped(Exception):
    """The test has seen enough."""


@pytest.mark.parametrize(("method", "shifted"), [("source_continued", True), ("oracle_frozen", False), ("oracle_full", False)])
def test_only_source_labels_get_the_size_shift_of_f_gt(data, source, tmp_path, monkeypatch, method, shifted):
    """The oracles' labels come from the target, so their boxes have the target's sizes already."""
    shift = (0.9, 0.2, 0.1)
    preset = replace(SMALL, upcycle=replace(SMALL.upcycle, f_gt=replace(SMALL.upcycle.f_gt, size_shift=shift)))
    seen = []

    def stop(*arguments, size_shift, **rest):
        seen.append(size_shift)
        raise Stopped

    monkeypatch.setattr(labeled_half, "labeled_batches", stop)
    with pytest.raises(Stopped):
        upcycle_preset(preset, data, source, tmp_path, method=method)
    assert seen == [shift if shifted else (0.0, 0.0, 0.0)]


def test_a_folder_given_as_a_path_is_not_searched_for_a_colon():
    assert find_data(Path("day:1"), "train") == DataSplit(root=Path("day:1"), name="train")
    assert find_data("day:1", "train") == DataSplit(root=Path("day"), name="1")
    with pytest.raises(InvalidInput, match="data is a text DIR"):
        find_data(torch.zeros(1), "train")


def test_case_of_class_names_matters_neither_for_a_preset_nor_for_classes(tmp_path, capsys):
    raw = tiny_layouts.kitti(tmp_path / "raw")
    assert tiny_layouts.prepare(capsys, "kitti", raw, tmp_path / "out", "--classes", "car", "--z-shift", "1.73")[0] == 0
    frames = PreparedDataset(tmp_path / "out")
    assembly.check_classes(SMALL, frames)
    assert preset_for_classes(SMALL, frames, ["CAR"]).detector.class_names == ("car",)
    with pytest.raises(InvalidInput, match="was prepared for the classes car, and --classes asks for Truck"):
        preset_for_classes(SMALL, frames, ["Truck"])
    jobs.train_preset(SMALL, f"{tmp_path}/out:train", tmp_path / "run", steps=1, progress=False)


def test_classes_with_too_few_objects_are_no_remedy_for_a_preset_of_other_classes(tmp_path, capsys):
    raw = tiny_layouts.kitti(tmp_path / "raw")
    assert tiny_layouts.prepare(capsys, "kitti", raw, tmp_path / "out")[0] == 0
    with pytest.raises(InvalidInput, match=r"prepare it again into another folder with --classes Car\.") as refused:
        assembly.check_classes(SMALL, PreparedDataset(tmp_path / "out"))
    assert "too few objects of Pedestrian, Cyclist" in str(refused.value)
    assert "--classes Car Pedestrian" not in str(refused.value)
