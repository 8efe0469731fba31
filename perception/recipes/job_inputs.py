"""What callers may write where a job needs a preset, a method, a split or the truth: names are looked up, and a mistyped one is named.

Read next: `jobs.py`, which takes these inputs.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from ...core.device import find_device
from ...core.errors import InvalidInput
from ...core.strict_json import read_json
from ...core.structures import Labels
from ...core.tensor_value import shape_of
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
    if not isinstance(preset, str):
        raise InvalidInput(f"a preset is given by its name or as a Preset, found {shape_of(preset)}")
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PRESETS)}."
        raise InvalidInput(f"there is no preset {preset!r}; {hint}")
    return PRESETS[preset]


def find_data(data: Data, default_split: str | None) -> DataSplit:
    """Read the name of a split of a prepared dataset.

    Args:
        data: `DIR[:SPLIT]` as text; a folder as `Path`, whose name is not searched for a colon; or a split.
        default_split: The split to take where none is named; None takes all frames.

    Returns:
        The split.

    Raises:
        InvalidInput: It is something else, or the folder or the split in the text is empty.
    """
    if isinstance(data, str):
        data = DataSplit.parse(data)
    elif isinstance(data, Path):
        data = DataSplit(root=data)
    elif not isinstance(data, DataSplit):
        raise InvalidInput(f"data is a text DIR[:SPLIT], a folder as Path, or a DataSplit; found {shape_of(data)}")
    split = data
    return split if default_split is None else split.or_split(default_split)


def find_method(method: Method | str) -> Method:
    """Look up a method by name.

    Args:
        method: A name of `METHODS`, or a method, which is returned as it is.

    Returns:
        The method.

    Raises:
        InvalidInput: No method has this name; the message suggests the nearest.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise InvalidInput(f"a method is given by its name or as a Method, found {shape_of(method)}")
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1)
        raise InvalidInput(
            f"there is no method {method!r}; did you mean {(near or ['upcycling'])[0]!r}? docs/methods.md lists all"
        )
    return METHODS[method]


def check_run_options(*, seed: int, steps: int | None, workers: int, device: str | torch.device) -> torch.device:
    """Check what decides how a training runs, before it takes a run folder.

    Args:
        seed: Seed of the run.
        steps: Optimizer steps; None takes the preset's number.
        workers: Processes that prepare batches.
        device: Where the networks run.

    Returns:
        The device.

    Raises:
        InvalidInput: A number is no whole number or too small, or this machine has no such device.
    """
    for name, value, least in (("seed", seed, 0), ("steps", steps, 1), ("workers", workers, 0)):
        if name == "steps" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInput(f"{name} must be a whole number of at least {least}, found {value!r}")
    return find_device(device)


def check_path(value: object, name: str, what: str) -> Path:
    """Check that an argument is a path.

    Args:
        value: The argument.
        name: Its name.
        what: What it should name, for the message.

    Returns:
        The path.

    Raises:
        InvalidInput: It is something else, or empty.
    """
    if not isinstance(value, str | Path) or not str(value):
        raise InvalidInput(f"{name} must be the path of {what}, found {shape_of(value)}")
    return Path(value)


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
    frame_of = read_json(receipts, "the receipts of an extraction", remedy="`upcycle3d extract --receipts` writes them")
    found = {scene: labels.get(frame) for scene, frame in frame_of.items()}
    known = {scene: truth for scene, truth in found.items() if truth is not None}
    if len(known) < len(found):
        raise InvalidInput(
            f"{len(found) - len(known)} of {len(found)} scans in {receipts} have no labels in {data}; prepare those frames too"
        )
    return known
