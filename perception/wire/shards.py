"""Smashed shards: many encoded scenes in one immutable file, and the manifest that makes them readable.

    <hash>.tar    plain WebDataset tar, one <hash>.safetensors.zst per scene, headers zeroed, members in random order
    <hash>.json   its manifest (``manifest.py``)

A shard is exactly the bytes that its manifest implies: a reader rebuilds every tar header from name and length and compares.
So links, absolute names, trailing data and missing members need no rule of their own. Names come from content hashes, headers
hold no time and no user, the order is random: neither time nor vehicle can be read from the bytes of a shard. A tar without
its manifest is not a shard; both are written to a temporary name, fsynced and renamed, the manifest last.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ...core.cut import CutSpec
from ...core.errors import InvalidInput, UpcycleError
from ...core.files import write_atomically
from ...core.smashed_scene import SmashedScene
from .codec import CODECS, encode_scene
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


class ShardWriteError(UpcycleError):
    """A shard could not be written (disk full, no permission). Finished shards are untouched."""


def _tar_header(name: str, length: int) -> bytes:
    """The one header a member may have: a plain file, no time, no user, fixed mode."""
    info = tarfile.TarInfo(name)
    info.size = length  # mtime, uid, gid are 0 and names empty by default
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What adding one scene cost: encoded length (bytes), time to quantise and encode (ms), time on the disk (ms)."""

    length: int
    encode_ms: float
    write_ms: float


class ShardWriter:
    """Collects encoded scenes in memory, at most one shard of them, and writes them as shards into ``folder``.

    scenes_per_shard: a shard is closed when it holds so many scenes, or when ``max_bytes`` are reached. More scenes hide each
    other's order better; fewer lose less when the vehicle loses power. Use as a context manager: leaving it writes the rest.

    After a ``ShardWriteError`` the scenes wait in memory: make room and call ``flush`` again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        spec: CutSpec,
        fingerprint: str,
        codec: str,
        scenes_per_shard: int = 256,
        max_bytes: int = 256 << 20,
    ) -> None:
        if not 1 <= scenes_per_shard <= MAX_MEMBERS:
            raise InvalidInput(f"scenes_per_shard must be 1..{MAX_MEMBERS}, found {scenes_per_shard}")
        if codec not in CODECS:
            raise InvalidInput(f"unknown codec {codec!r}; choose one of {CODECS}")
        self._folder = folder
        self.kind = (spec, fingerprint, codec)  # what every scene of these shards is
        self._scenes_per_shard = scenes_per_shard
        self._max_bytes = max_bytes
        self._blobs: list[bytes] = []
        self._shards: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardWriteError(f"cannot make the folder {folder} for shards: {error}") from error

    @property
    def shards(self) -> tuple[Path, ...]:
        """The manifests of all finished shards, in order of writing."""
        return tuple(self._shards)

    def add(self, scene: SmashedScene) -> Written:
        """Encode ``scene`` and keep it for the current shard; writes the shard when it is full.

        Raises ``InvalidInput`` for a scene of another cut, encoder or codec, ``FeatureOverflow``, or ``ShardWriteError``.
        """
        kind = (scene.spec, scene.encoder_fingerprint, scene.codec)
        if kind != self.kind:
            raise InvalidInput(f"the scene is of {kind}, this shard of {self.kind}; one shard holds one kind: use another writer")
        start = time.perf_counter()
        blob = encode_scene(scene)
        if blob in self._blobs:
            raise InvalidInput(f"scene {scene.scene_id} is in this shard already; a scene is added once")
        encoded = time.perf_counter()
        if self._full():  # an earlier flush failed; try again before memory grows
            self.flush()
        self._blobs.append(blob)
        if self._full():
            self.flush()
        done = time.perf_counter()
        return Written(length=len(blob), encode_ms=1e3 * (encoded - start), write_ms=1e3 * (done - encoded))

    def _full(self) -> bool:
        return len(self._blobs) >= self._scenes_per_shard or sum(map(len, self._blobs)) >= self._max_bytes

    def flush(self) -> None:
        """Write the scenes in memory as a shard, if there are any. Raises ``ShardWriteError``, keeping them."""
        if not self._blobs:
            return
        spec, fingerprint, codec = self.kind
        secrets.SystemRandom().shuffle(self._blobs)
        members, chunks, offset = [], [], 0
        for blob in self._blobs:
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
            spec=spec,
            encoder_fingerprint=fingerprint,
            codec=codec,
            members=tuple(members),
            tar_sha256=whole.hexdigest(),
            tar_bytes=tar_size(members),
        )
        path, tar = self._folder / f"{manifest.stem}.json", self._folder / manifest.tar_name
        try:
            write_atomically(tar, chunks)
            write_atomically(path, [manifest.to_json()])
        except OSError as error:
            for half in (path, tar):  # one without the other is only lost space
                with suppress(OSError):
                    half.unlink(missing_ok=True)
            raise ShardWriteError(
                f"cannot write a shard of {len(members)} scenes ({manifest.tar_bytes} bytes) into {self._folder}: {error}; "
                f"the {len(self._shards)} shards finished before are intact; make room, then flush again"
            ) from error
        self._shards.append(path)
        self._blobs.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, ShardWriteError):  # whatever else went wrong, the scenes in memory are good
            self.flush()


def read_members(tar: Path, manifest: ShardManifest) -> Iterator[tuple[ShardMember, bytes]]:
    """Every member's blob in tar order, checked against ``manifest``; memory holds one at a time.

    Running to the end proves the whole tar: size, every header, hash, padding, trailer, and the hash over all. Raises
    ``BrokenShard`` at the first difference.
    """
    descriptor = open_regular(tar)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size != manifest.tar_bytes:
            kind = "cut off" if size < manifest.tar_bytes else "followed by other data"
            raise BrokenShard(f"the tar has {size} bytes, its manifest implies {manifest.tar_bytes}: it is {kind}")
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
                raise BrokenShard(f"member {index} ({member.name}): the padding behind it is not zero")
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
    """Why a tar header is refused, in words."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.HeaderError as error:
        return f"its tar header is damaged ({error})"
    if info.issym() or info.islnk():
        return f"its tar header is a link to {info.linkname[:80]!r}; links are refused"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return f"its tar header names {info.name[:80]!r}; absolute names and '..' are refused"
    return (
        f"its tar header differs from the zeroed one that the manifest implies (name {info.name[:80]!r}, {info.size} bytes, "
        f"type {info.type!r}, time {info.mtime}, user {info.uid})"
    )
