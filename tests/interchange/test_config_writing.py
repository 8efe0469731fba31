"""Exported weights come with a configuration of the other program that our readers take back to an equal detector."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.trained_on import TrainedOn
from upcycle3d.core.yaml_text import yaml_text
from upcycle3d.perception.interchange.config_files import python_config
from upcycle3d.perception.interchange.exporting import mmdet3d_checkpoint, openpcdet_checkpoint
from upcycle3d.perception.interchange.mmdet3d_config import mmdet3d_classes, read_mmdet3d_config
from upcycle3d.perception.interchange.mmdet3d_config_writing import mmdet3d_settings, python_text
from upcycle3d.perception.interchange.openpcdet_config import read_openpcdet_config
from upcycle3d.perception.interchange.openpcdet_config_writing import openpcdet_settings
from upcycle3d.perception.models.decoders.bev import DenseLossWeights
from upcycle3d.perception.models.detectors import DetectorConfig
from upcycle3d.perception.models.post_processing import FinalNms, ProposalNms
from upcycle3d.perception.models.second_iou import SecondIouDetectorConfig
from upcycle3d.perception.models.targets import RoiSampling
from upcycle3d.perception.recipes.import_weights import import_weights
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.training.detector_files import load_detector, save_detector
from upcycle3d.tools import export_mmdet3d, export_openpcdet
from upcycle3d.tools.console import run_command

ROUND_TRIP = pytest.mark.parametrize(
    "preset",
    [
        "small", "small_pv_rcnn", "small_three_classes", "kitti_small", "kitti_small_pv_rcnn",
        "kitti_second_iou", "kitti_pv_rcnn", "kitti_pv_rcnn_published", "waymo_pv_rcnn_published", "cross_dataset_pv_rcnn",
    ],
)  # fmt: skip


def changed(config: DetectorConfig) -> DetectorConfig:
    """The same detector with other numbers wherever a configuration has one, so that none can come from the base of the reader."""
    d = config.decoder
    anchors = tuple(
        replace(
            a, size=(a.size[0] + 0.1, a.size[1] + 0.2, a.size[2] + 0.3), bottom_z=a.bottom_z - 0.1, matched=0.44, unmatched=0.11
        )
        for a in d.anchors
    )
    target = (
        {"iou_target": (0.2, 0.9), "iou_weight": 1.5}
        if isinstance(config, SecondIouDetectorConfig)
        else {"quality_target": (0.2, 0.9)}
    )
    decoder = replace(
        d,
        anchors=anchors,
        bev=replace(d.bev, layers=(1, 3)),
        dropout=0.125,
        train_proposals=ProposalNms(pre=901, iou=0.81, post=51),
        test_proposals=ProposalNms(pre=102, iou=0.71, post=11),
        roi_sampling=RoiSampling(
            count=12, foreground_share=0.25, foreground_iou=0.6, easy_background_iou=0.15, hard_background_share=0.7
        ),
        final=FinalNms(score=0.07, iou=0.02, pre=410, post=51),
        dense_weights=DenseLossWeights(box=1.25, direction=0.3),
        direction_offset=-math.pi / 2,
        **target,
    )
    return replace(config, decoder=decoder)


def there_and_back(program: str, config: DetectorConfig, base: DetectorConfig, folder: Path) -> DetectorConfig:
    """What our reader makes of the configuration that is written. No decoder is made: those of KITTI's size take seconds."""
    spec = config.encoder.build().spec
    if program == "openpcdet":
        pytest.importorskip("yaml", reason="YAML is read with the extra [yaml]")
        (folder / "x.yaml").write_text(yaml_text(openpcdet_settings(config, spec)))
        return read_openpcdet_config(folder / "x.yaml", base).detector
    values = python_config(python_text(mmdet3d_settings(config, spec, config.class_names[::-1])), "x.py")
    return read_mmdet3d_config(values, "x.py", mmdet3d_classes(values, {}), base).detector


def as_second(config: DetectorConfig, base: DetectorConfig) -> DetectorConfig:
    """What is left of a detector in mmdetection3d: SECOND without its IoU head, PV-RCNN without limits of its final suppression."""
    final = config.decoder.final
    if not isinstance(config, SecondIouDetectorConfig):
        limits = base.decoder.final
        return replace(config, decoder=replace(config.decoder, final=replace(final, pre=limits.pre, post=limits.post)))
    kept = {name: getattr(config.decoder, name) for name in ("anchors", "bev", "dense_weights", "direction_offset", "final")}
    nms = ProposalNms(pre=final.pre, iou=final.iou, post=final.post)
    return replace(config, decoder=replace(base.decoder, **kept, ranked_by="class", test_proposals=nms))


@ROUND_TRIP
def test_openpcdet_configurations_come_back_equal(preset, tmp_path):
    base = PRESETS[preset].detector
    assert there_and_back("openpcdet", base, base, tmp_path) == base
    other = changed(base)
    assert other != base
    assert there_and_back("openpcdet", other, base, tmp_path) == other


@ROUND_TRIP
def test_mmdet3d_configurations_come_back_equal_but_for_what_is_not_there(preset, tmp_path):
    base = PRESETS[preset].detector
    assert there_and_back("mmdet3d", base, base, tmp_path) == as_second(base, base)
    other = changed(base)
    assert there_and_back("mmdet3d", other, base, tmp_path) == as_second(other, base)


@pytest.mark.parametrize("program", ["openpcdet", "mmdet3d"])
def test_second_comes_back_equal(program, tmp_path):
    base = PRESETS["small_three_classes"].detector
    nms = ProposalNms(pre=410, iou=0.02, post=51)
    decoder = replace(base.decoder, ranked_by="class", test_proposals=nms, final=FinalNms(score=0.07, iou=0.02, pre=410, post=51))
    second = replace(base, decoder=decoder)
    assert there_and_back(program, second, base, tmp_path) == second


def test_a_map_that_the_decoder_computes_stays_there_and_keypoints_without_it_are_refused(tmp_path):
    pytest.importorskip("yaml", reason="YAML is read with the extra [yaml]")
    coarse = PRESETS["small_pv_rcnn"].detector
    made = openpcdet_checkpoint(coarse.build())
    (tmp_path / "x.yaml").write_text(made.configuration.replace("[bev, ", "["))
    with pytest.raises(InvalidInput, match="leaves out bev"):
        read_openpcdet_config(tmp_path / "x.yaml", coarse)


def test_mmengine_reads_what_is_written(tmp_path):
    config = pytest.importorskip("mmengine.config", reason="mmengine is not installed (extra [mmdet3d])")
    for preset in ("kitti_second_iou", "small_pv_rcnn"):
        made = mmdet3d_checkpoint(PRESETS[preset].detector.build())
        (tmp_path / f"{preset}.py").write_text(made.configuration)
        theirs = config.Config.fromfile(tmp_path / f"{preset}.py").to_dict()
        assert theirs == python_config(made.configuration, "x.py")


# ---- what is said


def said(program: str, config: DetectorConfig) -> str:
    make = openpcdet_checkpoint if program == "openpcdet" else mmdet3d_checkpoint
    made = make(config.build())
    head = " ".join(line[2:].strip() for line in made.configuration.splitlines() if line.startswith("#"))
    assert all(sentence in head for sentence in made.differences)
    return head


def test_what_no_setting_can_say_stands_in_the_file():
    small, coarse = (PRESETS[name].detector for name in ("small", "small_pv_rcnn"))
    stages = {
        f"conv{k}": coarse.encoder.conv3 for k in range(1, 5)
    }  # as published: every stage, in widths that OpenPCDet's code has
    voxels = replace(coarse.encoder.voxels, channels=(16, 32, 64, 64, 128), point_features=("intensity",))
    published = replace(coarse, encoder=replace(coarse.encoder, voxels=voxels, keypoint_stride=1, **stages))
    assert "the sparse backbone has 8, 16, 32, 32, 64 channels here" in said("openpcdet", small)
    assert "VoxelBackBone8x" not in said("openpcdet", published)
    assert "cells of 4 voxels here" in said("openpcdet", coarse)
    assert "no IoU head" in said("mmdet3d", small)
    assert "gather from conv3 and conv4 alone" in said("mmdet3d", coarse)
    assert "gather from" not in said("mmdet3d", published)
    assert "here 4096 enter and 500 stay" in said("mmdet3d", published)
    assert "points with x, y, z, intensity" in said("mmdet3d", published)
    class_first = replace(small, decoder=replace(small.decoder, ranked_by="class"))
    assert "suppressed twice here, first from 512 to 80 at an overlap of 0.7" in said("openpcdet", class_first)


def test_a_rig_that_neither_program_has_is_said():
    detector = PRESETS["small"].detector.build()
    assert any("nobody knows whether z was shifted" in text for text in openpcdet_checkpoint(detector).differences)
    known = {"feature_names": (), "classes": detector.class_names, "point_range": detector.spec.grid.range}
    detector.trained_on = TrainedOn(rig=RigSpec(), **known)
    assert not any("shifted" in text or "raised" in text for text in openpcdet_checkpoint(detector).differences)
    detector.trained_on = TrainedOn(rig=RigSpec(z_shift=1.73, intensity_scale=0.5), **known)
    assert any("raised by 1.73 m" in text and "by 0.5" in text for text in mmdet3d_checkpoint(detector).differences)


# ---- the commands


@pytest.mark.parametrize(
    ("tool", "program", "suffix"), [(export_openpcdet, "openpcdet", "yaml"), (export_mmdet3d, "mmdet3d", "py")]
)
def test_the_commands_move_a_detector_there_and_back(tool, program, suffix, tmp_path, capsys):
    if suffix == "yaml":
        pytest.importorskip("yaml", reason="YAML is read with the extra [yaml]")
    torch.manual_seed(3)
    config = PRESETS["kitti_small_pv_rcnn"].detector
    config = replace(config, decoder=replace(config.decoder, final=replace(config.decoder.final, iou=0.33)))
    save_detector(tmp_path / "d.safetensors", config.build())
    file = tmp_path / "x.pth"
    command = ["--detector", f"{tmp_path}/d.safetensors", "--out", str(file)]
    assert run_command(tool.command, command) == 0
    assert f"their configuration to {tmp_path}/x.{suffix}" in " ".join(capsys.readouterr().out.split())
    base = PRESETS["kitti_small_pv_rcnn"].detector
    import_weights(program, file, base, tmp_path / "run", config_file=tmp_path / f"x.{suffix}")
    source, found = load_detector(tmp_path / "d.safetensors"), load_detector(tmp_path / "run")
    assert found.config == config
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in source.state_dict().items())
    if program == "mmdet3d":  # its checkpoints hold their configuration
        assert import_weights(program, file, base, tmp_path / "other").detector.config == config


def test_a_configuration_of_somebody_else_is_not_replaced(tmp_path, capsys):
    save_detector(tmp_path / "d.safetensors", PRESETS["small"].detector.build())
    (tmp_path / "x.py").write_text("mine = 1\n")
    command = ["--detector", f"{tmp_path}/d.safetensors", "--out", f"{tmp_path}/x.pth"]
    assert run_command(export_mmdet3d.command, command) == 2
    assert "holds another configuration; move it away" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x.pth").exists()
    assert run_command(export_mmdet3d.command, [*command, "--configuration", f"{tmp_path}/y.py"]) == 0
    assert run_command(export_mmdet3d.command, [*command, "--configuration", f"{tmp_path}/y.py"]) == 0
    assert (tmp_path / "x.py").read_text() == "mine = 1\n"
    assert run_command(export_mmdet3d.command, [*command[:2], "--out", f"{tmp_path}/x.py"]) == 2
