"""The sparse backbone of an encoder as an AOTInductor package: a compiled library that runs in C++ with libtorch alone, or in Python.

    points ─ rig, voxels (outside) ─ encoder.pt2 ─ cells and features at the cut ─ keypoints, defences, codec, shard (outside)

Voxels stay outside, because their rule is exact and short (`ops/voxelize.py` says it in four points); so do the keypoints of PV-RCNN, the
defences and the codec. `encoder.json` beside the package says the same in words, with every input and output. `upcycle3d conformance`
checks a program that joins these parts.

Read next: `plain_backbone.py`, what is compiled.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.config_json import config_to_json
from ...core.device import find_device
from ...core.errors import InvalidInput
from ...core.features import SparseVoxels
from ...core.new_folder import new_folder
from ...core.strict_json import write_json_file
from ...core.structures import PointCloud
from ..models.encoders.encoder import Encoder
from ..models.encoders.pv_rcnn import PvRcnnEncoder
from ..models.encoders.second import SecondEncoder
from .agreement import EXPORT_TOLERANCE, Agreement, require_agreement
from .plain_backbone import PlainBackbone
from .quiet import quiet_exporter

PACKAGE = "encoder.pt2"
PACKAGE_DESCRIPTION = "encoder.json"
_STAGES = ("conv1", "conv2", "conv3", "conv4", "cut")


@dataclass(frozen=True, kw_only=True)
class VehiclePackage:
    """What was written."""

    folder: Path
    """Where it lies."""
    compiler: str
    """The C++ compiler that made it."""
    agreements: tuple[Agreement, ...]
    """How well each output agreed with the encoder."""


def export_vehicle_package(encoder: Encoder, scans: Sequence[PointCloud], folder: Path, *, device: str = "cpu") -> VehiclePackage:
    """Compile the sparse backbone of an encoder, and compare it with the encoder on scans before it is written.

    Args:
        encoder: The encoder. Defences are not compiled: they follow what the package computes.
        scans: Scans in the shifted frame, each with at least one point in the range.
        folder: Folder to write; it must not exist, or be empty.
        device: `cpu` or `cuda`: where the package will run. It runs there only.

    Returns:
        The folder, the compiler, and how well the package agreed.

    Raises:
        InvalidInput: The encoder has no sparse backbone that is known here, there is no C++ compiler, the folder holds something, or a scan has
            no point in the range.
        UpcycleError: The package computes something else than the encoder; nothing is written.

    Example:
        ```python
        export_vehicle_package(load_encoder("runs/source"), [scan], Path("vehicle"))
        cells, features = torch._inductor.aoti_load_package("vehicle/encoder.pt2")(means, coords)
        ```
    """
    compiler = require_compiler()
    where = find_device(device)
    if not scans:
        raise InvalidInput("a package is compared with the encoder on scans; give at least one")
    encoder = encoder.to(where).eval()
    second = _second_of(encoder)
    every_stage = second is not encoder
    plain = PlainBackbone(second.sparse_backbone, second.sparse_shape, every_stage=every_stage)
    seen = [second.voxelize([scan.to(where)]) for scan in scans]
    for number, voxels in enumerate(seen, start=1):
        if len(voxels.coords) < 2:
            raise InvalidInput(
                f"scan {number} of {len(seen)} has {len(voxels.coords)} voxels in the range of the encoder; give scans of its sensor"
            )
    with torch.no_grad(), new_folder(folder) as work:
        _compile(plain, _inputs(seen[0]), second.config.max_voxels, work / PACKAGE)
        run: Any = torch._inductor.aoti_load_package(str(work / PACKAGE))
        agreements = [one for voxels in seen for one in _compare(run, second, voxels, every_stage)]
        require_agreement(agreements, "the compiled package")
        write_json_file(work / PACKAGE_DESCRIPTION, _describe(encoder, second, every_stage, where, agreements, len(seen)))
    return VehiclePackage(folder=folder, compiler=compiler, agreements=tuple(agreements))


def require_compiler() -> str:
    """Find the C++ compiler that AOTInductor calls.

    Returns:
        Its path.

    Raises:
        InvalidInput: There is none.
    """
    wanted = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(wanted)
    if found is None:
        raise InvalidInput(
            f"AOTInductor needs a C++ compiler, and there is no {wanted} on this machine: install one (apt-get install g++), or name yours in the "
            "environment variable CXX"
        )
    return found


def _second_of(encoder: Encoder) -> SecondEncoder:
    """The encoder with the sparse backbone inside an encoder of any kind."""
    inner = getattr(encoder, "encoder", encoder)  # within its defences
    inner = inner.second if isinstance(inner, PvRcnnEncoder) else inner
    if not isinstance(inner, SecondEncoder):
        raise InvalidInput(
            f"a {type(encoder).__name__} has no sparse backbone that can be compiled; SECOND's and PV-RCNN's encoders have one"
        )
    return inner


def _inputs(voxels: SparseVoxels) -> tuple[Tensor, Tensor]:
    return voxels.features, voxels.coords[:, 1:].long()


def _compile(plain: nn.Module, example: tuple[Tensor, Tensor], max_voxels: int, path: Path) -> None:
    count = torch.export.Dim("voxels", min=1, max=max(max_voxels, len(example[0])))
    with quiet_exporter():
        exported = torch.export.export(plain, example, dynamic_shapes=({0: count}, {0: count}))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))


def _compare(run: Any, second: SecondEncoder, voxels: SparseVoxels, every_stage: bool) -> list[Agreement]:
    found = run(*_inputs(voxels))
    stages = second.sparse_backbone.stages(voxels)
    agreements = []
    for name, stage, cells, features in zip(
        _STAGES if every_stage else _STAGES[-1:], stages if every_stage else stages[-1:], found[::2], found[1::2], strict=True
    ):
        wanted = stage.sorted()
        agreements.append(Agreement.of(f"{name}: cells", cells, wanted.coords[:, 1:].long()))
        agreements.append(Agreement.of(f"{name}: features", features, wanted.features))
    return agreements


def _describe(
    encoder: Encoder, second: SecondEncoder, every_stage: bool, device: torch.device, agreements: Sequence[Agreement], scans: int
) -> dict[str, Any]:
    columns = ("x", "y", "z", *second.config.point_features)
    trained = encoder.trained_on
    inputs = [
        {
            "name": "features",
            "type": "float32",
            "shape": ["voxels", len(columns)],
            "meaning": f"mean of {', '.join(columns)} over the points of each voxel (meters in the shifted frame; intensity in 0..1)",
        },
        {
            "name": "coords",
            "type": "int64",
            "shape": ["voxels", 3],
            "meaning": "cell z, y, x of each voxel; unique, in any order",
        },
    ]
    outputs = []
    for name in _STAGES if every_stage else _STAGES[-1:]:
        outputs.append({"name": f"{name} cells", "type": "int64", "shape": [f"{name} cells", 3], "meaning": "z, y, x, ascending"})
        outputs.append(
            {"name": f"{name} features", "type": "float32", "shape": [f"{name} cells", "channels"], "meaning": "after the ReLU"}
        )
    outside = [
        "rig: add z_shift to z, multiply the intensity by intensity_scale",
        f"voxels: the rule at the top of ops/voxelize.py, with at most {second.config.max_points_per_voxel} points in a voxel and "
        f"{second.config.max_voxels} voxels in a scan",
        f"{PACKAGE}: the sparse backbone; it needs at least one voxel",
    ]
    if every_stage:
        outside.append(
            "keypoints: farthest point sampling, and set abstraction from the outputs of the stages (perception/models/encoders/pv_rcnn.py)"
        )
    if encoder.defended:
        outside.append("defences of the encoder (perception/models/encoders/defended.py)")
    outside.append("codec and shard (docs/data_format.md)")
    return {
        "format": "upcycle3d aoti 1",
        "encoder": type(encoder).__name__,
        "device": str(device),
        "grid": config_to_json(second.config.grid),
        "cut": config_to_json(encoder.spec),
        "rig": None if trained is None else config_to_json(trained.rig),
        "inputs": inputs,
        "outputs": outputs,
        "steps": outside,
        "compared": {
            "with": "the encoder in torch and numba",
            "scans": scans,
            "tolerance": EXPORT_TOLERANCE,
            "differences": [asdict(one) for one in agreements],
            "versions": {"torch": torch.__version__},
        },
    }
