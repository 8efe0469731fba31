"""The manifest of a smashed shard: what it must hold, and how one from outside is read.

One JSON file beside each tar: schema version, cut, encoder fingerprint, codec, and place, length and SHA-256 of every member.
The tar's layout follows from it (names, lengths, order), so every number it declares is checked against the others before a
byte of the tar is read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.cut import CutSpec
from ...core.errors import UpcycleError
from ...core.smashed_scene import SMASHED_SCHEMA_VERSION
from ...core.strict_json import canonical_json, strict_json
from .codec import CODECS, FINGERPRINT_PATTERN, ForeignScene, max_encoded_bytes
from .cut_json import CorruptScene, cut_from_json, cut_to_json

SCHEMA = "upcycle3d.smashed_shard"
MEMBER_SUFFIX = ".safetensors.zst"
MAX_MEMBERS = 10_000
MAX_MANIFEST_BYTES = 4 << 20

TAR_BLOCK = 512
TAR_TRAILER = bytes(2 * TAR_BLOCK)
_MEMBER_NAME = re.compile(r"[0-9a-f]{32}\.safetensors\.zst")
_MANIFEST_KEYS = {"schema", "schema_version", "split", "encoder_fingerprint", "codec", "count", "tar", "members"}


class BrokenShard(UpcycleError):
    """A shard that is not what its manifest says, or a manifest that cannot be accepted."""


@dataclass(frozen=True, kw_only=True)
class ShardMember:
    """One scene in a shard: name in the tar, first byte and length of its blob (bytes), SHA-256 of the blob."""

    name: str
    offset: int
    length: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """What a shard holds. members: in tar order. tar_sha256, tar_bytes: of the whole tar. ``stem`` names both files."""

    spec: CutSpec
    encoder_fingerprint: str
    codec: str
    members: tuple[ShardMember, ...]
    tar_sha256: str
    tar_bytes: int

    @property
    def stem(self) -> str:
        return self.tar_sha256[:32]

    @property
    def tar_name(self) -> str:
        return f"{self.stem}.tar"

    def to_json(self) -> bytes:
        """The manifest file, canonical JSON."""
        record = {
            "schema": SCHEMA,
            "schema_version": SMASHED_SCHEMA_VERSION,
            "split": cut_to_json(self.spec),
            "encoder_fingerprint": self.encoder_fingerprint,
            "codec": self.codec,
            "count": len(self.members),
            "tar": {"name": self.tar_name, "bytes": self.tar_bytes, "sha256": self.tar_sha256},
            "members": [{"name": m.name, "offset": m.offset, "length": m.length, "sha256": m.sha256} for m in self.members],
        }
        return canonical_json(record) + b"\n"


def tar_padding(length: int) -> bytes:
    """Zeros behind a member of ``length`` bytes, up to the next tar block."""
    return bytes(-length % TAR_BLOCK)


def tar_size(members: Iterable[ShardMember]) -> int:
    """Bytes of a tar of ``members``: a header block and padded data each, then the trailer."""
    return sum(TAR_BLOCK + m.length + len(tar_padding(m.length)) for m in members) + len(TAR_TRAILER)


def open_regular(path: Path) -> int:
    """A read-only descriptor of a plain file. A link, a pipe or a device raises ``BrokenShard``."""
    if path.is_symlink():
        raise BrokenShard(f"{path} is a link; only plain files are read")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BrokenShard(f"{path} is not a plain file; only plain files are read")
    return descriptor


def _whole(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise BrokenShard(f"{what} must be a whole number in {low}..{high}, found {str(value)[:40]}")
    return value


def _hash(value: Any, what: str) -> str:
    if not isinstance(value, str) or not FINGERPRINT_PATTERN.fullmatch(value):
        raise BrokenShard(f"{what} must be 64 hexadecimal digits, found {str(value)[:80]!r}")
    return value


def _keys(record: Any, keys: set[str], what: str) -> None:
    if not isinstance(record, dict) or record.keys() != keys:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise BrokenShard(f"{what} must hold exactly {sorted(keys)}, found {str(found)[:200]}")


def _member(record: Any, index: int, offset: int, limit: int) -> ShardMember:
    what = f"the manifest's member {index}"
    _keys(record, {"name", "offset", "length", "sha256"}, what)
    name, digest = record["name"], _hash(record["sha256"], f"{what}: sha256")
    if not isinstance(name, str) or not _MEMBER_NAME.fullmatch(name) or not digest.startswith(name.partition(".")[0]):
        raise BrokenShard(f"{what} must be named after its hash, {digest[:32]}{MEMBER_SUFFIX}, found {str(name)[:80]!r}")
    length = _whole(record["length"], 1, limit, f"{what}: length")
    if record["offset"] != offset + TAR_BLOCK:
        raise BrokenShard(
            f"{what} declares offset {str(record['offset'])[:40]}; the members before it put it at {offset + TAR_BLOCK}"
        )
    return ShardMember(name=name, offset=offset + TAR_BLOCK, length=length, sha256=digest)


def parse_manifest(data: bytes) -> ShardManifest:
    """A manifest from outside, every field checked, sizes consistent among themselves.

    Raises ``ForeignScene`` for another schema version, ``CorruptScene`` for what is not JSON, ``BrokenShard`` for the rest.
    """
    record = strict_json(data, "the manifest", CorruptScene)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise BrokenShard(f"the manifest is not of a smashed shard: expected schema {SCHEMA!r}")
    if type(record.get("schema_version")) is not int or record["schema_version"] != SMASHED_SCHEMA_VERSION:
        raise ForeignScene(
            f"the shard has schema version {str(record.get('schema_version'))[:20]}, this reader knows {SMASHED_SCHEMA_VERSION}; "
            "update the older side"
        )
    _keys(record, _MANIFEST_KEYS, "the manifest")
    _keys(record["tar"], {"name", "bytes", "sha256"}, "the manifest's tar")
    if record["codec"] not in CODECS:
        raise BrokenShard(f"the manifest's codec must be one of {CODECS}, found {str(record['codec'])[:80]!r}")
    spec = cut_from_json(record["split"], "the manifest's split")
    if not isinstance(record["members"], list) or not 1 <= len(record["members"]) <= MAX_MEMBERS:
        raise BrokenShard(f"the manifest must list 1..{MAX_MEMBERS} members")
    if record["count"] != len(record["members"]):
        raise BrokenShard(f"the manifest declares {str(record['count'])[:40]} scenes and lists {len(record['members'])}")
    members: list[ShardMember] = []
    offset = 0
    for index, entry in enumerate(record["members"]):
        members.append(_member(entry, index, offset, max_encoded_bytes(spec)))
        offset = members[-1].offset + members[-1].length + len(tar_padding(members[-1].length))
    if len({m.name for m in members}) != len(members):
        raise BrokenShard("the manifest lists a member twice")
    manifest = ShardManifest(
        spec=spec,
        encoder_fingerprint=_hash(record["encoder_fingerprint"], "the manifest's encoder_fingerprint"),
        codec=record["codec"],
        members=tuple(members),
        tar_sha256=_hash(record["tar"]["sha256"], "the manifest's tar sha256"),
        tar_bytes=tar_size(members),
    )
    if record["tar"]["name"] != manifest.tar_name:
        raise BrokenShard(
            f"the manifest's tar must be named after its hash, {manifest.tar_name}, found {str(record['tar']['name'])[:80]!r}"
        )
    if record["tar"]["bytes"] != manifest.tar_bytes:
        raise BrokenShard(
            f"the manifest declares a tar of {str(record['tar']['bytes'])[:40]} bytes; its members make {manifest.tar_bytes}"
        )
    return manifest


def read_manifest(path: Path) -> ShardManifest:
    """``parse_manifest`` of a file called ``<stem>.json``; its size is capped before it is read."""
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > MAX_MANIFEST_BYTES:
            raise BrokenShard(f"the manifest has {size} bytes; at most {MAX_MANIFEST_BYTES} are read")
        manifest = parse_manifest(file.read(MAX_MANIFEST_BYTES + 1))
    if path.stem != manifest.stem:
        raise BrokenShard(f"the manifest {path.name} is of shard {manifest.stem}; it was renamed or belongs to another shard")
    return manifest
