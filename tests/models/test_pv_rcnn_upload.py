"""What PV-RCNN's keypoints say can be made coarser and smaller, and encoders without these options keep their fingerprint."""

from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.cut import VoxelGrid, cells_of_centers
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoderConfig
from upcycle3d.perception.models.encoders.second import SecondEncoderConfig
from upcycle3d.perception.server.store import collate_scenes
from upcycle3d.perception.vehicle.extractor import Extractor

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = VoxelGrid(range=(0.0, -8.0, -2.0, 16.0, 8.0, 2.0), voxel_size=(0.25, 0.25, 0.1))


def test_an_encoder_at_the_defaults_keeps_its_fingerprint():
    """The number was computed by the code of commit 63b51d3, which had neither `keypoint_stride` nor `bev_map`."""
    config = PvRcnnEncoderConfig(voxels=SecondEncoderConfig(grid=GRID, channels=(4, 4, 4, 4, 8)), keypoints=40)
    found = []
    for changed in (config, replace(config, keypoint_stride=4), replace(config, keypoint_stride=2)):
        encoder = changed.build()
        with torch.no_grad():
            for tensor in encoder.state_dict().values():
                tensor.fill_(1)
        found.append(encoder_fingerprint(encoder, RigSpec()))
    assert found[0] == "9bad7ae756687a7a13d1433d49d55f98d57cc54d72994b97bf612c3282954939"
    assert len(set(found)) == 3


@pytest.mark.parametrize("stride", [2, 3, 4, 8, 12])
def test_coarse_keypoints_are_the_middles_of_occupied_cells(stride):
    config = tiny.pv_rcnn_config(keypoints=4000)
    encoder = replace(config.encoder, keypoint_stride=stride).build().eval()
    corner = torch.tensor([[12.75, 6.35, 2.95]])
    scan = tiny.cloud(torch.cat([tiny.scan_with_car().xyz, corner]))
    keypoints = encoder([scan]).keypoints
    assert keypoints is not None
    cells = cells_of_centers(keypoints.xyz, encoder.spec.grid)
    occupied = {tuple(c) for c in (encoder.voxelize([scan]).coords[:, 1:] // stride).tolist()}
    assert sorted(tuple(c) for c in (cells // stride).tolist()) == sorted(occupied)
    limits = torch.tensor(encoder.spec.grid.shape) - 1
    assert torch.equal(cells, (cells // stride * stride + stride // 2).minimum(limits.to(torch.int32)))


def test_the_decoder_computes_the_bev_map_that_the_encoder_does_not_send():
    config = tiny.pv_rcnn_config()
    sent = tiny.pv_rcnn(config).eval()
    smaller = replace(config, encoder=replace(config.encoder, bev_map=False), decoder=replace(config.decoder, bev_map=True))
    computed = tiny.pv_rcnn(smaller).eval()
    computed.load_state_dict(sent.state_dict())
    scans = [tiny.scan_with_car(0), tiny.scan_with_car(1)]
    with torch.no_grad():
        expected, found = sent.decode(sent.encode(scans)), computed.decode(computed.encode(scans))
    assert torch.equal(found.keypoint_logits, expected.keypoint_logits)
    assert torch.equal(found.quality_logits, expected.quality_logits)
    assert torch.equal(found.box_codes, expected.box_codes)
    assert sent.spec.keypoints is not None
    assert computed.spec.keypoints is not None
    assert sent.spec.keypoints.channels - computed.spec.keypoints.channels == sent.spec.channels * sent.spec.shape[0]


def test_a_coarse_and_small_scene_is_stored_and_decoded():
    config = tiny.pv_rcnn_config()
    changed = replace(
        config,
        encoder=replace(config.encoder, raw_points=None, conv1=None, keypoint_stride=4, bev_map=False),
        decoder=replace(config.decoder, bev_map=True),
    )
    detector = tiny.pv_rcnn(changed).eval()
    scene, _ = Extractor(detector.encoder, RigSpec(), "int8").smash(tiny.scan_with_car())
    with torch.no_grad():
        (found,) = detector.predict(detector.decode(collate_scenes([scene])))
    assert len(found.scores)


def test_one_side_must_give_the_bev_map():
    config = tiny.pv_rcnn_config()
    with pytest.raises(InvalidInput, match="BEV map"):
        replace(config, encoder=replace(config.encoder, bev_map=False))
    with pytest.raises(InvalidInput, match="BEV map"):
        replace(config, decoder=replace(config.decoder, bev_map=True))
    with pytest.raises(InvalidInput, match="features"):
        replace(config.encoder, raw_points=None, conv1=None, conv3=None, conv4=None, bev_map=False)


def test_the_parts_of_a_keypoint_are_listed_in_order():
    encoder = tiny.pv_rcnn_config().encoder.build()
    parts = encoder.upload_channels()
    assert list(parts) == ["bev", "raw_points", "conv1", "conv3", "conv4"]
    bounds = [0, *(end for _, end in parts.values())]
    assert [start for start, _ in parts.values()] == bounds[:-1]
    assert encoder.spec.keypoints is not None
    assert bounds[-1] == encoder.spec.keypoints.channels
