"""The whole chain by its commands, on a handful of simulated frames: what the README tells a newcomer to type works."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from upcycle3d.perception.models.encoders.fingerprint import RigSpec, encoder_fingerprint
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.vehicle.encoder_file import load_encoder
from upcycle3d.tools.console import run_command


def upcycle3d(command: str, *arguments: object) -> None:
    module = importlib.import_module(f"upcycle3d.tools.{command}")
    code = run_command(module.command, [str(a) for a in arguments], parsed_as=getattr(module, "ARGUMENTS", None))
    assert code == 0, (command, arguments)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    rig = ("--rig.z-shift", 1.73)
    raw, data = root / "raw", root / "data"
    upcycle3d(
        "simulate", "--domain", "kitti", "--out", raw, "--frames", 7, "--seed", 3, "--splits", "train", 2, "fleet", 3, "val", 2
    )
    upcycle3d("prepare", "kitti", raw, "--out", data, "--classes", "Car", "--z-shift", 1.73)
    steps = ("--preset.train.loop.optim.total-steps", 3, "--workers", 0)
    upcycle3d("train", "small", "--data", data, "--out", root / "source", *steps)
    scans = raw / "training" / "velodyne_reduced"
    upcycle3d("extract", "--encoder", root / "source", "--scans", scans, "--ids", raw / "ImageSets" / "fleet.txt", *rig, "--out", root / "shards", "--receipts", root / "receipts.json", "--json", root / "extract.json")  # fmt: skip
    upcycle3d("ingest", root / "shards", "--store", root / "store", "--encoder", root / "source", *rig)
    steps = ("--preset.upcycle.loop.optim.total-steps", 2, "--preset.upcycle.round-steps", 1, "--workers", 0)
    upcycle3d("upcycle", "small", "--data", data, "--checkpoint", root / "source", "--store", root / "store", "--truth", root / "receipts.json", data, "--out", root / "upcycled", *steps)  # fmt: skip
    return root


def test_extraction_reports_bytes_beside_the_raw_scan(chain):
    report = json.loads((chain / "extract.json").read_text())
    assert report["frames"] == 3
    assert report["failures"] == []
    assert report["bytes_per_frame"] > 0
    assert report["raw_bytes_per_frame"] > 100_000


def test_the_upcycled_encoder_is_the_fleets(chain):
    before, after = (load_encoder(chain / run / "encoder.safetensors") for run in ("source", "upcycled"))
    assert encoder_fingerprint(before, RigSpec()) == encoder_fingerprint(after, RigSpec())
    decoders = [load_detector(chain / run)[0].decoder.state_dict() for run in ("source", "upcycled")]
    assert any(not torch.equal(a, b) for a, b in zip(decoders[0].values(), decoders[1].values(), strict=True))


def test_pseudo_label_quality_is_logged_each_round(chain):
    lines = [json.loads(line) for line in (chain / "upcycled" / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "pseudo_labels"]
    assert len(rounds) == 2
    assert {"labels_per_scene", "precision_50", "recall_70", "mean_iou"} <= rounds[0].keys()


def test_a_run_and_its_written_detections_score_the_same(chain):
    run, kitti, found = chain / "run.json", chain / "kitti.json", chain / "detections"
    upcycle3d("evaluate", "run", "--detector", chain / "upcycled", "--data", chain / "data", "--detections", found, "--json", run)
    labels, ids = chain / "raw" / "training" / "label_2", chain / "raw" / "ImageSets" / "val.txt"
    upcycle3d("evaluate", "kitti", "--labels", labels, "--detections", found, "--ids", ids, "--classes", "Car", "--json", kitti)
    assert json.loads(run.read_text()) == json.loads(kitti.read_text())
    assert json.loads(run.read_text())["Car"]["3d"]["R40"].keys() == {"easy", "moderate", "hard"}


def test_predict_writes_a_file_for_every_scan(chain):
    scans = chain / "raw" / "training" / "velodyne_reduced"
    upcycle3d("predict", "--detector", chain / "upcycled", "--scans", scans, "--rig.z-shift", 1.73, "--out", chain / "boxes")
    upcycle3d("predict", "--detector", chain / "upcycled", "--scans", scans, "--rig.z-shift", 1.73, "--out", chain / "text", "--format", "kitti", "--calib", chain / "raw" / "training" / "calib")  # fmt: skip
    assert len(list((chain / "boxes").glob("*.json"))) == len(list((chain / "text").glob("*.txt"))) == 7


@pytest.mark.parametrize("what", ["source", "store", "data", "upcycled/detector.safetensors", "upcycled/encoder.safetensors"])
def test_inspect_knows_what_lies_there(chain, what):
    upcycle3d("inspect", chain / what, "--json", chain / "facts.json")
    assert json.loads((chain / "facts.json").read_text())["kind"]


def test_inspect_reads_a_shard_in_the_store(chain):
    (shard,) = (chain / "store" / "shards").glob("*.tar")
    upcycle3d("inspect", shard, "--json", chain / "shard.json")
    assert json.loads((chain / "shard.json").read_text())["scenes"] == 3


def test_view_draws_frames_with_detections(chain):
    upcycle3d("view", "--data", chain / "data", "--split", "val", "--detector", chain / "upcycled", "--out", chain / "pictures")
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (chain / "pictures").iterdir())


def test_doctor_checks_the_sparse_convolution(chain):
    upcycle3d("doctor", "--json", chain / "doctor.json")
    assert "agrees" in json.loads((chain / "doctor.json").read_text())["checks"]["sparse convolution, CPU"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ("small", "--data", "{0}/nowhere", "--out", "{0}/x"), "prepare"),
        ("train", ("kitti_second_iou", "--data", "{0}/data", "--out", "{0}/x"), "--classes"),
        ("upcycle", ("small", "--data", "{0}/data", "--checkpoint", "{0}/source", "--out", "{0}/x"), "extract"),
        ("upcycle", ("kitti_small", "--data", "{0}/data", "--checkpoint", "{0}/source", "--out", "{0}/x"), "preset"),
        ("predict", ("--detector", "{0}/nowhere", "--scans", "{0}/raw", "--out", "{0}/x"), "no detector"),
        ("ingest", ("{0}/nowhere", "--store", "{0}/store", "--encoder", "{0}/source"), "nowhere"),
        ("ingest", ("{0}/store/shards", "--store", "{0}/other", "--encoder", "{0}/nowhere"), "encoder"),
        ("evaluate", ("run", "--detector", "{0}/source", "--data", "{0}/data", "--split", "vla"), "val"),
        ("inspect", ("{0}/raw",), "no shard"),
    ],
)
def test_mistakes_become_one_sentence_and_exit_code_2(chain, capsys, command, arguments, message):
    module = importlib.import_module(f"upcycle3d.tools.{command}")
    filled = [a.format(chain) for a in arguments]
    assert run_command(module.command, filled, parsed_as=getattr(module, "ARGUMENTS", None)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error


def test_a_mistyped_option_names_the_nearest(capsys):
    module = importlib.import_module("upcycle3d.tools.train")
    with pytest.raises(SystemExit):
        run_command(
            module.command,
            ["small", "--data", "x", "--out", "y", "--preset.train.loop.optim.lrr", "1"],
            parsed_as=module.ARGUMENTS,
        )
    assert "--preset.train.loop.optim.lr" in capsys.readouterr().err
