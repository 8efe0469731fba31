"""ROS bags and MCAP files without ROS: every PointCloud2 message of one topic is a frame. They have no boxes.

    drive.mcap            MCAP, as ROS 2 or ROS 1 wrote it (package `mcap`; checksums are compared where the file has them)
    drive/                a rosbag2 folder with metadata.yaml and sqlite3 or MCAP storage (package `rosbags`)
    drive.bag             a rosbag of ROS 1 (package `rosbags`)

Points stay in the frame of the message (`header.frame_id`); /tf is not applied, so points of several LiDARs are not joined. By ROS's
convention (REP 103) x points forward, y left, z up; other mountings are turned with `--axes`. Points with NaN, by which ROS drivers mark
missing returns, are dropped and counted where the message says that it is not dense. The time of a frame's id is that of the recording.

Left out: other topics (their messages are counted), poses, times of points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.ledger import Ledger
from ...core.point_files import scan_of_rows, turned_rows
from ...core.scan_options import ScanOptions
from ...core.structures import PointCloud
from ..frame_source import Layout
from ..kitti import scan_settings
from ..raw import RawDataset
from .boxed import FrameFiles, TypedBoxes
from .message_files import POINT_CLOUDS, open_message_file
from .opening import BoxedOptions, FoundFrames, open_boxed
from .point_cloud2 import rows_of_cloud


@dataclass(frozen=True, kw_only=True)
class Bag:
    """How messages of a bag are read. A bag is opened for every frame, so that nothing is shared between processes."""

    topic: str
    """The topic of the LiDAR."""
    read: ScanOptions = ScanOptions()
    """Columns, axes and whether points that are not finite are left out. The rig is not used: see `BoxedDataset`."""

    @property
    def layout(self) -> Layout:
        """Name of the layout."""
        return "bag"

    def options(self) -> Mapping[str, object]:
        """The topic, and how messages are read."""
        own = {name: value for name, value in scan_settings(self.read).items() if name in ("columns", "axes", "drop_non_finite")}
        return {"topic": self.topic, **own}

    def scan(self, frame: FrameFiles) -> tuple[PointCloud, Ledger]:
        """Read one message.

        Args:
            frame: The frame.

        Returns:
            The points in the frame of the message, axes turned; and their counts.

        Raises:
            InvalidInput: The bag or the message is damaged, or holds no point.
        """
        time, number = map(int, frame.key.split())
        where = f"{frame.scan}, message of {shown(self.topic)} at {time}"
        with open_message_file(frame.scan) as file, _named(where):
            for i, message in enumerate(file.messages(self.topic, time)):
                if i == number:
                    cloud = message.decoded()
                    names, rows = rows_of_cloud(cloud, self.read.columns, where)
                    rows = turned_rows(rows, names, self.read.axes)
                    return scan_of_rows(rows, names, where, drop_non_finite=self.read.drop_non_finite or not cloud.is_dense)
        raise InvalidInput(f"{where}: there is no such message any more; prepare the bag again")

    def objects(self, frame: FrameFiles) -> TypedBoxes:
        """Bags have no boxes.

        Args:
            frame: A frame.

        Returns:
            Nothing.

        Raises:
            InvalidInput: Always.
        """
        raise InvalidInput(f"{frame.scan} is a bag and has no boxes")

    def types(self, labels: Path) -> Counter[str]:
        """Bags have no boxes.

        Args:
            labels: A file.

        Returns:
            Nothing.
        """
        return Counter()


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Turn what the libraries raise for damaged files into the project's error."""
    try:
        yield
    except (InvalidInput, ImportError):
        raise
    except (
        Exception
    ) as error:  # the libraries raise their own errors, struct.error, KeyError, zlib's and lz4's errors, and others
        raise InvalidInput(
            f"{where} cannot be read ({type(error).__name__}: {shown(error, most=160)}); the file is damaged or cut off: copy it again, or "
            "repair it with `mcap recover` or `ros2 bag reindex`"
        ) from error


def open_bag(
    root: Path | str, options: BoxedOptions | None = None, read: ScanOptions | None = None, topic: str | None = None
) -> RawDataset:
    """Open a bag, or a folder of bags of one vehicle.

    Args:
        root: A `.mcap` or `.bag` file, a rosbag2 folder, or a folder of them.
        options: Rig; splits of `ImageSets` next to the bags. Classes are noted, although there are no boxes.
        read: How messages are read.
        topic: Topic of the LiDAR; None takes the only one of the type PointCloud2.

    Returns:
        The dataset; all of its splits are unlabeled. A bag that is cut off gives the frames before the damage, with a warning; so does
        one of several bags that has no message of the topic.

    Raises:
        InvalidInput: There is no bag, a library is missing, or the topic is missing, not clear or holds no point clouds.

    Example:
        raw = open_bag("drive.mcap", BoxedOptions(z_shift=1.9, intensity_scale=1 / 255), topic="/lidar_top/points")
    """
    root, options = Path(root), options or BoxedOptions()
    paths = _bags(root)
    skipped: Counter[str] = Counter()
    warnings: list[str] = []
    frames: list[FrameFiles] = []
    for path in paths:
        with open_message_file(path) as file:
            with _named(str(path)):
                counts = file.topics()
            topic = topic or _only_topic(path, counts)
            expected = _expected(path, counts, topic)
            skipped["message of another topic"] += sum(n for (name, _), n in counts.items() if name != topic)
            times: Counter[int] = Counter()
            try:
                with _named(str(path)):
                    for message in file.messages(topic):
                        times[message.time] += 1
                if not times:
                    warnings.append(f"{path} has no message of the topic {shown(topic)}; its topics are {_listed(counts)}")
                elif times.total() < expected:
                    warnings.append(f"{path} names {expected} messages of the topic {shown(topic)}, and holds {times.total()}")
            except InvalidInput as error:
                warnings.append(f"{error}. {times.total()} messages before the damage are read")
        for time in sorted(times):
            frames += (_frame(path, time, i) for i in range(times[time]))
    if not frames:
        told = "; ".join(warnings) or f"no message of the topic {shown(topic)}"
        raise InvalidInput(f"{root}: there is no scan ({told}); name the topic of the LiDAR with --topic")
    form = Bag(topic=topic or "", read=read or ScanOptions())
    found = FoundFrames(frames=tuple(frames), skipped=+skipped)
    base = root if root.is_dir() else root.parent
    raw = open_boxed(base, found, form, replace(options, unlabeled=()), all_unlabeled=True)
    return replace(raw, warnings=(*raw.warnings, *warnings))


def _frame(path: Path, time: int, number: int) -> FrameFiles:
    name = f"{path.stem}_{time}" + (f"-{number}" if number else "")
    return FrameFiles(id=name, drive=path.stem, scan=path, labels=None, key=f"{time} {number}")


def _bags(root: Path) -> list[Path]:
    """The bags that a path stands for."""

    def is_bag(path: Path) -> bool:
        return (path.suffix in (".mcap", ".bag") and path.is_file()) or (path / "metadata.yaml").is_file()

    if is_bag(root):
        return [root]
    found = sorted(path for path in root.iterdir() if is_bag(path) and not path.name.startswith(".")) if root.is_dir() else []
    if not found:
        raise InvalidInput(
            f"there is no bag at {root}: give a .mcap or .bag file, a rosbag2 folder (with metadata.yaml), or a folder of them"
        )
    return found


def _expected(path: Path, counts: Mapping[tuple[str, str], int], topic: str) -> int:
    """Number of messages that a bag names for a topic. A topic of another type is refused; bags that are cut off may not know the type."""
    if odd := next((kind for name, kind in counts if name == topic and kind not in (*POINT_CLOUDS, "")), None):
        raise InvalidInput(
            f"the topic {shown(topic)} of {path} holds messages of the type {shown(odd)} and no PointCloud2; its topics are {_listed(counts)}"
        )
    return sum(n for (name, _), n in counts.items() if name == topic)


def _listed(counts: Mapping[tuple[str, str], int]) -> str:
    return ", ".join(f"{shown(name, most=60)} of {shown(kind, most=60)}" for name, kind in sorted(counts)[:12]) or "none"


def _only_topic(path: Path, counts: Mapping[tuple[str, str], int]) -> str:
    clouds = {name: n for (name, kind), n in counts.items() if kind in POINT_CLOUDS}
    if len(clouds) == 1:
        return next(iter(clouds))
    listed = ", ".join(f"{shown(name, most=60)} ({n})" for name, n in sorted(clouds.items())[:12])
    raise InvalidInput(
        f"{path} has {len(clouds)} topics of the type PointCloud2; choose one with --topic: {listed}"
        if clouds
        else f"{path} has no topic of the type PointCloud2; its topics are {_listed(counts)}. Packets of a driver must be turned into point "
        "clouds by the driver first"
    )
