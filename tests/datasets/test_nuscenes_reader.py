"""Tables and sweeps become frames: geometry, earlier sweeps, classes, splits, and a message for everything that can be broken."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.ledger import Ledger
from upcycle3d.datasets.drive_tables import quaternion_matrix
from upcycle3d.datasets.json_table import JsonTable
from upcycle3d.datasets.nuscenes import LYFT_DIALECT, NUSCENES_DIALECT, NuScenesDataset, draw_scenes, read_sweep, split_by_scene
from upcycle3d.datasets.nuscenes_tables import read_tables

VERSION = "v1.0-mini"
LEFT = [math.cos(math.pi / 4), 0.0, 0.0, math.sin(math.pi / 4)]  # a quarter turn to the left
RIGHT = [math.cos(math.pi / 4), 0.0, 0.0, -math.sin(math.pi / 4)]  # nuScenes' LiDAR: its y looks forward
CATEGORIES = ("vehicle.car", "vehicle.truck", "human.pedestrian.adult")


def by_table() -> dict[str, list[dict]]:
    """Two drives of one scene each. The vehicle of "one" heads along the world's y and moved 10 m between sweep 0 and keyframe 1."""
    tables: dict[str, list[dict]] = {
        "log": [{"token": "log1"}, {"token": "log2"}],
        "scene": [{"token": "s1", "name": "one", "log_token": "log1"}, {"token": "s2", "name": "two", "log_token": "log2"}],
        "sample": [
            {"token": "later", "scene_token": "s1", "timestamp": 2_000_000},
            {"token": "first", "scene_token": "s1", "timestamp": 1_000_000},
            {"token": "alone", "scene_token": "s2", "timestamp": 9_000_000},
        ],
        "sensor": [{"token": "top", "channel": "LIDAR_TOP"}, {"token": "front", "channel": "CAM_FRONT"}],
        "calibrated_sensor": [
            {"token": "roof", "sensor_token": "top", "translation": [1.0, 0.0, 2.0], "rotation": RIGHT},
            {"token": "lens", "sensor_token": "front", "translation": [2.0, 0.0, 1.0], "rotation": [1, 0, 0, 0]},
        ],
        "category": [{"token": f"c{i}", "name": name} for i, name in enumerate(CATEGORIES)],
        "instance": [{"token": f"i{i}", "category_token": f"c{i}"} for i in range(3)],
    }
    tables["sample_data"], tables["ego_pose"] = [], []
    for token, sample, key, time, y, previous in (
        ("d0", "first", True, 1_000_000, 90.0, ""),
        ("d1", "later", False, 1_500_000, 95.0, "d0"),
        ("d2", "later", True, 2_000_000, 100.0, "d1"),
        ("d3", "alone", True, 9_000_000, 0.0, ""),
    ):
        tables["sample_data"].append(
            {
                "token": token, "sample_token": sample, "calibrated_sensor_token": "roof", "ego_pose_token": f"p{token}",
                "timestamp": time, "is_key_frame": key, "filename": f"samples/{token}.pcd.bin", "prev": previous,
            }
        )  # fmt: skip
        tables["ego_pose"].append({"token": f"p{token}", "translation": [50.0, y, 3.0], "rotation": LEFT})
    picture = {**tables["sample_data"][0], "token": "jpg", "calibrated_sensor_token": "lens", "filename": "samples/a.jpg"}
    tables["sample_data"].append(picture)
    tables["sample_annotation"] = [
        _box("a1", "later", 0, [50.0, 121.0, 4.5], [2.0, 4.0, 1.5], LEFT, 7),  # 20 m ahead of the sensor, same heading
        _box("a2", "later", 1, [40.0, 101.0, 5.0], [2.5, 12.0, 3.0], [1, 0, 0, 0], 9),  # 10 m to the left, heading right
        _box("a3", "first", 2, [50.0, 96.0, 5.0], [0.6, 0.8, 1.8], LEFT, None),
    ]
    return tables


def _box(token: str, sample: str, kind: int, center: list, size: list, rotation: list, points: int | None) -> dict:
    row = {"token": token, "sample_token": sample, "instance_token": f"i{kind}", "translation": center, "size": size}
    return {**row, "rotation": rotation} | ({} if points is None else {"num_lidar_pts": points})


def write(root: Path, tables: dict[str, list[dict]]) -> Path:
    """Tables as JSON, and for each sweep a file that sees one landmark of the world, [50, 111, 5], and the vehicle itself."""
    (root / VERSION).mkdir(parents=True, exist_ok=True)
    (root / "samples").mkdir(exist_ok=True)
    for name, rows in tables.items():
        (root / VERSION / f"{name}.json").write_text(json.dumps(rows))
    for row, pose in zip(tables["sample_data"], tables["ego_pose"]):  # heading along y: forward is the world's y, left its -x
        ahead = 111.0 - pose["translation"][1] - 1.0
        sees = [[0.0, ahead, 0.0, 51.0, 3.0], [0.1, -0.2, -0.5, 255.0, 0.0]]  # x right, y forward, z up
        (root / f"samples/{row['token']}.pcd.bin").write_bytes(np.array(sees, "<f4").tobytes())
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path, by_table())


def dataset(root: Path, ids: tuple[str, ...] = ("later",), **options) -> NuScenesDataset:
    tables = read_tables(root, VERSION, keyframes_only=options.get("sweeps", 1) == 1)
    return NuScenesDataset(tables, ids, NUSCENES_DIALECT, **{"classes": ("Car", "Truck", "Pedestrian"), **options})


def test_points_and_boxes_come_with_x_forward_and_the_origin_at_the_sensor(root):
    frame = dataset(root)[0]
    torch.testing.assert_close(frame.points.xyz, torch.tensor([[10.0, 0, 0], [-0.2, -0.1, -0.5]]))
    torch.testing.assert_close(frame.points.features, torch.tensor([[0.2], [1.0]]))
    assert frame.points.feature_names == ("intensity",)
    expected = torch.tensor([[20.0, 0, -0.5, 4, 2, 1.5, 0], [0, 10.0, 0, 12, 2.5, 3, -math.pi / 2]])
    torch.testing.assert_close(frame.labels.boxes.data, expected, atol=1e-5, rtol=0)
    assert frame.labels.classes.tolist() == [0, 1]
    assert frame.id == "later"


def test_the_z_shift_lifts_points_and_boxes_alike(root):
    plain, lifted = dataset(root)[0], dataset(root, z_shift=1.8)[0]
    torch.testing.assert_close(lifted.points.xyz[:, 2], plain.points.xyz[:, 2] + 1.8)
    torch.testing.assert_close(lifted.labels.boxes.data[:, 2], plain.labels.boxes.data[:, 2] + 1.8)


def test_roll_and_pitch_of_the_sensor_are_taken_out_too(root):
    tables = by_table()
    lean = math.radians(3)
    tables["calibrated_sensor"][0]["rotation"] = [math.cos(lean / 2), math.sin(lean / 2), 0, 0]  # left side up
    write(root, tables)
    xyz = dataset(root)[0].points.xyz
    torch.testing.assert_close(xyz[0], torch.tensor([0, 10 * math.cos(lean), 10 * math.sin(lean)]), atol=1e-6, rtol=0)


def test_earlier_sweeps_are_moved_along_with_the_vehicle_and_say_their_age(root):
    points = dataset(root, sweeps=3)[0].points
    assert points.feature_names == ("intensity", "time")
    landmark = torch.tensor([10.0, 0, 0]).expand(3, 3)  # one place in the world, seen from three
    torch.testing.assert_close(points.xyz[[0, 2, 3]], landmark, atol=1e-5, rtol=0)
    assert points.features[:, 1].tolist() == [0.0, 0.0, 0.5, 1.0]  # the vehicle's own returns stay in the keyframe only
    assert len(dataset(root, sweeps=2)[0].points) == 3


def test_a_scene_s_first_frame_holds_the_sweeps_there_are(root):
    points = dataset(root, ("first",), sweeps=5)[0].points
    assert len(points) == 2
    assert points.feature_names == ("intensity", "time")


def test_point_counts_are_the_table_s_where_it_knows_and_else_counted(root):
    tables = by_table()
    tables["sample_annotation"][1]["num_lidar_pts"] = -1  # as Lyft writes it
    tables["sample_annotation"][1]["translation"] = [50.0, 111.0, 5.0]
    assert dataset(write(root, tables))[0].labels.num_points.tolist() == [7, 1]
    assert dataset(root, sweeps=3)[0].labels.num_points.tolist() == [7, 1]  # of the keyframe's turn
    assert dataset(root, ("first",))[0].labels.num_points.tolist() == [0]


def test_categories_become_the_classes_that_the_map_says(root):
    only_cars = dataset(root, classes=("Car",))[0].labels
    assert (len(only_cars), only_cars.weight.tolist()) == (1, [1.0])
    with_neighbor = dataset(root, classes=("Car",), neighbors={"vehicle.truck": "Car"})[0].labels
    assert (with_neighbor.classes.tolist(), with_neighbor.weight.tolist()) == ([0, 0], [1.0, 0.0])
    both = dataset(root, classes=("Vehicle",), class_map={"vehicle.car": "Vehicle", "vehicle.truck": "Vehicle"})[0].labels
    assert (both.classes.tolist(), both.weight.tolist()) == ([0, 0], [1.0, 1.0])


def test_long_boxes_are_left_out_when_asked(root):
    assert dataset(root, max_length=10.0)[0].labels.boxes.data[:, 3].tolist() == [4.0]


def test_without_labels_the_boxes_tables_are_never_opened(root):
    for name in ("sample_annotation", "instance", "category"):
        (root / VERSION / f"{name}.json").unlink()
    tables = read_tables(root, VERSION, annotations=False)
    assert NuScenesDataset(tables, ("later",), NUSCENES_DIALECT, with_labels=False)[0].labels is None
    with pytest.raises(InvalidInput, match="read them with annotations=True"):
        NuScenesDataset(tables, ("later",), NUSCENES_DIALECT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("Cars",)}, "no category leads to the class 'Cars'; did you mean 'Car'"),
        ({"class_map": {"vehicle.cat": "Car"}, "classes": ("Car",)}, "no category 'vehicle.cat'.*did you mean 'vehicle.car'"),
        ({"neighbors": {"vehicle.truck": "Car"}}, "neighbors: 'vehicle.truck' -> 'Car'.*must not become one"),
        ({"neighbors": {"vehicle.trailer": "Cat"}}, "the class must be one of Car, Truck, Pedestrian"),
        ({"sweeps": 0}, "sweeps must be at least 1"),
        ({"max_length": 0.0}, "max_length above 0"),
    ],
)
def test_options_that_contradict_are_refused(root, options, message):
    with pytest.raises(InvalidInput, match=message):
        dataset(root, **options)


def test_a_split_holds_whole_scenes_in_order_of_time(root):
    tables = read_tables(root, VERSION)
    assert tables.samples == ("first", "later", "alone")
    assert split_by_scene(tables, {"train": ["one"], "val": ["two"]}) == {"train": ("first", "later"), "val": ("alone",)}
    with pytest.raises(InvalidInput, match=r"no scene 'onee'.*did you mean 'one'"):
        split_by_scene(tables, {"train": ["onee"]})


def test_scenes_of_one_drive_are_never_parted(root):
    tables = by_table()
    tables["scene"] += [{"token": f"s{i}", "name": f"n{i}", "log_token": "log1" if i % 2 else "log2"} for i in range(3, 9)]
    tables["sample"] += [{"token": f"t{i}", "scene_token": f"s{i}", "timestamp": i} for i in range(3, 9)]
    read = read_tables(write(root, tables), VERSION)
    drawn = draw_scenes(read, val_share=0.3, seed=1)
    assert sorted(drawn["train"] + drawn["val"]) == sorted(read.scenes)
    assert not {read.logs[n] for n in drawn["train"]} & {read.logs[n] for n in drawn["val"]}
    assert draw_scenes(read, val_share=0.3, seed=1) == drawn
    with pytest.raises(InvalidInput, match="at least two logs"):
        draw_scenes(read, val_share=0.0)


def test_rows_are_read_across_the_borders_of_the_pieces(tmp_path, monkeypatch):
    rows = [{"token": f"t{i}", "text": 'é[]{}\\" ,' * (i % 7), "numbers": [i / 3, -1e-9]} for i in range(200)]
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    for chunk in (1, 7, 100, 1 << 20):
        monkeypatch.setattr("upcycle3d.datasets.json_table._CHUNK", chunk)
        assert list(JsonTable(tmp_path / "t.json").objects()) == rows


def test_quaternions_turn_as_they_should():
    assert quaternion_matrix(torch.tensor(LEFT, dtype=torch.float64)) @ torch.tensor([1.0, 0, 0]).double() == pytest.approx(
        [0, 1, 0]
    )


# ---- what can be broken -------------------------------------------------------------------------------------------------------


def _set(table: str, row: int, field: str, value):
    return lambda tables: tables[table][row].__setitem__(field, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("sample_data", 2, "ego_pose_token", "gone"),
            "sample_data.json, row d2: ego_pose_token gone is not in ego_pose.json",
        ),
        (
            _set("sample_data", 2, "calibrated_sensor_token", "gone"),
            "sample later: its sample_data d2 names the calibrated_sensor gone",
        ),
        (_set("sample_data", 2, "sample_token", "first"), "sample later: no keyframe of LIDAR_TOP"),
        (_set("sample_data", 1, "is_key_frame", True), "sample later: sample_data holds two keyframes of it, d1 and d2"),
        (
            _set("sample_data", 2, "filename", "samples/gone.bin"),
            "sample later: there is no sweep .*gone.bin; unpack the LiDAR archive",
        ),
        (_set("sample_data", 2, "filename", "../../etc/passwd"), "leads out of the dataset's folder"),
        (_set("sample_annotation", 0, "instance_token", "gone"), "sample later, its box 0 .*: its instance.* not in the tables"),
        (_set("instance", 0, "category_token", "gone"), "sample later, its box 0 .*: its instance.* not in the tables"),
        (_set("sample_annotation", 1, "size", [2.5, 0.0, 3.0]), "sample later, its box 1 .*height must be positive"),
        (_set("sample_annotation", 1, "size", [2.5, math.nan, 3.0]), "sample later, its box 1 .*all numbers finite"),
        (
            _set("sample_annotation", 0, "rotation", [1, 0, 0, 1]),
            r"box 0 .*not a unit quaternion \(w x y z\), its length is 1.41421",
        ),
        (_set("ego_pose", 2, "rotation", [0, 0, 0, 0]), "ego_pose.json, row pd2: .* not a unit quaternion"),
        (_set("ego_pose", 2, "translation", [math.inf, 0, 0]), "ego_pose.json, row pd2: .*must be finite"),
    ],
)
def test_what_is_wrong_with_one_frame_is_said_when_it_is_asked_for_and_spares_the_others(root, change, message):
    tables = by_table()
    change(tables)
    read = dataset(write(root, tables), ("later", "alone"))
    with pytest.raises(InvalidInput, match=message):
        read[0]
    assert len(read[1].points) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("sample", 0, "scene_token", "gone"), "sample.json, row later: scene_token gone is not in scene.json"),
        (_set("sample", 0, "token", "first"), "'first' occurs twice"),
        (_set("sample", 0, "token", "../x"), "not a token of letters and digits"),
        (_set("scene", 0, "log_token", "gone"), "log_token gone is not in log.json"),
        (_set("scene", 0, "name", "two"), "two scenes are called 'two'"),
        (_set("calibrated_sensor", 0, "sensor_token", "gone"), "sensor_token gone is not in sensor.json"),
        (
            _set("sensor", 0, "channel", "LIDAR_ROOF"),
            "no sensor 'LIDAR_TOP' among CAM_FRONT, LIDAR_ROOF; did you mean 'LIDAR_ROOF'",
        ),
        (
            _set("sample_annotation", 0, "sample_token", "gone"),
            "row a1: sample_token gone is not in sample.json; its box would be lost",
        ),
        (_set("sample_annotation", 0, "size", [1, 2]), r"row a1: size must hold 3 numbers, found \[1, 2\]"),
        (_set("ego_pose", 2, "rotation", "north"), "row pd2: rotation must hold 4 numbers, found 'north'"),
        (_set("sample_data", 2, "filename", None), "row d2: filename must be a str, found None"),
        (lambda tables: tables["sample_data"][2].pop("ego_pose_token"), "row d2: there is no field 'ego_pose_token', only token"),
        (lambda tables: tables.update(sample=[]), "holds no sample"),
        (lambda tables: tables.update(instance=[3]), "a row must be an object"),
        (lambda tables: tables.update(instance={"token": "x"}), "a table is a JSON array of objects"),
    ],
)
def test_broken_tables_are_refused_when_they_are_read(root, change, message):
    tables = by_table()
    change(tables)
    with pytest.raises(InvalidInput, match=message):
        read_tables(write(root, tables), VERSION)


def test_a_missing_cut_off_or_foreign_table_is_named(root):
    text = (root / VERSION / "instance.json").read_text()
    for content, message in ((text[:-20], "cut off, or not JSON"), ("", "JSON array"), ("[{]", "cut off, or not JSON")):
        (root / VERSION / "instance.json").write_text(content)
        with pytest.raises(InvalidInput, match=f"instance.json: .*{message}"):
            read_tables(root, VERSION)
    (root / VERSION / "instance.json").write_bytes(b'[{"token": "\xff"}]')
    with pytest.raises(InvalidInput, match=r"instance.json is not JSON text"):
        read_tables(root, VERSION)
    (root / VERSION / "instance.json").unlink()
    with pytest.raises(InvalidInput, match=r"no table .*instance.json; the folder holds .*sample_annotation"):
        read_tables(root, VERSION)
    with pytest.raises(InvalidInput, match=r"no folder .*v1.01-train with tables; .* holds v1.0-mini; name it as version"):
        read_tables(root, LYFT_DIALECT.version)


def test_ids_and_earlier_sweeps_that_do_not_exist_are_named(root):
    with pytest.raises(InvalidInput, match=r"no sample nobody in v1.0-mini/sample.json; ids are sample tokens"):
        dataset(root, ("nobody",))[0]
    (root / "samples" / "d1.pcd.bin").unlink()
    assert len(dataset(root)[0].points) == 2
    with pytest.raises(InvalidInput, match=r"sample later: there is no sweep .*d1.pcd.bin"):
        dataset(root, sweeps=2)[0]
    with pytest.raises(InvalidInput, match=r"sample later: .*no row d1 of LIDAR_TOP; .*keyframes_only"):
        NuScenesDataset(read_tables(root, VERSION), ("later",), NUSCENES_DIALECT, classes=("Car",), sweeps=2)[0]


@pytest.mark.parametrize("size", [0, 4, 4 * (5 * 100 - 2)])
def test_a_sweep_of_a_wrong_length_is_refused_whatever_else_its_length_fits(tmp_path, size):
    (tmp_path / "a.bin").write_bytes(b"\0" * size)  # the damaged sweep of Lyft v1.01 lacks two numbers, and so fits four columns
    with pytest.raises(InvalidInput, match=rf"a.bin: {size} bytes are not a whole number of rows of 5 float32.*whole in v1.02"):
        read_sweep(tmp_path / "a.bin")


def test_points_that_are_not_finite_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.array([[1, 2, 3, 4, 5], [1, np.nan, 3, 4, 5]], "<f4").tobytes())
    with pytest.raises(InvalidInput, match="1 of 2 points hold NaN or inf"):
        read_sweep(tmp_path / "a.bin")


# ---- what must not become silently wrong


def test_the_wrong_command_for_a_folder_is_an_error_that_names_the_right_one(root):
    tables = read_tables(root, VERSION)
    with pytest.raises(
        InvalidInput, match=r"holds vehicle.car, .*, which are names of nuscenes, not of lyft; use `upcycle3d prepare nusc"
    ):
        NuScenesDataset(tables, ("later",), LYFT_DIALECT, classes=("Car",))
    lyft = by_table() | {"category": [{"token": f"c{i}", "name": name} for i, name in enumerate(("car", "truck", "pedestrian"))]}
    with pytest.raises(InvalidInput, match=r"names of lyft, not of nuscenes; use `upcycle3d prepare lyft`"):
        dataset(write(root, lyft), classes=("Car",))


def test_tables_in_which_no_category_leads_to_a_class_are_an_error(root):
    strange = by_table() | {"category": [{"token": f"c{i}", "name": f"thing{i}"} for i in range(3)]}
    with pytest.raises(InvalidInput, match=r"leads to Car: .*holds thing0, thing1, thing2; say which .*--class-map CATEGORY Car"):
        dataset(write(root, strange), classes=("Car",))


def test_what_was_kept_and_dropped_of_a_frame_is_counted(root):
    reading = dataset(root, classes=("Car", "Pedestrian"))[0].reading
    assert reading == Ledger(scans=1, points=2, types_dropped={"vehicle.truck": 1})
    dropped = dataset(root, classes=("Truck",), max_length=10)[0].reading.types_dropped
    assert dropped == {"vehicle.car": 1, "vehicle.truck (too long)": 1}


@pytest.mark.parametrize("rows", [4, 6])
def test_a_sweep_with_rows_of_another_width_is_refused_even_if_its_size_fits(tmp_path, rows):
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 1000)
    scan = np.stack([20 * np.sin(angle), 20 * np.cos(angle), rng.normal(-1.5, 0.2, 1000), rng.integers(0, 200, 1000)], 1)
    scan = np.concatenate([scan, np.tile(np.arange(1000)[:, None] % 32, (1, 2))], 1)
    (tmp_path / "good.bin").write_bytes(scan[:, :5].astype("<f4").tobytes())
    assert len(read_sweep(tmp_path / "good.bin")) == 1000
    (tmp_path / "a.bin").write_bytes(scan[:, :rows].astype("<f4").tobytes())
    with pytest.raises(InvalidInput, match=rf"a.bin: .*looks like {rows} values per point; put the original file back"):
        read_sweep(tmp_path / "a.bin")


@pytest.mark.parametrize(("low", "high"), [(0, 0.7), (-1, 200), (3, 891)])
def test_intensities_that_do_not_count_to_255_are_refused(tmp_path, low, high):
    (tmp_path / "a.bin").write_bytes(np.array([[1, 2, 3, low, 5], [1, 2, 3, high, 5]], "<f4").tobytes())
    with pytest.raises(
        InvalidInput, match=rf"a.bin: its intensity lies in {low:g}\.\.{high:g}, while nuScenes and Lyft count .* to 255"
    ):
        read_sweep(tmp_path / "a.bin")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.bin", "samples/../../x", "a\0b", "a\x1b[2J", "a\\b", ""])
def test_a_sweep_s_file_name_cannot_lead_elsewhere(root, name):
    tables = by_table()
    tables["sample_data"][2]["filename"] = name
    with pytest.raises(InvalidInput, match="leads out of the dataset's folder, or holds odd characters"):
        dataset(write(root, tables))[0]


@pytest.mark.parametrize("name", ["../x", "/x", "a\x1bb", "..", ""])
def test_names_of_scenes_are_checked_when_they_are_read(root, name):
    tables = by_table()
    tables["scene"][0]["name"] = name
    with pytest.raises(InvalidInput, match=r"name of a scene in .*scene.json .* cannot be a file name"):
        read_tables(write(root, tables), VERSION)


def test_numbers_beyond_all_bounds_are_sentences(root):
    path = root / VERSION / "sample_annotation.json"
    text = path.read_text()
    path.write_text(text.replace('"num_lidar_pts": 7', f'"num_lidar_pts": {"9" * 40}'))
    assert dataset(root)[0].labels.num_points.tolist()[0] in (0, 1)  # not known, so counted
    for wrong in ("9" * 400, "9" * 5000):
        path.write_text(text.replace("121.0", wrong))
        with pytest.raises(InvalidInput, match=r"sample_annotation.json"):
            dataset(root)[0]


def test_missing_returns_of_a_sweep_are_dropped_and_counted(root):
    data = dataset(root)
    path = data.tables.keyframe(data.ids[0]).path
    rows = np.fromfile(path, "<f4").reshape(-1, 5)
    np.concatenate([rows, np.zeros((3, 5), np.float32)]).astype("<f4").tofile(path)
    frame = data[0]
    assert (len(frame.points), frame.reading.points, frame.reading.points_zero) == (len(rows), len(rows) + 3, 3)
