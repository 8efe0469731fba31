"""NaN and infinite values that arise before there is a loss: one sentence names where they begin, and good weights are kept."""

from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput, NonFiniteValue
from upcycle3d.perception.evaluation.detect import detect_frames
from upcycle3d.perception.models.non_finite import first_broken_weight, name_non_finite
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.trainer import upcycle
from upcycle3d.perception.training.checkpoint import latest_checkpoint, list_checkpoints
from upcycle3d.perception.training.loop import LoopConfig, NonFiniteLoss
from upcycle3d.perception.training.optim import OneCycle
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.training.supervised import train_supervised

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LoopConfig(seed=0, optim=OneCycle(lr=0.001, total_steps=4), log_every=1, checkpoint_every=1, keep_checkpoints=1)


def frames_at(step):
    return (tiny.frame_with_car(step), tiny.frame_with_car(step + 50))


def poison(detector, value=float("nan"), part="decoder"):
    weight = next(p for n, p in detector.named_parameters() if n.startswith(part) and p.ndim > 1)
    with torch.no_grad():
        weight.view(-1)[0] = value
    return next(n for n, p in detector.named_parameters() if p is weight)


def test_a_learning_rate_that_no_weight_survives_is_refused_before_anything_starts():
    for lr in (1e20, 11.0, float("inf")):
        with pytest.raises(InvalidInput, match=r"a learning rate of .* is absurd.* at most 10 "):
            OneCycle(lr=lr, total_steps=4)
    with pytest.raises(InvalidInput, match="lr > 0"):
        OneCycle(lr=float("nan"), total_steps=4)


@pytest.mark.parametrize("part", ["encoder", "decoder.bev_backbone", "decoder.roi_head"])
def test_training_with_a_weight_that_is_nan_names_it_with_step_and_frames(tmp_path, part):
    detector = tiny.second_iou()
    name = poison(detector, part=part)
    run = RunFolder.create(tmp_path / "run", CONFIG, seed=0, tracker="none")
    with run, pytest.raises(NonFiniteLoss) as stopped:
        train_supervised(detector, frames_at, CONFIG, run=run, progress=False)
    said = str(stopped.value)
    assert "stopped at step 0" in said
    assert "frames: frame0, frame50" in said
    assert name in said or "'iou' is not finite" in said
    assert "The weights are broken" in said
    assert run.status()["state"] == "failed"
    assert run.status()["message"] == said
    assert latest_checkpoint(run.checkpoints) is None, "broken weights are no checkpoint"


def test_weights_that_break_while_training_leave_the_last_good_checkpoint(tmp_path):
    detector = tiny.second_iou()

    def breaking(step):
        if step == 2:
            poison(detector)
        return frames_at(step)

    with RunFolder.create(tmp_path / "run", CONFIG, seed=0, tracker="none") as run:
        with pytest.raises(
            NonFiniteLoss, match=r"the weight student\.decoder.* the last good ones are in .*step_00000002.*--init"
        ):
            train_supervised(detector, breaking, CONFIG, run=run, progress=False)
        assert [p.name for p in list_checkpoints(run.checkpoints)] == ["step_00000002"]


def test_weights_that_become_infinite_in_the_last_step_are_no_result(monkeypatch):
    config = replace(CONFIG, optim=OneCycle(lr=0.1, total_steps=1))
    detector = tiny.second_iou()
    inside = torch.optim.AdamW.step

    def exploding(self, *arguments, **options):
        inside(self, *arguments, **options)
        poison(detector, float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", exploding)
    with pytest.raises(NonFiniteLoss, match=r"stopped after step 0 .*the weight student\.decoder.* holds NaN or infinite"):
        train_supervised(detector, frames_at, config, progress=False)


def test_finite_weights_that_overflow_name_the_layer_and_the_largest_weight():
    detector = tiny.second_iou()
    poison(detector, 1e38, part="encoder")
    with pytest.raises(
        NonFiniteLoss, match=r"the output of student\.\S+ holds NaN .*all weights are finite; the largest is 1e\+38"
    ):
        train_supervised(detector, frames_at, CONFIG, progress=False)


@pytest.mark.parametrize("make", [tiny.second_iou, tiny.pv_rcnn])
@pytest.mark.parametrize("part", ["encoder", "decoder.anchor_head", "decoder.roi_head.shared_fc_layer"])
def test_a_detector_with_a_weight_that_is_nan_says_so_instead_of_finding_nothing(make, part):
    detector = make().eval()
    name = poison(detector, part=part)
    with pytest.raises(NonFiniteValue, match=rf"cannot detect anything here: the weight {name} holds NaN"):
        detector.detect(tiny.scan_with_car())


def test_scoring_a_broken_detector_names_the_frames():
    detector = tiny.second_iou()
    poison(detector)
    with pytest.raises(NonFiniteValue, match=r"frames frame1, frame2: this .* cannot detect"):
        list(detect_frames(detector, [tiny.frame_with_car(1), tiny.frame_with_car(2)]))


def test_an_ordinary_mistake_in_a_step_is_not_called_nan():
    def unlabeled(step):
        return (replace(tiny.frame_with_car(step), labels=None),)

    with pytest.raises(InvalidInput, match="label") as caught:
        train_supervised(tiny.second_iou(), unlabeled, CONFIG, progress=False)
    assert not isinstance(caught.value, NonFiniteLoss)


def test_a_teacher_that_breaks_stops_upcycling_with_the_weight_and_the_scenes(tmp_path):
    detector = tiny.source_model().eval()
    store = tiny.store(tmp_path, detector, [tiny.scan_with_car(1), tiny.scan_with_car(2)])
    poison(detector, part="decoder.roi_head")
    with pytest.raises(NonFiniteLoss, match=r"the weight student\.decoder\.roi_head.*frames: frame0, frame50, "):
        upcycle(
            detector,
            method=METHODS["hybrid"],
            labeled=frames_at,
            store=store,
            pasted_objects=None,
            config=tiny.upcycle_config(),
            progress=False,
        )


def test_sound_modules_have_nothing_to_name():
    detector = tiny.second_iou().eval()
    assert first_broken_weight({"": detector}) == ""
    assert name_non_finite({"": detector}, lambda: detector.detect(tiny.scan_with_car())) == ""
