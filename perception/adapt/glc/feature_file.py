"""Labels and unknown scores for features that somebody else extracted: no training, one file in, three files out.

FILE.npz   features (N, D), probabilities (N, C), optional labels (N,), optional weight (C, D) of the classifier for LEAD
OUT        .npz with the labels and scores, .json with the numbers, .html with the pictures
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.files import atomic_file
from ...viz.html import Section, figure_svg, key_numbers, page, paragraph, table
from .labeling import (
    ClassNumber,
    ClassNumberConfig,
    OneVsAllConfig,
    TargetLabels,
    check_target,
    class_number_candidates,
    estimate_class_number,
    one_vs_all_labels,
)
from .lead import LeadConfig, lead_labels
from .metrics import OpenSetScores, accuracy, auroc, fpr_at_tpr, novel_category_accuracy, open_set_scores
from .plots import embedding_plot, score_histogram
from .unknown import UnknownRule, is_unknown, normalized_entropy

_KINDS = {"features": "f", "probabilities": "f", "labels": "iu", "weight": "f"}
_MOST_BYTES = 16 << 30  # of one array


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """features: (N, D) float32. probabilities: (N, C) float32. labels: (N,) int64, only to report metrics. weight: (C, D) or None."""

    features: Tensor
    probabilities: Tensor
    labels: np.ndarray | None
    weight: Tensor | None


@dataclass(frozen=True, kw_only=True)
class FeatureLabels:
    """What was found in a file. classes: (N,) from the probabilities and the threshold, C = unknown; scores: (N,) entropy."""

    labels: TargetLabels
    estimate: ClassNumber | None
    scores: Tensor
    threshold: float
    classes: Tensor


def read_features(path: Path) -> FeatureFile:
    """Read and check one npz file; nothing is unpickled. Raises InvalidInput naming the file and what is wrong with it."""
    arrays, there = _read_npz(path)
    missing = [name for name in ("features", "probabilities") if name not in arrays]
    if missing:
        raise InvalidInput(f"{path}: no array {' and no array '.join(missing)}; found {there}")
    for name, array in arrays.items():
        if array.dtype.kind not in _KINDS[name]:
            raise InvalidInput(f"{path}: {name} must be {'integers' if 'i' in _KINDS[name] else 'floats'}, found {array.dtype}")
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items() if name != "labels"}
    labels = arrays["labels"].astype(np.int64) if "labels" in arrays else None
    try:
        check_target(tensors["features"], tensors["probabilities"])
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    if labels is not None and labels.shape != (len(tensors["features"]),):
        raise InvalidInput(f"{path}: labels must be ({len(tensors['features'])},) like the features, found {labels.shape}")
    return FeatureFile(
        labels=labels, weight=tensors.get("weight"), features=tensors["features"], probabilities=tensors["probabilities"]
    )


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of ``_KINDS`` that are there, and the names of all. A shape is checked against the file's size before it is allocated."""
    try:
        with zipfile.ZipFile(path) as archive:
            there = [member.filename.removesuffix(".npy") for member in archive.infolist()]
            arrays = {name: _read_member(archive, name) for name in _KINDS if name in there}
    except (ValueError, zipfile.BadZipFile, EOFError, OverflowError, NotImplementedError, zlib.error) as error:
        raise InvalidInput(f"{path}: not a readable npz file ({error}); write it with numpy.savez") from error
    return arrays, there


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    size = archive.getinfo(f"{name}.npy").file_size
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    if math.prod(shape) * dtype.itemsize > size or size > _MOST_BYTES:
        raise ValueError(f"{name} declares {shape} {dtype} in {size} bytes; at most {_MOST_BYTES} are read")
    with archive.open(f"{name}.npy") as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def label_features(
    file: FeatureFile,
    *,
    class_number: int | None,
    labeling: OneVsAllConfig | LeadConfig,
    unknown: UnknownRule,
    estimate: ClassNumberConfig,
    seed: int,
) -> FeatureLabels:
    """Estimate the class number (unless given), label every sample, and choose the threshold. The file's labels are not looked at."""
    guess = None
    if class_number is None:
        candidates = class_number_candidates(file.probabilities.shape[1], estimate.candidates)
        guess = estimate_class_number(file.features, candidates, estimate, seed=seed)
        class_number = guess.value
    if isinstance(labeling, LeadConfig):
        if file.weight is None:
            raise InvalidInput("LEAD's labeller needs the classifier's weight (C, D) as the array 'weight' of the file")
        labels = lead_labels(file.features, file.probabilities, file.weight, class_number, labeling)
    else:
        labels = one_vs_all_labels(file.features, file.probabilities, class_number, labeling)
    scores = normalized_entropy(file.probabilities)
    threshold = unknown.threshold(scores)
    nearest = file.probabilities.argmax(1)
    classes = torch.where(is_unknown(scores, threshold), file.probabilities.shape[1], nearest)
    return FeatureLabels(labels=labels, estimate=guess, scores=scores, threshold=threshold, classes=classes)


def feature_metrics(file: FeatureFile, found: FeatureLabels) -> dict[str, float]:
    """Metrics where the file has labels: 0..C-1 source classes, C or above target-private, negative ignored. Empty without labels."""
    if file.labels is None or not (file.labels >= 0).any():
        return {}
    unknown = file.probabilities.shape[1]
    counted = file.labels >= 0
    full = file.labels[counted]
    truth = np.minimum(full, unknown)
    private = truth == unknown
    values = {"accuracy without rejection": accuracy(file.probabilities.argmax(1).numpy()[counted], truth)}
    if private.any() and not private.all():
        shared = sorted(set(truth[~private].tolist()))
        scores = found.scores.numpy()[counted]
        for name, predicted in (("labels", found.labels.hard), ("threshold", found.classes)):
            result: OpenSetScores = open_set_scores(predicted.numpy()[counted], truth, shared, unknown)
            values |= {f"{name}: OS*": result.os_star, f"{name}: UNK": result.unk, f"{name}: H": result.h}
        values |= {"AUROC of the score": auroc(scores, private), "FPR95 of the score": fpr_at_tpr(scores, private)}
    if private.any() and (full > unknown).any():
        values["novel-category accuracy"] = novel_category_accuracy(file.features.numpy()[counted][private], full[private])
    return values


def facts(file: FeatureFile, found: FeatureLabels) -> dict[str, object]:
    """The numbers of the JSON file; metrics only where there are labels."""
    unknown = file.probabilities.shape[1]
    return {
        "samples": len(file.features),
        "dimensions": file.features.shape[1],
        "source_classes": unknown,
        "class_number": found.labels.class_number,
        "silhouette": None if found.estimate is None else dict(zip(map(str, found.estimate.candidates), found.estimate.scores)),
        "prior": [round(p, 6) for p in found.labels.prior.tolist()],
        "labeled_unknown": int((found.labels.hard == unknown).sum()),
        "threshold": found.threshold,
        "above_threshold": int((found.classes == unknown).sum()),
        "metrics": feature_metrics(file, found),
    }


def write_labels(path: Path, found: FeatureLabels) -> None:
    """labels (N,) int64, margin (N,), nearest (N,), weight (N,), unknown_score (N,), classes (N,) as an npz file, atomically."""
    with atomic_file(path) as out:
        np.savez(
            out,
            labels=found.labels.hard.numpy(),
            margin=found.labels.margin.numpy(),
            nearest=found.labels.nearest.numpy(),
            weight=found.labels.weight.numpy(),
            unknown_score=found.scores.numpy(),
            classes=found.classes.numpy(),
        )


def report(name: str, file: FeatureFile, found: FeatureLabels) -> str:
    """The HTML page: key numbers, the embedding, the histogram with the threshold, the classes and the metrics."""
    unknown, values = file.probabilities.shape[1], feature_metrics(file, found)
    counts = torch.bincount(found.labels.hard, minlength=unknown + 1).tolist()
    names = [str(c) for c in range(unknown)]
    guessed = "estimated by silhouette" if found.estimate is not None else "given"
    sections = [
        Section(
            "Summary",
            [
                key_numbers(
                    [
                        ("target classes", found.labels.class_number, "", guessed),
                        ("labelled unknown", 100 * counts[unknown] / len(file.features), "%", "by the pseudo labels"),
                        ("threshold", found.threshold, "", "of the normalised entropy, chosen without labels"),
                    ]
                ),
                paragraph(
                    "Pseudo labels compare each sample with its class's positive prototype and with the prototypes of everything else. "
                    "The threshold acts on the classifier's entropy alone."
                ),
            ],
        ),
        Section(
            "Pictures",
            [
                figure_svg(
                    embedding_plot(file.features, found.labels.hard, names, "Target samples by pseudo label"), "Embedding."
                ),
                figure_svg(
                    score_histogram(found.scores, found.threshold, "Target samples by unknown score", "normalised entropy"),
                    "Histogram of the unlabelled scores.",
                ),
            ],
        ),
        Section(
            "Classes",
            [
                table(
                    ("class", "labelled", "prior"),
                    [(name, counts[c], found.labels.prior[c].item()) for c, name in enumerate(names)]
                    + [("unknown", counts[unknown], "")],
                    "A low prior hints at a class that the target does not have.",
                )
            ],
        ),
    ]
    if values:
        sections.append(
            Section("Against the labels of the file", [table(("metric", "value"), list(values.items()), "Not used above.")])
        )
    return page(f"Adaptation: {name}", sections, subtitle=f"{len(file.features)} target samples, {unknown} source classes")
