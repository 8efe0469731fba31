"""`upcycle3d adapt detector` and `adapt_detector`: a detector, source labels and target scans in; detections, numbers and a report out."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Labels
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.adapt.detection.class_map import map_by_name
from upcycle3d.perception.adapt.detection.open_set import OpenSetConfig, baselines
from upcycle3d.perception.adapt.detection.proposal_classifier import ClassifierConfig
from upcycle3d.perception.adapt.detection.proposal_collection import collect_from_frames
from upcycle3d.perception.adapt.detection.proposal_file import load_proposals
from upcycle3d.perception.adapt.detection.proposals import ProposalSelection
from upcycle3d.perception.models.post_processing import ProposalNms
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.training.detector_files import load_detector, save_detector
from upcycle3d.tools import adapt_detector
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("Car", "Pedestrian")
CONFIG = tiny.second_iou_config(
    anchors=(replace(tiny.CAR_ANCHOR, size=(1.6, 0.8, 1.6)), tiny.PEDESTRIAN_ANCHOR),
    test_proposals=ProposalNms(pre=256, iou=0.3, post=40),
)
FAST = ("--classifier.epochs", "2", "--classifier.width", "8", "--epochs", "2", "--proposals.score", "0.0")


def scan(seed: int) -> Frame:
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(500, 3, generator=generator) * torch.tensor([12.0, 12.0, 1.5]) - torch.tensor([0.0, 6.0, 0.0])
    return Frame(id=f"{seed:06d}", points=tiny.cloud(xyz))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with random weights, and scans labeled by its own proposals: every second is an object, the rest background."""
    folder = tmp_path_factory.mktemp("adapt_detector")
    detector = tiny.second_iou(CONFIG).eval()
    save_detector(folder / "run" / "detector.safetensors", detector)
    frames = [scan(s) for s in range(6)]
    found = collect_from_frames(detector, frames, ProposalSelection(score=0.0), data="x")
    for name, classes, part in (("source", NAMES, range(3)), ("target", (*NAMES, "Animal"), range(3, 6))):
        labeled = []
        for i in part:
            boxes = found.of_frame(i).boxes.data[::2]
            labels = Labels.make(boxes, torch.arange(len(boxes)) % len(classes))
            labeled.append(replace(frames[i], labels=labels, rig=RigSpec(z_shift=0.5)))
        ids = [f.id for f in labeled]
        prepare(labeled, ids, folder / name, splits={"train": ids}, classes=classes, workers=0)
    tiny.store(folder / "fleet", detector, [f.points for f in frames[3:]])
    (folder / "empty").mkdir()
    tiny.store(folder / "empty", detector, [])
    return folder


def run(*arguments: object) -> int:
    return run_command(adapt_detector.command, [str(a) for a in arguments])


def usual(root: Path, out: Path) -> tuple[object, ...]:
    return (
        "--detector",
        root / "run",
        "--source",
        f"{root}/source:train",
        "--target",
        f"{root}/target:train",
        "--out",
        out,
        *FAST,
    )


def test_detections_numbers_and_a_report_are_written_and_labels_decide_nothing(root: Path, tmp_path: Path, capsys):
    assert run(*usual(root, tmp_path / "a"), "--target-labels-for-metrics") == 0
    assert run(*usual(root, tmp_path / "b")) == 0
    names = [f"{i:06d}.json" for i in range(3, 6)]
    for name in names:
        first = (tmp_path / "a" / "detections" / name).read_text()
        assert first == (tmp_path / "b" / "detections" / name).read_text()
        assert all({"class", "score", "unknown", "unknown_score", "x", "yaw"} <= record.keys() for record in json.loads(first))
    proposals = load_proposals(tmp_path / "a" / "target_proposals.safetensors")
    records = json.loads((tmp_path / "a" / "detections" / names[0]).read_text())
    assert records[0]["z"] == pytest.approx(float(proposals.boxes[0, 2]) - 0.5, abs=1e-3)  # the sensor's frame
    measured, blind = (json.loads((tmp_path / x / "result.json").read_text()) for x in "ab")
    assert list(measured["metrics"]) == [*baselines(OpenSetConfig()), "adapted"]
    assert set(measured["metrics"]["adapted"]["private"]) == {"Animal"}
    assert blind["metrics"] == {}
    assert measured["threshold"] == blind["threshold"]
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "FPR95" in page
    assert "FPR95" not in (tmp_path / "b" / "report.html").read_text()
    capsys.readouterr()
    assert run(*usual(root, tmp_path / "a")) == 0  # goes on from its cached proposals and classifier
    assert "proposals on the" not in capsys.readouterr().out


def test_without_the_source_its_classifier_is_enough(root: Path, tmp_path: Path):
    assert run(*usual(root, tmp_path / "a")) == 0
    target = ("--detector", root / "run", "--target", f"{root}/target:train", *FAST)
    assert run(*target, "--trained", tmp_path / "a" / "classifier.safetensors", "--out", tmp_path / "b") == 0
    for name in ("detections/000003.json", "result.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_a_fleets_smashed_scenes_are_a_target(root: Path, tmp_path: Path, capsys):
    source = ("--detector", root / "run", "--source", f"{root}/source:train", *FAST)
    assert run(*source, "--target-store", root / "fleet" / "store", "--out", tmp_path / "a") == 0
    assert len(list((tmp_path / "a" / "detections").glob("*.json"))) == 3
    assert load_proposals(tmp_path / "a" / "target_proposals.safetensors").points is None
    assert run(*usual(root, tmp_path / "b")) == 0
    with_points = tmp_path / "b" / "classifier.safetensors"
    arguments = ("--detector", root / "run", "--trained", with_points, "--target-store", root / "fleet" / "store", *FAST)
    assert run(*arguments, "--out", tmp_path / "c") == 2
    assert "smashed scenes hold no points" in " ".join(capsys.readouterr().err.split())


def test_mistakes_become_sentences_before_anything_is_computed(root: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    base, target = ("--detector", root / "run", "--out", out, *FAST), ("--target", f"{root}/target:train")
    source = ("--source", f"{root}/source:train")
    for arguments, words in (
        ((*base, *source), "give the target either"),
        ((*base, *target), "give the source either"),
        ((*base, *source, *target, "--target-store", root / "fleet" / "store"), "give the target either"),
        ((*base, *source, "--target-store", root / "fleet" / "store", "--target-labels-for-metrics"), "have no labels"),
        ((*base, *source, "--target-store", root / "empty" / "store"), "holds no scene of the encoder"),
        ((*base, *source, *target, "--target-labels-for-metrics", "--class-map", "Horse=unknown"), "found Horse"),
        ((*base, *source, *target, "--target-labels-for-metrics", "--class-map", "Animal"), "NAME=MEANING"),
        ((*base, *source, *target, "--target-labels-for-metrics", "--class-map", "Animal=Lorry"), "map to nothing known"),
        (
            (*base, *source, *target, "--target-labels-for-metrics", "--classes-of", "waymo", "kitti"),
            "says nothing about Animal",
        ),
        ((*base, *source, "--target", f"{root}/target:none"), "has no split"),
        ((*base, "--trained", root / "run" / "detector.safetensors", *target), "is not a proposal classifier"),
    ):
        assert run(*arguments) == 2, words
        assert words in " ".join(capsys.readouterr().err.split()), words
    assert not out.exists()


def test_a_class_map_changes_what_is_private(root: Path, tmp_path: Path):
    arguments = (*usual(root, tmp_path / "a"), "--target-labels-for-metrics", "--class-map", "Animal=ignore")
    assert run(*arguments) == 0
    metrics = json.loads((tmp_path / "a" / "result.json").read_text())["metrics"]["adapted"]
    assert metrics["private"] == {}
    assert metrics["matched"]["h"] is None


def test_other_options_do_not_overwrite_a_folders_proposals(root: Path, tmp_path: Path, capsys):
    assert run(*usual(root, tmp_path / "a")) == 0
    before = (tmp_path / "a" / "source_proposals.safetensors").read_bytes()
    assert run(*usual(root, tmp_path / "a"), "--proposals.most", "3") == 2
    assert "another selection" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "a" / "source_proposals.safetensors").read_bytes() == before
    assert len(PreparedDataset(root / "target", "train")) == 3


def test_the_example_of_the_page_runs_and_a_store_is_a_target_from_python_too(root: Path, tmp_path: Path, monkeypatch, capsys):
    page = (Path(upcycle3d.__file__).parent / "docs" / "adapt.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "upcycle3d.adapt(" in block)
    (tmp_path / "runs").mkdir()
    for name, target in (("runs/source", "run"), ("waymo_prepared", "source"), ("kitti_prepared", "target")):
        (tmp_path / name).symlink_to(root / target)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/adapt.md", "exec"), names)
    assert "proposals are unknown" in capsys.readouterr().out
    assert names["found"].measured is None
    assert len(list((tmp_path / "adapted" / "detections").glob("*.json"))) == 3
    detector = load_detector(root / "run")
    with pytest.raises(InvalidInput, match="smashed scenes hold no points"):
        adapt_detector.adapt_detector(
            detector, SmashedStore(root / "fleet" / "store"), tmp_path / "fleet", source=names["found"].classifier
        )
    with pytest.raises(InvalidInput, match="smashed scenes have no labels"):
        adapt_detector.adapt_detector(
            detector,
            SmashedStore(root / "fleet" / "store"),
            tmp_path / "fleet",
            source=names["found"].classifier,
            class_map=map_by_name(NAMES, NAMES),
        )


def test_the_labels_of_the_target_measure_from_python_too(root: Path, tmp_path: Path):
    found = adapt_detector.adapt_detector(
        root / "run",
        root / "target",
        tmp_path,
        source=str(root / "source"),
        class_map=map_by_name(NAMES, (*NAMES, "Animal")),
        selection=ProposalSelection(score=0.0),
        classifier=ClassifierConfig(width=8, epochs=2),
    )
    assert found.measured is not None
    assert found.measured.adapted.threshold == found.adapted.classified.threshold
    assert json.loads((tmp_path / "result.json").read_text())["metrics"].keys() == found.measured.reports.keys()
    with pytest.raises(InvalidInput, match="says nothing about Animal"):
        adapt_detector.adapt_detector(
            root / "run", root / "target", tmp_path, source=found.classifier, class_map=map_by_name(NAMES, NAMES)
        )


def test_a_detector_of_one_class_is_refused_before_any_proposal_is_computed(tmp_path):
    with pytest.raises(InvalidInput, match="this detector knows one class, Car, and unknown scores of proposals need two"):
        upcycle3d.adapt(tiny.second_iou().eval(), f"{tmp_path}/nowhere", tmp_path / "out", source=f"{tmp_path}/nowhere")
    assert not (tmp_path / "out").exists()
