"""Proposals are collected once: a file that holds other proposals than those asked for is refused, never overwritten.

Read next: `proposal_classifier.py`, which reads proposals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ....core.config_json import first_difference
from ....core.errors import InvalidInput
from ....datasets.data_split import DataSplit
from ....datasets.fingerprint import as_recorded
from ...models.detector import Detector
from ...server.store import SmashedStore
from .proposal_collection import OnProgress, collect_from_frames, collect_from_store, detector_digest
from .proposal_file import load_proposals, save_proposals
from .proposals import DetectorProposals, ProposalSelection


def cached_proposals(
    path: str | Path,
    detector: Detector,
    selection: ProposalSelection,
    *,
    data: str,
    collect: Callable[[], DetectorProposals],
) -> DetectorProposals:
    """Give the proposals in a file, or collect them and write the file.

    Args:
        path: The file.
        detector: The detector that proposes.
        selection: Which proposals are kept.
        data: What the frames are, in words, with their fingerprint.
        collect: Called where the file does not exist.

    Returns:
        The proposals as read from the file, so that a first and a later call give the same.

    Raises:
        InvalidInput: The file holds proposals of another detector, other data or another selection.
    """
    path = Path(path)
    if not path.exists():
        save_proposals(path, collect())
        return load_proposals(path)
    found = load_proposals(path)
    wanted = {"detector": detector_digest(detector), "data": as_recorded(data, found.data), "selection": asdict(selection)}
    stored = {"detector": found.detector, "data": found.data, "selection": asdict(found.selection)}
    difference = first_difference(stored, wanted)
    if difference is not None:
        what = next(name for name in wanted if stored[name] != wanted[name])
        raise InvalidInput(f"{path} holds proposals of another {what} ({difference}); choose another folder")
    return found


def cached_on_split(
    path: str | Path,
    detector: Detector,
    data: DataSplit,
    selection: ProposalSelection,
    *,
    on_progress: OnProgress | None = None,
) -> DetectorProposals:
    """Give or collect the proposals on a split of a prepared dataset (`cached_proposals`).

    Args:
        path: The file.
        detector: The detector that proposes.
        data: The split; its name and the fingerprint of its frames are part of the file.
        selection: Which proposals are kept.
        on_progress: Called after each batch.

    Returns:
        The proposals.

    Raises:
        InvalidInput: The file holds other proposals.
    """
    words = f"{data.name or 'all'}: {data.summary()}"
    return cached_proposals(
        path,
        detector,
        selection,
        data=words,
        collect=lambda: collect_from_frames(detector, data.open(), selection, data=words, on_progress=on_progress),
    )


def cached_on_store(
    path: str | Path,
    detector: Detector,
    store: SmashedStore,
    selection: ProposalSelection,
    *,
    on_progress: OnProgress | None = None,
) -> DetectorProposals:
    """Give or collect the proposals on the scenes of a store (`cached_proposals`).

    Args:
        path: The file.
        detector: The detector that proposes; its encoder must have made the scenes.
        store: The scenes; their digest and the fingerprint of their encoder are part of the file.
        selection: Which proposals are kept.
        on_progress: Called after each batch.

    Returns:
        The proposals.

    Raises:
        InvalidInput: The file holds other proposals, or the store holds no scene.
    """
    data = f"store: {len(store)} scenes {store.digest()[:16]} of the encoder {store.fingerprint[:16]}"
    return cached_proposals(
        path,
        detector,
        selection,
        data=data,
        collect=lambda: collect_from_store(detector, store, selection, data=data, on_progress=on_progress),
    )
