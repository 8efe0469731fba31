"""The rules of a ledger: what is usual passes in silence, what is absurd warns, and a total loss stops."""

from __future__ import annotations

from dataclasses import replace

import pytest

from upcycle3d.core.errors import UpcycleError
from upcycle3d.core.ledger import Ledger
from upcycle3d.core.ledger_rules import judge, stop_if_absurd


def test_usual_counts_pass_without_a_word():
    usual = Ledger(scans=10, points=1000, points_outside_range=200, cells=500, cells_over_limit=5, boxes={"Car": 20})
    assert judge(usual) == ()


def test_counts_add_up_and_survive_json():
    one = Ledger(scans=1, points=10, boxes={"Car": 2}, types_dropped={"Van": 1})
    both = one + Ledger(scans=1, points=5, boxes={"Car": 1, "Bus": 1})
    assert both == Ledger(scans=2, points=15, boxes={"Car": 3, "Bus": 1}, types_dropped={"Van": 1})
    assert Ledger.total([one, one]) == one + one
    assert Ledger.from_json(both.to_json()) == both


@pytest.mark.parametrize(
    ("absurd", "words"),
    [
        (Ledger(points=100, points_outside_range=100, points_outside_height=90), "z-shift"),
        (Ledger(points=100, points_outside_range=100), "units that are not meters, other axes"),
        (Ledger(points=1000, points_outside_camera=990, points_outside_range=10), "image-size"),
        (Ledger(points=100, points_outside_camera=100), "image-size"),
        (Ledger(points=100, points_zero=100), "columns"),
        (Ledger(boxes={"Car": 4}, boxes_empty={"Car": 4}), "yaw degrees"),
        (Ledger(boxes={"Car": 3}, boxes_outside_range={"Car": 3}), "range"),
    ],
)
def test_a_total_loss_stops_and_names_the_option(absurd, words):
    with pytest.raises(UpcycleError, match=words):
        stop_if_absurd(judge(absurd))


def test_a_large_loss_warns_and_lost_cells_stop_only_where_asked():
    (warning,) = judge(Ledger(points=100, points_outside_range=67))
    assert not warning.stops
    assert "67%" in warning.text
    lost = Ledger(points=10, cells=100, cells_over_limit=20)
    assert [f.stops for f in judge(lost)] == [False]
    assert [f.stops for f in judge(lost, refuse_lost_cells=True)] == [True]


def test_a_row_gives_number_and_share():
    rows = Ledger(scans=2, points=1000, points_outside_range=250, boxes={"Car": 0}).rows()
    assert ("points outside the range", "250", "25.0% of the points") in rows
    assert ("boxes: Car", "0", "") in rows


def test_intensity_outside_its_range_gives_one_warning_with_the_factor_for_all_files():
    parts = [Ledger(points=10, points_intensity_outside=5, highest_intensity=top) for top in (90.0, 200.0, 120.0)]
    assert Ledger.total(parts).highest_intensity == 200
    (warning,) = judge(Ledger.total(parts))
    assert not warning.stops
    assert "50.0% of the points" in warning.text
    assert "--intensity-scale 1/255" in warning.text


def test_many_failed_scans_are_a_warning_and_a_few_empty_boxes_no_stop():
    (finding,) = judge(Ledger(scans=8, scans_failed=2))
    assert not finding.stops
    assert "2 of 10 scans were left out because of errors" in finding.text
    assert judge(Ledger(scans=100, scans_failed=2)) == ()
    (finding,) = judge(Ledger(boxes={"Car": 3}, boxes_empty={"Car": 3}))
    assert not finding.stops


def test_a_full_turn_whose_labels_lie_in_front_only_is_a_warning():
    turn = Ledger(
        scans=8, points=1000, points_outside_range=100, points_behind=400, boxes={"Car": 40}, boxes_outside_range={"Car": 5}
    )
    (finding,) = judge(turn)
    assert "44% of the points in range lie behind the sensor, and none of the 35 boxes does" in finding.text
    assert not finding.stops
    for usual in (replace(turn, boxes_behind=1), replace(turn, points_behind=100), replace(turn, boxes={"Car": 20})):
        assert not any("behind" in finding.text for finding in judge(usual))


def test_a_tiny_intensity_is_shown_and_warned_of():
    parts = [Ledger(scans=1), Ledger(scans=1, intensity_range=(0.0, 0.001)), Ledger(scans=1, intensity_range=(0.0002, 0.0039))]
    total = Ledger.total(parts)
    assert total.intensity_range == (0.0, 0.0039)
    assert Ledger.from_json(total.to_json()) == total
    assert ("intensity after scaling, lowest and highest", "0 to 0.0039", "") in total.rows()
    (finding,) = judge(total)
    assert not finding.stops
    assert "the highest intensity of all scans is 0.0039 after scaling" in finding.text
    assert "--intensity-scale" in finding.text
    assert judge(Ledger(scans=1, intensity_range=(0.0, 0.99))) == ()
    assert judge(Ledger(scans=1, intensity_range=(0.0, 0.0))) == ()  # a sensor that writes no intensity
    assert not any("intensity" in row[0] for row in Ledger(scans=1).rows())


def test_every_share_of_dropped_types_has_all_objects_as_its_whole():
    ledger = Ledger(boxes={"Car": 37}, types_ignored={"Van": 7}, types_dropped={"Truck": 2, "Tram": 4})
    rows = ledger.rows()
    assert ("boxes: Car", "37", "") in rows
    assert ("objects of type Van, kept with weight 0", "7", "14.0% of all objects") in rows
    assert ("objects of type Truck, dropped", "2", "4.0% of all objects") in rows
    assert ("objects of type Tram, dropped", "4", "8.0% of all objects") in rows


def test_intensity_that_nobody_measured_is_none_and_not_0():
    assert Ledger(points=5).to_json()["highest_intensity"] is None
    assert not any("intensity" in row[0] for row in Ledger(points=5).rows())
    measured = (
        Ledger(lowest_intensity=0.1, highest_intensity=0.9) + Ledger() + Ledger(lowest_intensity=0.3, highest_intensity=0.95)
    )
    assert (measured.lowest_intensity, measured.highest_intensity) == (0.1, 0.95)
    assert ("intensity in the files, lowest and highest", "0.1 to 0.95", "") in measured.rows()
    assert Ledger.from_json(measured.to_json()) == measured


def test_a_factor_that_makes_every_intensity_tiny_is_answered_with_the_right_one():
    for highest, scale, remedy in ((0.99, 255, "leave --intensity-scale out"), (255.0, 65535, "1/255")):
        (warning,) = judge(Ledger(points=100, highest_intensity=highest, intensity_range=(0.0, highest / scale)))
        assert "0.0039 after scaling" in warning.text
        assert remedy in warning.text


@pytest.mark.parametrize("what", ["points", "boxes"])
def test_the_side_that_was_left_is_named_and_a_z_shift_only_where_things_lie_too_high_or_too_low(what):
    def warning(height: int, of: int = 50) -> str:
        if what == "points":
            (finding,) = judge(Ledger(points=100, points_outside_range=of, points_outside_height=height))
        else:
            (finding,) = judge(Ledger(boxes={"Car": 100}, boxes_outside_range={"Car": of}, boxes_outside_height=height))
        return finding.text

    assert "50 lie beyond its sides (x, y)" in warning(0)
    assert "z-shift" not in warning(0)
    assert "z-shift" not in warning(10)
    assert "50 lie below or above it (z): the likely cause is a forgotten z shift (--z-shift)" in warning(50)
    assert "45 lie below or above it (z), 5 beyond its sides" in warning(45)
    assert "z-shift" in warning(30, of=80)  # many for both reasons


def test_a_picture_of_another_size_is_named_where_the_camera_sees_almost_no_point():
    (warning,) = judge(Ledger(points=1000, points_outside_camera=990, points_outside_range=2))
    assert not warning.stops
    assert "990 of 1,000 points lie outside the camera's view" in warning.text
    assert "--image-size" in warning.text
    assert judge(Ledger(points=1000, points_outside_camera=850)) == ()


def test_calibrations_that_do_not_belong_to_the_pictures_are_a_warning():
    (finding,) = judge(Ledger(scans=10, scans_off_center=10))
    assert not finding.stops
    assert "in 10 of 10 scans, the principal point of the camera (row P2) lies far from the center" in finding.text
    assert judge(Ledger(scans=10, scans_off_center=1)) == ()


def test_points_in_zones_that_nobody_labeled_are_a_row_and_no_share_of_the_rest():
    ledger = Ledger(scans=1, points=100, points_no_label_zone=50, points_outside_range=50)
    assert ("points in zones where nobody labeled, dropped", "50", "50.0% of the points") in ledger.rows()
    (finding,) = judge(ledger)
    assert finding.stops, "every point that is left lies outside the range"
