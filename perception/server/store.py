"""The server's smashed scenes: a catalogue over shards, read at random, checked at every read.

    store/shards/<hash>.tar, .json   verified shards, as the vehicles wrote them
    store/catalogue.parquet          one row a scene: shard, member, offset, length, SHA-256, voxels, keypoints, codec,
                             fingerprint
    store/quarantine/                what failed, with the reason

One store holds the scenes of one encoder and one cut. ``ingest`` fills it; this file reads it and, alone in the package, turns
a scene at rest back into live features.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ...core.cut import CutSpec, cell_centers
from ...core.errors import InvalidInput, UpcycleError
from ...core.features import CutFeatures, Keypoints, SparseVoxels
from ...core.files import write_atomically
from ...core.smashed_scene import SmashedScene
from ...core.strict_json import canonical_json, strict_json
from ..wire.codec import decode_scene, round_trip
from ..wire.cut_json import CorruptScene, cut_from_json, cut_to_json
from ..wire.manifest import open_regular

CATALOG = "catalogue.parquet"
SHARDS = "shards"
QUARANTINE = "quarantine"

_HEADER_KEY = b"upcycle3d.smashed_catalogue"  # the spelling in the files of version 0.1
_VERSION = 2  # 2: keypoints
_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("sha256", pa.string()),
        ("voxels", pa.int32()),
        ("keypoints", pa.int32()),
        ("codec", pa.string()),
        ("fingerprint", pa.string()),
    ]
)


class BrokenStore(UpcycleError):
    """A store whose catalogue or shards are missing, damaged or of another version."""


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """All scenes of a store. rows: one a scene, columns as at the top of this file. spec, fingerprint: of all of them."""

    spec: CutSpec
    fingerprint: str
    rows: pa.Table

    @staticmethod
    def empty(spec: CutSpec, fingerprint: str) -> Catalog:
        return Catalog(spec=spec, fingerprint=fingerprint, rows=_SCHEMA.empty_table())

    def shards(self) -> set[str]:
        """Stems of the shards that have scenes here."""
        return set(self.rows["shard"].unique().to_pylist())

    def without(self, stems: set[str]) -> Catalog:
        """The catalogue without the scenes of these shards."""
        keep = [stem not in stems for stem in self.rows["shard"].to_pylist()]
        return Catalog(spec=self.spec, fingerprint=self.fingerprint, rows=self.rows.filter(pa.array(keep, pa.bool_())))

    def extended(self, rows: pa.Table) -> Catalog:
        """The catalogue with ``rows`` behind its own."""
        return Catalog(spec=self.spec, fingerprint=self.fingerprint, rows=pa.concat_tables([self.rows, rows]))


def catalog_rows(columns: dict[str, list[str] | list[int]]) -> pa.Table:
    """A table of catalogue rows from equally long columns."""
    return pa.table(columns, schema=_SCHEMA)


def write_catalog(store: Path, catalog: Catalog) -> None:
    """Replace the store's catalogue at once. Raises ``OSError``."""
    header = {"version": _VERSION, "split": cut_to_json(catalog.spec), "encoder_fingerprint": catalog.fingerprint}
    table = catalog.rows.combine_chunks().replace_schema_metadata({_HEADER_KEY: canonical_json(header)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomically(store / CATALOG, [sink.getvalue().to_pybytes()])


def read_catalog(store: Path) -> Catalog | None:
    """The store's catalogue, or None before the first ingest. Raises ``BrokenStore`` if it cannot be trusted."""
    path = store / CATALOG
    if not path.exists():
        return None
    remedy = "delete it and run ingest: it is rebuilt from the shards"
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise BrokenStore(f"the catalogue {path} cannot be read: {error}; {remedy}") from error
    text = (table.schema.metadata or {}).get(_HEADER_KEY, b"null")
    header = strict_json(text, f"the catalogue {path}", CorruptScene)
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        raise BrokenStore(f"the catalogue {path} is not of version {_VERSION}; {remedy}")
    if not table.schema.remove_metadata().equals(_SCHEMA):
        raise BrokenStore(f"the catalogue {path} has the columns {table.schema.names}, expected {_SCHEMA.names}; {remedy}")
    spec = cut_from_json(header.get("split"), f"the catalogue {path}")
    return Catalog(spec=spec, fingerprint=str(header.get("encoder_fingerprint")), rows=table.replace_schema_metadata(None))


class SmashedStore:
    """Random access to the scenes of a store. ``store[i]`` reads, checks and decodes scene ``i``.

    Holds flat arrays only, no open file: it can be shared with forked or spawned data workers and threads. A scene costs one
    ``pread`` of its bytes. ``spec`` and ``fingerprint`` hold for every scene; ``voxels`` and ``keypoints``
    (len,) int32 are their sizes, ``codecs`` the codecs that occur.
    Raises ``BrokenStore`` where there is no catalogue.
    """

    def __init__(self, store: str | Path) -> None:
        store = Path(store)
        catalog = read_catalog(store)
        if catalog is None:
            raise BrokenStore(f"{store} holds no {CATALOG}; fill it with `upcycle3d ingest`")
        rows = catalog.rows
        self.spec = catalog.spec
        self.fingerprint = catalog.fingerprint
        self._folder = store / SHARDS
        encoded = rows["shard"].combine_chunks().dictionary_encode()
        self._shards: list[str] = encoded.dictionary.to_pylist()
        self._shard = encoded.indices.to_numpy(zero_copy_only=False)
        self._offset = rows["offset"].to_numpy()
        self._length = rows["length"].to_numpy()
        digests = b"".join(bytes.fromhex(h) for h in rows["sha256"].to_pylist())
        self._sha256 = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        self.codecs: tuple[str, ...] = tuple(sorted(rows["codec"].unique().to_pylist()))
        self.voxels: Tensor = torch.from_numpy(rows["voxels"].to_numpy().copy())
        self.keypoints: Tensor = torch.from_numpy(rows["keypoints"].to_numpy().copy())

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, index: int) -> SmashedScene:
        """Scene ``index`` (0..len-1). Raises ``IndexError``, or ``CorruptScene`` if the shard changed since ingest."""
        if not 0 <= index < len(self):
            raise IndexError(f"the store holds {len(self)} scenes, asked for {index}")
        tar = self._folder / f"{self._shards[self._shard[index]]}.tar"
        length, offset = int(self._length[index]), int(self._offset[index])
        try:
            descriptor = open_regular(tar)
            try:
                blob = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BrokenStore(f"scene {index}: cannot read {tar}: {error}; run ingest to drop shards that are gone") from error
        if hashlib.sha256(blob).digest() != self._sha256[index].tobytes():
            raise CorruptScene(
                f"scene {index}: {length} bytes at {offset} of {tar} differ from what was ingested; the disk or someone changed "
                "them: restore the shard or delete it and run ingest"
            )
        return decode_scene(blob, expected_spec=self.spec, expected_fingerprint=self.fingerprint)


def collate_scenes(scenes: Sequence[SmashedScene]) -> CutFeatures:
    """One batch of live features, scenes in order, on the CPU. Raises ``InvalidInput`` if encoders or cuts differ, or without scenes."""
    if not scenes:
        raise InvalidInput("collate_scenes needs at least one scene")
    kinds = {(s.spec, s.encoder_fingerprint) for s in scenes}
    if len(kinds) != 1:
        raise InvalidInput(f"scenes of different encoders or cuts do not mix in a batch; found {len(kinds)}: {kinds}")
    return CutFeatures.collate([_live(scene) for scene in scenes])


def _live(scene: SmashedScene) -> CutFeatures:
    """A batch of one."""
    coords = torch.nn.functional.pad(scene.coords, (1, 0))
    voxels = SparseVoxels(features=scene.features, coords=coords, shape=scene.spec.shape, batch_size=1)
    if scene.spec.keypoints is None:
        return CutFeatures(voxels=voxels, spec=scene.spec)
    keypoints = Keypoints(
        xyz=cell_centers(scene.keypoint_cells, scene.spec.grid),
        features=scene.keypoint_features,
        starts=(0, len(scene.keypoint_cells)),
    )
    return CutFeatures(voxels=voxels, spec=scene.spec, keypoints=keypoints)


def quantize_features(split: CutFeatures, codec: str) -> CutFeatures:
    """Live features after the codec's quantisation, scene by scene, without gradient: as if they came out of a store."""
    scenes = []
    for scene in map(split.scene, range(split.batch_size)):
        voxels = replace(scene.voxels, features=round_trip(scene.voxels.features, codec))
        keypoints = scene.keypoints and replace(scene.keypoints, features=round_trip(scene.keypoints.features, codec))
        scenes.append(replace(scene, voxels=voxels, keypoints=keypoints))
    return CutFeatures.collate(scenes)
