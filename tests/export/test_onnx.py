"""ONNX graphs of a decoder: in onnxruntime they find what the detector finds; a graph that computes something else is not written."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
import upcycle3d
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.core.rig import RigSpec
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import simulate_frame
from upcycle3d.ops.nms import nms_rotated
from upcycle3d.perception.export import onnx_folder
from upcycle3d.perception.export.agreement import Agreement, require_agreement
from upcycle3d.perception.export.graphs import DecoderGraphs, Graph, Port, decoder_graphs
from upcycle3d.perception.export.onnx_folder import export_onnx
from upcycle3d.perception.models.decoders.bev import height_compression
from upcycle3d.perception.models.decoders.second_iou import SecondIouDecoder
from upcycle3d.perception.models.post_processing import Proposals
from upcycle3d.perception.training.detector_files import load_detector

SCANS = [tiny.scan_with_car(), tiny.scan_with_car(seed=2)]
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs the extra [onnx]"
)


# ---- agreement


@pytest.mark.parametrize(
    ("found", "wanted", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.00019], True),
        ([1.0, 2.0], [1.0, 2.00021], False),
        ([0.0, 0.5], [0.00009, 0.5], True),
        ([0.0, 0.5], [0.00011, 0.5], False),
        ([float("nan")], [1.0], False),
        ([1.0], [float("inf")], False),
        ([float("inf")], [float("inf")], False),
        ([1.0], [1.0, 1.0], False),
        ([], [], True),
    ],
)
def test_two_outputs_agree_within_a_ten_thousandth_of_the_largest_number(found, wanted, agrees):
    assert Agreement.of("x", torch.tensor(found), torch.tensor(wanted)).agrees == agrees


def test_the_error_names_the_worst_output():
    ones = [
        Agreement.of(name, torch.tensor([1.0 + off]), torch.tensor([1.0])) for name, off in (("a", 0.0), ("b", 0.5), ("c", 0.1))
    ]
    with pytest.raises(UpcycleError, match=r"b differs by 0\.5 .* \(2 of 3 outputs"):
        require_agreement(ones, "onnxruntime")
    require_agreement(ones[:1], "onnxruntime")


# ---- graphs in torch


@pytest.mark.parametrize("make", [tiny.second_iou, tiny.pv_rcnn])
@torch.no_grad()
def test_ports_have_the_shapes_of_the_tensors(make):
    detector = make().eval()
    features = detector.encode(SCANS)
    for graph in decoder_graphs(detector.decoder).graphs:
        inputs = graph.feed(features)
        outputs = graph.module(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        sizes: dict[str, int] = {}
        for ports, tensors in ((graph.inputs, inputs), (graph.outputs, outputs)):
            for port, tensor in zip(ports, tensors, strict=True):
                assert len(port.shape) == tensor.ndim, port.name
                assert tensor.dtype == torch.float32, port.name
                for named, size in zip(port.shape, tensor.shape):
                    assert (sizes.setdefault(named, size) if isinstance(named, str) else named) == size, port.name


@torch.no_grad()
def test_the_graphs_of_pv_rcnn_end_in_the_outputs_of_its_decoder():
    detector = tiny.pv_rcnn().eval()
    features = detector.encode(SCANS)
    outputs = detector.decode(features)
    *_, keypoints, regions = decoder_graphs(detector.decoder).graphs
    assert torch.equal(keypoints.module(*keypoints.feed(features))[1], outputs.keypoint_logits)
    quality, codes = regions.module(*regions.feed(features))
    assert torch.equal(quality, outputs.quality_logits[outputs.proposals.valid])
    assert torch.equal(codes, outputs.box_codes[outputs.proposals.valid])


def test_other_decoders_are_refused_with_what_to_export():
    class Other(nn.Module):
        pass

    with pytest.raises(InvalidInput, match=r"Other cannot be exported.*Export the dense detector"):
        decoder_graphs(Other())  # type: ignore[arg-type]


def test_without_the_packages_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install onnx onnxscript onnxruntime \(the extra \[onnx\]\)"):
        export_onnx(tiny.second_iou(), SCANS, tmp_path / "out")


# ---- onnxruntime


class _Shifted(nn.Module):
    shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@needs_onnx
def test_a_graph_that_computes_something_else_is_not_written(monkeypatch, tmp_path):
    module = _Shifted()
    port = Port(name="x", shape=("rows", 3), meaning="numbers")
    graph = Graph(
        name="one",
        module=module,
        inputs=(port,),
        outputs=(dataclasses.replace(port, name="y"),),
        feed=lambda features: (torch.ones(4, 3),),
    )
    monkeypatch.setattr(onnx_folder, "decoder_graphs", lambda decoder: DecoderGraphs(graphs=(graph,), steps=()))
    export_onnx(tiny.second_iou(), SCANS, tmp_path / "good")
    compare = onnx_folder._compare

    def after_a_change(*arguments):
        module.shift = 0.001
        return compare(*arguments)

    monkeypatch.setattr(onnx_folder, "_compare", after_a_change)
    with pytest.raises(UpcycleError, match=r"one: y differs by 0\.001"):
        export_onnx(tiny.second_iou(), SCANS, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(InvalidInput, match="no point in the range"):
        export_onnx(tiny.second_iou(), [*SCANS, tiny.NO_POINTS], tmp_path / "empty")


@needs_onnx
@pytest.mark.slow
@torch.no_grad()
def test_the_graphs_and_two_suppressions_are_the_detector(tmp_path: Path):
    """What `onnx.json` says a program must do, done by hand on a scan that the export has not seen."""
    import onnxruntime

    detector = load_detector(
        Path(upcycle3d.__file__).parent / "examples" / "detector.safetensors"
    )  # a trained one: no two scores are equal
    seen, scan = (
        RigSpec(z_shift=KITTI.sensor.height).from_sensor(simulate_frame(KITTI, seed=0, index=index, view="camera").frame.points)
        for index in (0, 1)
    )
    export_onnx(detector, [seen], tmp_path / "out")
    said = json.loads((tmp_path / "out" / "onnx.json").read_text())
    assert [step["where"] for step in said["steps"]] == [
        "first_stage.onnx",
        "outside",
        "boxes.onnx",
        "outside",
        "second_stage.onnx",
        "outside",
    ]
    run = {
        graph["file"]: onnxruntime.InferenceSession(str(tmp_path / "out" / graph["file"]), providers=["CPUExecutionProvider"])
        for graph in said["graphs"]
    }
    bev = height_compression(detector.encode([scan]).voxels).numpy()
    features, logits, codes, directions, anchors = run["first_stage.onnx"].run(None, {"map": bev})
    decoder = detector.decoder
    assert isinstance(decoder, SecondIouDecoder)
    nms = decoder.config.test_proposals
    best = np.argsort(-logits[0].max(1), kind="stable")[: nms.pre]
    chosen = {"box_codes": codes[0, best], "direction_logits": directions[0, best], "anchors": anchors[best]}
    boxes = torch.from_numpy(run["boxes.onnx"].run(None, chosen)[0])
    top = torch.from_numpy(logits[0].max(1)[best])
    kept = nms_rotated(boxes, top, nms.iou, post_max=nms.post)
    (iou,) = run["second_stage.onnx"].run(None, {"features": features, "regions": boxes[kept][None].numpy()})
    wanted = detector.decode(detector.encode([scan]))
    proposals: Proposals = wanted.proposals
    assert int(proposals.valid.sum()) == len(kept) > 5
    torch.testing.assert_close(boxes[kept], proposals.boxes[0, : len(kept)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(iou[0]), wanted.iou_logits[0, : len(kept)], rtol=1e-4, atol=1e-4)
