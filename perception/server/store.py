"""The server's smashed scenes: a catalog over shards, read in any order, checked at every read.

    store/shards/<hash>.tar, .json   verified shards, as the vehicles wrote them
    store/catalogue.parquet          one row per scene: shard, member, offset, length, SHA-256, voxels, keypoints, codec, fingerprint, order, id
    store/quarantine/                what failed, with the reason

Shards and scenes have random names and come in random order. A store gives its scenes in the order of their content instead, so that a
fleet that is extracted twice trains the same way twice.

One store holds the scenes of one encoder and one cut. `ingest.py` fills it. This file reads it and is the only one that turns a scene
at rest back into live features. A scene holds no raw point, yet much of a scan can be rebuilt from it: protect a store like raw scans.

Read next: `joined_stores.py`, several stores read as one; `unlabeled_half.py`, which trains on the scenes; `wire/codec.py`, which decodes
and checks them.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
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
from ...core.foreign_text import shown
from ...core.smashed_scene import SmashedScene
from ...core.strict_json import canonical_json, strict_json
from ...datasets.parquet import read_parquet
from ..wire.codec import CODECS, FINGERPRINT_PATTERN, decode_scene, max_encoded_bytes, round_trip, scene_id_of
from ..wire.coordinates import count_cells
from ..wire.cut_json import CorruptScene, cut_from_json, cut_to_json
from ..wire.manifest import BrokenShard, open_regular
from ..wire.shards import SceneKind

CATALOG = "catalogue.parquet"
"""File name of the catalog in a store."""
SHARDS = "shards"
"""Folder of the verified shards in a store."""
QUARANTINE = "quarantine"
"""Folder of what failed in a store."""

_HEADER_KEY = b"upcycle3d.smashed_catalogue"  # the spelling in the files of version 0.1
_VERSION = 3  # 2: keypoints; 3: order, and the identifier of each scene. Catalogs of version 2 are read
_SHARD_NAME = re.compile(r"[0-9a-f]{32}")
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
        ("order", pa.string()),
        ("scene", pa.string()),
    ]
)
LOST_SHARE = 0.1
"""Share of a store's scenes that may be lost to damaged shards while a training goes on with the others."""


class BrokenStore(UpcycleError):
    """The catalog or the shards of a store are missing, damaged or of another version."""


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """All scenes of a store, without their features."""

    spec: CutSpec
    """The cut at which all scenes were made."""

    fingerprint: str
    """Fingerprint of the encoder that made them."""

    rows: pa.Table
    """One row per scene; the columns are listed at the top of this file."""

    @staticmethod
    def empty(spec: CutSpec, fingerprint: str) -> Catalog:
        """Make a catalog without scenes.

        Args:
            spec: The cut of the scenes to come.
            fingerprint: Fingerprint of their encoder.

        Returns:
            The catalog.
        """
        return Catalog(spec=spec, fingerprint=fingerprint, rows=_SCHEMA.empty_table())

    def shards(self) -> set[str]:
        """Return the stems of the shards that have scenes here."""
        return set(self.rows["shard"].unique().to_pylist())

    def without(self, stems: set[str]) -> Catalog:
        """Leave out the scenes of some shards.

        Args:
            stems: Stems of these shards.

        Returns:
            The other scenes, in the same order.
        """
        keep = [stem not in stems for stem in self.rows["shard"].to_pylist()]
        return Catalog(spec=self.spec, fingerprint=self.fingerprint, rows=self.rows.filter(pa.array(keep, pa.bool_())))

    def extended(self, rows: pa.Table) -> Catalog:
        """Append scenes.

        Args:
            rows: One row per scene (`catalog_rows`).

        Returns:
            The scenes of this catalog, then the new ones.
        """
        return Catalog(spec=self.spec, fingerprint=self.fingerprint, rows=pa.concat_tables([self.rows, rows]))

    def with_scene_names(self, shards: Path) -> Catalog:
        """Fill in the identifiers of scenes that a catalog of an earlier version lacks, by reading the heads of these scenes.

        Args:
            shards: Folder of the shards.

        Returns:
            This catalog where it lacks none; otherwise one in which a scene that cannot be read has the name `?`.
        """
        if not self.rows["scene"].null_count:
            return self
        names = []
        for row in self.rows.to_pylist():
            name = row["scene"]
            if name is None:
                try:
                    name = scene_id_of(_read_bytes(shards / f"{row['shard']}.tar", row["offset"], row["length"]))
                except (OSError, UpcycleError):
                    name = "?"
            names.append(name)
        rows = self.rows.set_column(_SCHEMA.get_field_index("scene"), "scene", pa.array(names, pa.string()))
        return Catalog(spec=self.spec, fingerprint=self.fingerprint, rows=rows)


def order_key(scene: SmashedScene) -> str:
    """Give the text by which scenes of a store are ordered: it depends on what is in a scene and not on its random id.

    The cells come first. They follow from the points alone, so the order is the same for two encoders of one grid, and on machines whose
    features differ in the last bit.

    Args:
        scene: The scene.

    Returns:
        48 hexadecimal digits.
    """
    digests = [
        hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
        for tensors in ((scene.coords,), (scene.features, scene.keypoint_cells, scene.keypoint_features))
    ]
    return digests[0][:32] + digests[1][:16]


def catalog_rows(columns: dict[str, list[str] | list[int]]) -> pa.Table:
    """Make rows of a catalog.

    Args:
        columns: Values by column, all of one length.

    Returns:
        A table with one row per scene.
    """
    return pa.table(columns, schema=_SCHEMA)


def write_catalog(store: Path, catalog: Catalog) -> None:
    """Replace the catalog of a store, atomically.

    Args:
        store: Folder of the store.
        catalog: The new catalog.

    Raises:
        OSError: The store cannot be written.
    """
    header = {
        "version": _VERSION,
        "split": cut_to_json(catalog.spec),
        "encoder_fingerprint": catalog.fingerprint,
        "rows_sha256": _rows_digest(catalog.rows),
    }
    table = catalog.rows.combine_chunks().replace_schema_metadata({_HEADER_KEY: canonical_json(header)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomically(store / CATALOG, [sink.getvalue().to_pybytes()])


def _rows_digest(rows: pa.Table) -> str:
    """SHA-256 of the values of all rows. Shards have hashes of their own; the order of scenes is written here only."""
    digest = hashlib.sha256()
    for name in _SCHEMA.names:
        values = rows[name]
        numbers = pa.types.is_integer(values.type)
        digest.update(f"{name} {len(values)}\n".encode())
        digest.update(values.to_numpy().astype("<i8").tobytes() if numbers else canonical_json(values.to_pylist()))
    return digest.hexdigest()


def read_catalog(store: Path) -> Catalog | None:
    """Read the catalog of a store.

    Args:
        store: Folder of the store.

    Returns:
        The catalog, or None before the first ingest.

    Raises:
        BrokenStore: The catalog is damaged or of another version.
    """
    path = store / CATALOG
    if not path.exists():
        return None
    remedy = (
        f"it is rebuilt from the shards by `upcycle3d ingest INCOMING --store {store} --detector DETECTOR --rebuild-catalog`, where "
        "INCOMING may be an empty folder"
    )
    table = read_parquet(path, None, remedy=remedy, error=BrokenStore)
    try:
        header = strict_json((table.schema.metadata or {}).get(_HEADER_KEY, b"null"), f"the catalog {path}", CorruptScene)
        version = header.get("version") if isinstance(header, dict) else None
        if version not in (2, _VERSION) or isinstance(version, float | bool):
            raise CorruptScene(f"it is of version {shown(version, most=20)}, and this program reads versions 2 and {_VERSION}")
        for name in ("order", "scene") if version == 2 else ():
            if name not in table.schema.names:
                table = table.append_column(name, pa.nulls(len(table), pa.string()))
        if set(table.schema.names) == set(_SCHEMA.names):
            table = table.select(_SCHEMA.names)
        if not table.schema.remove_metadata().equals(_SCHEMA):
            raise CorruptScene(f"it has the columns {shown(table.schema.names)}, expected {_SCHEMA.names}")
        spec = cut_from_json(header.get("split"), "its cut")
        fingerprint = header.get("encoder_fingerprint")
        if not isinstance(fingerprint, str) or not FINGERPRINT_PATTERN.fullmatch(fingerprint):
            raise CorruptScene(f"its encoder fingerprint must be 64 hexadecimal digits, found {shown(fingerprint, most=80)!r}")
        _check_rows(table, spec, fingerprint)
        if version == _VERSION and header.get("rows_sha256") != _rows_digest(table):
            raise CorruptScene("its rows do not have the recorded SHA-256")
    except UpcycleError as error:
        raise BrokenStore(f"the catalog {path} cannot be used: {error}; {remedy}") from error
    return Catalog(spec=spec, fingerprint=fingerprint, rows=table.replace_schema_metadata(None))


def _check_rows(table: pa.Table, spec: CutSpec, fingerprint: str) -> None:
    """Refuse values that no ingest writes, so that reading a scene takes no absurd memory and no path outside the store."""
    for name in _SCHEMA.names:
        if name not in ("order", "scene") and table[name].null_count:
            raise CorruptScene(f"the column {name} has empty places")
    if not len(table):
        return
    limits = {
        "offset": (0, 1 << 62),
        "length": (1, max_encoded_bytes(spec)),
        "voxels": (0, count_cells(spec)),
        "keypoints": (0, spec.keypoints.count if spec.keypoints else 0),
    }
    for name, (low, high) in limits.items():
        values = table[name].to_numpy()
        if values.min() < low or values.max() > high:
            raise CorruptScene(f"the column {name} must lie in {low}..{high}, found {values.min()}..{values.max()}")
    wanted = {"shard": _SHARD_NAME, "sha256": FINGERPRINT_PATTERN}
    for name, pattern in wanted.items():
        odd = next((v for v in table[name].to_pylist() if not pattern.fullmatch(v)), None)
        if odd is not None:
            raise CorruptScene(f"the column {name} holds {shown(odd, most=80)!r}")
    for name, allowed in (("codec", CODECS), ("fingerprint", (fingerprint,))):
        odd = next((v for v in table[name].unique().to_pylist() if v not in allowed), None)
        if odd is not None:
            raise CorruptScene(f"the column {name} holds {shown(odd, most=80)!r}, expected {' or '.join(allowed)}")


def _read_bytes(tar: Path, offset: int, length: int) -> bytes:
    descriptor = open_regular(tar)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


class SmashedStore:
    """The scenes of a store by position: `store[i]` reads, checks and decodes scene `i`.

    Positions follow the content of the scenes (`order_key`), not their random names: the same scans give the same positions.

    It holds flat arrays and no open file, so it can be shared with forked or spawned data workers and with threads. A scene costs one
    `pread` of its bytes.

    Attributes:
        folder: Folder of the store.
        spec: The cut at which all scenes were made.
        fingerprint: Fingerprint of the encoder that made them.
        fingerprints: The same as a tuple of one, as `JoinedStores` has several.
        codecs: Names of the codecs that occur, sorted.
        codec_counts: Number of scenes of each of them.
        voxels: (len,) int32 number of voxels of each scene.
        keypoints: (len,) int32 number of keypoints of each scene.

    Example:
        store = SmashedStore("runs/store")
        features = collate_scenes([store[0], store[1]])
        predictions = detector.predict(detector.decode(features))
    """

    def __init__(self, store: str | Path) -> None:
        """Open a store.

        Args:
            store: Folder of the store.

        Raises:
            BrokenStore: There is no catalog, or it is damaged.
        """
        store = Path(store)
        catalog = read_catalog(store)
        if catalog is None:
            raise BrokenStore(f"{store} holds no {CATALOG}; fill it with `upcycle3d ingest`")
        rows = catalog.rows
        if not rows["order"].null_count:  # a store that an earlier version began keeps its order, so that its runs can be resumed
            rows = rows.sort_by([("order", "ascending"), ("sha256", "ascending")])
        self.folder = store
        self.spec = catalog.spec
        self.fingerprint = catalog.fingerprint
        self.fingerprints: tuple[str, ...] = (catalog.fingerprint,)
        self._folder = store / SHARDS
        encoded = rows["shard"].combine_chunks().dictionary_encode()
        self._shards: list[str] = encoded.dictionary.to_pylist()
        self._shard = encoded.indices.to_numpy(zero_copy_only=False)
        self._offset = rows["offset"].to_numpy()
        self._length = rows["length"].to_numpy()
        digests = b"".join(bytes.fromhex(h) for h in rows["sha256"].to_pylist())
        self._sha256 = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        self.codec_counts: dict[str, int] = dict(sorted(Counter(rows["codec"].to_pylist()).items()))
        self.codecs: tuple[str, ...] = tuple(self.codec_counts)
        self.voxels: Tensor = torch.from_numpy(rows["voxels"].to_numpy().copy())
        self._lost: set[int] = set()
        self.keypoints: Tensor = torch.from_numpy(rows["keypoints"].to_numpy().copy())

    def __len__(self) -> int:
        return len(self._offset)

    def digest(self) -> str:
        """SHA-256 of the scenes in the store, in any order: two stores with the same scenes have the same digest."""
        return hashlib.sha256(b"".join(sorted(row.tobytes() for row in self._sha256))).hexdigest()

    def __getitem__(self, index: int) -> SmashedScene:
        """Read one scene.

        Args:
            index: 0 to the number of scenes minus one.

        Returns:
            The scene, its features after the codec's round trip.

        Raises:
            IndexError: There is no such scene.
            CorruptScene: Its bytes changed since ingest.
            BrokenStore: Its shard cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the store holds {len(self)} scenes, asked for {index}")
        tar = self._folder / f"{self._shards[self._shard[index]]}.tar"
        length, offset = int(self._length[index]), int(self._offset[index])
        try:
            blob = _read_bytes(tar, offset, length)
        except (OSError, BrokenShard) as error:
            raise BrokenStore(f"scene {index}: cannot read {tar}: {error}; run ingest to drop shards that are gone") from error
        if hashlib.sha256(blob).digest() != self._sha256[index].tobytes():
            raise CorruptScene(
                f"scene {index}: {length} bytes at {offset} of {tar} differ from what was ingested; the disk or someone changed "
                "them: restore the shard or delete it and run ingest"
            )
        try:
            return decode_scene(blob, expected_spec=self.spec, expected_fingerprint=self.fingerprint)
        except UpcycleError as error:
            raise CorruptScene(f"scene {index} in {tar} cannot be used: {error}") from error

    def readable(self, index: int) -> SmashedScene:
        """Read one scene, or another one where its shard was damaged after ingest, for trainings that go on.

        A warning names each damaged shard once, with the number of its scenes. None of them is read again.

        Args:
            index: 0 to the number of scenes minus one.

        Returns:
            The scene, or another one whose shard is whole.

        Raises:
            IndexError: There is no such scene.
            BrokenStore: More than `LOST_SHARE` of the scenes are in damaged shards.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the store holds {len(self)} scenes, asked for {index}")
        row = index
        while True:
            if int(self._shard[row]) not in self._lost:
                try:
                    return self[row]
                except UpcycleError as error:
                    self._lose(int(self._shard[row]), error)
            whole = np.flatnonzero(~np.isin(self._shard, list(self._lost)))
            row = int(whole[index * 2_654_435_761 % len(whole)])  # spread over the other scenes, the same for every worker

    def _lose(self, shard: int, error: UpcycleError) -> None:
        self._lost.add(shard)
        lost = int(np.isin(self._shard, list(self._lost)).sum())
        scenes = int((self._shard == shard).sum())
        if lost > LOST_SHARE * len(self):
            raise BrokenStore(
                f"{lost} of {len(self)} scenes of the store {self._folder.parent} are in damaged shards, more than {LOST_SHARE:.0%}: "
                f"{error}. Restore the shards from a copy, or delete them and run ingest"
            ) from error
        warnings.warn(
            f"shard {self._shards[shard]} is damaged, and the training goes on without its {scenes} scenes ({lost} of {len(self)} are lost "
            f"now): {error}",
            stacklevel=3,
        )


def collate_scenes(scenes: Sequence[SmashedScene], *, encoders: Collection[str] = ()) -> CutFeatures:
    """Make one batch of live features from scenes at rest.

    Args:
        scenes: At least one scene, all of one encoder and one cut.
        encoders: Fingerprints of one encoder with several kinds of rigs, each of which the caller has compared with the detector
            (`JoinedStores.fingerprints`). By default all scenes must have the fingerprint of the first.

    Returns:
        Features of the scenes in order, on the CPU. A keypoint lies at the center of its cell.

    Raises:
        InvalidInput: There is no scene, or encoders or cuts differ.
    """
    if not scenes:
        raise InvalidInput("collate_scenes needs at least one scene")
    accepted = set(encoders) or {scenes[0].encoder_fingerprint}
    first = SceneKind(spec=scenes[0].spec, encoder_fingerprint=next(iter(encoders), scenes[0].encoder_fingerprint), codec="")
    for scene in scenes:
        if scene.spec != first.spec or scene.encoder_fingerprint not in accepted:
            kind = SceneKind(spec=scene.spec, encoder_fingerprint=scene.encoder_fingerprint, codec="")
            raise InvalidInput(f"scenes of different encoders or cuts do not mix in a batch: {kind.differences(first)}")
    return CutFeatures.collate([_live(scene) for scene in scenes])


def _live(scene: SmashedScene) -> CutFeatures:
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


def quantize_features(features: CutFeatures, codec: str) -> CutFeatures:
    """Round live features to what a codec can store, scene by scene: bit for bit what they would be if they came out of a store.

    Args:
        features: Features of a batch.
        codec: "fp16" or "int8".

    Returns:
        The rounded features, without gradient.
    """
    scenes = []
    for scene in map(features.scene, range(features.batch_size)):
        voxels = replace(scene.voxels, features=round_trip(scene.voxels.features, codec))
        keypoints = scene.keypoints and replace(scene.keypoints, features=round_trip(scene.keypoints.features, codec))
        scenes.append(replace(scene, voxels=voxels, keypoints=keypoints))
    return CutFeatures.collate(scenes)
