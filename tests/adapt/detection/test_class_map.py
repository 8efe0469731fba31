"""What the class names of one dataset mean to a detector of another: no class may be missed."""

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.detection.class_map import IGNORE, PAIRS, UNKNOWN, ClassMap, changed_map, map_by_name, pair_map

KITTI = ClassMap(
    source=("Vehicle", "Sign", "Pedestrian"),
    meaning={"Car": "Vehicle", "Van": "Vehicle", "Pedestrian": "Pedestrian", "Tram": UNKNOWN, "DontCare": IGNORE},
)


def test_a_class_map_numbers_names_and_knows_what_is_shared():
    assert KITTI.ids(["Van", "Tram", "DontCare", "Pedestrian"]).tolist() == [0, 3, -1, 2]
    assert KITTI.shared == (0, 2)
    assert KITTI.ids([]).shape == (0,)


def test_a_class_that_the_map_misses_is_named():
    with pytest.raises(InvalidInput, match=r"says nothing about Bus, Misc"):
        KITTI.ids(["Misc", "Car", "Bus"])
    with pytest.raises(InvalidInput, match="map to nothing known"):
        ClassMap(source=("Car",), meaning={"Van": "Bus"})
    with pytest.raises(InvalidInput, match="distinct names"):
        ClassMap(source=("Car", "Car"), meaning={})


def test_every_pair_of_datasets_maps_to_what_the_notes_say():
    waymo, kitti = ("Vehicle", "Pedestrian", "Cyclist"), ("Car", "Pedestrian", "Cyclist")
    m = pair_map("waymo", "kitti", waymo)
    assert m.ids(["Car", "Van", "Truck", "Cyclist", "Tram", "Person_sitting"]).tolist() == [0, 0, 0, 2, 3, -1]
    assert pair_map("waymo", "kitti", kitti).ids(["Van"]).tolist() == [0]  # a Waymo detector that calls its vehicles cars
    assert pair_map("kitti", "kitti", kitti).ids(["Car", "Van", "Misc"]).tolist() == [0, 3, 3]
    m = pair_map("waymo", "lyft", waymo)
    assert m.ids(["bus", "motorcycle", "animal"]).tolist() == [0, 2, 3]
    assert pair_map("kitti", "lyft", ("Car",)).ids(["car", "truck", "pedestrian"]).tolist() == [0, 1, 1]
    assert pair_map("lyft", "kitti", ("car", "truck")).ids(["Truck", "Van", "Pedestrian"]).tolist() == [1, -1, 2]
    m = pair_map("kitti", "waymo", kitti)
    assert m.longest == {"Vehicle": 6.0}
    assert m.ids(["Vehicle", "Sign"]).tolist() == [0, 3]
    assert {target for meaning in PAIRS.values() for target in meaning.values()} >= {UNKNOWN, IGNORE}
    with pytest.raises(InvalidInput, match="no class map from nuscenes to kitti"):
        pair_map("nuscenes", "kitti", kitti)


def test_single_classes_are_changed_and_a_target_is_covered():
    base = map_by_name(("Car", "Pedestrian"), ("Car", "Van", "Animal"))
    changed = changed_map(base, ("Car", "Van", "Animal"), ("Van=Car", "Animal=ignore"))
    assert changed.ids(["Car", "Van", "Animal"]).tolist() == [0, 0, -1]
    assert changed_map(base, ("Car",), ()).meaning == {"Car": "Car"}
    for changes, words in (
        (("Horse=unknown",), "found Horse"),
        (("Van",), "NAME=MEANING"),
        (("Van=Lorry",), "map to nothing known"),
    ):
        with pytest.raises(InvalidInput, match=words):
            changed_map(base, ("Car", "Van", "Animal"), changes)
    with pytest.raises(InvalidInput, match="says nothing about Tram"):
        changed_map(base, ("Car", "Tram"), ())
