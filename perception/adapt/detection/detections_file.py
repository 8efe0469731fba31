"""The new labels of a target, one JSON file per frame, in the form of `upcycle3d predict` with more entries.

Read next: `adapt_detector.py`, which writes them.
"""

from __future__ import annotations

import json
from pathlib import Path

from ....core.errors import require
from ....core.files import atomic_file
from ....core.rig import RigSpec
from .open_set import ClassifiedProposals
from .proposal_classifier import BACKGROUND_NAME
from .proposals import DetectorProposals

UNKNOWN_NAME = "unknown"


def frame_records(
    proposals: DetectorProposals, classified: ClassifiedProposals, frame: int, *, rig: RigSpec
) -> list[dict[str, object]]:
    """Describe each proposal of one frame. Boxes and scores are the detector's.

    Args:
        proposals: All proposals.
        classified: Decisions on them.
        frame: Position of the frame in `proposals.frame_ids`.
        rig: What was done to the scans; boxes are brought back to the sensor frame.

    Returns:
        One record per proposal. `class` is "unknown" where `unknown` is true; `nearest` is the most probable known class in any case.
    """
    rows = (proposals.frame == frame).nonzero()[:, 0].tolist()
    boxes = rig.to_sensor(proposals.boxes).tolist()
    names = (*classified.classes, BACKGROUND_NAME)
    records: list[dict[str, object]] = []
    for row in rows:
        nearest, unknown = classified.classes[int(classified.nearest[row])], bool(classified.unknown[row])
        record: dict[str, object] = {
            "class": UNKNOWN_NAME if unknown else nearest,
            "score": round(float(proposals.scores[row]), 4),
        }
        record |= {n: round(v, 3) for n, v in zip(("x", "y", "z", "dx", "dy", "dz", "yaw"), boxes[row], strict=True)}
        record |= {"unknown": unknown, "unknown_score": round(float(classified.unknown_scores[row]), 4), "nearest": nearest}
        record["probabilities"] = {n: round(p, 4) for n, p in zip(names, classified.probabilities[row].tolist(), strict=True)}
        record["detector_class"] = proposals.class_names[int(proposals.classes[row])]
        records.append(record)
    return records


def write_detections(folder: str | Path, proposals: DetectorProposals, classified: ClassifiedProposals, *, rig: RigSpec) -> None:
    """Write one file FRAME.json per frame, atomically. A frame without a proposal gets an empty list.

    Args:
        folder: Where the files go. A slash in a frame's id becomes an underscore.
        proposals: All proposals.
        classified: Decisions on them.
        rig: What was done to the scans; boxes are brought back to the sensor frame.

    Raises:
        InvalidInput: The two do not belong together.
    """
    require(
        len(proposals) == len(classified), f"{len(proposals)} proposals and {len(classified)} decisions do not belong together"
    )
    for index, frame_id in enumerate(proposals.frame_ids):
        records = frame_records(proposals, classified, index, rig=rig)
        with atomic_file(Path(folder) / f"{frame_id.replace('/', '_')}.json") as file:
            file.write((json.dumps(records, indent=1) + "\n").encode())
