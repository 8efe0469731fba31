"""A proposal classifier in one safetensors file, trained where the file does not exist yet.

Read next: `adaptation.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn

from ....core.config_json import first_difference
from ....core.errors import InvalidInput
from ....core.tensor_file import CorruptFile, TensorFileKind, fill_module, read_tensors, write_tensors
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


def save_classifier(path: str | Path, classifier: ProposalClassifier) -> None:
    """Write a classifier, atomically.

    Args:
        path: The file.
        classifier: What to write.
    """
    plain = {name: getattr(classifier, name) for name in ("classes", "detector", "source", "counts")}
    both = nn.ModuleDict({"bottleneck": classifier.bottleneck, "head": classifier.head})
    write_tensors(path, both.state_dict(), {"classifier": json.dumps(plain | {"config": asdict(classifier.config)})}, _KIND)


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
    file = read_tensors(path, _KIND)
    plain, (mean,) = file.described("classifier"), file.named("bottleneck.0.mean")
    try:
        config, classes = ClassifierConfig(**plain["config"]), tuple(plain["classes"])
        bottleneck, head = new_modules(len(mean), config.width, len(classes))
        detector, source, counts = plain["detector"], plain["source"], tuple(plain["counts"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is damaged: {error}; {_KIND.advice}") from error
    both = nn.ModuleDict({"bottleneck": bottleneck, "head": head})
    fill_module(both, file.tensors, path)
    both.eval().requires_grad_(False)
    return ProposalClassifier(
        bottleneck=bottleneck, head=head, classes=classes, config=config, detector=detector, source=source, counts=counts
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
