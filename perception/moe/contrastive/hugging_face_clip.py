"""A Hugging Face CLIP as two towers: load a local folder, upcycle it, and store it in one file that has everything.

transformers is imported inside the functions, and nothing is downloaded. `ClipTowers` itself needs only a model with CLIP's parts.
Read next: `dmu.py`, `checkpoint.py`, `image_captions.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput
from ....core.foreign_text import shown
from ..checkpoints.checkpoint import BaseModel, MixtureDescription, load_mixture, save_mixture
from ..checkpoints.transformers_package import load_whole, stored_config, transformers_package, without_progress_bars
from ..layers.moe_ffn import padding_left_out
from ..upcycling.upcyclers import Upcycled
from .image_captions import ImageCaptions, PictureForm, image_captions, read_caption_file
from .pairs import PairBatch, PairTowers

_PARTS = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")


class ClipTowers(PairTowers):
    """Wraps a `CLIPModel`. The model stays what it was: `towers.clip` is a `CLIPModel`, with mixtures inside after upcycling.

    Example:
        towers = ClipTowers(CLIPModel.from_pretrained("clip-vit-base-patch16"))
        image, text = towers(PairBatch(image=pixel_values, text=input_ids, text_padding=attention_mask == 0))
    """

    def __init__(self, clip: nn.Module) -> None:
        """Wrap a model.

        Args:
            clip: `transformers.CLIPModel`, or a model with the same parts.

        Raises:
            InvalidInput: It has other parts.
        """
        super().__init__()
        missing = [name for name in _PARTS if not hasattr(clip, name)]
        if missing:
            raise InvalidInput(
                f"a {type(clip).__name__} is no CLIP: it has no {', '.join(missing)}; load CLIPModel, not one of its towers alone"
            )
        self.clip: Any = clip

    def embed_image(self, batch: PairBatch) -> Tensor:
        """Embed the images.

        Args:
            batch: `image` holds pixel values (B, 3, H, W).

        Returns:
            (B, D) embeddings.
        """
        out: Tensor = self.clip.visual_projection(self.clip.vision_model(pixel_values=batch.image).pooler_output)
        return out

    def embed_text(self, batch: PairBatch) -> Tensor:
        """Embed the captions; padding is left out of the mixtures.

        Args:
            batch: `text` holds input ids (B, L).

        Returns:
            (B, D) embeddings.
        """
        padding = torch.zeros_like(batch.text, dtype=torch.bool) if batch.text_padding is None else batch.text_padding
        with padding_left_out(self.clip.text_model, padding):
            pooled = self.clip.text_model(input_ids=batch.text, attention_mask=(~padding).long()).pooler_output
        out: Tensor = self.clip.text_projection(pooled)
        return out

    def scale(self) -> Tensor:
        """Give the model's own factor, 100 at most, as CLIP was trained.

        Returns:
            Scalar tensor.
        """
        out: Tensor = self.clip.logit_scale.exp().clamp(max=100.0)
        return out


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedClip:
    """A CLIP and how its inputs are made."""

    towers: ClipTowers
    """The model."""
    tokenize: Callable[[list[str]], tuple[Tensor, Tensor]]
    """Makes ids (N, L) and padding (N, L) of captions."""
    form: PictureForm
    """How pictures are read."""

    def pairs(self, path: str | Path, folder: str | Path | None = None) -> ImageCaptions:
        """Read pictures and captions for this model.

        Args:
            path: CSV file with the columns `image` and `caption`.
            folder: Folder of the pictures; None for the file's own.

        Returns:
            The pairs.

        Raises:
            InvalidInput: As for `read_caption_file`.
        """
        pictures, captions = read_caption_file(path, folder)
        return image_captions(pictures, captions, self.form, self.tokenize)


def load_clip(folder: str | Path) -> LoadedClip:
    """Load a CLIP from a local folder, as `save_pretrained` or a download wrote it.

    Args:
        folder: Folder with `config.json`, the weights and the tokenizer.

    Returns:
        The model in float32 with its tokenizer and the form of its pictures.

    Raises:
        InvalidInput: transformers is not installed, or the folder holds no CLIP.
    """
    library = transformers_package()
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"{folder} is no folder of a Hugging Face model: it has no config.json; download the model first and give its folder"
        )
    clip = load_whole(library.CLIPModel, folder)
    return LoadedClip(towers=ClipTowers(clip), tokenize=_tokenizer(library, folder, clip), form=_picture_form(folder, clip))


def save_clip_mixture(path: str | Path, made: Upcycled, *, note: str = "") -> MixtureDescription:
    """Write an upcycled CLIP as one file, with the configuration that builds its dense model.

    Args:
        path: The file.
        made: The mixture of a `ClipTowers`.
        note: How it was trained and evaluated.

    Returns:
        What the file says.

    Raises:
        InvalidInput: The model is no `ClipTowers`, or it holds NaN.
    """
    towers = made.model
    if not isinstance(towers, ClipTowers) or made.plan is None:
        raise InvalidInput(f"only mixtures of a ClipTowers are written here, found a {type(towers).__name__}; use save_mixture")
    config = getattr(towers.clip, "config", None)
    base = None
    if config is not None:
        base = BaseModel(
            library="transformers", model_class=type(towers.clip).__name__, config=config.to_json_string(use_diff=False)
        )
    return save_mixture(path, towers, made.plan, base=base, note=note)


def load_clip_mixture(path: str | Path) -> ClipTowers:
    """Load what `save_clip_mixture` wrote; the folder of the dense model is not needed.

    Args:
        path: The file.

    Returns:
        The model in evaluation mode; its `clip` is a `CLIPModel` with mixtures.

    Raises:
        InvalidInput: transformers is not installed, or the file is another one or damaged.
    """
    library = transformers_package()

    def dense(description: MixtureDescription) -> nn.Module:
        base = description.base
        if base is None or base.library != "transformers" or base.model_class != "CLIPModel":
            raise InvalidInput(f"{path} holds no CLIPModel of transformers; load it with load_mixture and its dense model")
        return ClipTowers(library.CLIPModel(stored_config(library.CLIPConfig, base.config)))

    model = load_mixture(path, dense).model
    assert isinstance(model, ClipTowers)
    return model


def _tokenizer(library: Any, folder: Path, clip: Any) -> Callable[[list[str]], tuple[Tensor, Tensor]]:
    try:
        with without_progress_bars():
            tokenizer = library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise InvalidInput(f"cannot load the tokenizer in {folder}: {type(error).__name__}: {shown(error)}") from error
    longest = int(clip.config.text_config.max_position_embeddings)

    def tokenize(captions: list[str]) -> tuple[Tensor, Tensor]:
        out = tokenizer(captions, padding=True, truncation=True, max_length=longest, return_tensors="pt", padding_side="right")
        return out["input_ids"], out["attention_mask"] == 0

    return tokenize


def _picture_form(folder: Path, clip: Any) -> PictureForm:
    pixels = int(clip.config.vision_config.image_size)
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return PictureForm(pixels=pixels)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (tuple(float(v) for v in stored[name]) for name in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or not all(v > 0 for v in std):
            raise ValueError("image_mean and image_std need three numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"cannot use {path}: {shown(error)}; copy it again from its source") from error
    return PictureForm(pixels=pixels, mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))
