"""``upcycle3d adapt detector``: a detector, source labels and target scans in; detections, numbers and a report out."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Frame, Labels, PointCloud
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.adapt.detection.open_set import OpenSetConfig, baselines
from upcycle3d.perception.adapt.detection.proposal_collection import collect_from_frames
from upcycle3d.perception.adapt.detection.proposal_file import load_proposals
from upcycle3d.perception.adapt.detection.proposals import ProposalSelection
from upcycle3d.perception.models.anchors import AnchorClass
from upcycle3d.perception.models.decoders.bev import BevBackboneConfig
from upcycle3d.perception.models.decoders.second_iou import SecondIouConfig
from upcycle3d.perception.models.encoders.second import SecondEncoderConfig
from upcycle3d.perception.models.post_processing import ProposalNms
from upcycle3d.perception.models.second_iou import SecondIouDetectorConfig
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.training.detector_files import save_detector
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.shards import ShardWriter
from upcycle3d.tools import adapt_detector
from upcycle3d.tools.console import run_command

GRID = VoxelGrid(range=(0.0, -6.4, -1.0, 12.8, 6.4, 3.0), voxel_size=(0.1, 0.1, 0.1))
NAMES = ("Car", "Pedestrian")
TINY = SecondIouDetectorConfig(
    encoder=SecondEncoderConfig(grid=GRID, point_features=(), channels=(4, 8, 8, 8, 16)),
    decoder=SecondIouConfig(
        anchors=(
            AnchorClass(name="Car", size=(1.6, 0.8, 1.6), bottom_z=0.0, matched=0.55, unmatched=0.40),
            AnchorClass(name="Pedestrian", size=(0.8, 0.8, 1.7), bottom_z=0.0, matched=0.35, unmatched=0.2),
        ),
        bev=BevBackboneConfig(layers=(1, 1), channels=(16, 16), up_channels=(16, 16)),
        head_channels=16,
        pool_size=3,
        test_proposals=ProposalNms(pre=256, iou=0.3, post=40),
    ),
)
FAST = ("--classifier.epochs", "2", "--classifier.width", "8", "--epochs", "2", "--proposals.score", "0.0")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scan(seed: int) -> Frame:
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(500, 3, generator=generator) * torch.tensor([12.0, 12.0, 1.5]) - torch.tensor([0.0, 6.0, 0.0])
    return Frame(id=f"{seed:06d}", points=PointCloud(xyz=xyz, features=torch.zeros(len(xyz), 1)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with random weights, and scans labelled by its own proposals: every second is an object, the rest background."""
    folder = tmp_path_factory.mktemp("adapt_detector")
    torch.manual_seed(0)
    detector = TINY.build().eval()
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
    extractor = Extractor(detector.encoder, RigSpec(), "fp16")
    with ShardWriter(folder / "shards", spec=extractor.spec, fingerprint=extractor.fingerprint, codec="fp16") as writer:
        extract([lambda f=f: f.points for f in frames[3:]], extractor, writer)
    (folder / "no_shards").mkdir()
    for incoming, store in (("shards", "store"), ("no_shards", "empty_store")):
        ingest(folder / incoming, folder / store, expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
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
    assert run(*source, "--target-store", root / "store", "--out", tmp_path / "a") == 0
    assert len(list((tmp_path / "a" / "detections").glob("*.json"))) == 3
    assert load_proposals(tmp_path / "a" / "target_proposals.safetensors").points is None
    assert run(*usual(root, tmp_path / "b")) == 0
    with_points = tmp_path / "b" / "classifier.safetensors"
    arguments = ("--detector", root / "run", "--trained", with_points, "--target-store", root / "store", *FAST)
    assert run(*arguments, "--out", tmp_path / "c") == 2
    assert "smashed scenes hold no points" in " ".join(capsys.readouterr().err.split())


def test_mistakes_become_sentences_before_anything_is_computed(root: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    base, target = ("--detector", root / "run", "--out", out, *FAST), ("--target", f"{root}/target:train")
    source = ("--source", f"{root}/source:train")
    for arguments, words in (
        ((*base, *source), "give the target either"),
        ((*base, *target), "give the source either"),
        ((*base, *source, *target, "--target-store", root / "store"), "give the target either"),
        ((*base, *source, "--target-store", root / "store", "--target-labels-for-metrics"), "have no labels"),
        ((*base, *source, "--target-store", root / "empty_store"), "holds no scene of the encoder"),
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
