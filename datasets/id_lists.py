"""Lists of frame ids, one per line: `ImageSets/NAME.txt`, `splits/NAME.txt`, `--ids FILE`.

A list may have a byte order mark, line ends of Windows, blank lines and `#` comments. An entry may be the file name of a scan, with
its suffix or with its path; `000001` may be written `1` where only one frame has this number. Everything else is refused at once, with
the line, before any scan is read.

Read next: `layouts.py`, which makes splits of these lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InvalidInput
from ..core.foreign_text import check_name, shown
from ..core.text_files import read_text

_SUFFIXES = (".pcd.bin", ".bin", ".npy", ".pcd", ".txt", ".png", ".jpg", ".jpeg")
_WHOLE_NAMES = ("trainval", "all")


def read_ids(path: Path | str) -> tuple[str, ...]:
    """Read a list of names, one per line: the frame ids of a split.

    Args:
        path: A text file.

    Returns:
        The names in the order of the file, without suffixes and folders.

    Raises:
        InvalidInput: The file is missing, empty or no text, a name occurs twice, or a name cannot be a file name.
    """
    path = Path(path)
    if not path.is_file():
        found = list_names(path.parent)
        raise InvalidInput(f"there is no split file {path}; the folder holds {', '.join(map(shown, found)) or 'no split'}")
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "list of frames").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        text = text.partition(" #")[0].partition("\t#")[0].strip()
        where = f"{path}, line {number}"
        name = _id_of(text, where)
        if name in lines:
            raise InvalidInput(f"{where}: {shown(name)!r} occurs twice, first in line {lines[name]}; remove one")
        lines[name] = number
    if not lines:
        raise InvalidInput(f"{path} names no frame; write one id per line")
    return tuple(lines)


def _id_of(text: str, where: str) -> str:
    """The frame id that one line names."""
    name = text.strip("\"'") if text[:1] in "\"'" else text
    folder, slash, last = name.replace("\\", "/").rpartition("/")
    suffix = next((s for s in _SUFFIXES if last.lower().endswith(s) and len(last) > len(s)), "")
    if slash and (not suffix or ".." in folder.split("/")):
        raise InvalidInput(
            f"{where}: {shown(text)!r} is a path and cannot be a file name; write the id of the frame alone, its file name without suffix"
        )
    try:
        return check_name(last[: len(last) - len(suffix)], "frame id")
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from error


def list_names(folder: Path) -> tuple[str, ...]:
    """List the names of the lists in a folder.

    Args:
        folder: Folder of `NAME.txt` files.

    Returns:
        The names, sorted. Hidden files, such as macOS's `._NAME.txt`, are left out; see `hidden_files`.
    """
    return tuple(sorted(p.stem for p in folder.glob("*.txt") if not p.name.startswith(".")))


def hidden_files(folder: Path, suffixes: Sequence[str] = (".txt",)) -> int:
    """Count the hidden files of a folder, which are never read.

    Args:
        folder: The folder.
        suffixes: Which files count.

    Returns:
        Their number; 0 where there is no folder.
    """
    return sum(p.name.startswith(".") and p.suffix in suffixes for p in folder.iterdir()) if folder.is_dir() else 0


def read_lists(folder: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read the lists `NAME.txt` of a folder.

    Args:
        folder: The folder.
        names: Names of the lists; none means all of them.

    Returns:
        Ids by name of the list.

    Raises:
        InvalidInput: As for `read_ids`.
    """
    return {check_name(name, "split name"): read_ids(folder / f"{name}.txt") for name in names or list_names(folder)}


@dataclass(frozen=True, kw_only=True)
class FramePlaces:
    """The frames that exist where a list's frames belong."""

    ids: frozenset[str]
    """Ids of the frames."""
    where: str
    """The folder, for messages."""


def find_listed(
    lists: Mapping[str, Sequence[str]], places: Mapping[str, FramePlaces], folder: Path
) -> dict[str, tuple[str, ...]]:
    """Find the frames that lists name, before anything is read. A short number (`1`) finds the one frame with this number (`000001`).

    Args:
        lists: Ids by name of the list.
        places: The frames that exist, by name of the list.
        folder: Folder of the lists, for the message.

    Returns:
        The lists, with the ids as the files have them.

    Raises:
        InvalidInput: Frames do not exist: all of them are counted, and the first of each list are named.
    """
    found = {split: _spelled(names, places[split].ids) for split, names in lists.items()}
    faults, lost = [], []
    for split, spelled in found.items():
        missing = [name for name, frame in zip(lists[split], spelled) if frame is None]
        lost += missing
        if missing:
            named = ", ".join(shown(name, most=40) for name in missing[:3]) + (", …" if len(missing) > 3 else "")
            faults.append(
                f"{len(missing)} of the {len(spelled)} frames of {split}.txt ({named}) are not in {places[split].where}"
            )
    if faults:
        good = [split for split, spelled in found.items() if None not in spelled]
        remedy = f"leave the list out (--splits {' '.join(good)})" if good else "check the root"
        form = ": one id per line, nothing else" if any(c in name for name in lost for c in " ,") else ""
        raise InvalidInput(
            f"the lists in {folder} name frames that do not exist: {'; '.join(faults)}; {remedy}, or correct it{form}"
        )
    result = {split: tuple(frame for frame in spelled if frame is not None) for split, spelled in found.items()}
    for split, names in result.items():
        if len(set(names)) < len(names):
            raise InvalidInput(f"{folder / split}.txt names a frame twice, once by its short number; remove one")
    return result


def _spelled(names: Sequence[str], exact: frozenset[str]) -> list[str | None]:
    """Ids as the files have them; None where there is no such frame."""
    numbers: dict[int, list[str]] = {}
    for name in exact:
        if _is_number(name):
            numbers.setdefault(int(name), []).append(name)

    def spelled(name: str) -> str | None:
        if name in exact:
            return name
        same = numbers.get(int(name), []) if _is_number(name) else []
        return same[0] if len(same) == 1 else None

    return [spelled(name) for name in names]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 20


def overlap_warnings(splits: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Say which splits share frames although they should not.

    A split whose name holds that of another (`trainval`, `train_small`) is meant to share its frames, and so is `all`.

    Args:
        splits: Frame ids by name of the split.

    Returns:
        One sentence for each pair.
    """
    warnings = []
    names = [name for name in splits if name not in _WHOLE_NAMES]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = set(splits[one]) & set(splits[other])
            if shared and one not in other and other not in one:
                warnings.append(
                    f"the splits {one} and {other} share {len(shared)} {'frame' if len(shared) == 1 else 'frames'} ({', '.join(sorted(shared)[:3])}); a score on one of them says "
                    "nothing about a detector that was trained on the other"
                )
    return tuple(warnings)
