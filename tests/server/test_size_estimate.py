"""The difference of object sizes is found without a label of the fleet: the arithmetic on numbers, and the whole on a teacher that reads sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.boxes import rotate_z
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Boxes3D, Labels, Predictions
from upcycle3d.perception.models.decoders.decoder import Decoder
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.second import SecondEncoder
from upcycle3d.perception.server.indirect_reading import KnownReadings, indirect_difference, ridge_regression
from upcycle3d.perception.server.size_estimate import (
    SizeEstimate,
    estimate_sizes,
    shift_of,
)
from upcycle3d.perception.server.upcycle_config import SizeEstimateConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def known_objects(count: int, mean: tuple[float, float, float], seed: int, *, spread: float = 0.3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.tensor(mean, dtype=torch.float64) + spread * torch.randn(count, 3, generator=draw, dtype=torch.float64)


def poor_instrument(sizes: Tensor, seed: int) -> Tensor:
    """Readings that follow a third of the truth, mix the sides, fall back on large cars, and are noisy."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    mixing = torch.tensor([[0.3, 0.1, 0.0], [0.05, 0.35, 0.0], [0.02, 0.0, 0.4]], dtype=torch.float64)
    return sizes @ mixing + torch.tensor([3.2, 1.2, 1.0]) + 0.4 * torch.randn(len(sizes), 3, generator=draw, dtype=torch.float64)


def readings_of(count: int, seed: int) -> KnownReadings:
    """Labeled cars around 4.8 x 2.1 x 1.8 m, each resized by its own factors, as a poor instrument reads them."""
    original = known_objects(count, (4.8, 2.1, 1.8), seed)
    draw = torch.Generator().manual_seed(20_000 + seed)
    sizes = original * torch.exp(0.3 * (2 * torch.rand(count, 3, generator=draw, dtype=torch.float64) - 1))
    return KnownReadings(readings=poor_instrument(sizes, seed), sizes=sizes, original=original)


def test_the_difference_behind_poor_readings_is_found_with_an_honest_error():
    """Averaged readings are wrong by most of the difference; what is solved for is within two of its own standard errors."""
    true = torch.tensor([-0.9, -0.5, -0.3], dtype=torch.float64)
    inside = 0
    for seed in range(12):
        known, place = readings_of(1200, seed), torch.arange(1200) // 10
        read = poor_instrument(known_objects(800, (4.8, 2.1, 1.8), 100 + seed) + true, 200 + seed)
        found = indirect_difference(known, place, read[None], torch.arange(800) // 5, least_error=0.0, seed=seed)
        raw = read.mean(0) - poor_instrument(known.original, seed).mean(0)
        assert (raw - true).abs().max() > 0.4
        inside += int(((found.difference - true).abs() < 2 * found.error).sum())
        assert found.follows.tolist() == pytest.approx([0.3, 0.35, 0.4], abs=0.12)
        assert found.distance > 8
    assert 29 <= inside <= 36  # 0.95 x 36 are 34
    assert float(found.error.max()) < 0.4


def test_a_side_that_cannot_be_read_takes_what_goes_with_the_others():
    """Sizes change together. Width is read as noise, and still it is found, with a larger error; inverting would divide by nothing."""
    draw = torch.Generator().manual_seed(3)
    original = known_objects(2000, (4.8, 2.1, 1.8), 0)
    factor = 0.25 * (2 * torch.rand(2000, 1, generator=draw, dtype=torch.float64) - 1)
    sizes = original * torch.exp(factor)

    def blind_to_width(sizes, seed):
        noise = 0.3 * torch.randn(len(sizes), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return sizes * torch.tensor([0.4, 0.0, 0.4]) + noise

    known = KnownReadings(readings=blind_to_width(sizes, 1), sizes=sizes, original=original)
    read, place = blind_to_width(original * 0.85, 2)[None], torch.arange(2000)
    found = indirect_difference(known, place, read, place, least_error=0.0, seed=0)
    wanted = (-0.15 * original.mean(0)).tolist()
    assert found.difference.tolist() == pytest.approx(wanted, abs=0.06)


def test_what_the_sensor_and_the_place_may_add_is_no_evidence():
    """Ten times as many objects make the bootstrap's error small, and not the difference of two sensors."""
    known, place = readings_of(4000, 0), torch.arange(4000)
    read = (poor_instrument(known_objects(4000, (4.8, 2.1, 1.8), 1), 2) + 0.03)[None]
    sure, unsure = (indirect_difference(known, place, read, place, least_error=least, seed=0) for least in (0.0, 0.2))
    assert unsure.distance < sure.distance / 2
    assert bool((unsure.error > sure.error).all())


def test_the_difference_is_the_textbooks_posterior_mean():
    """The oracle weighs a grid of differences by their Gaussian likelihood and prior, in one dimension at a time by construction."""
    known, place = readings_of(1500, 4), torch.arange(1500)
    read = poor_instrument(known_objects(30, (3.9, 1.7, 1.5), 5), 6)[None]
    found = indirect_difference(known, place, read, torch.arange(30), least_error=0.0, seed=1)
    prior = torch.cov((known.sizes - known.original).T).numpy()
    terms = np.c_[np.ones(1500), known.sizes.numpy()]
    fit = np.linalg.lstsq(terms, known.readings.numpy(), rcond=None)[0]
    gap = read[0].mean(0).numpy() - fit[0] - known.original.mean(0).numpy() @ fit[1:]
    noise = np.cov(read[0].numpy().T) / 30  # that of the labeled objects is fifty times smaller
    precision = np.linalg.inv(prior) + fit[1:] @ np.linalg.inv(noise) @ fit[1:].T
    wanted = np.linalg.solve(precision, fit[1:] @ np.linalg.inv(noise) @ gap)
    assert found.difference.numpy() == pytest.approx(wanted, abs=0.12)
    assert found.error.numpy() == pytest.approx(np.sqrt(np.diag(np.linalg.inv(precision))), rel=0.25)


def test_readings_that_say_nothing_give_no_difference_and_a_large_error():
    known, place = readings_of(100, 0), torch.arange(100)
    still = replace(known, readings=torch.ones(100, 3, dtype=torch.float64))
    found = indirect_difference(still, place, still.readings[None], place, least_error=0.0, seed=0)
    assert found.difference.tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    assert found.follows.tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    assert found.error.tolist() == pytest.approx((known.sizes - known.original).std(0).tolist(), rel=0.01)
    assert found.distance < 1


def test_objects_of_one_frame_are_drawn_together_in_the_bootstrap():
    """Twenty copies of each object in its frame must not make the error smaller."""
    known, fleet, place = readings_of(200, 0), poor_instrument(known_objects(60, (4.0, 1.7, 1.6), 1), 1), torch.arange(200)
    once = indirect_difference(known, place, fleet[None], place[:60], least_error=0.0, seed=0).error
    copies = torch.arange(200).repeat_interleave(20)
    many = fleet.repeat_interleave(20, 0)[None]
    often = indirect_difference(known.of(copies), copies, many, copies[:1200], least_error=0.0, seed=0).error
    torch.testing.assert_close(often, once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(40, 6), (6, 40), (12, 12)])
def test_ridge_regression_is_the_one_of_the_normal_equations(rows, columns):
    draw = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(rows, n, generator=draw, dtype=torch.float64) for n in (columns, 3))
    fit = ridge_regression(x, y, 0.2)
    centered = x - x.mean(0)
    strength = 0.2 * float(centered.square().sum(1).mean())
    wanted = np.linalg.solve((centered.T @ centered).numpy() + strength * np.eye(columns), (centered.T @ (y - y.mean(0))).numpy())
    new = torch.randn(5, columns, generator=draw, dtype=torch.float64)
    expected = (new - x.mean(0)) @ torch.from_numpy(wanted) + y.mean(0)
    torch.testing.assert_close(fit(new), expected, rtol=1e-8, atol=1e-8)


def test_a_column_that_hardly_ever_fires_decides_nothing():
    """Brought to the variance of the others, it would move the reading of an object that shows it more clearly by the size of a house."""
    draw = torch.Generator().manual_seed(1)
    y = torch.randn(400, 1, generator=draw, dtype=torch.float64)
    x = torch.cat([y + 0.5 * torch.randn(400, 1, generator=draw, dtype=torch.float64), torch.zeros_like(y)], 1)
    y[0], x[0, 1] = 2.0, 0.001
    fit = ridge_regression(x, y, 0.1)
    without, shown = x[:1] * torch.tensor([[1.0, 0.0]]), x[:1] * torch.tensor([[1.0, 50.0]])
    assert float((fit(shown) - fit(without)).abs()) < 0.01


# ---- the whole, with a teacher whose map shows sizes faintly


YAW = 0.3


class MeasuresFaintly(SecondEncoder):
    """Writes into every cell of the one car a third of its length, width and height, with noise: an encoder that saw little."""

    def features(self, points, voxels):
        found = super().features(points, voxels)
        values = torch.zeros_like(found.voxels.features)
        for number, cloud in enumerate(points):
            turned = rotate_z(cloud.xyz, torch.tensor(-YAW))
            extent = turned.amax(0) - turned.amin(0)
            noise = torch.randn(3, generator=torch.Generator().manual_seed(int(1000 * float(extent.sum()))))
            values[found.voxels.coords[:, 0] == number, :3] = 0.33 * extent + 0.05 * noise + 1
        return replace(found, voxels=replace(found.voxels, features=values))


class FindsThePlace(Decoder):
    """Finds one object in the middle of the cells above the road, always with the same box; its map is what the encoder wrote."""

    def forward(self, features, labels=None):
        return features

    def loss(self, outputs, labels):
        raise NotImplementedError

    def predict(self, outputs):
        found, one = [], torch.ones(1)
        for scene in map(outputs.scene, range(outputs.batch_size)):
            coords = scene.voxels.coords.float()
            (x0, y0), (dx, dy) = scene.spec.grid.range[:2], scene.spec.cell_size()
            x, y = (coords[:, 3].mean() + 0.5) * dx + x0, (coords[:, 2].mean() + 0.5) * dy + y0
            box = torch.tensor([[x, y, 0.8, 4.0, 2.0, 1.6, YAW]])
            found.append(
                Predictions(boxes=Boxes3D(data=box), classes=one.long() * 0, scores=one, class_scores=one, iou_scores=one)
            )
        return found

    def bev_map(self, features):
        values = torch.stack([features.scene(i).voxels.features.mean(0) for i in range(features.batch_size)])
        return values[:, :, None, None].expand(-1, -1, *features.spec.shape[1:])


def cars(count: int, mean: tuple[float, float, float], seed: int) -> list[Frame]:
    """Frames with one car each, of sizes around a mean."""
    sizes = known_objects(count, mean, seed, spread=0.2).float()
    places = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 4 + torch.tensor([4.0, -2.0])
    frames = []
    for number, size in enumerate(sizes):
        box = torch.cat([places[number], size[2:] / 2, size, torch.tensor([YAW])])[None]
        labels = Labels.make(box, torch.zeros(1), num_points=torch.full((1,), 400))
        frames.append(
            Frame(id=f"{seed}-{number}", points=tiny.scan_with_car(1000 * seed + number, boxes=box, road=0), labels=labels)
        )
    return frames


@pytest.fixture(scope="module")
def teacher(one_thread) -> Detector:
    return Detector(MeasuresFaintly(tiny.source_model().encoder.config), FindsThePlace(), ("Car",)).eval()


@pytest.mark.parametrize("difference", [(-0.8, -0.4, -0.3), (0.6, 0.2, 0.2)])
def test_the_fleets_cars_are_measured_from_their_scenes_alone(teacher, tmp_path, difference):
    """No reading of a single car is right, and none has the fleet's sizes to fall back on."""
    mean = (4.0, 1.8, 1.6)
    fleet = cars(60, tuple(m + d for m, d in zip(mean, difference, strict=True)), 2)
    store = tiny.store(tmp_path, teacher, [frame.points for frame in fleet])
    config = SizeEstimateConfig(draws=3, fewest=20)
    (found,) = estimate_sizes(teacher, cars(60, mean, 1), store, config, codec="fp16", seed=0)
    assert (found.labeled_objects, found.fleet_objects) == (180, 60)
    assert found.reason == ""
    for value, wanted, error, length in zip(found.shift, difference, found.error, mean, strict=True):
        assert abs(value - wanted) < max(3 * error, 0.05 * length)
    assert all(0.05 < follow < 1 for follow in found.follows)


def test_labeled_frames_pass_the_defences_of_the_encoder_as_the_fleets_do(tmp_path):
    """Read without the defence, labeled cars would show other features than the fleet's, which would look like a size."""

    class SendsLess(MeasuresFaintly):
        def after_defences(self, features, rng=None):
            found = super().after_defences(features, rng)
            return replace(found, voxels=replace(found.voxels, features=found.voxels.features / 2))

    weak = Detector(SendsLess(tiny.source_model().encoder.config), FindsThePlace(), ("Car",)).eval()
    store = tiny.store(tmp_path, weak, [frame.points for frame in cars(60, (4.0, 1.8, 1.6), 5)])
    (found,) = estimate_sizes(
        weak, cars(60, (4.0, 1.8, 1.6), 1), store, SizeEstimateConfig(draws=3, fewest=20), codec="fp16", seed=0
    )
    assert max(map(abs, found.difference)) < 0.4


def test_an_earlier_estimate_moves_where_is_looked_and_not_what_is_found(teacher, tmp_path):
    """Asked around the truth, around the labeled sizes or beyond the truth: the answer is the difference from the labeled sizes."""
    mean, difference = (4.0, 1.8, 1.6), (-0.8, -0.4, -0.3)
    store = tiny.store(
        tmp_path, teacher, [f.points for f in cars(60, tuple(m + d for m, d in zip(mean, difference, strict=True)), 2)]
    )
    config = SizeEstimateConfig(draws=3, fewest=20)
    for about in ((0.0, 0.0, 0.0), difference, (-1.2, -0.6, -0.4)):
        (found,) = estimate_sizes(teacher, cars(60, mean, 1), store, config, codec="fp16", seed=0, about=about)
        assert found.labeled == pytest.approx(mean, abs=0.1)
        for value, wanted, error, length in zip(found.difference, difference, found.error, mean, strict=True):
            assert abs(value - wanted) < max(3 * error, 0.05 * length)


def test_labels_of_the_fleet_are_joined_by_their_precision_and_make_up_for_a_teacher_that_finds_nothing(teacher, tmp_path):
    mean, longer = (4.0, 1.8, 1.6), (4.6, 1.8, 1.6)
    frames, asked = cars(60, mean, 1), cars(40, longer, 7)
    store = tiny.store(tmp_path, teacher, [frame.points for frame in cars(60, longer, 2)])
    config = SizeEstimateConfig(draws=3, fewest=20)
    (alone,) = estimate_sizes(teacher, frames, store, config, codec="fp16", seed=0)
    (joined,) = estimate_sizes(teacher, frames, store, config, codec="fp16", seed=0, asked=asked)
    (blind,) = estimate_sizes(
        tiny.source_model(), frames, store, replace(config, iou_score=1.0), codec="fp16", seed=0, asked=asked
    )
    of_labels = torch.cat([f.labels.boxes.data for f in asked])[:, 3:6].mean(0) - torch.cat(
        [f.labels.boxes.data for f in frames]
    )[:, 3:6].mean(0)
    low, high = sorted((alone.difference[0], float(of_labels[0])))
    assert low < joined.difference[0] < high
    assert joined.error[0] < alone.error[0]
    assert blind.shift == pytest.approx(of_labels.tolist(), abs=1e-5)
    assert (blind.asked_objects, blind.reason) == (40, "")
    assert "and 40 labeled ones" in str(blind)


def test_a_fleet_of_the_same_cars_keeps_the_sizes(teacher, tmp_path):
    store = tiny.store(tmp_path, teacher, [frame.points for frame in cars(60, (4.0, 1.8, 1.6), 5)])
    config = SizeEstimateConfig(draws=3, fewest=20)
    (found,) = estimate_sizes(teacher, cars(60, (4.0, 1.8, 1.6), 1), store, config, codec="fp16", seed=0)
    assert found.shift == (0.0, 0.0, 0.0)
    assert "no evidence" in found.reason


def test_the_estimate_depends_on_its_seed_alone(teacher, tmp_path):
    frames = cars(20, (4.0, 1.8, 1.6), 1)
    store = tiny.store(tmp_path, teacher, [frame.points for frame in cars(20, (3.5, 1.8, 1.6), 2)])
    config = SizeEstimateConfig(draws=2, fewest=10)
    one, again, other = (estimate_sizes(teacher, frames, store, config, codec="fp16", seed=seed) for seed in (0, 0, 1))
    assert one[0].difference == pytest.approx(again[0].difference, rel=1e-6)
    assert one[0].difference != pytest.approx(other[0].difference, rel=1e-3)


def test_too_few_objects_leave_the_sizes_as_they_are(store):
    """An untrained teacher is sure of nothing: no number is made up."""
    frames = [tiny.frame_with_car(seed) for seed in range(3)]
    (found,) = estimate_sizes(tiny.source_model(), frames, store, SizeEstimateConfig(iou_score=1.0), codec="fp16", seed=0)
    assert found.shift == (0.0, 0.0, 0.0)
    assert "are needed" in found.reason
    assert found.labeled == pytest.approx(tuple(tiny.frame_with_car(0).labels.boxes.data[0, 3:6].tolist()))
    assert "sizes stay as they are" in str(found)


def test_an_empty_store_and_frames_without_objects_are_no_error(store):
    empty = replace(tiny.frame_with_car(0), labels=tiny.frame_with_car(0).labels.select(torch.zeros(1, dtype=torch.bool)))
    (found,) = estimate_sizes(tiny.source_model(), [empty], store, SizeEstimateConfig(), codec="fp16", seed=0)
    assert (found.labeled_objects, found.shift) == (0, (0.0, 0.0, 0.0))


def test_shifts_of_all_classes_are_one_tuple():
    none = SizeEstimate(
        class_name="Car", labeled=(4, 2, 1.5), difference=(0.1, 0.1, 0.1), error=(0.1, 0.1, 0.1), follows=(1, 1, 1),
        labeled_objects=9, fleet_objects=9, shift=(0.1, 0.2, 0.3),
    )  # fmt: skip
    assert shift_of([none, replace(none, shift=(0.0, 0.0, 0.0))]) == (0.1, 0.2, 0.3, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "wrong", [{"iou_score": 2.0}, {"draws": 0}, {"common": -1.0}, {"ridge": 0.0}, {"least_error": float("nan")}]
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        SizeEstimateConfig(**wrong)
