"""A folder of pictures with captions in a CSV file as pairs to learn from. Pictures are read when a batch needs them.

The file has the columns `image` and `caption`; an image is a path relative to the folder of pictures. Read next: `pairs.py`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.files import check_input_file
from ....core.foreign_text import shown
from .pairs import PairBatch

_MOST_BYTES = 1 << 30
_READERS = 4
_LONGEST = 16  # times the shorter edge: what is farther from the middle is cut off anyway


@dataclass(frozen=True, kw_only=True)
class PictureForm:
    """How a picture becomes the input of a vision model: shorter edge to `pixels`, the middle, and normalized colors."""

    pixels: int
    """Edge of the square."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue; the default is CLIP's."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue."""

    def read(self, path: Path) -> Tensor:
        """Read one picture.

        Args:
            path: File of any format that Pillow reads.

        Returns:
            (3, pixels, pixels) float32.

        Raises:
            InvalidInput: It is no picture that can be read.
        """
        from PIL import Image

        check_input_file(path, "picture", most=_MOST_BYTES)
        try:
            with Image.open(path) as opened:
                picture = _eight_bits(opened).convert("RGB")
        except Exception as error:  # readers of damaged files raise anything
            raise InvalidInput(
                f"cannot read the picture {shown(path)}: {shown(error)}; remove its line or replace the file"
            ) from error
        short = min(picture.size)
        if max(picture.size) > _LONGEST * short:  # resized first, a strip of one row would fill the memory
            margins = [max(0, edge - _LONGEST * short) // 2 for edge in picture.size]
            picture = picture.crop((margins[0], margins[1], picture.width - margins[0], picture.height - margins[1]))
        width, height = (max(self.pixels, round(edge * self.pixels / short)) for edge in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.pixels) // 2, (height - self.pixels) // 2
        picture = picture.crop((left, top, left + self.pixels, top + self.pixels))
        values = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
        return ((values - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)).contiguous()


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageCaptions:
    """Pictures on disk and captions as token ids."""

    pictures: tuple[Path, ...]
    """One file per pair."""
    form: PictureForm
    """How they are read."""
    ids: Tensor
    """(N, L) int64 token ids."""
    padding: Tensor
    """(N, L) bool, True for padding, which stands at the end."""
    caption: Tensor
    """(N,) int64 number of each caption; equal texts have equal numbers."""
    texts: str
    """SHA-256 of the captions."""

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, rows: Tensor) -> PairBatch:
        """Read some pairs.

        Args:
            rows: (B,) int64 numbers of pairs.

        Returns:
            Pictures and ids.

        Raises:
            InvalidInput: A picture cannot be read.
        """
        paths = [self.pictures[row] for row in rows.tolist()]
        with ThreadPoolExecutor(_READERS) as readers:
            pictures = list(readers.map(self.form.read, paths))
        padding = self.padding[rows]
        longest = int((~padding).sum(1).max()) if len(rows) else padding.shape[1]
        return PairBatch(image=torch.stack(pictures), text=self.ids[rows, :longest], text_padding=padding[:, :longest])

    def fingerprint(self) -> str:
        """Hash the bytes of the pictures and the captions: a job must not go on with stages that learned from other pictures.

        Returns:
            SHA-256 in hexadecimal.
        """
        digest = hashlib.sha256(f"{self.form} {self.texts}".encode())
        for path in self.pictures:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _eight_bits(picture: Any) -> Any:
    """A gray picture of 16 bits with values of 8 bits: Pillow's own conversion makes everything above 255 white."""
    if picture.mode == "F":
        raise ValueError("it holds floating-point numbers, whose white is unknown; store it with whole numbers")
    if not picture.mode.startswith("I"):
        return picture
    from PIL import Image

    values = np.asarray(picture).astype(np.int64)
    return Image.fromarray((values.clip(0, 65_535) >> 8).astype(np.uint8))


def read_caption_file(path: str | Path, folder: str | Path | None = None) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Read a CSV file of pictures and captions, and check that every picture exists.

    Args:
        path: CSV file with a header that has `image` and `caption`.
        folder: Folder of the pictures; None for the file's own.

    Returns:
        Pictures and captions, in the order of the file.

    Raises:
        InvalidInput: The file cannot be read, a column is missing, a caption is empty, or a picture does not exist.
    """
    path = Path(path)
    base = path.parent if folder is None else Path(folder)
    check_input_file(path, "caption file", most=_MOST_BYTES)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the caption file {shown(path)}: {shown(error)}; write it as UTF-8 text") from error
    reader = csv.DictReader(io.StringIO(text))
    if not {"image", "caption"} <= set(reader.fieldnames or ()):
        raise InvalidInput(
            f"{shown(path)} must begin with a line that names the columns image,caption, found {reader.fieldnames}"
        )
    pictures: list[Path] = []
    captions: list[str] = []
    for number, row in enumerate(_rows(reader, path), 2):
        name, caption = row["image"], " ".join((row["caption"] or "").split())
        require(
            bool(name) and bool(caption), f"line {number} of {shown(path)} has no image or no caption; complete it or remove it"
        )
        pictures.append(base / name)
        captions.append(caption)
    missing = [picture for picture in pictures if not os.path.isfile(picture)]  # unlike `is_file`, it takes names of any length
    if missing:
        raise InvalidInput(
            f"{len(missing)} of {len(pictures)} pictures in {shown(path)} do not exist, first {shown(missing[0])}; "
            "give their folder, or correct the file"
        )
    require(bool(pictures), f"{shown(path)} has no line with a picture")
    return tuple(pictures), tuple(captions)


def _rows(reader: csv.DictReader[str], path: Path) -> Iterator[dict[str | Any, str | Any]]:
    """The lines of a CSV file."""
    try:
        yield from reader
    except csv.Error as error:
        raise InvalidInput(
            f"cannot read {shown(path)} near line {reader.line_num}: {shown(error)}; is a quotation mark left open there?"
        ) from error


def image_captions(
    pictures: Sequence[Path], captions: Sequence[str], form: PictureForm, tokenize: Callable[[list[str]], tuple[Tensor, Tensor]]
) -> ImageCaptions:
    """Make pairs of pictures and captions.

    Args:
        pictures: One file per pair.
        captions: One text per pair.
        form: How pictures are read.
        tokenize: Gives ids (N, L) and padding (N, L), which stands at the end.

    Returns:
        The pairs.
    """
    ids, padding = tokenize(list(captions))
    numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    return ImageCaptions(
        pictures=tuple(pictures),
        form=form,
        ids=ids,
        padding=padding,
        caption=torch.tensor([numbers[text] for text in captions]),
        texts=hashlib.sha256("\n".join(captions).encode()).hexdigest(),
    )
