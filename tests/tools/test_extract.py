"""`extract` loses no scan and doubles none: after a kill, a stop, a full disk, with receipts that several runs share."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.frame import Frame
from upcycle3d.core.point_files import write_bin
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.core.trained_on import ScanStatistics, TrainedOn
from upcycle3d.datasets.prepare import prepare
from upcycle3d.perception.models.defences.cells import DropConfig
from upcycle3d.perception.models.defended import defended
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.recipes.architectures import coarse_keypoints
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.vehicle.progress import open_progress
from upcycle3d.perception.wire.codec import decode_scene, scene_id_of
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.perception.wire.manifest import read_manifest
from upcycle3d.perception.wire.shards import ShardWriter, read_members
from upcycle3d.tools import extract
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")


def some_scan(seed: int) -> PointCloud:
    """Half of its points lie in `tiny.GRID`."""
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(400, 3, generator=generator) * torch.tensor([25.6, 12.8, 3.0]) - torch.tensor([0.0, 6.4, 0.5])
    return PointCloud(xyz=xyz, features=torch.rand(400, 1, generator=generator))


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder / "encoder.safetensors", tiny.source_model().encoder.eval())
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for i in range(8):
        write_bin(folder / f"{i:04d}.bin", some_scan(i))
    return folder


def run(detector: Path, out: Path, *arguments: object, code: int = 0) -> None:
    words = ["--detector", detector, "--out", out, "--scenes-per-shard", 3, *arguments]
    assert run_command(extract.command, [str(word) for word in words]) == code


def scenes_in(out: Path) -> list[str]:
    """The scenes in all shards of a folder, sorted; a scene in two shards occurs twice."""
    found = []
    for path in out.glob("*.json"):
        manifest = read_manifest(path)
        found += [scene_id_of(blob) for _, blob in read_members(out / manifest.tar_name, manifest)]
    return sorted(found)


def assert_each_scan_is_one_scene(out: Path, receipts: Path, names: set[str]) -> None:
    listed = json.loads(receipts.read_text())
    assert sorted(listed) == scenes_in(out)
    assert sorted(listed.values()) == sorted(names)
    assert not [p.name for p in out.iterdir() if p.name.endswith(".tmp")]


ALL = {f"{i:04d}" for i in range(8)}


def test_a_run_that_resumes_leaves_out_what_is_done_and_takes_new_scans(detector, scans, tmp_path, capsys):
    out, receipts = tmp_path / "out", tmp_path / "r.json"
    half = tmp_path / "half.txt"
    half.write_text("0000\n0003\n0004\n0007\n")
    run(detector, out, "--scans", scans, "--ids", half, "--receipts", receipts, "--resume")
    assert_each_scan_is_one_scene(out, receipts, {"0000", "0003", "0004", "0007"})
    run(detector, out, "--scans", scans, "--receipts", receipts, "--resume", "--json", tmp_path / "j")
    assert_each_scan_is_one_scene(out, receipts, ALL)
    assert json.loads((tmp_path / "j").read_text())["already_extracted"] == 4
    run(detector, out, "--scans", scans, "--receipts", receipts, "--resume")
    told = capsys.readouterr().out.replace("\n", " ")
    assert "8 of 8 scans were in finished shards before" in told
    assert "defences of the uploads: none" in told
    assert_each_scan_is_one_scene(out, receipts, ALL)


def test_other_scans_under_names_that_are_done_are_told_whatever_their_size(detector, scans, tmp_path, capsys):
    """Tomorrow's scans often have today's names, and an organized sensor gives the same number of points."""
    out, own = tmp_path / "out", tmp_path / "own"
    shutil.copytree(scans, own)
    run(detector, out, "--scans", own)
    run(detector, out, "--scans", own, "--resume")
    assert "have other content now" not in capsys.readouterr().err.replace("\n", " ")
    rows = np.fromfile(own / "0002.bin", np.float32).reshape(-1, 4)
    rows[:, 1] *= -1
    rows.tofile(own / "0002.bin")
    run(detector, out, "--scans", own, "--resume")
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 8 scans that are in finished shards by their names have other content now (0002)" in said


def test_other_prepared_frames_under_ids_that_are_done_are_told(detector, tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.01)):
        frames = [some_scan(seed) for seed in range(2)]
        frames[1] = replace(frames[1], xyz=frames[1].xyz + shift)
        listed = [Frame(id=str(i), points=points) for i, points in enumerate(frames)]
        prepare(listed, ["0", "1"], tmp_path / name, splits={"all": ["0", "1"]}, classes=("Car",), workers=0)
    rig = ("--z-shift", "0", "--intensity-scale", "1")
    for name, told in (("a", False), ("a", False), ("b", True)):
        run(detector, tmp_path / "out", "--data", tmp_path / name, "--resume", *rig)
        said = " ".join(capsys.readouterr().err.split())
        assert ("1 of 2 scans that are in finished shards by their names have other content now (1)" in said) == told


def test_scans_that_are_done_are_refused_without_resume_also_after_the_upload_left(detector, scans, tmp_path, capsys):
    out = tmp_path / "out"
    run(detector, out, "--scans", scans / "0000.bin")
    run(detector, out, "--scans", scans / "0001.bin", code=2)
    assert "already holds shards" in capsys.readouterr().err
    run(detector, out, "--scans", scans / "0001.bin", "--append")
    run(detector, out, "--scans", scans / "0001.bin", scans / "0002.bin", "--append", code=2)
    assert "1 of 2 scans are in shards already" in capsys.readouterr().err.replace("\n", " ")
    for path in out.glob("*.*"):
        path.unlink()  # uploaded
    run(detector, out, "--scans", scans / "0000.bin", code=2)
    assert "out.progress.json" in capsys.readouterr().err.replace("\n", "")
    run(detector, out, "--scans", scans / "0000.bin", scans / "0002.bin", "--resume")
    assert len(scenes_in(out)) == 1


def test_shards_without_a_progress_file_cannot_be_resumed(detector, scans, tmp_path, capsys):
    out = tmp_path / "out"
    run(detector, out, "--scans", scans / "0000.bin")
    (tmp_path / "out.progress.json").unlink()
    run(detector, out, "--scans", scans, "--resume", code=2)
    assert "there is no progress file" in capsys.readouterr().err.replace("\n", " ")


def test_two_runs_that_share_receipts_keep_the_lists_of_both(detector, scans, tmp_path):
    receipts = tmp_path / "r.json"
    run(detector, tmp_path / "a", "--scans", scans / "0000.bin", "--receipts", receipts)
    run(detector, tmp_path / "b", "--scans", scans / "0001.bin", "--receipts", receipts)
    assert sorted(json.loads(receipts.read_text())) == sorted(scenes_in(tmp_path / "a") + scenes_in(tmp_path / "b"))


def test_a_second_run_into_the_same_folder_waits_for_nobody_and_is_refused(detector, scans, tmp_path, capsys):
    fingerprint = encoder_fingerprint(tiny.source_model().encoder.eval(), RigSpec())
    with open_progress(tmp_path / "out", encoder_fingerprint=fingerprint):
        run(detector, tmp_path / "out", "--scans", scans, code=2)
    assert "another extract is writing into" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x"}', "\x00", '{"a": 1e999}'])
def test_a_damaged_progress_file_is_a_sentence_and_nothing_is_written(detector, scans, tmp_path, capsys, text):
    (tmp_path / "out.progress.json").write_text(text)
    run(detector, tmp_path / "out", "--scans", scans, code=2)
    assert "out.progress.json" in capsys.readouterr().err.replace("\n", "")
    assert scenes_in(tmp_path / "out") == []


def test_the_progress_of_another_encoder_is_refused(detector, scans, tmp_path, capsys):
    run(detector, tmp_path / "out", "--scans", scans / "0000.bin")
    run(detector, tmp_path / "out", "--scans", scans, "--resume", "--z-shift", 1.5, code=2)
    assert "is of an extraction with encoder" in capsys.readouterr().err.replace("\n", " ")


def test_a_full_disk_is_no_dead_end(detector, scans, tmp_path, capsys, monkeypatch):
    out, receipts = tmp_path / "out", tmp_path / "r.json"
    write = os.write
    for room in (1, 3000, 9000, 12_000, 20_000):
        with monkeypatch.context() as patch:
            left = [room]

            def full(descriptor: int, data: bytes, left=left) -> int:
                left[0] -= len(data)
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(descriptor, data)

            patch.setattr(os, "write", full)
            words = ["--detector", detector, "--out", out, "--scans", scans, "--scenes-per-shard", 3, "--receipts", receipts]
            assert run_command(extract.command, [str(w) for w in [*words, "--resume"]]) in (0, 2)
    run(detector, out, "--scans", scans, "--receipts", receipts, "--resume")
    assert_each_scan_is_one_scene(out, receipts, ALL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_closes_the_open_shard_and_resume_goes_on(detector, scans, tmp_path, capsys, monkeypatch, number, code):
    out, receipts = tmp_path / "out", tmp_path / "r.json"
    add, added = ShardWriter.add, []
    before = signal.signal(
        number, signal.default_int_handler
    )  # shells start background jobs with SIGINT ignored, which extract respects

    def stopped_after_four(self, scene):
        added.append(scene)
        if len(added) == 4:
            os.kill(os.getpid(), number)
        return add(self, scene)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", stopped_after_four)
        with pytest.raises(SystemExit) as stop:
            run(detector, out, "--scans", scans, "--receipts", receipts)
    signal.signal(number, before)
    assert stop.value.code == code
    assert f"stopped by {number.name} after 4 of 8 scans" in capsys.readouterr().err.replace("\n", " ")
    assert_each_scan_is_one_scene(out, receipts, {"0000", "0001", "0002", "0003"})
    run(detector, out, "--scans", scans, "--receipts", receipts, "--resume")
    assert_each_scan_is_one_scene(out, receipts, ALL)


def test_a_process_that_gets_sigterm_ends_with_143_and_a_sentence(detector, tmp_path):
    folder = tmp_path / "many"
    for i in range(300):
        write_bin(folder / f"{i:04d}.bin", some_scan(i))
    words = ["--detector", detector, "--out", tmp_path / "out", "--scans", folder, "--scenes-per-shard", 1]
    program = "import sys; from upcycle3d.tools import extract; from upcycle3d.tools.console import run_command; sys.exit(run_command(extract.command))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "out").glob("*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"stopped by SIGTERM" in err
    assert b"Traceback" not in err


# ---------------------------------------------------------------------------------------------------- wrong rigs, sizes, encoders


def test_an_encoder_without_the_expected_fingerprint_does_not_run(detector, scans, tmp_path, capsys):
    fingerprint = encoder_fingerprint(tiny.source_model().encoder.eval(), RigSpec())
    for expected in ("0" * 64, "12345", "xyz" * 8):
        run(detector, tmp_path / "out", "--scans", scans, "--expect-fingerprint", expected, code=2)
    assert "is expected; nothing was extracted" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    for expected in (fingerprint, fingerprint[:16]):
        run(detector, tmp_path / expected[:20], "--scans", scans / "0000.bin", "--expect-fingerprint", expected)


def test_scans_without_a_point_in_range_end_with_the_likely_cause(detector, tmp_path, capsys):
    for i in range(3):
        points = some_scan(i)
        write_bin(tmp_path / "mm" / f"{i}.bin", PointCloud(xyz=points.xyz * 100 + 5e3, features=points.features))
    run(detector, tmp_path / "out", "--scans", tmp_path / "mm", code=2)
    printed = capsys.readouterr()
    assert "no point lies in the detector's range" in printed.err.replace("\n", " ")
    assert "nothing to upload: no point lies in the detector's range; all 400 lie beyond its sides" in " ".join(
        printed.out.replace("│", " ").split()
    )
    assert scenes_in(tmp_path / "out") == []


CALIBRATION = "P2: 700 0 {0} 0 0 700 {1} 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"


def test_a_wrong_picture_size_uploads_nothing_and_the_right_one_everything(detector, scans, tmp_path, capsys):
    calib = tmp_path / "calib"
    calib.mkdir()
    for name in ALL:  # a large camera: all that it sees lies to the right of a picture of 1242 pixels
        (calib / f"{name}.txt").write_text(CALIBRATION.format(6000, 3000))
    arguments = ("--scans", scans, "--calib", calib)
    run(detector, tmp_path / "a", *arguments, "--image-size", 100, 60, code=2)
    assert "--image-size" in capsys.readouterr().err
    assert scenes_in(tmp_path / "a") == []
    run(detector, tmp_path / "b", *arguments, "--image-size", 12_000, 6000)
    assert len(scenes_in(tmp_path / "b")) == 8


def test_the_rig_of_the_training_is_used_and_another_one_and_other_scans_are_warned_about(scans, tmp_path, capsys):
    encoder = tiny.source_model().encoder.eval()
    statistics = ScanStatistics(scans=9, points=180.0, cells=170.0, ground_height=2.9, intensity=0.5)
    encoder.trained_on = TrainedOn(
        rig=RigSpec(z_shift=0.25), feature_names=("intensity",), classes=("Car",), point_range=tiny.GRID.range, scans=statistics
    )
    save_encoder(tmp_path / "encoder.safetensors", encoder)
    run(tmp_path, tmp_path / "a", "--scans", scans, "--json", tmp_path / "j")
    assert json.loads((tmp_path / "j").read_text())["rig"]["z_shift"] == 0.25
    err = capsys.readouterr().err.replace("\n", " ")
    assert "the training had" not in err
    assert "the road lies at z" in err
    run(tmp_path, tmp_path / "b", "--scans", scans, "--z-shift", 0)
    assert "the training had z_shift 0.25" in capsys.readouterr().err.replace("\n", " ")


def test_cells_over_the_limit_are_refused_unless_allowed(scans, tmp_path, capsys):
    from dataclasses import replace

    config = tiny.second_iou_config()
    config = replace(config, encoder=replace(config.encoder, max_voxels=60))
    save_encoder(tmp_path / "encoder.safetensors", tiny.second_iou(config).encoder.eval())
    run(tmp_path, tmp_path / "out", "--scans", scans, code=2)
    err = capsys.readouterr().err.replace("\n", " ")
    assert "--allow-lost-cells" in err
    assert "of the occupied cells were dropped" in err
    assert scenes_in(tmp_path / "out") == []
    run(tmp_path, tmp_path / "out", "--scans", scans, "--allow-lost-cells", "--json", tmp_path / "j")
    assert json.loads((tmp_path / "j").read_text())["ledger"]["cells_over_limit"] > 100
    assert len(scenes_in(tmp_path / "out")) == 8


def test_full_turns_for_an_encoder_of_the_cameras_view_are_refused_unless_allowed(tmp_path, capsys):
    encoder = tiny.source_model().encoder.eval()
    encoder.trained_on = TrainedOn(
        rig=RigSpec(),
        feature_names=("intensity",),
        classes=("Car",),
        point_range=tiny.GRID.range,
        camera_view=True,
        axes=("x", "y", "z"),
    )
    save_encoder(tmp_path / "encoder.safetensors", encoder)
    ahead = some_scan(0)
    turn = PointCloud(xyz=torch.cat([ahead.xyz, -ahead.xyz]), features=torch.zeros(800, 1))
    write_bin(tmp_path / "turn.bin", turn)
    write_bin(tmp_path / "ahead.bin", ahead)
    out = tmp_path / "out"
    run(tmp_path, out, "--scans", tmp_path / "turn.bin", code=2)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "trained on what a camera ahead sees, and the scan turn reaches behind the sensor; give --calib FOLDER" in said
    assert not out.exists()
    run(tmp_path, out, "--scans", tmp_path / "turn.bin", "--allow-full-turn")
    run(tmp_path, out, "--scans", tmp_path / "ahead.bin", "--append")
    assert len(scenes_in(out)) == 2
    capsys.readouterr()
    run(tmp_path, out, "--scans", tmp_path / "ahead.bin", "--axes", "y", "-x", "z", "--allow-full-turn", code=2)
    assert "the training scans were read with --axes x y z" in capsys.readouterr().err.replace("\n", " ")


def test_scans_read_with_other_axes_than_the_training_that_lie_beside_the_range_are_refused(tmp_path, capsys):
    """An upload cannot be taken back, and no server sees that features are turned."""
    encoder = tiny.source_model().encoder.eval()
    encoder.trained_on = TrainedOn(
        rig=RigSpec(), feature_names=("intensity",), classes=("Car",), point_range=tiny.GRID.range, axes=("y", "-x", "z")
    )
    save_encoder(tmp_path / "encoder.safetensors", encoder)
    ours = some_scan(0)
    x, y, z = (ours.xyz * torch.tensor([0.9, 1, 1])).T
    write_bin(tmp_path / "right.bin", PointCloud(xyz=torch.stack([-y, x, z], 1), features=ours.features))  # x right, y forward
    write_bin(tmp_path / "ahead.bin", PointCloud(xyz=torch.stack([x / 2, y, z], 1), features=ours.features))  # another logger's
    out = tmp_path / "out"
    run(tmp_path, out, "--scans", tmp_path / "right.bin", code=2)
    assert "with --axes x y z where the training had --axes y -x z; give --axes y -x z" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not out.exists()
    run(tmp_path, out, "--scans", tmp_path / "right.bin", "--axes", "y", "-x", "z")
    run(tmp_path, tmp_path / "other", "--scans", tmp_path / "ahead.bin")
    run(tmp_path, tmp_path / "again", "--scans", tmp_path / "right.bin", "--allow-full-turn")


def test_shards_of_two_codecs_in_one_folder_are_told(tmp_path, detector, scans, capsys):
    out = tmp_path / "out"
    run(detector, out, "--scans", scans / "0000.bin", scans / "0001.bin", "--codec", "int8")
    run(detector, out, "--scans", scans / "0002.bin", "--codec", "int8", "--append")
    assert "codec" not in capsys.readouterr().err
    run(detector, out, "--scans", scans / "0003.bin", "--append")
    assert "holds 3 scenes stored as int8, and this run stores fp16 (--codec)" in " ".join(capsys.readouterr().err.split())


def test_a_resumed_extraction_without_a_new_scan_says_so_and_names_no_next_step(tmp_path, detector, scans, capsys):
    run(detector, tmp_path / "out", "--scans", scans)
    assert "next: upcycle3d ingest" in capsys.readouterr().out
    run(detector, tmp_path / "out", "--scans", scans, "--resume")
    said = capsys.readouterr().out
    assert "8 of 8 scans were in finished shards before" in said
    assert "nothing new to extract" in said
    assert "next:" not in said
    assert "times the raw scan" not in " ".join(said.split())


def test_the_fingerprint_of_another_rig_is_recognized(tmp_path, scans, capsys):
    """`inspect` prints the fingerprint of an encoder file without a rig and with that of its training."""
    encoder = tiny.source_model().encoder.eval()
    encoder.trained_on = TrainedOn(
        rig=RigSpec(z_shift=1.7), feature_names=("intensity",), classes=("Car",), point_range=tiny.GRID.range
    )
    save_encoder(tmp_path / "encoder.safetensors", encoder)
    for rig, options, message in (
        (RigSpec(), [], "of this encoder with no rig (z_shift 0, intensity_scale 1)"),
        (RigSpec(z_shift=1.7), ["--z-shift", 0.0], "with the rig of its training (z_shift 1.7"),
        (RigSpec(z_shift=3.0), [], "Get the encoder file from the server again"),
    ):
        wanted = encoder_fingerprint(encoder, rig)
        run(tmp_path, tmp_path / "out", "--scans", scans, "--expect-fingerprint", wanted, *options, code=2)
        assert message in " ".join(capsys.readouterr().err.split())
    run(tmp_path, tmp_path / "out", "--scans", scans, "--expect-fingerprint", encoder_fingerprint(encoder, RigSpec(z_shift=1.65)))


def test_a_scan_with_a_bad_name_is_a_failure_of_that_scan(tmp_path, detector, scans, capsys):
    for i, name in enumerate(["good", "\x1b[31m[bold]", "two\nlines"]):
        write_bin(tmp_path / "scans" / f"{name}.bin", some_scan(i))
    run(detector, tmp_path / "out", "--scans", tmp_path / "scans")
    said = capsys.readouterr()
    assert len(scenes_in(tmp_path / "out")) == 1
    assert "cannot be a file name" in said.out
    assert "\x1b[31m[bold]" not in said.out + said.err


def test_a_full_disk_names_the_option_that_goes_on(tmp_path, detector, scans, capsys, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_stage", full)
    run(detector, tmp_path / "out", "--scans", scans, code=2)
    assert "the same command with --resume" in " ".join(capsys.readouterr().err.split())


def test_files_that_are_no_scans_are_counted_and_an_image_size_without_a_camera_is_refused(tmp_path, detector, capsys):
    folder = tmp_path / "scans"
    write_bin(folder / "0000.bin", some_scan(0))
    for name in ("._0000.bin", "0001.ply", "0002.laz"):
        (folder / name).write_bytes(b"x")
    run(detector, tmp_path / "out", "--scans", folder, "--json", tmp_path / "out.json")
    ledger = json.loads((tmp_path / "out.json").read_text())["ledger"]
    assert ledger["files_skipped"] == {"hidden file": 1, "not a scan": 2}
    assert "files skipped: not a scan" in capsys.readouterr().out
    run(detector, tmp_path / "no", "--scans", folder, "--image-size", 1920, 1080, code=2)
    assert "--image-size" in capsys.readouterr().err


def progress_of(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.progress.json").read_text())


def test_a_sampling_rule_leaves_scans_out_counts_them_and_is_recorded_as_a_rule_only(detector, scans, tmp_path, capsys):
    """The progress file stays on the vehicle and names scans; what is uploaded holds the rule, as often as it has a shard, and no more."""
    out, result = tmp_path / "out", tmp_path / "result.json"
    run(detector, out, "--scans", scans, "--sample-gap", 2, "--json", result)
    kept = [name for name, chosen in sorted(progress_of(out)["sampled"].items()) if chosen]
    places = [int(name) for name in kept]
    assert all(b - a > 2 for a, b in itertools.pairwise(places))
    assert len(scenes_in(out)) == len(kept)
    found = json.loads(result.read_text())
    assert found["ledger"]["scans_left_out"] == 8 - len(kept)
    assert f"{8 - len(kept)} of 8 scans stay on the vehicle" in capsys.readouterr().out
    for path in out.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["sampling"] == {"gap": 2, "share": 1.0}
        assert not any(name in path.read_text() for name in ALL)
        assert read_manifest(path).sampling.gap == 2


def test_a_run_that_goes_on_fills_no_gap_whatever_its_rule(detector, scans, tmp_path):
    out, half = tmp_path / "out", tmp_path / "half.txt"
    half.write_text("\n".join(sorted(ALL)[:5]))
    run(detector, out, "--scans", scans, "--ids", half, "--sample-gap", 1)
    first = progress_of(out)["sampled"]
    run(detector, out, "--scans", scans, "--resume", "--sample-gap", 1)
    second = progress_of(out)["sampled"]
    assert {name: second[name] for name in first} == first
    before = scenes_in(out)
    run(detector, out, "--scans", scans, "--resume")
    assert scenes_in(out) == before


def test_without_a_rule_every_scan_is_uploaded_and_no_file_says_anything_about_sampling(detector, scans, tmp_path):
    out = tmp_path / "out"
    run(detector, out, "--scans", scans)
    assert len(scenes_in(out)) == 8
    assert "sampled" not in progress_of(out)
    assert not any("sampling" in path.read_text() for path in out.glob("*.json"))


def test_an_encoder_that_gathers_from_raw_points_is_warned_of(scans, tmp_path, capsys):
    for name, config in (("published", tiny.pv_rcnn().config), ("coarse", coarse_keypoints(tiny.pv_rcnn().config, 4))):
        save_encoder(tmp_path / f"{name}.safetensors", config.encoder.build().eval())
        run(tmp_path / f"{name}.safetensors", tmp_path / name, "--scans", scans, "--receipts", tmp_path / f"{name}.json")
        assert ("single points" in capsys.readouterr().err) == (name == "published")


def test_no_preset_sends_fine_balls_unless_it_is_called_published():
    sending = {name for name, preset in PRESETS.items() if preset.detector.encoder.build().sends_fine_balls}
    assert sending == {name for name in PRESETS if name.endswith("_published")}
    assert len(sending) == 3


def test_a_defended_extraction_says_which_share_of_the_cells_it_sent(scans, tmp_path, capsys):
    """Oracle: the cells of an extraction without defences, and those that the shards hold."""
    plain = tiny.source_model()
    save_encoder(tmp_path / "plain.safetensors", plain.encoder.eval())
    save_encoder(tmp_path / "half.safetensors", defended(plain, (DropConfig(share=0.5),)).encoder.eval())
    run(tmp_path / "plain.safetensors", tmp_path / "all", "--scans", scans, "--json", tmp_path / "all.json")
    assert "defences sent" not in capsys.readouterr().out
    whole = json.loads((tmp_path / "all.json").read_text())
    run(tmp_path / "half.safetensors", tmp_path / "out", "--scans", scans, "--json", tmp_path / "half.json")
    half = json.loads((tmp_path / "half.json").read_text())
    held = 0
    for path in (tmp_path / "out").glob("*.json"):
        m = read_manifest(path)
        for _, blob in read_members(tmp_path / "out" / m.tar_name, m):
            held += len(decode_scene(blob, expected_spec=m.spec, expected_fingerprint=m.encoder_fingerprint).coords)
    assert whole["cells"] == whole["cells_sent"] == half["cells"] > 0
    assert half["cells_sent"] == held < whole["cells"]
    told = " ".join(capsys.readouterr().out.split())
    assert f"the defences sent {held:,} of {whole['cells']:,} in this run ({held / whole['cells']:.1%})" in told


def test_a_scan_of_which_the_defences_leave_out_every_cell_is_named_as_such(scans, tmp_path, capsys):
    save_encoder(tmp_path / "none.safetensors", defended(tiny.source_model(), (DropConfig(share=1.0),)).encoder.eval())
    run(tmp_path / "none.safetensors", tmp_path / "out", "--scans", scans, "--json", tmp_path / "j", code=2)
    report = json.loads((tmp_path / "j").read_text())
    assert "the defences left out all of its" in report["failures"][0]["reason"]
    assert (report["frames"], report["cells_sent"]) == (0, 0)
