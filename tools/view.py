"""`upcycle3d view`: frames, scans or smashed scenes as pictures, as a page for a browser, and as files and windows of other programs.

Read next: `view_frames.py` (what is drawn), `view_pictures.py` (pictures in BEV), `perception/viewers/` (everything in three dimensions).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InvalidInput, UpcycleError
from ..core.foreign_text import check_name
from ..core.ledger_rules import warnings_of
from ..core.provenance import provenance_of_process
from ..core.scan_options import ScanOptions
from ..perception.viewers.colors import FeatureColors, height_span
from ..perception.viewers.drawn_frame import LAYER_TITLES, DrawnFrame
from ..perception.viewers.gltf import write_gltf
from ..perception.viewers.html_page import MOST_PAGE_POINTS, STEPS, write_viewer_page
from ..perception.viewers.open3d_view import picture_open3d, show_open3d
from ..perception.viewers.ply import write_ply
from ..perception.viewers.rerun_file import write_rerun
from .console import console, print_table, print_warning, run_command, settle, warnings_so_far, write_json
from .data_option import DataOption
from .scan_option import ScanOption
from .view_frames import FramesToDraw, Looker, frames_of_data, frames_of_scans, frames_of_store
from .view_pictures import check_range, draw_picture, report_pictures

_SOURCES = "--data DIR[:SPLIT] (a prepared dataset), --scans FILE (files of scans) or --store DIR (smashed scenes)"
_COARSE = 0.05  # meters of rounding from which the page is warned of; a scan that reaches 3 km to each side
_WAYS = "--out, --html, --rerun, --ply, --gltf, --open3d or --open3d-picture"


@dataclass(frozen=True, kw_only=True)
class DrawFrames:
    """Draw frames of a prepared dataset, files of scans, or the smashed scenes of a store. Give one of these three, and where to draw them."""

    data: DataOption | None = None
    """Prepared dataset, `DIR[:SPLIT]`; all frames where no split is named."""
    scans: tuple[Path, ...] = ()
    """Scan files (.bin, .npy, .pcd) or folders of them, without a prepared dataset."""
    store: Path | None = None
    """Store of smashed scenes. They hold no points; the cells that their features occupy are drawn."""
    detections: Path | None = None
    """With `--scans`: a file of detections that `predict` wrote, or its folder. Both are in the sensor frame."""
    detector: Path | None = None
    """Run folder or detector file. Its detections are drawn too, and its features at the cut as colored cells."""
    teacher: Path | None = None
    """Run folder of `upcycle`. The labels that its teacher makes are drawn, and the objects that F-GT pastes, drawn anew."""
    out: Path | None = None
    """Folder for pictures in BEV (PNG). They show truth and detections, and need no screen."""
    html: Path | None = None
    """One HTML page to turn, zoom and click in, for any browser, without a network."""
    rerun: Path | None = None
    """Recording for the Rerun viewer (.rrd); needs the extra `viz`."""
    ply: Path | None = None
    """Folder for PLY files of points, cells and boxes."""
    gltf: Path | None = None
    """One binary glTF file (.glb) with points and boxes, a scene for each frame."""
    open3d: bool = False
    """Open a window of Open3D; needs the extra `viz` and a screen."""
    open3d_picture: Path | None = None
    """Picture (PNG) of the first frame, drawn by Open3D without a window; needs the extra `viz` and Vulkan."""
    limit: int = 8
    """Highest number of frames to draw."""
    range: tuple[float, float, float, float] = (0.0, -25.6, 51.2, 25.6)
    """Part that the pictures in BEV show: x0 y0 x1 y1 in meters."""
    min_score: float = 0.3
    """Detections with a lower score are left out."""
    html_points: int = MOST_PAGE_POINTS
    """Highest number of points of a frame in the page. A frame with more is thinned out at random."""
    reading: ScanOption = ScanOptions()
    """How the files of `--scans` are read."""
    json: Path | None = None
    """Also write the list of pictures and files to this file as JSON."""


def command(config: DrawFrames) -> None:
    """Draw frames, labels, detections and features in BEV or in three dimensions."""
    _check(config)
    check_range(config.range)
    drawn = _frames(config)
    pictures = [
        draw_picture(frame, config.out, config.range, min_score=config.min_score, below_score=below)
        for frame, below in zip(drawn.frames, drawn.below_score, strict=True)
        if config.out is not None
    ]
    if pictures:
        report_pictures(pictures, config.range, config.min_score, with_points=drawn.frames[0].points is not None)
    if _has_viewer(config):
        _report_frames(drawn)
    if len(drawn.frames) < drawn.found:
        console.print(
            f"{len(drawn.frames)} of {drawn.found:,} frames are drawn, the first ones; --limit N draws more", soft_wrap=True
        )
    files, failure = _write_files(config, drawn.frames)
    if files:
        print_table("files", ("what", "file", "holds"), files)
    for text in drawn.warnings:
        print_warning(text)
    value = {
        "frames_found": drawn.found,
        "pictures": [vars(p) for p in pictures],
        "files": [{"what": what, "file": file} for what, file, _ in files],
        "ledger": drawn.ledger.to_json(),
        "warnings": [*warnings_so_far(), *warnings_of(drawn.ledger)],
    }
    write_json(config.json, value)
    settle(drawn.ledger, "what was read")
    if failure is not None:
        raise failure
    if config.open3d:
        show_open3d(drawn.frames)


def _check(config: DrawFrames) -> None:
    """Refuse options that do not fit together, before anything is read."""
    given = [config.data is not None, bool(config.scans), config.store is not None]
    if sum(given) != 1:
        raise InvalidInput(f"view draws one kind of data: give one of {_SOURCES}, found {sum(given)} of them")
    if config.out is None and not _has_viewer(config):
        raise InvalidInput(f"say where to draw: {_WAYS}")
    if config.limit < 1 or not 0 <= config.min_score <= 1:
        raise InvalidInput(
            f"--limit must be at least 1 and --min-score between 0 and 1, found {config.limit} and {config.min_score}"
        )
    if config.html_points < 1:
        raise InvalidInput(f"--html-points must be at least 1, found {config.html_points}")
    if config.scans and (config.detector is not None or config.teacher is not None):
        raise InvalidInput(
            "--detector and --teacher look at a prepared dataset or a store; for files of scans run `upcycle3d predict` first, and give its "
            "folder with --detections"
        )
    if config.detections is not None and not config.scans:
        raise InvalidInput("--detections belongs to --scans; for a prepared dataset or a store give --detector")
    if config.reading != ScanOptions() and not config.scans:
        raise InvalidInput("options that say how scans are read (--columns, --z-shift and others) belong to --scans")
    config.reading.refuse_image_size("view crops no scan; leave it out")
    for option, path in (
        ("--html", config.html),
        ("--rerun", config.rerun),
        ("--gltf", config.gltf),
        ("--open3d-picture", config.open3d_picture),
    ):
        if path is not None and path.is_dir():
            raise InvalidInput(f"{option} takes the name of a file, and {path} is a folder; add one")
    for option, path in (("--out", config.out), ("--ply", config.ply)):
        if path is not None and path.exists() and not path.is_dir():
            raise InvalidInput(f"{option} takes the name of a folder, and {path} is a file; choose another name")


def _has_viewer(config: DrawFrames) -> bool:
    """Whether anything but pictures in BEV is asked for."""
    ways = (config.html, config.rerun, config.ply, config.gltf, config.open3d_picture)
    return config.open3d or any(way is not None for way in ways)


def _frames(config: DrawFrames) -> FramesToDraw:
    if config.scans:
        return frames_of_scans(config.scans, config.detections, config.reading, limit=config.limit, min_score=config.min_score)
    looker = Looker.load(config.detector, config.teacher, with_features=_has_viewer(config) or config.store is not None)
    if config.store is not None:
        return frames_of_store(config.store, looker, limit=config.limit, min_score=config.min_score)
    assert config.data is not None
    return frames_of_data(config.data, looker, limit=config.limit, min_score=config.min_score)


def _write_files(config: DrawFrames, frames: Sequence[DrawnFrame]) -> tuple[list[tuple[str, str, str]], UpcycleError | None]:
    """Write what is asked for: what, file and size of each. A missing package or driver is given back, so that the other files are kept."""
    title = f"upcycle3d view: {frames[0].id}" + (f" and {len(frames) - 1} more" if len(frames) > 1 else "")
    files: list[tuple[str, str, str]] = []
    if config.html is not None:
        page = write_viewer_page(
            config.html, frames, title=title, source=provenance_of_process().sentence(), most_points=config.html_points
        )
        left = f", {page.points_left_out:,} points left out" if page.points_left_out else ""
        rounding = f"rounded by at most {1000 * page.rounding:.2g} mm"
        if page.rounding > _COARSE:
            print_warning(
                f"the page rounds coordinates by up to {page.rounding:.3g} m, because points of a frame lie {2 * STEPS * page.rounding:.3g} m apart; "
                "look for points that are far away by mistake, or draw with --ply or --gltf, which round nothing"
            )
        files.append(("page", str(config.html), f"{page.bytes / 1e6:.2f} MB, {page.points:,} points, {rounding}{left}"))
    if config.ply is not None:
        heights, colors = height_span(frames), FeatureColors.of(frames)
        for frame in frames:
            check_name(frame.id, "frame id")
        written = [path for frame in frames for path in write_ply(config.ply, frame, heights=heights, feature_colors=colors)]
        files.append(("PLY", str(config.ply), f"{len(written)} files"))
    if config.gltf is not None:
        files.append(("glTF", str(config.gltf), f"{write_gltf(config.gltf, frames) / 1e6:.2f} MB"))
    try:
        if config.rerun is not None:
            files.append(("Rerun", str(config.rerun), f"{write_rerun(config.rerun, frames, title=title) / 1e6:.2f} MB"))
        if config.open3d_picture is not None:
            picture_open3d(config.open3d_picture, frames[0])
            files.append(("Open3D", str(config.open3d_picture), frames[0].id))
    except UpcycleError as error:
        return files, error
    return files, None


def _report_frames(drawn: FramesToDraw) -> None:
    """Print what the viewers show of each frame, and warn of what cannot be drawn."""
    rows, left_out = [], 0
    for frame, below in zip(drawn.frames, drawn.below_score, strict=True):
        points, cells, layers = frame.points_to_draw(), frame.cells_to_draw(), {layer.name: layer for layer in frame.layers()}
        counts = [str(len(layers[name])) if name in layers else "-" for name in LAYER_TITLES]
        rows.append(
            (
                frame.id,
                "-" if points is None else f"{len(points.xyz):,}",
                "-" if cells is None else f"{len(cells.centers):,}",
                *counts,
                below,
            )
        )
        left_out += (0 if points is None else points.left_out) + sum(layer.left_out for layer in layers.values())
    print_table("frames; - where nobody looked", ("frame", "points", "cells", *LAYER_TITLES.values(), "low score"), rows)
    if left_out:
        print_warning(
            f"{left_out} points or boxes hold NaN, infinite values or sizes of zero, and are not drawn; look at their source"
        )
    if all(frame.points is None for frame in drawn.frames):
        console.print("smashed scenes hold no points, so their occupied cells are drawn; colors stand for features")


if __name__ == "__main__":
    sys.exit(run_command(command))
