"""A proposal classifier in one safetensors file, trained where the file does not exist yet.

Read next: `adaptation.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import nn

from ....core.config_json import config_from_json, config_to_json, first_difference
from ....core.errors import InvalidInput
from ....core.tensor_file import TensorFile, TensorFileKind, load_module, write_tensors
from .classifier_training import train_proposal_classifier
from .proposal_classifier import ClassifierConfig, ProposalClassifier, new_modules
from .proposal_matching import Matches
from .proposals import DetectorProposals

_KIND = TensorFileKind(
    name="proposal classifier",
    format="upcycle3d proposal classifier 2",
    earlier=("upcycle3d proposal classifier 1",),
    advice="give the classifier.safetensors that an adaptation wrote",
)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What the metadata holds: the fields of a classifier that are no tensors."""

    classes: tuple[str, ...]
    detector: str
    source: str
    counts: tuple[int, ...]
    config: ClassifierConfig


def save_classifier(path: str | Path, classifier: ProposalClassifier) -> None:
    """Write a classifier, atomically.

    Args:
        path: The file.
        classifier: What to write.
    """
    stored = _Stored(**{field.name: getattr(classifier, field.name) for field in fields(_Stored)})
    both = nn.ModuleDict({"bottleneck": classifier.bottleneck, "head": classifier.head})
    write_tensors(path, both.state_dict(), {"classifier": json.dumps(config_to_json(stored))}, _KIND)


def load_classifier(path: str | Path) -> ProposalClassifier:
    """Read a file of `save_classifier`.

    Args:
        path: The file.

    Returns:
        The classifier.

    Raises:
        InvalidInput: There is no such file, or it is of another kind.
        CorruptFile: The file is damaged.
    """
    both, file = load_module(path, _KIND, _builder)
    both.requires_grad_(False)
    stored = _stored(file)
    return ProposalClassifier(
        bottleneck=both["bottleneck"],
        head=both["head"],
        classes=stored.classes,
        config=stored.config,
        detector=stored.detector,
        source=stored.source,
        counts=stored.counts,
    )


def _stored(file: TensorFile) -> _Stored:
    return config_from_json(_Stored, file.described("classifier"))


def _builder(file: TensorFile) -> Callable[[], nn.ModuleDict]:
    stored, (mean,) = _stored(file), file.named("bottleneck.0.mean")
    return lambda: nn.ModuleDict(
        dict(zip(("bottleneck", "head"), new_modules(len(mean), stored.config.width, len(stored.classes)), strict=True))
    )


def cached_classifier(
    path: str | Path, proposals: DetectorProposals, matches: Callable[[], Matches], config: ClassifierConfig
) -> ProposalClassifier:
    """Give the classifier in a file, or train it and write the file.

    Args:
        path: The file.
        proposals: Proposals on source frames.
        matches: Called only where the classifier must be trained: what the proposals lie on.
        config: Settings.

    Returns:
        The classifier.

    Raises:
        InvalidInput: The file holds a classifier of another detector, source or configuration.
    """
    path = Path(path)
    if not path.exists():
        save_classifier(path, train_proposal_classifier(proposals, matches().ids, config))
        return load_classifier(path)
    found = load_classifier(path)
    stored = {"detector": found.detector, "source": found.source, "options": asdict(found.config)}
    wanted = {"detector": proposals.detector, "source": proposals.data, "options": asdict(config)}
    difference = first_difference(stored, wanted)
    if difference is not None:
        what = next(name for name in wanted if stored[name] != wanted[name])
        raise InvalidInput(f"{path} was trained with other {what} ({difference}); choose another folder")
    return found
