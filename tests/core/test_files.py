"""A file appears whole or not at all, whatever happens while it is written."""

from pathlib import Path

import pytest

from upcycle3d.core.errors import UpcycleError
from upcycle3d.core.files import atomic_file, locked_folder, remove_litter, sync_folder, write_atomically


def test_a_file_and_its_folders_appear_whole_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(str(tmp_path / "new" / "a.txt"), [b"first ", b"", b"second"])
    with atomic_file(str(tmp_path / "new" / "b.txt")) as file:
        file.write(b"third")
    sync_folder(str(tmp_path))
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == {"a.txt": b"first second", "b.txt": b"third"}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full_disk(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_block_that_raises_writes_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_only_temporary_files_of_this_program_are_litter(tmp_path):
    for name in (".0123456789abcdef.tmp", ".objects.17.tmp", ".mine.tmp", "a.tmp", "data"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".features.tmp").mkdir()
    (tmp_path / ".features.tmp" / "part").write_bytes(b"")
    assert remove_litter(tmp_path, ".features.tmp") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "a.tmp", "data"]
    assert remove_litter(tmp_path / "missing") == 0


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    with locked_folder(tmp_path / "a", "busy"), pytest.raises(UpcycleError, match="busy"), locked_folder(tmp_path / "a", "busy"):
        pass
    with locked_folder(tmp_path / "a", "busy"):
        pass
