"""Conformance: our exporter passes, an exporter with one wrong rule fails in the case that is made for it, and nothing foreign is trusted."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.point_files import XYZI, read_scan
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.conformance.comparison import CaseResult, compare_output
from upcycle3d.perception.conformance.foreign_run import run_conformance
from upcycle3d.perception.conformance.golden import ConformanceCase, GoldenFolder, write_conformance
from upcycle3d.perception.models.defences.region import RegionConfig
from upcycle3d.perception.models.defended import defended
from upcycle3d.perception.models.encoders.encoder import Encoder
from upcycle3d.perception.vehicle.extractor import Extractor
from upcycle3d.perception.wire.encoder_file import load_encoder
from upcycle3d.perception.wire.shards import ShardWriter
from upcycle3d.tools import conformance_check, extract
from upcycle3d.tools.console import run_command

RIG = RigSpec(z_shift=1.7, intensity_scale=0.5)


def encoder(kind: str = "second") -> Encoder:
    """A tiny encoder with features of the size of 1, intensity and a voxel limit of 5000."""
    if kind == "second":
        config = tiny.second_iou_config()
        made = tiny.second_iou(
            replace(config, encoder=replace(config.encoder, point_features=("intensity",), max_voxels=5000))
        ).encoder
    else:
        pv = tiny.pv_rcnn_config()
        voxels = replace(pv.encoder.voxels, point_features=("intensity",), max_voxels=5000)
        made = tiny.pv_rcnn(replace(pv, encoder=replace(pv.encoder, voxels=voxels))).encoder
    for module in made.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.constant_(module.running_var, 0.04)
            nn.init.uniform_(module.bias, -0.1, 0.5, generator=torch.Generator().manual_seed(1))
    return made.eval()


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> GoldenFolder:
    return write_conformance(encoder(), RIG, "fp16", tmp_path_factory.mktemp("golden") / "folder")


def case_of(golden: GoldenFolder, name: str) -> ConformanceCase:
    return next(case for case in golden.spec.cases if case.name == name)


def write_scenes(golden: GoldenFolder, folder: Path, *scenes: SmashedScene) -> Path:
    kind = golden.spec.kind
    with ShardWriter(folder, spec=scenes[0].spec, fingerprint=scenes[0].encoder_fingerprint, codec=scenes[0].codec) as writer:
        for number, scene in enumerate(scenes):
            writer.add(replace(scene, scene_id=f"{number:032x}"))
    assert kind.spec is not None
    return folder


# ---- exporters


@pytest.mark.parametrize(("kind", "codec"), [("second", "fp16"), ("pv_rcnn", "int8")])
def test_our_own_extract_passes_every_case(tmp_path, kind, codec):
    """The command itself, in this process; scans without a scene are its errors."""
    golden = write_conformance(encoder(kind), RIG, codec, tmp_path / "golden")
    assert {case.name for case in golden.spec.cases if not case.scene} == {"no_points", "all_outside"}
    for case in golden.spec.cases:
        out = tmp_path / case.name
        words = ["--detector", golden.encoder, "--scans", golden.scan(case), "--out", out, "--codec", codec, "--drop-non-finite"]
        words += ["--z-shift", "1.7", "--intensity-scale", "0.5"]
        code = run_command(extract.command, [str(word) for word in words], program="extract")
        assert (code == 0) == case.scene, case.name
        result = compare_output(golden, case, out)
        assert result.problems == (), case.name
        assert result.note == ""
        assert result.largest_difference > 0 or case.name != "street"  # the codec rounds


@pytest.mark.slow
def test_our_own_extract_passes_as_a_foreign_command(golden, capsys, tmp_path):
    words = [sys.executable, "-m", "upcycle3d", "extract", "--detector", "{encoder}", "--scans", "{scan}", "--out", "{out}"]
    words += ["--z-shift", "1.7", "--intensity-scale", "0.5"]
    words = [str(golden.folder), "--json", str(tmp_path / "result.json"), "--", *words]
    assert run_command(conformance_check.command, words, program="check") == 0
    assert "all 10 cases are equal" in capsys.readouterr().out
    cases = json.loads((tmp_path / "result.json").read_text())["cases"]
    assert all(case["passed"] for case in cases)
    assert [case["note"] for case in cases if case["case"]["name"] == "not_finite"] == ["refused, as it may be"]


Rows = np.ndarray


def _half_a_voxel_lower(rows: Rows) -> Rows:
    lower = rows.copy()
    lower[:, :2] = np.nextafter(lower[:, :2], np.float32(-np.inf))
    return lower


def _end_inside(rows: Rows) -> Rows:
    inside = rows.copy()
    inside[:, 0] = np.where(inside[:, 0] == np.float32(tiny.GRID.range[3]), np.float32(tiny.GRID.range[3]) - 0.01, inside[:, 0])
    return inside


@pytest.mark.parametrize(
    ("wrong", "fails"),
    [
        (lambda rows: rows, set()),
        (lambda rows: rows[::-1], {"full_voxels"}),
        (_half_a_voxel_lower, {"borders"}),
        (_end_inside, {"range_ends"}),
        (lambda rows: rows[:5000] if len(rows) == 5250 else rows, {"crowded"}),
        (lambda rows: np.where((rows[:, :3] == 0).all(1, keepdims=True), np.float32([[5, 0, 0, 0]]), rows), {"missing_returns"}),
    ],
    ids=[
        "right",
        "last points of a voxel",
        "border to the lower cell",
        "end of the range inside",
        "first voxels stay",
        "returns at 0",
    ],
)
@pytest.mark.filterwarnings("ignore:the array of points")
def test_a_wrong_rule_fails_in_its_case(golden, tmp_path, wrong: Callable[[Rows], Rows], fails):
    made = load_encoder(golden.encoder)
    extractor = Extractor(made, RIG, "fp16")
    found = set()
    for case in golden.spec.cases:
        if case.name in ("no_points", "not_finite"):
            continue
        rows = np.fromfile(golden.scan(case), "<f4").reshape(-1, 4)
        changed = np.ascontiguousarray(wrong(rows))
        changed = changed[~(changed[:, :3] == 0).all(1)]
        scene, _ = extractor.smash(PointCloud.from_array(changed))
        folder = tmp_path / case.name
        if len(scene.coords):
            write_scenes(golden, folder, scene)
        if not compare_output(golden, case, folder).passed:
            found.add(case.name)
    assert fails <= found
    assert fails or not found


# ---- comparing


@pytest.fixture
def street(golden) -> SmashedScene:
    return golden.expected(case_of(golden, "street"))


def compare(golden: GoldenFolder, folder: Path, *scenes: SmashedScene, name: str = "street") -> CaseResult:
    return compare_output(golden, case_of(golden, name), write_scenes(golden, folder, *scenes))


def test_cells_and_features_that_differ_are_counted(golden, tmp_path, street):
    assert compare(golden, tmp_path / "same", street).passed
    cut = replace(street, coords=street.coords[2:], features=street.features[2:])
    (problem,) = compare(golden, tmp_path / "missing", cut).problems
    assert problem.startswith(
        f"2 of {len(street.coords)} cells at the cut missing, such as (z, y, x) ({int(street.coords[0, 0])},"
    )
    (problem,) = compare(golden, tmp_path / "extra", street, name="range_ends").problems[1:2]
    assert "cells at the cut extra" in problem
    features = street.features.clone()
    features[5, 3] += 0.02 * float(features.abs().max())
    result = compare(golden, tmp_path / "features", replace(street, features=features))
    assert len(result.problems) == 1
    assert result.of_allowed > 1
    assert result.largest_difference == pytest.approx(0.02 * float(street.features.abs().max()), rel=0.1)
    looser = compare_output(golden, case_of(golden, "street"), tmp_path / "features", arithmetic=0.03)
    assert looser.passed


def test_int8_may_be_wrong_by_half_a_step_and_no_more(tmp_path):
    golden = write_conformance(encoder(), RIG, "int8", tmp_path / "golden")
    street = golden.expected(case_of(golden, "street"))
    spread = street.features.amax(0) - street.features.amin(0)
    assert compare(golden, tmp_path / "same", street).of_allowed <= 1
    middle = int(spread.argmax())
    row = int((street.features[:, middle] - spread[middle] / 2).abs().argmin())
    for steps, passes in ((0.4, True), (2.0, False)):
        features = street.features.clone()
        features[row, middle] += steps * spread[middle] / 255
        result = compare(golden, tmp_path / f"off{steps}", replace(street, features=features))
        assert result.passed == (passes and result.of_allowed <= 1)
        assert passes or not result.passed


def test_headers_that_differ_are_named(golden, tmp_path, street):
    for number, (scene, words) in enumerate(
        (
            (replace(street, encoder_fingerprint="ab" * 32), "encoder fingerprint abababab"),
            (replace(street, codec="int8"), "codec int8, expected fp16"),
            (replace(street, spec=replace(street.spec, layer="elsewhere")), "layer of the cut elsewhere"),
        )
    ):
        (problem,) = compare(golden, tmp_path / str(number), scene).problems
        assert "the header of the shard" in problem
        assert words in problem


def test_output_that_is_not_what_it_says_is_a_problem_and_never_an_error(golden, tmp_path, street):
    case = case_of(golden, "street")

    def problem(folder: Path) -> str:
        (only,) = compare_output(golden, case, folder).problems
        return only

    assert "no scene in the output" in problem(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"x")
    assert "no scene in the output" in problem(tmp_path / "file")
    assert "2 scenes of one scan" in compare(golden, tmp_path / "twice", street, street).problems[0]
    folder = write_scenes(golden, tmp_path / "cut", street)
    (tar,) = folder.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:-700])
    assert "cut off" in problem(folder)
    tar.unlink()
    assert "every shard is a .tar and a .json" in problem(folder)
    tar.symlink_to("/etc/passwd")
    assert "link" in problem(folder)
    (manifest,) = folder.glob("*.json")
    manifest.write_bytes(b"[" * 100_000)
    assert "cannot be accepted" in problem(folder)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1001):
        (many / str(number)).touch()
    assert "1001 files" in problem(many)


def test_a_scene_where_none_is_expected_and_none_where_it_may_be_refused(golden, tmp_path, street):
    assert "none is expected" in compare(golden, tmp_path / "one", street, name="all_outside").problems[0]
    refused = compare_output(golden, case_of(golden, "not_finite"), tmp_path / "none")
    assert refused.passed
    assert refused.note == "refused, as it may be"


def test_keypoints_in_another_order_are_a_problem(tmp_path):
    golden = write_conformance(encoder("pv_rcnn"), RIG, "fp16", tmp_path / "golden")
    street = golden.expected(case_of(golden, "street"))
    assert len(street.keypoint_cells) > 2
    assert compare(golden, tmp_path / "same", street).passed
    turned = replace(street, keypoint_cells=street.keypoint_cells.flip(0), keypoint_features=street.keypoint_features.flip(0))
    (problem,) = compare(golden, tmp_path / "turned", turned).problems
    assert "in another order" in problem
    fewer = replace(street, keypoint_cells=street.keypoint_cells[1:], keypoint_features=street.keypoint_features[1:])
    assert "keypoints missing" in compare(golden, tmp_path / "fewer", fewer).problems[0]


# ---- running


def only(golden: GoldenFolder, name: str) -> GoldenFolder:
    """The folder with one of its cases."""
    return dataclasses.replace(golden, spec=replace(golden.spec, cases=(case_of(golden, name),)))


def run_shell(golden: GoldenFolder, script: str, *, name: str = "street", timeout: float = 30.0) -> CaseResult:
    (result,) = run_conformance(only(golden, name), ["/bin/sh", "-c", script, "exporter", "{scan}", "{out}"], timeout=timeout)
    return result


def test_a_command_that_fails_prints_or_hangs_is_reported(golden, tmp_path):
    failed = run_shell(golden, "echo first; echo '\033[31mno such sensor' >&2; exit 3")
    assert failed.problems[0].startswith("the command ended with exit code 3; its last words: first / ")
    assert "\033" not in failed.problems[0]
    assert "exit code 3" in run_shell(golden, "yes | head -c 9000000; exit 3").problems[0]
    assert "signal 9" in run_shell(golden, "kill -9 $$").problems[0]
    assert run_shell(golden, "exit 2", name="all_outside").passed  # as our own, which ends with an error
    assert run_shell(golden, "exit 2", name="not_finite").passed
    began = time.monotonic()
    late = run_shell(golden, f"sleep 300 & echo $! > {tmp_path}/child; wait", timeout=0.5)
    assert "did not end within 0.5 s and was killed" in late.problems[0]
    assert time.monotonic() - began < 20
    child = int((tmp_path / "child").read_text())
    state = subprocess.run(["ps", "-o", "state=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
    assert state in ("", "Z")  # what it started is gone too


def test_commands_that_cannot_be_run_are_refused(golden):
    with pytest.raises(InvalidInput, match=r"must name \{out\}"):
        next(run_conformance(golden, ["true", "{scan}"]))
    with pytest.raises(InvalidInput, match=r"no_such_program cannot be started"):
        next(run_conformance(golden, ["no_such_program", "{scan}", "{out}"]))
    with pytest.raises(InvalidInput, match="positive number of seconds"):
        next(run_conformance(golden, ["true", "{scan}", "{out}"], timeout=float("nan")))


def test_the_command_ends_with_an_error_where_a_case_differs(golden, tmp_path, capsys):
    words = [str(golden.folder), "--json", str(tmp_path / "r.json"), "--", "/bin/true", "{scan}", "{out}"]
    assert run_command(conformance_check.command, words, program="check") == 2
    said = capsys.readouterr()
    assert "7 of 10 cases differ: street, one_point" in said.err
    assert len(json.loads((tmp_path / "r.json").read_text())["cases"]) == 10


# ---- the folder


def test_scans_are_what_our_reader_reads(golden):
    for case in golden.spec.cases:
        if case.name != "no_points":
            points, ledger = read_scan(golden.scan(case), ScanOptions(columns=XYZI, drop_non_finite=True))
            assert len(points) > 0
            assert (ledger.points_non_finite > 0) == (case.name == "not_finite")
            assert (ledger.points_zero > 0) == (case.name == "missing_returns")


def test_own_scans_become_cases(tmp_path):
    street = np.random.default_rng(0).uniform((1, -5, -1.6, 0), (12, 5, 0, 2), (300, 4)).astype("<f4")
    street.tofile(tmp_path / "mine.bin")
    golden = write_conformance(encoder(), RIG, "fp16", tmp_path / "golden", scans=[tmp_path / "mine.bin"])
    mine = case_of(golden, "scan_mine")
    assert mine.scene
    assert golden.scan(mine).read_bytes() == (tmp_path / "mine.bin").read_bytes()
    assert case_of(GoldenFolder.open(tmp_path / "golden"), "scan_mine") == mine


def test_encoders_without_exact_numbers_are_refused(tmp_path):
    detector = defended(tiny.second_iou(), (RegionConfig(),))
    with pytest.raises(InvalidInput, match="defences"):
        write_conformance(detector.encoder, RIG, "fp16", tmp_path / "golden")
    config = tiny.second_iou_config()
    elongation = tiny.second_iou(replace(config, encoder=replace(config.encoder, point_features=("elongation",)))).encoder
    with pytest.raises(InvalidInput, match="point features elongation"):
        write_conformance(elongation, RIG, "fp16", tmp_path / "golden")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="upcycle3d conformance 9"), "of the format"),
        (lambda d: d.update(colour=3), "unknown option `colour`"),
        (lambda d: d["cases"][0].update(name="../../etc"), "name of a case"),
        (lambda d: d["cases"].append(d["cases"][0]), "one name"),
        (lambda d: d.update(cases=[]), "1 to 10000 cases"),
        (lambda d: d.update(codec="zip"), "unknown codec"),
    ],
)
def test_a_damaged_folder_is_a_sentence(golden, tmp_path, change, words):
    data = json.loads((golden.folder / "conformance.json").read_text())
    change(data)
    (tmp_path / "conformance.json").write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match=words):
        GoldenFolder.open(tmp_path)
    with pytest.raises(InvalidInput):
        GoldenFolder.open(tmp_path / "missing")
