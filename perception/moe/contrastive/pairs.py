"""Two towers that embed the two halves of a pair, and the data that they learn from: the one interface of diversified multiplet upcycling.

The halves are called image and text, as in CLIP. They may be two views of anything: the features of one region of interest under two
augmentations, or from two detectors. `TwoTowers` joins two encoders, `SharedTower` uses one encoder for both views, and
`hugging_face_clip.py` wraps a `CLIPModel`. For your own model derive from `PairTowers`: three short methods.

Read next: `pair_training.py`, then `dmu.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput
from ....core.tensor_file import content_digest
from ....core.tensor_value import shape_of
from ..layers.moe_ffn import padding_left_out
from .loss import LogitScale


@dataclass(frozen=True, kw_only=True, eq=False)
class PairBatch:
    """Inputs of both towers for B pairs."""

    image: Tensor
    """(B, ...) input of the image tower, or the first view."""
    text: Tensor
    """(B, ...) input of the text tower, or the second view. For token ids (B, L) int64."""
    text_padding: Tensor | None = None
    """(B, L) bool, True for padding of the text; None where there is none."""

    def __post_init__(self) -> None:
        if len(self.image) != len(self.text):
            raise InvalidInput(
                f"a batch of pairs needs one text per image, found {shape_of(self.image)} and {shape_of(self.text)}"
            )
        padding = self.text_padding
        if padding is not None and (padding.dtype != torch.bool or padding.shape != self.text.shape[:2]):
            raise InvalidInput(
                f"text_padding must be bool {tuple(self.text.shape[:2])}, True for padding, found {shape_of(padding)}; an attention mask "
                "is its opposite: pass attention_mask == 0"
            )

    def to(self, device: torch.device) -> PairBatch:
        """Move the batch.

        Args:
            device: Where to.

        Returns:
            The batch there.
        """
        padding = None if self.text_padding is None else self.text_padding.to(device)
        return PairBatch(image=self.image.to(device), text=self.text.to(device), text_padding=padding)


class PairData(Protocol):
    """A data set of pairs. `PairTensors` is one in memory; a folder of pictures needs a class with these four."""

    @property
    def caption(self) -> Tensor:
        """(N,) int64 number of each pair's caption; equal captions have equal numbers, and are no negatives of each other."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> PairBatch:
        """Read some pairs.

        Args:
            rows: (B,) int64 numbers of pairs.

        Returns:
            Their inputs, in this order.
        """
        ...

    def fingerprint(self) -> str:
        """Tell whether the data are the same as in an earlier run.

        Returns:
            A text that changes when the data do.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTensors:
    """Pairs in memory."""

    image: Tensor
    """(N, ...) inputs of the image tower."""
    text: Tensor
    """(N, ...) inputs of the text tower."""
    caption: Tensor
    """(N,) int64 number of each caption."""
    text_padding: Tensor | None = None
    """(N, L) bool, True for padding. Columns that are padding in a whole batch are cut off."""

    def __post_init__(self) -> None:
        sizes = {len(self.image), len(self.text), len(self.caption)}
        if len(sizes) > 1 or self.caption.ndim != 1 or self.caption.dtype != torch.int64:
            raise InvalidInput(
                f"pairs need as many images, texts and captions, and captions (N,) int64, found {shape_of(self.image)}, "
                f"{shape_of(self.text)} and {shape_of(self.caption)}"
            )

    def __len__(self) -> int:
        return len(self.caption)

    def batch(self, rows: Tensor) -> PairBatch:
        """Take some pairs.

        Args:
            rows: (B,) int64 numbers of pairs.

        Returns:
            Their inputs.
        """
        text, padding = self.text[rows], None
        if self.text_padding is not None:
            padding = self.text_padding[rows]
            used = (~padding).any(0).nonzero()[:, 0]
            longest = int(used[-1]) + 1 if len(used) else padding.shape[1]
            text, padding = text[:, :longest], padding[:, :longest]
        return PairBatch(image=self.image[rows], text=text, text_padding=padding)

    def fingerprint(self) -> str:
        """Hash all tensors.

        Returns:
            SHA-256 in hexadecimal.
        """
        tensors = {"image": self.image, "text": self.text, "caption": self.caption}
        return content_digest(tensors if self.text_padding is None else {**tensors, "text_padding": self.text_padding})


class PairTowers(nn.Module, ABC):
    """A model that embeds images and texts in one space. After upcycling it is the same class, with mixtures inside."""

    @abstractmethod
    def embed_image(self, batch: PairBatch) -> Tensor:
        """Embed the images.

        Args:
            batch: B pairs.

        Returns:
            (B, D) embeddings; they need not be normalized.
        """

    @abstractmethod
    def embed_text(self, batch: PairBatch) -> Tensor:
        """Embed the texts. Leave padding out of mixtures with `padding_left_out`.

        Args:
            batch: B pairs.

        Returns:
            (B, D) embeddings.
        """

    @abstractmethod
    def scale(self) -> Tensor:
        """Give the factor of the cosine similarities, 1 / temperature.

        Returns:
            Scalar tensor.
        """

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Embed both halves.

        Args:
            batch: B pairs.

        Returns:
            (B, D) image embeddings and (B, D) text embeddings.
        """
        return self.embed_image(batch), self.embed_text(batch)


class TwoTowers(PairTowers):
    """Two encoders, each with an optional projection into the common space.

    Example:
        towers = TwoTowers(vision, language, nn.Linear(384, 256, bias=False), nn.Linear(384, 256, bias=False))
        image, text = towers(PairBatch(image=pictures, text=ids, text_padding=ids == 0))
    """

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        image_projection: nn.Module | None = None,
        text_projection: nn.Module | None = None,
        *,
        logit_scale: LogitScale | None = None,
    ) -> None:
        """Join two encoders.

        Args:
            image: Maps `PairBatch.image` to (B, D).
            text: Maps `PairBatch.text` to (B, E). With padding it is called with the mask as second argument.
            image_projection: Maps (B, D) to the common width.
            text_projection: Maps (B, E) to the common width.
            logit_scale: Temperature; None fixes it at CLIP's end value, 100.
        """
        super().__init__()
        self.image, self.text = image, text
        self.image_projection = nn.Identity() if image_projection is None else image_projection
        self.text_projection = nn.Identity() if text_projection is None else text_projection
        self.logit_scale = LogitScale() if logit_scale is None else logit_scale

    def embed_image(self, batch: PairBatch) -> Tensor:
        """Embed the images.

        Args:
            batch: B pairs.

        Returns:
            (B, D) embeddings.
        """
        out: Tensor = self.image_projection(self.image(batch.image))
        return out

    def embed_text(self, batch: PairBatch) -> Tensor:
        """Embed the texts; padding is neither routed nor counted nor balanced.

        Args:
            batch: B pairs.

        Returns:
            (B, D) embeddings.
        """
        with ExitStack() as stack:
            given = [batch.text]
            if batch.text_padding is not None:
                stack.enter_context(padding_left_out(self.text, batch.text_padding))
                given.append(batch.text_padding)
            out: Tensor = self.text_projection(self.text(*given))
        return out

    def scale(self) -> Tensor:
        """Give the factor of the cosine similarities.

        Returns:
            Scalar tensor.
        """
        out: Tensor = self.logit_scale()
        return out


class SharedTower(PairTowers):
    """One encoder for both views, such as a detector's region head on the features of one object under two augmentations.

    Example:
        towers = SharedTower(head, nn.Linear(256, 128, bias=False), logit_scale=LogitScale(20.0))
        pairs = PairTensors(image=first_view, text=second_view, caption=object_number)
    """

    def __init__(self, tower: nn.Module, projection: nn.Module | None = None, *, logit_scale: LogitScale | None = None) -> None:
        """Use one encoder twice.

        Args:
            tower: Maps either view to embeddings; dimensions after the first are flattened.
            projection: Maps them to the width of the loss.
            logit_scale: Temperature; None fixes the factor at 100.
        """
        super().__init__()
        self.tower = tower
        self.projection = nn.Identity() if projection is None else projection
        self.logit_scale = LogitScale() if logit_scale is None else logit_scale

    def embed_image(self, batch: PairBatch) -> Tensor:
        """Embed the first view.

        Args:
            batch: B pairs.

        Returns:
            (B, D) embeddings.
        """
        return self._embed(batch.image)

    def embed_text(self, batch: PairBatch) -> Tensor:
        """Embed the second view.

        Args:
            batch: B pairs.

        Returns:
            (B, D) embeddings.
        """
        return self._embed(batch.text)

    def scale(self) -> Tensor:
        """Give the factor of the cosine similarities.

        Returns:
            Scalar tensor.
        """
        out: Tensor = self.logit_scale()
        return out

    def _embed(self, view: Tensor) -> Tensor:
        out: Tensor = self.projection(self.tower(view).flatten(1))
        return out
