"""Proposals in one safetensors file: features in float16, everything else as it is, with a SHA-256 of the content.

Read next: `proposal_cache.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ....core.tensor_file import CorruptFile, TensorFileKind, read_tensors, write_tensors
from .proposals import DetectorProposals, ProposalSelection

_KIND = TensorFileKind(
    name="file of proposals",
    format="upcycle3d proposals 2",
    advice="collect the proposals again",
    earlier=("upcycle3d proposals 1",),
)
_FEATURE_LIMIT = 65504.0  # the largest float16


def with_rounded_features(proposals: DetectorProposals) -> DetectorProposals:
    """Give proposals as they come back from a file.

    Args:
        proposals: The proposals.

    Returns:
        The same with features rounded to float16 and clipped to its range.
    """
    rounded = proposals.features.clamp(-_FEATURE_LIMIT, _FEATURE_LIMIT).half().float()
    return replace(proposals, features=rounded)


def save_proposals(path: str | Path, proposals: DetectorProposals) -> None:
    """Write one file, atomically. Features are rounded to float16 (`with_rounded_features`).

    Args:
        path: The file.
        proposals: What to write.
    """
    tensors = {f.name: t for f in fields(proposals) if isinstance(t := getattr(proposals, f.name), Tensor)}
    tensors |= {"features": with_rounded_features(proposals).features.half()}
    write_tensors(path, tensors, {"proposals": json.dumps(_plain_fields(proposals))}, _KIND)


def _plain_fields(proposals: DetectorProposals) -> dict[str, Any]:
    names = ("frame_ids", "class_names", "detector", "data")
    return {name: getattr(proposals, name) for name in names} | {"selection": asdict(proposals.selection)}


def load_proposals(path: str | Path) -> DetectorProposals:
    """Read and check a file of `save_proposals`.

    Args:
        path: The file.

    Returns:
        The proposals.

    Raises:
        InvalidInput: The file is missing, of another kind or larger than 16 GiB. The message names the file.
        CorruptFile: The file is damaged, or its content is no valid `DetectorProposals`.
    """
    file = read_tensors(path, _KIND)
    tensors, plain = file.tensors, file.described("proposals")
    try:
        return DetectorProposals(
            features=tensors["features"].float(),
            **{name: tensors[name] for name in ("logits", "boxes", "classes", "scores", "frame")},
            points=tensors.get("points"),
            frame_ids=tuple(plain["frame_ids"]),
            class_names=tuple(plain["class_names"]),
            detector=plain["detector"],
            data=plain["data"],
            selection=ProposalSelection(**plain["selection"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is damaged: {error}; {_KIND.advice}") from error
