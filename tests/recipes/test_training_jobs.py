"""Training as people do it: start from weights, own classes, more steps, scores on the way, moved data, runs that end badly."""

import errno
import json
import os
import socket
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import tiny
from upcycle3d.core.errors import Interrupted, InvalidInput, UpcycleError
from upcycle3d.core.frame import Frame
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Labels
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.prepare import prepare
from upcycle3d.perception.recipes import jobs
from upcycle3d.perception.recipes.job_start import JobStart
from upcycle3d.perception.recipes.jobs import train_preset
from upcycle3d.perception.recipes.own_classes import preset_for_classes
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.recipes.validation import Validation
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.training import checkpoint
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.training.optim import OneCycle, learning_rate
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.vehicle.extractor import Extractor, extract

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

OTHER = replace(tiny.CAR_ANCHOR, name="Van")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    train_preset(tiny.preset(), data, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def store(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    tiny.store(folder, load_detector(finished), [tiny.scan_with_car(seed) for seed in range(3)])
    return folder / "store"


def copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_detector(path).state_dict()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class Stop(Exception):
    """The test has seen enough."""


def stopping(start) -> None:
    raise Stop


# ---- starting from weights


def test_a_training_starts_from_all_weights_of_a_run_with_the_same_classes(data, finished, tmp_path):
    outcome = train_preset(tiny.preset(), data, tmp_path / "run", init=finished, steps=1, progress=False)
    assert outcome.weights.fresh == outcome.weights.unused == ()
    assert len(outcome.weights.taken) == len(weights(finished))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"] == str(finished)


def test_with_another_class_only_the_parts_of_classes_start_fresh(finished, tmp_path):
    split = tiny.prepared(tmp_path / "vans", classes=("Van",))
    seen = []
    with pytest.raises(Stop):
        train_preset(
            tiny.preset(anchors=(OTHER,)),
            split,
            tmp_path / "run",
            init=finished,
            on_start=lambda s: seen.append(s) or stopping(s),
        )
    taken = seen[0].weights
    assert taken.fresh
    assert all(name.startswith("decoder.anchor_head.") for name in taken.fresh)
    assert taken.fresh == taken.unused, "shapes fit, but the class is another one"
    assert not (tmp_path / "run").exists()


def test_two_classes_of_a_one_class_run_take_encoder_and_second_stage(finished, tmp_path):
    split = tiny.prepared(tmp_path / "two", classes=("Car", "Pedestrian"))
    preset = tiny.preset(anchors=(tiny.CAR_ANCHOR, tiny.PEDESTRIAN_ANCHOR))
    preset = replace(preset, train=replace(preset.train, gt_sampling=()))
    outcome = train_preset(
        preset, split, tmp_path / "run", init=finished / "checkpoints" / "step_00000002", steps=1, progress=False
    )
    parts = {".".join(name.split(".")[:2]) for name in outcome.weights.fresh}
    assert parts == {"decoder.anchor_head"}


def test_weights_of_which_nothing_fits_are_refused(data, tmp_path):
    wide = tiny.second_iou(tiny.second_iou_config(width=32))
    save_run_detector(tmp_path / "wide", wide)
    with pytest.raises(
        InvalidInput, match=r"no weight of .*wide \(a SECOND-IoU\) fits this SECOND-IoU; for example encoder\.\S+ is \("
    ):
        train_preset(tiny.preset(), data, tmp_path / "run", init=tmp_path / "wide")
    with pytest.raises(InvalidInput, match="nowhere"):
        train_preset(tiny.preset(), data, tmp_path / "run", init=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_own_classes_get_anchors_of_the_mean_sizes_in_the_split(tmp_path):
    frames = []
    for seed in range(10):
        big = torch.tensor([[6.0, 2.0, 1.5, 8.0 + seed % 2, 2.5, 3.0, 0.1], [4.0, -2.0, 0.9, 0.6, 0.8, 1.8, 0.0]])
        labels = Labels.make(big, torch.tensor([0, 1]), num_points=torch.full((2,), 20))
        frames.append(Frame(id=f"f{seed}", points=tiny.scan_with_car(seed, boxes=big), labels=labels))
    ids = [f.id for f in frames]
    prepare(frames, ids, tmp_path / "own", splits={"train": ids}, classes=("Truck", "Child"), workers=0)
    base = tiny.preset(anchors=(tiny.CAR_ANCHOR, tiny.PEDESTRIAN_ANCHOR))
    base = replace(base, train=replace(base.train, gt_sampling=(7, 5)))
    split = DataSplit(root=tmp_path / "own", name="train")
    made = preset_for_classes(base, split.open(), ("Truck", "Child"))
    truck, child = made.detector.decoder.anchors
    assert (truck.name, truck.size, truck.bottom_z, truck.matched) == ("Truck", (8.5, 2.5, 3.0), 0.0, 0.55)
    assert (child.name, child.size, child.bottom_z, child.matched) == ("Child", (0.6, 0.8, 1.8), 0.0, 0.35)
    assert made.train.gt_sampling == (7, 5)
    with pytest.raises(InvalidInput, match="prepared for the classes Truck, Child, and --classes asks for Child, Truck"):
        preset_for_classes(base, split.open(), ("Child", "Truck"))
    with pytest.raises(InvalidInput, match="`train … --classes Truck Child`"):
        train_preset(base, split, tmp_path / "run")
    outcome = train_preset(base, split, tmp_path / "run", classes=("Truck", "Child"), steps=1, progress=False)
    assert outcome.detector.class_names == ("Truck", "Child")


def test_a_class_with_too_few_objects_has_no_mean_size(data):
    with pytest.raises(InvalidInput, match=r"too few labeled objects .*: Car \(4\); at least 10"):
        preset_for_classes(tiny.preset(), data.open(), ("Car",))


# ---- more steps


def test_a_finished_run_goes_on_for_more_steps_with_a_new_cycle_however_often_it_is_stopped(data, finished, tmp_path):
    run, stopped = copied(finished, tmp_path / "run"), copied(finished, tmp_path / "stopped")
    before = weights(run)
    train_preset(tiny.preset(), data, run, steps=8, resume=True, progress=False)
    assert_equal(weights(run / "detector_step_00000004.safetensors"), before)
    assert not torch.equal(weights(run)["decoder.anchor_head.conv_cls.weight"], before["decoder.anchor_head.conv_cls.weight"])
    optim = RunFolder.open(run).config_json()["preset"]["train"]["loop"]["optim"]
    assert (optim["total_steps"], optim["cycles"]) == (8, [[0, 4], [4, 8]])

    real = jobs.train_supervised

    def killed(*arguments, **options):
        def look(step):
            if step == 6:
                raise KeyboardInterrupt
            options["after_step"](step)

        return real(*arguments, **{**options, "after_step": look})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "train_supervised", killed)
        with pytest.raises(Interrupted):
            train_preset(tiny.preset(), data, stopped, steps=8, resume=True, progress=False)
    with pytest.raises(InvalidInput, match=r"this run was interrupted at step 6 of 8.*resume it with: .*newest checkpoint"):
        load_detector(stopped)
    assert train_preset(tiny.preset(), data, stopped, resume=True, progress=False).steps == 8, "a run knows its number of steps"
    assert_equal(weights(stopped), weights(run))


def test_a_run_with_its_own_number_of_steps_needs_no_number_to_go_on(data, tmp_path, monkeypatch):
    """`--steps 3` with a preset of 4 steps: the resumed run keeps 3, and other changes of the preset are still refused."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "train_supervised", interrupted)
        with pytest.raises(Interrupted, match="resume with"):
            train_preset(tiny.preset(), data, tmp_path / "run", steps=3, progress=False)
    assert RunFolder.open(tmp_path / "run").status()["state"] == "interrupted"
    for preset in (tiny.preset(steps=7), replace(tiny.preset(), train=replace(tiny.preset().train, batch_size=1))):
        with pytest.raises(InvalidInput, match="another configuration"):
            train_preset(preset, data, tmp_path / "run", resume=True, progress=False)
    assert train_preset(tiny.preset(), data, tmp_path / "run", resume=True, progress=False).steps == 3


def test_a_folder_that_is_taken_is_refused_before_the_data_are_read(data, finished, tmp_path):
    def read(start: JobStart) -> None:
        raise AssertionError("the data were read")

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    for out, message in ((finished, r"already holds a run; resume it with .*--resume"), (tmp_path / "notes", "holds no run")):
        with pytest.raises(InvalidInput, match=message):
            train_preset(tiny.preset(), data, out, on_start=read)


def test_a_run_cannot_end_before_where_it_is(data, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    with pytest.raises(InvalidInput, match="has done 4 steps, so it cannot end after 3"):
        train_preset(tiny.preset(), data, run, steps=3, resume=True, progress=False)
    assert (run / "detector.safetensors").exists()


def test_a_continued_schedule_keeps_its_past_and_warms_up_again():
    plan = OneCycle(lr=1.0, total_steps=100)
    more = plan.continued(60, 160).continued(100, 200)
    assert more.cycles == ((0, 100), (60, 160), (100, 200))
    assert [learning_rate(more, s) for s in range(60)] == [learning_rate(plan, s) for s in range(60)]
    assert learning_rate(more, 60) == pytest.approx(0.1)
    assert learning_rate(more, 100) == pytest.approx(0.1)
    assert learning_rate(more, 140) == pytest.approx(1.0)
    assert learning_rate(more, 200) == pytest.approx(1e-5)
    assert plan.continued(0, 50) == OneCycle(lr=1.0, total_steps=50)
    with pytest.raises(InvalidInput, match="must start at step 0 and end at step 50"):
        replace(plan, total_steps=50, cycles=((0, 40),))


# ---- scores on the way


def test_validation_scores_on_the_way_keeps_the_best_and_changes_no_bit(data, finished, tmp_path):
    val = Validation(data=replace(data, name="val"), every=2)
    outcome = train_preset(tiny.preset(), data, tmp_path / "run", validate=val, progress=False)
    assert_equal(weights(tmp_path / "run"), weights(finished))
    lines = RunFolder.open(tmp_path / "run").metrics("validation")
    assert [line["step"] for line in lines] == [1, 3]
    record = json.loads((tmp_path / "run" / "best.json").read_text())
    assert record["step"] in (2, 4)
    assert record["chosen_on"] == f"{data.root}:val"
    assert "too good to report" in record["note"]
    assert outcome.best == tmp_path / "run" / "best.safetensors"
    best = weights(outcome.best)
    saved = weights(tmp_path / "run" / "checkpoints" / f"step_{record['step']:08d}")
    assert_equal(best, saved)


# ---- data that moved


def test_a_run_goes_on_with_its_data_wherever_they_lie_now_and_refuses_other_data(data, tmp_path):
    moved = copied(data.root, tmp_path / "elsewhere")
    with pytest.raises(Stop):
        train_preset(tiny.preset(), data, tmp_path / "run", on_start=stopping)
    train_preset(tiny.preset(steps=2), data, tmp_path / "run", progress=False)
    train_preset(tiny.preset(steps=2), DataSplit(root=moved, name="train"), tmp_path / "run", resume=True, progress=False)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["root"] == str(moved)
    with pytest.raises(InvalidInput, match=r"the labeled split is not what the run in .* began with \(--data\)"):
        train_preset(tiny.preset(steps=2), replace(data, name="val"), tmp_path / "run", resume=True)


def test_runs_of_an_earlier_version_are_resumed_at_the_same_place(data, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    for name in ("data_fingerprint", "init", "init_digest", "processes", "trained_on"):
        del stored[name]
    del stored["preset"]["train"]["loop"]["optim"]["cycles"]
    (run / "config.json").write_text(json.dumps(stored))
    train_preset(tiny.preset(), data, run, resume=True, progress=False)
    whole = json.loads((run / "config.json").read_text())["data_fingerprint"]
    stored["data_fingerprint"] = whole.partition("+")[0]  # as before it covered the points
    (run / "config.json").write_text(json.dumps(stored))
    train_preset(tiny.preset(), data, run, resume=True, progress=False)
    assert json.loads((run / "config.json").read_text())["data_fingerprint"] == whole
    with pytest.raises(InvalidInput, match="the labeled split is not what the run"):
        train_preset(tiny.preset(steps=2), replace(data, name="val"), run, resume=True, progress=False)


# ---- upcycle


def test_upcycling_takes_the_detector_of_the_source_model_and_goes_on_after_everything_moved(data, finished, store, tmp_path):
    other = tiny.preset(width=32)  # another detector than the source model
    upcycle_preset(other, data, finished, tmp_path / "run", store=store, steps=2, progress=False)
    assert load_detector(tmp_path / "run").config == load_detector(finished).config
    assert (tmp_path / "run" / "ledger.json").exists()
    moved = {
        "data": copied(data.root, tmp_path / "d"),
        "source": copied(finished, tmp_path / "s"),
        "store": copied(store, tmp_path / "t"),
    }
    split = DataSplit(root=moved["data"], name="train")
    outcome = upcycle_preset(
        other, split, moved["source"], tmp_path / "run", store=moved["store"], steps=4, resume=True, progress=False
    )
    assert outcome.steps == 4
    save_run_detector(moved["source"], tiny.preset().detector.build())
    with pytest.raises(InvalidInput):
        upcycle_preset(other, split, moved["source"], tmp_path / "run", store=moved["store"], steps=4, resume=True)


def test_a_store_of_two_codecs_is_used_whole_and_the_rounding_of_the_labeled_half_is_told(data, finished, tmp_path):
    detector, incoming = load_detector(finished), tmp_path / "in"
    for seed, codec in ((0, "fp16"), (1, "int8"), (2, "int8")):
        extractor = Extractor(detector.encoder, RigSpec(), codec)
        with extractor.shard_writer(incoming) as writer:
            extract([tiny.scan_with_car(seed)], extractor, writer)
    ingest(incoming, tmp_path / "store", expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec)
    with pytest.raises(InvalidInput, match=r"several codecs \(fp16 1, int8 2\). All of them are used"):
        upcycle_preset(tiny.preset(), data, finished, tmp_path / "run", store=tmp_path / "store")
    starts: list[JobStart] = []

    def look(start: JobStart) -> None:
        starts.append(start)
        raise Stop

    with pytest.raises(Stop):
        upcycle_preset(tiny.preset(), data, finished, tmp_path / "run", store=tmp_path / "store", codec="fp16", on_start=look)
    (note,) = [note for note in starts[0].notes if "rounding" in note]
    assert "2 of 3 scenes of the store have another one (fp16 1, int8 2); all scenes are used" in note


def test_a_preset_of_another_number_of_classes_does_not_fit_the_source_model(data, finished, tmp_path):
    two = tiny.preset(anchors=(tiny.CAR_ANCHOR, tiny.PEDESTRIAN_ANCHOR))
    with pytest.raises(InvalidInput, match=r"does not fit the classes of .* \(Car\): upcycle\.thresholds needs one entry"):
        upcycle_preset(two, data, finished, tmp_path / "run", method="source_continued")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"detector": None}, "detector must be the path of the source model"),
        ({"out": None}, "out must be the path of the run folder to write"),
        ({"rig": 1.8}, "rig must be a RigSpec"),
    ],
)
def test_wrong_arguments_of_upcycle_are_sentences(data, finished, store, tmp_path, wrong, message):
    arguments = {"detector": finished, "out": tmp_path / "run", "store": store} | wrong
    with pytest.raises(InvalidInput, match=message):
        upcycle_preset(tiny.preset(), data, **arguments)
    assert not (tmp_path / "run").exists()


def test_a_database_that_cannot_be_built_leaves_the_run_folder_free(data, finished, store, tmp_path):
    preset = tiny.preset()
    picky = replace(preset.upcycle, f_gt=replace(preset.upcycle.f_gt, min_points=10_000))
    for _ in range(2):
        with pytest.raises(InvalidInput, match="F-GT needs objects to paste"):
            upcycle_preset(replace(preset, upcycle=picky), data, finished, tmp_path / "run", store=store, progress=False)
    upcycle_preset(preset, data, finished, tmp_path / "run", store=store, steps=1, progress=False)


def _upcycle_on_a_rank(rank: int, port: int, arguments: dict, answers) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        outcome = upcycle_preset(tiny.preset(), progress=False, **arguments)
        state = {
            f"{k}.{n}": t.double().sum().item()
            for k in ("student", "teacher")
            for n, t in getattr(outcome, k).state_dict().items()
        }
        answers.put((rank, outcome.is_main, state))
    except BaseException as error:
        answers.put((rank, False, {"error": repr(error)}))
        raise


def on_two_ranks(**arguments) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=_upcycle_on_a_rank, args=(rank, port, arguments, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted((answers.get(timeout=100) for _ in ranks), key=lambda answer: answer[0])
    for process in ranks:
        process.join(timeout=30)
    return found


def test_two_processes_upcycle_together_to_one_student_and_one_teacher(data, finished, store, tmp_path):
    given = {"data": data, "detector": finished, "store": store}
    first, second = on_two_ranks(out=tmp_path / "run", **given)
    assert first[1:2] == (True,)
    assert second[1:2] == (False,)
    assert first[2] == second[2], "student and teacher are equal in both"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["processes"] == 2
    alone = upcycle_preset(tiny.preset(), out=tmp_path / "alone", progress=False, **given)
    assert not torch.equal(
        alone.student.state_dict()["decoder.anchor_head.conv_cls.bias"],
        weights(tmp_path / "run")["decoder.anchor_head.conv_cls.bias"],
    )
    with pytest.raises(InvalidInput, match="processes: stored 2, now 1"):
        upcycle_preset(tiny.preset(), out=tmp_path / "run", resume=True, **given)


# ---- runs that end badly


def test_a_full_disk_names_the_command_that_resumes_and_the_run_goes_on_from_there(data, finished, tmp_path, monkeypatch):
    real, count = checkpoint._write_and_sync, []

    def full(path, content):
        count.append(path)
        if len(count) > 4:  # in the middle of the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(checkpoint, "_write_and_sync", full)
    with pytest.raises(UpcycleError, match=r"the disk is full .*Make room, then resume with: .+ --resume$"):
        train_preset(tiny.preset(), data, tmp_path / "run", progress=False)
    status = RunFolder.open(tmp_path / "run").status()
    assert (status["state"], "No space left" in status["message"]) == ("failed", True)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"], "its place is needed"
    monkeypatch.undo()
    train_preset(tiny.preset(), data, tmp_path / "run", resume=True, progress=False)
    assert_equal(weights(tmp_path / "run"), weights(finished))


def test_a_disk_that_is_full_at_the_very_end_says_so_too(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "detector.safetensors")

    monkeypatch.setattr(jobs, "save_run_detector", full)
    with pytest.raises(UpcycleError, match=r"the disk is full .*--resume"):
        train_preset(tiny.preset(steps=1), data, tmp_path / "run", progress=False)
    assert RunFolder.open(tmp_path / "run").status()["state"] == "failed"
    monkeypatch.undo()
    train_preset(tiny.preset(steps=1), data, tmp_path / "run", resume=True, progress=False)
    assert load_detector(tmp_path / "run")


def test_data_outside_of_the_range_stop_a_training_before_it_takes_a_folder(tmp_path):
    far = [tiny.frame_with_car(seed) for seed in range(3)]
    far = [replace(f, points=replace(f.points, xyz=f.points.xyz * 1000)) for f in far]
    ids = [f.id for f in far]
    prepare(far, ids, tmp_path / "far", splits={"train": ids}, classes=("Car",), workers=0)
    with pytest.raises(UpcycleError, match=r"no point lies in the detector's range"):
        train_preset(tiny.preset(), f"{tmp_path}/far:train", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_run_folder_holds_what_was_read(finished):
    assert json.loads((finished / "ledger.json").read_text())["boxes"] == {"Car": 4}


def test_a_checkpoint_is_a_detector_for_every_command(finished):
    found = load_detector(finished / "checkpoints" / "step_00000004")
    assert_equal(found.state_dict(), weights(finished))
    assert found.trained_on.to_json() == load_detector(finished).trained_on.to_json()
    assert not found.training
