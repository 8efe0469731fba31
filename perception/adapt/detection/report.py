"""What an adaptation of a detector found, as numbers for machines and as a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch

from ...viz.html import Block, Section, figure_svg, key_numbers, page, paragraph, table
from ..glc.plots import embedding_plot, score_histogram
from .adaptation import AdaptedProposals
from .open_set import ClassifiedProposals
from .proposal_classifier import ProposalClassifier
from .proposal_metrics import ProposalReport
from .proposals import DetectorProposals


def _named(judged: ClassifiedProposals) -> dict[str, int]:
    counts = torch.bincount(judged.ids, minlength=len(judged.classes) + 1).tolist()
    return dict(zip((*judged.classes, "unknown"), counts, strict=True))


def detector_facts(
    classifier: ProposalClassifier,
    target: DetectorProposals,
    adapted: AdaptedProposals,
    metrics: Mapping[str, ProposalReport],
    detector_ap: Mapping[str, float],
) -> dict[str, object]:
    """Plain values. metrics: by way of judging, empty without labels. detector_ap: of the detector's own labels."""
    judged, model = adapted.judged, adapted.model
    return {
        "source": {"data": classifier.source, "trained_on": dict(zip(classifier.classes, classifier.counts, strict=True))},
        "target": {"data": target.data, "frames": len(target.frame_ids), "proposals": len(target)},
        "class_number": model.class_number,
        "threshold": judged.threshold,
        "labels": _named(judged),
        "background": int((judged.probabilities.argmax(1) == len(judged.classes)).sum()),
        "epochs": [asdict(epoch) for epoch in model.history],
        "detector_ap": dict(detector_ap),
        "metrics": {name: asdict(report) for name, report in metrics.items()},
    }


def detector_page(
    name: str,
    target: DetectorProposals,
    adapted: AdaptedProposals,
    metrics: Mapping[str, ProposalReport],
    detector_ap: Mapping[str, float],
) -> str:
    """The HTML report: key numbers, embedding, histogram with the threshold; metrics only where there are labels."""
    judged = adapted.judged
    counts = _named(judged)
    sections = [
        Section(
            "Summary",
            [
                key_numbers(
                    [
                        ("proposals", len(target), "", f"on {len(target.frame_ids)} frames"),
                        ("called unknown", 100 * counts["unknown"] / max(1, len(judged)), "%", "of all proposals"),
                        ("threshold", judged.threshold, "", "of the unknown score, chosen without labels"),
                    ]
                ),
                paragraph(
                    "Boxes and scores are the detector's; labels are new. Most proposals lie on nothing: each record also holds the "
                    "probability of background."
                ),
                table(("label", "proposals"), list(counts.items()), "New labels."),
            ],
        ),
        Section(
            "Pictures",
            [
                figure_svg(
                    embedding_plot(judged.features, judged.ids, judged.classes, "Target proposals by new label"), "Embedding."
                ),
                figure_svg(
                    score_histogram(
                        judged.unknown_scores, judged.threshold, "Target proposals by unknown score", "unknown score"
                    ),
                    "Histogram.",
                ),
            ],
        ),
    ]
    if metrics:
        sections.append(Section("Against the target's labels", _measured(metrics, detector_ap)))
    subtitle = f"{len(target)} proposals of {target.data}; known classes {', '.join(judged.classes)}"
    return page(f"Adapted detector: {name}", sections, subtitle=subtitle)


def _measured(metrics: Mapping[str, ProposalReport], detector_ap: Mapping[str, float]) -> list[Block]:
    rows = [
        (name, *(_cell(v) for v in (m.os_star, m.unk, m.h, m.auroc, m.fpr95, m.closed_accuracy)), f"{r.threshold:.3f}")
        for name, r in metrics.items()
        for m in (r.matched,)
    ]
    blocks = [
        table(
            ("judged by", "OS*", "UNK", "H", "AUROC", "FPR95", "accuracy without rejection", "threshold"),
            rows,
            "Proposals that lie on a labelled object. The labels were not used above.",
        )
    ]
    best = list(metrics.values())[-1]
    if best.private:
        blocks.append(
            table(
                ("private class", "objects", "proposed", "proposals", "called unknown"),
                [(n, p.objects, p.proposed, p.proposals, _cell(p.unknown)) for n, p in best.private.items()],
                "After adaptation. An object without a proposal cannot be called unknown.",
            )
        )
    blocks.append(
        table(
            ("distance", "known", "private", "OS*", "UNK", "H"),
            [(n, m.known, m.unknown, _cell(m.os_star), _cell(m.unk), _cell(m.h)) for n, m in best.ranges.items()],
            "After adaptation, by distance.",
        )
    )
    names = list(dict.fromkeys([*detector_ap, *best.known_ap]))
    columns = {"detector": detector_ap, **{name: report.known_ap for name, report in metrics.items()}}
    blocks.append(
        table(
            ("AP R40", *columns),
            [(n, *(f"{c[n]:.1f}" if n in c else "" for c in columns.values())) for n in names],
            "Known classes, with the detector's labels and without what is called unknown.",
        )
    )
    return blocks


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
