"""Ingest keeps what is whole, sets aside what is not with the reason, and loses nothing, whatever arrives and whenever it dies."""

import errno
import hashlib
import io
import json
import os
import resource
import signal
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors import numpy as safetensors_numpy

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.strict_json import canonical_json
from upcycle3d.perception.server import ingest as ingest_module
from upcycle3d.perception.server import quarantine
from upcycle3d.perception.server.ingest import StoreWriteError, ingest
from upcycle3d.perception.server.ingest_report import IngestReport
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.wire.codec import round_trip, scene_id_of
from upcycle3d.perception.wire.manifest import read_manifest
from upcycle3d.perception.wire.shards import ShardWriter
from uploads import ENCODER, KEYPOINT_SPEC, OTHER_ENCODER, OTHER_SPEC, SPEC, ingest_all, keypoint_scene, scene, upload


@pytest.fixture
def incoming(tmp_path):
    return tmp_path / "incoming"


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def pair(stem: str) -> set[str]:
    return {f"{stem}.tar", f"{stem}.json"}


def damaged_shard(folder: Path, edit_tar: Callable[[bytearray], bytes | bytearray], edit_manifest=lambda record: None) -> str:
    """An upload whose tar was edited and whose manifest was made to match size, hash and name as a forger could; its stem."""
    manifest_path = upload(folder, [scene(i) for i in range(3)])
    tar_path = manifest_path.with_suffix(".tar")
    data = bytes(edit_tar(bytearray(tar_path.read_bytes())))
    record = json.loads(manifest_path.read_bytes())
    digest = hashlib.sha256(data).hexdigest()
    record["tar"] = {"name": f"{digest[:32]}.tar", "bytes": len(data), "sha256": digest}
    edit_manifest(record)
    manifest_path.unlink()
    tar_path.unlink()
    (folder / f"{digest[:32]}.tar").write_bytes(data)
    (folder / f"{digest[:32]}.json").write_bytes(canonical_json(record))
    return digest[:32]


def assert_refused(report: IngestReport, incoming: Path, store: Path, stem: str, message: str) -> None:
    assert [r.shard for r in report.quarantined] == [stem]
    assert message in report.quarantined[0].reason
    assert names(store / "quarantine") == pair(stem) | {f"{stem}.reason.txt"}
    text = (store / "quarantine" / f"{stem}.reason.txt").read_text()
    assert message in text
    assert stem in text
    assert names(incoming) == set()
    assert names(store / "shards") == set()
    assert report.total_scenes == 0


def in_fork(body: Callable[[], object]) -> int:
    """Exit status of a child that runs `body`: 1 if it raises."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ------------------------------------------------------------------------------------------------------------ good shards


def test_good_shards_move_into_the_store_and_every_scene_can_be_read(incoming, store):
    groups = [[scene(i) for i in range(3)], [scene(i, voxels=i, codec="fp16") for i in range(10, 12)], [scene(5, voxels=0)]]
    stems = [upload(incoming, group).stem for group in groups]
    report = ingest_all(incoming, store)
    assert sorted(report.accepted) == sorted(stems)
    assert (report.new_scenes, report.total_scenes) == (6, 6)
    assert names(incoming) == set()
    assert names(store / "shards") == set().union(*map(pair, stems))
    smashed = SmashedStore(store)
    assert (smashed.spec, smashed.fingerprint, smashed.codecs, len(smashed)) == (SPEC, ENCODER, ("fp16", "int8"), 6)
    sent = {s.scene_id: s for group in groups for s in group}
    read = [smashed[i] for i in range(6)]
    assert {s.scene_id for s in read} == sent.keys()
    for i, got in enumerate(read):
        original = sent[got.scene_id]
        assert torch.equal(got.coords, original.coords)
        assert torch.equal(got.features, round_trip(original.features, original.codec))
        assert smashed.voxels[i] == len(got.coords)


def test_the_catalog_has_one_row_per_scene_that_points_at_its_bytes(incoming, store):
    manifest = read_manifest(upload(incoming, [scene(i, voxels=20 + i) for i in range(3)]))
    ingest_all(incoming, store)
    rows = pq.read_table(store / "catalogue.parquet").to_pylist()
    data = (store / "shards" / manifest.tar_name).read_bytes()
    assert [r["member"] for r in rows] == [m.name for m in manifest.members]
    assert sorted(r["voxels"] for r in rows) == [20, 21, 22]
    for row in rows:
        assert list(row) == [
            "shard",
            "member",
            "offset",
            "length",
            "sha256",
            "voxels",
            "keypoints",
            "codec",
            "fingerprint",
            "order",
            "scene",
        ]
        assert (row["shard"], row["keypoints"], row["codec"], row["fingerprint"]) == (manifest.stem, 0, "int8", ENCODER)
        assert hashlib.sha256(data[row["offset"] : row["offset"] + row["length"]]).hexdigest() == row["sha256"]


def test_a_duplicate_upload_is_reported_and_changes_nothing(incoming, store):
    path = upload(incoming, [scene(0)])
    copies = {p.name: p.read_bytes() for p in (path, path.with_suffix(".tar"))}
    ingest_all(incoming, store)
    before = (store / "catalogue.parquet").read_bytes()
    for name, data in copies.items():
        (incoming / name).write_bytes(data)
    report = ingest_all(incoming, store)
    assert (report.already_there, report.accepted, report.new_scenes, report.total_scenes) == ((path.stem,), (), 0, 1)
    assert names(incoming) == set()
    assert (store / "catalogue.parquet").read_bytes() == before
    assert ingest_all(incoming, store).total_scenes == 1


def test_an_upload_that_is_not_complete_waits(incoming, store):
    path = upload(incoming, [scene(0)])
    tar = path.with_suffix(".tar").read_bytes()
    path.with_suffix(".tar").unlink()
    (incoming / f"{'0' * 32}.tar").write_bytes(b"x")
    (incoming / ".upload.tmp").write_bytes(tar[:100])
    report = ingest_all(incoming, store)
    assert {(r.shard, r.reason) for r in report.waiting} == {
        (path.stem, "its tar has not come yet"),
        ("0" * 32, "its manifest has not come yet"),
    }
    path.with_suffix(".tar").write_bytes(tar)
    assert ingest_all(incoming, store).accepted == (path.stem,)
    assert names(incoming) == {f"{'0' * 32}.tar"}


def test_what_is_no_upload_is_left_alone_and_named(incoming, store, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s")
    incoming.mkdir()
    (incoming / "notes.txt").write_text("hello")
    (incoming / f"{'1' * 32}.tar").mkdir()
    (incoming / f"{'2' * 32}.json").symlink_to(secret)
    report = ingest_all(incoming, store)
    assert report.unrecognized == (f"{'1' * 32}.tar", f"{'2' * 32}.json", "notes.txt")
    assert (report.quarantined, report.waiting) == ((), ())
    assert secret.read_text() == "s"
    assert len(names(incoming)) == 3


def test_a_bad_shard_costs_no_good_one(incoming, store):
    bad = upload(incoming, [scene(0)])
    good = upload(incoming, [scene(1)])
    bad.write_bytes(b"{}")
    report = ingest_all(incoming, store)
    assert report.accepted == (good.stem,)
    assert [r.shard for r in report.quarantined] == [bad.stem]
    assert len(SmashedStore(store)) == 1


# ------------------------------------------------------------------------------------------------------------- bad shards


@pytest.mark.parametrize("place", [0, 124, 156, 300, 511, 520, 900, -1100, -1024, -1])
def test_one_flipped_bit_in_a_tar_is_found(incoming, store, place):
    path = upload(incoming, [scene(0), scene(1)])
    tar = path.with_suffix(".tar")
    data = bytearray(tar.read_bytes())
    data[place] ^= 4
    tar.write_bytes(data)
    report = ingest_all(incoming, store)
    assert_refused(report, incoming, store, path.stem, "")
    assert (store / "quarantine" / tar.name).read_bytes() == bytes(data)


@pytest.mark.parametrize("where", ["middle of a member", "member boundary", "trailing data", "empty"])
def test_a_tar_of_another_length_is_found(incoming, store, where):
    path = upload(incoming, [scene(0), scene(1), scene(2)])
    member = read_manifest(path).members[2]
    tar = path.with_suffix(".tar")
    data = tar.read_bytes()
    cut = {
        "middle of a member": data[: member.offset + 40],
        "member boundary": data[: member.offset - 512],
        "trailing data": data + bytes(512),
        "empty": b"",
    }
    tar.write_bytes(cut[where])
    message = "followed by other data" if where[0] == "t" else "cut off"
    assert_refused(ingest_all(incoming, store, final=True), incoming, store, path.stem, message)


def rewritten(edit: Callable[[tarfile.TarInfo], None]) -> Callable[[bytearray], bytes]:
    """A tar whose first header was edited, with a right checksum."""

    def change(data: bytearray) -> bytes:
        info = tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "strict")
        edit(info)
        return info.tobuf(tarfile.USTAR_FORMAT) + bytes(data[512:])

    return change


def link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (link, "links are refused"),
        (lambda info: setattr(info, "type", tarfile.LNKTYPE), "links are refused"),
        (lambda info: setattr(info, "name", "/etc/passwd"), "absolute names"),
        (lambda info: setattr(info, "name", "../../x.safetensors.zst"), "absolute names"),
        (lambda info: setattr(info, "mtime", 1_700_000_000), "time 1700000000"),
        (lambda info: setattr(info, "uid", 1007), "user 1007"),
        (lambda info: setattr(info, "size", 1 << 32), "4294967296 bytes"),
        (lambda info: setattr(info, "uname", "fleet-car-7"), "zeroed"),
    ],
)
def test_a_forged_tar_header_is_refused_even_with_a_matching_hash(incoming, store, edit, message):
    stem = damaged_shard(incoming, rewritten(edit))
    assert_refused(ingest_all(incoming, store), incoming, store, stem, message)


def test_damage_inside_a_member_is_found_even_if_the_tar_hash_matches(incoming, store):
    def flip(data: bytearray) -> bytearray:
        data[600] ^= 1
        return data

    stem = damaged_shard(incoming, flip)
    assert_refused(ingest_all(incoming, store), incoming, store, stem, "member 0")


@pytest.mark.parametrize(("place", "message"), [(-1025, "padding"), (-1, "end of the tar")])
def test_data_hidden_between_or_behind_members_is_found(incoming, store, place, message):
    def hide(data: bytearray) -> bytearray:
        data[place] = 7
        return data

    stem = damaged_shard(incoming, hide)
    assert_refused(ingest_all(incoming, store), incoming, store, stem, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r["members"][0].update(length=1 << 40), "length must be"),
        (lambda r: r["members"][0].update(length=r["members"][0]["length"] - 1), ""),
        (lambda r: r["members"][1].update(offset=512), "declares offset 512"),
        (lambda r: r["tar"].update(bytes=1 << 50), "declares a tar of"),
        (lambda r: r.update(count=1 << 31), "declares 2147483648 scenes"),
        (lambda r: r["members"].pop(), "declares 3 scenes and lists 2"),
        (lambda r: (r["members"].pop(), r.update(count=2)), "its members make"),
        (lambda r: (r["members"].append(r["members"][0]), r.update(count=4)), "offset"),
        (lambda r: r["members"][0].update(name="../../../root/x.safetensors.zst"), "named after its hash"),
        (lambda r: r["tar"].update(name="/etc/passwd"), "named after its hash"),
        (lambda r: r.update(schema_version=99), "schema version 99"),
        (lambda r: r.update(vehicle="7"), "exactly"),
        (lambda r: r.update(codec="fp16"), "stored as int8, the manifest says fp16"),
        (lambda r: r["split"].update(channels=9), "cut at"),
    ],
)
def test_a_manifest_that_lies_is_refused_with_what_it_lies_about(incoming, store, edit, message):
    stem = damaged_shard(incoming, lambda data: data, edit)
    assert_refused(ingest_all(incoming, store), incoming, store, stem, message)


def test_declared_sizes_take_no_memory(incoming, store):
    stem = damaged_shard(incoming, lambda data: data, lambda r: r["split"].update(shape=[1, 46_000, 46_000], channels=60_000))
    with (incoming / f"{stem}.tar").open("r+b") as file:
        file.truncate(1 << 40)  # sparse

    def body() -> None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (128 << 20), -1))
        (refused,) = ingest_all(incoming, store).quarantined
        assert "cut at" in refused.reason

    assert in_fork(body) == 0
    assert names(incoming) == set()
    assert names(store / "quarantine") == {f"{stem}.json", f"{stem}.reason.txt"}  # a copy of the tar would fill the disk
    text = (store / "quarantine" / f"{stem}.reason.txt").read_text()
    assert "1,099,511,627,776 bytes" in text
    assert "SHA-256 of its first" in text


def test_another_cuts_features_are_refused(incoming, store):
    early = upload(incoming, [scene(0, spec=OTHER_SPEC)])
    assert_refused(ingest_all(incoming, store), incoming, store, early.stem, "backbone.early")


def test_shards_of_another_encoder_stay_for_the_store_of_that_encoder(incoming, store, tmp_path):
    new = upload(incoming, [scene(0, fingerprint=OTHER_ENCODER), scene(1, fingerprint=OTHER_ENCODER)])
    old = upload(incoming, [scene(2)])
    report = ingest_all(incoming, store)
    assert (report.accepted, report.quarantined, report.refused_all) == ((old.stem,), (), False)
    assert [(f.fingerprint, f.shards, f.scenes) for f in report.foreign] == [(OTHER_ENCODER, (new.stem,), 2)]
    assert names(incoming) == pair(new.stem)
    assert names(store / "quarantine") == set()
    second = ingest(incoming, tmp_path / "new", expected_fingerprint=OTHER_ENCODER, expected_spec=SPEC)
    assert (second.accepted, second.foreign, names(incoming)) == ((new.stem,), (), set())


def test_nothing_moves_and_no_store_is_bound_where_all_shards_are_of_another_encoder(incoming, store):
    stems = [upload(incoming, [scene(i)]).stem for i in range(3)]
    before = names(incoming)
    report = ingest(incoming, store, expected_fingerprint=OTHER_ENCODER, expected_spec=SPEC)
    assert report.refused_all
    assert (names(incoming), names(store / "quarantine"), report.total_scenes) == (before, set(), 0)
    assert sorted(ingest_all(incoming, store).accepted) == sorted(stems)  # the same store, bound anew


def test_a_scene_of_another_encoder_inside_an_honest_looking_shard_is_refused(incoming, store):
    def lie(record: dict) -> None:
        record["encoder_fingerprint"] = ENCODER

    manifest_path = upload(incoming, [scene(0, fingerprint=OTHER_ENCODER)])
    record = json.loads(manifest_path.read_bytes())
    lie(record)
    manifest_path.write_bytes(canonical_json(record))
    assert_refused(ingest_all(incoming, store), incoming, store, manifest_path.stem, "does not decode")


def test_a_member_that_is_no_scene_is_refused(incoming, store):
    incoming.mkdir()
    blob = b"not a scene"
    digest = hashlib.sha256(blob).hexdigest()
    info = tarfile.TarInfo(f"{digest[:32]}.safetensors.zst")
    info.size = len(blob)
    tar = io.BytesIO(info.tobuf(tarfile.USTAR_FORMAT) + blob + bytes(512 - len(blob)) + bytes(1024)).getvalue()
    template = json.loads(upload(incoming / "template", [scene(0)]).read_bytes())
    whole = hashlib.sha256(tar).hexdigest()
    template["members"] = [{"name": info.name, "offset": 512, "length": len(blob), "sha256": digest}]
    template["tar"] = {"name": f"{whole[:32]}.tar", "bytes": len(tar), "sha256": whole}
    (incoming / f"{whole[:32]}.tar").write_bytes(tar)
    (incoming / f"{whole[:32]}.json").write_bytes(canonical_json(template))
    report = ingest_all(incoming, store)
    assert "does not decode" in report.quarantined[0].reason


def test_a_bad_manifest_cannot_take_a_stored_shard_away(incoming, store):
    path = upload(incoming, [scene(0)])
    ingest_all(incoming, store)
    path.write_bytes(b"{}")
    report = ingest_all(incoming, store)
    assert [r.shard for r in report.quarantined] == [path.stem]
    assert names(store / "shards") == pair(path.stem)
    assert len(SmashedStore(store)[0].coords) == 30


def test_a_second_bad_upload_under_the_same_name_keeps_the_first(incoming, store):
    path = upload(incoming, [scene(0)])
    tar = path.with_suffix(".tar")
    manifest, good = path.read_bytes(), tar.read_bytes()
    for bad in (good[:-1], good + b"x", good[:600]):
        path.write_bytes(manifest)
        tar.write_bytes(bad)
        assert [r.shard for r in ingest_all(incoming, store, final=True).quarantined] == [path.stem]
    kept = {(store / "quarantine" / f"{path.stem}{n}.tar").read_bytes() for n in ("", ".1", ".2")}
    assert kept == {good[:-1], good + b"x", good[:600]}
    path.write_bytes(manifest)
    tar.write_bytes(good)
    assert ingest_all(incoming, store).accepted == (path.stem,)


# ------------------------------------------------------------------------------------------------------ crashes and disks


@pytest.mark.parametrize("calls", range(1, 6))
def test_a_kill_between_any_two_renames_is_completed_by_the_next_run(incoming, store, monkeypatch, calls):
    stems = {upload(incoming, [scene(0)]).stem, upload(incoming, [scene(1), scene(2)]).stem}
    replace, left = os.replace, calls

    def dying(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    assert in_fork(lambda: ingest_all(incoming, store)) == -signal.SIGKILL
    monkeypatch.setattr(os, "replace", replace)
    report = ingest_all(incoming, store)
    assert set(report.accepted) == stems
    assert (report.quarantined, report.waiting, names(incoming)) == ((), (), set())
    assert len({SmashedStore(store)[i].scene_id for i in range(3)}) == 3


def across_file_systems(monkeypatch) -> None:
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)


def test_shards_cross_file_systems_by_copy(incoming, store, monkeypatch):
    good, bad = upload(incoming, [scene(0)]), upload(incoming, [scene(1)])
    bad.with_suffix(".tar").write_bytes(b"short")
    across_file_systems(monkeypatch)
    report = ingest_all(incoming, store, final=True)
    assert (report.accepted, [r.shard for r in report.quarantined], names(incoming)) == ((good.stem,), [bad.stem], set())
    assert (store / "quarantine" / f"{bad.stem}.tar").read_bytes() == b"short"
    assert len(SmashedStore(store)) == 1


def test_a_full_store_keeps_every_upload_and_goes_on_later(incoming, store, monkeypatch):
    path = upload(incoming, [scene(0)])
    with monkeypatch.context() as patch:
        across_file_systems(patch)

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "write", full)
        with pytest.raises(StoreWriteError, match="No space left on device"):
            ingest_all(incoming, store)
    assert names(incoming) == pair(path.stem)
    assert names(store / "shards") == set()
    assert not list((store / "shards").glob(".*"))
    assert ingest_all(incoming, store).accepted == (path.stem,)


def test_a_copy_that_differs_does_not_remove_the_upload(incoming, store, monkeypatch):
    path = upload(incoming, [scene(0)])
    across_file_systems(monkeypatch)
    write = quarantine.write_atomically

    def altered(target: Path, data: object) -> None:
        pieces = [data] if isinstance(data, bytes) else list(data)
        write(target, b"x" + b"".join(pieces)[1:])

    monkeypatch.setattr(quarantine, "write_atomically", altered)
    with pytest.raises(StoreWriteError, match="differs"):
        ingest_all(incoming, store)
    assert names(incoming) == pair(path.stem)
    monkeypatch.undo()
    assert ingest_all(incoming, store).accepted == (path.stem,)


def test_two_ingests_do_not_meet(incoming, store):
    incoming.mkdir()
    ingest_all(incoming, store)
    with ingest_module._only_ingest(store), pytest.raises(StoreWriteError, match="another ingest"):
        ingest_all(incoming, store)


# ---------------------------------------------------------------------------------------------- one store, one kind of scene


def test_deleted_shards_leave_the_catalog_and_a_lost_catalog_is_rebuilt(incoming, store):
    first, second = upload(incoming, [scene(0)]), upload(incoming, [scene(1)])
    ingest_all(incoming, store)
    for suffix in (".tar", ".json"):
        (store / "shards" / first.name).with_suffix(suffix).unlink()
    report = ingest_all(incoming, store)
    assert (report.gone, report.total_scenes) == ((first.stem,), 1)
    (store / "catalogue.parquet").unlink()
    report = ingest_all(incoming, store)
    assert (report.accepted, report.total_scenes) == ((second.stem,), 1)


def test_one_store_holds_one_encoders_scenes(incoming, store):
    upload(incoming, [scene(0)])
    ingest_all(incoming, store)
    before = names(store / "shards")
    for _ in range(2):
        with pytest.raises(InvalidInput, match="use another folder"):
            ingest(incoming, store, expected_fingerprint=OTHER_ENCODER, expected_spec=SPEC)
        (store / "catalogue.parquet").unlink(missing_ok=True)  # the shards alone must say it, too
    assert names(store / "shards") == before
    assert names(store / "quarantine") == set()


def test_arguments_that_make_no_sense_are_refused(tmp_path, incoming, store):
    with pytest.raises(InvalidInput, match="does not exist"):
        ingest_all(tmp_path / "nowhere", store)
    incoming.mkdir()
    with pytest.raises(InvalidInput, match="64 hexadecimal"):
        ingest(incoming, store, expected_fingerprint="x", expected_spec=SPEC)


def test_a_shard_of_a_cut_without_keypoints_is_refused_where_keypoints_are_expected(incoming, store):
    plain, other = upload(incoming, [scene(0)]), upload(incoming, [keypoint_scene(1, 3)])
    report = ingest(incoming, store, expected_fingerprint=ENCODER, expected_spec=KEYPOINT_SPEC)
    assert report.accepted == (other.stem,)
    assert [r.shard for r in report.quarantined] == [plain.stem]
    assert "count=12" in report.quarantined[0].reason


# ------------------------------------------------------------------------------------------------- uploads that are not finished


def aged(path: Path, seconds: float) -> None:
    """Let a file look as if it had been changed some time ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("half", [".tar", ".json"])
def test_a_file_that_is_still_uploaded_under_its_final_name_waits_while_it_is_young(incoming, store, half):
    path = upload(incoming, [scene(0), scene(1)])
    growing = path.with_suffix(half)
    whole = growing.read_bytes()
    for part in (0, 100, len(whole) // 2, len(whole) - 3):
        growing.write_bytes(whole[:part])
        report = ingest_all(incoming, store)
        assert ([r.shard for r in report.waiting], report.quarantined) == ([path.stem], ())
        assert "still uploaded" in report.waiting[0].reason
    growing.write_bytes(whole)
    assert ingest_all(incoming, store).accepted == (path.stem,)


@pytest.mark.parametrize("half", [".tar", ".json"])
def test_a_file_that_stopped_growing_is_refused_after_an_hour(incoming, store, half):
    path = upload(incoming, [scene(0), scene(1)])
    growing = path.with_suffix(half)
    growing.write_bytes(growing.read_bytes()[:-10])
    aged(growing, 3700)
    assert [r.shard for r in ingest_all(incoming, store).quarantined] == [path.stem]


@pytest.mark.parametrize("missing", [".tar", ".json"])
def test_half_a_shard_waits_is_reported_after_a_day_and_set_aside_when_no_upload_runs(incoming, store, missing):
    path = upload(incoming, [scene(0)])
    path.with_suffix(missing).unlink()
    (left,) = (p for p in (path, path.with_suffix(".tar")) if p.exists())
    report = ingest_all(incoming, store)
    assert (len(report.waiting), report.overdue) == (1, ())
    aged(left, 25 * 3600)
    (overdue,) = ingest_all(incoming, store).overdue
    assert "for 25 hours" in overdue.reason
    assert names(incoming) == {left.name}
    report = ingest_all(incoming, store, final=True)
    assert ([r.shard for r in report.quarantined], report.waiting) == ([path.stem], ())
    assert names(store / "quarantine") == {left.name, f"{path.stem}.reason.txt"}


@pytest.mark.parametrize("half", [".tar", ".json"])
def test_half_a_shard_that_is_a_link_is_refused_and_what_it_points_to_stays(incoming, store, tmp_path, half):
    path = upload(incoming, [scene(0)])
    linked = path.with_suffix(half)
    outside = tmp_path / "outside"
    linked.rename(outside)
    linked.symlink_to(outside)
    before = outside.read_bytes()
    report = ingest_all(incoming, store)
    assert [r.shard for r in report.quarantined] == [path.stem]
    assert "is a link" in report.quarantined[0].reason
    assert report.unrecognized == (linked.name,)
    assert (outside.read_bytes(), names(incoming)) == (before, {linked.name})
    assert report.total_scenes == 0


# ---------------------------------------------------------------------------------------------------- scenes that are there already


def test_a_scene_that_the_store_holds_is_refused_in_another_shard_and_counts_once(incoming, store):
    first, second, third = scene(0), scene(1), scene(2)
    upload(incoming, [first, second])
    ingest_all(incoming, store)
    again = upload(incoming, [second, third])
    report = ingest_all(incoming, store)
    assert [r.shard for r in report.duplicates] == [r.shard for r in report.quarantined] == [again.stem]
    assert second.scene_id in report.duplicates[0].reason
    assert report.total_scenes == 2


def test_of_two_shards_with_one_scene_in_one_upload_one_is_taken(incoming, store):
    same = scene(0)
    other = replace(same, features=same.features + 1)  # other bytes under the same name
    upload(incoming, [same, scene(1)])
    upload(incoming, [other])
    report = ingest_all(incoming, store)
    assert (len(report.accepted), len(report.duplicates)) == (1, 1)


def test_a_scene_that_occurs_twice_in_one_shard_is_refused(incoming, store):
    same = scene(0)
    path = upload(incoming, [same, replace(same, features=same.features + 1)])
    report = ingest_all(incoming, store)
    assert [r.shard for r in report.duplicates] == [path.stem]
    assert "are both scene" in report.duplicates[0].reason
    assert (report.total_scenes, names(incoming)) == (0, set())


def test_a_catalog_of_the_version_before_gets_the_names_of_its_scenes(incoming, store):
    known = scene(0)
    upload(incoming, [known, scene(1)])
    ingest_all(incoming, store)
    table = pq.read_table(store / "catalogue.parquet")
    header = json.loads(table.schema.metadata[b"upcycle3d.smashed_catalogue"])
    old = table.drop_columns(["order", "scene"]).replace_schema_metadata(
        {b"upcycle3d.smashed_catalogue": canonical_json(header | {"version": 2})}
    )
    pq.write_table(old, store / "catalogue.parquet")
    assert len(SmashedStore(store)) == 2
    upload(incoming, [known])
    report = ingest_all(incoming, store)
    assert (len(report.duplicates), report.total_scenes) == (1, 2)
    assert known.scene_id in pq.read_table(store / "catalogue.parquet")["scene"].to_pylist()


# ----------------------------------------------------------------------------------------------------------- quarantine and litter


def test_what_quarantine_kept_is_taken_back_with_its_own_names_or_by_option(incoming, store, tmp_path):
    path = upload(incoming, [scene(0)])
    manifest, good = path.read_bytes(), path.with_suffix(".tar").read_bytes()
    for bad in (good + b"x", good + b"y"):
        path.write_bytes(manifest)
        path.with_suffix(".tar").write_bytes(bad)
        ingest_all(incoming, store)
    quarantine = store / "quarantine"
    (quarantine / f"{path.stem}.1.tar").write_bytes(good)  # the cause is gone
    report = ingest_all(incoming, store, retry_quarantine=True)
    assert (report.accepted, [r.shard for r in report.quarantined]) == ((path.stem,), [path.stem])
    assert names(quarantine) == pair(path.stem) | {f"{path.stem}.reason.txt"}
    for name in (f"{path.stem}.json", f"{path.stem}.tar"):
        (store / "shards" / name).rename(incoming / name.replace(".", ".3.", 1))
    again = ingest_all(incoming, tmp_path / "other")
    assert (again.accepted, again.unrecognized, names(incoming)) == ((path.stem,), (), set())
    assert names(tmp_path / "other" / "shards") == pair(path.stem)


def test_a_sparse_or_huge_tar_is_not_kept(incoming, store, monkeypatch):
    sparse, huge = upload(incoming, [scene(0)]), upload(incoming, [scene(1)])
    with sparse.with_suffix(".tar").open("r+b") as file:
        file.truncate(50 << 20)
    monkeypatch.setattr(quarantine, "QUARANTINE_BYTES", 4096)
    huge.with_suffix(".tar").write_bytes(b"x" * 5000)
    across_file_systems(monkeypatch)
    assert len(ingest_all(incoming, store).quarantined) == 2
    assert {name for name in names(store / "quarantine") if name.endswith(".tar")} == set()
    assert hashlib.sha256(b"x" * 5000).hexdigest() in (store / "quarantine" / f"{huge.stem}.reason.txt").read_text()


def test_litter_of_killed_runs_is_removed_from_the_store(incoming, store):
    incoming.mkdir()
    ingest_all(incoming, store)
    for folder in (store, store / "shards", store / "quarantine"):
        (folder / ".0123456789abcdef.tmp").write_bytes(b"x" * 100)
    ingest_all(incoming, store)
    assert not list(store.rglob(".*.tmp"))


def test_a_forged_scene_of_absurd_features_is_refused_and_named(incoming, store):
    forged = scene(0)
    path = upload(incoming, [forged, scene(1)])
    manifest = read_manifest(path)
    data = path.with_suffix(".tar").read_bytes()
    member = next(m for m in manifest.members if scene_id_of(data[m.offset : m.offset + m.length]) == forged.scene_id)
    raw = zstandard.ZstdDecompressor().decompress(data[member.offset : member.offset + member.length])
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    arrays = safetensors_numpy.load(raw)
    arrays["feature_scale"][:] = 1e36
    blob = zstandard.ZstdCompressor(write_checksum=True).compress(safetensors_numpy.save(arrays, metadata=metadata))
    for name in pair(path.stem):
        (incoming / name).unlink()
    with ShardWriter(incoming, spec=SPEC, fingerprint=ENCODER, codec="int8") as writer:
        writer.add(scene(2))
        writer._blobs[0] = blob
    report = ingest_all(incoming, store)
    assert "channel 0 of a scene starts at" in report.quarantined[0].reason
    assert hashlib.sha256(blob).hexdigest()[:32] in report.quarantined[0].reason


def test_one_scan_that_was_extracted_twice_is_counted_as_repeated(incoming, store):
    same = scene(0)
    upload(incoming, [same, scene(1)])
    ingest_all(incoming, store)
    upload(incoming, [replace(same, scene_id="7" * 32), scene(2)])
    report = ingest_all(incoming, store)
    assert (report.new_scenes, report.repeated_scenes, report.total_scenes) == (2, 1, 4)


@pytest.mark.parametrize("calls", range(1, 4))
def test_a_kill_in_the_middle_of_quarantine_leaves_no_half_shard_waiting(incoming, store, monkeypatch, calls):
    path = upload(incoming, [scene(0)])
    path.with_suffix(".tar").write_bytes(path.with_suffix(".tar").read_bytes() + b"x")
    real, left = os.replace, calls

    def dying(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    in_fork(lambda: ingest_all(incoming, store))
    monkeypatch.setattr(os, "replace", real)
    report = ingest_all(incoming, store)
    assert ([r.shard for r in report.quarantined], report.waiting, names(incoming)) == ([path.stem], (), set())
    assert pair(path.stem[:32]) <= {name.replace(".1.", ".") for name in names(store / "quarantine")}
