"""Taking shards into a store: verify every byte, keep what is good, set aside what is not, lose nothing.

    incoming/ ─ verify ─┬─ store/shards/      and one row per scene in store/catalogue.parquet
                        └─ store/quarantine/  with <name>.reason.txt

A shard is moved only after it was verified completely: by rename, or across file systems by copy, fsync, rename, and only then
removal. The tar moves before its manifest and the catalog is written last. So a run that dies at any point is completed by
the next one: a manifest that is still incoming finds its tar in the store, and a shard without rows in the catalog is verified again.

Ingest checks that a shard is what it claims to be. It cannot know whether a vehicle tells the truth about the world.

Read next: `wire/manifest.py` and `wire/shards.py` (what a shard must look like), `store.py` (reading the scenes).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ...core.cut import CutSpec
from ...core.errors import InvalidInput, UpcycleError
from ...core.files import sync_folder, write_atomically
from ..wire.codec import FINGERPRINT_PATTERN, ForeignScene, decode_scene
from ..wire.manifest import BrokenShard, ShardManifest, open_regular, read_manifest
from ..wire.shards import SceneKind, read_members
from .store import CATALOG, QUARANTINE, SHARDS, Catalog, catalog_rows, order_key, read_catalog, write_catalog

_UPLOAD_NAME = re.compile(r"([0-9a-f]{32})\.(json|tar)")
_COPY_BYTES = 1 << 22


class StoreWriteError(UpcycleError):
    """The store cannot be written (disk full, no permission). Every shard is still where it was, or complete in the store."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A shard that was not taken in."""

    shard: str
    """The stem of its file names."""

    reason: str
    """Why, as a sentence for the operator."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What one run of ingest did. Shards are named by the stem of their file names."""

    accepted: tuple[str, ...]
    """Shards that are new in the catalog."""

    already_there: tuple[str, ...]
    """Shards that the catalog had already. They were verified again, and nothing changed."""

    quarantined: tuple[Refusal, ...]
    """Shards that failed and were moved to quarantine."""

    waiting: tuple[Refusal, ...]
    """Shards left in the incoming folder, because a tar or a manifest has not come yet or cannot be read now."""

    unrecognized: tuple[str, ...]
    """Names in the incoming folder that cannot be a shard. They were left alone."""

    gone: tuple[str, ...]
    """Shards of the catalog that were deleted from the store since; their rows were dropped."""

    new_scenes: int
    """Rows added to the catalog."""

    total_scenes: int
    """Rows of the catalog now."""


# -------------------------------------------------------------------------------------------------------------- verify


def verify_shard(
    manifest_path: Path, tar: Path, *, expected_spec: CutSpec, expected_fingerprint: str
) -> tuple[ShardManifest, list[tuple[int, int, str]]]:
    """Check all bytes of a shard and decode every scene in it.

    Args:
        manifest_path: The manifest, `<stem>.json`.
        tar: The tar, `<stem>.tar`; it may lie in another folder.
        expected_spec: The cut at which its scenes must have been made.
        expected_fingerprint: Fingerprint of the encoder that must have made them.

    Returns:
        The manifest; and the number of voxels, the number of keypoints and the order key of every scene, in the order of the members.

    Raises:
        ForeignScene: The shard is of another encoder, cut or version.
        BrokenShard: The shard is not what its manifest says.
        CorruptScene: The manifest is not JSON.
        InvalidInput: The numbers in the manifest do not fit together.
    """
    manifest = read_manifest(manifest_path)
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
    sizes = []
    for member, blob in read_members(tar, manifest):
        try:
            scene = decode_scene(blob, expected_spec=expected_spec, expected_fingerprint=expected_fingerprint)
        except UpcycleError as error:
            raise BrokenShard(f"member {member.name} does not decode: {error}") from error
        if scene.codec != manifest.codec:
            raise BrokenShard(f"member {member.name} is stored as {scene.codec}, the manifest says {manifest.codec}")
        sizes.append((len(scene.coords), len(scene.keypoint_cells), order_key(scene)))
    return manifest, sizes


def _cut_difference(found: CutSpec, expected: CutSpec) -> str:
    return SceneKind(spec=found, encoder_fingerprint="", codec="").differences(
        SceneKind(spec=expected, encoder_fingerprint="", codec="")
    )


def _rows(manifest: ShardManifest, sizes: list[tuple[int, int, str]]) -> pa.Table:
    n = len(sizes)
    return catalog_rows(
        {
            "shard": [manifest.stem] * n,
            "member": [m.name for m in manifest.members],
            "offset": [m.offset for m in manifest.members],
            "length": [m.length for m in manifest.members],
            "sha256": [m.sha256 for m in manifest.members],
            "voxels": [voxels for voxels, _, _ in sizes],
            "keypoints": [keypoints for _, keypoints, _ in sizes],
            "codec": [manifest.codec] * n,
            "fingerprint": [manifest.encoder_fingerprint] * n,
            "order": [order for _, _, order in sizes],
        }
    )


# ---------------------------------------------------------------------------------------------------------------- move


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _move(source: Path, target: Path) -> None:
    """Give a file another name or folder. It is complete and durable there before it vanishes from where it was."""
    descriptor = open_regular(source)
    try:
        os.fsync(descriptor)  # the uploader may not have
        try:
            os.replace(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            write_atomically(target, iter(lambda: os.read(descriptor, _COPY_BYTES), b""))
            if _digest(source) != _digest(target):
                raise OSError(errno.EIO, f"the copy of {source} differs from it; the original was kept", str(target)) from error
            os.unlink(source)
    finally:
        os.close(descriptor)
    sync_folder(target.parent)
    sync_folder(source.parent)


def _quarantine(files: list[Path], folder: Path, stem: str, reason: str) -> None:
    """Set files aside under a free name, next to the reason. The reason is written first, so that no file is without one."""
    name, n = stem, 1
    while any((folder / f"{name}{suffix}").exists() for suffix in (".tar", ".json", ".reason.txt")):
        name, n = f"{stem}.{n}", n + 1
    kept = ", ".join(f"{name}{path.suffix}" for path in files)
    text = (
        f"Shard {stem} was refused by ingest.\n\nReason: {reason}\n\nKept next to this file, unchanged: {kept}.\n"
        "Upload it again from the vehicle, or move it back to the incoming folder once the cause is gone.\n"
    )
    write_atomically(folder / f"{name}.reason.txt", [text.encode("utf-8", "replace")])
    for path in files:
        _move(path, folder / f"{name}{path.suffix}")


@contextmanager
def _only_ingest(store: Path) -> Iterator[None]:
    """Hold the store's lock. The system releases it when the process ends, however it ends."""
    descriptor = os.open(store / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreWriteError(f"another ingest is filling {store}; wait for it to end") from error
        yield
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------------------- ingest


def ingest(incoming: str | Path, store: str | Path, *, expected_fingerprint: str, expected_spec: CutSpec) -> IngestReport:
    """Take every shard of a folder into a store. Running this again, or after a crash, is safe.

    A bad shard is quarantined and does not stop the others. A second run on the same store at the same time is refused.

    Args:
        incoming: Folder with uploaded shards, `<hash>.tar` and `<hash>.json`. Names with a leading dot are unfinished and ignored.
        store: Folder of the store; made if it is missing.
        expected_fingerprint: Fingerprint of the encoder whose decoder will be trained (`encoder_fingerprint`).
        expected_spec: Its cut. One store holds the scenes of one encoder and one cut.

    Returns:
        What happened to every shard.

    Raises:
        InvalidInput: The incoming folder is missing, or the store holds scenes of another encoder or cut.
        BrokenStore: The catalog is damaged.
        StoreWriteError: The store cannot be written, or another ingest is filling it.

    Example:
        encoder = load_encoder("runs/source")
        report = ingest(
            "incoming", "store", expected_fingerprint=encoder_fingerprint(encoder, rig), expected_spec=encoder.spec
        )
        report.quarantined  # shards that were refused, with reasons
    """
    incoming, store = Path(incoming), Path(store)
    if not incoming.is_dir():
        raise InvalidInput(f"the incoming folder {incoming} does not exist; give the folder that the vehicles upload to")
    if not FINGERPRINT_PATTERN.fullmatch(expected_fingerprint):
        raise InvalidInput(f"expected_fingerprint must be 64 hexadecimal digits, found {expected_fingerprint[:80]!r}")
    try:
        for folder in (store / SHARDS, store / QUARANTINE):
            folder.mkdir(parents=True, exist_ok=True)
        with _only_ingest(store):
            return _Ingest(incoming, store, expected_fingerprint, expected_spec).run()
    except OSError as error:
        raise StoreWriteError(
            f"the store {store} cannot be written: {error}; every shard is still in {incoming} or complete in the store: "
            "make room and run ingest again"
        ) from error


class _Ingest:
    """One run of ingest: what was found and decided so far."""

    def __init__(self, incoming: Path, store: Path, fingerprint: str, spec: CutSpec) -> None:
        self.incoming, self.store = incoming, store
        self.fingerprint, self.spec = fingerprint, spec
        self.shards = store / SHARDS
        self.accepted: list[str] = []
        self.already_there: list[str] = []
        self.quarantined: list[Refusal] = []
        self.waiting: list[Refusal] = []
        self.tables: list[pa.Table] = []

    def run(self) -> IngestReport:
        catalog = read_catalog(self.store) or Catalog.empty(self.spec, self.fingerprint)
        if not len(catalog.rows):  # a store that accepted nothing so far belongs to no encoder yet
            catalog = Catalog.empty(self.spec, self.fingerprint)
        if (catalog.spec, catalog.fingerprint) != (self.spec, self.fingerprint):
            raise InvalidInput(
                f"the store {self.store} holds scenes of encoder {catalog.fingerprint[:12]} cut at {catalog.spec.layer!r} "
                f"{catalog.spec.shape}, asked to add scenes of {self.fingerprint[:12]} cut at {self.spec.layer!r} {self.spec.shape}; "
                "one store holds one encoder's scenes: use another folder"
            )
        in_store = self._uploads(self.shards)[0]
        whole = {stem for stem, files in in_store.items() if len(files) == 2}
        known = catalog.shards()
        gone = known - whole
        known &= whole
        for stem in sorted(whole - known):  # a run that died after moving them in
            self._take(stem, self.shards, self.shards, known)
        uploads, unrecognized = self._uploads(self.incoming)
        for stem, files in sorted(uploads.items()):
            tar = self.incoming if f"{stem}.tar" in files else self.shards
            if f"{stem}.json" not in files:
                self.waiting.append(Refusal(shard=stem, reason="its manifest has not come yet"))
            elif tar == self.shards and f"{stem}.tar" not in in_store.get(stem, ()):
                self.waiting.append(Refusal(shard=stem, reason="its tar has not come yet"))
            else:
                self._take(stem, self.incoming, tar, known)
        new_scenes = sum(map(len, self.tables))
        catalog = catalog.without(gone) if gone else catalog
        for table in self.tables:
            catalog = catalog.extended(table)
        if self.tables or gone or not (self.store / CATALOG).exists():
            write_catalog(self.store, catalog)
        return IngestReport(
            accepted=tuple(self.accepted),
            already_there=tuple(self.already_there),
            quarantined=tuple(self.quarantined),
            waiting=tuple(self.waiting),
            unrecognized=tuple(unrecognized),
            gone=tuple(sorted(gone)),
            new_scenes=new_scenes,
            total_scenes=len(catalog.rows),
        )

    @staticmethod
    def _uploads(folder: Path) -> tuple[dict[str, set[str]], list[str]]:
        """Find the file names of each stem, and the names that cannot be a shard: links, folders, devices, other names."""
        uploads: dict[str, set[str]] = {}
        unrecognized = []
        with os.scandir(folder) as entries:
            for entry in entries:
                match = _UPLOAD_NAME.fullmatch(entry.name)
                if entry.name.startswith("."):
                    continue
                if match and entry.is_file(follow_symlinks=False):
                    uploads.setdefault(match[1], set()).add(entry.name)
                else:
                    unrecognized.append(entry.name)
        return uploads, sorted(unrecognized)

    def _take(self, stem: str, manifest_folder: Path, tar_folder: Path, known: set[str]) -> None:
        """Verify one shard and move it where it belongs. `known` grows by what is in the catalog from now on."""
        manifest_path, tar = manifest_folder / f"{stem}.json", tar_folder / f"{stem}.tar"
        try:
            manifest, sizes = verify_shard(manifest_path, tar, expected_spec=self.spec, expected_fingerprint=self.fingerprint)
        except UpcycleError as error:
            if manifest_folder == self.shards and isinstance(error, ForeignScene):
                raise InvalidInput(
                    f"the store {self.store} holds shard {stem} of another kind: {error}; one store holds one encoder's scenes: "
                    "use another folder"
                ) from error
            # A tar that is in the store already was verified before; a bad manifest must not take it away.
            files = [manifest_path, tar] if tar_folder == manifest_folder else [manifest_path]
            _quarantine(files, self.store / QUARANTINE, stem, f"{type(error).__name__}: {error}")
            self.quarantined.append(Refusal(shard=stem, reason=str(error)))
            return
        except OSError as error:
            self.waiting.append(Refusal(shard=stem, reason=f"it cannot be read now: {error}"))
            return
        for path in (tar, manifest_path):
            if path.parent != self.shards:
                _move(path, self.shards / path.name)  # over an equal file if there is one, which repairs a decayed disk
        if stem in known:
            self.already_there.append(stem)
        else:
            self.accepted.append(stem)
            self.tables.append(_rows(manifest, sizes))
            known.add(stem)
