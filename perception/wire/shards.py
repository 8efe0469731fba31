"""Shards: many encoded scenes in one file that never changes, and the manifest that makes them readable.

    <hash>.tar    plain WebDataset tar, one <hash>.safetensors.zst per scene, headers zeroed, members in random order
    <hash>.json   its manifest (`manifest.py`)

A shard is exactly the bytes that its manifest implies: a reader makes every tar header again from name and length and compares.
So links, absolute names, trailing data and missing members need no rule of their own. A tar without its manifest is not a shard;
both are written to a temporary name, flushed to the disk and renamed, the manifest last.

What the files themselves say: names are content hashes, tar headers hold no time and no user, and the order is random. This
removes labels from the files and does not protect the vehicle. The features tell which scenes belong together: in a pile of 240
uploads of simulated drives, the most similar upload was the neighbor in time for every one (docs/results.md, section 12). The
encoder fingerprint covers the kind of rig: the mounting height and the intensity scale, both rounded (`RigSpec.rounded`). Only with
an encoder file of version 0.1 does it cover the exact height, which whoever has the encoder finds by trying.

Read next: `manifest.py` for the format, and `perception/server/ingest.py` for the receiving side.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ...core.cut import CutSpec
from ...core.errors import InvalidInput, UpcycleError
from ...core.files import sync_folder, write_atomically
from ...core.foreign_text import shown
from ...core.smashed_scene import SmashedScene
from .codec import HEAD_BYTES, check_codec, declared_raw_bytes, encode_scene, max_raw_bytes
from .manifest import (
    MAX_MEMBERS,
    MEMBER_SUFFIX,
    TAR_BLOCK,
    TAR_TRAILER,
    BrokenShard,
    ShardManifest,
    ShardMember,
    open_regular,
    tar_padding,
    tar_size,
)
from .sampling import EVERY_SCAN, SceneSampling

MAX_SHARD_RAW_BYTES = 1 << 30
"""Bytes that the scenes of one shard may have together after decompression. Ingest takes 12 s (fp16) to 25 s (int8) of one core for a
GiB of full scenes, so no upload costs a server minutes: a file of 15 MB could otherwise hold 10,000 scenes with every cell occupied, and take
half an hour. A writer closes a shard before it reaches the limit."""


class ShardJournal(Protocol):
    """Told about every shard, before it appears and after, so that a vehicle knows after a kill which scans are in finished shards."""

    def pending(self, stem: str, scene_ids: Sequence[str]) -> None:
        """Note durably that a shard is about to appear. It is complete on the disk under temporary names (`staged_names`).

        Args:
            stem: Name of its files without suffix.
            scene_ids: The scenes in it.

        Raises:
            OSError: The note cannot be written; the shard does not appear.
        """

    def published(self, stem: str) -> None:
        """Note that the shard has appeared.

        Args:
            stem: Name of its files without suffix.

        Raises:
            OSError: The note cannot be written.
        """


def staged_names(stem: str) -> tuple[str, str]:
    """Give the temporary names of a shard that is complete and has not appeared yet.

    Args:
        stem: Name of its files without suffix.

    Returns:
        Names of tar and manifest in the folder of the shards.
    """
    return f".{stem}.tar.tmp", f".{stem}.json.tmp"


class ShardWriteError(UpcycleError):
    """A shard could not be written (disk full, no permission). Finished shards are untouched."""


@dataclass(frozen=True, kw_only=True)
class SceneKind:
    """What all scenes of one shard have in common. Scenes of two kinds never share a shard."""

    spec: CutSpec
    """The cut where the features were taken."""

    encoder_fingerprint: str
    """Fingerprint of the encoder and rig, 64 hexadecimal digits."""

    codec: str
    """How features are stored: "fp16" or "int8"."""

    def differences(self, expected: SceneKind) -> str:
        """Say in which points two kinds differ.

        Args:
            expected: The kind to compare with.

        Returns:
            One phrase for each difference; empty if the kinds are equal.
        """
        parts = []
        if self.encoder_fingerprint != expected.encoder_fingerprint:
            parts.append(f"encoder fingerprint {self.encoder_fingerprint[:8]}…, expected {expected.encoder_fingerprint[:8]}…")
        if self.codec != expected.codec:
            parts.append(f"codec {self.codec}, expected {expected.codec}")
        for name in (f.name for f in fields(CutSpec)):
            own, other = getattr(self.spec, name), getattr(expected.spec, name)
            if own != other:
                parts.append(f"{name} of the cut {own}, expected {other}")
        return "; ".join(parts)


def _tar_header(name: str, length: int) -> bytes:
    """The one header a member may have: a plain file, no time, no user, fixed mode."""
    info = tarfile.TarInfo(name)
    info.size = length  # mtime, uid, gid are 0 and names empty by default
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def stage_shard(folder: Path, kind: SceneKind, blobs: Sequence[bytes], sampling: SceneSampling = EVERY_SCAN) -> ShardManifest:
    """Write tar and manifest of a shard, complete and durable, under temporary names (`staged_names`).

    Args:
        folder: Where the shard will appear.
        kind: Kind of its scenes.
        blobs: The encoded scenes in the order of the tar. The caller has put them into random order.
        sampling: The rule by which scans were left out before.

    Returns:
        The manifest.

    Raises:
        OSError: The files cannot be written; nothing of them stays.
    """
    members, chunks, offset = [], [], 0
    for blob in blobs:
        digest = hashlib.sha256(blob).hexdigest()
        name = digest[:32] + MEMBER_SUFFIX
        members.append(ShardMember(name=name, offset=offset + TAR_BLOCK, length=len(blob), sha256=digest))
        chunks += [_tar_header(name, len(blob)), blob, tar_padding(len(blob))]
        offset += TAR_BLOCK + len(blob) + len(tar_padding(len(blob)))
    chunks.append(TAR_TRAILER)
    whole = hashlib.sha256()
    for chunk in chunks:
        whole.update(chunk)
    manifest = ShardManifest(
        spec=kind.spec,
        encoder_fingerprint=kind.encoder_fingerprint,
        codec=kind.codec,
        members=tuple(members),
        tar_sha256=whole.hexdigest(),
        tar_bytes=tar_size(members),
        sampling=sampling,
    )
    halves = [folder / name for name in staged_names(manifest.stem)]
    try:
        for half, content in zip(halves, (chunks, [manifest.to_json()]), strict=True):
            write_atomically(half, content)
    except OSError:
        for half in halves:
            with suppress(OSError):
                half.unlink(missing_ok=True)
        raise
    return manifest


@dataclass(frozen=True, kw_only=True)
class AddedScene:
    """What adding one scene to a shard cost."""

    length: int
    """Bytes of the encoded scene."""

    encode_ms: float
    """Milliseconds to quantize and encode it."""

    write_ms: float
    """Milliseconds on the disk; about 0 unless this scene filled a shard."""


class ShardWriter:
    """Collects encoded scenes in memory, at most one shard of them, and writes them as shards into a folder.

    Use it as a context manager: leaving it writes the rest. After a `ShardWriteError` the scenes wait in memory: make room and
    call `flush` again. Both files of a shard are written under temporary names and renamed, the manifest last.

    Args:
        folder: Where the shards are written; it is made where needed.
        spec: The cut of all scenes.
        fingerprint: Their encoder fingerprint.
        codec: How their features are stored: "fp16" or "int8".
        scenes_per_shard: Number of scenes after which a shard is written. Larger shards are fewer files; smaller ones lose less
            when the vehicle loses power.
        max_bytes: Size after which a shard is written, also with fewer scenes.
        max_seconds: Seconds after which a shard is written, also with fewer scenes; looked at when a scene is added. None means no
            limit.
        journal: Told about every shard before and after it appears.
        sampling: The rule by which scans were left out before; the manifest records it.

    Raises:
        InvalidInput: The codec is unknown, `scenes_per_shard` is outside 1..10000, or `max_seconds` is not positive.
        ShardWriteError: The folder cannot be made.

    Example:
        ```python
        extractor = Extractor.from_file("runs/source", rig=RigSpec(z_shift=1.73), codec="int8")
        with extractor.shard_writer("upload") as writer:
            report = extract(scans, extractor, writer)
        ```
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        spec: CutSpec,
        fingerprint: str,
        codec: str,
        scenes_per_shard: int = 256,
        max_bytes: int = 256 << 20,
        max_seconds: float | None = None,
        journal: ShardJournal | None = None,
        sampling: SceneSampling = EVERY_SCAN,
    ) -> None:
        if not 1 <= scenes_per_shard <= MAX_MEMBERS:
            raise InvalidInput(f"scenes_per_shard must be 1..{MAX_MEMBERS}, found {scenes_per_shard}")
        if max_seconds is not None and not max_seconds > 0:
            raise InvalidInput(f"a shard must stay open for a positive number of seconds, found {max_seconds}")
        check_codec(codec)
        self._folder = Path(folder)
        self.kind = SceneKind(spec=spec, encoder_fingerprint=fingerprint, codec=codec)
        self._scenes_per_shard = scenes_per_shard
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._max_raw_bytes = max(MAX_SHARD_RAW_BYTES, max_raw_bytes(spec))
        self._journal = journal
        self._sampling = sampling
        self._blobs: list[bytes] = []
        self._scene_ids: list[str] = []
        self._raw_bytes = 0
        self._opened = 0.0
        self._staged: ShardManifest | None = None
        self._shards: list[Path] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardWriteError(f"cannot make the folder {folder} for shards: {error}") from error

    @property
    def shards(self) -> tuple[Path, ...]:
        """The manifest files of all finished shards, in order of writing."""
        return tuple(self._shards)

    def add(self, scene: SmashedScene) -> AddedScene:
        """Encode a scene and keep it for the current shard; write the shard when it is full.

        Args:
            scene: A scene of this writer's cut, encoder and codec.

        Returns:
            What it cost.

        Raises:
            InvalidInput: The scene is of another cut, encoder or codec, or is in this shard already.
            FeatureOverflow: A feature is beyond half precision.
            ShardWriteError: The full shard could not be written; the scene waits in memory.
        """
        kind = SceneKind(spec=scene.spec, encoder_fingerprint=scene.encoder_fingerprint, codec=scene.codec)
        if kind != self.kind:
            raise InvalidInput(
                f"one shard holds one kind of scene, and this scene has {kind.differences(self.kind)}; use another writer"
            )
        start = time.perf_counter()
        blob = encode_scene(scene)
        if blob in self._blobs:
            raise InvalidInput(f"scene {scene.scene_id} is in this shard already; a scene is added once")
        encoded = time.perf_counter()
        raw = declared_raw_bytes(blob[:HEAD_BYTES])
        # An earlier flush failed: try again before memory grows. Or the shard would be one that no server reads.
        if self._staged is not None or self._full() or self._raw_bytes + raw > self._max_raw_bytes:
            self.flush()
        if not self._blobs:
            self._opened = time.monotonic()
        self._blobs.append(blob)
        self._scene_ids.append(scene.scene_id)
        self._raw_bytes += raw
        if self._full():
            self.flush()
        done = time.perf_counter()
        return AddedScene(length=len(blob), encode_ms=1e3 * (encoded - start), write_ms=1e3 * (done - encoded))

    def _full(self) -> bool:
        if not self._blobs:
            return False
        late = self._max_seconds is not None and time.monotonic() - self._opened >= self._max_seconds
        return late or len(self._blobs) >= self._scenes_per_shard or sum(map(len, self._blobs)) >= self._max_bytes

    @property
    def next_fills(self) -> bool:
        """Whether the next scene fills the current shard, so that it is written."""
        return len(self._blobs) + 1 >= self._scenes_per_shard

    def discard(self) -> int:
        """Drop the scenes that wait in memory and are in no finished shard, so that leaving the writer does not write them.

        Returns:
            Number of scenes dropped.
        """
        dropped = len(self._blobs)
        self._forget()
        return dropped

    def _forget(self) -> None:
        self._blobs.clear()
        self._scene_ids.clear()
        self._raw_bytes = 0
        self._staged = None

    def flush(self) -> None:
        """Write the scenes in memory as a shard, if there are any.

        Raises:
            ShardWriteError: The shard could not be written; the scenes stay in memory.
        """
        if not self._blobs:
            return
        manifest = self._staged
        try:
            if manifest is None:
                manifest = self._stage()
            self._staged = manifest  # an interrupt in the middle must not write the scenes a second time
            if self._journal is not None:
                # From here on the temporary files stay, whatever happens: after a kill, they and the journal say together whether
                # the shard appeared, and it appears then if it had not.
                self._journal.pending(manifest.stem, self._scene_ids)
            self._publish(manifest)
            if self._journal is not None:
                self._journal.published(manifest.stem)
        except OSError as error:
            raise ShardWriteError(
                f"cannot write a shard of {len(self._blobs)} scenes into {self._folder}: {error}; the {len(self._shards)} shards finished before "
                "are intact. Make room and go on: give the same command with --resume, or in a program of your own call flush() again"
            ) from error
        self._shards.append(self._folder / f"{manifest.stem}.json")
        self._forget()

    def _stage(self) -> ShardManifest:
        """Write tar and manifest, complete and durable, under temporary names."""
        secrets.SystemRandom().shuffle(self._blobs)
        return stage_shard(self._folder, self.kind, self._blobs, self._sampling)

    def _publish(self, manifest: ShardManifest) -> None:
        """Let a staged shard appear. It may be called again after it was interrupted; without a journal a failure takes all back."""
        finals = [self._folder / manifest.tar_name, self._folder / f"{manifest.stem}.json"]
        halves = [self._folder / name for name in staged_names(manifest.stem)]
        try:
            for half, final in zip(halves, finals, strict=True):
                if half.exists():
                    os.replace(half, final)
            sync_folder(self._folder)
        except OSError:
            if self._journal is None:  # one half without the other is only lost space
                self._staged = None
                for path in (*reversed(finals), *halves):
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, ShardWriteError):  # whatever else went wrong, the scenes in memory are good
            self.flush()


def read_members(tar: str | Path, manifest: ShardManifest) -> Iterator[tuple[ShardMember, bytes]]:
    """Read the scenes of a shard in the order of the tar, each checked against the manifest; memory holds one at a time.

    Running to the end proves the whole tar: its size, every header, hash, padding, the trailer, and the hash of everything.

    Args:
        tar: The tar file.
        manifest: Its manifest.

    Yields:
        Each member and the bytes of its encoded scene, for `decode_scene`.

    Raises:
        BrokenShard: The tar differs from its manifest; raised at the first difference.
    """
    descriptor = open_regular(Path(tar))
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size != manifest.tar_bytes:
            kind = "cut off" if size < manifest.tar_bytes else "followed by other data"
            raise BrokenShard(f"the tar has {size} bytes, its manifest implies {manifest.tar_bytes}: it is {kind}")
        raw = sum(declared_raw_bytes(os.pread(descriptor, min(HEAD_BYTES, m.length), m.offset)) for m in manifest.members)
        limit = max(MAX_SHARD_RAW_BYTES, max_raw_bytes(manifest.spec))
        if raw > limit:
            raise BrokenShard(
                f"the {len(manifest.members)} scenes of the shard have {raw:,} bytes after decompression, and a shard may have {limit:,}; "
                "reading it would take minutes: write smaller shards (--scenes-per-shard)"
            )
        whole = hashlib.sha256()
        for index, member in enumerate(manifest.members):
            header = file.read(TAR_BLOCK)
            if header != _tar_header(member.name, member.length):
                raise BrokenShard(f"member {index} ({member.name}): {_describe_header(header)}")
            blob = file.read(member.length)
            padding = file.read(len(tar_padding(member.length)))
            if hashlib.sha256(blob).hexdigest() != member.sha256:
                raise BrokenShard(
                    f"member {index} ({member.name}): the SHA-256 of its {member.length} bytes differs from the manifest"
                )
            if padding != tar_padding(member.length):
                raise BrokenShard(f"member {index} ({member.name}): the padding after it is not zero")
            for part in (header, blob, padding):
                whole.update(part)
            yield member, blob
        trailer = file.read(len(TAR_TRAILER) + 1)
        whole.update(trailer)
        if trailer != TAR_TRAILER:
            raise BrokenShard("the end of the tar is not two blocks of zeros")
        if whole.hexdigest() != manifest.tar_sha256:
            raise BrokenShard("the SHA-256 of the tar differs from the manifest")


def _describe_header(header: bytes) -> str:
    """Why a tar header is refused, for a message."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.HeaderError as error:
        return f"its tar header is damaged ({shown(error)})"
    if info.issym() or info.islnk():
        return f"its tar header is a link to {shown(info.linkname, most=80)!r}; links are refused"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return f"its tar header names {shown(info.name, most=80)!r}; absolute names and '..' are refused"
    return (
        f"its tar header differs from the zeroed one that the manifest implies (name {shown(info.name, most=80)!r}, {info.size} bytes, "
        f"type {info.type!r}, time {info.mtime}, user {info.uid})"
    )
