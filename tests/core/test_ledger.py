"""The rules of a ledger: what is usual passes in silence, what is absurd warns, and a total loss stops."""

from __future__ import annotations

from dataclasses import replace

import pytest

from upcycle3d.core.errors import UpcycleError
from upcycle3d.core.ledger import Ledger, judge, stop_if_absurd


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
        (Ledger(points=100, points_outside_range=100), "z-shift"),
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
    assert ("points outside the range", "250", "25.0%") in rows
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
