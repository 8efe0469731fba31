"""How decisions hang together: along a text, which is what a cache of experts lives on, and from layer to layer.

A runtime loads less where the tokens of a text keep their expert (`kept_share`). Routers of layers that say almost the same about a token
(`mutual_information` near the entropy) could be one router: that is why Read-ME decides once for all layers.

Read next: `distillation.py`, which measures whether decisions are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require_counts
from ....core.tensor_value import shape_of


def kept_share(chosen: Tensor) -> float:
    """Compute the share of tokens that keep the expert of the token before them.

    Args:
        chosen: (..., L) int64 expert of each token of some texts.

    Returns:
        The share over all tokens but the first of each text; NaN where no text has two tokens.

    Example:
        kept_share(torch.tensor([[0, 0, 1, 1, 1]]))  # 0.75
    """
    if chosen.ndim < 1 or chosen.is_floating_point():
        raise InvalidInput(f"decisions must be integers (..., L), found {shape_of(chosen)}")
    return float((chosen[..., 1:] == chosen[..., :-1]).double().mean())


def mutual_information(first: Tensor, second: Tensor, experts: int) -> float:
    """Compute how much two decisions about the same tokens say about each other.

    Args:
        first: (...) int64 expert of each token, as one router decides.
        second: (...) int64 expert of each token, as another router decides.
        experts: Number of experts, N.

    Returns:
        The mutual information of the observed decisions in nats, from 0 to log N. That of a decision with itself is its entropy. NaN
        without tokens. Of T tokens it is too large by about (N - 1)^2 / 2T.

    Raises:
        InvalidInput: The decisions have different shapes, or a decision is for no expert.
    """
    require_counts("mutual_information", experts=experts)
    if first.shape != second.shape or first.is_floating_point() or second.is_floating_point():
        raise InvalidInput(f"two decisions must be integers of one shape, found {shape_of(first)} and {shape_of(second)}")
    if not first.numel():
        return float("nan")
    least, most = (int(f(torch.stack([first, second]))) for f in (torch.min, torch.max))
    if least < 0 or most >= experts:
        raise InvalidInput(f"decisions lie in {least}..{most}, and there are {experts} experts")
    counts = torch.bincount((first * experts + second).flatten(), minlength=experts**2).double().view(experts, experts)
    share = counts / counts.sum()
    alone = share.sum(1, keepdim=True) * share.sum(0, keepdim=True)
    seen = share > 0
    return max(0.0, float((share[seen] * (share[seen] / alone[seen]).log()).sum()))
