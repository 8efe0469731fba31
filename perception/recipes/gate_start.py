"""What a fresh gate does with the scenes of each store that it was fitted to, and what a user should know of it.

Read next: `upcycle_head.py`, which fits the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import InvalidInput, require
from ..models.decoders.mixture import HeadMixtureConfig
from ..moe.detectors.calibrate import GateUse
from ..server.store import SmashedStore


@dataclass(frozen=True, kw_only=True)
class StoreStart:
    """Where a fresh gate sends scenes of one store."""

    store: Path
    """The store."""
    given_for: str
    """Name of the expert that the store was given for; empty where it was given for none."""
    use: GateUse
    """The experts of the scenes that were looked at."""


def check_scenes(paths: Sequence[Path], stores: Sequence[SmashedStore], head: HeadMixtureConfig) -> None:
    """Refuse stores from which no gate can begin.

    Args:
        paths: The folders.
        stores: The stores.
        head: The head whose gate is fitted.

    Raises:
        InvalidInput: A store is empty, or there is neither one store nor one per expert.
    """
    for path, store in zip(paths, stores, strict=True):
        if not len(store):
            raise InvalidInput(
                f"the store {path} holds no scene. `ingest` moves shards into a store, so a second `ingest` of the same folder finds nothing: "
                "extract each domain into a folder of its own and ingest each folder once, or look into the store's quarantine"
            )
    require(
        not head.has_gate or len(paths) in (0, 1, len(head.experts)),
        f"{len(paths)} stores were given for {len(head.experts)} experts ({', '.join(head.experts)}); give one store for each expert in the "
        "order of the experts, or one store for all",
    )


def gate_notes(starts: Sequence[StoreStart], head: HeadMixtureConfig, *, grouped: bool) -> tuple[str, ...]:
    """Say what is odd about the start of a gate.

    Args:
        starts: Where the gate sends the scenes of each store.
        head: The structure of the head.
        grouped: Whether the gate was fitted to groups of scenes that look alike.

    Returns:
        Sentences for the user.
    """
    if not starts or head.router not in ("top_k", "soft") or len(head.experts) < 2:
        return ()
    if len(starts) == 1:
        return () if grouped else (_one_store(starts[0], head),)
    return tuple(note for start in starts for note in (_wrong_name(start, head), _sent_elsewhere(start, head)) if note)


def _one_store(start: StoreStart, head: HeadMixtureConfig) -> str:
    return (
        f"one store ({start.store}) was given for {len(head.experts)} experts: it only scaled the description of scenes, and the gate begins "
        f"with random rows, so the table says nothing about domains. Give one store per specialist in their order ({', '.join(head.experts)}), "
        "or --group-scenes, which finds groups of scenes that look alike"
    )


def _wrong_name(start: StoreStart, head: HeadMixtureConfig) -> str:
    """A sentence where a store has the name of another expert than the one that it was given for."""
    named = [name for name in head.experts if name.casefold() == start.store.name.casefold()]
    if not named or named[0] == start.given_for:
        return ""
    return (
        f"the store {start.store} was given for the expert {start.given_for}, and there is an expert {named[0]}: the order of --stores must be "
        f"that of --specialists ({', '.join(head.experts)}). The gate learned the order that was given, whatever the table shows"
    )


def _sent_elsewhere(start: StoreStart, head: HeadMixtureConfig) -> str:
    shares = dict(zip(head.experts, start.use.largest, strict=True))
    most = max(shares, key=lambda name: shares[name])
    if most == start.given_for or shares[start.given_for] >= 0.5:
        return ""
    return (
        f"of {start.use.scenes} scenes of {start.store}, which was given for {start.given_for}, the gate sends {shares[start.given_for]:.0%} to "
        f"{start.given_for} and {shares[most]:.0%} to {most}: scenes of these domains look alike to it. Give more scenes, or take "
        "specialists of domains that differ more"
    )
