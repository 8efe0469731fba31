"""Attack on attributes: what an upload tells about the intensity of points, and about the class and the size of objects.

The attacker is given where a point or an object is, and answers what it is: so the score is what the upload adds to a place. It learns from
frames whose scans and labels it knows. Without a place it says which cells hold objects of a class.

Read next: `people.py`, where the attacker has to find the objects first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.structures import Labels
from ....ops.points_in_boxes import count_points_in_boxes, points_in_boxes
from ..frames import AuditFrame
from ..ranking_metrics import auc
from .fits import fit_best
from .leak_row import LeakRow, balanced_accuracy, explained_share
from .scene_views import SceneView, view_of_coordinates, view_of_nothing, view_of_points, view_of_upload, voxel_means

ASKED_POINTS = 5
"""Objects with fewer points are not asked about."""
POINTS_PER_FRAME = 150
BACKGROUND_PER_FRAME = 40
SIZES = ("length", "width", "height")


@dataclass(frozen=True, kw_only=True)
class IntensityLeak:
    """How well the intensity of points is known, their positions given. A measure is R2 on unseen frames; the mean reaches 0."""

    r2: LeakRow
    """R2. `raw` is what the mean intensity of the voxel explains; it needs no learning."""

    points: int
    """Points that were asked about."""

    frames: int
    """Unseen frames."""


@dataclass(frozen=True, kw_only=True)
class ClassLeak:
    """How well the class of an object is known, its place and heading given."""

    accuracy: LeakRow
    """Balanced accuracy; a guess reaches one over the number of classes."""

    objects: tuple[int, ...]
    """Unseen objects by class, in label order."""

    frames: int
    """Unseen frames."""


@dataclass(frozen=True, kw_only=True)
class CellLeak:
    """How well cells that hold objects of a class are told from other cells that hold points; no place is given."""

    class_name: str
    """The class."""

    auc: LeakRow
    """Area under the ROC curve; chance is 0.5."""

    cells: int
    """Unseen cells that hold an object of the class."""


@dataclass(frozen=True, kw_only=True)
class SizeLeak:
    """How well one size of the objects of a class is known, place, heading and class given."""

    class_name: str
    """The class."""

    side: str
    """"length", "width" or "height"."""

    error: LeakRow
    """Mean absolute error in meters, lower is a stronger attack."""

    guess: float
    """Mean absolute error of the mean size of the attacker's objects, in meters."""

    correlation: LeakRow
    """Correlation of the answers with the truth."""

    objects: int
    """Unseen objects."""


@dataclass(frozen=True, kw_only=True)
class AttributeLeak:
    """What one kind of upload tells about attributes."""

    intensity: IntensityLeak | None
    """Intensity of points; None where the scans have none."""

    classes: ClassLeak | None
    """Class of objects; None where fewer than two classes have enough objects."""

    cells: tuple[CellLeak, ...]
    """Cells that hold objects, by class."""

    sizes: tuple[SizeLeak, ...]
    """Sizes of objects, by class and side."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """One kind of view of the attacker's frames and of the unseen ones."""

    known: Sequence[SceneView]
    """Views of the frames that the attacker learns from."""

    unseen: Sequence[SceneView]
    """Views of the frames that are scored."""


def views_of(known: Sequence[AuditFrame], unseen: Sequence[AuditFrame]) -> dict[str, Views]:
    """Make the views of every row of a table.

    Args:
        known: Frames of the attacker's own.
        unseen: Frames that are scored.

    Returns:
        "nothing", "coordinates", "upload" and "raw", the fields of `LeakRow`, and their views.
    """
    kinds: dict[str, Callable[[AuditFrame], SceneView]] = {
        "nothing": lambda f: view_of_nothing(f.upload.spec),
        "coordinates": lambda f: view_of_coordinates(f.upload),
        "upload": lambda f: view_of_upload(f.upload),
        # Who has the scan can compute the upload, so this row sees both: otherwise it would be no upper bound.
        "raw": lambda f: replace(view_of_points(f.scan.xyz, f.upload.spec.grid), also=view_of_upload(f.upload)),
    }
    return {name: Views(known=[see(f) for f in known], unseen=[see(f) for f in unseen]) for name, see in kinds.items()}


def attack_attributes(
    known: Sequence[AuditFrame], unseen: Sequence[AuditFrame], *, class_names: tuple[str, ...], seed: int = 0
) -> AttributeLeak:
    """Learn attributes from an attacker's frames and score the answers on unseen ones.

    Args:
        known: Labeled frames of the attacker's own.
        unseen: Labeled frames to score.
        class_names: Names of the class numbers of the labels.
        seed: Decides which points and cells are asked about, and the learners.

    Returns:
        The scores. Parts for which there are fewer than 20 objects to learn from, or none to score, are left out.

    Raises:
        InvalidInput: A frame has no labels, or there is no frame.
    """
    require(len(known) > 0 and len(unseen) > 0, "an attack on attributes needs frames to learn from and frames to score")
    every = views_of(known, unseen)
    truth = [[objects_of(f) for f in part] for part in (known, unseen)]
    return AttributeLeak(
        intensity=_intensity(known, unseen, every, seed),
        classes=_classes(truth, every, len(class_names), seed),
        cells=_cells(known, unseen, truth, every, class_names, seed),
        sizes=_sizes(truth, every, class_names, seed),
    )


def objects_of(frame: AuditFrame) -> Labels:
    """Take the objects that can be asked about.

    Args:
        frame: A labeled frame.

    Returns:
        Objects with weight, whose center lies in the grid and which hold at least 5 points.

    Raises:
        InvalidInput: Nobody labeled the frame.
    """
    labels = frame.labels
    if labels is None:
        raise InvalidInput(f"frame {frame.id} has no labels; an attack on objects needs labeled frames")
    x0, y0, _, x1, y1, _ = frame.upload.spec.grid.range
    boxes = labels.boxes.data
    inside = (boxes[:, 0] >= x0) & (boxes[:, 0] < x1) & (boxes[:, 1] >= y0) & (boxes[:, 1] < y1)
    points = count_points_in_boxes(frame.scan.xyz, boxes)
    return labels.select(inside & (labels.weight > 0) & (points >= ASKED_POINTS))


ROWS = ("nothing", "coordinates", "upload", "raw")


def _answers(
    every: dict[str, Views],
    ask: Callable[[SceneView, int, bool], Tensor],
    targets: Tensor,
    *,
    seed: int,
    classes: bool,
    names: tuple[str, ...] = ROWS,
    steps: int = 400,
) -> dict[str, Tensor]:
    """Answers on the unseen frames by row; `ask` describes what is asked about in frame `i` of the known (True) or unseen frames.

    Who sees more may ignore it: a row takes over the answers of the row before where its own learner is worse on frames held out.
    """
    found: dict[str, Tensor] = {}
    best = error = None
    for name in names:
        parts = [ask(view, i, True) for i, view in enumerate(every[name].known)]
        frames = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
        fit = fit_best(torch.cat(parts), targets, seed=seed, groups=frames, classes=classes, steps=steps)
        answer = fit.predict(torch.cat([ask(view, i, False) for i, view in enumerate(every[name].unseen)]))
        if best is None or error is None:
            best, error = answer, fit.held_error
        else:
            best = torch.where(fit.held_error < error, answer, best)
            error = torch.minimum(fit.held_error, error)
        found[name] = best
    return found


def _intensity(
    known: Sequence[AuditFrame], unseen: Sequence[AuditFrame], every: dict[str, Views], seed: int
) -> IntensityLeak | None:
    names = known[0].scan.feature_names
    if "intensity" not in names:
        return None
    column, generator = names.index("intensity"), torch.Generator().manual_seed(seed)
    rows = [[torch.randperm(len(f.scan), generator=generator)[:POINTS_PER_FRAME] for f in part] for part in (known, unseen)]
    truth = [torch.cat([f.scan.features[r, column] for f, r in zip(part, row)]) for part, row in zip((known, unseen), rows)]
    frames, shapes = (known, unseen), (every["raw"].known, every["raw"].unseen)

    def ask(view: SceneView, i: int, learns: bool) -> Tensor:
        part = 0 if learns else 1
        xyz = frames[part][i].scan.xyz[rows[part][i]]
        return torch.cat([view.at(xyz), shapes[part][i].read(xyz[:, :2])], 1)  # the geometry is given, so every row has it

    answers = _answers(every, ask, truth[0][:, None], seed=seed, classes=False, names=ROWS[:3], steps=1000)
    found = {name: explained_share(truth[1], answer[:, 0]) for name, answer in answers.items()}
    means = torch.cat([voxel_means(f.scan, f.upload.spec.grid, column)[r] for f, r in zip(unseen, rows[1])])
    return IntensityLeak(r2=LeakRow(**found, raw=explained_share(truth[1], means)), points=len(truth[1]), frames=len(unseen))


def places_of(objects: Labels) -> Tensor:
    """Give the places of objects as a view describes them.

    Args:
        objects: N objects.

    Returns:
        (N, 3) x, y in meters and heading in radians.
    """
    return objects.boxes.data[:, [0, 1, 6]]


def _classes(truth: list[list[Labels]], every: dict[str, Views], count: int, seed: int) -> ClassLeak | None:
    learned, asked = (torch.cat([o.classes for o in part]) for part in truth)
    if int((torch.bincount(learned, minlength=count) >= 20).sum()) < 2 or not len(asked):
        return None

    def ask(view: SceneView, i: int, learns: bool) -> Tensor:
        return view.around(places_of(truth[0 if learns else 1][i]))

    targets = torch.nn.functional.one_hot(learned, count).float()
    answers = _answers(every, ask, targets, seed=seed, classes=True)
    found = {name: balanced_accuracy(asked, answer.argmax(1), count) for name, answer in answers.items()}
    numbers = tuple(torch.bincount(asked, minlength=count).tolist())
    return ClassLeak(accuracy=LeakRow(**found), objects=numbers, frames=len(truth[1]))


def _cells(
    known: Sequence[AuditFrame],
    unseen: Sequence[AuditFrame],
    truth: list[list[Labels]],
    every: dict[str, Views],
    class_names: tuple[str, ...],
    seed: int,
) -> tuple[CellLeak, ...]:
    generator = torch.Generator().manual_seed(seed)
    parts = [[_cells_of(f, o, generator) for f, o in zip(part, objects)] for part, objects in zip((known, unseen), truth)]
    count = len(class_names)
    learned, asked = (torch.cat([classes for _, classes in part]) for part in parts)
    learned, asked = (torch.where(classes < 0, count, classes) for classes in (learned, asked))
    if not len(learned) or not len(asked):
        return ()

    def ask(view: SceneView, i: int, learns: bool) -> Tensor:
        return view.around(parts[0 if learns else 1][i][0])

    targets = torch.nn.functional.one_hot(learned, count + 1).float()  # the last class is background
    scores = _answers(every, ask, targets, seed=seed, classes=True)
    found = []
    for c, name in enumerate(class_names):
        mine, others = asked == c, asked == count
        if int((learned == c).sum()) < 20 or not bool(mine.any()) or not bool(others.any()):
            continue
        sure = {row: s[:, c] - s[:, count] for row, s in scores.items()}
        areas = {row: auc(s[mine], s[others]).value for row, s in sure.items()}
        found.append(CellLeak(class_name=name, auc=LeakRow(**areas), cells=int(mine.sum())))
    return tuple(found)


def _cells_of(frame: AuditFrame, objects: Labels, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, 3) centers of cells that hold points, with heading 0, and (N,) their classes, -1 for background, of which some are taken."""
    spec = frame.upload.spec
    step = frame.scan.xyz.new_tensor(spec.cell_size())
    origin = frame.scan.xyz.new_tensor(spec.position(0.0, 0.0))
    places = ((frame.scan.xyz[:, :2] - origin) / step).round().unique(dim=0) * step + origin
    boxes = objects.boxes.data.clone()
    boxes[:, 2], boxes[:, 5] = 0.0, 1.0  # in BEV only
    boxes[:, 3:5] = torch.maximum(boxes[:, 3:5], step)  # the cell of a person is wider than the person
    owner = points_in_boxes(torch.nn.functional.pad(places, (0, 1)), boxes)
    background = (owner < 0).nonzero()[:, 0]
    background = background[torch.randperm(len(background), generator=generator)[:BACKGROUND_PER_FRAME]]
    mine = (owner >= 0).nonzero()[:, 0]
    classes = torch.cat([objects.classes[owner[mine]], torch.full((len(background),), -1)])
    return torch.nn.functional.pad(places[torch.cat([mine, background])], (0, 1)), classes


def _sizes(truth: list[list[Labels]], every: dict[str, Views], class_names: tuple[str, ...], seed: int) -> tuple[SizeLeak, ...]:
    found: list[SizeLeak] = []
    for c, name in enumerate(class_names):
        learned, asked = ([o.select(o.classes == c) for o in part] for part in truth)
        known, unseen = (torch.cat([o.boxes.data[:, 3:6] for o in part]) for part in (learned, asked))
        if len(known) < 20 or len(unseen) < 3:
            continue

        def ask(view: SceneView, i: int, learns: bool, learned: list[Labels] = learned, asked: list[Labels] = asked) -> Tensor:
            return view.around(places_of((learned if learns else asked)[i]))

        answers = _answers(every, ask, known, seed=seed, classes=False)
        for k, side in enumerate(SIZES):
            found.append(
                SizeLeak(
                    class_name=name,
                    side=side,
                    error=LeakRow(**{n: float((a[:, k] - unseen[:, k]).abs().mean()) for n, a in answers.items()}),
                    guess=float((known[:, k].mean() - unseen[:, k]).abs().mean()),
                    correlation=LeakRow(**{n: correlation(a[:, k], unseen[:, k]) for n, a in answers.items()}),
                    objects=len(unseen),
                )
            )
    return tuple(found)


def correlation(answers: Tensor, truth: Tensor) -> float:
    """Compute Pearson's correlation.

    Args:
        answers: (N,) values.
        truth: (N,) values.

    Returns:
        -1 to 1; 0 where one of the two does not vary.
    """
    a, b = answers.double() - answers.double().mean(), truth.double() - truth.double().mean()
    whole = a.norm() * b.norm()
    return float((a @ b) / whole) if float(whole) > 1e-9 else 0.0
