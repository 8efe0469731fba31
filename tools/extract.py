"""`upcycle3d extract`: the vehicle side. Scans come in, shards of smashed scenes go out.

It loads no decoder, label, server or training code. Read next: `perception/vehicle/extractor.py`, and `perception/vehicle/progress.py`
for what happens after a kill.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

from ..core.device import find_device
from ..core.errors import InvalidInput, UpcycleError
from ..core.foreign_text import check_name, shown
from ..core.ledger import Ledger
from ..core.ledger_rules import TURNED_POINTS_STOP, warnings_of
from ..core.point_files import find_scans, read_scan
from ..core.rig import RigSpec
from ..core.scan_comparison import ScanWatch, reaches_behind, rig_differences, rig_of_scans
from ..core.scan_options import ScanOptions
from ..core.structures import PointCloud
from ..core.trained_on import TrainedOn
from ..perception.models.encoders.defended import defences_of
from ..perception.models.encoders.encoder import Encoder
from ..perception.models.encoders.scan_survey import boxes_outside_range, outside_height
from ..perception.vehicle.extractor import ExtractionReport, Extractor, extract
from ..perception.vehicle.progress import ExtractedScan, ExtractionProgress, ScanIdentity, default_progress_path, open_progress
from ..perception.vehicle.scan_choice import choose_scans
from ..perception.wire.encoder_file import check_fingerprint, load_encoder
from ..perception.wire.manifest import read_manifest
from ..perception.wire.sampling import EVERY_SCAN, FLEET_SAMPLING, SceneSampling
from .console import console, print_table, print_warning, progress_bar, run_command, settle, warnings_so_far, write_json
from .scan_option import ScanOption

_LOOKED_AT = 3  # scans that are read before the first one is extracted


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Run the vehicle half of a detector over scans and write what may leave the vehicle: features at the cut, in shards."""

    detector: Path
    """Run folder of the detector whose encoder the fleet runs, or the encoder file alone (`encoder.safetensors`)."""
    out: Path
    """Folder for the shards."""
    scans: tuple[Path, ...] = ()
    """Scan files (.bin, .npy, .pcd) or folders of them, in this order."""
    data: str | None = None
    """Instead of `--scans`: a prepared dataset, `DIR[:SPLIT]`; all frames where no split is named. Its rig is used."""
    ids: Path | None = None
    """File with one scan name (without suffix) per line. Only these scans are extracted."""
    read: ScanOption = ScanOptions()
    """How the files of `--scans` are read."""
    calib: Path | None = None
    """Folder of KITTI calibration files, one per scan. Only points that the camera sees are kept; needed for an encoder that was
    trained on such scans, which is refused without it where scans reach behind the sensor."""
    codec: Literal["fp16", "int8"] = "fp16"
    """How features are stored. `int8` halves the upload."""
    scenes_per_shard: int = 256
    """Scenes per shard. A large shard loses more work when the vehicle loses power before it is closed: its scans are extracted again."""
    shard_seconds: float | None = None
    """Close a shard after this time, also with fewer scenes. By default only the number of scenes and their size count."""
    resume: bool = False
    """Go on after a kill, a full disk or with new scans: scans that are in finished shards are left out by their names, with a warning where
    their content is another one now. Also right for the first run."""
    append: bool = False
    """Add to the shards that `--out` holds already. Scans that the progress file names are refused: one scan extracted twice is two
    scenes to the server."""
    progress: Path | None = None
    """File that says which scans are in finished shards. By default `OUT.progress.json` beside the folder. Do not upload it."""
    sample: Literal["all", "fleet"] = "all"
    """Which scans leave the vehicle. `fleet` leaves most of a drive out, at random, because neighboring scenes tell its order (docs/fleet.md).
    The scans must be given in the order of recording. What is left out stays left out when the extraction goes on."""
    sample_gap: int | None = None
    """Fewest scans left out between two uploads, instead of the value of `--sample`. Each gap is drawn from this number to twice as many."""
    sample_share: float | None = None
    """Chance that a scan which the gap allows is uploaded, instead of the value of `--sample`."""
    receipts: Path | None = None
    """File for a list of scene ids with their scans; new ones are added to those it holds. Keep it: no shard links the two.
    `upcycle --truth` measures pseudo labels with it."""
    expect_fingerprint: str | None = None
    """Refuse to run unless encoder and rig have this fingerprint (at least its first 12 digits), as the server told the fleet."""
    allow_full_turn: bool = False
    """Go on with scans that reach behind the sensor although the encoder was trained on what a camera ahead sees, or that lie mostly outside
    the range and are read with other `--axes` than those of the training."""
    allow_lost_cells: bool = False
    """Go on where scans lose more than 10 % of their occupied cells to the encoder's voxel limit."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


@dataclass(kw_only=True)
class _Source:
    """One scan: how it is read, and what it was when it was read."""

    name: str
    load: Callable[[], tuple[PointCloud, Ledger]]
    file: Path | None = None
    identity: ScanIdentity = field(default_factory=lambda: ScanIdentity(size=0, sha256=""))

    def read(self) -> tuple[PointCloud, Ledger]:
        """Read the scan and remember its size and digest."""
        points, ledger = self.load()
        self.identity = self._identify(points)
        return points, ledger

    def changed_since(self, done: ExtractedScan) -> bool:
        """Say whether the scan has other content than when it was extracted; one that cannot be read has not."""
        try:
            if self.file is not None and self.file.stat().st_size != done.size:
                return True
            return self._identify(self.load()[0] if self.file is None else None).sha256 != done.sha256
        except (UpcycleError, OSError):
            return False

    def _identify(self, points: PointCloud | None) -> ScanIdentity:
        """Size and digest of the file, or of the points where there is none."""
        if self.file is not None:
            with self.file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256")
                return ScanIdentity(size=stream.tell(), sha256=digest.hexdigest())
        assert points is not None
        digest, size = hashlib.sha256(), 0
        for tensor in (points.xyz, points.features):
            data = tensor.contiguous().numpy().tobytes()
            digest.update(data)
            size += len(data)
        return ScanIdentity(size=size, sha256=digest.hexdigest())


@dataclass(kw_only=True)
class _StopRequest:
    """The signal that asked the run to stop; 0 for none."""

    signal: int = 0


def command(config: Extract) -> None:
    """Turn scans into shards of smashed scenes. A scan that cannot be read is reported, and the others go on.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP close the open shard and end the command; `--resume` goes on.
    """
    if bool(config.scans) == (config.data is not None):
        raise InvalidInput("give either --scans (files or folders) or --data (a prepared dataset)")
    if config.resume and config.append:
        raise InvalidInput("give --resume (leave out scans that are done) or --append (refuse them), not both")
    rule = _rule(config)
    with _stop_requests() as stop:
        device = find_device(config.device)
        encoder = load_encoder(config.detector)
        if encoder.sends_fine_balls:
            print_warning(
                f"{config.detector} sends features that keypoints gather from raw points or fine voxels; whoever has the encoder file can "
                "compute single points from them to the centimeter (docs/privacy.md). Presets without `published` in their name do not send such features"
            )
        rig, sources, skipped = (
            _scan_files(config, encoder.trained_on) if config.data is None else _prepared_frames(config, encoder.trained_on)
        )
        if config.ids is not None:
            sources = _only(sources, config.ids)
        _check_camera_view(config, encoder.trained_on, sources)
        _check_axes(config, encoder, rig, sources)
        console.print(f"defences of the uploads: {defences_of(encoder)}", soft_wrap=True)
        extractor = Extractor(encoder.to(device), rig, config.codec)
        if config.expect_fingerprint is not None:
            check_fingerprint(extractor.fingerprint, config.expect_fingerprint, rig, encoder=encoder)
        had_shards = config.out.is_dir() and any(p.suffix == ".tar" and not p.name.startswith(".") for p in config.out.iterdir())
        path = config.progress or default_progress_path(config.out)
        if had_shards and not config.append and not (config.resume and path.exists()):
            raise InvalidInput(_holds_shards(config, path))
        _warn_of_codecs(config)
        with open_progress(
            config.out, encoder_fingerprint=extractor.fingerprint, path=path, receipts=config.receipts
        ) as progress:
            chosen = _chosen(sources, progress, rule)
            todo = _not_done(config, chosen, progress.scans, path)
            writer = extractor.shard_writer(
                config.out,
                scenes_per_shard=config.scenes_per_shard,
                max_seconds=config.shard_seconds,
                journal=progress,
                sampling=rule,
            )

            smashed: list[str] = []  # names; the measures of a scan follow

            def on_smashed(index: int, scene_id: str) -> None:
                smashed.append(todo[index].name)
                progress.smashed(scene_id, todo[index].name, todo[index].identity)

            def until_stopped() -> Iterator[Callable[[], tuple[PointCloud, Ledger]]]:
                for source in todo:
                    if stop.signal:
                        return
                    yield source.read

            watch = ScanWatch(extractor.trained_on, print_warning, rig=rig)
            with progress_bar("extract", len(todo)) as advance, writer:
                report = extract(
                    until_stopped(),
                    extractor,
                    writer,
                    on_frame=lambda done: advance(done, len(todo)),
                    on_smashed=on_smashed,
                    on_measures=lambda measures: watch.add(measures, smashed[-1]),
                    refuse_lost_cells=not config.allow_lost_cells,
                )
    watch.finish()
    left_out = len(sources) - len(chosen)
    report = replace(report, ledger=report.ledger + skipped + Ledger(scans_left_out=left_out))
    if left_out:
        console.print(
            f"{left_out} of {len(sources)} scans stay on the vehicle: gaps of at least {rule.gap} scans, chance {rule.share:g} of each other "
            "scan, and what was left out before",
            soft_wrap=True,
        )
    _show(config, report, [s.name for s in todo], extractor, len(chosen), stop.signal)


def _rule(config: Extract) -> SceneSampling:
    """The sampling rule of the options."""
    base = FLEET_SAMPLING if config.sample == "fleet" else EVERY_SCAN
    return SceneSampling(
        gap=base.gap if config.sample_gap is None else config.sample_gap,
        share=base.share if config.sample_share is None else config.sample_share,
    )


def _chosen(sources: Mapping[str, _Source], progress: ExtractionProgress, rule: SceneSampling) -> dict[str, _Source]:
    """The scans that leave the vehicle. What a rule decided is noted before anything is extracted, so that no resumed run fills gaps."""
    decided = {**dict.fromkeys(progress.scans, True), **progress.sampled}
    if rule.every_scan:
        return {name: source for name, source in sources.items() if decided.get(name, True)}
    chosen = choose_scans(tuple(sources), rule, decided=decided)
    progress.decide(chosen)
    return {name: source for name, source in sources.items() if chosen[name]}


def _show(
    config: Extract, report: ExtractionReport, names: Sequence[str], extractor: Extractor, asked: int, stopped: int
) -> None:
    """Print and write the result, and end with an error where it is none."""
    before = asked - len(names)
    by = signal.Signals(stopped).name if stopped else None
    write_json(
        config.json,
        result_json(report)
        | {"warnings": [*warnings_so_far(), *warnings_of(report.ledger)]}
        | {"already_extracted": before, "stopped_by": by, "fingerprint": extractor.fingerprint, "rig": asdict(extractor.rig)},
    )
    if names or not before:
        _print(report, names)
    if extractor.defended and report.frames:
        console.print(
            f"cells at the cut: the defences sent {report.cells_sent:,} of {report.cells:,} in this run "
            f"({report.cells_sent / max(report.cells, 1):.1%})",
            soft_wrap=True,
        )
    if before:
        console.print(f"{before} of {asked} scans were in finished shards before and were left out")
    if report.refused:
        print_warning(
            f"the run ended because too many cells are lost; shards written before: {len(report.shards)}. Give --allow-lost-cells to go "
            "on all the same"
        )
    if report.ledger != Ledger():
        settle(report.ledger, "what was read and dropped", refuse_lost_cells=not config.allow_lost_cells)
    if by is not None:
        print_warning(
            f"stopped by {by} after {len(report.failures) + report.frames} of {len(names)} scans; every finished scene is in a shard. "
            "Give the same command with --resume to go on"
        )
        raise SystemExit(128 + stopped)
    if report.frames == 0 and names:
        raise UpcycleError(f"none of {len(names)} scans gave a scene, so nothing was written; the reasons are listed above")
    if not names:
        console.print(f"nothing new to extract; encoder fingerprint {extractor.fingerprint}")
        return
    default = RigSpec() if extractor.trained_on is None else extractor.trained_on.rig
    rig = asdict(extractor.rig)
    options = "".join(f" --{k.replace('_', '-')} {v}" for k, v in rig.items() if v != getattr(default, k))
    console.print(
        f"{config.out}: {len(report.shards)} new shards; {config.progress or default_progress_path(config.out)} says which scans are in them"
        + (f", and {config.receipts} which scene each became" if config.receipts else ""),
        soft_wrap=True,
    )
    console.print(
        f"encoder fingerprint {extractor.fingerprint}; next: upcycle3d ingest {config.out} --detector {config.detector} "
        f"--store STORE{options}",
        soft_wrap=True,
    )


@contextmanager
def _stop_requests() -> Iterator[_StopRequest]:
    """Note the first signal that asks for an end; a second one ends the program at once."""
    stop, before = _StopRequest(), {}

    def note(number: int, _frame: FrameType | None) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _holds_shards(config: Extract, path: Path) -> str:
    why = "A scan that is extracted twice becomes two scenes on the server, because scene ids are random"
    if config.resume:
        return (
            f"{config.out} already holds shards, and there is no progress file {path} that says which scans are in them. {why}; name the "
            "file with --progress, choose an empty folder, or give --append if these are other scans"
        )
    return (
        f"{config.out} already holds shards. {why}; choose an empty folder, give --resume to go on with an extraction that was "
        "stopped, or --append if these are other scans"
    )


def _warn_of_codecs(config: Extract) -> None:
    """Warn where the folder holds shards of another codec: a store takes both, but a training rounds its labeled features like one."""
    scenes: Counter[str] = Counter()
    for path in config.out.glob("[0-9a-f]*.json") if config.out.is_dir() else ():
        with suppress(UpcycleError, OSError):
            manifest = read_manifest(path)
            scenes[manifest.codec] += len(manifest.members)
    others = {codec: count for codec, count in scenes.items() if codec != config.codec}
    if others:
        held = " and ".join(f"{count} scenes stored as {codec}" for codec, count in others.items())
        print_warning(
            f"{config.out} holds {held}, and this run stores {config.codec} (--codec). A store takes both, but a training can give its labeled "
            "features the rounding of one codec only; give one --codec for the whole fleet"
        )


def _not_done(
    config: Extract, sources: Mapping[str, _Source], done: Mapping[str, ExtractedScan], path: Path
) -> tuple[_Source, ...]:
    """The scans to extract; refuses those that are in finished shards unless the run resumes."""
    known = [name for name in sources if name in done]
    if known and not config.resume:
        listed = ", ".join(known[:3])
        raise InvalidInput(
            f"{len(known)} of {len(sources)} scans are in shards already, says {path}: {listed}; one scan extracted twice is two scenes to "
            "the server. Give --resume to leave them out. If these are other scans with the same names, rename them, or give another "
            "--out; if those shards were thrown away before anyone got them, remove the progress file"
        )
    changed = [name for name in known if sources[name].changed_since(done[name])]
    if changed:
        print_warning(
            f"{len(changed)} of {len(known)} scans that are in finished shards by their names have other content now "
            f"({', '.join(map(shown, changed[:3]))}); they are not extracted again. If these are new scans, rename them or give another --out"
        )
    return tuple(source for name, source in sources.items() if name not in done)


def _check_camera_view(config: Extract, trained: TrainedOn | None, sources: Mapping[str, _Source]) -> None:
    """Refuse full turns for an encoder that was trained on what a camera sees; an upload cannot be taken back."""
    if trained is None or not trained.camera_view or config.calib is not None or config.allow_full_turn:
        return
    for source in list(sources.values())[:_LOOKED_AT]:
        try:
            points = source.load()[0]
        except (UpcycleError, OSError):
            continue  # it is listed later, with the reason
        if reaches_behind(points):
            remedy = (
                "give --calib FOLDER (KITTI calibration files), which keeps what the camera sees"
                if config.data is None
                else "prepare the data with --crop-to-camera"
            )
            raise InvalidInput(
                f"the encoder was trained on what a camera ahead sees, and the scan {shown(source.name)} reaches behind the sensor; {remedy}. "
                "Other axes than those of the training look the same (--axes). Give --allow-full-turn to go on all the same"
            )


def _check_axes(config: Extract, encoder: Encoder, rig: RigSpec, sources: Mapping[str, _Source]) -> None:
    """Refuse scans that are read with other axes than those of the training and lie mostly beside the range: they are turned."""
    trained = encoder.trained_on
    if config.data is not None or config.allow_full_turn or trained is None or trained.axes in (None, config.read.axes):
        return
    axes = " ".join(trained.axes or ())
    for source in list(sources.values())[:_LOOKED_AT]:
        try:
            xyz = rig.from_sensor(source.load()[0].xyz)
        except (UpcycleError, OSError):
            continue  # it is listed later, with the reason
        beside = int((boxes_outside_range(xyz, encoder) & ~outside_height(xyz, encoder)).sum())
        if beside > TURNED_POINTS_STOP * len(xyz):
            raise InvalidInput(
                f"{beside:,} of the {len(xyz):,} points of the scan {shown(source.name)} lie beyond the sides of the detector's range, and the "
                f"scans are read with --axes {' '.join(config.read.axes)} where the training had --axes {axes}; give --axes {axes}. If these are "
                "scans of another logger that has these axes, --allow-full-turn goes on"
            )


def _scan_files(config: Extract, trained: TrainedOn | None) -> tuple[RigSpec, dict[str, _Source], Ledger]:
    """The rig, the scans by name, and the counts of files that are no scans."""
    if config.calib is None:
        config.read.refuse_image_size("nothing is cropped without a calibration; give --calib FOLDER too, or leave it out")
    if config.calib is not None and config.read.axes != ("x", "y", "z"):
        raise InvalidInput("--axes turns scans away from their calibrations; give scans in the axes of the --calib files")
    sources = {}
    files, skipped = find_scans(config.scans)
    for path in files:
        load = partial(read_scan, path, config.read)  # the rig scales intensity and checks it
        if config.calib is not None:
            load = partial(_camera_view, load, config.calib, path.stem, config.read.image_size)
        try:
            check_name(path.stem, "scan name")
        except InvalidInput as error:  # a failure of this scan; the others go on
            load = partial(_refuse, error)
        sources[path.stem] = _Source(name=path.stem, load=load, file=path)
    rig, warnings = rig_of_scans(config.read, trained, files)
    for warning in warnings:
        print_warning(warning)
    return rig, sources, skipped


def _prepared_frames(config: Extract, trained: TrainedOn | None) -> tuple[RigSpec, dict[str, _Source], Ledger]:
    """The rig that the dataset was prepared with, and its frames with that rig taken back: the extractor applies it once."""
    from ..datasets.data_split import DataSplit

    if config.read != ScanOptions(z_shift=config.read.z_shift, intensity_scale=config.read.intensity_scale):
        raise InvalidInput(
            "--columns, --dtype, --axes, --image-size and --drop-non-finite belong to --scans; --data was read when it was prepared"
        )
    if config.calib is not None:
        raise InvalidInput("--calib belongs to --scans; --data was cropped when it was prepared, or was not meant to be")
    data = config.data or ""
    frames = DataSplit.parse(data).open()
    rig = frames.rig
    if config.read.rig(rig) != rig:
        raise InvalidInput(
            f"{data} was prepared with the rig {rig}, but the options say {config.read.rig(rig)}; leave --z-shift and --intensity-scale "
            "out, or prepare the data again with them"
        )
    for warning in () if trained is None else rig_differences(rig, trained, f"the rig of {data}"):
        print_warning(warning)

    def load(index: int) -> tuple[PointCloud, Ledger]:
        frame = frames[index]
        return rig.to_sensor(frame.points), frame.reading.without_labels()  # no label is used here

    return rig, {name: _Source(name=name, load=partial(load, index)) for index, name in enumerate(frames.ids)}, Ledger()


def _only(sources: Mapping[str, _Source], ids: Path) -> dict[str, _Source]:
    from ..datasets.kitti import read_ids

    wanted = read_ids(ids)
    missing = [name for name in wanted if name not in sources]
    if missing:
        raise InvalidInput(f"{len(missing)} of the {len(wanted)} scans named in {ids} are not among those given: {missing[:3]}")
    return {name: sources[name] for name in wanted}


def _refuse(error: InvalidInput) -> tuple[PointCloud, Ledger]:
    raise error


def _camera_view(
    load: Callable[[], tuple[PointCloud, Ledger]], folder: Path, name: str, image_size: tuple[int, int] | None
) -> tuple[PointCloud, Ledger]:
    from ..datasets.kitti import crop_to_camera
    from ..datasets.kitti_calibration import calibration_of_scan, is_off_center

    points, ledger = load()
    calibration = calibration_of_scan(folder, name, image_size)
    seen = crop_to_camera(points, calibration)
    return seen, ledger + Ledger(points_outside_camera=len(points) - len(seen), scans_off_center=int(is_off_center(calibration)))


def result_json(report: ExtractionReport) -> dict[str, object]:
    """The report as JSON values.

    Args:
        report: What `extract` returned.

    Returns:
        All its fields, and the bytes per frame.
    """
    values = asdict(report) | {"shards": [str(p) for p in report.shards], "ledger": report.ledger.to_json()}
    return values | {"bytes_per_frame": report.smashed_bytes_per_frame, "raw_bytes_per_frame": report.raw_bytes_per_frame}


def _print(report: ExtractionReport, names: Sequence[str]) -> None:
    stages = {"voxelize": report.voxelize, "backbone": report.backbone, "codec": report.codec, "write": report.write}
    rows = [(name, f"{s.median_ms:.1f}", f"{s.p95_ms:.1f}") for name, s in stages.items()]
    print_table("milliseconds per frame", ("stage", "median", "p95"), rows)
    ratio = report.smashed_bytes_per_frame / max(report.raw_bytes_per_frame, 1)
    console.print(
        f"{report.frames} frames; shards: {len(report.shards)}; {report.smashed_bytes_per_frame:,.0f} bytes per frame, {ratio:.2g} times "
        f"the raw scan's {report.raw_bytes_per_frame:,.0f}"
    )
    if report.failures:
        print_table("left out", ("scan", "why"), [(names[f.index], f.reason) for f in report.failures])


if __name__ == "__main__":
    sys.exit(run_command(command))
