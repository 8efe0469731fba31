"""The settings of a run at the fleet's object sizes: estimated in rounds, kept in the run's folder, and read again where the run is resumed.

    source model ─ a short training on objects of all sizes ─ its student ─ estimate ─ … around these sizes … ─ the run, from the source model

A detector that has only seen objects of one size reads that size everywhere. So each round trains a copy of the source model on labeled and
pasted objects of random sizes, and on the fleet's scenes for where objects are, not for how large: the teacher does not know that yet. The run
itself starts from the source model. Each short training has a folder of its own in the run's folder, so that it can be stopped and resumed
too; it is removed when its student has been asked. Read next: `perception/server/size_estimate.py`, the estimate.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.strict_json import read_json
from ...core.structures import Labels
from ...datasets.frame_source import FrameSource
from ..models.detector import Detector
from ..server.joined_stores import FleetScenes
from ..server.methods import Method
from ..server.size_estimate import SizeEstimate, estimate_sizes, shift_of
from ..server.upcycle_config import UpcycleConfig
from ..training.distributed import DistributedContext
from .job_start import on_main

SIZES_FILE = "object_sizes.json"
"""Name of the file in a run's folder that holds the estimates of all rounds."""
ROUND_FOLDER = "size_round"
"""Folder of a short training in a run's folder, while it is needed."""

Learn = Callable[[Detector, Method, UpcycleConfig, Path], None]
"""Trains a detector in place by a method with other settings than the run's, and keeps its files in a folder."""


def settings_at_fleet_sizes(
    folder: Path,
    method: Method,
    settings: UpcycleConfig,
    detector: Detector,
    frames: FrameSource,
    scenes: FleetScenes | None,
    *,
    codec: str,
    seed: int,
    learn: Learn,
    say: Callable[[str], None],
    asked: FrameSource | None = None,
    truth: Mapping[str, Labels] | None = None,
    context: DistributedContext | None = None,
) -> UpcycleConfig:
    """Give labeled and pasted objects the mean sizes of the fleet's objects, where the method asks for it.

    Args:
        folder: Folder of the run. The estimates are written there, and those that are there are not made again.
        method: `estimates_sizes` decides.
        settings: Settings of the run.
        detector: The source model, whose encoder made the scenes. It stays as it is.
        frames: The labeled split.
        scenes: The fleet's scenes.
        codec: Codec of the scenes.
        seed: Seed of the run.
        learn: Trains a copy of the source model for the rounds after the first.
        say: Is told each estimate.
        asked: A few labeled frames of the fleet, which the estimate takes into account.
        truth: Labels of the fleet's scenes, where there are some. They are set beside the estimates and never used.
        context: This process among the others: all train, the first one estimates.

    Returns:
        The settings, with the size shift of the most precise round to the millimeter, for each class apart.

    Raises:
        InvalidInput: There are no scenes, a size shift is given already, or the file is damaged.
    """
    if not method.estimates_sizes:
        return settings
    if scenes is None:
        raise InvalidInput("object sizes are estimated from smashed scenes, and there are none")
    if any(settings.f_gt.size_shift):
        raise InvalidInput(
            f"the method estimates the size shift, and one is given already ({settings.f_gt.size_shift}); take the method upcycling for it"
        )
    context, path = context or DistributedContext(), folder / SIZES_FILE
    rounds = read_estimates(path) if path.exists() else ()
    for number in range(settings.sizes.rounds):
        if number >= len(rounds):
            if number and at_sizes_of(settings, rounds) == at_sizes_of(settings, rounds[:-1]):
                say(f"sizes, round {number + 1}: left out, it would repeat round {number} at the same sizes")
                break
            sized, reader = at_sizes_of(settings, rounds), deepcopy(detector)
            short = folder / f"{ROUND_FOLDER}_{number}"
            learn(reader, replace(method, estimates_sizes=False), _short_training(sized), short)

            def estimate(reader: Detector = reader, sized: UpcycleConfig = sized, rounds: SizeRounds = rounds) -> None:
                about = sized.f_gt.size_shift
                found = estimate_sizes(reader, frames, scenes, settings.sizes, codec=codec, seed=seed, about=about, asked=asked)
                _write(path, (*rounds, _recorded(found, truth)))

            on_main(estimate, context)
            rounds = read_estimates(path)
            if context.is_main:
                shutil.rmtree(short, ignore_errors=True)
        for each in rounds[number]:
            say(f"sizes, round {number + 1}: {each}")
    for of_class in zip(*rounds, strict=True):
        number = most_precise(of_class)
        length, width, height = of_class[number].shift
        say(
            f"labeled {of_class[0].class_name} objects become {length:+.3f}, {width:+.3f}, {height:+.3f} m larger (round {number + 1})"
        )
    return at_sizes_of(settings, rounds)


SizeRounds = tuple[tuple[SizeEstimate, ...], ...]
"""For each round one estimate per class."""


def at_sizes_of(settings: UpcycleConfig, rounds: SizeRounds) -> UpcycleConfig:
    """Give labeled and pasted objects the sizes that were estimated best: those of the round with the smallest error, for each class apart.

    Args:
        settings: Settings of a run.
        rounds: What `read_estimates` gave; empty where nothing is estimated yet.

    Returns:
        The settings with the size shift.
    """
    if not rounds:
        return settings
    best = [of_class[most_precise(of_class)] for of_class in zip(*rounds, strict=True)]
    return replace(settings, f_gt=replace(settings.f_gt, size_shift=shift_of(best)))


def most_precise(estimates: Sequence[SizeEstimate]) -> int:
    """Find the round with the smallest error of one class.

    Args:
        estimates: The estimates of the class, round by round.

    Returns:
        Position of the round; of equal errors the last. An error that is NaN or infinite is larger than any other.
    """

    def error(number: int) -> float:
        squared = sum(side**2 for side in estimates[number].error)
        return squared if math.isfinite(squared) else math.inf

    return min(reversed(range(len(estimates))), key=error)


def _short_training(settings: UpcycleConfig) -> UpcycleConfig:
    sizes, optim = settings.sizes, settings.loop.optim
    steps = max(1, round(sizes.round_share * optim.total_steps))
    common, own = ((math.exp(-most), math.exp(most)) for most in (sizes.common, sizes.own))
    return replace(
        settings,
        loop=replace(settings.loop, optim=replace(optim, total_steps=steps)),
        f_gt=replace(settings.f_gt, object_scale=common, side_scale=own),
        teacher_box_weight=0.0,
    )


def _recorded(found: Sequence[SizeEstimate], truth: Mapping[str, Labels] | None) -> tuple[SizeEstimate, ...]:
    """The estimates as they are kept: with shifts to the millimeter, so that a database of objects fits whatever the last digits are, which
    differ from machine to machine; and with the true differences where they are known."""
    kept = []
    for number, each in enumerate(found):
        length, width, height = (round(side, 3) for side in each.shift)
        kept.append(replace(each, shift=(length, width, height), true=_true_difference(number, each, truth)))
    return tuple(kept)


def _true_difference(
    number: int, estimate: SizeEstimate, truth: Mapping[str, Labels] | None
) -> tuple[float, float, float] | None:
    sizes = [labels.boxes.data[(labels.classes == number) & (labels.weight > 0), 3:6] for labels in (truth or {}).values()]
    every = torch.cat(sizes) if sizes else torch.zeros(0, 3)
    if not len(every):
        return None
    length, width, height = (every.double().mean(0) - torch.tensor(estimate.labeled, dtype=torch.float64)).tolist()
    return length, width, height


def _write(path: Path, rounds: SizeRounds) -> None:
    stored = {"rounds": [[config_to_json(each) for each in one] for one in rounds]}
    write_atomically(path, (json.dumps(stored, indent=1) + "\n").encode())


def read_estimates(path: Path) -> SizeRounds:
    """Read the estimates of a run.

    Args:
        path: The file `object_sizes.json` in the run's folder.

    Returns:
        For each round one estimate per class.

    Raises:
        InvalidInput: The file is missing or damaged.
    """
    remedy = "delete it, and the sizes are estimated again"
    rounds = read_json(path, "the estimated object sizes", remedy=remedy, allow_nan=True).get("rounds")
    if not isinstance(rounds, list) or not rounds or not all(isinstance(one, list) for one in rounds):
        raise InvalidInput(f"{path} is damaged or was edited: it has no list of rounds; {remedy}")
    try:
        return tuple(tuple(config_from_json(SizeEstimate, each) for each in one) for one in rounds)
    except InvalidInput as error:
        raise InvalidInput(f"{path} is damaged or was edited: {error}; {remedy}") from error
