"""What a shard promises: every tar program reads it, its headers hold no time and no user, and it is whole or absent."""

import dataclasses
import errno
import hashlib
import json
import os
import resource
import secrets
import signal
import stat
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.perception.wire.codec import FeatureOverflow, ForeignScene, decode_scene
from upcycle3d.perception.wire.manifest import MAX_MANIFEST_BYTES, BrokenShard, parse_manifest, read_manifest
from upcycle3d.perception.wire.shards import ShardWriteError, ShardWriter, read_members

SPEC, FINGERPRINT = tiny.CUT, tiny.FINGERPRINT


def scene(seed: int, voxels: int = 20) -> SmashedScene:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(2048, generator=generator)[:voxels].sort().values
    return SmashedScene(
        spec=SPEC,
        coords=tiny.cells(index),
        features=torch.randn(voxels, 4, generator=generator),
        codec="fp16",
        encoder_fingerprint=FINGERPRINT,
        scene_id=secrets.token_hex(16),
    )


def writer(folder: Path, **options: int) -> ShardWriter:
    return ShardWriter(folder, spec=SPEC, fingerprint=FINGERPRINT, codec="fp16", **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def whole_scenes(folder: Path) -> list[SmashedScene]:
    """Every scene of every shard in `folder`, after a full check."""
    found = []
    for path in sorted(folder.glob("*.json")):
        manifest = read_manifest(path)
        for _, blob in read_members(folder / manifest.tar_name, manifest):
            found.append(decode_scene(blob, expected_spec=SPEC, expected_fingerprint=FINGERPRINT))
    return found


def test_scenes_come_back_from_shards_of_the_asked_size(tmp_path):
    scenes = [scene(i) for i in range(5)]
    with writer(tmp_path, scenes_per_shard=2) as shards:
        lengths = [shards.add(s).length for s in scenes]
    assert len(shards.shards) == 3
    assert [len(read_manifest(path).members) for path in shards.shards] == [2, 2, 1]
    assert sum(m.length for path in shards.shards for m in read_manifest(path).members) == sum(lengths)
    back = {s.scene_id: s for s in whole_scenes(tmp_path)}
    assert back.keys() == {s.scene_id for s in scenes}
    for s in scenes:
        assert torch.equal(back[s.scene_id].coords, s.coords)
        assert torch.equal(back[s.scene_id].features, s.features.half().float())


def test_a_shard_is_closed_when_its_bytes_are_reached(tmp_path):
    with writer(tmp_path, max_bytes=1) as shards:
        shards.add(scene(0))
        assert len(shards.shards) == 1
        shards.add(scene(1))
    assert len(shards.shards) == 2


def test_any_tar_reader_finds_plain_files_whose_headers_hold_no_time_and_no_user(tmp_path):
    with writer(tmp_path) as shards:
        for i in range(4):
            shards.add(scene(i))
    (path,) = shards.shards
    manifest = read_manifest(path)
    tar_path = tmp_path / manifest.tar_name
    data = tar_path.read_bytes()
    with tarfile.open(tar_path) as tar:
        infos = tar.getmembers()
        assert [i.name for i in infos] == [m.name for m in manifest.members]
        for info, member in zip(infos, manifest.members, strict=True):
            assert info.isreg()
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
            blob = tar.extractfile(info).read()
            assert blob == data[member.offset : member.offset + member.length]
            assert hashlib.sha256(blob).hexdigest() == member.sha256
            assert member.name == member.sha256[:32] + ".safetensors.zst"
    assert hashlib.sha256(data).hexdigest() == manifest.tar_sha256
    assert names(tmp_path) == {manifest.tar_sha256[:32] + ".tar", manifest.tar_sha256[:32] + ".json"}
    assert json.loads(path.read_text()).keys() == {
        "schema", "schema_version", "split", "encoder_fingerprint", "codec", "count", "tar", "members",
    }  # fmt: skip
    assert stat.S_IMODE(tar_path.stat().st_mode) & 0o133 == 0


def test_the_order_in_a_shard_is_not_the_order_of_driving(tmp_path):
    scenes = [scene(i) for i in range(40)]
    with writer(tmp_path) as shards:
        for s in scenes:
            shards.add(s)
    assert [s.scene_id for s in whole_scenes(tmp_path)] != [s.scene_id for s in scenes]


def test_a_writer_without_scenes_writes_nothing(tmp_path):
    with writer(tmp_path / "new"):
        pass
    assert names(tmp_path / "new") == set()


def test_scenes_of_another_kind_are_refused(tmp_path):
    shards = ShardWriter(tmp_path, spec=SPEC, fingerprint="cd" * 32, codec="fp16")
    with pytest.raises(
        InvalidInput, match=r"this scene has encoder fingerprint abababab…, expected cdcdcdcd…; use another writer"
    ):
        shards.add(scene(0))
    twice, shards = scene(0), writer(tmp_path)
    shards.add(twice)
    with pytest.raises(InvalidInput, match="already"):
        shards.add(twice)
    with pytest.raises(InvalidInput, match="scenes_per_shard"):
        writer(tmp_path, scenes_per_shard=0)


def test_an_error_while_scenes_wait_still_writes_them(tmp_path):
    def interrupted() -> None:
        with writer(tmp_path) as shards:
            shards.add(scene(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(whole_scenes(tmp_path)) == 1


def test_a_scene_that_cannot_be_encoded_costs_only_itself(tmp_path):
    good, bad = scene(0), scene(1)
    bad.features[3, 1] = 1e5
    with writer(tmp_path) as shards:
        shards.add(good)
        with pytest.raises(FeatureOverflow, match="channel 1"):
            shards.add(bad)
    assert len(whole_scenes(tmp_path)) == 1


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_full_disk_is_a_clear_error_that_keeps_finished_shards_and_waiting_scenes(tmp_path, monkeypatch, failing):
    shards = writer(tmp_path, scenes_per_shard=2)
    shards.add(scene(0))
    shards.add(scene(1))
    before = names(tmp_path)
    shards.add(scene(2))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(ShardWriteError, match=r"No space left on device.*1 shards finished before are intact"):
            shards.add(scene(3))
        with pytest.raises(ShardWriteError):  # and memory does not grow
            shards.add(scene(4))
    assert names(tmp_path) == before
    assert len(whole_scenes(tmp_path)) == 2
    shards.flush()
    assert len(whole_scenes(tmp_path)) == 4


@pytest.mark.parametrize("before_renaming", [True, False])
def test_a_manifest_that_does_not_fit_leaves_no_half_pair_behind(tmp_path, monkeypatch, before_renaming):
    shards = writer(tmp_path)
    shards.add(scene(0))
    replace = os.replace

    def full_for_manifests(source: Path, target: Path) -> None:
        if target.suffix != ".json" or not before_renaming:
            replace(source, target)
        if target.suffix == ".json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_for_manifests)
        with pytest.raises(ShardWriteError):
            shards.flush()
    assert names(tmp_path) == set()


def in_fork(body: Callable[[], object]) -> int:
    """Exit status of a child that runs `body`: 7 if it ends in `ShardWriteError`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        except ShardWriteError:
            status = 7
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_size_limit_of_the_system_is_reported_and_finished_shards_stay(tmp_path):
    shards = writer(tmp_path, scenes_per_shard=1)
    shards.add(scene(0))

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        shards.add(scene(1, voxels=2000))

    assert in_fork(body) == 7
    assert len(names(tmp_path)) == 2
    assert len(whole_scenes(tmp_path)) == 1


def test_a_kill_in_the_middle_of_writing_leaves_no_half_shard_under_a_final_name(tmp_path):
    shards = writer(tmp_path, scenes_per_shard=1)
    shards.add(scene(0))
    write = os.write

    def body() -> None:
        os.write = lambda f, data: (write(f, data[:100]), os.kill(os.getpid(), signal.SIGKILL))
        shards.add(scene(1))

    assert in_fork(body) == -signal.SIGKILL
    left = names(tmp_path)
    assert len([n for n in left if n.startswith(".")]) == 1
    assert len([n for n in left if not n.startswith(".")]) == 2
    assert len(whole_scenes(tmp_path)) == 1


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    with writer(folder) as shards:
        for i in range(3):
            shards.add(scene(i))
    return shards.shards[0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(extra=1), "exactly"),
        (lambda r: r.pop("codec"), "exactly"),
        (lambda r: r.update(schema="other"), "not of a smashed shard"),
        (lambda r: r.update(schema_version=1), "version 1, this reader knows 2; update the older side"),
        (lambda r: r.update(schema_version=True), "version True"),
        (lambda r: r.update(count=4), "declares 4 scenes and lists 3"),
        (lambda r: r.update(members=[]), "must list"),
        (lambda r: r.update(members={}), "must list"),
        (lambda r: r.update(codec="zip"), "codec"),
        (lambda r: r.update(encoder_fingerprint="me"), "encoder_fingerprint"),
        (lambda r: r["tar"].update(bytes=1 << 50), "declares a tar of"),
        (lambda r: r["tar"].update(name="../../etc/passwd"), "named after its hash"),
        (lambda r: r["members"][1].update(name="../x.safetensors.zst"), "member 1 must be named after its hash"),
        (lambda r: r["members"][1].update(name="/etc/passwd"), "member 1 must be named after its hash"),
        (lambda r: r["members"][1].update(length=1 << 60), "member 1: length"),
        (lambda r: r["members"][1].update(length=-5), "member 1: length"),
        (lambda r: r["members"][1].update(length=1.5), "member 1: length"),
        (lambda r: r["members"][1].update(offset=0), "member 1 declares offset 0"),
        (lambda r: r["members"][1].update(sha256="x"), "member 1: sha256"),
        (lambda r: r["members"][1].update(vehicle="WVWZZZ1JZXW000001"), "exactly"),
        (lambda r: r["members"].__setitem__(1, 5), "member 1"),
        (lambda r: r["split"].update(shape=[1 << 40, 1, 1]), "split"),
        (lambda r: r["split"].update(shape=[1 << 20, 1 << 20, 1 << 20]), "cells"),
    ],
)
def test_a_manifest_that_lies_is_refused_with_the_field_that_lies(shard, edit, message):
    record = json.loads(shard.read_text())
    edit(record)
    with pytest.raises(UpcycleError, match=message):
        parse_manifest(json.dumps(record).encode())


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{", b"\xff", b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000, b"9" * 10_000]
)
def test_what_is_no_manifest_is_a_typed_error(data):
    with pytest.raises(UpcycleError):
        parse_manifest(data)


def test_the_manifest_survives_its_own_file_and_its_version_is_told_apart(shard):
    manifest = read_manifest(shard)
    assert parse_manifest(manifest.to_json()) == manifest
    with pytest.raises(ForeignScene):
        parse_manifest(manifest.to_json().replace(b'"schema_version":2', b'"schema_version":7'))


def test_renamed_linked_or_huge_manifests_are_refused(shard, tmp_path):
    renamed = tmp_path / f"{'0' * 32}.json"
    renamed.write_bytes(shard.read_bytes())
    with pytest.raises(BrokenShard, match="renamed"):
        read_manifest(renamed)
    link = tmp_path / shard.name
    link.symlink_to(shard)
    with pytest.raises(BrokenShard, match="link"):
        read_manifest(link)
    with renamed.open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BrokenShard, match="at most"):
        read_manifest(renamed)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(BrokenShard, match="plain file"):
        read_manifest(tmp_path / "pipe.json")


def test_a_flipped_bit_anywhere_in_the_tar_is_found(shard, tmp_path):
    manifest = read_manifest(shard)
    good = (shard.parent / manifest.tar_name).read_bytes()
    last = manifest.members[-1]
    places = [0, 100, 124, 148, 156, 257, 345, 511, 512, 700, last.offset - 400, last.offset + last.length - 1]
    places += [last.offset + last.length, len(good) - 1024, len(good) - 1]
    bad = tmp_path / manifest.tar_name
    for place in places:
        for bit in (0, 7):
            data = bytearray(good)
            data[place] ^= 1 << bit
            bad.write_bytes(data)
            with pytest.raises(BrokenShard):
                list(read_members(bad, manifest))
    bad.write_bytes(good)
    assert len(list(read_members(bad, manifest))) == 3


def test_a_manifest_in_another_spelling_is_refused(shard):
    good = shard.read_bytes()
    record = json.loads(good)
    assert parse_manifest(good.rstrip(b"\n")) == read_manifest(shard)
    for spelled in (
        json.dumps(record, sort_keys=True).encode(),
        json.dumps(dict(reversed(record.items())), separators=(",", ":")).encode(),
        good.replace(b'"offset":512,', b'"offset":512.0,'),
        good.replace(b'"count":3', b'"count":3.0'),
        b" " + good,
        good + b"\n",
    ):
        assert spelled != good
        with pytest.raises(BrokenShard, match=r"not canonical|must be|declares"):
            parse_manifest(spelled)


def test_a_shard_is_closed_when_its_time_is_over(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("upcycle3d.perception.wire.shards.time.monotonic", lambda: now[0])
    with writer(tmp_path, max_seconds=60) as shards:
        shards.add(scene(0))
        now[0] += 59
        shards.add(scene(1))
        assert shards.shards == ()
        now[0] += 1
        shards.add(scene(2))
        assert len(shards.shards) == 1
        now[0] += 59
    assert [len(read_manifest(path).members) for path in shards.shards] == [2, 1]
    with pytest.raises(InvalidInput, match="positive number of seconds"):
        writer(tmp_path, max_seconds=0)


def test_a_small_file_of_many_full_scenes_is_refused_before_it_costs_time_and_no_writer_makes_one(tmp_path, monkeypatch):
    """A scene whose cells are all occupied by zeros has 700 bytes and takes 0.13 s to read; 10,000 of them fit into 15 MB."""
    monkeypatch.setattr("upcycle3d.perception.wire.shards.MAX_SHARD_RAW_BYTES", 200_000)
    every = torch.arange(2048)
    full = SmashedScene(spec=SPEC, coords=tiny.cells(every), features=torch.zeros(2048, 4), codec="fp16", encoder_fingerprint=FINGERPRINT, scene_id="0" * 32)  # fmt: skip
    with writer(tmp_path / "good") as shards:
        for i in range(24):
            shards.add(dataclasses.replace(full, scene_id=f"{i:032x}"))
    assert len(shards.shards) == 3
    assert len(whole_scenes(tmp_path / "good")) == 24
    with writer(tmp_path / "bad") as shards:
        shards._max_raw_bytes = 1 << 40
        for i in range(24):
            shards.add(dataclasses.replace(full, scene_id=f"{i:032x}"))
    (path,) = shards.shards
    manifest = read_manifest(path)
    with pytest.raises(BrokenShard, match=r"24 scenes of the shard have [\d,]+ bytes after decompression"):
        next(read_members(path.parent / manifest.tar_name, manifest))


class Notes:
    """A journal that remembers what it was told and fails on demand."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.fail = ""

    def pending(self, stem: str, scene_ids: Sequence[str]) -> None:
        if self.fail == "pending":
            raise OSError(errno.ENOSPC, "full")
        self.told.append(("pending", stem))

    def published(self, stem: str) -> None:
        if self.fail == "published":
            raise OSError(errno.ENOSPC, "full")
        self.told.append(("published", stem))


@pytest.mark.parametrize("failing", ["pending", "published"])
def test_a_shard_whose_journal_fails_appears_once_and_under_the_name_that_was_noted(tmp_path, failing):
    notes = Notes()
    shards = writer(tmp_path, journal=notes)
    shards.add(scene(0))
    notes.fail = failing
    with pytest.raises(ShardWriteError, match="full"):
        shards.flush()
    notes.fail = ""
    shards.add(scene(1))
    shards.flush()
    stems = [path.stem for path in shards.shards]
    assert len(stems) == 2
    assert notes.told[-4:] == [("pending", stems[0]), ("published", stems[0]), ("pending", stems[1]), ("published", stems[1])]
    assert names(tmp_path) == {f"{stem}{suffix}" for stem in stems for suffix in (".tar", ".json")}
    assert len(whole_scenes(tmp_path)) == 2


def test_discarded_scenes_are_not_written(tmp_path):
    with writer(tmp_path) as shards:
        shards.add(scene(0))
        assert shards.discard() == 1
    assert names(tmp_path) == set()
