"""The settings of a run at the fleet's object sizes: estimated once, kept in the run's folder, and read again where the run is resumed.

Read next: `perception/server/size_estimate.py`, the estimate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.strict_json import read_json
from ...datasets.frame_source import FrameSource
from ..models.detector import Detector
from ..server.joined_stores import FleetScenes
from ..server.methods import Method
from ..server.size_estimate import SizeEstimate, estimate_sizes, shift_of
from ..server.upcycle_config import UpcycleConfig

SIZES_FILE = "object_sizes.json"
"""Name of the file in a run's folder that holds the estimates."""


def settings_at_fleet_sizes(
    folder: Path,
    method: Method,
    settings: UpcycleConfig,
    detector: Detector,
    frames: FrameSource,
    scenes: FleetScenes | None,
    *,
    codec: str,
    seed: int,
    say: Callable[[str], None],
) -> UpcycleConfig:
    """Give labeled and pasted objects the mean sizes of the fleet's objects, where the method asks for it.

    Args:
        folder: Folder of the run. The estimates are written there, and read where they are there already.
        method: `estimates_sizes` decides.
        settings: Settings of the run.
        detector: The source model, whose encoder made the scenes.
        frames: The labeled split.
        scenes: The fleet's scenes.
        codec: Codec of the scenes.
        seed: Seed of the run.
        say: Is told each estimate.

    Returns:
        The settings, with the estimated size shift to the millimeter.

    Raises:
        InvalidInput: There are no scenes, a size shift is given already, or the file is damaged.
    """
    if not method.estimates_sizes:
        return settings
    if scenes is None:
        raise InvalidInput("object sizes are estimated from smashed scenes, and there are none")
    if any(settings.f_gt.size_shift):
        raise InvalidInput(
            f"the method estimates the size shift, and one is given already ({settings.f_gt.size_shift}); take the method upcycling for it"
        )
    path = folder / SIZES_FILE
    if not path.exists():
        found = estimate_sizes(detector, frames, scenes, settings.sizes, codec=codec, seed=seed)
        rounded = [replace(each, shift=_to_millimeters(*each.shift)) for each in found]
        write_atomically(path, (json.dumps({"classes": [config_to_json(each) for each in rounded]}, indent=1) + "\n").encode())
    estimates = read_estimates(path)
    for estimate in estimates:
        say(str(estimate))
    return replace(settings, f_gt=replace(settings.f_gt, size_shift=shift_of(estimates)))


def _to_millimeters(length: float, width: float, height: float) -> tuple[float, float, float]:
    """So that a database of objects fits whatever the last digits are, which differ from machine to machine."""
    return round(length, 3), round(width, 3), round(height, 3)


def read_estimates(path: Path) -> tuple[SizeEstimate, ...]:
    """Read the estimates of a run.

    Args:
        path: The file `object_sizes.json` in the run's folder.

    Returns:
        One estimate per class.

    Raises:
        InvalidInput: The file is missing or damaged.
    """
    remedy = "delete it, and the sizes are estimated again"
    classes = read_json(path, "the estimated object sizes", remedy=remedy, allow_nan=True).get("classes")
    if not isinstance(classes, list):
        raise InvalidInput(f"{path} is damaged or was edited: it has no list of classes; {remedy}")
    try:
        return tuple(config_from_json(SizeEstimate, each) for each in classes)
    except InvalidInput as error:
        raise InvalidInput(f"{path} is damaged or was edited: {error}; {remedy}") from error
