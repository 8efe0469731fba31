"""The stores that `upcycle` and `moe detector` learn from: one or several, each compared with the encoder and the rig of its vehicles.

Read next: `assembly.py` (`fleet_store`, the check of one store), `perception/server/joined_stores.py` (several stores read as one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...core.errors import InvalidInput
from ...core.rig import RigSpec
from ...core.scan_comparison import rig_differences, rig_of_scans
from ...core.scan_options import ScanOptions
from ...core.tensor_value import shape_of
from ...core.trained_on import TrainedOn
from ...datasets.data_split import DataSplit
from ..models.detector import Detector
from ..server.joined_stores import FleetScenes, JoinedStores
from ..server.store import SmashedStore
from .assembly import fleet_store
from .job_inputs import check_path

_Value = TypeVar("_Value")

FEW_SCENES = 0.1
"""Share of the scenes of the largest store below which a store is told to have few: it hardly changes what is learned."""

Stores = str | Path | Sequence[str | Path]
"""The folder of one store of smashed scenes, or the folders of several."""
Rigs = RigSpec | Sequence[RigSpec]
"""One rig for all stores, or one per store in the order of the stores."""


@dataclass(frozen=True, kw_only=True)
class StoreShare:
    """What one of several stores brings to a training."""

    store: Path
    """Folder of the store."""
    rig: RigSpec
    """Rig of the vehicles that sent its scenes."""
    scenes: int
    """Number of its scenes."""
    share: float
    """Its scenes divided by those of all stores: also the share of the unlabeled scenes of the training that come from it."""


def check_stores(stores: Stores | None) -> tuple[Path, ...]:
    """Read which stores are given.

    Args:
        stores: One folder, several, or None.

    Returns:
        The folders in their order; none for None.

    Raises:
        InvalidInput: It is something else, there is no folder in the sequence, or one folder is given twice.
    """
    if stores is None:
        return ()
    if isinstance(stores, str | Path):
        stores = (stores,)
    if not isinstance(stores, Sequence) or not stores:
        raise InvalidInput(f"store must be the path of a store of smashed scenes, or several paths; found {shape_of(stores)}")
    paths = tuple(check_path(path, "store", "a store of smashed scenes") for path in stores)
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise InvalidInput(f"the store {path} is given twice; give each store once")
    return paths


def check_rigs(rigs: Rigs | None, stores: Sequence[Path]) -> tuple[RigSpec, ...]:
    """Read which rigs are given for some stores.

    Args:
        rigs: One rig for all stores, one per store, or None.
        stores: The stores, in their order. Without a store one rig may be given.

    Returns:
        One rig per store, at least one; nothing for None.

    Raises:
        InvalidInput: It is something else, or the numbers of stores and rigs do not fit.
    """
    if rigs is None:
        return ()
    given = tuple(rigs) if isinstance(rigs, Sequence) and not isinstance(rigs, str) else (rigs,)
    wrong = [rig for rig in given if not isinstance(rig, RigSpec)]
    if wrong or not given:
        found = shape_of(wrong[0]) if wrong else "an empty sequence"
        raise InvalidInput(f"rig must be a RigSpec, as in RigSpec(z_shift=1.8), one RigSpec per store, or None; found {found}")
    return _one_per_store(given, "rigs are", stores)


def rigs_of_options(
    z_shifts: Sequence[float], intensity_scales: Sequence[float], stores: Sequence[Path], trained: TrainedOn | None
) -> tuple[RigSpec, ...] | None:
    """Make the rigs of some stores from the options of a command.

    Args:
        z_shifts: Values of `--z-shift`: none, one for all stores, or one per store.
        intensity_scales: Values of `--intensity-scale`, likewise.
        stores: The stores, in their order.
        trained: What the training of the detector knew; its rig fills in the option that is not given.

    Returns:
        One rig per store; None where neither option is given.

    Raises:
        InvalidInput: The numbers of values and stores do not fit, or a value cannot be used.
    """
    if not (z_shifts or intensity_scales):
        return None
    places = range(max(1, len(stores)))
    shifts = _one_per_store(z_shifts, "values of --z-shift are", stores)
    scales = _one_per_store(intensity_scales, "values of --intensity-scale are", stores)
    options = [ScanOptions(z_shift=shifts[i] if shifts else None, intensity_scale=scales[i] if scales else None) for i in places]
    return tuple(rig_of_scans(option, trained)[0] for option in options)


def _one_per_store(given: Sequence[_Value], what: str, stores: Sequence[Path]) -> tuple[_Value, ...]:
    """One value per store, of which one may be given for all; nothing where nothing is given."""
    count = max(1, len(stores))
    if len(given) not in (0, 1, count):
        raise InvalidInput(
            f"{len(given)} {what} given for {len(stores)} {'store' if len(stores) == 1 else 'stores'}; give one for all stores, or one per "
            "store in the order of the stores"
        )
    return tuple(given) * (count if len(given) == 1 else 1)


def rig_of_training(detector: Detector) -> RigSpec:
    """Give the rig that a fleet has where nobody says otherwise.

    Args:
        detector: The detector whose encoder the fleet runs.

    Returns:
        The rig of its training data; no shift and scale 1 where its file does not say.
    """
    return RigSpec() if detector.trained_on is None else detector.trained_on.rig


def open_fleet(paths: Sequence[Path], detector: Detector, rigs: Sequence[RigSpec]) -> FleetScenes | None:
    """Open one or several stores, and compare each of them with a detector's encoder and the rig of its vehicles.

    Args:
        paths: Folders of the stores.
        detector: Its encoder must be the one that all fleets run.
        rigs: The rig of each store.

    Returns:
        The store, several stores read as one, or None without a store.

    Raises:
        InvalidInput: A store comes from another encoder or rig, is empty beside others, or is given twice; the message names it.
    """
    opened = [fleet_store(path, detector, rig) for path, rig in zip(paths, rigs, strict=True)]
    return JoinedStores(opened) if len(opened) > 1 else opened[0] if opened else None


def shares_of(scenes: FleetScenes | None, rigs: Sequence[RigSpec]) -> tuple[StoreShare, ...]:
    """Say what each of several stores brings.

    Args:
        scenes: What a training reads.
        rigs: The rig of each store.

    Returns:
        One entry per store; nothing where there are not several.
    """
    if not isinstance(scenes, JoinedStores):
        return ()
    return tuple(
        StoreShare(store=store.folder, rig=rig, scenes=len(store), share=len(store) / len(scenes))
        for store, rig in zip(scenes.stores, rigs, strict=True)
    )


def digests_of(scenes: FleetScenes | None) -> tuple[str, ...]:
    """Name the content of each store, for the record of a run.

    Args:
        scenes: What a training reads.

    Returns:
        The digest of each store, in their order; nothing without a store.
    """
    if scenes is None:
        return ()
    return tuple(store.digest() for store in (scenes.stores if isinstance(scenes, JoinedStores) else (scenes,)))


def few_scenes_notes(shares: Sequence[StoreShare]) -> tuple[str, ...]:
    """Say which stores have few scenes next to the largest one.

    Args:
        shares: What each store brings.

    Returns:
        One sentence for each of them.
    """
    largest = max(shares, key=lambda share: share.scenes, default=None)
    return tuple(
        f"the store {few.store} has {few.scenes:,} scenes and {largest.store} has {largest.scenes:,}: scenes are drawn in proportion to "
        f"their number, so {few.share:.2%} of the unlabeled scenes come from {few.store}, and it hardly changes what is learned. Extract more "
        "scenes of that fleet, or give the larger store in part"
        for few in shares
        if largest is not None and few.scenes < FEW_SCENES * largest.scenes
    )


def labeled_rig_note(
    data: DataSplit, rig: RigSpec, trained: TrainedOn | None, stores: Sequence[Path], rigs: Sequence[RigSpec]
) -> tuple[str, ...]:
    """A sentence where the labeled data have another rig than scenes of the fleet.

    Args:
        data: The labeled split.
        rig: Its rig.
        trained: What the training of the source model knew. Data with its rig fit scenes with its rig, also where the reader of the data
            scaled intensity.
        stores: The stores.
        rigs: The rig of each store.

    Returns:
        The sentence, which names both rigs, and with several stores those that differ; else nothing.
    """

    def fits(fleet: RigSpec) -> bool:
        return fleet == rig or (trained is not None and rig == trained.rig and not rig_differences(fleet, trained, ""))

    other = [(store, fleet) for store, fleet in zip(stores, rigs, strict=True) if not fits(fleet)]
    if not other:
        return ()
    if len(stores) == 1:
        scenes = f"the scenes of the store have {other[0][1]}"
    else:
        scenes = "; ".join(f"the scenes of {store} have {fleet}" for store, fleet in other)
    return (
        f"the labeled data {data} have the rig {rig}, and {scenes}; this is right only if the road "
        f"lies at the same height and intensity has the same scale after {'both' if len(other) == 1 else 'all of them'}",
    )


def codec_of(scenes: FleetScenes | None) -> str:
    """Find the codec whose rounding the labeled features get where nobody chooses one.

    Args:
        scenes: What a training reads; None without a store.

    Returns:
        The one codec of all scenes; `fp16` without a store.

    Raises:
        InvalidInput: There is no scene, or there are several codecs.
    """
    if scenes is None:
        return "fp16"
    if not scenes.codecs:
        raise InvalidInput(
            "the store holds no scene; look for reasons in its quarantine folder, then run `extract` and `ingest` again"
        )
    if len(scenes.codecs) > 1:
        who = "the store holds" if isinstance(scenes, SmashedStore) else "the stores hold"
        raise InvalidInput(
            f"{who} scenes of several codecs ({_by_codec(scenes)}). All of them are used, and the labeled features get the rounding of "
            "one: say which with codec=… (option --codec). To use the scenes of one codec only, ingest their shards into a store of their "
            "own"
        )
    return scenes.codecs[0]


def codec_note(scenes: FleetScenes | None, codec: str) -> tuple[str, ...]:
    """A sentence where scenes have several codecs: part of them are rounded otherwise than the labeled features.

    Args:
        scenes: What a training reads.
        codec: Codec of the labeled features.

    Returns:
        The sentence; nothing where all scenes have one codec.
    """
    if scenes is None or len(scenes.codecs) < 2:
        return ()
    other = len(scenes) - scenes.codec_counts.get(codec, 0)
    where = "the store" if isinstance(scenes, SmashedStore) else "the stores"
    return (
        f"the labeled features get the rounding of {codec} (--codec), and {other} of {len(scenes)} scenes of {where} have another one "
        f"({_by_codec(scenes)}); all scenes are used",
    )


def _by_codec(scenes: FleetScenes) -> str:
    return ", ".join(f"{codec} {count}" for codec, count in scenes.codec_counts.items())
