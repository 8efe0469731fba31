"""Messages of MCAP files and ROS bags, one at a time, through the packages `mcap` and `rosbags` (`pip install 'upcycle3d[inputs]'`).

The message type is taken from ROS's own definitions and never from the file, so no code is made of what a file says.

Read next: `bag.py`, which makes frames of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from ...core.errors import InvalidInput
from ...core.foreign_text import shown

if TYPE_CHECKING:
    from .point_cloud2 import PointCloud2

POINT_CLOUDS = ("sensor_msgs/msg/PointCloud2", "sensor_msgs/PointCloud2")
"""Names of the type in ROS 2 and ROS 1."""
_EXTRA = "install the readers of bags with pip install 'upcycle3d[inputs]'"
Coding = Literal["cdr", "ros1"]
"""How a message is written: that of ROS 2 and that of ROS 1."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a point cloud, not decoded yet."""

    time: int
    """Time of the recording in nanoseconds."""
    coding: str
    """How it is written."""
    data: bytes
    """Its bytes."""

    def decoded(self) -> PointCloud2:
        """Decode it.

        Returns:
            The point cloud.

        Raises:
            InvalidInput: It is written in another way than ROS's two.
        """
        if self.coding not in ("cdr", "ros1"):
            raise InvalidInput(f"the messages are written as {shown(self.coding, most=40)}; cdr (ROS 2) and ros1 are read")
        store = _typestore(cast(Coding, self.coding))
        decode = store.deserialize_cdr if self.coding == "cdr" else store.deserialize_ros1
        return cast("PointCloud2", decode(self.data, POINT_CLOUDS[0]))


class MessageFile(Protocol):
    """An open bag."""

    def topics(self) -> Counter[tuple[str, str]]:
        """Count the messages.

        Returns:
            Number of messages by topic and type.
        """
        ...

    def messages(self, topic: str, time: int | None = None) -> Iterator[Message]:
        """Read the messages of a topic.

        Args:
            topic: The topic.
            time: Time of the recording in nanoseconds; None for all messages.

        Yields:
            The messages.
        """
        ...


@cache
def _typestore(coding: Coding) -> Any:
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_HUMBLE if coding == "cdr" else Stores.ROS1_NOETIC)


@contextmanager
def open_message_file(path: Path) -> Iterator[MessageFile]:
    """Open a bag.

    Args:
        path: A `.mcap` or `.bag` file, or a rosbag2 folder.

    Yields:
        The open bag.

    Raises:
        InvalidInput: A package is missing, or the file is none of these.
    """
    try:
        import mcap.reader  # noqa: F401
        import rosbags.rosbag1
        import rosbags.rosbag2
    except ImportError as error:
        raise InvalidInput(f"{path}: bags need the packages mcap and rosbags ({error}); {_EXTRA}") from error
    if path.suffix == ".mcap" and path.is_file():
        yield _Mcap(path=path)
        return
    kind = rosbags.rosbag1 if path.suffix == ".bag" and path.is_file() else rosbags.rosbag2
    try:
        reader = kind.Reader(path)
        reader.open()
    except Exception as error:  # rosbags raises its own errors, those of YAML, of sqlite3 and of struct
        raise InvalidInput(
            f"{path} is not a readable bag ({type(error).__name__}: {shown(error, most=160)}); copy it again, or repair it with `rosbag reindex` "
            "or `ros2 bag reindex`"
        ) from error
    try:
        yield _Rosbag(reader=reader, coding="ros1" if kind is rosbags.rosbag1 else "cdr")
    finally:
        reader.close()


@dataclass(frozen=True, kw_only=True)
class _Mcap:
    path: Path

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """A reader, and the summary at the end of the file; None for one without statistics or one that is cut off, which is read from front to back."""
        from mcap.reader import NonSeekingReader, SeekingReader

        with self.path.open("rb") as file:
            reader = SeekingReader(file, validate_crcs=True)
            try:
                summary = reader.get_summary()
            except Exception:  # there is no readable end; `messages` meets the damage and says so
                summary = None
            if summary is not None and summary.statistics is not None and summary.chunk_indexes:
                yield reader, summary
            else:
                file.seek(0)
                yield NonSeekingReader(file, validate_crcs=True), None

    def topics(self) -> Counter[tuple[str, str]]:
        with self._open() as (reader, summary):
            if summary is not None:
                counts = summary.statistics.channel_message_counts
                kinds = {i: schema.name for i, schema in summary.schemas.items()}
                return Counter({(c.topic, kinds.get(c.schema_id, "")): counts.get(i, 0) for i, c in summary.channels.items()})
            found: Counter[tuple[str, str]] = Counter()
            try:
                for schema, channel, _ in reader.iter_messages(log_time_order=False):
                    found[channel.topic, schema.name if schema else ""] += 1
            except Exception:  # `messages` meets the same damage and says so
                if not found:
                    raise
            return found

    def messages(self, topic: str, time: int | None = None) -> Iterator[Message]:
        start, stop = (None, None) if time is None else (time, time + 1)
        with self._open() as (reader, summary):
            found = reader.iter_messages(
                topics=[topic], starting_at=start, ending_before=stop, log_time_order=summary is not None
            )
            for _, channel, message in found:
                yield Message(time=message.log_time, coding=channel.message_encoding, data=message.data)


@dataclass(frozen=True, kw_only=True)
class _Rosbag:
    reader: Any
    coding: Coding

    def topics(self) -> Counter[tuple[str, str]]:
        found: Counter[tuple[str, str]] = Counter()
        for connection in self.reader.connections:
            found[connection.topic, connection.msgtype] += connection.msgcount
        return found

    def messages(self, topic: str, time: int | None = None) -> Iterator[Message]:
        chosen = [c for c in self.reader.connections if c.topic == topic]
        if not chosen:  # rosbags would give every topic
            return
        start, stop = (None, None) if time is None else (time, time + 1)
        for _, stamp, data in self.reader.messages(chosen, start=start, stop=stop):
            yield Message(time=stamp, coding=self.coding, data=bytes(data))
