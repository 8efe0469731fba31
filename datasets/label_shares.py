"""Partial labels: a share of the training frames keeps its labels, the rest is a fleet. Every share has three fixed draws.

Neighboring frames of a drive show the same cars, so whole sequences are drawn where a dataset knows them (Waymo, Lyft, nuScenes;
HSSDA does the same on Waymo). KITTI's frames are drawn one by one, as in published work (3DIoUMatch: 37, 74 and 742 of 3,712).

Read next: `raw.py`, which adds these splits to a dataset.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..core.errors import InvalidInput

DRAWS = (0, 1, 2)
"""Numbers of the draws of every share."""


def draw_labeled(
    ids: Sequence[str], share: float, draw: int, *, group: Callable[[str], str] = str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw the frames that keep their labels.

    Groups are ranked by the SHA-256 of `draw:group`, and the first floor(share x count), at least one, are labeled. So a draw
    depends on neither machine nor library, and the labeled frames of 1 % are among those of 2 %, 5 % and 20 % of the same draw.

    Args:
        ids: All frames.
        share: Share of the groups to label, in (0, 1].
        draw: Number of the draw.
        group: Frame id -> its sequence. No sequence is on both sides. By default every frame is on its own.

    Returns:
        The labeled frames and all others, both in the order of `ids`.

    Raises:
        InvalidInput: The share is outside (0, 1], or there is no frame.
    """
    if not 0 < share <= 1 or not ids:
        raise InvalidInput(f"a share of labels needs frames and a number in (0, 1], found {len(ids)} frames and {share}")
    groups = [group(name) for name in ids]
    ranked = sorted(set(groups), key=lambda name: hashlib.sha256(f"{draw}:{name}".encode()).digest())
    chosen = set(ranked[: max(1, int(round(share * len(ranked), 9)))])
    labeled, rest = (tuple(i for i, g in zip(ids, groups, strict=True) if (g in chosen) is wanted) for wanted in (True, False))
    return labeled, rest


def labeled_split(share: float, draw: int) -> str:
    """Name the labeled split of a draw; its other frames are in the split `NAME-rest`.

    Args:
        share: Share of the groups.
        draw: Number of the draw.

    Returns:
        For example `train-0.01-0`.
    """
    return f"train-{share:g}-{draw}"


def label_share_of(split: str) -> float | None:
    """Read the share back from the name of a split.

    Args:
        split: Name of a split.

    Returns:
        The share, or None where `labeled_split` gives no such name.
    """
    match = re.fullmatch(r"train-([0-9.e-]+)-[0-9]+", split)
    try:
        share = float(match[1]) if match else None
    except ValueError:
        return None
    return share if share is not None and any(split == labeled_split(share, draw) for draw in DRAWS) else None


def label_share_splits(
    ids: Sequence[str],
    shares: Iterable[float],
    *,
    group: Callable[[str], str] = str,
    given: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Make the splits of every share and draw.

    Args:
        ids: Frames of the split that is divided.
        shares: Shares of the groups to label.
        group: Frame id -> its sequence, as in `draw_labeled`.
        given: Splits that exist already. A published list replaces our draw of the same name, and the frames that it does not name
            become its rest.

    Returns:
        Frame ids by name of the split, without the names in `given`.
    """
    splits: dict[str, tuple[str, ...]] = {}
    for share in shares:
        for draw in DRAWS:
            name = labeled_split(share, draw)
            labeled, rest = draw_labeled(ids, share, draw, group=group)
            if given and name in given:
                labeled, names = tuple(given[name]), set(given[name])
                rest = tuple(i for i in ids if i not in names)
            splits[name] = labeled
            if rest:
                splits[f"{name}-rest"] = rest
    return {name: part for name, part in splits.items() if not given or name not in given}
