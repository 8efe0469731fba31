"""The methods that `upcycle3d upcycle --method` offers: what differs between them, and nothing else.

All methods start from one source model. They share steps, labeled batches, teacher and thresholds, so a difference in their results
is a difference of the method. A `Method` holds functions where methods differ in what they compute, so your own method is a value:

    mine = replace(METHODS["upcycling"], augmentation=my_augmentation, label_rule=my_label_rule)
    outcome = upcycle3d.upcycle("small", data, "runs/source", "runs/mine", method=mine, store="store")

Read next: `pseudo_labels.py` (label rules), `feature_augmentation.py` (augmentations and mixing), `unlabeled_half.py`, which applies both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

from ...core.errors import InvalidInput
from .feature_augmentation import (
    SceneAugmentation,
    SceneMixing,
    add_noise,
    cut_mix,
    drop_cells,
    drop_channels,
    flip_x,
    flip_y,
    rotate_free,
    rotate_quarter,
    scale_map,
)
from .pseudo_labels import LabelRule, hybrid_labels, trusted_labels


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one method trains, and what it does with the unlabeled half of a batch.

    Raises:
        InvalidInput: A field asks for a change of smashed scenes, and the method reads none.
    """

    summary: str
    """One line for reports and tables."""

    trains: Literal["nothing", "decoder", "all"] = "decoder"
    """What is trained. "nothing": the source model is the result. "decoder": the encoder is frozen, as it must be where stored
    features are used. "all": the whole detector."""

    labeled: Literal["source", "target"] = "source"
    """Domain of the labeled half of a batch. Only oracles take the target's labels."""

    unlabeled: Literal["none", "smashed", "raw"] = "smashed"
    """The unlabeled half of a batch: none, smashed scenes of the store, or raw scans, which a fleet would have to upload."""

    label_rule: LabelRule = hybrid_labels
    """Makes pseudo labels of the teacher's detections in a scene. ST3D (`self_training`) does not use it; it makes its own labels, in rounds."""

    f_gt: bool = False
    """Whether F-GT pastes labeled objects into smashed scenes; `UpcycleConfig.f_gt` says how many."""

    estimates_sizes: bool = False
    """Whether labeled and pasted objects get the mean size of the fleet's objects, estimated from its scenes (`size_estimate.py`)."""

    max_paste_rotation: float = 0.0
    """Largest angle (rad) by which a pasted object is turned about its center, either way; 0 pastes objects as they were cut."""

    augmentation: SceneAugmentation | None = None
    """Changes each smashed scene and its labels after pasting; None changes nothing."""

    mixing: SceneMixing | None = None
    """Makes one scene of two, for every scene of the unlabeled half with a partner drawn at random; None mixes nothing."""

    self_training: bool = False
    """Whether ST3D trains on the raw scans (`self_training.py`) instead of the step in `trainer.py`. It uses no labeled frame."""

    def __post_init__(self) -> None:
        changes = {
            "f_gt": self.f_gt,
            "estimates_sizes": self.estimates_sizes,
            "augmentation": self.augmentation,
            "mixing": self.mixing,
        }
        given = [name for name, value in changes.items() if value]
        if self.unlabeled != "smashed" and given:
            raise InvalidInput(
                f"a method with unlabeled={self.unlabeled!r} cannot use {', '.join(given)}: they need smashed scenes"
            )
        if self.max_paste_rotation and not self.f_gt:
            raise InvalidInput("max_paste_rotation turns objects that F-GT pastes; set f_gt=True too")
        if self.self_training and (self.unlabeled, self.trains) != ("raw", "all"):
            raise InvalidInput('self_training needs unlabeled="raw" and trains="all": it trains the whole detector on raw scans')


def method_record(method: Method) -> dict[str, str | float | bool | None]:
    """Describe a method for the record of a run, so that a run is not resumed with another one.

    Args:
        method: The method, usually a caller's own.

    Returns:
        Its fields by name. A function is named by its module and qualified name, a `partial` with its arguments too. Two functions of
        one name (two lambdas of one module) cannot be told apart.
    """
    values = {f.name: getattr(method, f.name) for f in fields(method)}
    return {name: function_name(value) if callable(value) else value for name, value in values.items()}


def function_name(function: Callable[..., object]) -> str:
    """Name a function for a record or a message.

    Args:
        function: A function, a `partial` or a callable object.

    Returns:
        Module and qualified name, with the arguments of a `partial`.
    """
    if isinstance(function, partial):
        given = [*map(_argument, function.args), *(f"{n}={_argument(v)}" for n, v in function.keywords.items())]
        return f"{function_name(function.func)}({', '.join(given)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _argument(value: object) -> str:
    """A plain value as it is written. Of anything else only the type: its text may hold an address of this process."""
    plain = isinstance(value, bool | int | float | str | None)
    return repr(value) if plain else f"<{type(value).__name__}>"


METHODS: dict[str, Method] = {
    "source_only": Method(summary="the source model as it is", trains="nothing", unlabeled="none"),
    "source_continued": Method(summary="the same extra steps on labeled data alone", unlabeled="none"),
    "pseudo_label": Method(summary="teacher boxes supervise every head, no F-GT", label_rule=trusted_labels),
    "upcycling": Method(summary="hybrid pseudo labels and F-GT", f_gt=True),
    "upcycling_calibrated": Method(
        summary="UpCycling at the fleet's object sizes, estimated from its scenes", f_gt=True, estimates_sizes=True
    ),
    "hybrid": Method(summary="hybrid pseudo labels, no F-GT"),
    "f_gt_trusted": Method(summary="F-GT, teacher boxes supervise every head", label_rule=trusted_labels, f_gt=True),
    "f_rot": Method(
        summary="UpCycling with the pasted objects turned (our reading of F-RoT)", f_gt=True, max_paste_rotation=math.pi / 16
    ),
    "noise": Method(summary="hybrid labels, Gaussian noise on features", augmentation=add_noise),
    "channel_dropout": Method(summary="hybrid labels, channels dropped", augmentation=drop_channels),
    "cell_dropout": Method(summary="hybrid labels, cells dropped", augmentation=drop_cells),
    "flip_x": Method(summary="hybrid labels, front-back flip of features", augmentation=flip_x),
    "flip_y": Method(summary="hybrid labels, left-right flip of features", augmentation=flip_y),
    "rotate_90": Method(summary="hybrid labels, quarter turns of features", augmentation=rotate_quarter),
    "rotate": Method(summary="hybrid labels, free rotation of features", augmentation=rotate_free),
    "scale": Method(summary="hybrid labels, scaled feature map", augmentation=scale_map),
    "cut_mix": Method(summary="hybrid labels, halves of two scenes", mixing=cut_mix),
    "mean_teacher": Method(
        summary="raw scans, teacher boxes supervise every head", unlabeled="raw", trains="all", label_rule=trusted_labels
    ),
    "iou_match": Method(summary="raw scans, hybrid pseudo labels (as 3DIoUMatch)", unlabeled="raw", trains="all"),
    "st3d": Method(summary="ST3D: self-training on raw scans alone", unlabeled="raw", trains="all", self_training=True),
    "oracle_frozen": Method(summary="source encoder, decoder trained on target labels", labeled="target", unlabeled="none"),
    "oracle_full": Method(summary="everything trained on target labels", trains="all", labeled="target", unlabeled="none"),
}
"""Every method by its name on the command line; docs/methods.md compares them."""
