"""Taking shards into a store: verify every byte, keep what is good, set aside what is not, lose nothing.

    incoming/ ─ verify ─┬─ store/shards/      and one row per scene in store/catalogue.parquet
                        └─ store/quarantine/  with <name>.reason.txt

A shard of another encoder stays in the incoming folder (docs/rollout.md). One that is incomplete and young waits.

A shard is moved only after it was verified completely: by rename, or across file systems by copy, fsync, rename, and only then
removal. The tar moves before its manifest and the catalog is written last. So a run that dies at any point is completed by
the next one: a manifest that is still incoming finds its tar in the store, and a shard without rows in the catalog is verified again.

Ingest checks that a shard is what it claims to be. It cannot know whether a vehicle tells the truth about the world.

Read next: `wire/manifest.py` and `wire/shards.py` (what a shard must look like), `store.py` (reading the scenes).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ...core.cut import CutSpec
from ...core.errors import InvalidInput, UpcycleError
from ...core.files import locked_folder, remove_litter
from ...core.foreign_text import shown
from ..wire.codec import FINGERPRINT_PATTERN, ForeignScene, decode_scene
from ..wire.cut_json import CorruptScene
from ..wire.manifest import MAX_MANIFEST_BYTES, BrokenShard, DuplicateScene, ShardManifest, read_manifest
from ..wire.shards import SceneKind, read_members
from .ingest_report import ForeignShards, IngestReport, Refusal, RepeatedShard
from .quarantine import kept_files, move_durably, set_aside
from .store import CATALOG, QUARANTINE, SHARDS, Catalog, catalog_rows, order_key, read_catalog, write_catalog

_UPLOAD_NAME = re.compile(r"([0-9a-f]{32})((?:\.[0-9]{1,6})*)\.(json|tar)")  # the numbers are those of quarantine

UPLOAD_SECONDS = 3600.0
"""Seconds since the last change of an unfinished file in which it is taken for an upload that still runs."""
OVERDUE_SECONDS = 24 * 3600.0
"""Seconds after which half a shard that waits for its other half is reported as overdue."""


class StoreWriteError(UpcycleError):
    """The store cannot be written (disk full, no permission). Every shard is still where it was, or complete in the store."""


@dataclass(frozen=True, kw_only=True)
class _Upload:
    """The files of one shard in a folder."""

    stem: str
    files: dict[str, Path]
    """Suffix (".tar", ".json") to file."""
    odd: tuple[str, ...] = ()
    """Names of halves that are links, folders or devices."""


class _Unfinished(UpcycleError):
    """A file that is probably still being uploaded."""


# -------------------------------------------------------------------------------------------------------------- verify


@dataclass(frozen=True, kw_only=True)
class VerifiedShard:
    """What a complete check of a shard found."""

    manifest: ShardManifest
    """Its manifest."""

    scene_ids: tuple[str, ...]
    """Identifiers of its scenes in the order of the members."""

    voxels: tuple[int, ...]
    """Cells of every scene."""

    keypoints: tuple[int, ...]
    """Keypoints of every scene."""

    order: tuple[str, ...]
    """Order keys of every scene (`order_key` in `store.py`)."""


def verify_shard(manifest_path: Path, tar: Path, *, expected_spec: CutSpec, expected_fingerprint: str) -> VerifiedShard:
    """Check all bytes of a shard and decode every scene in it.

    Args:
        manifest_path: The manifest, `<stem>.json`.
        tar: The tar, `<stem>.tar`; it may lie in another folder.
        expected_spec: The cut at which its scenes must have been made.
        expected_fingerprint: Fingerprint of the encoder that must have made them.

    Returns:
        What it holds.

    Raises:
        ForeignScene: The shard is of another encoder, cut or version.
        BrokenShard: The shard is not what its manifest says, or a scene occurs twice in it.
        CorruptScene: The manifest is not JSON.
        InvalidInput: The numbers in the manifest do not fit together.
    """
    return _verify(read_manifest(manifest_path), tar, expected_spec, expected_fingerprint)


def _verify(manifest: ShardManifest, tar: Path, expected_spec: CutSpec, expected_fingerprint: str) -> VerifiedShard:
    if manifest.encoder_fingerprint != expected_fingerprint:
        raise ForeignScene(
            f"the shard was made by encoder {manifest.encoder_fingerprint}, expected {expected_fingerprint}; features of two "
            "encoders do not mix: update the vehicle or use a store of its own for that encoder"
        )
    if manifest.spec != expected_spec:
        raise ForeignScene(
            f"the shard was cut at another place than expected ({_cut_difference(manifest.spec, expected_spec)}); "
            "extract with the encoder of this store"
        )
    voxels, keypoints, order = [], [], []
    scene_ids: dict[str, str] = {}
    for member, blob in read_members(tar, manifest):
        try:
            scene = decode_scene(blob, expected_spec=expected_spec, expected_fingerprint=expected_fingerprint)
        except UpcycleError as error:
            raise BrokenShard(f"member {member.name} does not decode: {error}") from error
        if scene.codec != manifest.codec:
            raise BrokenShard(f"member {member.name} is stored as {scene.codec}, the manifest says {manifest.codec}")
        if scene.scene_id in scene_ids:
            raise DuplicateScene(f"members {scene_ids[scene.scene_id]} and {member.name} are both scene {scene.scene_id}")
        scene_ids[scene.scene_id] = member.name
        voxels.append(len(scene.coords))
        keypoints.append(len(scene.keypoint_cells))
        order.append(order_key(scene))
    return VerifiedShard(
        manifest=manifest, scene_ids=tuple(scene_ids), voxels=tuple(voxels), keypoints=tuple(keypoints), order=tuple(order)
    )


def _cut_difference(found: CutSpec, expected: CutSpec) -> str:
    return SceneKind(spec=found, encoder_fingerprint="", codec="").differences(
        SceneKind(spec=expected, encoder_fingerprint="", codec="")
    )


def _rows(shard: VerifiedShard) -> pa.Table:
    manifest = shard.manifest
    n = len(manifest.members)
    return catalog_rows(
        {
            "shard": [manifest.stem] * n,
            "member": [m.name for m in manifest.members],
            "offset": [m.offset for m in manifest.members],
            "length": [m.length for m in manifest.members],
            "sha256": [m.sha256 for m in manifest.members],
            "voxels": list(shard.voxels),
            "keypoints": list(shard.keypoints),
            "codec": [manifest.codec] * n,
            "fingerprint": [manifest.encoder_fingerprint] * n,
            "order": list(shard.order),
            "scene": list(shard.scene_ids),
        }
    )


def _repeated_shards(stored: pa.Table, tables: Sequence[pa.Table], contents: Mapping[str, int]) -> tuple[RepeatedShard, ...]:
    """The new shards in `tables` with scenes whose content is in the store more than once."""
    holders: dict[str, set[str]] = {}
    for rows in (stored, *tables):
        for key, stem in zip(rows["order"].to_pylist(), rows["shard"].to_pylist(), strict=True):
            if contents[key] > 1:
                holders.setdefault(key, set()).add(stem)
    found = []
    for table in tables:
        keys = [key for key in table["order"].to_pylist() if key in holders]
        if keys:
            stem = table["shard"][0].as_py()
            others = sorted(set().union(*(holders[key] for key in keys)) - {stem})
            found.append(RepeatedShard(shard=stem, scenes=len(table), repeated=len(keys), others=tuple(others)))
    return tuple(found)


def _cut_off_json(path: Path) -> bool:
    """Whether a file is no JSON at all, as a part of a manifest is."""
    with path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES)
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return True
    return False


# -------------------------------------------------------------------------------------------------------------- ingest


def ingest(
    incoming: str | Path,
    store: str | Path,
    *,
    expected_fingerprint: str,
    expected_spec: CutSpec,
    final: bool = False,
    retry_quarantine: bool = False,
    rebuild_catalog: bool = False,
) -> IngestReport:
    """Take every shard of a folder into a store. Running this again, or after a crash, is safe.

    A bad shard is quarantined and does not stop the others. A shard of another encoder or rig stays where it is, for the store of that
    encoder. A second run on the same store at the same time is refused.

    Args:
        incoming: Folder with uploaded shards, `<hash>.tar` and `<hash>.json`; names with a number, `<hash>.1.tar`, as quarantine gives
            them, are understood too. Names with a leading dot are unfinished and ignored.
        store: Folder of the store; made if it is missing.
        expected_fingerprint: Fingerprint of the encoder whose decoder will be trained (`encoder_fingerprint`).
        expected_spec: Its cut. One store holds the scenes of one encoder and one cut.
        final: No upload is running: what is incomplete is refused instead of waited for.
        retry_quarantine: Also try what lies in the store's quarantine again. What fails again stays there.
        rebuild_catalog: Make the catalog again from the shards in the store, for example because it is damaged.

    Returns:
        What happened to every shard.

    Raises:
        InvalidInput: The incoming folder is missing or is the store itself, or the store holds scenes of another encoder or cut.
        BrokenStore: The catalog is damaged.
        StoreWriteError: The store cannot be written, or another ingest is filling it.

    Example:
        encoder = load_encoder("runs/source")
        report = ingest(
            "incoming", "store", expected_fingerprint=encoder_fingerprint(encoder, rig), expected_spec=encoder.upload_spec
        )
        report.quarantined  # shards that were refused, with reasons
    """
    incoming, store = Path(incoming), Path(store)
    if not incoming.is_dir():
        raise InvalidInput(f"the incoming folder {incoming} does not exist; give the folder that the vehicles upload to")
    if incoming.resolve() in (store.resolve(), (store / SHARDS).resolve()):
        raise InvalidInput(
            f"the incoming folder {incoming} is the store itself; give the folder that the vehicles upload to. An empty one is right where only "
            "the store is looked at, as with --rebuild-catalog"
        )
    if not FINGERPRINT_PATTERN.fullmatch(expected_fingerprint):
        raise InvalidInput(f"expected_fingerprint must be 64 hexadecimal digits, found {shown(expected_fingerprint, most=80)!r}")
    try:
        for folder in (store / SHARDS, store / QUARANTINE):
            folder.mkdir(parents=True, exist_ok=True)
        with _only_ingest(store):
            for folder in (store, store / SHARDS, store / QUARANTINE):
                remove_litter(folder)
            if rebuild_catalog:
                (store / CATALOG).unlink(missing_ok=True)
            return _Ingest(incoming, store, expected_fingerprint, expected_spec, final).run(retry_quarantine)
    except OSError as error:
        raise StoreWriteError(
            f"the store {store} cannot be written: {error}; every shard is still in {incoming} or complete in the store: "
            "make room and run ingest again"
        ) from error


@contextmanager
def _only_ingest(store: Path) -> Iterator[None]:
    """Hold the store's lock. The system releases it when the process ends, however it ends."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(store, f"another ingest is filling {store}; wait for it to end"))
        except UpcycleError as error:
            raise StoreWriteError(str(error)) from error
        yield


class _Ingest:
    """One run of ingest: what was found and decided so far."""

    def __init__(self, incoming: Path, store: Path, fingerprint: str, spec: CutSpec, final: bool) -> None:
        self.incoming, self.store = incoming, store
        self.fingerprint, self.spec, self.final = fingerprint, spec, final
        self.shards = store / SHARDS
        self.accepted: list[str] = []
        self.already_there: list[str] = []
        self.quarantined: list[Refusal] = []
        self.duplicates: list[Refusal] = []
        self.foreign: dict[str, list[tuple[str, int]]] = {}
        self.waiting: list[Refusal] = []
        self.overdue: list[Refusal] = []
        self.tables: list[pa.Table] = []
        self.known: set[str] = set()
        self.scene_ids: dict[str, str] = {}
        """Scenes of the store, with their shards."""
        self.now = time.time()

    def run(self, retry_quarantine: bool) -> IngestReport:
        catalog = read_catalog(self.store) or Catalog.empty(self.spec, self.fingerprint)
        if not len(catalog.rows):  # a store that accepted nothing so far belongs to no encoder yet
            catalog = Catalog.empty(self.spec, self.fingerprint)
        if (catalog.spec, catalog.fingerprint) != (self.spec, self.fingerprint):
            raise InvalidInput(
                f"the store {self.store} holds scenes of encoder {catalog.fingerprint[:12]} cut at {catalog.spec.layer!r} "
                f"{catalog.spec.shape}, asked to add scenes of {self.fingerprint[:12]} cut at {self.spec.layer!r} {self.spec.shape}; "
                "one store holds one encoder's scenes: use another folder"
            )
        stored = {u.stem: u for u in self._uploads(self.shards)[0] if len(u.files) == 2 and not u.odd}
        gone = catalog.shards() - stored.keys()
        catalog = catalog.without(gone) if gone else catalog
        named = catalog.with_scene_names(self.shards)
        changed = bool(gone) or named is not catalog
        catalog = named
        self.known = catalog.shards()
        self.scene_ids = dict(zip(catalog.rows["scene"].to_pylist(), catalog.rows["shard"].to_pylist(), strict=True))
        for stem in sorted(stored.keys() - self.known):  # a run that died after moving them in
            self._take(stored[stem], self.shards)
        uploads, unrecognized = self._uploads(self.incoming)
        for upload in uploads:
            self._consider(upload, self.incoming)
        if retry_quarantine:
            for upload in self._uploads(self.store / QUARANTINE)[0]:
                self._consider(upload, self.store / QUARANTINE)
        new_scenes = sum(map(len, self.tables))
        contents = Counter(key for rows in (catalog.rows, *self.tables) for key in rows["order"].to_pylist())
        repeated = _repeated_shards(catalog.rows, self.tables, contents)
        for table in self.tables:
            catalog = catalog.extended(table)
        if self.tables or changed or not (self.store / CATALOG).exists():
            write_catalog(self.store, catalog)
        return IngestReport(
            accepted=tuple(self.accepted),
            already_there=tuple(self.already_there),
            quarantined=tuple(self.quarantined),
            duplicates=tuple(self.duplicates),
            foreign=tuple(
                ForeignShards(fingerprint=name, shards=tuple(s for s, _ in found), scenes=sum(n for _, n in found))
                for name, found in sorted(self.foreign.items())
            ),
            waiting=tuple(self.waiting),
            overdue=tuple(self.overdue),
            unrecognized=tuple(unrecognized),
            gone=tuple(sorted(gone)),
            new_scenes=new_scenes,
            empty_scenes=sum(int((table["voxels"].to_numpy() == 0).sum()) for table in self.tables),
            repeated_scenes=sum(contents[key] > 1 for table in self.tables for key in table["order"].to_pylist()),
            total_scenes=len(catalog.rows),
            total_shards=len(catalog.shards()),
            repeated_shards=repeated,
            codecs=tuple(sorted(Counter(catalog.rows["codec"].to_pylist()).items())),
        )

    @staticmethod
    def _uploads(folder: Path) -> tuple[list[_Upload], list[str]]:
        """Find the shards of a folder, and the names that cannot be one: links, folders, devices, other names."""
        found: dict[tuple[str, str], dict[str, Path]] = {}
        odd: dict[tuple[str, str], list[str]] = {}
        unrecognized = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                match = _UPLOAD_NAME.fullmatch(entry.name)
                if match and entry.is_file(follow_symlinks=False):
                    found.setdefault((match[1], match[2]), {})[f".{match[3]}"] = folder / entry.name
                    continue
                if match:
                    odd.setdefault((match[1], match[2]), []).append(entry.name)
                unrecognized.append(entry.name)
        uploads = [_Upload(stem=key[0], files=files, odd=tuple(odd.get(key, ()))) for key, files in sorted(found.items())]
        return uploads, sorted(unrecognized)

    def _consider(self, upload: _Upload, folder: Path) -> None:
        """Decide whether a shard is complete, and take it if it is."""
        stem, files, again = upload.stem, upload.files, folder == self.store / QUARANTINE
        tar_in_store = (self.shards / f"{stem}.tar").is_file()
        if upload.odd:
            reason = f"{upload.odd[0]} is a link, a folder or a device; only plain files are taken: copy the file itself"
            self._refuse(stem, folder, list(files.values()), BrokenShard(reason))
        elif (".json" in files and (".tar" in files or tar_in_store)) or (".tar" in files and stem in self.known):
            self._take(upload, folder)  # a tar that comes again has its manifest in the store
        elif again or self._complete_quarantine(upload):
            return  # a half shard in quarantine stays there
        elif self.final:
            missing = "manifest" if ".tar" in files else "tar"
            self._refuse(
                stem, folder, list(files.values()), BrokenShard(f"its {missing} has not come, and no upload is running (--final)")
            )
        else:
            self._wait(stem, f"its {'manifest' if '.tar' in files else 'tar'} has not come yet", next(iter(files.values())))

    def _complete_quarantine(self, upload: _Upload) -> bool:
        """Move the second half of a shard to quarantine where a run died after it had moved the first."""
        (suffix, path) = next(iter(upload.files.items()))
        folder = self.store / QUARANTINE
        for reason in sorted(folder.glob(f"{upload.stem}*.reason.txt")):
            name = reason.name.removesuffix(".reason.txt")
            if (folder / f"{name}{suffix}").exists() or f"{name}{suffix}" not in kept_files(reason):
                continue
            move_durably(path, folder / f"{name}{suffix}")
            self.quarantined.append(
                Refusal(shard=upload.stem, reason="it was refused by an ingest that ended before it had moved all")
            )
            return True
        return False

    def _age(self, path: Path) -> float:
        """Seconds since a file was changed; a clock that is ahead counts like one that is behind."""
        try:
            return abs(self.now - path.stat().st_mtime)
        except OSError:
            return 0.0

    def _wait(self, stem: str, reason: str, file: Path) -> None:
        age = self._age(file)
        refusal = Refusal(shard=stem, reason=reason)
        if age > OVERDUE_SECONDS:
            refusal = Refusal(
                shard=stem,
                reason=f"{reason}, for {age / 3600:.0f} hours now; upload the shard again, or give --final to set it aside",
            )
            self.overdue.append(refusal)
        self.waiting.append(refusal)

    def _refuse(self, stem: str, folder: Path, files: list[Path], error: UpcycleError) -> None:
        """Set a bad shard aside. What lies in quarantine already stays as it is."""
        refusal = Refusal(shard=stem, reason=shown(error, most=4000))
        if folder != self.store / QUARANTINE:
            # A tar that is in the store already was verified before; a bad manifest must not take it away.
            set_aside(files, self.store / QUARANTINE, stem, f"{type(error).__name__}: {error}")
        self.quarantined.append(refusal)
        if isinstance(error, DuplicateScene):
            self.duplicates.append(refusal)

    def _take(self, upload: _Upload, folder: Path) -> None:
        """Verify one shard and move it where it belongs."""
        stem, files = upload.stem, upload.files
        manifest_path = files.get(".json", self.shards / f"{stem}.json")
        tar = files.get(".tar", self.shards / f"{stem}.tar")
        try:
            manifest = self._manifest(manifest_path, stem)
            if manifest.encoder_fingerprint != self.fingerprint and folder != self.shards:
                self.foreign.setdefault(manifest.encoder_fingerprint, []).append((stem, len(manifest.members)))
                return
            self._check_length(tar, manifest)
            shard = _verify(manifest, tar, self.spec, self.fingerprint)
            if stem not in self.known:
                self._refuse_known_scenes(shard)
        except _Unfinished as unfinished:
            self._wait(stem, str(unfinished), files.get(".json", tar))
            return
        except UpcycleError as error:
            if folder == self.shards and isinstance(error, ForeignScene):
                raise InvalidInput(
                    f"the store {self.store} holds shard {stem} of another kind: {error}; one store holds one encoder's scenes: "
                    "use another folder"
                ) from error
            self._refuse(stem, folder, list(files.values()), error)
            return
        except OSError as error:
            self.waiting.append(Refusal(shard=stem, reason=f"it cannot be read now: {error}"))
            return
        for path in (tar, manifest_path):
            if path.parent != self.shards:
                move_durably(path, self.shards / f"{stem}{path.suffix}")  # over an equal file, which repairs a decayed disk
        if folder == self.store / QUARANTINE:
            next(iter(files.values())).with_suffix(".reason.txt").unlink(missing_ok=True)
        if stem in self.known:
            self.already_there.append(stem)
            return
        self.accepted.append(stem)
        self.tables.append(_rows(shard))
        self.known.add(stem)
        self.scene_ids |= dict.fromkeys(shard.scene_ids, stem)

    def _manifest(self, path: Path, stem: str) -> ShardManifest:
        """Read a manifest; one that is cut off and young is still being uploaded."""
        try:
            return read_manifest(path, stem=stem)
        except CorruptScene as error:
            young = path.parent != self.store / QUARANTINE and self._age(path) < UPLOAD_SECONDS
            if young and not self.final and _cut_off_json(path):
                raise _Unfinished("its manifest is not complete; it seems to be still uploaded") from error
            raise

    def _check_length(self, tar: Path, manifest: ShardManifest) -> None:
        """A tar that is shorter than its manifest says, and young, is still being uploaded."""
        size = tar.lstat().st_size
        if self.final or size >= manifest.tar_bytes or tar.parent in (self.store / QUARANTINE, self.shards):
            return
        if self._age(tar) < UPLOAD_SECONDS:
            raise _Unfinished(f"its tar has {size:,} of {manifest.tar_bytes:,} bytes; it seems to be still uploaded")

    def _refuse_known_scenes(self, shard: VerifiedShard) -> None:
        for scene_id, member in zip(shard.scene_ids, shard.manifest.members, strict=True):
            if scene_id in self.scene_ids:
                raise DuplicateScene(
                    f"its member {member.name} is scene {scene_id}, which the store holds already in shard {self.scene_ids[scene_id]}; "
                    "a scene counts once"
                )
