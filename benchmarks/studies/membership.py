"""Can somebody who has a detector tell which labeled frames it was trained on? The attack of `perception/privacy/attacks/membership.py`.

    python benchmarks/studies/membership.py --target RUN --members DIR:SPLIT --others DIR:SPLIT \\
        --references RUN=DIR:SPLIT=DIR:SPLIT RUN=DIR:SPLIT=DIR:SPLIT

`--members` are the frames that the target was trained on, `--others` frames of the same kind that it was not. A reference is a detector of
the attacker with its own members and others; no frame may be in two places. docs/results.md has the numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from upcycle3d.core.frame import Frame
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.perception.privacy.attacks.membership import ReferenceDetector, attack_membership
from upcycle3d.perception.privacy.ranking_metrics import MembershipScore
from upcycle3d.perception.training.detector_files import load_detector


def frames_of(text: str, most: int) -> list[Frame]:
    """The first frames of a split."""
    frames = DataSplit.parse(text).open()
    return [frames[index] for index in range(min(most, len(frames)))]


def line(name: str, score: MembershipScore | None) -> str:
    """One row of the result."""
    if score is None:
        return f"{name:20} -"
    return (
        f"{name:20} AUC {score.auc.value:.3f} (chance .5 ± {score.auc.chance_deviation:.3f})  found at 1 % false alarms "
        f"{score.found_at_1_percent}, at 5 % {score.found_at_5_percent}"
    )


def main() -> None:
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="run folder or file of the detector under attack")
    parser.add_argument("--members", required=True)
    parser.add_argument("--others", required=True)
    parser.add_argument("--references", nargs="*", default=[], help="RUN=MEMBERS=OTHERS")
    parser.add_argument("--frames", type=int, default=100, help="frames of each split at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    references = []
    for text in options.references:
        run, members, others = text.split("=")
        references.append(
            ReferenceDetector(
                detector=load_detector(run).eval(),
                members=frames_of(members, options.frames),
                others=frames_of(others, options.frames),
            )
        )
    members, others = frames_of(options.members, options.frames), frames_of(options.others, options.frames)
    found = attack_membership(load_detector(options.target).eval(), members, others, references)
    print(f"{len(members)} members, {len(others)} others, {len(references)} references")
    for name in ("loss", "confidence", "calibrated", "shadow", "encoder", "encoder_calibrated"):
        print(line(name, getattr(found, name)))


if __name__ == "__main__":
    main()
