"""`ingest` says what became of every upload, in a table and in numbers, and shows hostile text harmlessly."""

import json
from pathlib import Path

import pytest
import torch

import tiny
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.tools import ingest, inspect
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, tiny.source_model().encoder.eval())
    return path


def shard(folder: Path, seed: int, rig: RigSpec | None = None, codec: str = "int8") -> Path:
    """One shard of two scenes; its manifest."""
    extractor = Extractor(tiny.source_model().encoder, rig or RigSpec(), codec)
    with extractor.shard_writer(folder) as writer:
        return extract([tiny.scan_with_car(seed), tiny.scan_with_car(seed + 1)], extractor, writer).shards[0]


def run(encoder: Path, incoming: Path, store: Path, *arguments: object) -> int:
    words = [incoming, "--store", store, "--detector", encoder, *arguments]
    return run_command(ingest.command, [str(word) for word in words])


def test_every_outcome_is_counted_in_shards_and_scenes(encoder, tmp_path, capsys):
    incoming, store = tmp_path / "in", tmp_path / "store"
    shard(incoming, 0)
    shard(incoming, 10, RigSpec(z_shift=0.5))
    damaged = shard(incoming, 20)
    damaged.with_suffix(".tar").write_bytes(damaged.with_suffix(".tar").read_bytes() + b"x")
    shard(incoming, 30).with_suffix(".tar").unlink()
    (incoming / "notes.txt").write_text("x")
    assert run(encoder, incoming, store, "--json", tmp_path / "j") == 0
    counts = json.loads((tmp_path / "j").read_text())["counts"]
    assert {k: v for k, v in counts.items() if v} == {
        "shards_accepted": 1,
        "shards_refused": 1,
        "shards_foreign": 1,
        "shards_waiting": 1,
        "names_unrecognized": 1,
        "scenes_accepted": 2,
        "scenes_foreign": 2,
        "scenes_in_store": 2,
    }
    printed = capsys.readouterr()
    assert "notes.txt" in printed.err
    assert "docs/rollout.md" in printed.err
    assert "waiting" in printed.out


def test_an_ingest_of_another_encoders_shards_alone_fails_and_moves_nothing(encoder, tmp_path, capsys):
    incoming = tmp_path / "in"
    shard(incoming, 0, RigSpec(z_shift=0.5))
    before = sorted(p.name for p in incoming.iterdir())
    assert run(encoder, incoming, tmp_path / "store") == 2
    assert "no shard was accepted" in capsys.readouterr().err
    assert sorted(p.name for p in incoming.iterdir()) == before
    assert run(encoder, incoming, tmp_path / "store", "--z-shift", 0.5) == 0


@pytest.mark.parametrize(
    "text", ["\\[/x]", "[/x]", "[bold", "\x1b[2J\x1b]0;gone\x07", "\u202egnp.exe", "x" * 50_000, "a\nerror: b"]
)
def test_text_of_a_hostile_manifest_is_shown_harmlessly_by_ingest_and_inspect(encoder, tmp_path, capsys, text):
    incoming, store = tmp_path / "in [bold", tmp_path / "store [/x]"
    path = shard(incoming, 0)
    record = json.loads(path.read_bytes())
    record["members"][0]["length"] = text
    path.write_text(json.dumps(record))
    shard(incoming, 10)
    (incoming / "\x1b[31mname").write_text("x")
    assert run(encoder, incoming, store) == 0
    assert run_command(inspect.command, [str(store)]) == 0
    printed = capsys.readouterr()
    assert not {c for c in printed.out + printed.err if not c.isprintable()} - {"\n"}
    assert len(printed.out) < 20_000


def test_scenes_without_a_cell_are_warned_about_and_nothing_else_is_an_error(encoder, tmp_path, capsys):
    extractor = Extractor(tiny.source_model().encoder, RigSpec(), "int8")
    with extractor.shard_writer(tmp_path / "in") as writer:  # as an earlier version did
        writer.add(extractor.smash(tiny.cloud(torch.zeros(0, 3)))[0])
    assert run(encoder, tmp_path / "in", tmp_path / "store") == 2
    assert "none of the 1 new scenes has a cell" in capsys.readouterr().err.replace("\n", " ")


def test_an_emptied_folder_is_nothing_to_ingest(encoder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert run(encoder, tmp_path / "in", tmp_path / "store") == 0
    assert "there is nothing to ingest: no shard lies in" in " ".join(capsys.readouterr().err.split())


def test_several_folders_are_taken_in_at_once_and_a_missing_one_moves_nothing(encoder, tmp_path, capsys):
    one, other, store = tmp_path / "one", tmp_path / "other", tmp_path / "store"
    shard(one, 0)
    shard(other, 10)
    words = [one, tmp_path / "none", "--store", store, "--detector", encoder]
    assert run_command(ingest.command, [str(word) for word in words]) == 2
    assert "none does not exist" in " ".join(capsys.readouterr().err.split())
    assert len(list(one.iterdir())) == 2
    words = [one, other, "--store", store, "--detector", encoder, "--json", tmp_path / "j"]
    assert run_command(ingest.command, [str(word) for word in words]) == 0
    counts = json.loads((tmp_path / "j").read_text())["counts"]
    assert (counts["shards_accepted"], counts["scenes_accepted"], counts["scenes_in_store"]) == (2, 4, 4)


def test_shards_that_repeat_scenes_are_named_with_those_that_hold_them_already(encoder, tmp_path, capsys):
    first = shard(tmp_path / "in", 0)
    assert run(encoder, tmp_path / "in", tmp_path / "store") == 0
    second = shard(tmp_path / "in", 1)  # its first scan is the second of the other shard
    capsys.readouterr()
    assert run(encoder, tmp_path / "in", tmp_path / "store", "--json", tmp_path / "j") == 0
    printed = capsys.readouterr()
    assert "new shards with repeated scenes" in printed.out
    assert second.stem in printed.out
    (found,) = json.loads((tmp_path / "j").read_text())["repeated_shards"]
    assert found == {"shard": second.stem, "scenes": 2, "repeated": 1, "others": [first.stem]}


def test_one_foreign_shard_is_told_in_good_grammar(encoder, tmp_path, capsys):
    shard(tmp_path / "in", 0, RigSpec(z_shift=0.5))
    assert run(encoder, tmp_path / "in", tmp_path / "store") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "1 shard is of another encoder or rig" in said
    assert "1 are" not in said


def test_the_store_is_no_incoming_folder(encoder, tmp_path, capsys):
    shard(tmp_path / "in", 0)
    assert run(encoder, tmp_path / "in", tmp_path / "store") == 0
    before = sorted(p.name for p in (tmp_path / "store" / "shards").iterdir())
    for folder in ("store", "store/shards", "store/../store"):
        assert run(encoder, tmp_path / folder, tmp_path / "store") == 2
        assert "is the store itself; give the folder that the vehicles upload to" in " ".join(capsys.readouterr().err.split())
    assert sorted(p.name for p in (tmp_path / "store" / "shards").iterdir()) == before


def test_a_tar_that_comes_again_without_its_manifest_is_there_already_if_every_byte_is_the_same(encoder, tmp_path, capsys):
    manifest = shard(tmp_path / "in", 0)
    tar = manifest.with_suffix(".tar")
    content = tar.read_bytes()
    assert run(encoder, tmp_path / "in", tmp_path / "store") == 0
    kept = (tmp_path / "store" / "shards" / manifest.name).read_bytes()
    for final in ([], ["--final"]):
        tar.write_bytes(content)
        assert run(encoder, tmp_path / "in", tmp_path / "store", *final, "--json", tmp_path / "j") == 0
        counts = json.loads((tmp_path / "j").read_text())["counts"]
        assert {k: v for k, v in counts.items() if v} == {"shards_already_there": 1, "scenes_in_store": 2}
        assert not tar.exists()
    tar.write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    assert run(encoder, tmp_path / "in", tmp_path / "store", "--json", tmp_path / "j") == 2
    assert json.loads((tmp_path / "j").read_text())["counts"]["shards_refused"] == 1
    assert (tmp_path / "store" / "shards" / manifest.name).read_bytes() == kept
    assert (tmp_path / "store" / "shards" / tar.name).read_bytes() == content
    assert (tmp_path / "store" / "quarantine" / tar.name).exists()


def test_scenes_of_several_codecs_are_counted_when_the_second_one_comes(encoder, tmp_path, capsys):
    shard(tmp_path / "in", 0)
    assert run(encoder, tmp_path / "in", tmp_path / "store") == 0
    assert capsys.readouterr().err == ""
    shard(tmp_path / "in", 10, codec="fp16")
    assert run(encoder, tmp_path / "in", tmp_path / "store") == 0
    printed = capsys.readouterr()
    assert "the store holds scenes of several codecs (fp16 2, int8 2). A training uses all of them" in " ".join(
        printed.err.split()
    )
    (row,) = [line for line in printed.out.splitlines() if "in the store now" in line]
    assert [cell.strip() for cell in row.strip("│ \n").split("│")] == ["in the store now", "2", "4"]
