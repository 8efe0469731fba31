"""Weights of OpenPCDet by name: its four parts are our four parts under other names, index by index."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..structures import InvalidInput

# OpenPCDet's part -> ours. Below the part every name is the same.
PARTS = {
    "backbone_3d": "encoder.sparse_backbone",
    "backbone_2d": "decoder.bev_backbone",
    "dense_head": "decoder.anchor_head",
    "roi_head": "decoder.roi_head",
}
_NOT_WEIGHTS = ("global_step",)


def to_our_name(name: str) -> str:
    """Our state-dict name of an OpenPCDet one. Raises InvalidInput for a part we do not have."""
    part, _, rest = name.partition(".")
    if part not in PARTS:
        raise InvalidInput(f"no place for the OpenPCDet weight {name!r}; its part must be one of {sorted(PARTS)}")
    return f"{PARTS[part]}.{rest}"


def load_openpcdet(detector: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load an OpenPCDet state dict completely. Raises InvalidInput listing every missing, left-over or misshapen name."""
    ours = detector.state_dict()
    given = {to_our_name(name): value for name, value in state.items() if name not in _NOT_WEIGHTS}
    problems = [f"missing {n}" for n in ours.keys() - given.keys()] + [f"left over {n}" for n in given.keys() - ours.keys()]
    problems += [
        f"{n}: expected {tuple(ours[n].shape)}, found {tuple(given[n].shape)}"
        for n in ours.keys() & given.keys()
        if ours[n].shape != given[n].shape
    ]
    if problems:
        raise InvalidInput(
            f"the OpenPCDet weights do not fit this detector ({len(problems)} names): " + "; ".join(sorted(problems)[:20])
        )
    detector.load_state_dict(given)
