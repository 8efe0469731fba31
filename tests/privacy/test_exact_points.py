"""Attack (d): known points come back from what a small encoder says about them, and nothing comes back where it says nothing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tiny
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.models.defences.cells import JitterConfig
from upcycle3d.perception.models.defences.noise import NoiseConfig, RoundingConfig
from upcycle3d.perception.models.defences.obfuscator import ObfuscatorConfig
from upcycle3d.perception.models.defences.region import RegionConfig
from upcycle3d.perception.models.encoders.defended import DefendedEncoderConfig
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoder, PvRcnnEncoderConfig
from upcycle3d.perception.models.encoders.set_abstraction import SetAbstractionConfig
from upcycle3d.perception.privacy.attacks.exact_points import ExactPoints, SolvedPoints, distance_to_nearest
from upcycle3d.perception.privacy.attacks.lone_voxels import LoneVoxels, _of_few_sources, _reached_cells
from upcycle3d.perception.privacy.attacks.point_solver import rounding, solve
from upcycle3d.perception.privacy.frames import AuditFrame, audit_frames
from upcycle3d.perception.recipes.audit_cells import ExactMeasured, measure_exact

pytestmark = pytest.mark.usefixtures("one_thread")

LONE = torch.tensor([[2.13, 1.22, 0.31], [5.04, -3.33, 0.57], [8.71, 4.48, 1.06], [10.92, -0.87, 0.22], [4.46, 5.19, 1.73]])
PAIRS = torch.tensor([[7.01, -5.12, 0.33], [7.16, -5.02, 0.48], [11.54, 3.03, 0.91], [11.57, 3.31, 0.85]])
BALLS = SetAbstractionConfig(channels=(16, 16), radii=(0.4, 0.8), limits=(16, 16))


def encoder(seed: int = 0, **changes: object) -> PvRcnnEncoder:
    """A small encoder that reads the intensity, with the statistics of a few scans in its batch norms."""
    fields: dict[str, object] = {
        "keypoints": 96,
        "raw_points": BALLS,
        "conv1": BALLS,
        "conv2": None,
        "conv3": BALLS,
        "conv4": None,
    }
    voxels = replace(tiny.second_iou_config(width=64).encoder, point_features=("intensity",))
    torch.manual_seed(seed)
    made = PvRcnnEncoderConfig(voxels=voxels, **fields | changes).build()  # type: ignore[arg-type]
    with torch.no_grad():
        for _ in range(3):
            made([frame(tiny.scan_with_car(5).xyz).points])
    return made.eval()


def frame(xyz: torch.Tensor) -> Frame:
    intensity = torch.rand(len(xyz), 1, generator=torch.Generator().manual_seed(7))
    return Frame(id="one", points=PointCloud(xyz=xyz, features=intensity))


def audited(made: PvRcnnEncoder, xyz: torch.Tensor, codec: str = "fp16") -> AuditFrame:
    return audit_frames([frame(xyz)], made, codec)[0]


def recovered(found: SolvedPoints, truth: torch.Tensor, within: float) -> int:
    return int((distance_to_nearest(truth, found.xyz) < within).sum())


@pytest.mark.parametrize(("codec", "within"), [("fp16", 0.001), ("int8", 0.01)])
def test_lone_points_come_back_with_their_intensity(codec, within):
    made = encoder()
    given = audited(made, LONE, codec)
    found = ExactPoints(made, codec).solve(given.upload).accepted((3.0, 3.0))
    assert recovered(found, LONE, within) >= 4
    assert bool((distance_to_nearest(found.xyz, LONE) < within).all())
    order = torch.cdist(found.xyz, LONE).argmin(1)
    torch.testing.assert_close(found.point_features, given.scan.features[order], atol=0.02, rtol=0)


def test_pairs_come_back():
    made = encoder()
    found = ExactPoints(made, "fp16").solve(audited(made, torch.cat([LONE, PAIRS])).upload).accepted((3.0, 3.0))
    assert recovered(found.select(found.size == 2), PAIRS, 0.001) >= 2


def test_nothing_comes_back_from_blank_features():
    made = encoder()
    given = audited(made, LONE)
    keypoints = given.upload.keypoints
    assert keypoints is not None
    blank = replace(given.upload, keypoints=replace(keypoints, features=torch.zeros_like(keypoints.features)))
    assert not len(ExactPoints(made, "fp16").rebuild(blank).xyz)
    assert not len(LoneVoxels(made, "fp16", parts=("conv1", "conv3")).rebuild(blank).xyz)


def test_other_weights_give_no_answer():
    given = audited(encoder(0), LONE)
    assert not len(ExactPoints(encoder(1), "fp16").rebuild(given.upload).xyz)


def test_the_answer_is_the_same_every_time():
    made = encoder()
    upload = audited(made, torch.cat([LONE, PAIRS])).upload
    first, again = (ExactPoints(made, "int8", seed=3).solve(upload) for _ in range(2))
    assert torch.equal(first.xyz, again.xyz)
    assert torch.equal(first.residual, again.residual)


def test_lone_voxels_come_back_from_conv1():
    made = encoder()
    found = LoneVoxels(made, "fp16", parts=("conv1",)).solve(audited(made, LONE).upload)
    sure = found.select(found.error < 0.01)
    assert len(sure.xyz) >= 2
    assert bool((distance_to_nearest(sure.xyz, LONE) < 0.03).all())  # three standard errors


def test_a_repaired_encoder_gives_no_point():
    made = encoder(raw_points=None, conv1=None, keypoint_stride=4)
    for codec in ("fp16", "int8"):
        upload = audited(made, torch.cat([LONE, PAIRS]), codec).upload
        assert not len(ExactPoints(made, codec).rebuild(upload).xyz)
        assert not len(LoneVoxels(made, codec).rebuild(upload).xyz)


def test_coarse_keypoints_cost_a_bounded_number_of_solutions():
    source = torch.arange(50).repeat_interleave(64)
    rows = _of_few_sources(source, 640)
    assert len(rows) == 640  # ten keypoints, each with all of its candidates
    assert source[rows].bincount(minlength=50).unique().tolist() == [0, 64]
    assert torch.equal(_of_few_sources(source, 3200), torch.arange(3200))
    assert not len(_of_few_sources(source[:0], 640))


def test_the_attack_says_how_much_it_looked_at():
    made = encoder(raw_points=None, conv1=None, keypoint_stride=4)
    upload = audited(made, torch.cat([LONE, PAIRS])).upload
    tried, there = LoneVoxels(made, "fp16").tried(upload)
    assert tried == there > 2  # few keypoints: there is time for all of them
    assert LoneVoxels(made, "fp16", most_voxels=128).tried(upload) == (2, there)
    assert LoneVoxels(made, "fp16").tried(audited(made, torch.zeros(0, 3)).upload) == (0, 0)


def test_an_empty_upload_gives_no_point():
    made = encoder()
    upload = audited(made, torch.zeros(0, 3)).upload
    assert not len(ExactPoints(made, "fp16").rebuild(upload).xyz)
    assert not len(LoneVoxels(made, "fp16").rebuild(upload).xyz)


def test_voxels_reach_the_cells_that_the_backbone_gives_them():
    made = encoder()
    corners = torch.tensor(made.spec.grid.shape) - 1
    picked = torch.cat(
        [torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) * corners, torch.zeros(1, 3), corners[None]]
    )
    for voxel in picked.round().to(torch.int32):
        alone = SparseVoxels(
            features=torch.ones(1, 4),
            coords=torch.nn.functional.pad(voxel[None], (1, 0)),
            shape=made.second.sparse_shape,
            batch_size=1,
        )
        upload = CutFeatures(voxels=made.second.sparse_backbone(alone), spec=made.second.spec)
        cells, lone = _reached_cells(upload, voxel[None])
        z, y, x = upload.voxels.coords[:, 1:].unbind(1)
        expected = ((z * made.spec.shape[1] + y) * made.spec.shape[2] + x).tolist()
        assert sorted(c for c in cells[0].tolist() if c >= 0) == sorted(expected)
        assert bool(lone[0]) == bool(expected)


def test_the_solver_agrees_with_linear_least_squares():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 12, 3, generator=generator, dtype=torch.float64)
    given = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    start = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    x, rms, error = solve(
        lambda u, rows: ((matrix[rows] @ u[..., None])[..., 0] - given[rows], matrix[rows]), start, iterations=40
    )
    expected = torch.linalg.lstsq(matrix, given[..., None]).solution[..., 0]
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)
    left = ((matrix @ expected[..., None])[..., 0] - given).square().sum(1)
    torch.testing.assert_close(rms, (left / 9).sqrt())
    torch.testing.assert_close(error, torch.linalg.inv(matrix.mT @ matrix).diagonal(dim1=1, dim2=2).sqrt())


def test_rounding_is_the_error_of_the_codec():
    from upcycle3d.perception.wire.codec import round_trip

    features = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 40.0])
    for codec in ("fp16", "int8"):
        stored = round_trip(features, codec)
        measured = (stored - features).double().square().mean(0).sqrt()
        ratio = rounding(stored, codec).square().mean(0).sqrt() / measured
        assert bool(((ratio > 0.7) & (ratio < 2.5)).all()), (codec, ratio)


def defended_exact(*defences: object, codec: str = "fp16") -> ExactMeasured:
    """What the audit says of uploads that pass these defences; attacker and victim have the same scan."""
    made = encoder()
    guarded: object = made
    if defences:
        guarded = DefendedEncoderConfig(encoder=made.config, defences=defences).build().eval()  # type: ignore[arg-type]
        guarded.encoder.load_state_dict(made.state_dict())
    torch.manual_seed(0)
    frames = audit_frames([frame(torch.cat([LONE, PAIRS]))], guarded, codec)  # type: ignore[arg-type]
    return measure_exact(SimpleNamespace(encoder=guarded), frames, frames, codec, 1)  # type: ignore[arg-type]


def test_rounding_hides_no_point_from_an_attacker_who_knows_its_levels():
    """256 levels are what int8 has, so they give away what int8 gives away."""
    plain = defended_exact(codec="int8").raw_balls
    assert plain.recovered >= 4
    assert defended_exact(RoundingConfig(levels=256)).raw_balls.recovered >= plain.recovered - 1
    assert defended_exact(RegionConfig(), RoundingConfig(levels=256), codec="int8").raw_balls.scans == 1


@pytest.mark.parametrize(
    "defence",
    [NoiseConfig(sigma=1e-4), JitterConfig(), ObfuscatorConfig(channels=64, keypoint_channels=64, hidden=8)],
    ids=["noise", "jitter", "obfuscator"],
)
def test_where_the_attack_cannot_undo_a_defence_nothing_is_claimed(defence):
    """That an attack finds nothing because it does not know of the noise is not the same as no point given away."""
    found = defended_exact(defence)
    assert found.raw_balls.scans + found.lone_voxels.scans == 0
