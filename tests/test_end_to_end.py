"""The whole chain by its commands, on a handful of simulated frames: what the README tells a newcomer to type works."""

import importlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upcycle3d.core.point_files import read_points, write_bin
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.wire.codec import decode_scene
from upcycle3d.perception.wire.encoder_file import load_encoder
from upcycle3d.perception.wire.manifest import read_manifest
from upcycle3d.perception.wire.shards import read_members
from upcycle3d.tools import doctor, extract
from upcycle3d.tools.console import run_command

RIG = RigSpec(z_shift=1.73)
SCANS = ("--detector", "{0}/source", "--out", "{0}/refused", "--scans", "{0}/raw/training/velodyne_reduced")


def upcycle3d(command: str, *arguments: object) -> None:
    module = importlib.import_module(f"upcycle3d.tools.{command}")
    code = run_command(module.command, [str(a) for a in arguments], parsed_as=getattr(module, "ARGUMENTS", None))
    assert code == 0, (command, arguments)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    vehicle = ("--z-shift", 1.73)
    raw, data = root / "raw", root / "data"
    upcycle3d(
        "simulate", "--domain", "kitti", "--out", raw, "--frames", 7, "--seed", 3, "--splits", "train", 2, "fleet", 3, "val", 2
    )
    upcycle3d("prepare", "kitti", raw, "--out", data, "--classes", "Car", "--z-shift", 1.73)
    steps = ("--preset.train.loop.optim.total-steps", 3, "--workers", 0)
    upcycle3d("train", "small", "--data", data, "--out", root / "source", *steps)
    scans = raw / "training" / "velodyne_reduced"
    upcycle3d("extract", "--detector", root / "source", "--scans", scans, "--ids", raw / "ImageSets" / "fleet.txt", *vehicle, "--out", root / "shards", "--receipts", root / "receipts.json", "--json", root / "extract.json")  # fmt: skip
    upcycle3d("ingest", root / "shards", "--store", root / "store", "--detector", root / "source", *vehicle)
    steps = ("--preset.upcycle.loop.optim.total-steps", 2, "--preset.upcycle.round-steps", 1, "--workers", 0)
    upcycle3d("upcycle", "small", "--data", data, "--detector", root / "source", "--store", root / "store", "--truth", root / "receipts.json", data, "--out", root / "upcycled", *steps)  # fmt: skip
    return root


def test_extraction_reports_bytes_beside_the_raw_scan(chain):
    report = json.loads((chain / "extract.json").read_text())
    assert report["frames"] == 3
    assert report["failures"] == []
    assert report["bytes_per_frame"] > 0
    assert report["raw_bytes_per_frame"] > 100_000


def extracted(chain: Path, out: Path, *arguments: object, rig: RigSpec = RIG) -> dict[str, SmashedScene]:
    """The scenes that an extraction into ``out`` left there, by scan."""
    receipts = out / "receipts" / "list.json"
    upcycle3d("extract", "--detector", chain / "source", "--out", out, "--receipts", receipts, *arguments)
    fingerprint = encoder_fingerprint(load_encoder(chain / "source" / "encoder.safetensors"), rig)
    scan_of, scenes = json.loads(receipts.read_text()), {}
    for path in out.glob("*.json"):
        manifest = read_manifest(path)
        for _, blob in read_members(out / manifest.tar_name, manifest):
            scene = decode_scene(blob, expected_spec=manifest.spec, expected_fingerprint=fingerprint)
            scenes[scan_of[scene.scene_id]] = scene
    return scenes


def test_prepared_frames_and_full_turns_cropped_to_the_camera_smash_like_the_cameras_scans(chain, tmp_path):
    ids, kitti = chain / "raw" / "ImageSets" / "fleet.txt", chain / "raw" / "training"
    plain = extracted(chain, tmp_path / "a", "--scans", kitti / "velodyne_reduced", "--ids", ids, "--z-shift", 1.73)
    assert set(plain) == set(ids.read_text().split())
    for name in plain:  # the same points, and as many behind the vehicle
        points = read_points(kitti / "velodyne_reduced" / f"{name}.bin")
        behind = replace(points, xyz=points.xyz * torch.tensor([-1.0, 1.0, 1.0]))
        both = replace(points, xyz=torch.cat([points.xyz, behind.xyz]), features=torch.cat([points.features, behind.features]))
        write_bin(tmp_path / "full" / f"{name}.bin", both)
    prepared = extracted(chain, tmp_path / "b", "--data", f"{chain / 'data'}:fleet")
    cropped = extracted(chain, tmp_path / "c", "--scans", tmp_path / "full", "--calib", kitti / "calib", "--z-shift", 1.73)
    assert json.loads((chain / "data" / "dataset.json").read_text())["rig"] == {"z_shift": 1.73, "intensity_scale": 1.0}
    for other in (prepared, cropped):
        assert other.keys() == plain.keys()
        for name, scene in plain.items():
            torch.testing.assert_close(other[name].coords, scene.coords, rtol=0, atol=0)
            torch.testing.assert_close(other[name].features, scene.features, rtol=1e-3, atol=1e-3)


def test_shards_are_added_to_only_when_asked_and_receipts_are_kept(chain, tmp_path, capsys):
    scans = chain / "raw" / "training" / "velodyne_reduced"
    first = extracted(chain, tmp_path, "--scans", scans / "000000.bin", "--z-shift", 1.73)
    again = ["--detector", str(chain / "source"), "--scans", str(scans / "000001.bin"), "--out", str(tmp_path)]
    assert run_command(extract.command, again) == 2
    assert "--append" in capsys.readouterr().err
    both = extracted(chain, tmp_path, "--scans", scans / "000001.bin", "--z-shift", 1.73, "--append")
    assert (set(first), set(both)) == ({"000000"}, {"000000", "000001"})


def test_an_extraction_without_a_scene_fails_after_its_report(chain, tmp_path, capsys):
    (tmp_path / "wide.bin").write_bytes(torch.rand(30).numpy().tobytes())
    arguments = [
        "--detector",
        chain / "source",
        "--scans",
        tmp_path / "wide.bin",
        "--out",
        tmp_path / "x",
        "--json",
        tmp_path / "j",
    ]
    assert run_command(extract.command, [str(a) for a in arguments]) == 2
    printed = capsys.readouterr()
    assert "none of 1 scans" in printed.err
    assert "--columns" in " ".join(printed.out.split())
    assert json.loads((tmp_path / "j").read_text())["frames"] == 0
    upcycle3d("extract", *arguments, "--columns", *"xyz_i")
    assert json.loads((tmp_path / "j").read_text())["frames"] == 1


def test_scans_in_bytes_with_gaps_need_only_options(chain, tmp_path, recwarn):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(100, 5, generator=generator) * torch.tensor([10.0, 10.0, 2.0, 9.0, 255.0]) - torch.tensor(
        [0, 0, 1.73, 0, 0]
    )
    rows[0, 0] = float("nan")
    (tmp_path / "points").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "points" / "scan.bin").write_bytes(rows.numpy().tobytes())
    (tmp_path / "labels" / "scan.txt").write_text("")
    reading = ("--columns", "x", "y", "z", "_", "intensity", "--drop-non-finite")
    options = ("--scans", tmp_path / "points", *reading, "--intensity-scale", 1 / 255, "--z-shift", 1.73)
    rig = RigSpec(z_shift=1.73, intensity_scale=1 / 255)
    flat = [str(word).replace("--rig.", "--") for word in options]
    upcycle3d("predict", "--detector", chain / "source", *flat, "--out", tmp_path / "boxes")
    assert (tmp_path / "boxes" / "scan.json").exists()
    plain = extracted(chain, tmp_path / "a", *options, rig=rig)["scan"]
    shaping = (*reading, "--intensity-scale", 1 / 255, "--z-shift", 1.73, "--workers", 1)
    upcycle3d("prepare", "folder", tmp_path, "--out", tmp_path / "data", *shaping)
    prepared = extracted(chain, tmp_path / "b", "--data", tmp_path / "data", rig=rig)["scan"]
    assert len(plain.coords) > 0
    torch.testing.assert_close(prepared.coords, plain.coords, rtol=0, atol=0)
    torch.testing.assert_close(prepared.features, plain.features, rtol=1e-3, atol=1e-3)
    assert [w for w in recwarn if "intensity" in str(w.message)] == []


def test_the_upcycled_encoder_is_the_fleets(chain):
    before, after = (load_encoder(chain / run / "encoder.safetensors") for run in ("source", "upcycled"))
    assert encoder_fingerprint(before, RigSpec()) == encoder_fingerprint(after, RigSpec())
    decoders = [load_detector(chain / run).decoder.state_dict() for run in ("source", "upcycled")]
    assert any(not torch.equal(a, b) for a, b in zip(decoders[0].values(), decoders[1].values(), strict=True))


def test_pseudo_label_quality_is_logged_each_round(chain):
    lines = [json.loads(line) for line in (chain / "upcycled" / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "pseudo_labels"]
    assert len(rounds) == 2
    assert {"labels_per_scene", "precision_50", "recall_70", "mean_iou"} <= rounds[0].keys()


def numbers(result: dict, name: str = "") -> dict[str, float]:
    """Every number of nested results, by its path. Files hold six decimals, so orientation differs by as much."""
    parts = [numbers(v, f"{name}/{k}") if isinstance(v, dict) else {f"{name}/{k}": v} for k, v in result.items()]
    return {path: value for part in parts for path, value in part.items()}


def test_a_run_and_its_written_detections_score_the_same(chain):
    run, kitti, found = chain / "run.json", chain / "kitti.json", chain / "detections"
    upcycle3d("evaluate", "run", "--detector", chain / "upcycled", "--data", chain / "data", "--detections", found, "--json", run)
    labels, ids = chain / "raw" / "training" / "label_2", chain / "raw" / "ImageSets" / "val.txt"
    upcycle3d("evaluate", "kitti", "--labels", labels, "--detections", found, "--ids", ids, "--classes", "Car", "--json", kitti)
    ran, scored = json.loads(run.read_text()), json.loads(kitti.read_text())
    assert numbers(ran["Car"]) == pytest.approx(numbers(scored["Car"]), abs=1e-6)
    assert ran["types"]["labels"] == scored["types"]["labels"]
    assert ran["ledger"]["boxes"]["Car"] > 0
    assert ran["ledger"]["points"] > 0
    assert json.loads(run.read_text())["Car"]["3d"]["R40"].keys() == {"easy", "moderate", "hard"}


def test_predict_writes_a_file_for_every_scan(chain):
    scans = chain / "raw" / "training" / "velodyne_reduced"
    upcycle3d("predict", "--detector", chain / "upcycled", "--scans", scans, "--out", chain / "boxes")
    upcycle3d("predict", "--detector", chain / "upcycled", "--scans", scans, "--z-shift", 1.73, "--out", chain / "text", "--format", "kitti", "--calib", chain / "raw" / "training" / "calib")  # fmt: skip
    assert len(list((chain / "boxes").glob("*.json"))) == len(list((chain / "text").glob("*.txt"))) == 7


def test_inspect_survives_a_half_written_line_of_metrics(chain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chain / "source", run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    upcycle3d("inspect", run, "--json", tmp_path / "facts.json")
    assert json.loads((tmp_path / "facts.json").read_text())["last step"] <= 3


@pytest.mark.parametrize("what", ["source", "store", "data", "upcycled/detector.safetensors", "upcycled/encoder.safetensors"])
def test_inspect_knows_what_lies_there(chain, what):
    upcycle3d("inspect", chain / what, "--json", chain / "facts.json")
    assert json.loads((chain / "facts.json").read_text())["kind"]


def test_inspect_reads_a_shard_in_the_store(chain):
    (shard,) = (chain / "store" / "shards").glob("*.tar")
    upcycle3d("inspect", shard, "--json", chain / "shard.json")
    assert json.loads((chain / "shard.json").read_text())["scenes"] == 3


def test_speed_of_a_trained_detector_is_measured(chain):
    upcycle3d(
        "bench_extract", "--detector", chain / "source", "--frames", 1, "--threads", 1, "--json", chain / "extract_speed.json"
    )
    found = json.loads((chain / "extract_speed.json").read_text())["extraction"]
    assert set(found) == {f"{chain / 'source'}/{codec}" for codec in ("fp16", "int8")}
    upcycle3d("bench_step", "--detector", chain / "source", "--repeats", 1, "--threads", 1, "--json", chain / "step_speed.json")
    assert json.loads((chain / "step_speed.json").read_text())["steps"][str(chain / "source")]["median_ms"] > 0


def test_view_draws_frames_with_detections(chain):
    upcycle3d("view", "--data", f"{chain / 'data'}:val", "--detector", chain / "upcycled", "--out", chain / "pictures")
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (chain / "pictures").iterdir())


def test_the_rig_of_the_training_is_the_default_and_an_ingest_with_another_one_moves_nothing(chain, tmp_path, capsys):
    shutil.copytree(chain / "store" / "shards", tmp_path / "shards")
    before = sorted(p.name for p in (tmp_path / "shards").iterdir())
    arguments = ["--store", str(tmp_path / "store"), "--detector", str(chain / "source")]
    module = importlib.import_module("upcycle3d.tools.ingest")
    assert run_command(module.command, [str(tmp_path / "shards"), *arguments, "--z-shift", "0"]) == 2
    assert "--intensity-scale as in `extract`" in capsys.readouterr().err.replace("\n", " ")
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == before
    assert run_command(module.command, [str(tmp_path / "shards"), *arguments]) == 0
    assert len(SmashedStore(tmp_path / "store")) > 0


def test_doctor_checks_the_backends(chain):
    upcycle3d("doctor", "--repeats", 0, "--json", chain / "doctor.json")
    checks = json.loads((chain / "doctor.json").read_text())["checks"]
    for name in ("sparse convolution, CPU", "experts, sorted", "experts, grouped"):
        assert "agrees" in checks[name]


def test_doctor_times_imports_in_fresh_interpreters():
    assert 0 <= doctor.import_seconds("import upcycle3d", repeats=1) < 5
    with pytest.raises(subprocess.CalledProcessError):
        doctor.import_seconds("import upcycle3d.nothing", repeats=1)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ("small", "--data", "{0}/nowhere", "--out", "{0}/x"), "prepare"),
        ("train", ("kitti_second_iou", "--data", "{0}/data", "--out", "{0}/x"), "--classes"),
        ("upcycle", ("small", "--data", "{0}/data", "--detector", "{0}/source", "--out", "{0}/x"), "extract"),
        (
            "upcycle",
            ("small_three_classes", "--data", "{0}/data", "--detector", "{0}/source", "--store", "{0}/store", "--out", "{0}/x"),
            "classes",
        ),
        ("predict", ("--detector", "{0}/nowhere", "--scans", "{0}/raw", "--out", "{0}/x"), "no detector"),
        ("ingest", ("{0}/nowhere", "--store", "{0}/store", "--detector", "{0}/source"), "nowhere"),
        ("ingest", ("{0}/store/shards", "--store", "{0}/other", "--detector", "{0}/nowhere"), "encoder"),
        ("evaluate", ("run", "--detector", "{0}/source", "--data", "{0}/data:vla"), "val"),
        ("bench_step", (), "give --preset NAME or --detector RUN"),
        ("bench_extract", (), "give --preset NAME or --detector RUN"),
        ("experiment_report", ("{0}/raw",), "there is no {0}/raw/results.csv"),
        (
            "experiment_upcycling",
            ("small", "--scenario", "waymo_kitti", "--data", "{0}/data", "--out", "{0}/x"),
            "takes two prepared datasets",
        ),
        ("inspect", ("{0}/raw",), "not a shard"),
        (
            "evaluate",
            ("run", "--detector", "{0}/source", "--data", "{0}/extract.json"),
            "{0}/extract.json is a file, not the folder",
        ),
        ("evaluate", ("run", "--detector", "{0}/source", "--data", "{0}/data", "--device", "cuda:99"), "no device 'cuda:99'"),
        (
            "predict",
            ("--detector", "{0}/source", "--scans", "{0}/raw/training/velodyne_reduced", "--out", "{0}/x", "--device", "cuda:99"),
            "no device 'cuda:99'",
        ),
        (
            "predict",
            ("--detector", "{0}/source", "--scans", "{0}/raw/training/velodyne_reduced", "--out", "{0}/extract.json/x"),
            "Not a directory: {0}/extract.json",
        ),
        ("extract", (*SCANS, "--device", "cuda:99"), "no device 'cuda:99'"),
        ("extract", (*SCANS, "--ids", "{0}/missing.txt"), "no split file {0}/missing.txt"),
        (
            "extract",
            (*SCANS, "--ids", "{0}/raw/ImageSets/fleet.txt", "--scans", "{0}/raw/training/velodyne_reduced/000000.bin"),
            "3 of the 3 scans",
        ),
        ("extract", (*SCANS, "--split", "train"), "write --data DIR:SPLIT"),
        (
            "extract",
            (*SCANS, "--scans", "{0}/raw/training/velodyne_reduced", "{0}/raw/training/velodyne_reduced/000000.bin"),
            "both called '000000'",
        ),
        ("extract", (*SCANS, "--data", "{0}/data"), "either --scans"),
        ("extract", (*SCANS[:4], "--data", "{0}/data", "--z-shift", "2"), "was prepared with the rig z_shift 1.73"),
        ("extract", (*SCANS[:4], "--data", "{0}/data", "--drop-non-finite"), "belong to --scans"),
    ],
)
def test_mistakes_become_one_sentence_and_exit_code_2(chain, capsys, command, arguments, message):
    module = importlib.import_module(f"upcycle3d.tools.{command}")
    filled = [a.format(chain) for a in arguments]
    message = message.format(chain)
    assert run_command(module.command, filled, parsed_as=getattr(module, "ARGUMENTS", None)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "arguments", "new"),
    [
        ("upcycle", ("--checkpoint", "runs/x"), "write --detector"),
        ("upcycle", ("--checkpoint=runs/x",), "write --detector"),
        ("upcycle", ("--raw", "data", "fleet", "--seed", "1"), "write --raw DIR:SPLIT"),
        ("experiment_upcycling", ("--variants", "upcycling"), "write --methods"),
        ("train", ("--split", "train"), "write --data DIR:SPLIT"),
    ],
)
def test_an_option_of_an_earlier_version_names_the_new_one(capsys, command, arguments, new):
    module = importlib.import_module(f"upcycle3d.tools.{command}")
    assert run_command(module.command, ["small", *arguments], parsed_as=module.ARGUMENTS) == 2
    assert new in capsys.readouterr().err


def test_a_mistyped_option_names_the_nearest(capsys):
    module = importlib.import_module("upcycle3d.tools.train")
    words = ["small", "--data", "x", "--out", "y", "--preset.train.loop.optim.lrr", "1"]
    assert run_command(module.command, words, parsed_as=module.ARGUMENTS) == 2
    assert "--preset.train.loop.optim.lr" in capsys.readouterr().err


def test_the_same_commands_serve_pv_rcnn(chain, tmp_path):
    """Train, extract, ingest, upcycle, evaluate: keypoints travel with the scene, and raw ones do not leave."""
    raw, data, vehicle = chain / "raw", chain / "data", ("--z-shift", 1.73)
    steps = ("--preset.train.loop.optim.total-steps", 2, "--workers", 0)
    upcycle3d("train", "small_pv_rcnn", "--data", data, "--out", tmp_path / "source", *steps)
    scans = ("--scans", raw / "training" / "velodyne_reduced", "--ids", raw / "ImageSets" / "fleet.txt")
    upcycle3d("extract", "--detector", tmp_path / "source", *scans, *vehicle, "--codec", "int8", "--out", tmp_path / "shards")
    upcycle3d("ingest", tmp_path / "shards", "--store", tmp_path / "store", "--detector", tmp_path / "source", *vehicle)
    steps = ("--preset.upcycle.loop.optim.total-steps", 1, "--workers", 0)
    upcycle3d("upcycle", "small_pv_rcnn", "--data", data, "--detector", tmp_path / "source", "--store", tmp_path / "store", "--out", tmp_path / "upcycled", *steps)  # fmt: skip
    upcycle3d("evaluate", "run", "--detector", tmp_path / "upcycled", "--data", f"{data}:val", "--json", tmp_path / "ap.json")
    assert "Car" in json.loads((tmp_path / "ap.json").read_text())
    scene = SmashedStore(tmp_path / "store")[0]
    assert 0 < len(scene.keypoint_cells) <= 1024

    steps = ("--preset.train.loop.optim.total-steps", 1, "--workers", 0)
    reference = ("--preset.detector.encoder.keypoint-source", "raw_points")
    upcycle3d("train", "small_pv_rcnn", "--data", data, "--out", tmp_path / "reference", *reference, *steps)
    refused = ["--detector", tmp_path / "reference", *scans, *vehicle, "--out", tmp_path / "refused"]
    assert run_command(extract.command, [str(a) for a in refused]) == 2
    assert not list((tmp_path / "refused").glob("*.tar"))
