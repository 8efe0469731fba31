"""Mixing at a gateway: the scenes of many vehicles are shuffled into new shards, so that a shard no longer stands for one vehicle.

    vehicle/<hash>.tar ─ verify ─ plan (OUT.mix.json) ─ write, read back ─ OUT/<hash>.tar ─ remove the vehicles' shards

The bytes of a scene stay as they are. What changes is which scenes lie together, and when a shard appears. The gateway itself sees
which vehicle sent what, and the features still tell which scenes are alike (`privacy/attacks/linkage.py`).

The plan says which scene goes where and is written before the first new shard. So a run that dies is completed by the next one: the
plan gives the same bytes, and with them the same names, and no scene comes twice. The vehicles' shards are removed after all new
ones were read back.

Read next: `wire/shards.py` for a shard, `ingest.py` for the server that gets the mixed ones.
"""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...core.config_json import config_from_json
from ...core.errors import InvalidInput, UpcycleError
from ...core.files import locked_folder, remove_litter, sync_folder, write_atomically
from ...core.foreign_text import shown
from ...core.strict_json import strict_json
from ..wire.codec import HEAD_BYTES, declared_raw_bytes, max_raw_bytes
from ..wire.manifest import MAX_MEMBERS, ShardManifest, open_regular, read_manifest
from ..wire.sampling import SceneSampling
from ..wire.shards import MAX_SHARD_RAW_BYTES, SceneKind, read_members, stage_shard, staged_names
from .ingest import verify_shard

PLAN_SUFFIX = ".mix.json"
FEWEST_SHARDS = 2
"""A shard that is mixed with no other one stays with its vehicle's scenes."""
_FORMAT = "upcycle3d mix 1"
_MAX_PLAN_BYTES = 1 << 28
_MAX_BYTES = 256 << 20  # of a new shard, as `ShardWriter` has it


@dataclass(frozen=True, kw_only=True)
class Unmixed:
    """A shard that stays where it is."""

    manifest: str
    """Its manifest file."""

    reason: str
    """Why."""


@dataclass(frozen=True, kw_only=True)
class MixReport:
    """What one run of `mix` did."""

    shards: tuple[str, ...]
    """Names of the new shards without suffix."""

    scenes: int
    """Scenes in them."""

    sources: int
    """Shards that were mixed and removed."""

    unmixed: tuple[Unmixed, ...]
    """Shards that stay where they are: damaged ones, and those without enough others of their kind."""

    completed: bool
    """Whether this run completed one that had died."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One scene: where it lies, and what it is."""

    source: str
    """Manifest file of its shard."""
    name: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """One new shard."""

    pieces: tuple[_Piece, ...]
    stem: str = ""
    """Its name, once it was written."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The content of a plan file."""

    format: str
    sources: tuple[str, ...]
    shards: tuple[_Planned, ...]


def mix(
    incoming: Sequence[str | Path],
    out: str | Path,
    *,
    fewest_shards: int = FEWEST_SHARDS,
    scenes_per_shard: int = 256,
    rng: random.Random | None = None,
) -> MixReport:
    """Mix finished shards of many vehicles into new ones, and remove the old ones. Running this again after a crash is safe.

    Shards of different kinds (encoder, cut, codec, sampling rule) are mixed separately. A damaged shard stays where it is.

    Args:
        incoming: Folders with uploaded shards, one for each vehicle or one for all.
        out: Folder for the new shards; it is made. The plan lies beside it.
        fewest_shards: Shards of one kind that must be there, or they wait for more. A gateway that holds few vehicles hides little.
        scenes_per_shard: Largest number of scenes of a new shard.
        rng: Where chance comes from; None takes the system's secret randomness. Tests give another.

    Returns:
        What was done.

    Raises:
        InvalidInput: A folder is missing or is `out`, a number is outside its limits, or the plan of a run that died is damaged.
        UpcycleError: Another run uses `out`, or a shard that a run that died had begun to mix is gone.
        OSError: A file cannot be read, written or removed; running this again goes on.
    """
    folders, out = [Path(folder) for folder in incoming], Path(out)
    if not 1 <= scenes_per_shard <= MAX_MEMBERS or fewest_shards < FEWEST_SHARDS:
        raise InvalidInput(
            f"scenes_per_shard must be 1..{MAX_MEMBERS} and fewest_shards at least {FEWEST_SHARDS}, found {scenes_per_shard} and {fewest_shards}"
        )
    for folder in folders:
        if not folder.is_dir():
            raise InvalidInput(f"the folder {folder} does not exist; give folders that vehicles upload to")
        if folder.resolve() == out.resolve():
            raise InvalidInput(f"{folder} is both a source and the folder of mixed shards; give another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    plan_file = out.resolve().with_name(f"{out.resolve().name}{PLAN_SUFFIX}")  # one plan, whatever name the folder is given by
    with locked_folder(out, f"another mix is writing into {out}; wait for it to end"):
        remove_litter(out)
        completed, done = _read_plan(plan_file), MixReport(shards=(), scenes=0, sources=0, unmixed=(), completed=False)
        if completed is not None:
            done = _carry_out(completed, plan_file, out)
        plan, unmixed = _make_plan(folders, fewest_shards, scenes_per_shard, rng or secrets.SystemRandom())
        if plan.sources:
            write_atomically(plan_file, _plan_bytes(plan))
            new = _carry_out(plan, plan_file, out)
            done = replace(
                done, shards=done.shards + new.shards, scenes=done.scenes + new.scenes, sources=done.sources + new.sources
            )
        return replace(done, unmixed=unmixed, completed=completed is not None)


# ------------------------------------------------------------------------------------------------------------------ plan


def _make_plan(
    folders: Sequence[Path], fewest: int, scenes_per_shard: int, rng: random.Random
) -> tuple[_Plan, tuple[Unmixed, ...]]:
    """Verify every shard completely and deal the scenes of each kind into new shards."""
    kinds: dict[tuple[SceneKind, SceneSampling], list[tuple[Path, ShardManifest]]] = {}
    unmixed: list[Unmixed] = []
    known: set[str] = set()
    for path in (path for folder in {f.resolve(): f for f in folders}.values() for path in sorted(folder.glob("[!.]*.json"))):
        try:
            manifest = read_manifest(path)
            shard = verify_shard(
                path,
                path.with_suffix(".tar"),
                expected_spec=manifest.spec,
                expected_fingerprint=manifest.encoder_fingerprint,
            )
            twice = known & set(shard.scene_ids)
            if twice:
                raise InvalidInput(f"its scene {min(twice)} is in another shard too; a scene counts once")
            known |= set(shard.scene_ids)
        except (UpcycleError, OSError) as error:
            unmixed.append(Unmixed(manifest=str(path), reason=shown(error, most=2000)))
            continue
        kinds.setdefault((_kind(manifest), manifest.sampling), []).append((path.absolute(), manifest))
    sources: list[str] = []
    shards: list[_Planned] = []
    for found in kinds.values():
        if len(found) < fewest:
            reason = f"only {len(found)} shards of its kind are there, fewer than {fewest}; it waits for more"
            unmixed += [Unmixed(manifest=str(path), reason=reason) for path, _ in found]
            continue
        sources += [str(path) for path, _ in found]
        shards += _dealt(found, scenes_per_shard, rng)
    rng.shuffle(shards)
    return _Plan(format=_FORMAT, sources=tuple(sources), shards=tuple(shards)), tuple(unmixed)


def _kind(manifest: ShardManifest) -> SceneKind:
    return SceneKind(spec=manifest.spec, encoder_fingerprint=manifest.encoder_fingerprint, codec=manifest.codec)


def _dealt(found: Sequence[tuple[Path, ShardManifest]], scenes_per_shard: int, rng: random.Random) -> list[_Planned]:
    """The scenes of one kind in random order, in shards of nearly equal numbers that no limit of a shard is broken by."""
    pieces = [
        _Piece(source=str(path), name=m.name, offset=m.offset, length=m.length)
        for path, manifest in found
        for m in manifest.members
    ]
    rng.shuffle(pieces)
    raw = {piece: declared_raw_bytes(_bytes_of(piece, HEAD_BYTES)) for piece in pieces}
    most_raw = max(MAX_SHARD_RAW_BYTES, max_raw_bytes(found[0][1].spec))
    size = -(-len(pieces) // -(-len(pieces) // scenes_per_shard))
    shards: list[list[_Piece]] = [[]]
    for piece in pieces:
        last = shards[-1]
        full = len(last) >= size or sum(p.length for p in last) >= _MAX_BYTES or sum(raw[p] for p in last) + raw[piece] > most_raw
        if full:
            shards.append([])
        shards[-1].append(piece)
    return [_Planned(pieces=tuple(shard)) for shard in shards]


def _bytes_of(piece: _Piece, most: int | None = None) -> bytes:
    descriptor = open_regular(Path(piece.source).with_suffix(".tar"))
    try:
        return os.pread(descriptor, piece.length if most is None else min(most, piece.length), piece.offset)
    finally:
        os.close(descriptor)


def _plan_bytes(plan: _Plan) -> bytes:
    return json.dumps(asdict(plan), separators=(",", ":")).encode() + b"\n"


def _read_plan(path: Path) -> _Plan | None:
    remedy = "look which of its sources are still there, remove those whose scenes are in new shards, and then remove it"
    try:
        if path.stat().st_size > _MAX_PLAN_BYTES:
            raise InvalidInput(f"{path} is larger than any plan; {remedy}")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        plan = config_from_json(_Plan, strict_json(data, str(path)))
    except InvalidInput as error:
        raise InvalidInput(f"{path} is not the plan of a mix: {error}; {remedy}") from error
    if plan.format != _FORMAT:
        raise InvalidInput(f"{path} is the plan of another version; {remedy}")
    return plan


# ------------------------------------------------------------------------------------------------------------- carry out


def _carry_out(plan: _Plan, plan_file: Path, out: Path) -> MixReport:
    """Write every new shard that is not there, read it back, and then remove the sources and the plan."""
    for number, planned in enumerate(plan.shards):
        if planned.stem:  # it has appeared before; somebody may have taken it away since
            continue
        stem = _write(planned, out)
        shards = (*plan.shards[:number], replace(planned, stem=stem), *plan.shards[number + 1 :])
        plan = replace(plan, shards=shards)
        write_atomically(plan_file, _plan_bytes(plan))
    for source in map(Path, plan.sources):
        # The manifest goes first: a tar alone is no shard, so no other run takes it for one.
        for path in (source, source.with_suffix(".tar")):
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            sync_folder(source.parent)
    plan_file.unlink()
    sync_folder(plan_file.parent)
    return MixReport(
        shards=tuple(planned.stem for planned in plan.shards),
        scenes=sum(len(planned.pieces) for planned in plan.shards),
        sources=len(plan.sources),
        unmixed=(),
        completed=False,
    )


def _write(planned: _Planned, out: Path) -> str:
    """Write one shard from its pieces, check it, and let it appear; returns its name."""
    try:
        first = read_manifest(planned.pieces[0].source)
        blobs = [_bytes_of(piece) for piece in planned.pieces]
    except FileNotFoundError as error:
        raise UpcycleError(
            f"a shard that is being mixed is gone ({error.filename}); put it back and run mix again, or remove the plan beside {out} and the new "
            "shards that were not uploaded"
        ) from error
    manifest = stage_shard(out, _kind(first), blobs, first.sampling)
    tar, final = (out / name for name in staged_names(manifest.stem))
    expected = [piece.name for piece in planned.pieces]
    found = [member.name for member, _ in read_members(tar, manifest)]
    if found != expected:
        tar.unlink()
        final.unlink()
        raise UpcycleError(f"scenes changed in {planned.pieces[0].source} or another source while they were mixed; run mix again")
    os.replace(tar, out / manifest.tar_name)
    os.replace(final, out / f"{manifest.stem}.json")
    sync_folder(out)
    return manifest.stem
