"""The contrastive loss of image and text features (CLIP, Radford et al., 2021) with a mask for captions that say the same.

In a batch from one cluster many captions are equal. Such a pair is neither the positive nor a negative: it is left out.
Everything is computed in float32, under autocast too, because logits of up to 100 lose their small differences in bfloat16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of

CLIP_SCALE = 100.0
"""The scale that CLIP's temperature ends at and does not exceed."""


class LogitScale(nn.Module):
    """The factor of the cosine similarities, 1 / temperature: a fixed number or a learned one with an upper limit.

    A learned scale is stored as its logarithm. Beyond the limit the gradient still passes, so that it can come back.
    """

    log_scale: Tensor

    def __init__(self, scale: float = CLIP_SCALE, *, learned: bool = False, most: float = CLIP_SCALE) -> None:
        """Begin with a scale.

        Args:
            scale: First value, above 0. CLIP begins with 1 / 0.07 and fine-tuning with 100.
            learned: Whether training changes it; CLIP-MoE keeps 100.
            most: Upper limit.

        Raises:
            InvalidInput: `scale` is not above 0 or above `most`.
        """
        super().__init__()
        require(0.0 < scale <= most, f"the scale must be above 0 and at most {most}, found {scale}")
        self.most = most
        value = torch.tensor(math.log(scale))
        if learned:
            self.log_scale = nn.Parameter(value)
        else:
            self.register_buffer("log_scale", value)

    def forward(self) -> Tensor:
        """Give the scale.

        Returns:
            Scalar tensor, at most the limit.
        """
        log_scale = self.log_scale
        limited = log_scale.clamp(max=math.log(self.most))
        return (log_scale + (limited - log_scale).detach()).exp()


def equal_captions(caption: Tensor) -> Tensor:
    """Find pairs of samples whose captions are equal, without each sample's own pair.

    Args:
        caption: (B,) int64 number of each sample's caption; equal captions have equal numbers.

    Returns:
        (B, B) bool, False on the diagonal.

    Raises:
        InvalidInput: `caption` has another shape.
    """
    require(caption.ndim == 1, f"captions must be (B,) numbers, found {shape_of(caption)}")
    same = caption[:, None] == caption
    return same.fill_diagonal_(False)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float = CLIP_SCALE,
    *,
    ignore: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the symmetric contrastive loss: the mean cross-entropy of image to text and of text to image.

    Args:
        image: (B, D) features; they are normalized here.
        text: (B, D) features of the captions in the same order.
        scale: Factor of the cosine similarities, 1 / temperature.
        ignore: (B, B) bool, image by text, True for pairs that are neither positive nor negative, such as `equal_captions`. The
            diagonal counts as False.
        label_smoothing: Share of the target that is spread over all pairs of a row that are not ignored; CLIP-MoE uses 0.1.

    Returns:
        Scalar, float32 (float64 for float64 features). A batch of no samples gives 0 with zero gradients.

    Raises:
        InvalidInput: A shape does not fit, or the smoothing is not in 0..1.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise InvalidInput(f"image and text features must both be (B, D), found {shape_of(image)} and {shape_of(text)}")
    require(0.0 <= label_smoothing < 1.0, f"label_smoothing must be from 0 to below 1, found {label_smoothing}")
    kind = torch.promote_types(image.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        image, text = F.normalize(image.to(kind), dim=1), F.normalize(text.to(kind), dim=1)
        logits = scale * (image @ text.T)
        if not len(logits):
            return logits.sum()
        if ignore is None:
            kept = None
        else:
            if ignore.shape != logits.shape or ignore.dtype != torch.bool:
                raise InvalidInput(f"ignore must be {tuple(logits.shape)} bool, image by text, found {shape_of(ignore)}")
            kept = ~ignore | torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        rows = _cross_entropy(logits, kept, label_smoothing)
        columns = _cross_entropy(logits.T, None if kept is None else kept.T, label_smoothing)
        return (rows + columns) / 2


def _cross_entropy(logits: Tensor, kept: Tensor | None, smoothing: float) -> Tensor:
    """Mean over the rows, whose targets are on the diagonal. The smoothing's share of a row goes to its kept pairs alone."""
    if kept is None:
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), label_smoothing=smoothing)
    log_share = logits.masked_fill(~kept, -torch.inf).log_softmax(1)
    loss = -log_share.diagonal()
    if smoothing:
        spread = -log_share.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)
        loss = (1 - smoothing) * loss + smoothing * spread
    return loss.mean()
