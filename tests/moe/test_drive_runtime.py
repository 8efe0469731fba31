"""A drive within a memory budget, in simulated time: who waits for what, what is fetched ahead, and that every frame sees its own context."""

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.moe.carving.splits import random_units
from upcycle3d.perception.moe.driving.carved_folder import CONTEXTS, open_carved_detector, write_carved_detector
from upcycle3d.perception.moe.driving.channel_carving import measure_channels
from upcycle3d.perception.moe.driving.context_gate import Hysteresis, fit_context_gate
from upcycle3d.perception.moe.driving.drive_runtime import ContextDrive, DriveConfig, PlainDrive, find_objects
from upcycle3d.perception.moe.driving.scan_descriptor import ScanDescriptorConfig, describe_scan
from upcycle3d.perception.moe.runtime.clock import ManualClock
from upcycle3d.perception.moe.runtime.transfers import SimulatedChannel, TransferCost
from upcycle3d.perception.training.detector_files import load_detector

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("road", "no_road", "few_points")
FRAME, TRANSFER = 0.1, 0.03
RULE = Hysteresis(frames=3, margin=float("inf"))


def scan(context: int, seed: int = 0):
    points = tiny.frame_with_car(seed).points
    if context == 1:
        return points.select(points.xyz[:, 2] > 0.06)
    return points if context == 0 else points.select(torch.arange(0, len(points), 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    detector = tiny.second_iou().eval()
    with torch.no_grad():
        scenes = {name: [detector.encode([scan(n, s)]) for s in range(2)] for n, name in enumerate(NAMES)}
    carving = random_units(measure_channels(detector, scenes, least_tokens=1), 0.5, seed=2)
    config = ScanDescriptorConfig()
    scans = {name: [describe_scan(scan(n, s), config) for s in range(6)] for n, name in enumerate(NAMES)}
    made = tmp_path_factory.mktemp("drive") / "carved"
    write_carved_detector(made, detector, carving, fit_context_gate(scans, config), hysteresis=RULE)
    return made


def driven(folder, contexts: list[int], count: int, *, given: bool = False, transfer: float = TRANSFER, **config):
    """Drive frames of these contexts with memory for `count` contexts; each frame takes `FRAME` seconds of simulated time."""
    opened, clock = open_carved_detector(folder), ManualClock()
    size = opened.context_bytes

    def find(detector: Detector, points):
        clock.wait(FRAME)
        return find_objects(detector, points)

    cost = TransferCost(latency=transfer, bandwidth=1e18)
    drive = ContextDrive(
        opened,
        DriveConfig(budget=count * size, **config),
        clock=clock,
        channel=lambda store: SimulatedChannel(store, cost, clock),
        find=find,
    )
    frames = [drive.step(scan(c, s), given=c if given else None) for s, c in enumerate(contexts)]
    return frames, drive.close(), size


DRIVE = [0] * 4 + [1] * 6 + [2] * 5 + [0] * 4


def test_every_frame_is_computed_with_the_context_that_was_decided(folder):
    frames, report, _ = driven(folder, DRIVE, 2)
    late = [0] * 6 + [1] * 6 + [2] * 5 + [0] * 2  # three frames must agree, so a switch comes two frames late
    assert [frame.context for frame in frames] == late
    assert [n for n, frame in enumerate(frames) if frame.switched] == [6, 12, 17]
    alone = [load_detector(folder / CONTEXTS / name) for name in NAMES]
    for seed, (frame, context) in enumerate(zip(frames, late)):
        wanted = find_objects(alone[context], scan(DRIVE[seed], seed))
        assert torch.equal(frame.found.boxes.data, wanted.boxes.data)
        assert torch.equal(frame.found.scores, wanted.scores)
    assert (report.counts.switches, report.counts.held_back, report.frames) == (3, 6, len(DRIVE))


def test_the_candidate_is_fetched_while_frames_are_computed(folder):
    """With room for two contexts only the first frame waits; without fetching ahead, or with room for one, every switch does."""
    frames, report, size = driven(folder, DRIVE, 2)
    assert [round(frame.stall_seconds, 6) for frame in frames if frame.stall_seconds] == [TRANSFER]
    assert frames[0].stall_seconds == pytest.approx(TRANSFER)
    assert (report.memory.demand_bytes, report.memory.ahead_bytes) == (size, 3 * size)
    assert report.memory.most_bytes == 2 * size
    for config in ({"count": 2, "fetch_ahead": False}, {"count": 1}):
        waiting, told, _ = driven(folder, DRIVE, **config)
        stalls = [n for n, frame in enumerate(waiting) if frame.stall_seconds]
        assert stalls == [0, 6, 12, 17]
        assert told.memory.ahead_bytes == 0
        assert told.stalled == 4
        assert told.switch_stall.mean == pytest.approx(TRANSFER)
        assert told.frame.most == pytest.approx(FRAME + TRANSFER)


def test_a_transfer_longer_than_the_votes_is_hidden_in_part(folder):
    """A vote lasts two frames (0.2 s); of 0.25 s of transfer 0.05 s are left to wait for."""
    frames, report, _ = driven(folder, DRIVE, 2, transfer=0.25)
    assert frames[6].stall_seconds == pytest.approx(0.05)
    assert (report.memory.late, report.memory.misses) == (3, 1)


def test_all_resident_never_waits_on_the_road(folder):
    frames, report, size = driven(folder, DRIVE, 3, all_resident=True)
    assert max(frame.stall_seconds for frame in frames) == report.stalled == 0
    assert (report.memory.most_bytes, report.memory.demand_bytes) == (3 * size, 3 * size)
    with pytest.raises(InvalidInput, match=r"3 contexts has .* bytes, and the budget is"):
        driven(folder, DRIVE, 2, all_resident=True)


def test_without_hysteresis_every_odd_frame_switches(folder):
    flicker = [0, 0, 1, 0, 0, 0, 2, 0, 0]
    calm, _, _ = driven(folder, flicker, 2)
    assert {frame.context for frame in calm} == {0}
    nervous, report, _ = driven(folder, flicker, 1, hysteresis=Hysteresis(frames=1))
    assert [frame.context for frame in nervous] == flicker
    assert report.counts.switches == 4
    assert report.stalled == 5


def test_an_oracle_and_a_wrong_context_are_given(folder):
    frames, report, _ = driven(folder, DRIVE, 1, given=True)
    assert [frame.context for frame in frames] == DRIVE
    assert (report.stalled, report.counts.frames) == (4, 0)
    with pytest.raises(InvalidInput, match="there is no context 7"):
        driven(folder, [7], 1, given=True)


def test_memory_is_what_the_report_says(folder):
    opened = open_carved_detector(folder)
    dense = PlainDrive(opened.detector, clock=ManualClock())
    dense.step(scan(0))
    whole = dense.close()
    assert whole.resident_bytes == opened.common_bytes + opened.context_bytes
    assert (whole.memory, whole.counts, whole.stalled) == (None, None, 0)
    opened.close()
    _, report, size = driven(folder, DRIVE, 1)
    assert report.resident_bytes == report.common_bytes + size
    text = str(report)
    assert "3 switches, 6 frames held back" in text
    assert "of 3; 4 frames waited" in text


def test_an_empty_frame_keeps_the_context(folder):
    opened, clock = open_carved_detector(folder), ManualClock()
    cost = TransferCost(latency=TRANSFER, bandwidth=1e18)
    config = DriveConfig(budget=opened.context_bytes)
    drive = ContextDrive(opened, config, clock=clock, channel=lambda store: SimulatedChannel(store, cost, clock))
    empty = scan(0).select(torch.zeros(0, dtype=torch.int64))
    contexts = [drive.step(points).context for points in (scan(1), empty, scan(1, 3))]
    assert contexts == [1, 1, 1]
    assert drive.state.counts.empty == 1
    drive.close()


def test_threads_load_contexts_for_real(folder):
    """The same drive with the clock and the thread of the machine."""
    opened = open_carved_detector(folder)
    drive = ContextDrive(opened, DriveConfig(budget=2 * opened.context_bytes))
    contexts = [drive.step(scan(c, s)).context for s, c in enumerate(DRIVE)]
    report = drive.close()
    assert contexts == [frame.context for frame in driven(folder, DRIVE, 2)[0]]
    assert report.memory.most_bytes <= 2 * opened.context_bytes
    assert report.memory.hits + report.memory.late + report.memory.misses == len(DRIVE)
