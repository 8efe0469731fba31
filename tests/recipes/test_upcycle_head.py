"""An upcycled head through the ordinary commands: made of specialists, inspected, trained, upcycled from scenes, scored, exported."""

import json
import re
from pathlib import Path

import pytest
import torch

import tiny
import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.point_files import write_bin
from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.models.decoders.mixture import HeadMixtureConfig
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.models.upcycled import UpcycledDetectorConfig
from upcycle3d.perception.moe.detectors.calibrate import GateUse
from upcycle3d.perception.recipes.gate_start import StoreStart, gate_notes
from upcycle3d.perception.recipes.job_start import JobStart
from upcycle3d.perception.recipes.jobs import train_preset
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.tools import evaluate, export, inspect, moe_detector, predict
from upcycle3d.tools.console import run_command

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


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
    source = load_detector(folder / "source")
    tiny.store(folder, source, [tiny.scan_with_car(seed) for seed in range(4)])
    for name, road in (("clear", 2000), ("rain", 20)):
        tiny.store(folder / "domains" / name, source, [tiny.scan_with_car(seed, road=road) for seed in range(3)])
        (folder / "domains" / name / "store").rename(folder / "domains" / f"{name}_scenes")
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
    said = json.loads((runs / "made.json").read_text())
    before, after = said["decoder parameters"]
    for now, total in enumerate((before, after)):
        assert sum(part["parameters"][now] for part in said["parts"]) == total
    count = sum(p.numel() for p in detector.decoder.parameters())
    assert (after, before) == (count, sum(p.numel() for p in load_detector(runs / "clear").decoder.parameters()))


def make(capsys, *words: object) -> tuple[int, str]:
    """Run the command. Returns its exit code and all that it printed, in one line."""
    code = run_command(moe_detector.command, [*map(str, words)])
    heard = capsys.readouterr()
    return code, " ".join((heard.out + heard.err).split())


def test_two_experts_are_weighed_and_the_command_says_that_both_compute(runs, tmp_path, capsys):
    """The top 2 of 2 looks like a choice and is none; soft weights are the same function, with a balance loss that has an effect."""
    words = ["--specialists", runs / "clear", runs / "rain", "--out", tmp_path / "made"]
    code, text = make(capsys, *words)
    assert code == 0
    assert load_detector(tmp_path / "made").config.head.router == "soft"
    assert "both experts compute every scene; the gate only weighs them" in text
    assert (
        "0.01 times the balance loss, which is 1 when all experts are used evenly and 2 when one of them serves everything"
        in text
    )
    code, text = make(capsys, *words[:-1], tmp_path / "one", "--k", 1, "--norm", "none")
    assert code == 0
    assert "both experts compute" not in text
    assert load_detector(tmp_path / "one").config.head.router == "top_k"


def test_the_table_shows_where_the_gate_sends_the_scenes_of_each_store(runs, tmp_path, capsys):
    stores = [runs / "domains" / f"{name}_scenes" for name in ("clear", "rain")]
    words = ["--specialists", runs / "clear", runs / "rain", "--json", tmp_path / "j"]
    code, _ = make(capsys, *words, "--stores", *stores, "--out", tmp_path / "made")
    said = json.loads((tmp_path / "j").read_text())
    assert (code, said["warnings"]) == (0, [])
    assert [row["given for"] for row in said["stores"]] == ["clear", "rain"]
    assert [row["largest weight"][name] for row, name in zip(said["stores"], ("clear", "rain"), strict=True)] == [1.0, 1.0]
    assert all(sum(row["mean weight"].values()) == pytest.approx(1) for row in said["stores"])


def test_stores_in_the_order_of_other_experts_and_one_store_for_several_are_warned_about(runs, tmp_path, capsys):
    stores = [runs / "domains" / f"{name}_scenes" for name in ("rain", "clear")]
    words = ["--specialists", runs / "clear", runs / "rain", "--names", "clear_scenes", "rain_scenes"]
    code, text = make(capsys, *words, "--stores", *stores, "--out", tmp_path / "a")
    assert code == 0
    assert "rain_scenes was given for the expert clear_scenes, and there is an expert rain_scenes: the order of --stores" in text
    code, text = make(capsys, *words, "--stores", stores[0], "--out", tmp_path / "b")
    assert code == 0
    assert "was given for 2 experts: it only scaled the description of scenes" in text


def test_a_gate_that_sends_scenes_of_a_store_to_another_expert_is_warned_about_with_numbers():
    head = HeadMixtureConfig(experts=("clear", "rain", "fog"), decides_per="scene")
    shares = [(0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.0, 0.0, 1.0)]
    starts = [
        StoreStart(store=Path(f"stores/{name}"), given_for=name, use=GateUse(scenes=10, largest=share, weights=share))
        for name, share in zip(head.experts, shares, strict=True)
    ]
    (note,) = gate_notes(starts, head, grouped=False)
    assert "of 10 scenes of stores/rain, which was given for rain, the gate sends 30% to rain and 60% to clear" in note


def test_an_empty_store_is_named(runs, tmp_path, capsys):
    source = load_detector(runs / "source")
    tiny.store(tmp_path / "none", source, [])
    stores = [runs / "store", tmp_path / "none" / "store"]
    words = ["--specialists", runs / "clear", runs / "rain", "--stores", *stores, "--out", tmp_path / "made"]
    code, text = make(capsys, *words)
    assert code == 2
    assert "none/store holds no scene. `ingest` moves shards into a store" in text
    assert not (tmp_path / "made").exists()


def test_inspect_says_the_head(mixture, tmp_path):
    assert run_command(inspect.command, [str(mixture / "detector.safetensors"), "--json", str(tmp_path / "j")]) == 0
    facts = json.loads((tmp_path / "j").read_text())
    assert facts["detector"] == "SECOND-IoU with 2 experts"
    assert "2 experts (clear, rain) in branches of the region head, per scene; BEV block 1, per scene" in facts["upcycled head"]


def test_inspect_says_the_rig_of_each_specialist(mixture, tmp_path):
    """The detector's file has room for the rig of one training; the others stand beside it."""
    assert run_command(inspect.command, [str(mixture), "--json", str(tmp_path / "j")]) == 0
    facts = json.loads((tmp_path / "j").read_text())
    assert facts["rig of the specialist clear"] == facts["rig of the specialist rain"] == str(RigSpec())


def test_a_training_that_changes_the_encoder_says_so_before_it_starts(runs, mixture, data, tmp_path):
    """Only where a fleet may run that encoder: of an upcycled head, and of a detector that `upcycle` made of a source model."""
    notes: list[str] = []

    def stop(start: JobStart) -> None:
        notes[:] = start.notes
        raise InvalidInput("enough")

    def said(init: Path) -> str:
        with pytest.raises(InvalidInput, match="enough"):
            train_preset(tiny.preset(), data, tmp_path / "run", init=init, progress=False, on_start=stop)
        return " ".join(notes)

    assert f"changes the encoder too, and {mixture} has an upcycled head" in said(mixture)
    assert f"which kept the encoder of {runs / 'source'}" in said(runs / "clear")
    assert "which kept the encoder of" in said(runs / "clear" / "detector.safetensors")
    assert "encoder" not in said(runs / "source")
    for method, warned in (("oracle_full", True), ("oracle_frozen", False)):
        with pytest.raises(InvalidInput, match="enough"):
            upcycle_preset(tiny.preset(), data, mixture, tmp_path / "run", method=method, progress=False, on_start=stop)
        assert any("changes the encoder too" in note for note in notes) == warned
    assert not (tmp_path / "run").exists()


def test_predict_writes_the_weights_of_the_experts_of_each_scan(mixture, tmp_path):
    for number in range(2):
        write_bin(tmp_path / "scans" / f"{number}.bin", tiny.scan_with_car(number, road=20 + 1000 * number))
    words = ["--detector", mixture, "--scans", tmp_path / "scans", "--out", tmp_path / "boxes", "--json", tmp_path / "j"]
    assert run_command(predict.command, [*map(str, words)]) == 0
    experts = json.loads((tmp_path / "j").read_text())["experts"]
    assert [*experts] == ["0.bin", "1.bin"]
    detector = load_detector(mixture)
    for number, weights in enumerate(experts.values()):
        wanted = detector.decoder.decide(detector.encode([tiny.scan_with_car(number, road=20 + 1000 * number)])).weight[0]
        assert list(weights.values()) == pytest.approx(wanted.tolist(), abs=1e-3)


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
    text = " ".join(capsys.readouterr().out.split())
    assert "use of the experts" in text
    assert "both experts compute every scene; the gate only weighs them: read the weights" in text
    use = json.loads((tmp_path / "j").read_text())["experts"]["scenes"]
    for what in ("shares", "largest weight", "mean weight"):
        assert sum(use[what].values()) == pytest.approx(1)
        assert [*use[what]] == ["clear", "rain"]


def test_the_python_of_docs_moe_md_makes_a_detector(runs, tmp_path, monkeypatch):
    page = (Path(upcycle3d.__file__).resolve().parent / "docs" / "moe.md").read_text()
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "upcycle_head(" in text)
    (tmp_path / "runs").mkdir()
    for name, ours in (("town", "clear"), ("suburb", "rain")):
        (tmp_path / "runs" / name).symlink_to(runs / ours)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/moe.md", "exec"), {})
    assert load_detector(tmp_path / "runs" / "mixture").config.head.experts == ("town", "suburb")


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
        (["clear"], "one detector makes one expert, which is that detector again; give .* or --copies N"),
        (["clear", "--copies", "1"], "one detector makes one expert"),
        (["clear", "rain", "--k", "2"], "the top 2 of 2 experts is no choice.* Take --router soft .* or --k 1 --norm none"),
        (["clear", "rain", "--router", "top_k"], "the top 2 of 2 experts is no choice"),
        (["clear", "rain", "--k", "1"], "add --norm none .* or take --router soft without --k"),
        (
            ["clear", "rain", "--stores", "store", "domains/clear_scenes", "domains/rain_scenes"],
            "3 stores were given for 2 experts",
        ),
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
