"""The pre-gate of a vehicle: descriptions counted by hand, a classifier at its optimum, and a hysteresis that follows its definition."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.models.decoders.scene_decision import FARTHEST
from upcycle3d.perception.moe.driving.context_gate import (
    ContextGate,
    DriveState,
    Hysteresis,
    after_logits,
    decide,
    fit_context_gate,
)
from upcycle3d.perception.moe.driving.scan_descriptor import ScanDescriptorConfig, describe_scan

CONFIG = ScanDescriptorConfig(ranges=(5.0, 10.0), heights=(0.5,), elevations=(-5.0, 0.0), intensities=(0.5,), sensor_height=1.0)


def scan_of(*rows: tuple[float, ...]) -> PointCloud:
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 4)
    return PointCloud(xyz=table[:, :3], features=table[:, 3:])


def drawn(seed: int, reach: float, points: int = 200) -> PointCloud:
    """A road whose points end at `reach` meters."""
    draw = np.random.default_rng(seed)
    xyz = np.stack([draw.uniform(1, reach, points), draw.uniform(-5, 5, points), draw.uniform(0, 2, points)], 1)
    return PointCloud.from_array(np.concatenate([xyz, draw.uniform(0, 0.5, (points, 1))], 1))


# ---- descriptions


def test_a_description_counts_points():
    """Four points, sorted into the parts by hand."""
    found = describe_scan(
        scan_of((3.0, 4.0, 1.0, 0.2), (1.0, 0.0, 0.0, 0.6), (8.0, 0.0, 0.5, 0.4), (30.0, 40.0, 3.0, 0.5)), CONFIG
    )
    assert (found.points, found.non_finite) == (4, 0)
    count, *shares = found.values.tolist()
    assert count == pytest.approx(math.log(5))
    near, middle, far = 0.25, 0.5, 0.25  # 1 m; 5 m, which lies on a border, and 8 m; 50 m
    low, high = 0.25, 0.75  # 0 m; 1, 0.5 (on a border) and 3 m
    steep, flat, up = 0.25, 0.25, 0.5  # -45 degrees; -3.6; 0 (on a border) and 2.3
    dim, bright = 0.5, 0.5
    assert shares == [near, middle, far, low, high, steep, flat, up, dim, bright]
    assert len(found.values) == CONFIG.width


@pytest.mark.parametrize("seed", range(3))
def test_histograms_are_those_of_numpy(seed):
    scan = drawn(seed, 40.0)
    config = ScanDescriptorConfig(sensor_height=1.7)
    found = describe_scan(scan, config).values.numpy()
    xyz = scan.xyz.double().numpy()
    flat = np.hypot(xyz[:, 0], xyz[:, 1])
    columns = (flat, xyz[:, 2], np.degrees(np.arctan2(xyz[:, 2] - 1.7, flat)), scan.features[:, 0].double().numpy())
    borders = (config.ranges, config.heights, config.elevations, config.intensities)
    wanted = [np.histogram(c, [-np.inf, *b, np.inf])[0] / len(scan) for c, b in zip(columns, borders)]
    np.testing.assert_allclose(found[1:], np.concatenate(wanted), atol=1e-12)


def test_points_that_are_no_numbers_are_left_out_and_counted():
    good, nan = (3.0, 4.0, 1.0, 0.2), float("nan")
    found = describe_scan(scan_of(good, (nan, 0, 0, 0.1), (1, float("inf"), 0, 0.1), (1, 1, 1, nan)), CONFIG)
    assert (found.points, found.non_finite) == (1, 3)
    assert torch.equal(found.values, describe_scan(scan_of(good), CONFIG).values)
    nothing = describe_scan(scan_of(), CONFIG)
    assert (nothing.points, nothing.values.abs().sum().item()) == (0, 0.0)


def test_a_scan_without_intensity_is_refused_or_described_without():
    scan = PointCloud(xyz=torch.ones(2, 3), features=torch.zeros(2, 0), feature_names=())
    with pytest.raises(InvalidInput, match="counts intensities"):
        describe_scan(scan, CONFIG)
    assert len(describe_scan(scan, replace(CONFIG, intensities=())).values) == CONFIG.width - 2
    with pytest.raises(InvalidInput, match=r"heights must be at most 256 rising borders"):
        replace(CONFIG, heights=(1.0, 1.0))


# ---- the classifier


@pytest.fixture(scope="module")
def scans():
    reaches = {"clear": (60.0, 8), "fog": (18.0, 4), "town": (40.0, 5)}
    return {
        name: [describe_scan(drawn(100 * n + i, reach), CONFIG) for i in range(count)]
        for n, (name, (reach, count)) in enumerate(reaches.items())
    }


def test_the_fit_is_the_optimum_that_another_solver_finds(scans):
    """The oracle minimizes the same objective, written in numpy, with scipy; contexts of different sizes count the same."""
    decay = 0.01
    gate = fit_context_gate(scans, CONFIG, decay=decay)
    values = np.stack([s.values.numpy() for own in scans.values() for s in own])
    label = np.concatenate([[n] * len(own) for n, own in enumerate(scans.values())])
    share = np.array([1 / len(own) / 3 for own in scans.values() for _ in own])
    center = share @ values
    spread = np.maximum(np.sqrt(share @ (values - center) ** 2), 1e-3)
    x = np.c_[np.clip((values - center) / spread, -FARTHEST, FARTHEST), np.ones(len(values))]

    def objective(flat):
        w = flat.reshape(3, -1)
        z = x @ w.T
        log = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        return -(share * log[np.arange(len(x)), label]).sum() + decay * (w**2).sum()

    found = minimize(objective, np.zeros(3 * x.shape[1]), method="BFGS", options={"gtol": 1e-8})
    mine = np.c_[gate.weight.numpy(), gate.bias.numpy()]
    np.testing.assert_allclose(mine, found.x.reshape(3, -1), atol=2e-5)
    again = fit_context_gate(scans, CONFIG, decay=decay)
    assert torch.equal(again.weight, gate.weight)


def test_a_gate_knows_the_contexts_of_new_scans(scans):
    gate = fit_context_gate(scans, CONFIG)
    for number, reach in enumerate((60.0, 18.0, 40.0)):
        best = [int(gate.logits(describe_scan(drawn(9000 + i, reach), CONFIG)).argmax()) for i in range(20)]
        assert best.count(number) >= 18


def test_a_fit_without_scans_is_refused(scans):
    empty = describe_scan(scan_of(), CONFIG)
    with pytest.raises(InvalidInput, match="none of the 2 scans of 'fog' has a point"):
        fit_context_gate({**scans, "fog": [empty, empty]}, CONFIG)
    fit_context_gate({**scans, "fog": [empty, *scans["fog"]]}, CONFIG)
    with pytest.raises(InvalidInput, match="described by"):
        fit_context_gate(scans, replace(CONFIG, intensities=()))
    gate = fit_context_gate(scans, CONFIG)
    with pytest.raises(InvalidInput, match="the bias of a gate must be finite"):
        replace(gate, bias=gate.bias * float("nan"))
    with pytest.raises(InvalidInput, match="names of their own"):
        replace(gate, contexts=("a", "a", "b"))


# ---- hysteresis


def by_definition(rule: Hysteresis, frames: list[list[float] | None]) -> list[int]:
    """The oracle: looks back over the whole history at every frame instead of counting votes."""
    decisions: list[int] = []
    best: list[int | None] = []
    for t, logits in enumerate(frames):
        last = decisions[-1] if decisions else None
        if logits is None:
            best.append(None)
            decisions.append(0 if last is None else last)
            continue
        raised = [v + (rule.stay if n == last else 0) for n, v in enumerate(logits)]
        top = max(range(len(raised)), key=lambda n: (raised[n], n == last, -n))
        best.append(top)
        if all(earlier is None for earlier in best[:-1]):
            decisions.append(top)
            continue
        # the frames that say something, backwards, as long as they name `top` and the decision before them was already `last`
        streak = 0
        for s in range(t, -1, -1):
            if best[s] is None:
                continue
            if best[s] != top or (s > 0 and decisions[s - 1] != last):
                break
            streak += 1
        sure = raised[top] - raised[last] >= rule.margin
        decisions.append(top if top != last and (streak >= rule.frames or sure) else last)
    return decisions


@pytest.mark.parametrize(
    "rule", [Hysteresis(frames=n, margin=m, stay=s) for n, m, s in itertools.product((1, 2, 3), (2.5, math.inf), (0.0, 1.5))]
)
def test_a_decision_changes_as_the_definition_says(rule):
    draw = np.random.default_rng(0)
    for _ in range(20):
        frames: list[list[float] | None] = []
        for _ in range(40):
            silent = draw.random() < 0.1
            frames.append(None if silent else [float(v) for v in draw.integers(0, 4, 3)])
        state, found = DriveState(), []
        for logits in frames:
            state = after_logits(rule, state, logits)
            found.append(state.context)
        assert found == by_definition(rule, frames)
        assert state.counts.frames == 40
        assert state.counts.empty == sum(logits is None for logits in frames)
        assert state.counts.switches == sum(a != b for a, b in itertools.pairwise(found))


def test_one_odd_frame_changes_nothing_and_names_a_candidate():
    rule, state = Hysteresis(frames=2, margin=5.0), DriveState()
    found = []
    for logits in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], None, [0.0, 1.0], [9.0, 1.0]):
        state = after_logits(rule, state, logits)
        found.append((state.context, state.candidate, state.votes))
    # a frame without points neither votes nor breaks a row of votes; the last frame is sure enough alone
    assert found == [(0, None, 0), (0, 1, 1), (0, None, 0), (0, 1, 1), (0, 1, 1), (1, None, 0), (0, None, 0)]
    assert (state.counts.switches, state.counts.held_back, state.counts.empty) == (2, 3 - 1, 1)


def test_a_drive_counts_what_it_leaves_out(scans):
    gate = fit_context_gate(scans, CONFIG)
    nan = scan_of((float("nan"), 0, 0, 0.1), (0, 0, float("nan"), 0.1))
    state = decide(gate, Hysteresis(), DriveState(), nan)
    assert (state.context, state.seen, state.counts.empty, state.counts.non_finite) == (0, False, 1, 2)
    state = decide(gate, Hysteresis(), state, drawn(1, 18.0))
    assert (state.context, state.seen, state.counts.switches, state.counts.frames) == (1, True, 1, 2)
    assert isinstance(gate, ContextGate)


def test_rules_that_make_no_sense_are_refused():
    with pytest.raises(InvalidInput, match=r"Hysteresis\.frames"):
        Hysteresis(frames=0)
    with pytest.raises(InvalidInput, match=r"Hysteresis\.margin must be above 0"):
        Hysteresis(margin=float("nan"))
