"""What an exporter made of a case, against what it must make: cells exactly, features within the error of the codec and of float32 sums.

The output comes from a foreign program, so it is read by the ordinary readers of shards, which limit every size before they take memory.

Read next: `foreign_run.py`, which runs the program.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import UpcycleError
from ...core.foreign_text import shown
from ...core.smashed_scene import SmashedScene
from ..wire.codec import decode_scene
from ..wire.manifest import read_manifest
from ..wire.shards import SceneKind, read_members
from .golden import ConformanceCase, GoldenFolder

ARITHMETIC = 1e-4
"""Share of the largest feature of a case by which features may differ besides the codec: float32 sums in another order."""
_MOST_FILES = 1000


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """How one case went."""

    case: ConformanceCase
    """The case."""
    problems: tuple[str, ...]
    """What is wrong, one sentence each; empty where nothing is."""
    largest_difference: float = 0.0
    """Largest difference of a feature at a cell that both have."""
    of_allowed: float = 0.0
    """The largest difference as a share of what is allowed there; above 1 is a problem."""
    note: str = ""
    """What else a reader should know."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def compare_output(golden: GoldenFolder, case: ConformanceCase, output: Path, *, arithmetic: float = ARITHMETIC) -> CaseResult:
    """Compare the shards that an exporter wrote for one scan with what is expected.

    Args:
        golden: The conformance folder.
        case: The case.
        output: The folder that the exporter wrote into.
        arithmetic: Difference that is allowed besides the codec's, as a share of the largest feature of the case.

    Returns:
        How it went. Nothing in the output can make this function raise.
    """
    try:
        scenes = _read_scenes(output, golden.spec.kind)
    except (UpcycleError, OSError) as error:
        return CaseResult(case=case, problems=(f"the output cannot be accepted: {shown(str(error), most=500)}",))
    if not scenes:
        if not case.scene:
            return CaseResult(case=case, problems=())
        if case.may_refuse:
            return CaseResult(case=case, problems=(), note="refused, as it may be")
        return CaseResult(case=case, problems=("there is no scene in the output, and one is expected",))
    if not case.scene:
        return CaseResult(case=case, problems=(f"there is a scene of {len(scenes[0].coords)} cells, and none is expected",))
    if len(scenes) > 1:
        return CaseResult(case=case, problems=(f"there are {len(scenes)} scenes of one scan",))
    return _compare_scenes(case, scenes[0], golden.expected(case), arithmetic)


def _read_scenes(output: Path, kind: SceneKind) -> list[SmashedScene]:
    """All scenes of all shards; raises where anything about them is wrong."""
    names = sorted(path.name for path in output.iterdir() if not path.name.startswith(".")) if output.is_dir() else []
    if len(names) > _MOST_FILES:
        raise UpcycleError(f"the folder holds {len(names)} files for one scan")
    manifests = [name for name in names if name.endswith(".json")]
    tars = [name for name in names if name.endswith(".tar")]
    if {name.removesuffix(".json") for name in manifests} != {name.removesuffix(".tar") for name in tars}:
        raise UpcycleError(f"every shard is a .tar and a .json of one name; found {shown(', '.join(names), most=300)}")
    scenes = []
    for name in manifests:
        manifest = read_manifest(output / name)
        found = SceneKind(spec=manifest.spec, encoder_fingerprint=manifest.encoder_fingerprint, codec=manifest.codec)
        if found != kind:
            raise UpcycleError(f"the header of the shard {name} differs: {found.differences(kind)}")
        for _, blob in read_members(output / manifest.tar_name, manifest):
            scene = decode_scene(blob, expected_spec=kind.spec, expected_fingerprint=kind.encoder_fingerprint)
            if scene.codec != kind.codec:
                raise UpcycleError(f"a scene is stored as {scene.codec}, and its shard says {kind.codec}")
            scenes.append(scene)
    return scenes


def _compare_scenes(case: ConformanceCase, found: SmashedScene, wanted: SmashedScene, arithmetic: float) -> CaseResult:
    problems = _different_cells("cells at the cut", found.coords, wanted.coords)
    rows = [_common_rows(found.coords, wanted.coords)]
    features = [(found.features, wanted.features)]
    if wanted.spec.keypoints is not None:
        other = _different_cells("keypoints", found.keypoint_cells, wanted.keypoint_cells)
        if not other and not torch.equal(found.keypoint_cells, wanted.keypoint_cells):
            other = ["the keypoints are the expected ones in another order, which the decoder's balls depend on"]
        problems += other
        rows.append(_common_rows(found.keypoint_cells, wanted.keypoint_cells))
        features.append((found.keypoint_features, wanted.keypoint_features))
    largest, share = 0.0, 0.0
    for (ours, theirs), (has, needs) in zip(rows, features, strict=True):
        if len(ours):
            difference = (has[ours].double() - needs[theirs].double()).abs()
            largest = max(largest, float(difference.max()))
            share = max(share, float((difference / _allowed(needs, wanted.codec, arithmetic)[theirs]).max()))
    if share > 1:
        problems.append(f"features differ by up to {largest:.3g}, {share:.3g} times what the codec and float32 sums allow")
    return CaseResult(case=case, problems=tuple(problems), largest_difference=largest, of_allowed=share)


def _allowed(features: Tensor, codec: str, arithmetic: float) -> Tensor:
    """(M, C) float64 largest difference of each feature: the error of the codec (`wire/codec.py`) and that of sums in another order."""
    wide = features.double()
    sums = arithmetic * float(wide.abs().max())
    if codec == "int8":
        return ((wide.amax(0) - wide.amin(0)) / 510 + sums + 1e-12).expand_as(wide)
    return wide.abs() * 2.0**-11 + 2.0**-25 + sums


def _keys(cells: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in cells.tolist()]


def _different_cells(what: str, found: Tensor, wanted: Tensor) -> list[str]:
    has, needs = set(_keys(found)), set(_keys(wanted))
    problems = []
    for word, cells in (("missing", needs - has), ("extra", has - needs)):
        if cells:
            problems.append(f"{len(cells)} of {len(needs)} {what} {word}, such as (z, y, x) {min(cells)}")
    return problems


def _common_rows(found: Tensor, wanted: Tensor) -> tuple[list[int], list[int]]:
    """Rows of both that hold the same cell."""
    place = {key: row for row, key in enumerate(_keys(found))}
    pairs = [(place[key], row) for row, key in enumerate(_keys(wanted)) if key in place]
    return [a for a, _ in pairs], [b for _, b in pairs]
