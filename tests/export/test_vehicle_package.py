"""The package of the vehicle half: refused without a compiler or where it computes something else; otherwise equal to the encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.perception.export import vehicle_package
from upcycle3d.perception.export.plain_backbone import PlainBackbone
from upcycle3d.perception.export.vehicle_package import export_vehicle_package, require_compiler

SCANS = [tiny.scan_with_car(), tiny.scan_with_car(seed=4, road=700)]


@pytest.fixture
def uncompiled(monkeypatch):
    """The plain backbone in the place of its compiled form, whose outputs a test may change."""
    made: dict[str, PlainBackbone] = {}
    monkeypatch.setattr(vehicle_package, "require_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(
        vehicle_package, "_compile", lambda plain, example, most, path: (made.update(plain=plain), path.write_bytes(b""))
    )

    def install(change=lambda outputs: outputs):
        monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda *inputs: change(made["plain"](*inputs)))

    install()
    return install


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "nvc++")
    with pytest.raises(InvalidInput, match=r"no nvc\+\+ on this machine: install one .* CXX"):
        require_compiler()


@pytest.mark.parametrize("detector", [tiny.second_iou, tiny.pv_rcnn])
def test_the_description_names_every_input_output_and_what_runs_outside(uncompiled, tmp_path, detector):
    encoder = detector().encoder
    written = export_vehicle_package(encoder, SCANS, tmp_path / "out")
    assert all(one.agrees for one in written.agreements)
    said = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert [one["name"] for one in said["inputs"]] == ["features", "coords"]
    assert said["inputs"][0]["shape"] == ["voxels", 3]
    pv_rcnn = detector is tiny.pv_rcnn
    assert len(said["outputs"]) == (10 if pv_rcnn else 2)
    assert any("keypoints" in step for step in said["steps"]) == pv_rcnn
    assert said["compared"]["scans"] == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: (outputs[0], outputs[1] + 0.01),
        lambda outputs: (outputs[0], outputs[1] * float("nan")),
        lambda outputs: (outputs[0].flip(0), outputs[1]),
        lambda outputs: (outputs[0][1:], outputs[1][1:]),
    ],
    ids=["features", "nan", "order", "missing cell"],
)
def test_a_package_that_computes_something_else_is_not_written(uncompiled, tmp_path, change):
    uncompiled(change)
    with pytest.raises(
        UpcycleError, match=r"the compiled package computes something else than the detector: cut: .* nothing was written"
    ):
        export_vehicle_package(tiny.second_iou().encoder, SCANS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_scans_out_of_range_and_full_folders_are_refused(uncompiled, tmp_path):
    encoder = tiny.second_iou().encoder
    with pytest.raises(InvalidInput, match="scan 2 of 2 has 0 voxels in the range"):
        export_vehicle_package(encoder, [SCANS[0], tiny.cloud(torch.full((9, 3), 500.0))], tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InvalidInput, match="not empty"):
        export_vehicle_package(encoder, SCANS, tmp_path / "out")
    with pytest.raises(InvalidInput, match="give at least one"):
        export_vehicle_package(encoder, [], tmp_path / "new")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_the_compiled_package_computes_what_the_encoder_does(tmp_path: Path):
    encoder = tiny.second_iou().encoder
    written = export_vehicle_package(encoder, SCANS, tmp_path / "out")
    run = torch._inductor.aoti_load_package(str(tmp_path / "out" / "encoder.pt2"))
    voxels = encoder.voxelize([tiny.scan_with_car(seed=9, road=40)])
    cells, _ = run(voxels.features, voxels.coords[:, 1:].long())
    assert torch.equal(cells, encoder.sparse_backbone(voxels).sorted().coords[:, 1:].long())  # type: ignore[operator]
    assert {one.output for one in written.agreements} == {"cut: cells", "cut: features"}
