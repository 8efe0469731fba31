"""The bound of a noise is that of Cramér and Rao, and is not given where nothing is proven."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.perception.models.defences.cells import JitterConfig
from upcycle3d.perception.models.defences.noise import NoiseConfig, RoundingConfig
from upcycle3d.perception.models.defences.obfuscator import ObfuscatorConfig
from upcycle3d.perception.models.defences.region import RegionConfig
from upcycle3d.perception.models.defended import defended
from upcycle3d.perception.privacy.noise_bound import noise_bound

pytestmark = pytest.mark.usefixtures("one_thread")


def encoder(*defences, detector=None):
    return defended(detector or tiny.second_iou(), defences).eval().encoder


def scan_of(count: int):
    scan = tiny.scan_with_car(0)
    return replace(scan, xyz=scan.xyz[:count], features=scan.features[:count])


def test_it_is_the_bound_of_the_whole_jacobian():
    guarded, scan = encoder(NoiseConfig(sigma=0.5)), scan_of(12)
    noise = guarded.stages[0]
    noise.spread.copy_(torch.linspace(0.5, 2, len(noise.spread)))
    voxels = guarded.voxelize([scan])

    def features(means):
        return guarded.encoder.features([scan], replace(voxels, features=means)).voxels.features

    jacobian = torch.autograd.functional.jacobian(features, voxels.features).double()  # (M, C, N, F)
    scaled = jacobian[..., :3] / (0.5 * noise.spread.double())[None, :, None, None]
    information = scaled.square().sum((0, 1))  # (N, 3)
    reached = information.sum(1) > 0
    expected = math.sqrt(3 * int(reached.sum()) / float(information.sum()))
    assert noise_bound(guarded, scan, probes=600) == pytest.approx(expected, rel=0.1)


def test_twice_the_noise_proves_twice_the_error():
    single, double = (noise_bound(encoder(NoiseConfig(sigma=s)), scan_of(60)) for s in (0.2, 0.4))
    assert single is not None
    assert double == pytest.approx(2 * single, rel=1e-4)


def test_a_region_upload_before_the_noise_and_a_learned_obfuscator_have_bounds():
    for defences in ((RegionConfig(), NoiseConfig()), (ObfuscatorConfig(channels=4, hidden=8),)):
        bound = noise_bound(encoder(*defences), scan_of(60))
        assert bound is not None
        assert bound > 0


def test_nothing_is_proven_without_noise_or_behind_steps_or_where_raw_points_reach_keypoints():
    for defences in (
        (RegionConfig(),),
        (NoiseConfig(sigma=0),),
        (RoundingConfig(), NoiseConfig()),
        (JitterConfig(), NoiseConfig()),
    ):
        assert noise_bound(encoder(*defences), scan_of(20)) is None
    assert noise_bound(tiny.second_iou().eval().encoder, scan_of(20)) is None
    assert noise_bound(encoder(NoiseConfig(), detector=tiny.pv_rcnn()), scan_of(20)) is None


def test_an_upload_of_nothing_bounds_nothing():
    guarded = encoder(RegionConfig(background_share=0), NoiseConfig())
    guarded.stages[0].threshold.fill_(2.0)  # no score reaches it
    assert noise_bound(guarded, scan_of(20)) == math.inf
    assert np.isfinite(noise_bound(encoder(NoiseConfig()), scan_of(20)))
