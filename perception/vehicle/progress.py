"""What `extract` has done so far, in a file, so that it can go on after a kill and never makes two scenes of one scan.

    OUT.progress.json     scan -> scene id, shard, size and digest of the scan; the shard that is about to appear; with a sampling
                          rule also which scans it chose and which it keeps on the vehicle
    receipts (optional)   scene id -> scan, a list for `upcycle --truth`; several runs may share one

The file lies beside the folder of shards, not in it, because the folder is uploaded and the file says which scene is of which
scan. A shard and its note change together, in this order:

1. tar and manifest are written completely under temporary names;
2. the progress file names the shard as pending, with its scans;
3. both are renamed, the manifest last;
4. the receipts get the scenes, and the shard is no longer pending.

After a kill, the next run looks at the pending shard. If its temporary manifest is still there, step 3 did not end, and it is
done now; if it is not, the shard has appeared (and may have been uploaded and removed since). A kill before step 2 leaves temporary
files that nothing names: they are removed, and their scans are extracted again. So every scan is in one shard, in no other.

Read next: `perception/wire/shards.py`, whose writer calls this journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...core.config_json import config_from_json
from ...core.errors import InvalidInput
from ...core.files import check_input_file, locked_folder, remove_litter, sync_folder, write_atomically
from ...core.strict_json import strict_json
from ..wire.shards import staged_names

PROGRESS_SUFFIX = ".progress.json"
_FORMAT = "upcycle3d extraction 1"
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ExtractedScan:
    """A scan that became a scene in a finished shard."""

    scene: str
    """Identifier of its scene."""
    shard: str
    """Name of the shard's files without suffix."""
    size: int
    """Bytes of the scan's file; of a prepared frame, bytes of its points."""
    sha256: str
    """SHA-256 of these bytes."""


@dataclass(frozen=True, kw_only=True)
class ScanIdentity:
    """What a scan was when it was extracted."""

    size: int
    """Bytes of the scan's file; of a prepared frame, bytes of its points."""
    sha256: str
    """SHA-256 of these bytes."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """The content of a progress file."""

    format: str
    encoder_fingerprint: str
    scans: Mapping[str, ExtractedScan]
    pending: str | None = None
    sampled: Mapping[str, bool] = field(default_factory=dict)
    """Scans that a sampling rule chose (true) or keeps on the vehicle (false)."""


class ExtractionProgress:
    """Progress and receipts of one `extract`; the journal of its shard writer. Made by `open_progress`.

    Attributes:
        path: The progress file.
    """

    def __init__(self, path: Path, shards: Path, receipts: Path | None, file: _File) -> None:
        self.path = path
        self._shards = shards
        self._receipts = receipts
        self._file = file
        self._smashed: dict[str, tuple[str, ScanIdentity]] = {}

    @property
    def scans(self) -> Mapping[str, ExtractedScan]:
        """The scans that are in finished shards, by name."""
        return self._file.scans

    @property
    def sampled(self) -> Mapping[str, bool]:
        """What a sampling rule decided about scans: true to upload one, false to keep it on the vehicle."""
        return self._file.sampled

    def decide(self, sampled: Mapping[str, bool]) -> None:
        """Note durably what a sampling rule decided, before any of these scans is extracted.

        Args:
            sampled: Name of a scan to whether it is uploaded. Decisions noted before stay.

        Raises:
            OSError: The note cannot be written.
        """
        merged = {**sampled, **self._file.sampled}
        if merged != self._file.sampled:
            self._write(replace(self._file, sampled=merged))

    def smashed(self, scene_id: str, scan: str, identity: ScanIdentity) -> None:
        """Remember which scan a scene is of, before it is added to a shard.

        Args:
            scene_id: Identifier of the scene.
            scan: Name of the scan.
            identity: What the scan was.
        """
        self._smashed[scene_id] = (scan, identity)

    def pending(self, stem: str, scene_ids: Sequence[str]) -> None:
        """Note that a shard is about to appear (`ShardJournal`).

        Args:
            stem: Name of its files without suffix.
            scene_ids: The scenes in it.
        """
        new = {}
        for scene in scene_ids:
            scan, identity = self._smashed[scene]
            new[scan] = ExtractedScan(scene=scene, shard=stem, **asdict(identity))
        self._write(replace(self._file, scans={**self._file.scans, **new}, pending=stem))

    def published(self, stem: str) -> None:
        """Note that a shard has appeared (`ShardJournal`), after its scenes are in the receipts.

        Args:
            stem: Name of its files without suffix.
        """
        self.merge_receipts()
        self._write(replace(self._file, pending=None))
        self._smashed = {k: v for k, v in self._smashed.items() if v[0] not in self._file.scans}

    def merge_receipts(self) -> None:
        """Add all scenes of finished shards to the receipts, and keep what others put there."""
        if self._receipts is None:
            return
        with locked_folder(self._receipts.absolute().parent, "", wait=True, name=f".{self._receipts.name}.lock"):
            before = read_receipts(self._receipts)
            merged = before | {done.scene: scan for scan, done in self.scans.items()}
            if merged != before or not self._receipts.exists():
                write_atomically(self._receipts, json.dumps(merged, indent=1).encode())

    def _write(self, file: _File) -> None:
        record = asdict(file)
        if not file.sampled:  # without a rule the file is that of earlier versions
            del record["sampled"]
        write_atomically(self.path, json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file = file

    def _recover(self) -> None:
        """Let a shard appear that a killed run had finished, and remove what no note names."""
        stem = self._file.pending
        if stem is not None:
            tar, manifest = staged_names(stem)
            if (self._shards / manifest).exists():
                if (self._shards / tar).exists():
                    os.replace(self._shards / tar, self._shards / f"{stem}.tar")
                if (self._shards / f"{stem}.tar").exists():
                    os.replace(self._shards / manifest, self._shards / f"{stem}.json")
                    sync_folder(self._shards)
                else:  # somebody removed the tar; its scans are extracted again
                    self._write(replace(self._file, scans={k: v for k, v in self.scans.items() if v.shard != stem}, pending=None))
        self.merge_receipts()
        if self._file.pending is not None:
            self._write(replace(self._file, pending=None))
        for name in _staged_in(self._shards):
            with suppress(FileNotFoundError):
                (self._shards / name).unlink()


def _staged_in(folder: Path) -> list[str]:
    parts = [(entry, entry.name.split(".")) for entry in folder.iterdir()]
    return [
        e.name for e, p in parts if len(p) == 4 and p[0] == "" and len(p[1]) == 32 and p[2] in ("tar", "json") and p[3] == "tmp"
    ]


@contextmanager
def open_progress(
    shards: Path, *, encoder_fingerprint: str, path: Path | None = None, receipts: Path | None = None
) -> Iterator[ExtractionProgress]:
    """Open the progress of an extraction, complete what a killed run left, and keep other runs out until the block ends.

    Args:
        shards: Folder of the shards; it is made.
        encoder_fingerprint: Fingerprint of the encoder that runs. One progress file is of one encoder.
        path: The progress file; by default `<shards>.progress.json` beside the folder.
        receipts: File that gets a list of scene ids with their scans.

    Yields:
        The progress, to be given to `Extractor.shard_writer` as the journal.

    Raises:
        InvalidInput: The progress file or the receipts are damaged, or the progress is that of another encoder.
        UpcycleError: Another run uses the same folder or file.
        OSError: A file cannot be written.
    """
    path = default_progress_path(shards) if path is None else path
    with ExitStack() as locks:
        busy = f"another extract is writing into {shards}; wait for it to end, or give another --out"
        locks.enter_context(locked_folder(shards, busy))
        busy = f"another extract is using {path}; wait for it to end, or give another --progress"
        locks.enter_context(locked_folder(path.absolute().parent, busy, name=f".{path.name}.lock"))
        file = _read(path) or _File(format=_FORMAT, encoder_fingerprint=encoder_fingerprint, scans={})
        if file.encoder_fingerprint != encoder_fingerprint:
            raise InvalidInput(
                f"{path} is of an extraction with encoder {file.encoder_fingerprint[:12]}…, and this one has {encoder_fingerprint[:12]}…: "
                "give the same --detector and rig, or a new folder with --out (docs/rollout.md)"
            )
        if receipts is not None:
            read_receipts(receipts)  # damaged ones are refused before any work
        remove_litter(shards)
        progress = ExtractionProgress(path, shards, receipts, file)
        progress._recover()
        yield progress


def default_progress_path(shards: Path) -> Path:
    """Give the usual place of the progress file of a folder of shards: beside it.

    Args:
        shards: Folder of the shards.

    Returns:
        `<shards>.progress.json`.
    """
    shards = shards.absolute()
    return shards.with_name(f"{shards.name}{PROGRESS_SUFFIX}")


def read_receipts(path: Path) -> dict[str, str]:
    """Read a list of receipts.

    Args:
        path: The file; it may be missing.

    Returns:
        Scene id to scan; empty without a file.

    Raises:
        InvalidInput: The file is not such a list.
    """
    remedy = "give another file with --receipts, or move this one away"
    found = _json(path, remedy)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise InvalidInput(f"{path} is not a list of receipts (scene ids with names of scans); {remedy}")
    return found


def _read(path: Path) -> _File | None:
    remedy = (
        "it says which scans are in shards already; restore a copy, or begin again with a new --out (shards that were uploaded hold "
        "their scans once more then)"
    )
    found = _json(path, remedy)
    if found is None:
        return None
    try:
        file = config_from_json(_File, found)
    except InvalidInput as error:
        raise InvalidInput(f"{path} is not the progress of an extraction: {error}; {remedy}") from error
    if file.format != _FORMAT:
        raise InvalidInput(f"{path} is not the progress of an extraction of this version; {remedy}")
    return file


def _json(path: Path, remedy: str) -> Any:
    check_input_file(path, "list of scans")
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InvalidInput(f"{path} has {size:,} bytes, more than any list of scans; {remedy}")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return strict_json(data, str(path))
    except InvalidInput as error:
        raise InvalidInput(f"{error}; {remedy}") from error
