"""A conformance folder: scans, and what an exporter must make of each, for exporters that are not this program.

    conformance.json        the cases, and everything that an exporter must know: cut, encoder fingerprint, codec, rig
    encoder.safetensors     the weights
    scans/CASE.bin          float32 rows of x, y, z, intensity, as the sensor gives them
    expected/CASE.safetensors   cells and features before the codec; absent where a scan gives no scene

Read next: `comparison.py`, which runs an exporter and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.config_json import config_stored_in, config_to_json
from ...core.cut import CutSpec
from ...core.errors import InvalidInput, require
from ...core.files import write_atomically
from ...core.foreign_text import check_name
from ...core.new_folder import new_folder
from ...core.point_files import XYZI, read_scan
from ...core.rig import RigSpec
from ...core.scan_options import ScanOptions
from ...core.smashed_scene import SmashedScene
from ...core.strict_json import read_json, write_json_file
from ...core.tensor_file import TensorFileKind, read_tensors, write_tensors
from ..models.encoders.encoder import Encoder
from ..models.encoders.pv_rcnn import PvRcnnEncoderConfig
from ..models.encoders.scan_survey import point_features
from ..models.encoders.second import SecondEncoderConfig
from ..vehicle.extractor import Extractor
from ..wire.codec import check_codec, encode_scene
from ..wire.encoder_file import ENCODER_FILE, save_encoder
from ..wire.shards import SceneKind
from .cases import EdgeCase, edge_cases

CASES_FILE = "conformance.json"
_FORMAT = "upcycle3d conformance 1"
_EXPECTED = TensorFileKind(
    name="expected scene",
    format="upcycle3d conformance scene 1",
    advice="write the folder again with `upcycle3d conformance write`",
    max_bytes=1 << 30,
)
_MOST_CASES = 10_000


@dataclass(frozen=True, kw_only=True)
class ConformanceCase:
    """One scan and what must come of it."""

    name: str
    """Name of its files."""
    rule: str
    """What an exporter must do, as a sentence."""
    scene: bool
    """Whether the scan gives a scene."""
    may_refuse: bool
    """Whether an exporter may give no scene all the same."""

    def __post_init__(self) -> None:
        check_name(self.name, "name of a case")


@dataclass(frozen=True, kw_only=True)
class ConformanceSpec:
    """What `conformance.json` holds."""

    format: str
    """Name and version of the folder's format."""
    encoder_fingerprint: str
    """What every scene must name as its encoder, 64 hexadecimal digits."""
    codec: str
    """How the features of every scene must be stored."""
    rig: RigSpec
    """What is done to a scan first."""
    cut: CutSpec
    """The cut that every scene must name."""
    columns: tuple[str, ...]
    """Float32 values of each row of a scan."""
    cases: tuple[ConformanceCase, ...]
    """The cases."""

    def __post_init__(self) -> None:
        require(
            self.format == _FORMAT,
            f"this program reads conformance folders of the format {_FORMAT!r}, found {self.format[:80]!r}",
        )
        require(
            1 <= len(self.cases) <= _MOST_CASES, f"a conformance folder has 1 to {_MOST_CASES} cases, found {len(self.cases)}"
        )
        names = [case.name for case in self.cases]
        require(len(set(names)) == len(names), "two cases of a conformance folder have one name")
        check_codec(self.codec)

    @property
    def kind(self) -> SceneKind:
        """What every scene must be."""
        return SceneKind(spec=self.cut, encoder_fingerprint=self.encoder_fingerprint, codec=self.codec)


@dataclass(frozen=True, kw_only=True)
class GoldenFolder:
    """An opened conformance folder."""

    folder: Path
    """Where it lies."""
    spec: ConformanceSpec
    """What it says."""

    @classmethod
    def open(cls, folder: Path) -> GoldenFolder:
        """Open a folder for checks.

        Args:
            folder: The folder.

        Returns:
            The folder, whose description was checked.

        Raises:
            InvalidInput: It is not such a folder.
        """
        advice = "write the folder again with `upcycle3d conformance write`"
        path = folder / CASES_FILE
        data = read_json(path, "the cases of a conformance folder", remedy=advice)
        return cls(folder=folder, spec=config_stored_in(path, ConformanceSpec, data, advice))

    @property
    def encoder(self) -> Path:
        """The encoder file."""
        return self.folder / ENCODER_FILE

    def scan(self, case: ConformanceCase) -> Path:
        """Find the scan of a case.

        Args:
            case: A case of the folder.

        Returns:
            The file.
        """
        return self.folder / "scans" / f"{case.name}.bin"

    def expected(self, case: ConformanceCase) -> SmashedScene:
        """Read what must come of a case, before the codec.

        Args:
            case: A case with a scene.

        Returns:
            The scene.

        Raises:
            InvalidInput: The file is missing, damaged or does not fit the cut.
        """
        path = self.folder / "expected" / f"{case.name}.safetensors"
        coords, features, cells, of_keypoints = read_tensors(path, _EXPECTED).named(
            "coords", "features", "keypoint_cells", "keypoint_features"
        )
        kind = self.spec.kind
        return SmashedScene(
            spec=kind.spec,
            coords=coords,
            features=features,
            keypoint_cells=cells,
            keypoint_features=of_keypoints,
            codec=kind.codec,
            encoder_fingerprint=kind.encoder_fingerprint,
            scene_id="0" * 32,
        )


def write_conformance(encoder: Encoder, rig: RigSpec, codec: str, folder: Path, *, scans: Sequence[Path] = ()) -> GoldenFolder:
    """Write a conformance folder.

    Args:
        encoder: The encoder that exporters shall run.
        rig: What is done to a scan first.
        codec: How scenes shall be stored: `fp16` or `int8`.
        folder: Folder to write; it must not exist, or be empty.
        scans: Further scans, `.bin` files of x, y, z, intensity; they become cases of their own, and the folder holds copies.

    Returns:
        The folder.

    Raises:
        InvalidInput: The encoder has defences or reads other columns, or a scan cannot be read.
        FeatureOverflow: The encoder computes features that no codec can hold.
    """
    if encoder.defended:
        raise InvalidInput(
            "this encoder has defences, which may draw random numbers for every scan, so no two exporters agree on a scene; write the "
            "folder for the detector that the defences were given to"
        )
    unknown = [name for name in point_features(encoder) if name not in XYZI]
    if unknown:
        raise InvalidInput(
            f"the encoder reads the point features {', '.join(unknown)}, and conformance scans have {', '.join(XYZI)} only; use an encoder "
            "without them"
        )
    extractor = Extractor(encoder, rig, codec)
    voxels = encoder.config.voxels if isinstance(encoder.config, PvRcnnEncoderConfig) else encoder.config
    if not isinstance(voxels, SecondEncoderConfig):
        raise InvalidInput(
            f"the rule of voxels of a {type(encoder).__name__} is not known here; SECOND's and PV-RCNN's encoders have cases"
        )
    made = edge_cases(encoder.spec.grid, rig, max_points=voxels.max_points_per_voxel, max_voxels=voxels.max_voxels)
    with new_folder(folder) as work:
        for name in ("scans", "expected"):
            (work / name).mkdir()
        cases = [_write_edge_case(work, case, extractor) for case in made]
        cases += [_write_case(work, f"scan_{path.stem}", "a scan of yours", path.read_bytes(), extractor) for path in scans]
        save_encoder(work / ENCODER_FILE, encoder)
        spec = ConformanceSpec(
            format=_FORMAT,
            encoder_fingerprint=extractor.fingerprint,
            codec=codec,
            rig=rig,
            cut=extractor.spec,
            columns=XYZI,
            cases=tuple(cases),
        )
        write_json_file(work / CASES_FILE, config_to_json(spec))
    return GoldenFolder(folder=folder, spec=spec)


def _write_edge_case(work: Path, case: EdgeCase, extractor: Extractor) -> ConformanceCase:
    return _write_case(work, case.name, case.rule, case.rows.astype("<f4").tobytes(), extractor, may_refuse=case.may_refuse)


def _write_case(
    work: Path, name: str, rule: str, data: bytes, extractor: Extractor, *, may_refuse: bool = False
) -> ConformanceCase:
    """Write the scan, read it as `extract` would, and write what came of it."""
    check_name(name, "name of a case")
    path = work / "scans" / f"{name}.bin"
    write_atomically(path, data)
    scene = None
    if data:
        points, _ = read_scan(path, ScanOptions(columns=XYZI, drop_non_finite=True))
        scene = extractor.smash(points)[0]
        encode_scene(scene)  # what no codec can hold is refused now, and not in every exporter
    gives = scene is not None and len(scene.coords) > 0
    if scene is not None and gives:
        tensors = {
            "coords": scene.coords,
            "features": scene.features,
            "keypoint_cells": scene.keypoint_cells,
            "keypoint_features": scene.keypoint_features.to(torch.float32),
        }
        write_tensors(work / "expected" / f"{name}.safetensors", tensors, kind=_EXPECTED)
    return ConformanceCase(name=name, rule=rule, scene=gives, may_refuse=may_refuse)
