"""Range images into points: against the matrices of the format's description, pixel by pixel."""

import math
from dataclasses import replace

import numpy as np
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.waymo_geometry import LaserScan, WaymoFrame, beam_inclinations, frame_points

RNG = np.random.default_rng(3)
HEIGHT, WIDTH = 5, 8


def rotation(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Yaw about z, then pitch about y, then roll about x (3-2-1 Euler angles)."""
    (sr, cr), (sp, cp), (sy, cy) = ((math.sin(a), math.cos(a)) for a in (roll, pitch, yaw))
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def transform(roll: float, pitch: float, yaw: float, x: float, y: float, z: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(roll, pitch, yaw), (x, y, z)
    return matrix


POSE = transform(0.01, -0.02, 2.5, -25000.0, 42000.0, -160.0)
EXTRINSIC = transform(0.005, -0.01, 2.58, 1.43, 0.0, 2.18)  # Waymo's TOP laser is mounted turned by 148 degrees
INCLINATIONS = np.array([-0.3, -0.15, -0.05, 0.0, 0.04])


def image(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = np.stack(
        [
            rng.uniform(1, 75, (HEIGHT, WIDTH)),
            rng.exponential(2, (HEIGHT, WIDTH)),
            rng.uniform(0, 1.5, (HEIGHT, WIDTH)),
            rng.choice([-1.0, 1.0], (HEIGHT, WIDTH), p=[0.8, 0.2]),
        ],
        -1,
    ).astype(np.float32)
    made[rng.random((HEIGHT, WIDTH)) < 0.3] = -1
    return made


def pixel_poses() -> np.ndarray:
    """The vehicle drives 1 m and turns by a degree during the turn of the laser."""
    poses = np.zeros((HEIGHT, WIDTH, 6), np.float32)
    poses[:] = (0.01, -0.02, 2.5, 20.0, -30.0, 4.0)
    poses += np.linspace(-0.5, 0.5, WIDTH)[None, :, None] * np.array([0.002, 0.001, 0.02, 0.8, 0.6, 0.01], np.float32)
    return poses


NEAR_POSE = transform(0.01, -0.02, 2.5, 20.0, -30.0, 4.0)
TOP = LaserScan(
    name=1,
    returns=(image(1), image(2)),
    pixel_poses=pixel_poses(),
    extrinsic=EXTRINSIC,
    inclinations=INCLINATIONS,
    inclination_range=(-0.3, 0.04),
)
SIDE = replace(TOP, name=3, returns=(image(4), image(5)), pixel_poses=None, inclinations=None, inclination_range=(-1.57, 0.52))
FRAME = WaymoFrame(segment="s", timestamp=1, pose=NEAR_POSE, lasers=(TOP, SIDE), objects=None)


def expected(frame: WaymoFrame, scan: LaserScan, image: np.ndarray, drop: bool = True) -> np.ndarray:
    """The points of one image by the written rules: one pixel, one chain of matrices."""
    rows = []
    correction = math.atan2(scan.extrinsic[1, 0], scan.extrinsic[0, 0])
    for i in range(HEIGHT):
        if scan.inclinations is not None:
            inclination = scan.inclinations[HEIGHT - 1 - i]
        else:
            low, high = scan.inclination_range
            inclination = low + (HEIGHT - 1 - i + 0.5) / HEIGHT * (high - low)
        for j in range(WIDTH):
            distance, intensity, elongation, zone = map(float, image[i, j])
            if distance <= 0 or (drop and zone != -1):
                continue
            azimuth = ((WIDTH - j - 0.5) / WIDTH * 2 - 1) * math.pi - correction
            point = np.array(
                [
                    distance * math.cos(azimuth) * math.cos(inclination),
                    distance * math.sin(azimuth) * math.cos(inclination),
                    distance * math.sin(inclination),
                    1,
                ]
            )
            point = scan.extrinsic @ point
            if scan.pixel_poses is not None:
                point = np.linalg.inv(frame.pose) @ transform(*map(float, scan.pixel_poses[i, j])) @ point
            rows.append([*point[:3], math.tanh(intensity), elongation])
    return np.array(rows)


def numbers(cloud) -> np.ndarray:
    return np.concatenate([cloud.xyz.numpy(), cloud.features.numpy()], 1)


@pytest.mark.parametrize("drop", [True, False])
def test_points_are_those_of_the_chain_of_transforms(drop):
    parts = [expected(FRAME, scan, image, drop) for scan in FRAME.lasers for image in scan.returns]
    cloud = frame_points(FRAME, drop_no_label_zones=drop)
    assert cloud.feature_names == ("intensity", "elongation")
    np.testing.assert_allclose(numbers(cloud), np.concatenate(parts), atol=1e-4)


def test_the_first_return_alone():
    parts = [expected(FRAME, scan, scan.returns[0]) for scan in FRAME.lasers]
    np.testing.assert_allclose(numbers(frame_points(FRAME, second_return=False)), np.concatenate(parts), atol=1e-4)


def test_the_first_column_looks_backwards_and_the_turn_is_clockwise_however_the_laser_is_mounted():
    one = np.full((1, 4, 4), -1, np.float32)
    one[0, :, 0], one[0, :, 1:3] = 10, 0
    for yaw in (0.0, 1.0, -2.5):
        scan = replace(SIDE, returns=(one,), extrinsic=transform(0, 0, yaw, 0, 0, 0), inclinations=np.zeros(1))
        xyz = frame_points(replace(FRAME, lasers=(scan,))).xyz.numpy() / 10
        half = math.sqrt(0.5)
        np.testing.assert_allclose(xyz, [[-half, half, 0], [half, half, 0], [half, -half, 0], [-half, -half, 0]], atol=1e-6)


def test_poses_tens_of_kilometres_from_the_origin_cost_no_more_than_their_own_rounding():
    scan = replace(
        TOP, pixel_poses=np.broadcast_to(np.float32([0.01, -0.02, 2.5, -25000.25, 42000.25, -160.5]), (HEIGHT, WIDTH, 6))
    )
    frame = replace(FRAME, pose=transform(0.01, -0.02, 2.5, -25000.25, 42000.25, -160.5), lasers=(scan,))
    still = replace(scan, name=2, pixel_poses=None)
    np.testing.assert_allclose(
        frame_points(frame).xyz, frame_points(replace(frame, lasers=(still,))).xyz, atol=2e-5
    )  # standing still, world coordinates cancel


def test_listed_inclinations_are_turned_and_even_ones_start_half_a_step_inside():
    np.testing.assert_array_equal(beam_inclinations(TOP, 5), INCLINATIONS[::-1])
    np.testing.assert_allclose(
        beam_inclinations(replace(TOP, inclinations=None, inclination_range=(0, 5)), 5), [4.5, 3.5, 2.5, 1.5, 0.5]
    )


def test_a_frame_without_lasers_or_with_empty_images_has_no_points():
    empty = replace(TOP, returns=(np.full((HEIGHT, WIDTH, 4), -1, np.float32),))
    for lasers in ((), (empty,), (replace(SIDE, returns=()),)):
        cloud = frame_points(replace(FRAME, lasers=lasers))
        assert (len(cloud), cloud.features.shape) == (0, (0, 2))
    no_pose = replace(FRAME, pose=None, lasers=(empty,))
    assert len(frame_points(no_pose)) == 0  # nothing that would lie in the wrong place


def damaged() -> LaserScan:
    poses = pixel_poses()
    poses[2] = np.nan
    return replace(TOP, pixel_poses=poses)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (replace(FRAME, lasers=(replace(TOP, pixel_poses=None),)), "no pose for each pixel of the TOP laser.*other coordinates"),
        (replace(FRAME, pose=None), "no vehicle pose: its points would lie in other coordinates than the labels"),
        (replace(FRAME, lasers=(replace(TOP, pixel_poses=pixel_poses()[:, 1:]),)), r"poses \(5, 7, 6\) do not fit .* \(5, 8\)"),
        (replace(FRAME, lasers=(replace(TOP, inclinations=INCLINATIONS[1:]),)), "TOP: 4 beam inclinations for .* 5 rows"),
        (replace(FRAME, lasers=(replace(SIDE, returns=(image(1)[..., :3],)),)), r"must be \(rows, columns, 4\)"),
        (replace(FRAME, pose=np.zeros((4, 4))), "the vehicle pose is not a rotation"),
        (
            replace(FRAME, lasers=(replace(SIDE, extrinsic=np.full((4, 4), np.nan)),)),
            "SIDE_LEFT: the extrinsic is not a rotation",
        ),
        (replace(FRAME, lasers=(damaged(),)), "laser TOP: .* points hold NaN or inf"),
    ],
)
def test_what_does_not_fit_together_is_refused(frame, message):
    with pytest.raises(InvalidInput, match=message):
        frame_points(frame)
