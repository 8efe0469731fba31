"""`upcycle3d select`: name the stored scenes whose raw frames are worth a label. Read next: `perception/server/scene_choice.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..core.device import find_device
from ..core.errors import InvalidInput
from ..core.scan_options import ScanOptions
from ..core.strict_json import read_json
from ..perception.recipes.assembly import fleet_store
from ..perception.server.scene_choice import ChoiceRule, SceneChoice, SceneChoiceConfig, choose_scenes
from ..perception.server.scene_views import view_scenes
from ..perception.server.store import SmashedStore
from ..perception.training.detector_files import load_detector
from .console import console, print_table, print_warning, progress_bar, run_command, write_json

_LISTED = 40


@dataclass(frozen=True, kw_only=True)
class Select:
    """Choose stored scenes to ask labels for. No raw point is needed; the vehicles find the frames by the receipts of `extract`."""

    store: Path
    """Store of the fleet's smashed scenes."""
    detector: Path
    """Run folder of the teacher: the detector that doubts. The fleet must run its encoder."""
    number: int = 20
    """Scenes to choose."""
    rule: ChoiceRule = "informative"
    """What counts: `informative` (unlike the chosen ones, in doubt, with rare classes), `doubt` alone, `diverse` alone, or `random`."""
    duplicate: float = SceneChoiceConfig.duplicate
    """Scenes nearer to a chosen one than this share of the median distance of two scenes are left out (`informative` and `diverse`)."""
    receipts: Path | None = None
    """File of `extract --receipts`, where it is at hand: the frames of the chosen scenes are named too."""
    z_shift: float | None = None
    """The fleet's z shift, where `extract` got another one than the detector's training data."""
    intensity_scale: float | None = None
    """The fleet's intensity scale, where `extract` got another one than the detector's training data."""
    seed: int = 0
    """Decides `random`."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the choice to this file as JSON."""


def command(config: Select) -> None:
    """Choose stored scenes to ask labels for: upcycle3d select --store STORE --detector RUN --number 20."""
    wanted = SceneChoiceConfig(number=config.number, rule=config.rule, duplicate=config.duplicate, seed=config.seed)
    frames = _frames(config.receipts)
    detector = load_detector(config.detector).to(find_device(config.device))
    options = ScanOptions(z_shift=config.z_shift, intensity_scale=config.intensity_scale)
    store = fleet_store(config.store, detector, options.rig(None if detector.trained_on is None else detector.trained_on.rig))
    if not len(store):
        raise InvalidInput(f"the store {config.store} holds no scene; run `upcycle3d extract` and `upcycle3d ingest` first")
    with progress_bar("scenes", len(store)) as on_progress:
        views = view_scenes(store, detector, on_progress=on_progress)
    choice = choose_scenes(views, wanted)
    ids = [store[scene.position].scene_id for scene in choice.chosen]
    _report(choice, wanted, ids, frames, detector.class_names)
    write_json(config.json, _json(choice, wanted, ids, frames, detector.class_names, store))


def _frames(path: Path | None) -> dict[str, str]:
    """Frame of each scene, as `extract --receipts` wrote them; none without a file."""
    if path is None:
        return {}
    found = read_json(path, "the receipts of an extraction", remedy="give the file that `extract --receipts` wrote")
    if not all(isinstance(frame, str) for frame in found.values()):
        raise InvalidInput(f"{path} does not name a frame for each scene; give the file that `extract --receipts` wrote")
    return found


def _report(
    choice: SceneChoice, wanted: SceneChoiceConfig, ids: list[str], frames: dict[str, str], classes: tuple[str, ...]
) -> None:
    rows = [
        (scene_id, frames.get(scene_id, "-"), f"{scene.distance:.2f}", f"{scene.doubt:.1f}", *(f"{n:.1f}" for n in scene.objects))
        for scene_id, scene in zip(ids, choice.chosen, strict=True)
    ]
    title = f"{len(rows)} of {choice.scenes} scenes, most useful first"
    print_table(title, ("scene", "frame", "distance", "doubt, bits", *classes), rows[:_LISTED])
    if len(rows) > _LISTED:
        console.print(f"… and {len(rows) - _LISTED} more; --json writes all of them")
    console.print(f"left out: {choice.duplicates} nearly the same as a chosen one, {choice.unusable} without any cell")
    if len(rows) < wanted.number:
        print_warning(
            f"{wanted.number} scenes were asked for and only {len(rows)} are usable and different; lower --duplicate for more"
        )
    missing = sum(scene_id not in frames for scene_id in ids) if frames else 0
    if missing:
        print_warning(
            f"the receipts name no frame for {missing} of {len(ids)} chosen scenes; they came from other vehicles or extractions"
        )


def _json(
    choice: SceneChoice,
    wanted: SceneChoiceConfig,
    ids: list[str],
    frames: dict[str, str],
    classes: tuple[str, ...],
    store: SmashedStore,
) -> dict[str, object]:
    scenes = [
        {
            "scene": scene_id,
            "frame": frames.get(scene_id),
            "distance": None if position == 0 else scene.distance,
            "doubt": scene.doubt,
            "objects": dict(zip(classes, scene.objects, strict=True)),
        }
        for position, (scene_id, scene) in enumerate(zip(ids, choice.chosen, strict=True))
    ]
    return {
        "rule": wanted.rule,
        "store_digest": store.digest(),
        "encoder_fingerprint": store.fingerprint,
        "scenes": scenes,
        "of": choice.scenes,
        "duplicates": choice.duplicates,
        "unusable": choice.unusable,
    }


if __name__ == "__main__":
    sys.exit(run_command(command))
