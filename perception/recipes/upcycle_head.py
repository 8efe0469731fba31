"""Makes a run folder with an upcycled detector of the run folders of specialists: `upcycle3d moe detector`.

Read next: `perception/moe/detectors/upcycle.py`, which makes the detector, and `calibrate.py` there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...core.config_json import config_to_json
from ...core.errors import InvalidInput, require, require_counts
from ...core.features import CutFeatures
from ...core.files import write_atomically
from ..models.decoders.mixture import HeadMixtureConfig
from ..models.detector import Detector
from ..moe.detectors.calibrate import describe_scenes, fit_gate, fit_gate_to_groups, gate_use, recalibrate_head, upcycled_decoder
from ..moe.detectors.upcycle import UpcycledHead, upcycle_head
from ..moe.upcycling.upcyclers import Rest
from ..server.store import SmashedStore, collate_scenes
from ..training.detector_files import DETECTOR_FILE, load_detector, save_run_detector
from .assembly import fleet_store
from .fleet_stores import Rigs, check_rigs, check_stores, rig_of_training
from .gate_start import StoreStart, check_scenes, gate_notes
from .job_inputs import check_path

HEAD_FILE = "head.json"
"""What `moe detector` writes beside the detector: the structure, what it costs, rigs of the specialists, and what became of the tensors."""
RIGS = "rigs of the specialists"
"""Key in it: the rig of each specialist's training data, by expert."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadRun:
    """A run folder with an upcycled detector, and what was found when it was made."""

    made: UpcycledHead
    """The detector and what it costs."""
    starts: tuple[StoreStart, ...]
    """Where the fresh gate sends the scenes of each store; empty without stores, or where nothing is decided per scene."""
    notes: tuple[str, ...]
    """Sentences that a reader should see."""


def make_upcycled_head(
    specialists: Sequence[str | Path],
    out: str | Path,
    head: HeadMixtureConfig,
    *,
    rest: Rest = "average",
    seed_detector: str | Path | None = None,
    stores: Sequence[str | Path] = (),
    rig: Rigs | None = None,
    group_scenes: bool = False,
    recalibrate: bool = False,
    most_scenes: int = 50,
    draw: int = 0,
) -> HeadRun:
    """Make an upcycled detector of specialists, fit what depends on data to smashed scenes, and write it as a run folder.

    Args:
        specialists: Run folder or file of one detector per expert. A single one gives every expert: sparse upcycling.
        out: Folder to write; it must not hold a detector.
        head: Structure of the head.
        rest: Where the other tensors come from: `average` or `seed`.
        seed_detector: The detector that the specialists started from.
        stores: Stores of smashed scenes: one per expert, whose scenes the gate begins by sending to that expert; or one of all domains.
        rig: Rig of the fleets, as given to `extract` and `ingest`: one for all stores, or one per store in their order. None takes that of
            the training data.
        group_scenes: With one store: the gate begins with groups of scenes that look alike, one for each expert.
        recalibrate: Whether the batch norms of the decoder are measured again on the scenes of the stores.
        most_scenes: Scenes that are read of each store at most.
        draw: Number that routers and the choice of scenes depend on.

    Returns:
        The detector, what it costs, and where its gate begins.

    Raises:
        InvalidInput: Specialists, stores and head do not fit together; the message says why.
    """
    out = check_path(out, "out", "the run folder to write")
    if (out / DETECTOR_FILE).exists():
        raise InvalidInput(f"{out} holds a {DETECTOR_FILE} already; choose another folder")
    require_counts("make_upcycled_head", most_scenes=most_scenes)
    require(
        not group_scenes or len(stores) == 1, f"groups are made of the scenes of one store (--stores), found {len(stores)} stores"
    )
    require(not recalibrate or bool(stores), "batch norms are measured on smashed scenes; give stores (--stores)")
    paths = check_stores(stores) if stores else ()
    rigs = check_rigs(rig, paths)[: len(paths)]
    loaded = [load_detector(path) for path in specialists]
    seed = None if seed_detector is None else load_detector(seed_detector)
    made = upcycle_head(loaded * len(head.experts) if len(loaded) == 1 else loaded, head, rest=rest, seed=seed, draw=draw)
    rigs = rigs or (rig_of_training(made.detector),) * len(paths)
    opened = [fleet_store(path, made.detector, one) for path, one in zip(paths, rigs, strict=True)]
    check_scenes(paths, opened, head)
    starts = _fit_gate(made.detector, paths, opened, most_scenes, draw, group_scenes=group_scenes)
    if recalibrate:
        recalibrate_head(made.detector, _mixed(made.detector, opened, most_scenes, draw))
    save_run_detector(out, made.detector)
    names = head.experts if len(loaded) > 1 else ("the copied detector",)
    trained = {name: str(one.trained_on.rig) for name, one in zip(names, loaded, strict=True) if one.trained_on is not None}
    record = {
        "head": config_to_json(head),
        "specialists": [str(Path(path)) for path in specialists],
        RIGS: trained,
        "rest": rest,
        "seed": None if seed_detector is None else str(seed_detector),
        "decoder parameters": list(made.parameters),
        "active parameters of the replaced layers": list(made.active),
        "parts": [asdict(part) for part in made.costs],
        "tensors": str(made.account).splitlines(),
    }
    write_atomically(out / HEAD_FILE, (json.dumps(record, indent=1) + "\n").encode())
    return HeadRun(made=made, starts=starts, notes=(*gate_notes(starts, head, grouped=group_scenes), *_rig_note(trained)))


def _fit_gate(
    detector: Detector, paths: Sequence[Path], stores: Sequence[SmashedStore], most: int, draw: int, *, group_scenes: bool
) -> tuple[StoreStart, ...]:
    """Fit the gate to the scenes of stores. Returns where it then sends them."""
    head = upcycled_decoder(detector).config
    if not group_scenes and not (stores and head.has_gate):
        return ()
    described = [describe_scenes(detector, scenes_of(detector, store, most, draw)) for store in stores]
    if group_scenes:
        fit_gate_to_groups(detector, described[0], seed=draw)
    else:
        fit_gate(detector, described)
    if head.router == "oracle":
        return ()
    meant = head.experts if len(stores) == len(head.experts) > 1 else ("",) * len(stores)
    uses = [gate_use(detector, rows) for rows in described]
    return tuple(StoreStart(store=p, given_for=m, use=u) for p, m, u in zip(paths, meant, uses, strict=True))


def _rig_note(rigs: Mapping[str, str]) -> tuple[str, ...]:
    """A sentence where specialists were trained on scans of several rigs."""
    if len(set(rigs.values())) < 2:
        return ()
    said = "; ".join(f"{name}: {rig}" for name, rig in rigs.items())
    return (
        f"the specialists were trained on scans of several rigs ({said}). The detector's file says the first one's, which later commands "
        "take; give --z-shift and --intensity-scale to them for scans of another rig",
    )


def scenes_of(detector: Detector, store: SmashedStore, most: int, seed: int, batch_size: int = 2) -> Iterator[CutFeatures]:
    """Read some scenes of a store, as the decoder sees them.

    Args:
        detector: The detector whose encoder made the scenes.
        store: The store.
        most: Number of scenes at most.
        seed: Decides which ones.
        batch_size: Scenes per batch.

    Yields:
        Features of one batch after the other.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:most]).tolist()
    for start in range(0, len(rows), batch_size):
        yield detector.encoder.restore(collate_scenes([store.readable(row) for row in rows[start : start + batch_size]]))


def _mixed(detector: Detector, stores: Sequence[SmashedStore], most: int, seed: int) -> Iterator[CutFeatures]:
    """Batches with one scene of each store, so that every batch holds all domains."""
    orders = [np.random.default_rng(seed).permutation(len(store))[:most].tolist() for store in stores]
    for rows in zip(*orders, strict=False):
        scenes = [store.readable(row) for store, row in zip(stores, rows, strict=True)]
        yield detector.encoder.restore(collate_scenes(scenes, encoders=[store.fingerprint for store in stores]))
