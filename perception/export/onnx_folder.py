"""A folder of ONNX graphs of a decoder, which appears only where onnxruntime computes the same as the detector.

    first_stage.onnx, boxes.onnx, …   the graphs of `graphs.py`
    onnx.json                         inputs and outputs, steps of a detection, and how well the graphs agreed

Read next: `graphs.py`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.config_json import config_to_json
from ...core.errors import InvalidInput
from ...core.new_folder import new_folder
from ...core.strict_json import write_json_file
from ...core.structures import PointCloud
from ..models.detector import Detector
from .agreement import EXPORT_TOLERANCE, Agreement, require_agreement
from .graphs import Graph, decoder_graphs
from .quiet import quiet_exporter

ONNX_DESCRIPTION = "onnx.json"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class OnnxFolder:
    """What was written."""

    folder: Path
    """Where it lies."""
    agreements: tuple[Agreement, ...]
    """How well each graph agreed with the detector, for every output."""


def export_onnx(detector: Detector, scans: Sequence[PointCloud], folder: Path) -> OnnxFolder:
    """Write the decoder of a detector as ONNX graphs, and compare each with the detector on the features of scans.

    Args:
        detector: The detector, on the CPU.
        scans: Scans in the shifted frame. Their features go through every graph.
        folder: Folder to write; it must not exist, or be empty.

    Returns:
        The folder and how well the graphs agreed.

    Raises:
        InvalidInput: The decoder cannot be exported, a package is missing, the folder holds something, or there is no scan.
        UpcycleError: An output of a graph differs from the detector by more than the tolerance; nothing is written.
    """
    require_onnx()
    if not scans:
        raise InvalidInput("an export is compared with the detector on scans; give at least one")
    detector = detector.eval()
    parts = decoder_graphs(detector.decoder)
    with torch.no_grad(), new_folder(folder) as work:
        # A size that may vary must be at least 2 in the example.
        features = detector.encode([scans[0], scans[-1]])
        for graph in parts.graphs:
            _write_graph(work / f"{graph.name}.onnx", graph, graph.feed(features))
        agreements = []
        for scan in scans:
            seen = detector.encode([scan])
            if not len(seen.voxels.coords):
                raise InvalidInput("one of the scans has no point in the range of the detector; give scans of its sensor")
            for graph in parts.graphs:
                agreements += _compare(work / f"{graph.name}.onnx", graph, graph.feed(seen))
        require_agreement(agreements, "onnxruntime")
        write_json_file(work / ONNX_DESCRIPTION, _describe(detector, parts.graphs, parts.steps, agreements, len(scans)))
    return OnnxFolder(folder=folder, agreements=tuple(agreements))


def require_onnx() -> None:
    """Refuse to start without the packages that write and run ONNX graphs.

    Raises:
        InvalidInput: One of them is not installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput(
            f"an ONNX export needs the packages {', '.join(_PACKAGES)}; {', '.join(missing)} not installed: pip install {' '.join(missing)} "
            "(the extra [onnx])"
        )


def _write_graph(path: Path, graph: Graph, example: tuple[Tensor, ...]) -> None:
    sizes = {size for port in graph.inputs for size in port.shape if isinstance(size, str)}
    free = {size: torch.export.Dim(size, min=1) for size in sizes}
    shapes = tuple({i: free[size] for i, size in enumerate(port.shape) if isinstance(size, str)} for port in graph.inputs)
    with quiet_exporter():
        exported = torch.export.export(_Alone(graph.module).eval(), example, dynamic_shapes=(shapes,))
        operators = torch.export.default_decompositions()
        operators[torch.ops.aten.hypot.default] = lambda x, y: (x * x + y * y).sqrt()  # ONNX has no hypot
        program: Any = torch.onnx.export(
            exported.run_decompositions(operators),
            dynamo=True,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
            verbose=False,
        )
        program.save(str(path), external_data=False)


class _Alone(nn.Module):
    """One module whose arguments are one tuple, so that graphs of any number of inputs are exported alike."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def _compare(path: Path, graph: Graph, inputs: tuple[Tensor, ...]) -> list[Agreement]:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {port.name: tensor.numpy() for port, tensor in zip(graph.inputs, inputs, strict=True)})
    wanted = graph.module(*inputs)
    wanted = (wanted,) if isinstance(wanted, Tensor) else tuple(wanted)
    return [
        Agreement.of(f"{graph.name}: {port.name}", torch.from_numpy(array), tensor)
        for port, array, tensor in zip(graph.outputs, found, wanted, strict=True)
    ]


def _describe(
    detector: Detector,
    graphs: Sequence[Graph],
    steps: Sequence[tuple[str, str]],
    agreements: Sequence[Agreement],
    scans: int,
) -> dict[str, Any]:
    trained = detector.trained_on
    return {
        "format": "upcycle3d onnx 1",
        "detector": detector.label,
        "classes": list(detector.class_names),
        "cut": config_to_json(detector.spec),
        "rig": None if trained is None else config_to_json(trained.rig),
        "graphs": [
            {
                "file": f"{graph.name}.onnx",
                "inputs": [asdict(port) | {"type": "float32"} for port in graph.inputs],
                "outputs": [asdict(port) | {"type": "float32"} for port in graph.outputs],
            }
            for graph in graphs
        ],
        "steps": [{"where": where if where == "outside" else f"{where}.onnx", "what": what} for where, what in steps],
        "compared": {
            "with": "the detector in torch, on the CPU",
            "scans": scans,
            "tolerance": EXPORT_TOLERANCE,
            "differences": [asdict(one) for one in agreements],
            "versions": {name: importlib.metadata.version(name) for name in ("torch", *_PACKAGES)},
        },
    }
