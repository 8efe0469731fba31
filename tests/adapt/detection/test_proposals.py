"""A detector's proposals: the same that it detects with, the same from scans and from smashed scenes, and safe in their file."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.adapt.detection.proposal_cache import cached_proposals
from upcycle3d.perception.adapt.detection.proposal_collection import collect_from_frames, collect_from_store, detector_digest
from upcycle3d.perception.adapt.detection.proposal_file import load_proposals, save_proposals, with_rounded_features
from upcycle3d.perception.adapt.detection.proposals import DetectorProposals, ProposalSelection
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.post_processing import FinalNms, select_detections
from upcycle3d.perception.vehicle.extractor import Extractor

pytestmark = pytest.mark.usefixtures("one_thread")
ANCHORS, FINAL = (tiny.CAR_ANCHOR, tiny.PEDESTRIAN_ANCHOR), FinalNms(score=0.0, iou=0.1)
SECOND = tiny.second_iou_config(anchors=ANCHORS, final=FINAL)
PV_RCNN = tiny.pv_rcnn_config(anchors=ANCHORS, final=FINAL)
ALL = ProposalSelection(score=0.0, iou=0.1, most=500, prefer="score")  # as the detector's own last step


def detector(config=SECOND, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return config.build().eval()


def proposals_of(model: Detector):
    with torch.no_grad():
        return model.proposals(model.encode([f.points for f in FRAMES]))


def frame(seed: int) -> Frame:
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(400, 3, generator=generator) * torch.tensor([12.0, 12.0, 1.5]) - torch.tensor([0.0, 6.0, 0.0])
    return Frame(id=f"{seed:06d}", points=tiny.cloud(xyz))


FRAMES = [frame(s) for s in range(3)]
EMPTY = Frame(id="empty", points=tiny.NO_POINTS)


@pytest.mark.parametrize("config", [SECOND, PV_RCNN], ids=["SECOND-IoU", "PV-RCNN"])
def test_scored_proposals_are_what_the_detector_detects_with(config):
    model = detector(config)
    with torch.no_grad():
        features = model.encode([f.points for f in [*FRAMES, EMPTY]])
        scored = model.proposals(features)
        expected = model.predict(model.decode(features))
    assert len(scored) == 4
    for found, wanted in zip(scored, expected, strict=True):
        d = found.detections
        kept = select_detections(d.boxes.data, d.classes, d.scores, d.class_scores, FINAL)
        torch.testing.assert_close(kept.boxes.data, wanted.boxes.data)
        torch.testing.assert_close(kept.scores, wanted.scores)
        torch.testing.assert_close(kept.class_scores, wanted.class_scores)
        assert torch.equal(kept.classes, wanted.classes)
        assert found.features.shape == (len(d), 16)
        assert found.logits.shape == (len(d),)


def test_proposals_have_the_frames_points_and_agree_with_detections():
    model = detector()
    found = collect_from_frames(model, [*FRAMES, EMPTY], ALL, data="test")
    assert found.frame_ids == ("000000", "000001", "000002", "empty")
    assert found.class_names == ("Car", "Pedestrian")
    expected = model.detect([f.points for f in FRAMES])
    for index, wanted in enumerate(expected):
        torch.testing.assert_close(found.of_frame(index).scores, wanted.scores)
        torch.testing.assert_close(found.of_frame(index).boxes.data, wanted.boxes.data)
    b, points = found.boxes[0], FRAMES[0].points.xyz
    local = points - b[:3]
    x = local[:, 0] * math.cos(b[6]) + local[:, 1] * math.sin(b[6])
    y = local[:, 1] * math.cos(b[6]) - local[:, 0] * math.sin(b[6])
    inside = (x.abs() <= b[3] / 2) & (y.abs() <= b[4] / 2) & (local[:, 2].abs() <= b[5] / 2)
    assert found.points is not None
    assert found.points[0] == inside.sum()
    assert (found.of_frame(0).scores.diff() <= 0).all()
    by_class = collect_from_frames(model, FRAMES, replace(ALL, prefer="class"), data="test")
    best = int(proposals_of(model)[0].detections.class_scores.argmax())
    assert (by_class.of_frame(0).boxes.data == proposals_of(model)[0].detections.boxes.data[best]).all(1).any()
    assert (by_class.of_frame(0).scores.diff() <= 0).all()
    few = collect_from_frames(model, FRAMES, replace(ALL, most=2), data="test")
    assert torch.bincount(few.frame).tolist() == [2, 2, 2]


def test_a_store_gives_the_same_proposals_without_points():
    model = detector()
    extractor = Extractor(model.encoder, RigSpec(), "fp16")
    scenes = [extractor.smash(f.points)[0] for f in FRAMES]
    stored = collect_from_store(model, scenes, ProposalSelection(score=0.0, most=3), data="store")
    scans = collect_from_frames(model, FRAMES, ProposalSelection(score=0.0, most=3), data="scans")
    assert stored.points is None
    assert stored.frame_ids == tuple(s.scene_id for s in scenes)
    torch.testing.assert_close(stored.scores, scans.scores, atol=1e-2, rtol=0)


def test_a_file_gives_back_what_was_written_and_a_second_writing_changes_nothing(tmp_path: Path):
    found = collect_from_frames(detector(), FRAMES, ALL, data="test")
    save_proposals(tmp_path / "p.safetensors", found)
    back = load_proposals(tmp_path / "p.safetensors")
    expected = with_rounded_features(found)
    assert torch.equal(back.features, expected.features)
    assert back.points is not None
    assert torch.equal(back.boxes, found.boxes)
    assert (back.data, back.selection, back.detector) == (found.data, ALL, detector_digest(detector()))
    save_proposals(tmp_path / "q.safetensors", back)
    assert torch.equal(load_proposals(tmp_path / "q.safetensors").features, back.features)
    save_proposals(tmp_path / "none.safetensors", replace(found, points=None))
    assert load_proposals(tmp_path / "none.safetensors").points is None


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "p.safetensors"
    save_proposals(path, collect_from_frames(detector(), FRAMES, ALL, data="test"))
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    tensors = load(good)
    flipped = bytearray(good)
    flipped[-3] ^= 1
    wrong_class = {**tensors, "classes": tensors["classes"] + 9}
    meta = dict(header["__metadata__"])
    for name, data, words in (
        ("cut off", good[:-5], "not a readable safetensors file"),
        ("flipped", bytes(flipped), "SHA-256"),
        ("huge header", (1 << 40).to_bytes(8, "little") + good[8:], "no valid header"),
        ("no bytes", b"", "no valid header"),
        ("other format", save(tensors, metadata={"format": "x"}), "expected format"),
        ("no metadata", save(tensors), "expected format"),
        ("changed", save(wrong_class, metadata=meta), "SHA-256"),
    ):
        path.write_bytes(data)
        with pytest.raises(InvalidInput, match=words) as caught:
            load_proposals(path)
        assert "p.safetensors" in str(caught.value), name
    with pytest.raises(InvalidInput, match="there is no file of proposals at"):
        load_proposals(tmp_path / "nowhere")


def test_a_cache_of_another_detector_data_or_selection_is_refused(tmp_path: Path):
    path, model = tmp_path / "p.safetensors", detector()
    made = []

    def collect() -> DetectorProposals:
        made.append(1)
        return collect_from_frames(model, FRAMES, ALL, data="day")

    first = cached_proposals(path, model, ALL, data="day", collect=collect)
    assert torch.equal(cached_proposals(path, model, ALL, data="day", collect=collect).features, first.features)
    assert len(made) == 1
    for other, selection, data, words in (
        (detector(seed=1), ALL, "day", "another detector"),
        (model, replace(ALL, most=3), "day", "another selection"),
        (model, ALL, "night", "another data"),
    ):
        with pytest.raises(InvalidInput, match=words):
            cached_proposals(path, other, selection, data=data, collect=collect)
    assert torch.equal(load_proposals(path).features, first.features)


def test_bad_values_are_refused():
    found = collect_from_frames(detector(), FRAMES, ALL, data="test")
    broken = found.features.clone()
    broken[4, 2] = torch.nan
    for change, words in (
        ({"features": broken}, "features of 1 rows are not finite, first row 4"),
        ({"classes": found.classes + 2}, "classes must count"),
        ({"frame": found.frame - 1}, "frame must count"),
        ({"boxes": found.boxes[:3]}, "boxes must be"),
        ({"points": found.frame[:2]}, "points must be"),
    ):
        with pytest.raises(InvalidInput, match=words):
            replace(found, **change)
    with pytest.raises(InvalidInput, match="no frame"):
        collect_from_frames(detector(), [], ALL, data="test")
    for bad in ({"score": 1.0}, {"iou": -0.1}, {"most": 0}):
        with pytest.raises(InvalidInput, match="selected by"):
            ProposalSelection(**bad)
