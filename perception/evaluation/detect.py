"""Run a detector over frames, and score frames that come with KITTI label files. Read next: `score.py`, which chooses the protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ...core.errors import InvalidInput, NonFiniteValue
from ...core.frame import Frame
from ...core.structures import Predictions
from ...datasets.frame_source import FrameSource
from ...datasets.kitti_text import KittiObjects, predictions_to_kitti
from ..models.detector import Detector, unwatched
from .kitti import OFFICIAL, KittiResult, MinOverlap, evaluate_kitti


def detect_frames(detector: Detector, frames: FrameSource, *, batch_size: int = 2) -> Iterator[tuple[Frame, Predictions]]:
    """Run a detector over frames. It is put into evaluation mode.

    Args:
        detector: The detector, on its device.
        frames: The frames.
        batch_size: Frames per batch.

    Yields:
        Every frame with its detections, on the CPU, in the frame of its points.

    Raises:
        NonFiniteValue: The network computes NaN or infinite values; the message names the frames.
    """
    detector.eval()
    for start in range(0, len(frames), batch_size):
        batch = [frames[i] for i in range(start, min(start + batch_size, len(frames)))]
        try:
            with unwatched(detector):  # evaluation compares whole splits
                detections = detector.detect([f.points for f in batch])
        except NonFiniteValue as error:
            raise NonFiniteValue(f"frames {', '.join(f.id for f in batch)}: {error}") from error
        for frame, found in zip(batch, detections, strict=True):
            yield frame, found.to("cpu")


def kitti_detections(frame: Frame, found: Predictions, class_names: tuple[str, ...]) -> KittiObjects:
    """Detections in the fields of KITTI's text format.

    Args:
        frame: The frame, with its camera calibration.
        found: Its detections.
        class_names: Names of the class numbers.

    Returns:
        One object per detection.

    Raises:
        InvalidInput: The frame has no calibration; the protocol measures heights in pixels.
    """
    if frame.calibration is None:
        raise InvalidInput(f"frame {frame.id} has no calibration; KITTI's protocol needs the camera's view of each box")
    return predictions_to_kitti(found, class_names, frame.calibration)


def evaluate_detector(
    detector: Detector,
    frames: FrameSource,
    ground_truth: Callable[[str], KittiObjects],
    *,
    min_overlaps: Mapping[str, MinOverlap] = OFFICIAL,
) -> tuple[KittiResult, dict[str, KittiObjects]]:
    """Compute KITTI's AP of a detector.

    Args:
        detector: The detector, on its device.
        frames: The frames, each with a calibration.
        ground_truth: Content of the label file by frame id.
        min_overlaps: Minimum overlap by class.

    Returns:
        The result, and the detections by frame id.

    Raises:
        InvalidInput: A frame has no calibration.
    """
    detections = {f.id: kitti_detections(f, found, detector.class_names) for f, found in detect_frames(detector, frames)}
    truths = [ground_truth(frame_id) for frame_id in detections]
    result = evaluate_kitti(truths, list(detections.values()), classes=detector.class_names, min_overlaps=min_overlaps)
    return result, detections
