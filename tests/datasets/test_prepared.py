"""Prepared datasets: what comes out is what went in, after kills, with bad frames, for any number of workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.core.files import atomic_file
from upcycle3d.core.frame import Calibration, Frame
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.fingerprint import as_recorded, same_split, split_fingerprint
from upcycle3d.datasets.frame_source import DatasetOrigin
from upcycle3d.datasets.prepare import PrepareReport, prepare
from upcycle3d.datasets.prepared import PreparedDataset

CLASSES = ("Car", "Pedestrian")


def make_frame(seed: int, *, points: int = 60, boxes: int = 2) -> Frame:
    rng = np.random.default_rng(seed)
    data = torch.zeros(boxes, 7)
    data[:, :2] = torch.from_numpy(rng.uniform(5, 50, (boxes, 2)))
    data[:, 3:6] = torch.tensor([4.0, 2.0, 1.5])
    data[:, 6] = torch.from_numpy(rng.uniform(-3, 3, boxes))
    calibration = Calibration(
        lidar_to_camera=torch.from_numpy(rng.normal(size=(4, 4))),
        projection=torch.from_numpy(rng.normal(size=(3, 4))),
        image_size=(1242, 375),
    )
    xyz = torch.from_numpy(rng.uniform(-50, 50, (points, 3)).astype(np.float32))
    if points:
        xyz[:boxes] = data[:, :3]
    return Frame(
        id=f"{seed:06d}",
        points=PointCloud(
            xyz=xyz,
            features=torch.from_numpy(rng.random((points, 1), np.float32)),
        ),
        labels=Labels.make(data, torch.arange(boxes) % 2, weight=torch.arange(boxes).float()),
        calibration=calibration if seed % 2 else None,
    )


class Source:
    """Frames made on demand; ``broken`` ones are replaced by what a broken reader does."""

    def __init__(self, count: int, broken: dict[int, Callable[[Frame], Frame]] | None = None) -> None:
        self.count, self.broken = count, broken or {}
        self.ids = [f"{i:06d}" for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Frame:
        frame = make_frame(index, points=0 if index == 3 else 60, boxes=0 if index == 4 else 2)
        return self.broken[index](frame) if index in self.broken else frame


def run(source: Source, out: Path, **changes: object) -> PrepareReport:
    arguments: dict = {
        "splits": {"train": source.ids[:-2], "val": source.ids[-2:]},
        "classes": CLASSES,
        "workers": 1,
        "chunk_frames": 3,
    }
    return prepare(source, source.ids, out, **(arguments | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same(a: Frame, b: Frame) -> None:
    assert a.id == b.id
    assert torch.equal(a.points.xyz, b.points.xyz)
    assert torch.equal(a.points.features, b.points.features)
    assert a.points.feature_names == b.points.feature_names
    assert (a.labels is None, a.calibration is None) == (b.labels is None, b.calibration is None)
    if a.labels is not None and b.labels is not None:
        assert torch.equal(a.labels.boxes.data, b.labels.boxes.data)
        for name in ("classes", "difficulty", "weight", "exact"):
            x, y = getattr(a.labels, name), getattr(b.labels, name)
            assert torch.equal(x, y)
            assert x.dtype == y.dtype
        assert a.labels.complete == b.labels.complete
    if a.calibration is not None and b.calibration is not None:
        assert torch.equal(a.calibration.lidar_to_camera, b.calibration.lidar_to_camera)
        assert torch.equal(a.calibration.projection, b.calibration.projection)
        assert a.calibration.image_size == b.calibration.image_size


def test_frames_come_back_exactly_with_empty_ones_among_them(tmp_path: Path) -> None:
    source = Source(7, {5: lambda f: replace(f, labels=None)})
    steps: list[tuple[int, int]] = []
    report = run(source, tmp_path / "d", on_progress=lambda done, of: steps.append((done, of)))
    data = PreparedDataset(tmp_path / "d")
    assert len(data) == len(source) == report.frames
    for i in range(len(source)):
        assert_same(data[i], source[i])
    assert len(data[3].points) == 0
    labels = data[4].labels
    assert labels is not None
    assert len(labels) == 0
    assert data[5].labels is None
    assert (data.classes, data.feature_names) == (CLASSES, ("intensity",))
    assert (data.rig, data.origin) == (RigSpec(), DatasetOrigin())
    assert steps == [(3, 7), (6, 7), (7, 7)]
    assert (report.points, report.boxes, report.failures, report.splits) == (6 * 60, 5 * 2, (), {"train": 5, "val": 2})
    assert data.verify() == ()
    assert sum(1 for _ in data) == 7  # iteration ends
    data[0].points.xyz.zero_()  # a frame is the reader's own: writing to it harms nobody
    assert_same(data[0], source[0])


def test_unknown_point_counts_are_counted_and_known_ones_kept(tmp_path: Path) -> None:
    def with_known(frame: Frame) -> Frame:
        box = torch.tensor([[0.0, 0, 0, 4, 2, 2, 0], [30.0, 0, 0, 4, 2, 2, 0], [40.0, 0, 0, 4, 2, 2, 0]])
        points = PointCloud(xyz=torch.tensor([[0.0, 0, 0], [1, 0.5, 0.5], [9, 9, 9]]), features=torch.zeros(3, 1))
        return replace(frame, points=points, labels=Labels.make(box, torch.zeros(3), num_points=torch.tensor([-1, -1, 17])))

    source = Source(6, {0: with_known})
    report = run(source, tmp_path / "d")
    labels = PreparedDataset(tmp_path / "d").labels(0)
    assert labels is not None
    assert labels.num_points.tolist() == [2, 0, 17]
    assert report.empty_boxes >= 1


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    source = Source(10, {7: lambda f: replace(f, id="else")})
    for workers in (0, 2, 3):
        run(source, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "2") == contents(tmp_path / "3")


def _raise(frame: Frame) -> Frame:
    raise FileNotFoundError(f"no velodyne/{frame.id}.bin")


def _nan_point(frame: Frame) -> Frame:
    frame.points.xyz[5, 1] = float("nan")
    return frame


def _box(column: int, value: float) -> Callable[[Frame], Frame]:
    def change(frame: Frame) -> Frame:
        assert frame.labels is not None
        frame.labels.boxes.data[1, column] = value
        return frame

    return change


def _class_9(frame: Frame) -> Frame:
    assert frame.labels is not None
    frame.labels.classes[0] = 9
    return frame


def _two_features(frame: Frame) -> Frame:
    n = len(frame.points)
    return replace(frame, points=replace(frame.points, features=torch.zeros(n, 2), feature_names=("intensity", "time")))


BROKEN: dict[int, tuple[Callable[[Frame], Frame], str]] = {
    0: (_raise, "no velodyne/000000.bin"),
    1: (_nan_point, "1 of 60 points hold NaN or inf, the first in row 5"),
    2: (_box(3, 0.0), "size of zero"),
    5: (_box(6, 4.0), "yaws are outside"),
    6: (_box(0, float("inf")), "boxes hold NaN or inf"),
    7: (_class_9, "classes are outside 0..1"),
    8: (lambda f: replace(f, points=replace(f.points, features=f.points.features * 255)), "--intensity-scale 1/255"),
    9: (_two_features, "point features are ('intensity', 'time')"),
    10: (lambda f: replace(f, id="000099"), "calls itself '000099'"),
    11: (
        lambda f: replace(f, rig=RigSpec(z_shift=2)),
        "its rig (z_shift, intensity_scale) is (2.0, 1.0), that of most frames is (0.0, 1.0)",
    ),
}


def test_bad_frames_are_reported_and_left_out_and_tried_again_once_repaired(tmp_path: Path) -> None:
    source = Source(14, {i: change for i, (change, _) in BROKEN.items()})
    report = run(source, tmp_path / "d", workers=2)
    assert [f.id for f in report.failures] == [f"{i:06d}" for i in BROKEN]
    for failure, (_, reason) in zip(report.failures, BROKEN.values(), strict=True):
        assert reason in failure.reason
    good = [i for i in range(14) if i not in BROKEN]
    data = PreparedDataset(tmp_path / "d")
    assert data.ids == tuple(source.ids[i] for i in good)
    for at, i in enumerate(good):
        assert_same(data[at], source[i])
    assert PreparedDataset(tmp_path / "d", "val").ids == ("000012", "000013")

    repaired = run(Source(14), tmp_path / "d")
    assert (repaired.frames, repaired.failures) == (14, ())
    run(Source(14), tmp_path / "fresh")
    assert contents(tmp_path / "d") == contents(tmp_path / "fresh")


def test_the_rig_of_the_frames_and_the_origin_of_the_source_are_kept(tmp_path: Path) -> None:
    class Described(Source):
        origin = DatasetOrigin(layout="folder", root=Path("/my/data"), options=(("z_shift", "1.6"), ("columns", "x y z")))

    rig = RigSpec(z_shift=1.6, intensity_scale=0.25)
    source = Described(4, {i: lambda f: replace(f, rig=rig, labels=None) for i in range(4)})
    run(source, tmp_path / "d")
    data = PreparedDataset(str(tmp_path / "d"))
    assert (data.rig, data[1].rig, data.origin) == (rig, rig, source.origin)


def test_an_empty_split_is_refused_before_and_after_reading(tmp_path: Path) -> None:
    source = Source(6, {4: _raise, 5: _raise})
    with pytest.raises(InvalidInput, match="split 'val' is empty"):
        run(source, tmp_path / "a", splits={"val": []})
    with pytest.raises(UpcycleError, match=r"every frame of val .* no velodyne/000004"):
        run(source, tmp_path / "b")
    with pytest.raises(InvalidInput, match="holds no dataset"):
        PreparedDataset(tmp_path / "b")
    with pytest.raises(UpcycleError, match="every frame of the dataset"):
        run(Source(2, {0: _raise, 1: _raise}), tmp_path / "c", splits={})
    run(Source(2), tmp_path / "c", splits={}, chunk_frames=5)  # nothing good was there, so other settings may follow


def test_contradictory_arguments_are_refused(tmp_path: Path) -> None:
    source = Source(4)
    with pytest.raises(InvalidInput, match="3 ids for 4 frames"):
        prepare(source, source.ids[:3], tmp_path, splits={}, classes=CLASSES)
    with pytest.raises(InvalidInput, match="1 that do not exist"):
        run(source, tmp_path, splits={"train": ["nobody"]})
    with pytest.raises(InvalidInput, match="1 frames twice"):
        run(source, tmp_path, splits={"train": ["000001", "000001"]})
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_refused_but_other_splits_are_welcome(tmp_path: Path) -> None:
    source = Source(6)
    run(source, tmp_path / "d")
    with pytest.raises(InvalidInput, match=r"other settings \(classes: .*'Pedestrian'\] -> \['Car', 'Cyclist'\]"):
        run(source, tmp_path / "d", classes=("Car", "Cyclist"))
    with pytest.raises(InvalidInput, match=r"other settings \(z_shift: None -> '1.6'\)"):
        run(source, tmp_path / "d", origin=DatasetOrigin(options=(("z_shift", "1.6"),)))
    report = run(source, tmp_path / "d", splits={"one": ["000002"]})
    assert report.reused_frames == 6
    assert PreparedDataset(tmp_path / "d", "one").ids == ("000002",)
    assert (report.kept_splits, len(PreparedDataset(tmp_path / "d", "train"))) == (("train", "val"), 4)
    run(source, tmp_path / "d", splits={"one": ["000002"]}, replace_splits=True)
    with pytest.raises(InvalidInput, match=r"no split 'train'; it has \['one'\]"):
        PreparedDataset(tmp_path / "d", "train")


def test_two_preparations_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    class Nested(Source):
        def __getitem__(self, index: int) -> Frame:
            with pytest.raises(UpcycleError, match="another process is preparing"):
                run(Source(6), tmp_path / "d")
            return super().__getitem__(index)

    run(Nested(6), tmp_path / "d")


KILLED = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from test_prepared import Source, run

    class Slow(Source):
        def __getitem__(self, index):
            time.sleep(0.04)
            with open({log!r}, "a") as log:
                log.write(f"{{index}}\\n")
            return super().__getitem__(index)

    run(Slow(24), Path({out!r}), workers=2)
    """
)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_killed_preparation_goes_on_where_it_was(tmp_path: Path) -> None:
    out, log = tmp_path / "d", tmp_path / "log"
    script = KILLED.format(tests=str(Path(__file__).parent), log=str(log), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while len(list((out / "parts").glob("*.parquet")) if (out / "parts").exists() else []) < 3:
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "dataset.json").exists()

    read_again: list[int] = []

    class Recording(Source):
        def __getitem__(self, index: int) -> Frame:
            read_again.append(index)
            return super().__getitem__(index)

    before = {int(line) for line in log.read_text().split()}
    finished = 3 * len(list((out / "parts").glob("*.parquet")))
    report = run(Recording(24), out)
    assert 9 <= finished <= report.reused_frames < 24
    assert len(read_again) == len(set(read_again)) == 24 - report.reused_frames
    assert before | set(read_again) == set(range(24))  # nothing is lost
    run(Source(24), tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_leftovers_of_a_killed_start_are_swept_and_finished_chunks_are_not(tmp_path: Path) -> None:
    run(Source(6), tmp_path / "whole")
    run(Source(6), tmp_path / "d")
    parts = tmp_path / "d" / "parts"
    index, cut_off = sorted(parts.glob("*.parquet"))
    cut_off.unlink()  # killed between the two files of a chunk
    (parts / "0123456789abcdef-01234567.f32").write_bytes(b"points whose index never came")
    (parts / ".0123456789abcdef.tmp").write_bytes(b"half")
    stamp = index.stat().st_mtime_ns
    assert run(Source(6), tmp_path / "d").reused_frames == 3
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    assert index.stat().st_mtime_ns == stamp


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as file:
        file.write(b"old")
    with open(path, "rb") as reader:
        with pytest.raises(TypeError), atomic_file(path) as file:
            file.writelines([b"never", None])  # type: ignore[list-item]
        assert path.read_bytes() == b"old"
        with atomic_file(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
        assert reader.read() == b"old"  # who reads the old file reads it to its end
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_dead_worker_is_named_and_its_finished_chunks_are_kept(tmp_path: Path) -> None:
    def die(frame: Frame) -> Frame:
        os.kill(os.getpid(), signal.SIGKILL)
        return frame

    with pytest.raises(UpcycleError, match="ended with code -9"):
        run(Source(12, {10: die}), tmp_path / "d", workers=2)
    assert run(Source(12), tmp_path / "d").frames == 12


def test_splits_select_and_fingerprints_follow_the_labels(tmp_path: Path) -> None:
    source = Source(6)
    run(source, tmp_path / "d")
    train = PreparedDataset(tmp_path / "d", "train")
    assert train.split_fingerprint() != PreparedDataset(tmp_path / "d", "val").split_fingerprint()
    for order in (range(4), reversed(range(4))):
        frames = [source[i] for i in order]
        labels = split_fingerprint([f.id for f in frames], [f.labels for f in frames], classes=CLASSES)
        assert train.split_fingerprint().partition("+")[0] == labels

    def changed(**labels: torch.Tensor) -> str:
        box = torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.5]])
        return split_fingerprint(
            ["a"], [Labels.make(labels.get("box", box), labels.get("kind", torch.zeros(1)))], classes=CLASSES
        )

    assert changed() == changed()
    assert len({changed(), changed(kind=torch.ones(1)), changed(box=torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.50001]]))}) == 3


def test_other_points_under_the_same_ids_and_labels_are_another_split(tmp_path: Path) -> None:
    """Two fleets often have the same ids; results of one must not serve the other. An earlier version knew the labels only."""

    def moved(frame: Frame) -> Frame:
        return replace(frame, points=replace(frame.points, xyz=frame.points.xyz + torch.tensor([0.0, 0.0, 1e-3])))

    source, other = Source(6), Source(6, {1: moved})
    run(source, tmp_path / "a")
    run(source, tmp_path / "again", workers=1)
    run(other, tmp_path / "b")
    now, again, then = (PreparedDataset(tmp_path / name, "train").split_fingerprint() for name in ("a", "again", "b"))
    assert now == again != then
    assert not same_split(now, then)
    assert same_split(now.partition("+")[0], then), "a record of an earlier version is compared by its labels"
    assert not same_split(now.partition("+")[0], PreparedDataset(tmp_path / "a", "val").split_fingerprint())
    summaries = [DataSplit(root=tmp_path / name, name="train").summary() for name in ("a", "b")]
    assert summaries[0] != summaries[1]
    earlier = f"4 frames {now[:16]}"  # as version 0.2 wrote it before
    assert [as_recorded(text, earlier) for text in summaries] == [earlier, earlier]


def test_damage_on_disk_is_found(tmp_path: Path) -> None:
    run(Source(6), tmp_path / "d")
    part = max((tmp_path / "d" / "parts").glob("*.f32"), key=lambda p: p.stat().st_size)
    whole = part.read_bytes()
    part.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert len(PreparedDataset(tmp_path / "d").verify()) == 1
    part.write_bytes(whole[:-4])
    with pytest.raises(InvalidInput, match="shorter than the index says"):
        PreparedDataset(tmp_path / "d")
    header = json.loads((tmp_path / "d" / "dataset.json").read_text())
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(header | {"schema_version": 99}))
    with pytest.raises(InvalidInput, match="schema version 99"):
        PreparedDataset(tmp_path / "d")


def test_forked_loader_workers_read_without_pickling(tmp_path: Path) -> None:
    class Unpicklable(PreparedDataset):
        def __reduce__(self) -> str:
            raise AssertionError("pickled")

    source = Source(6)
    run(source, tmp_path / "d")
    data = Unpicklable(tmp_path / "d")
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        collate_fn=lambda f: (f.id, float(f.points.xyz.sum())),
    )
    assert list(loader) == [(f.id, float(f.points.xyz.sum())) for f in (source[i] for i in range(6))]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_reading_does_not_make_memory_grow(tmp_path: Path) -> None:
    points = PointCloud(xyz=torch.zeros(500_000, 3), features=torch.zeros(500_000, 1))  # 8 MB a frame
    source = Source(8, {i: lambda f: replace(f, points=points, labels=None) for i in range(8)})
    run(source, tmp_path / "d")
    data = PreparedDataset(tmp_path / "d")
    for i in (0, 1):
        data[i]
    before = resident_bytes()
    for _ in range(3):
        for i in range(8):
            data[i]
    assert resident_bytes() - before < 20e6  # all frames are 64 MB


def test_classes_given_as_one_text_are_refused(tmp_path):
    """A text is a sequence of letters, and "Car" would become the classes C, a and r."""
    with pytest.raises(InvalidInput, match=r"write \('Car',\)"):
        prepare([], [], tmp_path, splits={}, classes="Car")  # type: ignore[arg-type]


def test_labels_of_another_height_publish_nothing_and_the_z_shift_is_named(tmp_path: Path) -> None:
    def lower(frame: Frame) -> Frame:
        boxes = frame.labels.boxes.data + torch.tensor([0, 0, -80.0, 0, 0, 0, 0])
        return replace(frame, labels=replace(frame.labels, boxes=replace(frame.labels.boxes, data=boxes)))

    source = Source(6, dict.fromkeys(range(6), lower))
    with pytest.raises(UpcycleError, match=r"boxes hold no point; .*z shift .*--z-shift.* frame's rig.*Nothing was published"):
        run(source, tmp_path / "d")
    assert not (tmp_path / "d" / "dataset.json").exists()
    assert run(Source(6), tmp_path / "d", classes=("Car", "Person")).frames == 6  # other settings in the same folder


def test_a_reason_that_every_frame_shares_is_told_once_with_its_number(tmp_path: Path) -> None:
    def fail(frame: Frame) -> Frame:
        raise InvalidInput(f"frame {frame.id}: there is no file /k/{frame.id}.txt")

    with pytest.raises(UpcycleError) as error:
        run(Source(6, dict.fromkeys(range(6), fail)), tmp_path / "d")
    assert "frame 000000: there is no file /k/000000.txt (and 5 more like it)" in str(error.value)
    assert str(error.value).count("there is no file") == 1
    assert "InvalidInput" not in str(error.value)


def test_labels_of_weight_0_are_counted_apart_by_the_type_that_the_reader_names(tmp_path: Path) -> None:
    """Every frame of the source has a Car of weight 0 and a Pedestrian."""
    ledger = run(Source(3), tmp_path / "a").ledger
    assert (ledger.boxes, ledger.types_ignored) == ({"Car": 0, "Pedestrian": 3}, {"Car": 3})
    van = Ledger(types_ignored={"Van": 1})
    ledger = run(Source(3, dict.fromkeys(range(3), lambda f: replace(f, reading=van))), tmp_path / "b").ledger
    assert (ledger.boxes, ledger.types_ignored) == ({"Car": 0, "Pedestrian": 3}, {"Van": 3})
