"""Several stores read as one: the scenes of fleets that run one encoder on different kinds of vehicles.

The kind of rig is part of the encoder fingerprint, so two kinds of vehicles fill two stores. A decoder can learn from the scenes of both,
because each rig brings its scans to the shifted frame before the encoder sees them. What must hold is that one encoder made all scenes, so
each store is compared with the encoder and its own rig before it is joined (`perception/recipes/fleet_stores.py` does that).

Read next: `store.py`, one store; `trainer.py`, which draws the scenes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ...core.cut import CutSpec
from ...core.errors import InvalidInput, require
from ...core.smashed_scene import SmashedScene
from .store import SmashedStore


class JoinedStores:
    """The scenes of several stores by position: those of the first store, then those of the second, and so on.

    A training draws positions, so every store gives scenes in proportion to their number, and an epoch sees every scene once. A scene keeps
    the fingerprint that it was made with; `collate_scenes` accepts `fingerprints` in one batch and refuses every other.

    Attributes:
        stores: The stores, in the order given.
        spec: The cut at which all scenes were made.
        fingerprints: Fingerprints of the encoder with the rig of each store, each once.
        codecs: Names of the codecs that occur, sorted.
        codec_counts: Number of scenes of each of them.
        voxels: (len,) int32 number of voxels of each scene.

    Example:
        fleets = JoinedStores([SmashedStore("stores/cars"), SmashedStore("stores/trucks")])
        features = collate_scenes([fleets[0], fleets[len(fleets) - 1]], encoders=fleets.fingerprints)
    """

    def __init__(self, stores: Sequence[SmashedStore]) -> None:
        """Join stores. The caller has checked that one encoder made all scenes, each store's with its own rig.

        Args:
            stores: At least one store. Their order decides the positions, so a run is resumed with the same order.

        Raises:
            InvalidInput: There is no store, a store is empty or was made at another cut, or one is given twice.
        """
        require(bool(stores), "JoinedStores needs at least one store")
        for store in stores:
            if not len(store):
                raise InvalidInput(
                    f"the store {store.folder} holds no scene; look for reasons in its quarantine folder, then run `extract` and `ingest` "
                    "again, or leave it out"
                )
            if store.spec != stores[0].spec:
                raise InvalidInput(
                    f"the scenes of {store.folder} were made at another cut than those of {stores[0].folder}; give stores of one encoder"
                )
        _refuse_twice(stores)
        self.stores = tuple(stores)
        self.spec: CutSpec = stores[0].spec
        self.fingerprints: tuple[str, ...] = tuple(dict.fromkeys(store.fingerprint for store in stores))
        counts = sum((Counter(store.codec_counts) for store in stores), Counter[str]())
        self.codec_counts: dict[str, int] = dict(sorted(counts.items()))
        self.codecs: tuple[str, ...] = tuple(self.codec_counts)
        self.voxels: Tensor = torch.cat([store.voxels for store in stores])
        self._ends = np.cumsum([len(store) for store in stores])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def digest(self) -> str:
        """SHA-256 of the scenes of all stores, in the order of the stores and in any order inside a store."""
        return hashlib.sha256("".join(store.digest() for store in self.stores).encode()).hexdigest()

    def __getitem__(self, index: int) -> SmashedScene:
        """Read one scene.

        Args:
            index: 0 to the number of all scenes minus one.

        Returns:
            The scene, its features after the codec's round trip.

        Raises:
            IndexError: There is no such scene.
            CorruptScene: Its bytes changed since ingest.
            BrokenStore: Its shard cannot be read.
        """
        store, row = self._place(index)
        return store[row]

    def readable(self, index: int) -> SmashedScene:
        """Read one scene, or another one of the same store where its shard was damaged after ingest (`SmashedStore.readable`).

        Args:
            index: 0 to the number of all scenes minus one.

        Returns:
            The scene, or another one of its store whose shard is whole.

        Raises:
            IndexError: There is no such scene.
            BrokenStore: Too many scenes of its store are in damaged shards.
        """
        store, row = self._place(index)
        return store.readable(row)

    def _place(self, index: int) -> tuple[SmashedStore, int]:
        """The store that holds a scene, and its position there."""
        if not 0 <= index < len(self):
            raise IndexError(f"the stores hold {len(self)} scenes, asked for {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        store = self.stores[number]
        return store, index - int(self._ends[number]) + len(store)


FleetScenes = SmashedStore | JoinedStores
"""What a training reads smashed scenes from: one store, or several that are read as one."""


def _refuse_twice(stores: Sequence[SmashedStore]) -> None:
    """Scenes of a store that is given twice would count double, and nobody would see it."""
    digests = [store.digest() for store in stores]
    for (one, digest), (other, other_digest) in combinations(zip(stores, digests, strict=True), 2):
        if one.folder.resolve() == other.folder.resolve():
            raise InvalidInput(f"the store {other.folder} is given twice; give each store once")
        if digest == other_digest:
            raise InvalidInput(
                f"the stores {one.folder} and {other.folder} hold the same {len(other)} scenes, which would count double; give one of them"
            )
