"""Which scenes are chosen for labels: an order that a second, plain program gives too, no near copies, and a plain account of the rest."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.server.scene_choice import SceneChoiceConfig, SceneViews, choose_scenes
from upcycle3d.perception.server.scene_views import entropy, view_scenes
from upcycle3d.perception.server.store import collate_scenes
from upcycle3d.perception.training.detector_files import save_detector
from upcycle3d.tools import select
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")


def views_of(count: int, *, classes: int = 2, seed: int = 0) -> SceneViews:
    draw = torch.Generator().manual_seed(seed)
    return SceneViews(
        described=torch.randn(count, 4, generator=draw),
        doubt=torch.rand(count, generator=draw) * 3,
        objects=torch.rand(count, classes, generator=draw) * 5,
        usable=torch.ones(count, dtype=torch.bool),
    )


def plain_choice(views: SceneViews, number: int, duplicate: float) -> list[int]:
    """The rule `informative` once more, with lists and all pairs of scenes."""
    places = views.described.double().tolist()
    doubt, objects = views.doubt.double().tolist(), views.objects.double().tolist()
    usual = float(np.median([math.dist(a, b) for a, b in itertools.combinations(places, 2)]))
    left, chosen = list(range(len(places))), []
    while left and len(chosen) < number:
        far = {i: min((math.dist(places[i], places[c]) for c in chosen), default=1.0) for i in left}
        have = [sum(objects[c][k] for c in chosen) for k in range(len(objects[0]))]
        need = {i: sum(n / (1 + h) for n, h in zip(objects[i], have, strict=True)) for i in left}
        most = max(far.values()), max(doubt[i] for i in left), max(need.values())
        best = max(left, key=lambda i: far[i] / most[0] * doubt[i] / most[1] * need[i] / most[2])
        chosen.append(best)
        left = [i for i in left if i != best and math.dist(places[i], places[best]) >= duplicate * usual]
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_the_plain_rule(seed):
    views = views_of(40, seed=seed)
    found = choose_scenes(views, SceneChoiceConfig(number=12, duplicate=0.0))
    assert [scene.position for scene in found.chosen] == plain_choice(views, 12, 0.0)
    assert found.chosen[0].distance == math.inf


def test_the_first_n_of_a_longer_choice_are_the_choice_of_n():
    """Frames can be asked for one after the other."""
    views = views_of(30)
    long, short = (choose_scenes(views, SceneChoiceConfig(number=n)).chosen for n in (10, 4))
    assert long[:4] == short


def test_scenes_of_a_standing_vehicle_are_chosen_once_and_counted():
    views = views_of(20)
    copies = replace(
        views, described=torch.cat([views.described] * 3), doubt=views.doubt.repeat(3), objects=views.objects.repeat(3, 1),
        usable=views.usable.repeat(3),
    )  # fmt: skip
    found = choose_scenes(copies, SceneChoiceConfig(number=60, duplicate=0.01))
    assert len({scene.position % 20 for scene in found.chosen}) == len(found.chosen) == 20
    assert found.duplicates == 40


def test_a_rare_class_is_asked_for_once_the_common_one_is_there():
    doubt, place = torch.ones(3), torch.eye(3)
    objects = torch.tensor([[6.0, 0.0], [5.0, 0.0], [0.0, 2.0]])
    views = SceneViews(described=place, doubt=doubt, objects=objects, usable=torch.ones(3, dtype=torch.bool))
    assert [scene.position for scene in choose_scenes(views, SceneChoiceConfig(number=3)).chosen] == [0, 2, 1]


def test_each_simple_rule_follows_its_own_number():
    views = views_of(25)
    by_doubt = choose_scenes(views, SceneChoiceConfig(number=25, rule="doubt"))
    assert [s.position for s in by_doubt.chosen] == views.doubt.argsort(descending=True, stable=True).tolist()
    diverse = choose_scenes(views, SceneChoiceConfig(number=6, rule="diverse", duplicate=0.0))
    for number in range(1, 6):
        taken = torch.stack([views.described[s.position] for s in diverse.chosen[:number]])
        nearest = torch.cdist(views.described, taken).min(1).values
        assert nearest[diverse.chosen[number].position] == nearest.max()
    drawn = [
        [s.position for s in choose_scenes(views, SceneChoiceConfig(number=9, rule="random", seed=seed)).chosen]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_scenes_without_cells_are_never_chosen():
    views = replace(views_of(5), usable=torch.tensor([True, False, True, False, False]))
    for rule in ("informative", "doubt", "diverse", "random"):
        found = choose_scenes(views, SceneChoiceConfig(number=5, rule=rule, duplicate=0.0))
        assert {scene.position for scene in found.chosen} == {0, 2}
        assert found.unusable == 3


@pytest.mark.parametrize("count", [0, 1])
def test_no_scene_and_one_scene(count):
    found = choose_scenes(views_of(count), SceneChoiceConfig(number=3))
    assert len(found.chosen) == found.scenes == count


def test_scenes_that_are_all_equal_give_one():
    views = replace(views_of(4), described=torch.zeros(4, 2), doubt=torch.zeros(4), objects=torch.zeros(4, 1))
    found = choose_scenes(views, SceneChoiceConfig(number=4))
    assert ([scene.position for scene in found.chosen], found.duplicates) == ([0], 3)


def test_nan_is_refused_and_not_ranked_first():
    views = views_of(3)
    with pytest.raises(InvalidInput, match="doubt holds NaN"):
        replace(views, doubt=torch.tensor([0.0, torch.nan, 1.0]))
    with pytest.raises(InvalidInput, match="rule must be one of"):
        SceneChoiceConfig(rule="best")  # type: ignore[arg-type]


def test_entropy_is_one_bit_for_a_half_and_nothing_for_certainty():
    found = entropy(torch.tensor([0.0, 0.5, 1.0, 0.25]))
    wanted = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert found.tolist() == pytest.approx([0.0, 1.0, 0.0, wanted])


def test_a_view_counts_what_the_teacher_finds(store):
    """Expected objects are the sum of the scores, whatever the scenes are decoded with."""
    teacher = tiny.source_model()
    views = view_scenes(store, teacher, batch=2)
    assert len(views) == 3
    assert bool(views.usable.all())
    for position in range(3):
        with torch.no_grad():
            (found,) = teacher.predict(teacher.decode(collate_scenes([store[position]])))
        assert float(views.objects[position].sum()) == pytest.approx(float(found.scores.double().sum()), rel=1e-4)
        assert float(views.doubt[position]) == pytest.approx(float(entropy(found.scores).sum()), rel=1e-4)
    alone = view_scenes(store, teacher, batch=1)
    torch.testing.assert_close(alone.described, views.described, rtol=1e-4, atol=1e-5)


def test_the_command_names_scenes_and_frames(store, tmp_path, capsys):
    save_detector(tmp_path / "detector.safetensors", tiny.source_model())
    receipts = {store[i].scene_id: f"frame{i}" for i in range(2)}
    (tmp_path / "receipts.json").write_text(json.dumps(receipts))
    words = ["--store", str(store.folder), "--detector", str(tmp_path / "detector.safetensors"), "--number", "5"]
    words += ["--receipts", str(tmp_path / "receipts.json"), "--json", str(tmp_path / "chosen.json"), "--duplicate", "0"]
    assert run_command(select.command, words) == 0
    written = json.loads((tmp_path / "chosen.json").read_text())
    assert {row["scene"]: row["frame"] for row in written["scenes"]} == {
        store[i].scene_id: receipts.get(store[i].scene_id) for i in range(3)
    }
    assert written["store_digest"] == store.digest()
    said = capsys.readouterr()
    assert "name no frame for 1 of 3" in said.err.replace("\n", " ")
    assert "5 scenes were asked for" in said.err.replace("\n", " ")
