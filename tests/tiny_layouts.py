"""Small datasets on disk in KITTI's layout and as a folder of scans, to be broken by tests. `import tiny_layouts` and call, for example:

root = tiny_layouts.kitti(tmp_path / "raw", name="Cars")          # four frames with three cars each; splits train and val
root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: ...) # the same scans and boxes as a folder of your own
code, errors = tiny_layouts.prepare(capsys, "kitti", root, out, "--classes", "Car")
"""

import math
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from upcycle3d.tools import prepare as prepare_tool
from upcycle3d.tools.console import run_command

IDS = tuple(f"{i:06d}" for i in range(4))
PROJECTION = np.array([[700.0, 0, 621, 0], [0, 700, 187.5, 0], [0, 0, 1, 0]])
MOUNTING = np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]])
RECTIFY = np.eye(3)
BOXES = np.array(
    [[15.0, 2.0, -0.93, 4.2, 1.8, 1.6, 0.1], [25.0, -5.0, -0.93, 3.9, 1.7, 1.6, 1.6], [38.0, 6.0, -0.93, 4.4, 1.9, 1.6, -0.4]]
)
"""x y z dx dy dz yaw of the three cars of every frame, which stand on a road at z = -1.73."""


def scan(seed: int, boxes: np.ndarray = BOXES) -> np.ndarray:
    """(N, 4) float32 of a road all around and the sides of the boxes."""
    random = np.random.default_rng(seed)
    radius, angle = 60 * np.sqrt(random.uniform(0.003, 1, 4000)), random.uniform(-math.pi, math.pi, 4000)
    parts = [np.stack([radius * np.cos(angle), radius * np.sin(angle), random.normal(-1.73, 0.02, 4000)], 1)]
    for box in boxes:
        side = random.uniform(-0.49, 0.49, (200, 3))
        axis = random.integers(0, 2, 200)
        side[np.arange(200), axis] = np.sign(side[np.arange(200), axis]) * 0.49
        side = side * box[3:6]
        cos, sin = math.cos(box[6]), math.sin(box[6])
        turned = np.stack([cos * side[:, 0] - sin * side[:, 1], sin * side[:, 0] + cos * side[:, 1], side[:, 2]], 1)
        parts.append(turned + box[:3])
    xyz = np.concatenate(parts)
    return np.concatenate([xyz, random.uniform(0, 1, (len(xyz), 1))], 1).astype(np.float32)


def kitti_line(box: np.ndarray, name: str = "Car", mounting: np.ndarray = MOUNTING) -> str:
    """One line of a label file; the 2D box is made up."""
    x, y, z, dx, dy, dz, yaw = box
    place = mounting @ [x, y, z - dz / 2, 1]
    turn = (-yaw - math.pi / 2 + math.pi) % (2 * math.pi) - math.pi
    return f"{name} 0 0 0 500 150 600 250 {dz} {dy} {dx} " + " ".join(f"{v:.4f}" for v in (*place, turn)) + "\n"


def row(name: str, matrix: np.ndarray) -> str:
    """One row of a calibration file."""
    return f"{name} " + " ".join(f"{v:.12e}" for v in np.asarray(matrix).ravel()) + "\n"


def calibration(projection: np.ndarray = PROJECTION, rectify: np.ndarray = RECTIFY, mounting: np.ndarray = MOUNTING) -> str:
    """Text of a calibration file of the object layout."""
    return row("P2:", projection) + row("R0_rect:", rectify) + row("Tr_velo_to_cam:", mounting)


def png(width: int, height: int) -> bytes:
    """The first bytes of a PNG picture."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", width, height) + b"\x08\0\0\0\0"


def jpeg(width: int, height: int, *, marker: int = 0xC0) -> bytes:
    """The first bytes of a JPEG picture: two segments before the frame header."""
    frame = struct.pack(">BBHBHHB", 0xFF, marker, 11, 8, height, width, 1) + b"\1\x11\0"
    return b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xdb\0\x05\0\1\2\xff" + frame


def kitti(
    root: Path,
    *,
    name: str = "Car",
    label: Callable[[int], str | bytes] | None = None,
    calib: str | None = None,
    splits: dict[str, Sequence[str]] | None = None,
    picture: tuple[str, bytes] | None = None,
) -> Path:
    """Four frames in KITTI's layout; `label` gives the text of a frame's label file, `picture` suffix and bytes."""
    base = root / "training"
    for folder in ("velodyne", "label_2", "calib", "image_2"):
        (base / folder).mkdir(parents=True)
    for index, frame in enumerate(IDS):
        (base / "velodyne" / f"{frame}.bin").write_bytes(scan(index).tobytes())
        text = "".join(kitti_line(box, name) for box in BOXES) if label is None else label(index)
        (base / "label_2" / f"{frame}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        (base / "calib" / f"{frame}.txt").write_text(calib or calibration())
        if picture:
            (base / "image_2" / f"{frame}{picture[0]}").write_bytes(picture[1])
    (root / "ImageSets").mkdir()
    for split, ids in (splits or {"train": IDS[:3], "val": IDS[3:]}).items():
        (root / "ImageSets" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
    return root


def folder(root: Path, *, line: Callable[[np.ndarray], str] | None = None, points: np.ndarray | None = None) -> Path:
    """The same four frames as a folder; `line` writes one box, `points` is a matrix (3, 3) that turns every scan."""
    line = line or (lambda box: "Car " + " ".join(f"{v:.4f}" for v in box))
    for name in ("points", "labels", "splits"):
        (root / name).mkdir(parents=True)
    for index, frame in enumerate(IDS):
        rows = scan(index)
        if points is not None:
            rows[:, :3] = rows[:, :3] @ points.T.astype(np.float32)
        (root / "points" / f"{frame}.bin").write_bytes(rows.tobytes())
        (root / "labels" / f"{frame}.txt").write_text("".join(line(box) + "\n" for box in BOXES))
    (root / "splits" / "train.txt").write_text("\n".join(IDS[:3]))
    (root / "splits" / "val.txt").write_text(IDS[3])
    return root


def prepare(capsys: pytest.CaptureFixture[str], layout: str, root: Path, out: Path, *options: str) -> tuple[int, str]:
    """Run `upcycle3d prepare` in this process: the exit code, and what it printed, tables and errors."""
    capsys.readouterr()
    code = run_command(prepare_tool.command, [layout, str(root), "--out", str(out), "--workers", "0", *options])
    heard = capsys.readouterr()
    assert "Traceback" not in heard.err
    return code, " ".join(re.sub("[│┃]", " ", heard.out + heard.err).split())
