"""The manifest of a shard: what it must hold, and how a manifest from outside is read.

One canonical JSON file beside each tar holds the schema version, the cut, the encoder fingerprint, the codec, and the place, the length
and the SHA-256 of every member. The layout of the tar follows from it (names, lengths, order), so every number that the manifest
declares is compared with the others before a byte of the tar is read.

Read next: `shards.py`, which writes and reads the tar.
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
from ...core.errors import InvalidInput, UpcycleError
from ...core.foreign_text import shown
from ...core.smashed_scene import SMASHED_SCHEMA_VERSION
from ...core.strict_json import canonical_json, strict_json
from .codec import CODECS, FINGERPRINT_PATTERN, ForeignScene, max_encoded_bytes
from .cut_json import CorruptScene, cut_from_json, cut_to_json
from .sampling import EVERY_SCAN, SceneSampling

SCHEMA = "upcycle3d.smashed_shard"
MEMBER_SUFFIX = ".safetensors.zst"
MAX_MEMBERS = 10_000
MAX_MANIFEST_BYTES = 4 << 20

TAR_BLOCK = 512
TAR_TRAILER = bytes(2 * TAR_BLOCK)
_MEMBER_NAME = re.compile(r"[0-9a-f]{32}\.safetensors\.zst")
_MANIFEST_KEYS = {"schema", "schema_version", "split", "encoder_fingerprint", "codec", "count", "tar", "members"}
_SAMPLING_KEY = "sampling"  # only where a rule left scans out


class BrokenShard(UpcycleError):
    """A shard that is not what its manifest says, or a manifest that cannot be accepted."""


class DuplicateScene(BrokenShard):
    """A shard with a scene that it, or the store, holds already."""


@dataclass(frozen=True, kw_only=True)
class ShardMember:
    """One encoded scene in a shard."""

    name: str
    """File name in the tar: the first 32 digits of `sha256`, and `MEMBER_SUFFIX`."""

    offset: int
    """First byte of the encoded scene in the tar."""

    length: int
    """Bytes of the encoded scene."""

    sha256: str
    """SHA-256 of the encoded scene, 64 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """What a shard holds."""

    spec: CutSpec
    """The cut of all its scenes."""

    encoder_fingerprint: str
    """Fingerprint of the encoder that made them, 64 hexadecimal digits."""

    codec: str
    """How their features are stored: "fp16" or "int8"."""

    members: tuple[ShardMember, ...]
    """The scenes in the order of the tar."""

    tar_sha256: str
    """SHA-256 of the whole tar, 64 hexadecimal digits."""

    tar_bytes: int
    """Bytes of the whole tar."""

    sampling: SceneSampling = EVERY_SCAN
    """The rule by which scans were left out before."""

    @property
    def stem(self) -> str:
        """The name of both files without their suffix: the first 32 digits of the tar's SHA-256."""
        return self.tar_sha256[:32]

    @property
    def tar_name(self) -> str:
        """The file name of the tar."""
        return f"{self.stem}.tar"

    def to_json(self) -> bytes:
        """Write the manifest file: one line of canonical JSON."""
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": SMASHED_SCHEMA_VERSION,
            "split": cut_to_json(self.spec),
            "encoder_fingerprint": self.encoder_fingerprint,
            "codec": self.codec,
            "count": len(self.members),
            "tar": {"name": self.tar_name, "bytes": self.tar_bytes, "sha256": self.tar_sha256},
            "members": [{"name": m.name, "offset": m.offset, "length": m.length, "sha256": m.sha256} for m in self.members],
        }
        if not self.sampling.every_scan:
            record[_SAMPLING_KEY] = {"gap": self.sampling.gap, "share": self.sampling.share}
        return canonical_json(record) + b"\n"


def tar_padding(length: int) -> bytes:
    """Make the zeros that follow a member, up to the next block of the tar.

    Args:
        length: Bytes of the member.

    Returns:
        0 to 511 zeros.
    """
    return bytes(-length % TAR_BLOCK)


def tar_size(members: Iterable[ShardMember]) -> int:
    """Compute the size of a tar: a header block and padded data for each member, then the trailer.

    Args:
        members: The members.

    Returns:
        Bytes.
    """
    return sum(TAR_BLOCK + m.length + len(tar_padding(m.length)) for m in members) + len(TAR_TRAILER)


def open_regular(path: Path) -> int:
    """Open a plain file for reading.

    Args:
        path: The file.

    Returns:
        A file descriptor; the caller closes it.

    Raises:
        BrokenShard: The path is a link, a pipe or a device.
        OSError: The file is missing or cannot be opened.
    """
    if path.is_symlink():
        raise BrokenShard(f"{path} is a link; only plain files are read")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BrokenShard(f"{path} is not a plain file; only plain files are read")
    return descriptor


def _whole(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise BrokenShard(f"{what} must be a whole number in {low}..{high}, found {shown(value, most=40)}")
    return value


def _hash(value: Any, what: str) -> str:
    if not isinstance(value, str) or not FINGERPRINT_PATTERN.fullmatch(value):
        raise BrokenShard(f"{what} must be 64 hexadecimal digits, found {shown(value, most=80)!r}")
    return value


def _keys(record: Any, keys: set[str], what: str) -> None:
    if not isinstance(record, dict) or record.keys() != keys:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise BrokenShard(f"{what} must hold exactly {sorted(keys)}, found {shown(found, most=200)}")


def _member(record: Any, index: int, offset: int, limit: int) -> ShardMember:
    what = f"the manifest's member {index}"
    _keys(record, {"name", "offset", "length", "sha256"}, what)
    name, digest = record["name"], _hash(record["sha256"], f"{what}: sha256")
    if not isinstance(name, str) or not _MEMBER_NAME.fullmatch(name) or not digest.startswith(name.partition(".")[0]):
        raise BrokenShard(f"{what} must be named after its hash, {digest[:32]}{MEMBER_SUFFIX}, found {shown(name, most=80)!r}")
    length = _whole(record["length"], 1, limit, f"{what}: length")
    if record["offset"] != offset + TAR_BLOCK:
        raise BrokenShard(
            f"{what} declares offset {shown(record['offset'], most=40)}; the members before it put it at {offset + TAR_BLOCK}"
        )
    return ShardMember(name=name, offset=offset + TAR_BLOCK, length=length, sha256=digest)


def _sampling(record: Any) -> SceneSampling:
    _keys(record, {"gap", "share"}, "the manifest's sampling")
    gap, share = record["gap"], record["share"]
    try:
        rule = SceneSampling(gap=gap, share=float(share) if type(share) is int else share)
    except InvalidInput as error:
        raise BrokenShard(f"the manifest's sampling cannot be read: {error}") from error
    if rule.every_scan:
        raise BrokenShard("the manifest names a sampling that leaves no scan out; it is left away then")
    return rule


def parse_manifest(data: bytes) -> ShardManifest:
    """Read a manifest that comes from outside; every field is checked, and all sizes against each other.

    Args:
        data: The bytes of the file; the caller limits their number.

    Returns:
        The manifest.

    Raises:
        ForeignScene: The manifest has another schema version.
        CorruptScene: The bytes are not JSON, or the cut in them is not one.
        BrokenShard: Anything else in it cannot be accepted.
    """
    record = strict_json(data, "the manifest", CorruptScene)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise BrokenShard(f"the manifest is not of a smashed shard: expected schema {SCHEMA!r}")
    if type(record.get("schema_version")) is not int or record["schema_version"] != SMASHED_SCHEMA_VERSION:
        raise ForeignScene(
            f"the shard has schema version {shown(record.get('schema_version'), most=20)}, this reader knows {SMASHED_SCHEMA_VERSION}; "
            "update the older side"
        )
    sampled = _SAMPLING_KEY in record
    _keys(record, _MANIFEST_KEYS | {_SAMPLING_KEY} if sampled else _MANIFEST_KEYS, "the manifest")
    _keys(record["tar"], {"name", "bytes", "sha256"}, "the manifest's tar")
    if record["codec"] not in CODECS:
        raise BrokenShard(f"the manifest's codec must be one of {CODECS}, found {shown(record['codec'], most=80)!r}")
    spec = cut_from_json(record["split"], "the manifest's split")
    if not isinstance(record["members"], list) or not 1 <= len(record["members"]) <= MAX_MEMBERS:
        raise BrokenShard(f"the manifest must list 1..{MAX_MEMBERS} members")
    if record["count"] != len(record["members"]):
        raise BrokenShard(f"the manifest declares {shown(record['count'], most=40)} scenes and lists {len(record['members'])}")
    members: list[ShardMember] = []
    offset = 0
    for index, entry in enumerate(record["members"]):
        members.append(_member(entry, index, offset, max_encoded_bytes(spec)))
        offset = members[-1].offset + members[-1].length + len(tar_padding(members[-1].length))
    if len({m.name for m in members}) != len(members):
        raise DuplicateScene("the manifest lists a member twice; a scene counts once")
    manifest = ShardManifest(
        spec=spec,
        encoder_fingerprint=_hash(record["encoder_fingerprint"], "the manifest's encoder_fingerprint"),
        codec=record["codec"],
        members=tuple(members),
        tar_sha256=_hash(record["tar"]["sha256"], "the manifest's tar sha256"),
        tar_bytes=tar_size(members),
        sampling=_sampling(record[_SAMPLING_KEY]) if sampled else EVERY_SCAN,
    )
    if record["tar"]["name"] != manifest.tar_name:
        raise BrokenShard(
            f"the manifest's tar must be named after its hash, {manifest.tar_name}, found {shown(record['tar']['name'], most=80)!r}"
        )
    if record["tar"]["bytes"] != manifest.tar_bytes:
        raise BrokenShard(
            f"the manifest declares a tar of {shown(record['tar']['bytes'], most=40)} bytes; its members make {manifest.tar_bytes}"
        )
    if data.removesuffix(b"\n") != manifest.to_json().removesuffix(b"\n"):
        raise BrokenShard(
            "the manifest is not canonical JSON: keys in order, no spaces, whole numbers without a point, and one line; write it as "
            "docs/data_format.md says"
        )
    return manifest


def read_manifest(path: str | Path, *, stem: str | None = None) -> ShardManifest:
    """Read and check the manifest of a shard; the size of the file is limited before it is read.

    Args:
        path: The file `<stem>.json`.
        stem: Name that the shard must have; by default that of the file without suffix.

    Returns:
        The manifest.

    Raises:
        BrokenShard: The file is not a plain file, is too large, was renamed, or is not a manifest that can be accepted.
        ForeignScene: The manifest has another schema version.
        CorruptScene: The bytes are not JSON, or the cut in them is not one.

    Example:
        ```python
        manifest = read_manifest(path)
        for member, blob in read_members(path.parent / manifest.tar_name, manifest):
            scene = decode_scene(blob, expected_spec=encoder.spec, expected_fingerprint=fingerprint)
        ```
    """
    path = Path(path)
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > MAX_MANIFEST_BYTES:
            raise BrokenShard(f"the manifest has {size} bytes; at most {MAX_MANIFEST_BYTES} are read")
        manifest = parse_manifest(file.read(MAX_MANIFEST_BYTES + 1))
    if (stem or path.stem) != manifest.stem:
        raise BrokenShard(f"the manifest {path.name} is of shard {manifest.stem}; it was renamed or belongs to another shard")
    return manifest
