"""Experts of a region head by contrast: regions of one object are the same in both views, and only the branches of copies change."""

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.augment import AugmentationRanges
from upcycle3d.perception.models.decoders.mixture import HeadMixtureConfig
from upcycle3d.perception.moe.contrastive.expert_stages import DmuConfig
from upcycle3d.perception.moe.contrastive.pair_training import PairTraining
from upcycle3d.perception.moe.detectors.calibrate import cluster_scenes
from upcycle3d.perception.moe.detectors.region_pairs import RegionPairsConfig, contrastive_specialists, region_pairs
from upcycle3d.perception.moe.detectors.upcycle import upcycle_head
from upcycle3d.perception.moe.upcycling.clusters import ClusterConfig

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = [tiny.frame_with_car(seed) for seed in range(6)]
STILL = AugmentationRanges(flip_y=0.0, yaw=(0.0, 0.0), scale=(1.0, 1.0))


@pytest.mark.parametrize("make", [tiny.second_iou, tiny.pv_rcnn], ids=["second_iou", "pv_rcnn"])
def test_features_of_given_regions_are_those_of_the_proposals_there(make):
    detector = make().eval()
    features = detector.encode([frame.points for frame in FRAMES[:2]])
    wanted = detector.proposals(features)
    boxes = [scene.detections.boxes.data for scene in wanted]
    if make is tiny.pv_rcnn:  # its detections are refined, so only the shapes can be compared
        assert detector.decoder.region_features(features, boxes).shape == torch.cat([s.features for s in wanted]).shape
    else:
        with torch.no_grad():
            found = detector.decoder.region_features(features, boxes)
        assert torch.allclose(found, torch.cat([scene.features for scene in wanted]), atol=1e-5)
    assert len(detector.decoder.region_features(features, [torch.zeros(0, 7)] * 2)) == 0


def test_without_a_movement_and_with_all_points_both_views_are_equal():
    detector = tiny.second_iou().eval()
    pairs = region_pairs(detector, FRAMES, STILL, RegionPairsConfig(keep_points=1.0))
    assert torch.allclose(pairs.image, pairs.text, atol=1e-6)
    assert len(pairs) == len(pairs.caption) > len(FRAMES)
    sizes = torch.bincount(pairs.caption)
    assert int(sizes.max()) == 3  # an object and the two regions beside it
    again = region_pairs(detector, FRAMES, AugmentationRanges(), seed=1)
    assert not torch.equal(again.image, again.text)
    with pytest.raises(InvalidInput, match="evaluation mode"):
        region_pairs(detector.train(), FRAMES, STILL)


@pytest.mark.parametrize("make", [tiny.second_iou, tiny.pv_rcnn], ids=["second_iou", "pv_rcnn"])
def test_stages_change_the_branches_of_copies_alone_and_become_experts(make):
    detector = make().eval()
    pairs = region_pairs(detector, FRAMES, AugmentationRanges())
    training = PairTraining(steps=3, batch_size=4, lr=1e-2, warmup=1, label_smoothing=0.0)
    config = DmuConfig(
        expert=training, router=training, stages=2, clusters=ClusterConfig(image_clusters=2, text_clusters=1, seeds=1)
    )
    made, stages = contrastive_specialists(detector, pairs, config)
    assert len(made) == 3
    assert made[0] is detector
    assert len(stages) == 2
    own = detector.state_dict()
    for twin in made[1:]:
        changed = {name for name, value in twin.state_dict().items() if not torch.equal(value, own[name])}
        branches = tuple(f"decoder.{part}." for part in detector.decoder.branch_parts)
        assert changed
        assert all(name.startswith(branches) for name in changed)
    head = HeadMixtureConfig(experts=("seed", "first", "second"))
    joined = upcycle_head(made, head, rest="seed", seed=detector)
    assert len(joined.detector.detect(FRAMES[0].points)) >= 0


def test_scenes_that_look_alike_come_into_one_group():
    described = torch.cat([torch.randn(10, 6) + 8 * group for group in range(3)])
    groups = cluster_scenes(described, 3)
    assert [len(groups[10 * i : 10 * i + 10].unique()) for i in range(3)] == [1, 1, 1]
    assert len(groups.unique()) == 3
