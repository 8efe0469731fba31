"""Makes a run folder with an upcycled detector of the run folders of specialists: `upcycle3d moe detector`.

Read next: `perception/moe/detectors/upcycle.py`, which makes the detector, and `calibrate.py` there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...core.config_json import config_to_json
from ...core.errors import InvalidInput, require, require_counts
from ...core.features import CutFeatures
from ...core.files import write_atomically
from ..models.decoders.mixture import HeadMixtureConfig
from ..models.detector import Detector
from ..moe.detectors.calibrate import fit_gate, fit_gate_to_groups, recalibrate_head
from ..moe.detectors.upcycle import UpcycledHead, upcycle_head
from ..moe.upcycling.upcyclers import Rest
from ..server.store import SmashedStore, collate_scenes
from ..training.detector_files import DETECTOR_FILE, load_detector, save_run_detector
from .assembly import fleet_store
from .fleet_stores import Rigs, check_rigs, check_stores, rig_of_training
from .job_inputs import check_path

HEAD_FILE = "head.json"
"""What `moe detector` writes beside the detector: the structure, what it costs, and what became of the tensors."""


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
) -> UpcycledHead:
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
        The detector and what it costs.

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
    if group_scenes:
        fit_gate_to_groups(made.detector, scenes_of(made.detector, opened[0], most_scenes, draw), seed=draw)
    elif opened and head.has_gate:
        fit_gate(made.detector, [scenes_of(made.detector, store, most_scenes, draw) for store in opened])
    if recalibrate:
        recalibrate_head(made.detector, _mixed(made.detector, opened, most_scenes, draw))
    save_run_detector(out, made.detector)
    record = {
        "head": config_to_json(head),
        "specialists": [str(Path(path)) for path in specialists],
        "rest": rest,
        "seed": None if seed_detector is None else str(seed_detector),
        "decoder parameters": list(made.parameters),
        "active parameters of the replaced layers": list(made.active),
        "tensors": str(made.account).splitlines(),
    }
    write_atomically(out / HEAD_FILE, (json.dumps(record, indent=1) + "\n").encode())
    return made


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
