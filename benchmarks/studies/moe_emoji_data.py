"""Pictures of emoji in three drawing styles with their names: 10.7 thousand real image-text pairs with exact minimal pairs.

Two styles (Noto, Twemoji) are for training and for the first test, the third (Fluent flat) is never trained on. The split goes by the
stem of the name: "woman astronaut: dark skin tone" and "astronaut" have the stem "astronaut" and lie on the same side, else a test
caption would differ from a training caption in one word only. The outputs of the encoders' frozen blocks are computed once and stored.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from moe_assets import fetch, members, read_member
from moe_towers import FROZEN, PIXELS, Dino, MiniLm, dino_weights, minilm_weights, word_piece
from PIL import Image
from torch import Tensor

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.tensor_file import TensorFileKind, read_tensors, write_tensors
from upcycle3d.perception.moe.contrastive.pairs import PairTensors

STYLES = ("google", "twitter", "fluent")
PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "child", "mr", "mrs", "claus", "santa", "mx"}
"""Words that a stem does not have."""
PREPARED = TensorFileKind(
    name="prepared emoji", format="upcycle3d study emoji 1", advice="delete it, and the study prepares it again"
)


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """What is known about one caption."""

    key: str
    """Code points, without variation selectors."""
    label: str
    """Its name in Unicode CLDR: the caption."""
    base: str
    """Name without skin tone."""
    stem: str
    """Base without words for men, women and people."""
    group: int
    """Unicode's group, 0..9; 9 are flags."""
    tone: int
    """Skin tone 1..5, 0 without one, -1 for several people's tones."""
    test: bool
    """Whether the stem belongs to the test."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EmojiPairs:
    """All pictures and captions, as the outputs of frozen blocks."""

    emoji: tuple[Emoji, ...]
    """The captions."""
    caption: Tensor
    """(N,) int64 caption of each picture."""
    style: Tensor
    """(N,) int64 style of each picture, by its place in `STYLES`."""
    image: Tensor
    """(N, 26, 384) float16 tokens of each picture."""
    text: Tensor
    """(C, L, 384) float16 tokens of each caption."""
    padding: Tensor
    """(C, L) bool."""

    def rows(self, *, test: bool, styles: tuple[str, ...]) -> Tensor:
        """Choose pictures.

        Args:
            test: Those of the test stems, or the others.
            styles: Drawing styles.

        Returns:
            (M,) int64 pictures.
        """
        side = torch.tensor([e.test for e in self.emoji])[self.caption] == test
        kept = torch.isin(self.style, torch.tensor([STYLES.index(style) for style in styles]))
        return (side & kept).nonzero()[:, 0]

    def pairs(self, rows: Tensor) -> PairTensors:
        """Make pairs of some pictures.

        Args:
            rows: Pictures.

        Returns:
            The pairs; a picture's caption keeps its number.
        """
        which = self.caption[rows]
        return PairTensors(image=self.image[rows], text=self.text[which], caption=which, text_padding=self.padding[which])


def emoji_pairs(cache: Path, say=print) -> EmojiPairs:  # type: ignore[no-untyped-def]
    """Read the pairs, and prepare them first where that was not done yet: about four CPU minutes.

    Args:
        cache: Folder of the assets; what is prepared lies in it, too.
        say: Gets a line per step.

    Returns:
        The pairs.
    """
    path = cache / "emoji_states.safetensors"
    if not path.exists():
        _prepare(cache, path, say)
    file = read_tensors(path, PREPARED)
    caption, style, image, text, padding = file.named("caption", "style", "image", "text", "padding")
    emoji = tuple(Emoji(**fields) for fields in file.described("emoji"))
    return EmojiPairs(emoji=emoji, caption=caption, style=style, image=image, text=text, padding=padding)


@torch.no_grad()
def _prepare(cache: Path, path: Path, say) -> None:  # type: ignore[no-untyped-def]
    known = _captions(cache)
    emoji = sorted(known.values(), key=lambda e: e.key)
    number = {e.key: i for i, e in enumerate(emoji)}
    dino = Dino(frozen=True).eval()
    kept = dino.state_dict().keys()
    dino.load_state_dict({name: tensor for name, tensor in dino_weights(cache).items() if name in kept})
    states, captions, styles = [], [], []
    for style_number, style in enumerate(STYLES):
        found = 0
        pictures: list[np.ndarray] = []
        for key, picture in _pictures(style, cache):
            if key in number:
                pictures.append(picture)
                captions.append(number[key])
                styles.append(style_number)
                found += 1
        for start in range(0, len(pictures), 256):
            batch = torch.from_numpy(np.stack(pictures[start : start + 256])).permute(0, 3, 1, 2).float() / 255
            states.append(dino(batch).half())
        say(f"{style}: {found} pictures of {len(emoji)} captions, {FROZEN['dinov2']} blocks computed")
    ids, padding = word_piece(cache)([e.label for e in emoji])
    bert = MiniLm(frozen=True).eval()
    kept = bert.state_dict().keys()
    bert.load_state_dict({name: tensor for name, tensor in minilm_weights(cache).items() if name in kept})
    text = torch.cat([bert(i, p).half() for i, p in zip(ids.split(256), padding.split(256))])
    used = torch.tensor(captions).unique()
    say(f"{len(used)} captions of up to {ids.shape[1]} tokens, {sum(e.test for e in emoji)} with test stems")
    tensors = {
        "caption": torch.tensor(captions),
        "style": torch.tensor(styles),
        "image": torch.cat(states),
        "text": text,
        "padding": padding,
    }
    write_tensors(path, tensors, {"emoji": json.dumps([asdict(e) for e in emoji])}, PREPARED)


def _captions(cache: Path) -> dict[str, Emoji]:
    """Names of all emoji by code points."""
    data = json.loads(read_member(fetch("emojibase", cache), "package/en/data.json"))
    out: dict[str, Emoji] = {}
    for entry in data:
        if "group" not in entry:
            continue
        words = [word for word in re.findall(r"[\w’'.&-]+", entry["label"].lower()) if word not in PEOPLE]
        stem = " ".join(words) or entry["label"].lower()
        test = hashlib.sha256(stem.encode()).digest()[0] < 51  # a fifth
        for variant in (entry, *entry.get("skins", ())):
            tone = variant.get("tone", 0)
            key = _plain(variant["hexcode"])
            out[key] = Emoji(
                key=key,
                label=variant["label"],
                base=entry["label"],
                stem=stem,
                group=entry["group"],
                tone=tone if isinstance(tone, int) else -1,
                test=test,
            )
    return out


def _plain(code: str) -> str:
    return code.lower().replace("-fe0f", "").removeprefix("00")


def _pictures(style: str, cache: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Code points and picture of every emoji of a style, in the order of the code points."""
    path = fetch(style, cache)
    if style == "fluent":
        yield from sorted(_drawn(path), key=lambda pair: pair[0])
        return
    folder = f"package/img/{style}/64/"
    named = {name: data for name, data in members(path) if name.startswith(folder) and name.endswith(".png")}
    for name in sorted(named):
        yield _plain(name.removeprefix(folder).removesuffix(".png")), _on_white(named[name])


def _drawn(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The pictures that are drawings."""
    try:
        import cairosvg
    except ImportError as error:
        raise InvalidInput("the third style is drawn by cairosvg, which is not installed; pip install cairosvg") from error
    icons = json.loads(read_member(path, "package/icons.json"))
    names = json.loads(read_member(path, "package/chars.json"))
    done = set()
    for code, name in names.items():
        name = icons["aliases"].get(name, {"parent": name})["parent"]
        key = _plain(code)
        if name not in icons["icons"] or key in done:
            continue
        done.add(key)
        icon = icons["icons"][name]
        size = f"0 0 {icon.get('width', icons['width'])} {icon.get('height', icons['height'])}"
        text = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{size}">{icon["body"]}</svg>'
        yield key, _on_white(cairosvg.svg2png(bytestring=text.encode(), output_width=PIXELS, output_height=PIXELS))


def _on_white(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    ground.alpha_composite(picture)
    out: np.ndarray = np.asarray(ground.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))
    return out
