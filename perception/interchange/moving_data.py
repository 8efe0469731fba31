"""Moves labels and detections between our folders and files of OpenPCDet and mmdetection3d, for `tools/import_infos.py` and its like."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...core.errors import InvalidInput
from ...core.files import atomic_file, write_atomically
from ...core.foreign_text import check_name, is_one_word, shown
from ...core.new_folder import new_folder
from ...datasets.kitti_text import read_objects, write_objects
from ...datasets.prepared import PreparedDataset
from .info_files import InfoFrame, described, frames_of, mmdet3d_infos, openpcdet_infos
from .kitti_infos import is_kitti
from .plain_pickle import read_plain_pickle
from .plain_pickle_writing import write_plain_pickle
from .result_files import results_of, results_to
from .settings import Program


@dataclass(frozen=True, kw_only=True)
class MovedLabels:
    """What was read of an info file, or written to one."""

    frames: int
    """Number of frames."""
    objects: dict[str, int]
    """Number of boxes by class."""
    dropped: int
    """Objects without a box or a class: DontCare, or of weight 0."""
    unlabeled: int
    """Frames without labels."""
    understood: str = ""
    """How the boxes of an info file were understood."""
    files: tuple[Path, ...]
    """What was written."""


def labels_from_infos(file: str | Path, out: str | Path, *, split: str, points: Path | None) -> MovedLabels:
    """Turn an info file into a folder that `prepare folder` reads.

    Args:
        file: info file of OpenPCDet (KITTI or custom) or mmdetection3d 1.x.
        out: folder to add `labels/ID.txt` and `splits/SPLIT.txt` to.
        split: name of the split.
        points: folder of the scans, ID.bin or ID.npy. `out/points` becomes a link to it; None where the scans lie there already.

    Returns:
        What was read.

    Raises:
        InvalidInput: The file is no info file, an id cannot be the name of a file, `points` is no folder or another one than that of
            `out`, or `out` has other labels of a frame.
    """
    content, out = read_plain_pickle(file), Path(out)
    frames = frames_of(content)
    check_name(split, "the split (--split)")
    if points is not None and not points.is_dir():
        raise InvalidInput(f"there is no folder {points} (--points)")
    ids = [frame.id for frame in frames]
    if len(set(ids)) < len(ids):
        raise InvalidInput(f"{file} names a frame twice")
    for frame in frames:
        check_name(frame.id, "a frame id")
        if bad := next((kind for kind in frame.types if not is_one_word(kind)), None):
            raise InvalidInput(
                f"frame {frame.id} has the class {shown(repr(bad))}, and a label file needs names of one word; rename it in the file"
            )
    link = out / "points"
    if points is not None and (link.is_symlink() or link.exists()) and link.resolve() != points.resolve():
        raise InvalidInput(f"{link} is there already and is not {points} (--points); give another --out for other scans")
    texts = {out / "labels" / f"{frame.id}.txt": _label_text(frame) for frame in frames if frame.labeled}
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text:
            raise InvalidInput(f"{path} is there already with other labels; give another --out, or delete it")
    for path, text in texts.items():
        write_atomically(path, text)
    listed = out / "splits" / f"{split}.txt"
    write_atomically(listed, "".join(f"{name}\n" for name in ids).encode())
    if points is not None and not link.exists():
        link.symlink_to(points.resolve())
    return MovedLabels(
        frames=len(frames),
        objects=dict(Counter(kind for frame in frames for kind in frame.types)),
        dropped=sum(frame.dropped for frame in frames),
        unlabeled=sum(not frame.labeled for frame in frames),
        understood=described(content),
        files=(listed,),
    )


def _label_text(frame: InfoFrame) -> bytes:
    rows = zip(frame.types, frame.boxes.tolist(), strict=True)
    return "".join(" ".join([kind, *(f"{value:.9g}" for value in box)]) + "\n" for kind, box in rows).encode()


def infos_from_data(program: Program, data: PreparedDataset, split: str, out: str | Path) -> MovedLabels:
    """Write a split as an info file of another program, with its scans beside it.

    Args:
        program: whose form.
        data: the split.
        split: its name.
        out: folder to write; it must not exist or be empty.

    Returns:
        What was written: `custom_infos_SPLIT.pkl` (`kitti_infos_SPLIT.pkl` for data of KITTI), a list of the ids, and the scans, back in
        the frame of the sensor, as `points/ID.npy` for OpenPCDet and `points/ID.bin` for mmdetection3d.

    Raises:
        InvalidInput: The folder holds files.
    """
    out = Path(out)
    with new_folder(out) as folder:
        name = f"{'kitti' if is_kitti(data) else 'custom'}_infos_{split}.pkl"
        content = list(openpcdet_infos(data)) if program == "openpcdet" else mmdet3d_infos(data)
        write_plain_pickle(folder / name, content)
        write_atomically(folder / "ImageSets" / f"{split}.txt", "".join(f"{frame}\n" for frame in data.ids).encode())
        objects: Counter[str] = Counter()
        dropped = unlabeled = 0
        for index, frame_id in enumerate(data.ids):
            frame = data[index]
            cloud = frame.rig.to_sensor(frame.points)
            rows = np.concatenate([cloud.xyz.numpy(), cloud.features.numpy()], 1).astype("<f4")
            if program == "openpcdet":
                with atomic_file(folder / "points" / f"{frame_id}.npy") as file:
                    np.save(file, rows)
            else:
                write_atomically(folder / "points" / f"{frame_id}.bin", rows.tobytes())
            if frame.labels is None:
                unlabeled += 1
                continue
            kept = frame.labels.weight > 0
            dropped += int((~kept).sum())
            objects.update(data.classes[number] for number in frame.labels.classes[kept].tolist())
    files = (out / name, out / "ImageSets" / f"{split}.txt", out / "points")
    return MovedLabels(frames=len(data), objects=dict(objects), dropped=dropped, unlabeled=unlabeled, files=files)


def detections_from_results(file: str | Path, out: str | Path) -> int:
    """Turn a result file of OpenPCDet or mmdetection3d into KITTI's text files.

    Args:
        file: the `.pkl`.
        out: folder for one ID.txt per frame; it must not exist or be empty, because text files of other frames would be scored too.

    Returns:
        Number of frames.

    Raises:
        InvalidInput: The file holds no such results, or the folder holds files.
    """
    found = results_of(read_plain_pickle(file))
    with new_folder(Path(out)) as folder:
        for name, objects in found.items():
            check_name(name, "a frame id")
            write_objects(folder / f"{name}.txt", objects)
    return len(found)


def results_from_detections(program: Program, folder: str | Path, out: str | Path) -> int:
    """Turn KITTI's text files of detections into a result file of another program.

    Args:
        program: whose form.
        folder: one ID.txt per frame, as `predict --format kitti` and `evaluate run` write them.
        out: the `.pkl` to write.

    Returns:
        Number of frames.

    Raises:
        InvalidInput: There is no text file, or one is not KITTI's.
    """
    files = sorted(path for path in Path(folder).glob("*.txt") if not path.name.startswith("."))
    if not files:
        raise InvalidInput(f"{folder} holds no text files of detections; write them with `predict --format kitti`")
    write_plain_pickle(out, results_to(program, {path.stem: read_objects(path) for path in files}))
    return len(files)
