"""A file appears whole or not at all, whatever happens while it is written."""

from pathlib import Path

import pytest

from upcycle3d.core.files import atomic_file, sync_folder, write_atomically


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
