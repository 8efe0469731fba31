"""What callers may write where a job needs a preset, a method, a split or the truth: names are looked up, and a mistyped one is named.

Read next: `jobs.py`, which takes these inputs.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.structures import Labels
from ...datasets.data_split import DataSplit
from ..server.methods import METHODS, Method
from .presets import PRESETS, Preset

Data = DataSplit | str | Path
"""A split of a prepared dataset: `DIR[:SPLIT]` as text, a folder, or a `DataSplit`."""


def find_preset(preset: Preset | str) -> Preset:
    """Look up a preset by name.

    Args:
        preset: A name of `PRESETS`, or a preset, which is returned as it is.

    Returns:
        The preset.

    Raises:
        InvalidInput: No preset has this name; the message suggests the nearest.
    """
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PRESETS)}."
        raise InvalidInput(f"there is no preset {preset!r}; {hint}")
    return PRESETS[preset]


def find_data(data: Data, default_split: str | None) -> DataSplit:
    """Read the name of a split of a prepared dataset.

    Args:
        data: `DIR[:SPLIT]` as text, a folder, or a split.
        default_split: The split to take where none is named; None takes all frames.

    Returns:
        The split.
    """
    split = data if isinstance(data, DataSplit) else DataSplit.parse(str(data))
    return split if default_split is None else split.or_split(default_split)


def find_method(name: str) -> Method:
    """Look up a method by name.

    Args:
        name: A name of `METHODS`.

    Returns:
        The method.

    Raises:
        InvalidInput: No method has this name; the message suggests the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        raise InvalidInput(f"there is no method {name!r}; did you mean {(near or ['upcycling'])[0]!r}? docs/methods.md lists all")
    return METHODS[name]


def read_truth(receipts: str | Path, data: Data) -> dict[str, Labels]:
    """Join the receipts that `extract` left with its caller and the labels of the frames that were extracted.

    Args:
        receipts: JSON file of `extract --receipts`: scene id to frame id.
        data: The prepared frames that were extracted.

    Returns:
        True labels by scene id. They may only measure pseudo labels.

    Raises:
        InvalidInput: The file cannot be read, or a scan in it has no labels.
    """
    frames = find_data(data, None).open()
    labels = {frame_id: frames.labels(i) for i, frame_id in enumerate(frames.ids)}
    try:
        frame_of = json.loads(Path(receipts).read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read the receipts {receipts}: {error}; `upcycle3d extract --receipts` writes them") from error
    found = {scene: labels.get(frame) for scene, frame in frame_of.items()}
    known = {scene: truth for scene, truth in found.items() if truth is not None}
    if len(known) < len(found):
        raise InvalidInput(
            f"{len(found) - len(known)} of {len(found)} scans in {receipts} have no labels in {data}; prepare those frames too"
        )
    return known
