"""`upcycle` and `moe detector` learn from several stores: fleets of two kinds of vehicles that run one encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from upcycle3d.core.errors import Interrupted, InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.perception.recipes import upcycling_job
from upcycle3d.perception.recipes.fleet_stores import StoreShare, few_scenes_notes, labeled_rig_note, rigs_of_options
from upcycle3d.perception.recipes.job_start import JobStart
from upcycle3d.perception.recipes.jobs import train_preset
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.tools import moe_detector, upcycle
from upcycle3d.tools.console import run_command

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

CAR, TRUCK = RigSpec(), RigSpec(z_shift=2.5, intensity_scale=1 / 255)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """A source model, a second one of another seed, and stores of cars, of trucks and of a stranger's encoder."""
    folder = tmp_path_factory.mktemp("runs")
    train_preset(tiny.preset(), data, folder / "source", progress=False)
    train_preset(tiny.preset(), data, folder / "stranger", seed=1, steps=1, progress=False)
    for name, model, rig, seeds in (
        ("cars", "source", CAR, range(4)),
        ("trucks", "source", TRUCK, range(10, 13)),
        ("foreign", "stranger", CAR, range(20, 22)),
    ):
        scans = [rig.to_sensor(tiny.scan_with_car(seed)) for seed in seeds]
        tiny.store(folder / name, load_detector(folder / model), scans, rig=rig)
    return folder


@pytest.fixture(scope="module")
def stores(runs) -> list[Path]:
    return [runs / "cars" / "store", runs / "trucks" / "store"]


def learn(data, runs, out, stores, rig, **options):
    given = {"method": "hybrid", "progress": False} | options
    return upcycle_preset(tiny.preset(), data, runs / "source", out, store=stores, rig=rig, **given)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_detector(path).state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("detector.safetensors", "teacher.safetensors"):
        a, b = weights(one / name), weights(other / name)
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


class Stop(Exception):
    """The test has seen enough."""


def test_two_fleets_of_two_rigs_train_one_detector_through_the_command(data, runs, stores, tmp_path, capsys):
    """The exact rigs are given per store, in their order, and the shares of the stores are printed before the first step."""
    words = ["small", "--data", data.root, "--detector", runs / "source", "--store", *stores, "--z-shift", 0, 2.5]
    words += ["--intensity-scale", 1, 1 / 255, "--out", tmp_path / "run", "--method", "hybrid", "--steps", 2, "--workers", 0]
    assert run_command(upcycle.command, [*map(str, words), "--json", str(tmp_path / "j")], parsed_as=upcycle.ARGUMENTS) == 0
    assert json.loads((tmp_path / "j").read_text())["scenes"] == 7
    printed = " ".join(capsys.readouterr().out.split())
    assert "drawn in proportion to their number" in printed
    assert "57.1%" in printed
    assert "42.9%" in printed
    record = RunFolder.open(tmp_path / "run").config_json()
    assert [record["store"], *record["further_stores"]] == [str(store) for store in stores]
    assert [record["rig"]["z_shift"], record["further_rigs"][0]["z_shift"]] == [0, 2.5]
    assert any(not torch.equal(a, weights(runs / "source")[key]) for key, a in weights(tmp_path / "run").items())


def test_the_start_of_a_job_says_the_shares_and_whose_rig_is_not_that_of_the_labeled_data(data, runs, stores, tmp_path):
    starts: list[JobStart] = []

    def look(start: JobStart) -> None:
        starts.append(start)
        raise Stop

    with pytest.raises(Stop):
        learn(data, runs, tmp_path / "run", stores, (CAR, TRUCK), on_start=look)
    assert [(s.store, s.rig, s.scenes) for s in starts[0].stores] == [(stores[0], CAR, 4), (stores[1], TRUCK, 3)]
    assert sum(s.share for s in starts[0].stores) == pytest.approx(1)
    (note,) = [note for note in starts[0].notes if "the labeled data" in note]
    assert f"the scenes of {stores[1]} have {TRUCK}; this is right only if" in note
    assert str(stores[0]) not in note
    with pytest.raises(Stop):
        learn(data, runs, tmp_path / "run", stores[0], CAR, on_start=look)
    assert starts[1].stores == ()
    assert not any("the labeled data" in note for note in starts[1].notes)


def test_the_note_on_rigs_names_every_store_that_differs():
    split, both = DataSplit(root=Path("data"), name="train"), (Path("a"), Path("b"))
    other = RigSpec(z_shift=1.7)
    assert labeled_rig_note(split, CAR, None, both, (CAR, CAR)) == ()
    (note,) = labeled_rig_note(split, CAR, None, both, (other, TRUCK))
    assert f"the scenes of a have {other}; the scenes of b have {TRUCK}" in note
    assert note.endswith("after all of them")
    (note,) = labeled_rig_note(split, CAR, None, both[:1], (other,))
    assert f"and the scenes of the store have {other}; this is right only if the road lies at the same height" in note


def test_a_store_with_few_scenes_next_to_the_largest_is_told_with_the_numbers():
    shares = [
        StoreShare(store=Path(name), rig=CAR, scenes=scenes, share=scenes / 55_050)
        for name, scenes in (("small", 50), ("large", 50_000), ("tenth", 5_000))
    ]
    (note,) = few_scenes_notes(shares)
    assert note.startswith("the store small has 50 scenes and large has 50,000: ")
    assert "so 0.09% of the unlabeled scenes come from small," in note
    assert few_scenes_notes(shares[1:]) == few_scenes_notes([]) == ()


def test_a_run_of_two_stores_that_was_stopped_ends_as_one_that_was_not_also_after_the_stores_moved(
    data, runs, stores, tmp_path, monkeypatch
):
    learn(data, runs, tmp_path / "whole", stores, (CAR, TRUCK))
    real = upcycling_job.upcycle

    def stopped(*arguments, after_step, **options):
        def stop(step, student):
            after_step(step, student)
            if step == 2:
                raise KeyboardInterrupt

        return real(*arguments, after_step=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(upcycling_job, "upcycle", stopped)
        with pytest.raises(Interrupted):
            learn(data, runs, tmp_path / "run", stores, (CAR, TRUCK))
    moved = [shutil.copytree(store, tmp_path / f"store{i}") for i, store in enumerate(stores)]
    learn(data, runs, tmp_path / "run", moved, (CAR, TRUCK), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").config_json()["further_stores"] == [str(moved[1])]


def test_a_run_is_resumed_with_the_same_stores_in_the_same_order_and_a_store_may_grow(data, runs, stores, tmp_path):
    moved = [shutil.copytree(store, tmp_path / name) for name, store in zip(("cars", "trucks"), stores, strict=True)]
    run = tmp_path / "run"
    learn(data, runs, run, moved, (CAR, TRUCK), steps=2)
    with pytest.raises(InvalidInput, match=r"store .*trucks holds other scenes than .*began with, .*cars .* keep the order"):
        learn(data, runs, run, moved[::-1], (TRUCK, CAR), steps=2, resume=True)
    with pytest.raises(InvalidInput, match=r"began with 2 stores \(.*cars, .*trucks\), and 1 is given \(--store\)"):
        learn(data, runs, run, moved[:1], CAR, steps=2, resume=True)
    learn(data, runs, tmp_path / "one", moved[0], CAR, steps=2)
    with pytest.raises(InvalidInput, match=r"began with 1 store \(.*cars\), and 2 are given"):
        learn(data, runs, tmp_path / "one", moved, (CAR, TRUCK), steps=2, resume=True)
    smaller = tiny.store(tmp_path / "other", load_detector(runs / "source"), [TRUCK.to_sensor(tiny.scan_with_car(30))], rig=TRUCK)
    with pytest.raises(InvalidInput, match=r"store .*other/store holds other scenes than .*began with, .*trucks"):
        learn(data, runs, run, [moved[0], smaller.folder], (CAR, TRUCK), steps=2, resume=True)
    before = len(SmashedStore(moved[1]))
    extractor = Extractor(load_detector(runs / "source").encoder, TRUCK, "fp16")
    with extractor.shard_writer(tmp_path / "in") as writer:
        extract([TRUCK.to_sensor(tiny.scan_with_car(31))], extractor, writer)
    ingest(tmp_path / "in", moved[1], expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
    assert len(SmashedStore(moved[1])) == before + 1
    assert learn(data, runs, run, moved, (CAR, TRUCK), steps=4, resume=True).scenes == 8


def test_one_store_in_a_sequence_is_the_run_of_that_store_and_records_of_before_are_resumed(data, runs, stores, tmp_path):
    """A run folder that was written before there could be several stores has no field for them."""
    learn(data, runs, tmp_path / "one", stores[0], CAR)
    learn(data, runs, tmp_path / "listed", [stores[0]], [CAR], steps=4)
    assert_same_run(tmp_path / "one", tmp_path / "listed")
    file = tmp_path / "one" / "config.json"
    stored = json.loads(file.read_text())
    assert stored["store"] == str(stores[0])
    for field in ("further_stores", "further_rigs", "further_digests"):
        assert stored.pop(field) == []
    file.write_text(json.dumps(stored))
    learn(data, runs, tmp_path / "one", [stores[0]], CAR, steps=6, resume=True)
    learn(data, runs, tmp_path / "listed", stores[0], CAR, steps=6, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "listed")


def test_the_store_that_does_not_fit_is_named_among_good_ones(data, runs, stores, tmp_path):
    for bad, rigs, name in (
        (runs / "foreign" / "store", (CAR, TRUCK, CAR), r"foreign/store"),
        (runs / "trucks" / "store", (CAR, CAR), r"trucks/store holds .* the rig given \(z_shift 0, intensity_scale 1\)"),
    ):
        with pytest.raises(InvalidInput, match=f"the store .*{name}"):
            learn(data, runs, tmp_path / "run", [*stores, bad][: len(rigs)], rigs)
    empty = tmp_path / "empty"
    tiny.store(empty, load_detector(runs / "source"), [])
    with pytest.raises(InvalidInput, match=r"the store .*empty/store holds no scene"):
        learn(data, runs, tmp_path / "run", [*stores, empty / "store"], (CAR, TRUCK, CAR))
    assert not (tmp_path / "run").exists()


def test_a_store_that_is_given_twice_is_refused(data, runs, stores, tmp_path):
    copy = shutil.copytree(stores[0], tmp_path / "copy")
    (tmp_path / "link").symlink_to(stores[0])
    for again, said in ((stores[0], "is given twice"), (tmp_path / "link", "is given twice"), (copy, "hold the same 4 scenes")):
        with pytest.raises(InvalidInput, match=said):
            learn(data, runs, tmp_path / "run", [stores[0], again], CAR)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rig": [CAR, TRUCK, CAR]}, "3 rigs are given for 2 stores; give one for all stores, or one per store in the order"),
        ({"rig": []}, "rig must be a RigSpec.* found an empty sequence"),
        ({"rig": [CAR, 1.7]}, "rig must be a RigSpec"),
        ({"store": []}, "store must be the path of a store of smashed scenes, or several paths"),
        ({"store": 3}, "store must be the path of a store"),
        ({"store": ["a", None]}, "store must be the path of a store"),
        ({"store": None, "method": "source_continued"}, "2 rigs are given for 0 stores"),
    ],
)
def test_wrong_stores_and_rigs_are_sentences(data, runs, stores, tmp_path, wrong, said):
    given = {"store": stores, "rig": [CAR, TRUCK], "method": "hybrid"} | wrong
    with pytest.raises(InvalidInput, match=said):
        upcycle_preset(tiny.preset(), data, runs / "source", tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_options_give_one_value_for_all_stores_or_one_for_each(runs):
    trained, both = load_detector(runs / "source").trained_on, [Path("a"), Path("b")]
    assert rigs_of_options((), (), both, trained) is None
    assert rigs_of_options((0.0, 2.5), (), both, trained) == (CAR, RigSpec(z_shift=2.5))
    assert rigs_of_options((0.0, -2.5), (0.5,), both, trained)[1] == RigSpec(z_shift=-2.5, intensity_scale=0.5)
    assert rigs_of_options((2.5,), (), [], trained) == (RigSpec(z_shift=2.5),)
    with pytest.raises(InvalidInput, match="2 values of --z-shift are given for 1 store; give one"):
        rigs_of_options((0.0, 2.5), (), both[:1], trained)
    with pytest.raises(InvalidInput, match="3 values of --intensity-scale are given for 2 stores"):
        rigs_of_options((), (1.0, 1.0, 1.0), both, trained)


def test_an_upcycled_head_of_two_fleets_learns_from_both(data, runs, stores, tmp_path):
    """The head that this is for: one expert for each kind of vehicle, measured and trained on the scenes of both rigs together."""
    for seed, name in enumerate(("car", "truck")):
        upcycle_preset(
            tiny.preset(), data, runs / "source", tmp_path / name, method="source_continued", seed=seed, steps=1, progress=False
        )
    words = ["--specialists", tmp_path / "car", tmp_path / "truck", "--head", "bev", "--stores", *stores, "--recalibrate"]
    words += ["--batch-norm", "share", "--out", tmp_path / "mixture"]
    assert run_command(moe_detector.command, [*map(str, words)]) == 2, "the rig of the trucks is not that of the training"
    rigs = ["--z-shift", 0, 2.5, "--intensity-scale", 1, 1 / 255]
    assert run_command(moe_detector.command, [*map(str, [*words, *rigs])]) == 0
    upcycle_preset(
        tiny.preset(),
        data,
        tmp_path / "mixture",
        tmp_path / "run",
        method="hybrid",
        store=stores,
        rig=(CAR, TRUCK),
        progress=False,
    )
    last = RunFolder.open(tmp_path / "run").metrics("train")[-1]
    assert last["use/scenes/car"] + last["use/scenes/truck"] == pytest.approx(1)
    a, b = weights(tmp_path / "mixture"), weights(tmp_path / "run")
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert any(name.startswith("decoder.") for name in changed)
    assert not any(name.startswith("encoder.") for name in changed)
