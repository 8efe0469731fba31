"""A few labeled frames of the target: their share of the labeled half, their objects to paste, and what a run records of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.batches import LabeledBatches, SharedBatches
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.prepare import prepare
from upcycle3d.perception.recipes.job_start import JobStart
from upcycle3d.perception.recipes.jobs import train_preset
from upcycle3d.perception.recipes.labeled_half import LabeledHalf, TargetLabels
from upcycle3d.perception.recipes.training_frames import shared_frames_note
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.recipes.validation import Validation
from upcycle3d.perception.server.feature_gt import JoinedObjects
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.tools import upcycle
from upcycle3d.tools.console import run_command

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> DataSplit:
    """Two labeled frames of another place."""
    frames = [replace(tiny.frame_with_car(seed), id=f"asked{seed}") for seed in (30, 31, 32, 33)]
    root = tmp_path_factory.mktemp("asked") / "prepared"
    ids = [frame.id for frame in frames]
    prepare(frames, ids, root, splits={"train": ids[:2], "val": ids[2:]}, classes=("Car",), workers=0)
    return DataSplit(root=root, name="train")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train_preset(tiny.preset(), data, folder / "source", progress=False)
    tiny.store(folder / "fleet", load_detector(folder / "source"), [tiny.scan_with_car(seed) for seed in range(4)])
    return folder


def learn(data, runs, out, **options):
    given = {"method": "upcycling", "progress": False, "store": runs / "fleet" / "store"} | options
    return upcycle_preset(tiny.preset(), data, runs / "source", out, **given)


def numbered(count: int, name: str) -> LabeledBatches:
    frames = [replace(tiny.frame_with_car(0), id=f"{name}{i}") for i in range(count)]
    augmentation = tiny.preset().train.augmentation
    return LabeledBatches(
        frames=frames, batch_size=1, seed=0, augmentation=augmentation, keep_range=(-50.0, -50.0, -5.0, 50.0, 50.0, 5.0)
    )


@pytest.mark.parametrize(("share", "batch"), [(0.5, 2), (0.25, 2), (0.3, 3), (1.0, 2), (0.0, 2)])
def test_the_share_of_the_target_is_exact_and_each_split_is_drawn_in_epochs(share, batch):
    batches = SharedBatches(first=numbered(5, "s"), second=numbered(3, "t"), batch_size=batch, share=share)
    drawn = [frame.id for step in range(60) for frame in batches(step)]
    target = [name for name in drawn if name.startswith("t")]
    assert len(drawn) == 60 * batch
    assert abs(len(target) - share * len(drawn)) < 1
    for name, count in (("s", 5), ("t", 3)):
        own = [each for each in drawn if each.startswith(name)]
        for first in range(0, len(own) - count + 1, count):
            assert len(set(own[first : first + count])) == count
    for step in range(60):
        assert abs(sum(frame.id.startswith("t") for frame in batches(step)) - share * batch) < 1


def test_a_batch_depends_on_its_step_alone():
    batches = SharedBatches(first=numbered(4, "s"), second=numbered(2, "t"), batch_size=2, share=0.5)
    for step in (7, 0, 7):
        again = SharedBatches(first=numbered(4, "s"), second=numbered(2, "t"), batch_size=2, share=0.5)(step)
        for one, other in zip(batches(step), again, strict=True):
            assert one.id == other.id
            assert torch.equal(one.points.xyz, other.points.xyz)


def test_parts_of_other_batch_sizes_and_shares_above_one_are_refused():
    with pytest.raises(InvalidInput, match="one at a time"):
        SharedBatches(first=replace(numbered(2, "s"), batch_size=2), second=numbered(2, "t"), batch_size=2, share=0.5)
    with pytest.raises(InvalidInput, match="a share in"):
        SharedBatches(first=numbered(2, "s"), second=numbered(2, "t"), batch_size=2, share=1.5)
    with pytest.raises(InvalidInput, match="share"):
        TargetLabels(data=DataSplit(root=Path("x"), name="train"), share=0.0)


def test_joined_objects_are_those_of_each_database_in_order(pasted_of):
    one, other = pasted_of
    joined = JoinedObjects([one, other])
    assert len(joined) == len(one) + len(other)
    for index in range(len(joined)):
        wanted = one[index] if index < len(one) else other[index - len(one)]
        assert torch.equal(joined[index].features, wanted.features)
        assert torch.equal(joined.boxes[index], wanted.box)
        assert int(joined.classes[index]) == wanted.class_index
    for outside in (-1, len(joined)):
        with pytest.raises(IndexError):
            joined[outside]


@pytest.fixture(scope="module")
def pasted_of(data, asked, runs, tmp_path_factory):
    folder, detector = tmp_path_factory.mktemp("objects"), load_detector(runs / "source")
    config = tiny.upcycle_config()
    return [
        LabeledHalf(data=split).objects_to_paste(folder / str(i), detector, config, codec="fp16")
        for i, split in enumerate((data, asked))
    ]


def test_a_size_shift_touches_the_source_and_never_the_target(data, asked, runs, tmp_path):
    """The target's own objects have the target's sizes already."""
    half = LabeledHalf(data=data, target=TargetLabels(data=asked))
    base = tiny.upcycle_config()
    shifted = replace(base, f_gt=replace(base.f_gt, size_shift=(0.5, 0.2, 0.1)))
    detector, preset = load_detector(runs / "source"), tiny.preset()
    plain, moved = (
        half.objects_to_paste(tmp_path / name, detector, c, codec="fp16") for name, c in (("a", base), ("b", shifted))
    )
    sources = len(data.open())
    grown = moved.boxes[:, 3:6] - plain.boxes[:, 3:6]
    torch.testing.assert_close(grown[:sources], torch.tensor([[0.5, 0.2, 0.1]]).expand(sources, 3))
    assert torch.equal(grown[sources:], torch.zeros_like(grown[sources:]))
    still = replace(preset.train.augmentation, scale=(1.0, 1.0))
    preset = replace(preset, train=replace(preset.train, augmentation=still, gt_sampling=()))
    sizes: dict[bool, set[float]] = {True: set(), False: set()}
    for step in range(4):
        for frame in half.batches(preset, METHODS["upcycling"], shifted, seed=0)(step):
            sizes[frame.id.startswith("asked")] |= {round(float(x), 3) for x in frame.labels.boxes.data[:, 3]}
    length = float(tiny.frame_with_car(0).labels.boxes.data[0, 3])
    assert sizes == {True: {round(length, 3)}, False: {round(length + 0.5, 3)}}


def test_the_command_learns_from_the_target_and_says_so(data, asked, runs, tmp_path):
    words = ["small", "--data", data.root, "--detector", runs / "source", "--store", runs / "fleet" / "store", "--workers", 0]
    words += [
        "--target-labels",
        asked.root,
        "--target-share",
        0.25,
        "--out",
        tmp_path / "run",
        "--steps",
        2,
        "--json",
        tmp_path / "j",
    ]
    assert run_command(upcycle.command, [*map(str, words)], parsed_as=upcycle.ARGUMENTS) == 0
    found = json.loads((tmp_path / "j").read_text())
    assert (found["labeled"], found["target_labels"]) == (4, 2)
    record = RunFolder.open(tmp_path / "run").config_json()
    assert record["target_share"] == 0.25
    assert record["target_labels"]["root"] == str(asked.root.resolve())
    assert (tmp_path / "run" / "feature_gt_target").is_dir()


def test_labels_of_the_target_change_the_training(data, asked, runs, tmp_path):
    without, few = (learn(data, runs, tmp_path / name, target_labels=t) for name, t in (("a", None), ("b", asked)))
    assert (without.target_frames, few.target_frames) == (0, 2)
    one, other = without.student.state_dict(), few.student.state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_resumed_with_the_same_target_labels_wherever_they_lie(data, asked, runs, tmp_path):
    learn(data, runs, tmp_path / "run", target_labels=asked, steps=2)
    with pytest.raises(InvalidInput, match=r"target_labels|target frames"):
        learn(data, runs, tmp_path / "run", target_labels=replace(asked, name="val"), resume=True)
    with pytest.raises(InvalidInput):
        learn(data, runs, tmp_path / "run", resume=True)
    moved = replace(asked, root=asked.root.rename(tmp_path / "moved"))
    try:
        assert learn(data, runs, tmp_path / "run", target_labels=moved, steps=4, resume=True).steps == 4
    finally:
        moved.root.rename(asked.root)


def test_scores_on_the_labeled_target_frames_are_told_to_be_too_good(data, asked, runs, tmp_path):
    learn(data, runs, tmp_path / "run", target_labels=asked)
    note = shared_frames_note(tmp_path / "run", asked.open())
    assert note is not None
    assert "2 of 2 frames were also in the training" in note
    starts: list[JobStart] = []
    learn(
        data, runs, tmp_path / "watched", target_labels=asked, validate=Validation(data=asked, every=100), on_start=starts.append
    )
    assert any("also in the training split" in text for text in starts[0].notes)
