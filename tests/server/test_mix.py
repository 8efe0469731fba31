"""Mixing at a gateway: no scene is lost or doubled, also when the gateway dies, and a shard says nothing about a vehicle."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import uploads
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.perception.server import mix as mixing
from upcycle3d.perception.server.ingest import verify_shard
from upcycle3d.perception.server.mix import MixReport, mix
from upcycle3d.perception.wire.manifest import read_manifest
from upcycle3d.perception.wire.sampling import SceneSampling
from upcycle3d.perception.wire.shards import ShardWriter
from upcycle3d.tools.mix import Mix, command


def scenes_in(folder: Path) -> dict[str, list[str]]:
    """Shard to the ids of its scenes, every byte verified."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        shard = verify_shard(
            path,
            path.with_suffix(".tar"),
            expected_spec=uploads.SPEC,
            expected_fingerprint=read_manifest(path).encoder_fingerprint,
        )
        found[path.stem] = list(shard.scene_ids)
    return found


def vehicles(root: Path, count: int = 4, scenes: int = 6) -> tuple[list[Path], dict[str, int]]:
    """A folder with one shard for each vehicle, and the vehicle of each scene."""
    folders, owner = [], {}
    for v in range(count):
        made = [uploads.scene(100 * v + i) for i in range(scenes)]
        uploads.upload(root / f"v{v}", made)
        folders.append(root / f"v{v}")
        owner |= {s.scene_id: v for s in made}
    return folders, owner


def test_every_scene_is_in_one_new_shard_and_the_old_ones_are_gone(tmp_path: Path):
    folders, owner = vehicles(tmp_path)
    report = mix(folders, tmp_path / "out", scenes_per_shard=10, rng=random.Random(0))
    found = scenes_in(tmp_path / "out")
    assert sorted(s for ids in found.values() for s in ids) == sorted(owner)
    assert sorted(found) == sorted(report.shards)
    assert (report.scenes, report.sources, report.unmixed, report.completed) == (24, 4, (), False)
    assert [len(ids) for ids in found.values()] == [8, 8, 8]  # three equal shards, not 10 + 10 + 4
    assert all(not list(folder.iterdir()) for folder in folders)
    assert not (tmp_path / "out.mix.json").exists()
    taken = uploads.ingest_all(tmp_path / "out", tmp_path / "store")
    assert (taken.new_scenes, taken.quarantined) == (24, ())


def test_two_scenes_of_a_shard_are_of_one_vehicle_no_more_often_than_by_chance(tmp_path: Path):
    """Oracle: in a random deal, a pair of a shard is of one vehicle with chance (scenes of a vehicle - 1) / (all scenes - 1)."""
    folders, owner = vehicles(tmp_path, count=5, scenes=20)
    mix(folders, tmp_path / "out", scenes_per_shard=20)
    pairs = Counter()
    for ids in scenes_in(tmp_path / "out").values():
        pairs.update(owner[a] == owner[b] for i, a in enumerate(ids) for b in ids[:i])
    assert pairs[True] / pairs.total() == pytest.approx(19 / 99, abs=0.06)


class Killed(BaseException):
    """The gateway loses power."""


@pytest.mark.parametrize("step", range(0, 26))
def test_a_gateway_that_dies_at_any_step_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int):
    """The process ends at the n-th change of a file. Oracle: afterwards each scene is in exactly one new shard."""
    folders, owner = vehicles(tmp_path, count=3, scenes=4)
    count = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step + 1:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr(mixing, "write_atomically", dying(mixing.write_atomically))
        try:
            mix(folders, tmp_path / "out", scenes_per_shard=5)
            died = False
        except Killed:
            died = True
    visible = [s for ids in scenes_in(tmp_path / "out").values() for s in ids]
    assert len(visible) == len(set(visible))
    again = mix(folders, tmp_path / "out", scenes_per_shard=5)
    assert died or not again.shards
    found = [s for ids in scenes_in(tmp_path / "out").values() for s in ids]
    assert sorted(found) == sorted(owner)
    assert all(not list(folder.iterdir()) for folder in folders)
    assert not (tmp_path / "out.mix.json").exists()


def test_a_new_shard_that_was_taken_away_before_the_gateway_died_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders, owner = vehicles(tmp_path, count=3, scenes=4)
    real, calls = mixing._write, 0

    def second_fails(planned, out):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return real(planned, out)

    with monkeypatch.context() as patch:
        patch.setattr(mixing, "_write", second_fails)
        with pytest.raises(Killed):
            mix(folders, tmp_path / "out", scenes_per_shard=5)
    uploaded = scenes_in(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    report = mix(folders, tmp_path / "out", scenes_per_shard=5)
    assert report.completed
    found = [s for ids in (*uploaded.values(), *scenes_in(tmp_path / "out").values()) for s in ids]
    assert sorted(found) == sorted(owner)


def test_damaged_foreign_and_lonely_shards_stay(tmp_path: Path):
    folders, owner = vehicles(tmp_path, count=3, scenes=3)
    lonely = uploads.upload(tmp_path / "v0", [uploads.scene(900, fingerprint=uploads.OTHER_ENCODER)])
    damaged = uploads.upload(tmp_path / "v1", [uploads.scene(901)])
    data = bytearray(damaged.with_suffix(".tar").read_bytes())
    data[600] ^= 1
    damaged.with_suffix(".tar").write_bytes(data)
    half = uploads.upload(tmp_path / "v2", [uploads.scene(902)])
    half.with_suffix(".tar").unlink()
    report = mix(folders, tmp_path / "out")
    assert {Path(u.manifest) for u in report.unmixed} == {lonely, damaged, half}
    assert sorted(s for ids in scenes_in(tmp_path / "out").values() for s in ids) == sorted(owner)
    assert all(path.exists() for path in (lonely, lonely.with_suffix(".tar"), damaged, damaged.with_suffix(".tar"), half))


def test_a_scene_that_two_shards_hold_is_mixed_once(tmp_path: Path):
    twice = uploads.scene(1)
    for name, other in (("a", 2), ("b", 3), ("c", 4)):
        uploads.upload(tmp_path / name, [twice, uploads.scene(other)] if name != "c" else [uploads.scene(4)])
    report = mix([tmp_path / n for n in "abc"], tmp_path / "out")
    found = [s for ids in scenes_in(tmp_path / "out").values() for s in ids]
    assert found.count(twice.scene_id) == 1
    assert "counts once" in report.unmixed[0].reason


def test_sampling_rules_are_kept_apart_and_recorded(tmp_path: Path):
    rule = SceneSampling(gap=7, share=0.5)
    for v in range(4):
        with ShardWriter(
            tmp_path / f"v{v}", spec=uploads.SPEC, fingerprint=uploads.ENCODER, codec="int8",
            sampling=rule if v % 2 else SceneSampling(),
        ) as writer:  # fmt: skip
            writer.add(uploads.scene(v))
    report = mix([tmp_path / f"v{v}" for v in range(4)], tmp_path / "out")
    rules = [read_manifest(tmp_path / "out" / f"{stem}.json").sampling for stem in report.shards]
    assert sorted(rules, key=lambda r: r.gap) == [SceneSampling(), rule]


def test_a_second_run_into_a_folder_is_refused_until_the_first_one_ends_or_is_killed(tmp_path: Path):
    """Oracle: another process, which holds the folder when the second run starts and is killed without a chance to clean up."""
    folders, owner = vehicles(tmp_path, count=2, scenes=2)
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    code = (
        "import sys, time\nfrom upcycle3d.perception.server import mix as m\n"
        "m._make_plan = lambda *given: (print('held', flush=True), time.sleep(600))\n"
        "m.mix(sys.argv[2:], sys.argv[1])"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out"), *map(str, folders)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "held\n"
            for out in ("out", "alias"):
                with pytest.raises(UpcycleError, match="another mix is writing into"):
                    mix(folders, tmp_path / out)
        finally:
            first.kill()
    assert mix(folders, tmp_path / "alias").scenes == len(owner)


def test_a_dead_run_is_completed_under_any_name_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders, owner = vehicles(tmp_path, count=2, scenes=2)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "alias").symlink_to(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(mixing, "sync_folder", lambda folder: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            mix(folders, tmp_path / "out")
    assert mix(folders, tmp_path / "far" / "alias").completed
    assert sorted(s for ids in scenes_in(tmp_path / "out").values() for s in ids) == sorted(owner)


def test_mistakes_are_refused(tmp_path: Path):
    folders, _ = vehicles(tmp_path, count=2, scenes=1)
    with pytest.raises(InvalidInput, match="does not exist"):
        mix([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(InvalidInput, match="both a source"):
        mix(folders, folders[0])
    with pytest.raises(InvalidInput, match="at least 2"):
        mix(folders, tmp_path / "out", fewest_shards=1)
    (tmp_path / "out.mix.json").write_text("{}")
    with pytest.raises(InvalidInput, match="not the plan of a mix"):
        mix(folders, tmp_path / "out")


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders, _ = vehicles(tmp_path, count=2, scenes=2)
    command(Mix(incoming=tuple(folders), out=tmp_path / "out", json=tmp_path / "report.json"))
    told = capsys.readouterr().out
    assert "4 scenes of 2 shards are in 1 new shards" in told
    assert f"next, on the server: upcycle3d ingest {tmp_path / 'out'} --store STORE --detector DETECTOR" in told
    assert '"sources": 2' in (tmp_path / "report.json").read_text()
    uploads.upload(tmp_path / "v0", [uploads.scene(5)])
    with pytest.raises(UpcycleError, match="nothing was mixed"):
        command(Mix(incoming=tuple(folders), out=tmp_path / "out"))
    assert "ingest" not in capsys.readouterr().out  # there is nothing to ingest
    empty: MixReport = mix([tmp_path / "v1"], tmp_path / "out")
    assert (empty.shards, empty.unmixed) == ((), ())
