"""An upcycled head through the ordinary commands: made of specialists, inspected, trained, upcycled from scenes, scored, exported."""

import json
import re
from pathlib import Path

import pytest
import torch

import tiny
import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.upcycled import UpcycledDetectorConfig
from upcycle3d.perception.recipes.jobs import train_preset, upcycle_preset
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.tools import evaluate, export, inspect, moe_detector
from upcycle3d.tools.console import run_command

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def data(tmp_path_factory, one_thread) -> DataSplit:
    split = tiny.prepared(tmp_path_factory.mktemp("data") / "prepared")
    split.ensure_gt_database()
    return split


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """A source model, two specialists that started from it, and a store of smashed scenes."""
    folder = tmp_path_factory.mktemp("runs")
    train_preset(tiny.preset(), data, folder / "source", progress=False)
    for seed, name in enumerate(("clear", "rain")):
        where = folder / name
        upcycle_preset(
            tiny.preset(), data, folder / "source", where, method="source_continued", seed=seed, steps=2, progress=False
        )
    tiny.store(folder, load_detector(folder / "source"), [tiny.scan_with_car(seed) for seed in range(4)])
    return folder


@pytest.fixture(scope="module")
def mixture(runs) -> Path:
    words = ["--specialists", str(runs / "clear"), str(runs / "rain"), "--head", "both", "--out", str(runs / "mixture")]
    words += ["--stores", str(runs / "store"), "--batch-norm", "share", "--recalibrate", "--json", str(runs / "made.json")]
    assert run_command(moe_detector.command, words) == 0
    return runs / "mixture"


def fingerprint(path: Path) -> str:
    return encoder_fingerprint(load_detector(path).encoder, RigSpec())


def test_the_command_makes_a_run_folder_whose_encoder_is_that_of_the_fleet(runs, mixture):
    detector = load_detector(mixture)
    assert detector.config.head.experts == ("clear", "rain")
    assert (detector.config.head.bev_blocks, detector.config.head.regions) == ((1,), "branches")
    assert fingerprint(mixture) == fingerprint(runs / "source")
    assert detector.decoder.descriptor.spread.std() > 0  # fitted to the scenes of the store
    record = json.loads((mixture / "head.json").read_text())
    assert record["decoder parameters"][1] > record["decoder parameters"][0]
    assert "parameters" in json.loads((runs / "made.json").read_text())["decoder"]


def test_inspect_says_the_head(mixture, tmp_path):
    assert run_command(inspect.command, [str(mixture / "detector.safetensors"), "--json", str(tmp_path / "j")]) == 0
    facts = json.loads((tmp_path / "j").read_text())
    assert facts["detector"] == "SECOND-IoU with 2 experts"
    assert "2 experts (clear, rain) in branches of the region head, per scene; BEV block 1, per scene" in facts["upcycled head"]


def test_a_head_trains_from_labels_and_from_smashed_scenes_with_its_losses_and_use_in_the_log(runs, mixture, data, tmp_path):
    train_preset(tiny.preset(), data, tmp_path / "trained", init=mixture, progress=False)
    assert isinstance(load_detector(tmp_path / "trained").config, UpcycledDetectorConfig)
    out = tmp_path / "upcycled"
    upcycle_preset(
        tiny.preset(), data, mixture, out, method="hybrid", store=runs / "store", rig=RigSpec(), steps=4, progress=False
    )
    assert fingerprint(out) == fingerprint(runs / "source")
    for folder in (tmp_path / "trained", out):
        last = RunFolder.open(folder).metrics("train")[-1]
        assert 0 < last["router_balance"] < 0.1
        assert last["use/scenes/clear"] + last["use/scenes/rain"] == pytest.approx(1)
    checkpoint = sorted((out / "checkpoints").glob("step_*"))[-1]
    assert run_command(export.command, ["--detector", str(checkpoint), "--out", str(tmp_path / "exported")]) == 0
    exported, wanted = load_detector(tmp_path / "exported").state_dict(), load_detector(out).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in wanted.items())


def test_evaluation_prints_the_use_of_the_experts(mixture, data, tmp_path, capsys):
    words = ["run", "--detector", str(mixture), "--data", f"{data.root}:val", "--protocol", "cross_dataset"]
    assert run_command(evaluate.command, [*words, "--json", str(tmp_path / "j")]) == 0
    assert "use of the experts" in capsys.readouterr().out
    shares = json.loads((tmp_path / "j").read_text())["experts"]["scenes"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)


def test_the_python_of_docs_moe_md_makes_a_detector(runs, tmp_path, monkeypatch):
    page = (Path(upcycle3d.__file__).resolve().parent / "docs" / "moe.md").read_text()
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "upcycle_head(" in text)
    (tmp_path / "runs").mkdir()
    for name in ("clear", "rain"):
        (tmp_path / "runs" / name).symlink_to(runs / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/moe.md", "exec"), {})
    assert load_detector(tmp_path / "runs" / "mixture").config.head.experts == ("clear", "rain")


def test_copies_of_one_detector_are_sparse_upcycling(runs, data, tmp_path):
    words = ["--specialists", str(runs / "source"), "--copies", "2", "--stores", str(runs / "store"), "--group-scenes"]
    words += ["--out", str(tmp_path / "copies")]
    assert run_command(moe_detector.command, words) == 0
    frame = data.open()[0]
    one, other = (load_detector(path).detect(frame.points) for path in (runs / "source", tmp_path / "copies"))
    assert torch.allclose(one.boxes.data, other.boxes.data, atol=1e-5)
    assert torch.allclose(one.scores, other.scores, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clear", "rain", "--copies", "2"], "--copies copies one detector"),
        (["clear", "rain", "--names", "a"], "2 experts, and 1 names"),
        (["clear", "clear"], "two experts have one name"),
        (["clear", "rain", "--rest", "seed"], "no seed was given"),
        (["clear", "rain", "--recalibrate"], "give stores"),
        (["clear", "rain", "--group-scenes"], "found 0 stores"),
        (["clear", "--copies", "0"], "--copies must be 1 or more"),
        (["clear", "rain", "--head", "bev", "--wide"], "--wide changes nothing"),
        (["clear", "rain", "--bev-blocks", "0"], "--bev-blocks changes nothing"),
        (["clear", "rain", "--head", "bev", "--decides-per", "region"], "--decides-per region changes nothing"),
        (["clear", "rain", "--router", "soft", "--k", "1"], "--k changes nothing"),
        (["clear", "rain", "--router", "uniform", "--norm", "none"], "--norm changes nothing"),
        (["clear", "rain", "--router", "frozen", "--balance", "0.1"], "--balance changes nothing"),
        (["clear", "rain", "--seed-detector", "source"], "--seed-detector changes nothing"),
        (["clear", "rain", "--decides-per", "region", "--stores", "store"], "--stores changes nothing"),
        (["clear", "rain", "--router", "uniform", "--stores", "store", "--group-scenes"], "--group-scenes changes nothing"),
    ],
)
def test_options_that_do_not_fit_are_refused(runs, tmp_path, words, said):
    config = [str(runs / word) if (runs / word).is_dir() else word for word in words]
    with pytest.raises(InvalidInput, match=said):
        moe_detector.command(parsed(["--specialists", *config, "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def parsed(words: list[str]) -> moe_detector.MoeDetector:
    import tyro

    return tyro.cli(moe_detector.MoeDetector, args=words)
