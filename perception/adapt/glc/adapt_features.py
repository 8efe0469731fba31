"""The entry for features from a file: read, label, and write numbers and a page.

Read next: `feature_file.py`, `feature_labels.py` and `feature_report.py`, the three steps.
"""

from __future__ import annotations

import json
from pathlib import Path

from ....core.files import write_atomically
from ...viz.html import write_html
from .feature_file import TargetFeatures, read_target_features
from .feature_labels import FeatureLabelConfig, FeatureLabels, label_features, write_feature_labels
from .feature_report import feature_page, feature_result


def adapt_features(
    target: str | Path | TargetFeatures,
    out: str | Path | None = None,
    config: FeatureLabelConfig | None = None,
    *,
    name: str | None = None,
) -> FeatureLabels:
    """Label features of an unlabeled target domain by GLC, and choose a threshold for unknown samples. Nothing is trained.

    Args:
        target: An npz file (its arrays are listed in `feature_file.py`), or the features themselves.
        out: Folder for NAME.npz (labels and scores), NAME.json (numbers) and NAME.html (a page), or None to write nothing.
        config: Settings, or None for the defaults; `FeatureLabelConfig.paper()` gives those of the GLC paper.
        name: Name of the results. None: the name of the file, or "features".

    Returns:
        Pseudo labels, unknown scores and threshold.

    Raises:
        InvalidInput: The file or the features are refused. Nothing is written then.

    Example:
        found = adapt_features("night.npz", out="labeled")
        unknown = found.labels.hard == found.labels.soft.shape[1]
    """
    if name is None:
        name = "features" if isinstance(target, TargetFeatures) else Path(target).stem
    if not isinstance(target, TargetFeatures):
        target = read_target_features(target)
    found = label_features(target, config or FeatureLabelConfig())
    if out is not None:
        folder = Path(out)
        write_feature_labels(folder / f"{name}.npz", found)
        numbers = json.dumps(feature_result(target, found), indent=1) + "\n"
        write_atomically(folder / f"{name}.json", numbers.encode())
        write_html(folder / f"{name}.html", feature_page(name, target, found))
    return found
