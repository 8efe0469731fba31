"""Partial labels: a share of the training frames keeps its labels, the rest is a fleet. Three fixed draws of each share.

Neighbouring frames of a drive show the same cars, so where a dataset knows its sequences whole ones are drawn (Waymo, Lyft, nuScenes:
HSSDA does so on Waymo too); KITTI's frames are drawn one by one, as everybody does (3DIoUMatch: 37, 74 and 742 of 3,712).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..core.errors import InvalidInput

DRAWS = (0, 1, 2)


def draw_labeled(
    ids: Sequence[str], share: float, draw: int, *, group: Callable[[str], str] = str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(labelled, rest): frame ids of about ``share`` of the groups, and all others, in the order of ``ids``.

    group: the sequence of a frame; no sequence is on both sides. By default every frame is its own.
    Groups are ranked by the SHA-256 of ``draw:group``, and the first floor(share x count), at least one, are labelled: a draw depends on
    neither machine nor library, and for one draw 1 % lies in 2 %, 5 % and 20 %.
    Raises InvalidInput for a share outside (0, 1], or no id.
    """
    if not 0 < share <= 1 or not ids:
        raise InvalidInput(f"a labelled share needs frames and a number in (0, 1], found {len(ids)} frames and {share}")
    groups = [group(name) for name in ids]
    ranked = sorted(set(groups), key=lambda name: hashlib.sha256(f"{draw}:{name}".encode()).digest())
    chosen = set(ranked[: max(1, int(round(share * len(ranked), 9)))])
    labeled, rest = (tuple(i for i, g in zip(ids, groups, strict=True) if (g in chosen) is wanted) for wanted in (True, False))
    return labeled, rest


def labeled_split(share: float, draw: int) -> str:
    """Name of the labelled split of a draw; its other frames are in ``<name>-rest``."""
    return f"train-{share:g}-{draw}"


def label_share_splits(
    ids: Sequence[str],
    shares: Iterable[float],
    *,
    group: Callable[[str], str] = str,
    given: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The splits of every share and draw, by name, that are not ``given``: published lists go before ours, and what a given labelled
    split does not name is its rest."""
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
