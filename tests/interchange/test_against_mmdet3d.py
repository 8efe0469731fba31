"""mmdetection3d itself, built of its own configurations on the CPU, takes our weights and computes what we compute, stage by stage.

It runs where the extra [mmdet3d] is installed (docs/coming_from.md says how). Its compiled operators are not needed: those that these
models ask for on the way to their boxes come from spconv.
"""

import os
import sys
import types
from pathlib import Path

import pytest
import torch

from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.interchange.config_files import read_python_config
from upcycle3d.perception.interchange.exporting import mmdet3d_checkpoint, write_checkpoint
from upcycle3d.perception.interchange.mmdet3d_config import mmdet3d_classes, read_mmdet3d_config
from upcycle3d.perception.interchange.plain_pickle_writing import write_torch_file
from upcycle3d.perception.models.decoders.bev import height_compression
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.post_processing import decode_boxes
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools import import_weights
from upcycle3d.tools.console import run_command

pytest.importorskip("mmengine", reason="mmdetection3d is not installed (extra [mmdet3d])")
pytest.importorskip("spconv", reason="spconv is not installed (extra [spconv]), which mmdetection3d computes sparse layers with")

SECOND = "second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py"
PV_RCNN = "pv_rcnn/pv_rcnn_8xb2-80e_kitti-3d-3class.py"
THEIR_PLACE = [2, 0, 1]
"""Where our Car, Pedestrian, Cyclist stand among their Pedestrian, Cyclist, Car."""


class _NoOperators(types.ModuleType):
    """In the place of mmcv's compiled operators, which mmcv-lite lacks: importing works, calling does not."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: object, **__: object) -> None:
            raise RuntimeError(f"mmcv-lite has no operator {name}")

        return missing


@pytest.fixture(scope="module")
def models() -> types.SimpleNamespace:
    """Their registry, in the state in which a configuration can be built."""
    try:
        import mmcv._ext  # noqa: F401
    except ModuleNotFoundError:
        sys.modules["mmcv._ext"] = _NoOperators("mmcv._ext")
    mmdet3d = pytest.importorskip("mmdet3d", reason="mmdetection3d is not installed (extra [mmdet3d])")
    from mmdet3d.registry import MODELS
    from mmdet3d.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    torch.set_num_threads(1)  # spconv's CPU code is wrong with more
    root = Path(mmdet3d.__file__).parent / ".mim" / "configs"
    return types.SimpleNamespace(root=root, config=lambda name: Config.fromfile(os.fspath(root / name)), build=MODELS.build)


def ours(models: types.SimpleNamespace, name: str, preset: str) -> Detector:
    """A detector of their configuration, read as data, with weights that make outputs differ."""
    values = read_python_config(models.root / name)
    read = read_mmdet3d_config(values, name, mmdet3d_classes(values, {}), PRESETS[preset].detector)
    torch.manual_seed(0)
    detector = read.detector.build().eval()
    for key, buffer in detector.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return detector


def exported(detector: Detector, path: Path) -> Path:
    write_torch_file(path, mmdet3d_checkpoint(detector, ("Pedestrian", "Cyclist", "Car")).content)
    return path


@pytest.mark.parametrize("name", [SECOND, PV_RCNN, "second/second_hv_secfpn_8xb6-80e_kitti-3d-car.py"])
def test_a_configuration_that_is_read_as_data_is_what_their_own_program_executes(models, name):
    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value

    expected = models.config(name)
    values = read_python_config(models.root / name)
    assert plain(values["model"]) == plain(expected.model.to_dict())
    assert plain(values["class_names"]) == plain(expected.class_names)


@pytest.mark.parametrize(("name", "preset"), [(SECOND, "kitti_second_iou"), (PV_RCNN, "kitti_pv_rcnn_published")])
def test_their_model_takes_our_weights_strictly(models, tmp_path, name, preset):
    from mmengine.runner import load_checkpoint

    detector, model = ours(models, name, preset), models.build(models.config(name).model)
    load_checkpoint(model, os.fspath(exported(detector, tmp_path / "x.pth")), strict=True)
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for n, p in detector.named_parameters() if preset != "kitti_second_iou" or not n.startswith("decoder.roi_head")
    )


@pytest.mark.parametrize("preset", ["small_three_classes", "kitti_second_iou", "small_pv_rcnn", "kitti_pv_rcnn_published"])
def test_the_configuration_that_we_write_builds_their_model_for_our_weights(models, tmp_path, preset):
    from mmengine.config import Config
    from mmengine.runner import load_checkpoint

    detector = PRESETS[preset].detector.build()
    made = mmdet3d_checkpoint(detector, detector.class_names[::-1])
    write_checkpoint(made, tmp_path / "x.pth", tmp_path / "x.py")
    model = models.build(Config.fromfile(tmp_path / "x.py").model)
    load_checkpoint(model, os.fspath(tmp_path / "x.pth"), strict=True)


@torch.no_grad()
def test_second_computes_the_same_boxes_stage_by_stage(models, tmp_path):
    from mmdet3d.structures import limit_period
    from mmengine.runner import load_checkpoint

    detector, model = ours(models, SECOND, "kitti_second_iou"), models.build(models.config(SECOND).model).eval()
    load_checkpoint(model, os.fspath(exported(detector, tmp_path / "x.pth")), strict=True)
    points = torch.rand(8000, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([60.0, 60.0, 3.0, 1.0])
    points += torch.tensor([2.0, -30.0, -2.5, 0.0])
    scan = [PointCloud(xyz=points[:, :3], features=points[:, 3:], feature_names=("intensity",))]
    voxels = detector.encoder.voxelize(scan)
    sparse = height_compression(detector.encoder.features(scan, voxels).voxels)
    theirs = model.middle_encoder(voxels.features, voxels.coords.int(), 1)
    assert sparse.abs().max() > 0.1
    torch.testing.assert_close(sparse, theirs, atol=1e-5, rtol=1e-5)
    bev, theirs_bev = detector.decoder.bev_backbone(sparse), model.neck(model.backbone(theirs))[0]
    torch.testing.assert_close(bev, theirs_bev, atol=1e-5, rtol=1e-5)

    dense = detector.decoder.anchor_head(bev)
    scores, codes, turns = (maps[0].permute(0, 2, 3, 1) for maps in model.bbox_head([theirs_bev]))
    cells = scores.shape[1:3]
    anchors = model.bbox_head.prior_generator.grid_anchors([cells], device="cpu")[0].view(-1, 3, 2, 7)
    by_class = (len(anchors), 3, 2, 3)
    torch.testing.assert_close(
        dense.class_logits.view(by_class), scores.reshape(by_class)[:, THEIR_PLACE][..., THEIR_PLACE], atol=1e-4, rtol=1e-4
    )
    box = model.bbox_head.bbox_coder.decode(anchors.reshape(-1, 7), codes.reshape(-1, 7))
    head, half = model.bbox_head, torch.pi
    folded = limit_period(box[:, 6] - head.dir_offset, head.dir_limit_offset, half)
    box[:, 6] = folded + head.dir_offset + half * turns.reshape(-1, 2).argmax(1)
    box[:, 2] += box[:, 5] / 2  # theirs is the bottom
    expected = box.view(-1, 3, 2, 7)[:, THEIR_PLACE].reshape(-1, 7)
    config = detector.decoder.config
    found = decode_boxes(
        dense.box_codes[0], dense.direction_logits[0], detector.decoder.anchors.view(-1, 7), config.direction_offset
    )
    assert config.direction_offset == pytest.approx(-torch.pi / 2)
    torch.testing.assert_close(found[:, :6], expected[:, :6], atol=1e-3, rtol=1e-4)
    apart = (found[:, 6] - expected[:, 6]).abs()
    assert (apart > 1e-3).float().mean() < 1e-3  # a yaw at the edge of a half turn may be folded either way
    assert ((apart < 1e-3) | ((apart - torch.pi).abs() < 1e-3)).all()


def test_a_checkpoint_of_their_runner_is_imported_with_the_configuration_that_it_holds(models, tmp_path, capsys):
    from mmengine.logging import MessageHub

    detector = ours(models, SECOND, "kitti_second_iou")
    hub = MessageHub("test")
    hub.update_scalar("train/loss", 0.5)
    content = torch.load(exported(detector, tmp_path / "x.pth"), weights_only=True)
    content["meta"] = {"dataset_meta": {"classes": ["Pedestrian", "Cyclist", "Car"]}, "cfg": models.config(SECOND).pretty_text}
    torch.save(content | {"message_hub": hub.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "epoch_40.pth")
    assert (
        run_command(
            import_weights.command, ["mmdet3d", f"{tmp_path}/epoch_40.pth", "kitti_second_iou", "--out", f"{tmp_path}/run"]
        )
        == 0
    )
    found = load_detector(tmp_path / "run").state_dict()
    assert all(torch.equal(v, found[n]) for n, v in detector.state_dict().items() if not n.startswith("decoder.roi_head."))
    assert "each class by itself" in " ".join(capsys.readouterr().out.split())
