"""A Hugging Face CLIP is upcycled from its folder and comes back from one file; pictures and captions are checked before work begins."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import moe_lookalikes as look
import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.checkpoints.checkpoint import load_mixture, read_description
from upcycle3d.perception.moe.contrastive.dmu import dmu
from upcycle3d.perception.moe.contrastive.expert_stages import DmuConfig
from upcycle3d.perception.moe.contrastive.hugging_face_clip import ClipTowers, load_clip, load_clip_mixture, save_clip_mixture
from upcycle3d.perception.moe.contrastive.image_captions import PictureForm, image_captions, read_caption_file
from upcycle3d.perception.moe.contrastive.pair_training import PairTraining, encode_pairs
from upcycle3d.perception.moe.contrastive.pairs import PairBatch, PairTensors
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.upcycling.clusters import ClusterConfig
from upcycle3d.tools import moe_dmu
from upcycle3d.tools.console import run_command
from upcycle3d.tools.moe_dmu import MoeDmu, command


class FakeVision(nn.Module):
    """The vision model's interface around one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 12, 4, stride=4), look.Block(look.ClipMlp())

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=self.block(self.patch(pixel_values).flatten(2).transpose(1, 2)).mean(1))


class FakeText(nn.Module):
    """The text model's interface around one FFN; the first token is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mlp = nn.Embedding(20, 12), look.ClipMlp()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        x = self.words(input_ids)
        return SimpleNamespace(pooler_output=(x + self.mlp(x))[:, 0])


class FakeClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_model, self.text_model = FakeVision(), FakeText()
        self.visual_projection, self.text_projection = nn.Linear(12, 6, bias=False), nn.Linear(12, 6, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


SETTINGS = DmuConfig(
    expert=PairTraining(steps=2, batch_size=8, lr=1e-2),
    router=PairTraining(steps=2, batch_size=8, lr=1e-2),
    stages=1,
    clusters=ClusterConfig(image_clusters=2, text_clusters=2, seeds=1),
)


def test_a_model_with_the_parts_of_a_clip_is_upcycled_and_stored(tmp_path):
    torch.manual_seed(0)
    towers = ClipTowers(FakeClip())
    ids = torch.randint(1, 20, (24, 4))
    padding = torch.arange(4) >= torch.randint(1, 5, (24, 1))
    data = PairTensors(image=torch.randn(24, 3, 8, 8), text=ids, caption=torch.arange(24), text_padding=padding)
    result = dmu(towers, data, SETTINGS)
    mixture = result.upcycled.model
    assert isinstance(mixture, ClipTowers)
    for _, layer in moe_layers(mixture):
        layer.usage.reset()
    found = encode_pairs(mixture, data)
    tokens = {name: layer.usage.value.tokens for name, layer in moe_layers(mixture)}
    assert tokens == {"clip.vision_model.block.mlp": 24 * 4, "clip.text_model.mlp": int((~padding).sum())}
    save_clip_mixture(tmp_path / "m.safetensors", result.upcycled, note="one stage")
    loaded = load_mixture(tmp_path / "m.safetensors", ClipTowers(FakeClip())).model
    again = encode_pairs(loaded, data)
    assert torch.equal(found.image, again.image)
    assert torch.equal(found.text, again.text)


def test_the_scale_is_the_models_own_and_stops_at_100():
    clip = FakeClip()
    assert float(ClipTowers(clip).scale().detach()) == pytest.approx(np.exp(2.0))
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)
    assert float(ClipTowers(clip).scale().detach()) == 100.0


def test_what_is_no_clip_is_refused():
    with pytest.raises(InvalidInput, match="has no text_model"):
        ClipTowers(SimpleNamespaceModule())


class SimpleNamespaceModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_model = nn.Identity()


# ---- pictures and captions


def write_pairs(folder, count: int = 24, name: str = "pairs.csv"):
    random = np.random.default_rng(0)
    words = ["a red ball", "a blue box", "two green cups", "a black cat", "an old tree", "the sea"]
    rows = [("image", "caption")]
    for i in range(count):
        pixels = random.integers(0, 255, (20 + i % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append((f"{i}.png", words[i % 6]))
    with (folder / name).open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder / name


def test_pictures_are_cut_to_the_middle_and_normalized(tmp_path):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = (255, 0, 127)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    form = PictureForm(pixels=10, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    found = form.read(tmp_path / "a.png")
    assert found.shape == (3, 10, 10)
    torch.testing.assert_close(found[:, 5, 5], torch.tensor([1.0, -2.0, 127 / 255 - 0.5]))
    assert PictureForm(pixels=7).read(tmp_path / "a.png").shape == (3, 7, 7)


def test_a_caption_file_is_checked_before_any_work(tmp_path):
    path = write_pairs(tmp_path, 3)
    pictures, captions = read_caption_file(path)
    assert [p.name for p in pictures] == ["0.png", "1.png", "2.png"]
    assert captions[1] == "a blue box"
    (tmp_path / "1.png").unlink()
    with pytest.raises(InvalidInput, match=r"1 of 3 pictures .* do not exist, first .*1\.png"):
        read_caption_file(path)
    (tmp_path / "bad.csv").write_text("file,text\n0.png,a\n")
    with pytest.raises(InvalidInput, match=r"image,caption, found \['file', 'text'\]"):
        read_caption_file(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("image,caption\n0.png,  \n")
    with pytest.raises(InvalidInput, match=r"line 2 .* no caption"):
        read_caption_file(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("image,caption\n")
    with pytest.raises(InvalidInput, match="no line"):
        read_caption_file(tmp_path / "bad.csv")
    with pytest.raises(InvalidInput, match="cannot read the caption file"):
        read_caption_file(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text('image,caption\n0.png,"' + "word " * 50_000)
    with pytest.raises(InvalidInput, match="is a quotation mark left open"):
        read_caption_file(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text(f"image,caption\n{'x' * 5000}.png,a\n")
    with pytest.raises(InvalidInput, match="1 of 1 pictures"):
        read_caption_file(tmp_path / "bad.csv")


def test_pictures_with_other_content_of_equal_size_are_other_data(tmp_path):
    """A job would go on with stages that learned from the old pictures."""
    pictures = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in pictures:
        path.write_bytes(b"12345")
    tokens = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool)
    pairs = image_captions(pictures, ["x", "y"], PictureForm(pixels=8), lambda texts: tokens)
    before = pairs.fingerprint()
    assert pairs.fingerprint() == before
    pictures[1].write_bytes(b"12346")
    assert pairs.fingerprint() != before


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(InvalidInput, match=r"cannot read the picture .*a\.png"):
        PictureForm(pixels=8).read(tmp_path / "a.png")


def test_a_gray_picture_of_16_bits_looks_like_the_same_one_of_8_bits(tmp_path):
    """Pillow's own conversion makes every value above 255 white, so such pictures were all alike."""
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(values).save(tmp_path / "8.png")
    Image.fromarray(values.astype(np.uint16) * 256).save(tmp_path / "16.png")
    form = PictureForm(pixels=8)
    assert torch.equal(form.read(tmp_path / "16.png"), form.read(tmp_path / "8.png"))
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(InvalidInput, match="floating-point numbers"):
        form.read(tmp_path / "f.tiff")


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "1", "L"])
def test_every_usual_kind_of_picture_is_read(tmp_path, mode):
    name = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new("RGB", (9, 8), (255, 255, 255)).convert(mode).save(name)
    found = PictureForm(pixels=4, mean=(0.0,) * 3, std=(1.0,) * 3).read(name)
    torch.testing.assert_close(found, torch.ones(3, 4, 4))


def test_a_strip_of_one_row_does_not_fill_the_memory(tmp_path):
    """Its shorter edge was enlarged first: a file of a few hundred bytes became 10 GB."""
    strip = np.zeros((1, 60_000, 3), dtype=np.uint8)
    strip[:, 29_000:31_000] = 255
    Image.fromarray(strip).save(tmp_path / "a.png")
    found = PictureForm(pixels=224, mean=(0.0,) * 3, std=(1.0,) * 3).read(tmp_path / "a.png")
    torch.testing.assert_close(found, torch.ones(3, 224, 224))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": 0}, "--batch-size must be 2"),
        ({"steps": 0}, "steps must be in 1"),
        ({"router_steps": 0}, "steps must be in 1"),
    ],
)
def test_a_number_of_zero_is_refused_and_not_replaced(tmp_path, given, said):
    """`--steps 0` silently became one pass over all pairs."""
    options = MoeDmu(clip=tmp_path, captions=tmp_path, out=tmp_path, **{"batch_size": 4, **given})
    with pytest.raises(InvalidInput, match=said):
        moe_dmu._settings(options, 16)


# ---- the real library


def save_tiny_clip(folder):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; the look-alike above stands in for it"
    )
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = {
        word: i for i, word in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = vocabulary["<|endoftext|>"]
    text = {**sizes, "vocab_size": len(vocabulary), "max_position_embeddings": 20, "bos_token_id": end - 1, "eos_token_id": end}
    config = transformers.CLIPConfig(
        text_config={**text, "pad_token_id": end}, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}))
    return folder


def test_the_towers_give_the_features_of_the_library(tmp_path):
    loaded = load_clip(save_tiny_clip(tmp_path / "clip"))
    assert loaded.form == PictureForm(pixels=16, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    ids, padding = loaded.tokenize(["a red ball", "the sea"])
    pictures = torch.randn(2, 3, 16, 16)
    clip = loaded.towers.clip.eval()
    with torch.no_grad():
        image, text = loaded.towers(PairBatch(image=pictures, text=ids, text_padding=padding))
        wanted = clip(input_ids=ids, attention_mask=(~padding).long(), pixel_values=pictures)
    torch.testing.assert_close(torch.nn.functional.normalize(image, dim=1), wanted.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.nn.functional.normalize(text, dim=1), wanted.text_embeds, rtol=1e-4, atol=1e-5)


def test_the_command_upcycles_a_folder_and_its_file_needs_nothing_else(tmp_path, capsys):
    folder = save_tiny_clip(tmp_path / "clip")
    path = write_pairs(tmp_path)
    words = f"{folder} --captions {path} --validation {path} --out {tmp_path / 'job'} --stages 2 --steps 2 --router-steps 2"
    words += " --batch-size 8 --lr 1e-3 --image-clusters 2 --text-clusters 2"
    assert run_command(command, [*words.split(), "--plan-only"]) == 0
    assert "4 FFNs become mixtures of 3 experts, 2 active per token" in capsys.readouterr().out
    assert run_command(command, [*words.split(), "--batch-size", "99", "--plan-only"]) == 0  # a plan needs no full batch
    capsys.readouterr()
    assert not (tmp_path / "job").exists()
    assert run_command(command, words.split()) == 0
    out = capsys.readouterr().out
    for part in ("stage 2 of 2", "balance 0.01", "before: image to text", "after: image to text", "top_k, k = 2, norm = renorm"):
        assert part in out
    stored = tmp_path / "job" / "mixture.safetensors"
    assert "2 stages" in read_description(stored).note
    towers = load_clip_mixture(stored)
    assert len(moe_layers(towers.clip)) == 4
    report = json.loads((tmp_path / "job" / "report.json").read_text())
    assert report["experts"] == 3
    assert set(report["recall"]) == {"before", "after"}
    with torch.no_grad():
        scores = towers.clip(input_ids=torch.tensor([[3, 4, 189]]), pixel_values=torch.zeros(1, 3, 16, 16)).logits_per_image
    assert scores.shape == (1, 1)
    assert run_command(command, [*words.split(), "--router-lr", "0.01"]) == 0  # the stages are read again
    assert run_command(command, [*words.split(), "--lr", "0.01"]) == 2
    assert "another job" in capsys.readouterr().err
    assert run_command(command, [*words.split(), "--batch-size", "99"]) == 2
    assert "fewer than one batch of 99" in capsys.readouterr().err


def test_the_five_lines_of_the_page_run(tmp_path, monkeypatch):
    page = (Path(upcycle3d.__file__).parent / "docs" / "moe.md").read_text()
    (block,) = (code for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE) if "load_clip(" in code)
    save_tiny_clip(tmp_path / "clip-vit-base-patch16")
    write_pairs(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("steps=1500, batch_size=256", "steps=1, batch_size=8"), "docs/moe.md", "exec"), {})
    assert len(moe_layers(load_clip_mixture("mixture.safetensors"))) == 4


def test_a_folder_without_a_clip_is_refused(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(InvalidInput, match="no folder of a Hugging Face model"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="and no weights"):
        load_clip(tmp_path)


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InvalidInput, match="pip install -c constraints"):
        load_clip(tmp_path)
