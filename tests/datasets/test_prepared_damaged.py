"""A prepared dataset that was cut off, edited or mixed up is refused with a sentence, never read wrongly and never a traceback."""

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.rig import RigSpec, intensity_range
from upcycle3d.core.strict_json import json_digest
from upcycle3d.datasets.gt_database import build_gt_database
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.prepared_format import INDEX_SCHEMA, read_index
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import SimulatedDataset
from upcycle3d.tools import inspect
from upcycle3d.tools.console import run_command

CLASSES = ("Car", "Pedestrian")
SMALL = replace(KITTI, sensor=replace(KITTI.sensor, elevations=KITTI.sensor.elevations[::4], azimuths=720))
VERSION_1 = Path(__file__).parents[1] / "data" / "version_0_1" / "prepared"


def prepare_three(root: Path) -> Path:
    source = SimulatedDataset(domain=SMALL, num_frames=3, seed=0, classes=CLASSES)
    ids = [source[i].id for i in range(3)]
    prepare(source, ids, root, splits={"train": ids[:2], "val": ids[2:]}, classes=CLASSES, workers=0, chunk_frames=2)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return prepare_three(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def edit(root: Path, **changes: object) -> None:
    """Change entries of the header, its digest included, as another program would; None takes one out."""
    path = root / "dataset.json"
    values = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    if "digest" in values:
        values["digest"] = json_digest(values)
    path.write_text(json.dumps(values))


def index_of(root: Path) -> Path:
    return root / json.loads((root / "dataset.json").read_text())["index"]


def set_column(root: Path, name: str, values: list) -> None:
    table = read_index(index_of(root))
    column = pa.array(values, INDEX_SCHEMA.field(name).type)
    write_index(root, table.set_column(table.schema.get_field_index(name), INDEX_SCHEMA.field(name), column))


def write_index(root: Path, table: pa.Table) -> None:
    """Replace the index by another one that bears its own checksum, as another program would."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    index_of(root).unlink()
    edit(root, index=f"index-{zlib.crc32(data):08x}.parquet")
    index_of(root).write_bytes(data)


def refused(root: Path, words: str, split: str | None = None) -> None:
    with pytest.raises(InvalidInput, match=words) as error:
        PreparedDataset(root, split)
    assert str(root) in str(error.value)


def test_the_whole_dataset_is_read(root):
    assert len(PreparedDataset(root, "train")) == 2


@pytest.mark.parametrize("name", ["classes", "feature_names", "rig", "origin", "index", "splits", "failures"])
def test_a_header_that_lacks_an_entry_is_refused(root, name):
    edit(root, **{name: None})
    refused(root, f"dataset.json is damaged or was edited: the option `{name}` .* is missing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rig": {"z_shift": "1"}}, "rig.z_shift must be float, found '1'"),
        ({"rig": {"intensity_scale": 0}}, "a positive intensity_scale, found 0"),
        ({"rig": {"height": 1.7}}, "unknown option `rig.height`"),
        ({"classes": "Car"}, "classes must be .*, found 'Car'"),
        ({"splits": {"train": "000000"}}, "splits.train must be"),
        ({"splits": []}, "splits must be"),
        ({"failures": [{"id": "a"}]}, "`failures.0.reason` .* is missing"),
        ({"origin": {"layout": "kitti"}}, "`origin.options` .* is missing"),
        ({"index": ""}, "'' cannot be the name of the index"),
        ({"index": "../index-00000000.parquet"}, "cannot be the name of the index"),
        ({"schema_version": [2]}, r"schema version \[2\]"),
        ({"schema_version": True}, "schema version True"),
        ({"feature_names": ["intensity", "time"]}, "frames have other point features than"),
    ],
)
def test_a_header_with_wrong_entries_is_refused(root, changes, words):
    edit(root, **changes)
    refused(root, words)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema_version": '])
def test_a_header_that_is_no_json_is_refused(root, text):
    (root / "dataset.json").write_text(text)
    refused(root, r"dataset.json \(the header of a prepared dataset\) is not valid JSON")


def test_a_missing_or_cut_index_is_refused(root):
    path = index_of(root)
    data = path.read_bytes()
    for cut in (data[:-1], data[: len(data) // 2], b""):
        path.write_bytes(cut)
        refused(root, r"index-\w+.parquet is damaged")
    path.unlink()
    refused(root, r"index-\w+.parquet is missing; copy the dataset again")


def test_an_index_with_other_columns_than_its_version_is_refused(root):
    table = read_index(index_of(root))
    for other in (
        table.drop_columns(["crc32"]),
        table.append_column("more", pa.nulls(len(table))),
        table.set_column(3, "offset", table["offset"].cast(pa.int32())),
    ):
        write_index(root, other)
        refused(root, "has other columns than schema version 3")


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("offset", [-4, 0, 0], "offset must be in 0.*, found -4"),
        ("num_points", [-1, 0, 0], "num_points must be in 0.*, found -1"),
        ("num_points", [1 << 62, 0, 0], "num_points must be in 0"),
        ("num_points", [1 << 31, 0, 0], "shorter than the index says"),
        ("part", [None, None, None], "part is empty in 3 rows"),
        ("id", [None, "a", "b"], "id is empty in 1 rows"),
        ("boxes", [[1.0] * 6, [], []], "boxes has the wrong number of values"),
        ("weight", [None, None, None], "weight has the wrong number of values in 3 rows"),
        ("complete", [True, None, True], "complete is empty"),
        ("image_size", [[1242], [1242, 375], [1242, 375]], "image_size has the wrong number of values"),
        ("kitti_numbers", [[1.0] * 14, None, None], "kitti_numbers has the wrong number of values"),
    ],
)
def test_an_index_whose_rows_make_no_frame_is_refused(root, column, values, words):
    set_column(root, column, values)
    refused(root, words)


def test_empty_places_in_lists_are_refused(root):
    lists = read_index(index_of(root))["boxes"].to_pylist()
    assert lists[0]
    set_column(root, "boxes", [[None, *lists[0][1:]], *lists[1:]])
    refused(root, "boxes has empty places in its lists")


def test_labels_outside_the_classes_of_the_header_are_refused(root):
    found = pc.list_flatten(read_index(index_of(root))["classes"]).to_pylist()
    assert found.count(1) > 0
    edit(root, classes=["Car"])
    refused(root, rf"{found.count(1)} labels have a class outside 0\.\.0, the classes Car")


def test_a_frame_that_a_split_or_the_index_names_twice_is_refused(root):
    first, *rest = read_index(index_of(root))["id"].to_pylist()
    edit(root, splits={"train": [first, first]})
    refused(root, "names 1 frames twice", "train")
    set_column(root, "id", [first, first, rest[1]])
    refused(root, "names 1 frames twice")


def test_preparation_writes_a_chunk_anew_whose_index_is_damaged(whole, root):
    damaged = min((root / "parts").glob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    prepare_three(root)
    assert damaged.read_bytes() == (whole / "parts" / damaged.name).read_bytes()


def test_an_index_with_other_bytes_than_its_name_says_is_refused(root):
    path = index_of(root)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    refused(root, r"index-\w+.parquet is damaged: its bytes have another checksum")


def test_a_header_with_one_changed_letter_is_refused(root):
    path = root / "dataset.json"
    path.write_text(path.read_text().replace("Pedestrian", "pedestrian", 1))
    refused(root, "dataset.json is damaged or was edited: its content has another digest")


def test_what_the_reader_counted_comes_back_with_the_frame(tmp_path):
    source = SimulatedDataset(domain=SMALL, num_frames=2, seed=0, classes=CLASSES)
    counted = Ledger(scans=1, points=9, types_dropped={"Van": 2}, boxes={"Car": 1})
    frames = [replace(source[0], reading=counted), source[1]]
    prepare(frames, [f.id for f in frames], tmp_path / "d", splits={"all": [f.id for f in frames]}, classes=CLASSES, workers=0)
    found = PreparedDataset(tmp_path / "d")
    seen = [Ledger(intensity_range=intensity_range(frame.points)) for frame in frames]
    assert (found[0].reading, found[1].reading) == (counted + seen[0], source[1].reading + seen[1])
    assert found.reading() == counted + source[1].reading + seen[0] + seen[1]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 64
    path.write_bytes(data)


def test_a_frame_whose_points_were_changed_is_refused_and_named_and_the_others_are_read(root):
    frames = PreparedDataset(root)
    row = read_index(index_of(root)).to_pylist()[1]
    flip(root / "parts" / row["part"], row["offset"] * 4 + 3)
    assert PreparedDataset(root).verify() == (row["id"],)
    with pytest.raises(InvalidInput, match=f"the points of frame {row['id']} in .* are damaged: .* prepare"):
        frames[1]
    assert len(frames[0].points)
    assert len(frames[2].points)


def test_inspect_verify_names_damaged_frames_and_damaged_databases(root, capsys):
    train = PreparedDataset(root, "train")
    folder = root / "gt_database" / "train"
    build_gt_database(train, folder, class_names=CLASSES, fingerprint=train.split_fingerprint())
    assert run_command(inspect.command, [str(root), "--verify"]) == 0
    flip(next(folder.glob("objects-*.f32")), 3)
    assert run_command(inspect.command, [str(root), "--verify"]) != 0
    assert f"{folder}/objects-" in capsys.readouterr().err
    row = read_index(index_of(root)).to_pylist()[2]
    flip(root / "parts" / row["part"], row["offset"] * 4)
    assert run_command(inspect.command, [str(root), "--verify"]) != 0
    assert f"the points of 1 frames in {root} have another checksum, the first is {row['id']}" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["f32", "parquet"])
def test_preparation_reads_a_damaged_part_again(whole, root, suffix):
    damaged = min((root / "parts").glob(f"*.{suffix}"))
    flip(damaged, damaged.stat().st_size // 2)
    again = prepare_three(root)
    assert {p.name: p.read_bytes() for p in (again / "parts").iterdir()} == {
        p.name: p.read_bytes() for p in (whole / "parts").iterdir()
    }
    assert PreparedDataset(again).verify() == ()


def test_preparation_removes_what_a_killed_start_left(root):
    for folder in (root, root / "parts"):
        (folder / ".0123456789abcdef.tmp").write_bytes(b"half")
    (root / ".mine.tmp").write_bytes(b"of another program")
    prepare_three(root)
    assert [p.name for p in root.rglob("*.tmp")] == [".mine.tmp"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "an object with named entries"),
        ('{"schema_version": 3}', "no readable origin"),
        ('{"schema_version": 3, "origin": {"layout": "own", "root": null, "options": [1]}}', "no readable origin"),
    ],
)
def test_damaged_settings_of_a_preparation_are_named_with_what_to_do(root, text, words):
    (root / "preparation.json").write_text(text)
    with pytest.raises(InvalidInput, match=rf"preparation.json .*{words}.*delete it, and every frame is read again"):
        prepare_three(root)


def test_a_long_reason_is_cut_before_it_lands_in_the_header(tmp_path):
    class Broken:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int):
            if index:
                raise InvalidInput("a label line " + "x" * 8_000_000)
            return SimulatedDataset(domain=SMALL, num_frames=1, seed=0, classes=CLASSES)[0]

    good = Broken()[0].id
    report = prepare(Broken(), [good, "b"], tmp_path / "d", splits={"all": [good, "b"]}, classes=CLASSES, workers=0)
    assert [f.id for f in report.failures] == ["b"]
    assert (tmp_path / "d" / "dataset.json").stat().st_size < 10_000


# ---- version 1


@pytest.fixture
def old(tmp_path) -> Path:
    return Path(shutil.copytree(VERSION_1, tmp_path / "old"))


def test_the_rig_of_version_1_is_taken_from_its_notes(old):
    edit(old, notes={"layout": "folder", "root": "/my/data", "z_shift": 1.5, "intensity_scale": 0.25, "points": "auto"})
    frames = PreparedDataset(old)
    assert frames.rig == frames[0].rig == RigSpec(z_shift=1.5, intensity_scale=0.25)
    assert (frames.origin.layout, frames.origin.root) == ("folder", Path("/my/data"))
    assert frames.origin.options == (("z_shift", "1.5"), ("intensity_scale", "0.25"), ("points", "auto"))
    edit(old, notes={})
    frames = PreparedDataset(old)
    assert (frames.rig, frames.origin.layout, frames.origin.root) == (RigSpec(), "own", None)


@pytest.mark.parametrize(
    ("notes", "words"),
    [(None, "`notes` are missing"), ([], "`notes` are missing"), ({"z_shift": "1"}, "rig.z_shift must be float")],
)
def test_version_1_without_notes_is_refused(old, notes, words):
    edit(old, notes=notes)
    refused(old, words)


def test_an_index_of_another_version_in_a_folder_of_version_1_is_refused(old):
    table = read_index(index_of(old), 1)
    assert table.schema.equals(INDEX_SCHEMA)
    write_index(old, table)
    refused(old, "has other columns than schema version 1")
