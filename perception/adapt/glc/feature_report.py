"""What was found for a file of features: numbers for machines and an HTML page for people.

Read next: `metrics.py` for the scores and `plots.py` for the pictures.
"""

from __future__ import annotations

import numpy as np
import torch

from ....core.provenance import provenance_of_process
from ...viz.html import Section, figure_svg, key_numbers, page, paragraph, table
from .feature_file import TargetFeatures
from .feature_labels import FeatureLabels
from .metrics import accuracy, auroc, fpr_at_tpr, novel_category_accuracy, open_set_scores
from .plots import embedding_plot, score_histogram


def feature_metrics(target: TargetFeatures, found: FeatureLabels) -> dict[str, float]:
    """Measure labels and threshold against the true labels of a file.

    Args:
        target: Features with their true labels, if there are any.
        found: What `label_features` returned for them.

    Returns:
        Metrics by name; empty without labels. Open-set scores need both known and private samples, and the novel-category accuracy
        needs the private classes apart (labels above C).
    """
    if target.labels is None or not (target.labels >= 0).any():
        return {}
    unknown = target.probabilities.shape[1]
    counted = target.labels >= 0
    full = target.labels[counted]
    truth = np.minimum(full, unknown)
    private = truth == unknown
    values = {"accuracy without rejection": accuracy(target.probabilities.argmax(1).numpy()[counted], truth)}
    if private.any() and not private.all():
        shared = sorted(set(truth[~private].tolist()))
        scores = found.scores.numpy()[counted]
        for name, predicted in (("labels", found.labels.hard), ("threshold", found.classes)):
            result = open_set_scores(predicted.numpy()[counted], truth, shared, unknown)
            values |= {f"{name}: OS*": result.os_star, f"{name}: UNK": result.unk, f"{name}: H": result.h}
        values |= {"AUROC of the score": auroc(scores, private), "FPR95 of the score": fpr_at_tpr(scores, private)}
    if private.any() and (full > unknown).any():
        values["novel-category accuracy"] = novel_category_accuracy(target.features.numpy()[counted][private], full[private])
    return values


def feature_result(target: TargetFeatures, found: FeatureLabels) -> dict[str, object]:
    """Collect the numbers of the JSON file.

    Args:
        target: The features.
        found: What `label_features` returned for them.

    Returns:
        Plain values; `metrics` is empty where the file has no labels.
    """
    unknown = target.probabilities.shape[1]
    return {
        "samples": len(target.features),
        "dimensions": target.features.shape[1],
        "source_classes": unknown,
        "class_number": found.labels.class_number,
        "certainty": {"adapted": found.guard.adapted, "unadapted": found.guard.unadapted},
        "fell_back": found.guard.fell_back,
        "guard": found.guard.sentence(),
        "silhouette": None if found.estimate is None else dict(zip(map(str, found.estimate.candidates), found.estimate.scores)),
        "prior": [round(p, 6) for p in found.labels.prior.tolist()],
        "labeled_unknown": int((found.labels.hard == unknown).sum()),
        "threshold": found.threshold,
        "above_threshold": int((found.classes == unknown).sum()),
        "metrics": feature_metrics(target, found),
    }


def feature_page(name: str, target: TargetFeatures, found: FeatureLabels) -> str:
    """Draw the HTML page: key numbers, embedding, histogram with the threshold, classes and metrics.

    Args:
        name: Name of the file, for the title.
        target: The features.
        found: What `label_features` returned for them.

    Returns:
        The whole page.
    """
    unknown, values = target.probabilities.shape[1], feature_metrics(target, found)
    counts = torch.bincount(found.labels.hard, minlength=unknown + 1).tolist()
    names = [str(c) for c in range(unknown)]
    sections = [
        _summary(target, found, counts[unknown]),
        _pictures(target, found, names),
        Section(
            "Classes",
            [
                table(
                    ("class", "labeled", "prior"),
                    [(name, counts[c], found.labels.prior[c].item()) for c, name in enumerate(names)]
                    + [("unknown", counts[unknown], "")],
                    "A low prior is a sign of a class that the target does not have.",
                )
            ],
        ),
    ]
    if values:
        sections.append(
            Section("Against the labels of the file", [table(("metric", "value"), list(values.items()), "Not used above.")])
        )
    return page(
        f"Adaptation: {name}",
        sections,
        subtitle=f"{len(target.features)} target samples, {unknown} source classes",
        made_by=provenance_of_process(),
        next_steps=[
            ("Label features of your own model: write `features` (N, D) and `probabilities` (N, C) to an npz file.", ""),
            ("Then run the same command on it.", "upcycle3d adapt features FILE.npz --out adapted"),
            (f"Use {name}.npz: it holds the labels and scores of every sample, for a training of your own.", ""),
        ],
    )


def _summary(target: TargetFeatures, found: FeatureLabels, unknown: int) -> Section:
    how = "estimated by silhouette" if found.estimate is not None else "given, or those of the source"
    return Section(
        "Summary",
        [
            key_numbers(
                [
                    ("target classes", found.labels.class_number, "", how),
                    ("labeled unknown", 100 * unknown / len(target.features), "%", "by the pseudo labels"),
                    ("threshold", found.threshold, "", "of the normalized entropy, chosen without labels"),
                ]
            ),
            paragraph(found.guard.sentence()),
            paragraph(
                "Pseudo labels compare each sample with the positive prototype of its class and with the prototypes of everything "
                "else; by default the classifier's entropy has its say. The threshold acts on the classifier's entropy alone."
            ),
        ],
    )


def _pictures(target: TargetFeatures, found: FeatureLabels, names: list[str]) -> Section:
    embedding = embedding_plot(target.features, found.labels.hard, names, "Target samples by pseudo label")
    histogram = score_histogram(found.scores, found.threshold, "Target samples by unknown score", "normalized entropy")
    return Section("Pictures", [figure_svg(embedding, "Embedding."), figure_svg(histogram, "Histogram of the unlabeled scores.")])
