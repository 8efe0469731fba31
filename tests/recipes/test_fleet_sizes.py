"""A run at the fleet's object sizes: estimated in rounds, before the first step, recorded, and the same when the run is resumed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from upcycle3d.core.errors import Interrupted, InvalidInput
from upcycle3d.core.structures import Labels
from upcycle3d.perception.recipes import fleet_sizes
from upcycle3d.perception.recipes.fleet_sizes import SIZES_FILE, at_sizes_of, read_estimates, settings_at_fleet_sizes
from upcycle3d.perception.recipes.jobs import train_preset
from upcycle3d.perception.recipes.labeled_half import LabeledHalf
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.server.feature_object_database import FeatureObjectDatabase
from upcycle3d.perception.server.methods import METHODS, Method
from upcycle3d.perception.server.size_estimate import SizeEstimate
from upcycle3d.perception.training.checkpoint import latest_checkpoint
from upcycle3d.perception.training.detector_files import load_detector

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

LARGER = SizeEstimate(
    class_name="Car", labeled=(3.0, 1.6, 1.5), difference=(0.5004, 0.2, 0.1), error=(0.05, 0.05, 0.05), follows=(0.4, 0.4, 0.5),
    labeled_objects=99, fleet_objects=99, shift=(0.5004, 0.2, 0.1),
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train_preset(tiny.preset(), data, folder / "source", progress=False)
    tiny.store(folder / "fleet", load_detector(folder / "source"), [tiny.scan_with_car(seed) for seed in range(4)])
    return folder


@pytest.fixture
def estimated(monkeypatch) -> list[tuple[float, ...]]:
    """The sizes about which was asked, one per estimate. Each estimate says that the fleet's cars are longer than the last one did."""
    calls: list[tuple[float, ...]] = []

    def estimate(*_, **given):
        calls.append(given["about"])
        length = 0.5004 + 0.1 * (len(calls) - 1)
        return (replace(LARGER, difference=(length, 0.2, 0.1), shift=(length, 0.2, 0.1)),)

    monkeypatch.setattr(fleet_sizes, "estimate_sizes", estimate)
    return calls


def learn(data, runs, out, **options):
    given = {"method": "upcycling_calibrated", "progress": False, "store": runs / "fleet" / "store"} | options
    return upcycle_preset(tiny.preset(), data, runs / "source", out, **given)


def test_pasted_objects_have_the_fleets_sizes_and_the_estimate_is_printed(data, runs, tmp_path, estimated, capsys):
    learn(data, runs, tmp_path / "run")
    assert "sizes, round 1: Car: 99 objects of the fleet differ by length +0.50 ± 0.05 m" in capsys.readouterr().out
    header = json.loads((tmp_path / "run" / "feature_gt" / "database.json").read_text())
    assert header["cutting"]["size_shift"] == [0.6, 0.2, 0.1]
    database = FeatureObjectDatabase.open(
        tmp_path / "run" / "feature_gt",
        config=replace(tiny.preset().upcycle.f_gt, size_shift=(0.6, 0.2, 0.1)),
        split_fingerprint=data.open().split_fingerprint(),
        encoder_fingerprint=header["encoder_fingerprint"],
    )
    assert float(database.boxes[0, 3]) == pytest.approx(3.6)


def test_each_round_asks_a_student_that_was_trained_on_objects_of_all_sizes_around_the_last_ones(data, runs, tmp_path, estimated):
    """Each short training starts from the source model, pastes and shows resized objects, and learns no box of the teacher, who does not know
    the sizes yet. Its folder is gone afterwards."""
    trained: list[tuple[Path, int, tuple[float, ...]]] = []
    settings, source = tiny.upcycle_config(), load_detector(runs / "source")
    settings = replace(settings, sizes=replace(settings.sizes, rounds=3, round_share=0.5))
    before = {name: value.clone() for name, value in source.state_dict().items()}

    def train(model, method, at, folder):
        assert not method.estimates_sizes
        assert at.f_gt.object_scale == pytest.approx((math.exp(-0.25), math.exp(0.25)))
        assert at.f_gt.side_scale == pytest.approx((math.exp(-0.12), math.exp(0.12)))
        assert at.teacher_box_weight == 0
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        folder.mkdir()
        torch.nn.init.zeros_(next(model.decoder.parameters()))
        trained.append((folder, at.loop.total_steps, at.f_gt.size_shift))

    def sized():
        return settings_at_fleet_sizes(
            tmp_path,
            METHODS["upcycling_calibrated"],
            settings,
            source,
            data.open(),
            [],
            codec="fp16",
            seed=0,
            learn=train,
            say=print,
        )

    found = sized()
    steps = round(settings.loop.total_steps / 2)
    assert [shift for _, _, shift in trained] == [(0.0, 0.0, 0.0), (0.5, 0.2, 0.1), (0.6, 0.2, 0.1)]
    assert [count for _, count, _ in trained] == [steps] * 3
    assert estimated == [(0.0, 0.0, 0.0), (0.5, 0.2, 0.1), (0.6, 0.2, 0.1)]
    assert found.f_gt.size_shift == (0.7, 0.2, 0.1)
    assert replace(found, f_gt=settings.f_gt) == settings
    assert not any(folder.exists() for folder, _, _ in trained)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert sized() == found
    assert len(estimated) == 3


def test_the_most_precise_round_decides_for_each_class(tmp_path, monkeypatch, capsys):
    """A student that reads nothing any more must not undo what the source model read well."""
    good = replace(LARGER, difference=(0.5, 0.2, 0.1), shift=(0.5, 0.2, 0.1), error=(0.1, 0.1, 0.1))
    lost = replace(LARGER, difference=(0.8, 0.2, 0.1), shift=(0.0, 0.0, 0.0), error=(0.9, 0.9, 0.2), reason="no evidence")
    better = replace(LARGER, difference=(0.6, 0.2, 0.1), shift=(0.6, 0.2, 0.1), error=(0.05, 0.05, 0.05))
    rounds = iter([(good, good), (lost, better)])
    monkeypatch.setattr(fleet_sizes, "estimate_sizes", lambda *_, **__: next(rounds))
    found = settings_at_fleet_sizes(
        tmp_path, METHODS["upcycling_calibrated"], tiny.upcycle_config(), None, [], [],
        codec="fp16", seed=0, learn=lambda *_: None, say=print,
    )  # fmt: skip
    assert found.f_gt.size_shift == (0.5, 0.2, 0.1, 0.6, 0.2, 0.1)
    assert "labeled Car objects become +0.500, +0.200, +0.100 m larger (round 1)" in capsys.readouterr().out
    nothing = replace(lost, error=(float("nan"),) * 3)
    assert at_sizes_of(tiny.upcycle_config(), ((good,), (nothing,))).f_gt.size_shift == (0.5, 0.2, 0.1)
    assert at_sizes_of(tiny.upcycle_config(), ((nothing,), (good,))).f_gt.size_shift == (0.5, 0.2, 0.1)


def test_a_mistake_in_a_later_round_keeps_what_was_trained(data, runs, tmp_path, estimated, monkeypatch):
    """A scene that cannot be read any more, hours after the start, must not cost the estimate and the training of earlier rounds."""

    def broken(*_, **given):
        if estimated:
            raise InvalidInput("a shard is damaged")
        return real(*_, **given)

    real = fleet_sizes.estimate_sizes
    monkeypatch.setattr(fleet_sizes, "estimate_sizes", broken)
    with pytest.raises(InvalidInput, match="a shard is damaged"):
        learn(data, runs, tmp_path / "run")
    assert len(read_estimates(tmp_path / "run" / SIZES_FILE)) == 1
    assert latest_checkpoint(tmp_path / "run" / "size_round_1" / "checkpoints") is not None
    monkeypatch.setattr(fleet_sizes, "estimate_sizes", real)
    learn(data, runs, tmp_path / "run", resume=True)
    assert len(estimated) == 2


def test_true_sizes_stand_beside_the_estimate_and_change_nothing(data, runs, tmp_path, estimated):
    settings = replace(tiny.upcycle_config(), sizes=replace(tiny.upcycle_config().sizes, rounds=1))
    boxes = torch.tensor([[9.0, 0, 0, 3.25, 1.7, 1.5, 0], [9.0, 0, 0, 9.0, 9.0, 9.0, 0]])
    cars = replace(Labels.make(boxes, torch.zeros(2)), weight=torch.tensor([1.0, 0.0]))

    def sized(folder, truth):
        folder.mkdir()
        given = {"codec": "fp16", "seed": 0, "learn": lambda *_: None, "say": print, "truth": truth}
        return settings_at_fleet_sizes(folder, METHODS["upcycling_calibrated"], settings, None, [], [], **given)

    assert sized(tmp_path / "with", {"scene": cars}).f_gt.size_shift == (0.5, 0.2, 0.1)
    ((estimate,),) = read_estimates(tmp_path / "with" / SIZES_FILE)
    assert estimate.true == pytest.approx((0.25, 0.1, 0.0))
    assert "(in truth +0.25, +0.10, +0.00)" in str(estimate)
    sized(tmp_path / "without", None)
    assert read_estimates(tmp_path / "without" / SIZES_FILE)[0][0].true is None


def test_a_resumed_run_reads_its_estimates_and_makes_no_others(data, runs, tmp_path, estimated):
    learn(data, runs, tmp_path / "run", steps=2)
    learn(data, runs, tmp_path / "run", steps=4, resume=True)
    assert len(estimated) == 2
    assert [one.shift for (one,) in read_estimates(tmp_path / "run" / SIZES_FILE)] == [(0.5, 0.2, 0.1), (0.6, 0.2, 0.1)]


def test_a_short_training_that_was_stopped_goes_on_when_the_run_is_resumed(data, runs, tmp_path, estimated, monkeypatch):
    """Killed within the second round: the estimate of the first is kept, and the run ends as one that was never stopped."""

    def stop(*_, **given):
        if len(estimated):
            raise KeyboardInterrupt
        return real(*_, **given)

    real = fleet_sizes.estimate_sizes
    monkeypatch.setattr(fleet_sizes, "estimate_sizes", stop)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        learn(data, runs, tmp_path / "run")
    assert (tmp_path / "run" / "size_round_1").is_dir()
    monkeypatch.setattr(fleet_sizes, "estimate_sizes", real)
    outcome = learn(data, runs, tmp_path / "run", resume=True)
    estimated.clear()
    straight = learn(data, runs, tmp_path / "straight")
    assert not (tmp_path / "run" / "size_round_1").exists()
    pairs = zip(outcome.student.state_dict().values(), straight.student.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_round_that_would_repeat_the_last_one_is_left_out(tmp_path, monkeypatch, capsys):
    """No evidence in the first round: the second would train at the same sizes, from the same seed, and find the same."""
    nothing, trained = replace(LARGER, shift=(0.0, 0.0, 0.0), reason="no evidence"), []
    monkeypatch.setattr(fleet_sizes, "estimate_sizes", lambda *_, **__: (nothing,))
    settings = tiny.upcycle_config()
    found = settings_at_fleet_sizes(
        tmp_path, METHODS["upcycling_calibrated"], settings, None, [], [],
        codec="fp16", seed=0, learn=lambda *_: trained.append(1), say=print,
    )  # fmt: skip
    assert (found, len(trained), len(read_estimates(tmp_path / SIZES_FILE))) == (settings, 1, 1)
    assert "round 2: left out" in capsys.readouterr().out


def test_an_untrained_teacher_leaves_the_sizes_as_they_are(data, runs, tmp_path, capsys):
    """The whole way without a stand-in: too little is found, and the run says so and trains."""
    learn(data, runs, tmp_path / "run", steps=1)
    assert "sizes stay as they are" in " ".join(capsys.readouterr().out.split())
    assert all(one.shift == (0.0, 0.0, 0.0) for (one,) in read_estimates(tmp_path / "run" / SIZES_FILE))


def test_what_cannot_be_is_refused(tmp_path, data, runs, estimated):
    settings, detector = tiny.upcycle_config(), load_detector(runs / "source")
    given = replace(settings, f_gt=replace(settings.f_gt, size_shift=(0.1, 0.0, 0.0)))

    def sized(config, scenes):
        return settings_at_fleet_sizes(
            tmp_path,
            METHODS["upcycling_calibrated"],
            config,
            detector,
            data.open(),
            scenes,
            codec="fp16",
            seed=0,
            learn=None,
            say=print,
        )

    with pytest.raises(InvalidInput, match="there are none"):
        sized(settings, None)
    with pytest.raises(InvalidInput, match="one is given already"):
        sized(given, [])
    with pytest.raises(InvalidInput, match="they need smashed scenes"):
        Method(summary="x", unlabeled="none", estimates_sizes=True)
    (tmp_path / SIZES_FILE).write_text('{"rounds": [[{"class_name": 3}]]}')
    with pytest.raises(InvalidInput, match="damaged or was edited"):
        read_estimates(tmp_path / SIZES_FILE)


def test_every_other_method_keeps_its_settings(tmp_path, estimated):
    settings = tiny.upcycle_config()
    for name, method in METHODS.items():
        if name != "upcycling_calibrated":
            assert (
                settings_at_fleet_sizes(tmp_path, method, settings, None, [], None, codec="fp16", seed=0, learn=None, say=print)
                is settings
            )
    assert estimated == []


def test_a_size_shift_that_is_given_too_leaves_the_folder_free(data, runs, tmp_path, estimated):
    preset = tiny.preset()
    shifted = replace(preset, upcycle=replace(preset.upcycle, f_gt=replace(preset.upcycle.f_gt, size_shift=(0.1, 0.0, 0.0))))
    options = {"method": "upcycling_calibrated", "store": runs / "fleet" / "store", "progress": False}
    with pytest.raises(InvalidInput, match="one is given already"):
        upcycle_preset(shifted, data, runs / "source", tmp_path / "run", **options)
    assert upcycle_preset(preset, data, runs / "source", tmp_path / "run", steps=1, **options).steps == 1


def test_labeled_cars_have_the_estimated_sizes_and_no_random_ones_besides(data):
    """The source model saw cars of any size. Once the mean is known, random sizes would only hide it."""
    preset = tiny.preset()
    any_size = replace(preset.train.augmentation, object_scale=(0.5, 0.6), side_scale=(0.9, 1.1), scale=(1.0, 1.0))
    preset = replace(preset, train=replace(preset.train, augmentation=any_size))
    settings = replace(preset.upcycle, f_gt=replace(preset.upcycle.f_gt, size_shift=(0.5, 0.2, 0.1)))
    true = torch.cat([data.open()[i].labels.boxes.data[:, 3:6] for i in range(len(data.open()))])

    def lengths(method):
        frames = LabeledHalf(data=data).batches(preset, METHODS[method], settings, seed=0)(0)
        return torch.cat([frame.labels.boxes.data[:, 3] for frame in frames])

    known = {round(float(length) + 0.5, 3) for length in true[:, 0]}
    assert {round(float(length), 3) for length in lengths("upcycling_calibrated")} <= known
    assert float(lengths("upcycling").max()) < float(true[:, 0].max())


def test_labeled_objects_are_of_random_sizes_where_pasted_ones_are(data):
    """One setting for both: a detector that saw one size in scans and others pasted would learn to tell pasted objects apart."""
    settings = tiny.upcycle_config()
    settings = replace(settings, f_gt=replace(settings.f_gt, object_scale=(2.0, 2.5), size_shift=(0.5, 0.0, 0.0)))

    def lengths(method, config):
        frames = LabeledHalf(data=data).batches(tiny.preset(), METHODS[method], config, seed=0)(0)
        return torch.cat([frame.labels.boxes.data[:, 3] for frame in frames])

    true = torch.cat([data.open()[i].labels.boxes.data[:, 3] for i in range(len(data.open()))])
    low, high = 2.0 * (float(true.min()) + 0.5), 2.5 * (float(true.max()) + 0.5)
    found, world = lengths("upcycling", settings), 1.06  # the whole frame is scaled by up to 5 % besides
    assert low / world <= float(found.min()) <= float(found.max()) <= high * world
    assert float(lengths("oracle_frozen", settings).max()) <= float(true.max()) * world
