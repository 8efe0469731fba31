"""What `upcycle3d moe bam|baseline|report` print and store: one table, names of experts, the same scores, no bars of the library."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from moe_llama import APART, JOINT, SMALL, text_options, write_llama_job

from upcycle3d.perception.moe.checkpoints.transformers_package import without_progress_bars
from upcycle3d.perception.moe.language import phase_file
from upcycle3d.perception.moe.language.language_models import load_language_model
from upcycle3d.tools import moe_bam, moe_baseline, moe_report
from upcycle3d.tools.console import run_command
from upcycle3d.tools.language_tables import finite

transformers = pytest.importorskip("transformers", reason="transformers is not installed; language models need it")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, its tokenizer, two texts, and the results of BAM and BTX with their numbers."""
    folder = write_llama_job(tmp_path_factory.mktemp("job"))
    bam = [str(folder / "llama"), "--out", str(folder / "bam"), *text_options(folder), *SMALL, "--json", str(folder / "bam.json")]
    assert run_command(moe_bam.command, bam) == 0
    given = ["--specialists", *(str(folder / "bam" / "specialists" / name) for name in ("code", "law"))]
    btx = ["btx", str(folder / "llama"), "--out", str(folder / "btx"), *text_options(folder), *JOINT, *given]
    assert run_command(moe_baseline.command, [*btx, "--json", str(folder / "btx.json")]) == 0
    return folder


def numbers(path: Path) -> dict:
    return json.loads(path.read_text())


def report(job: Path, model: str, *words: str) -> dict:
    given = [str(job / model), *text_options(job), "--json", str(job / "report.json"), *words]
    assert run_command(moe_report.command, given) == 0
    return numbers(job / "report.json")


@pytest.mark.parametrize("name", ["bam", "btx"])
def test_report_agrees_with_what_made_the_model(job, capsys, name):
    """The report scored the first rows of the text, which were trained on, while the page said otherwise."""
    made = numbers(job / f"{name}.json")["perplexity"]
    found = report(job, f"{name}/model", "--dense", str(job / "llama"))
    assert {s["domain"]: s["score"] for s in found["scores"]} == pytest.approx(made["after"], rel=1e-6)
    assert {s["domain"]: s["dense"] for s in found["scores"]} == pytest.approx(made["dense"], rel=1e-6)
    assert found["texts"]["code"] == "1 row of 30 tokens out of the last 30 of 300"
    assert "code: scored on 1 row of 30 tokens out of the last 30 of 300 tokens" in capsys.readouterr().out


def test_whole_texts_are_scored_where_they_were_never_trained_on(job):
    found = report(job, "btx/model", "--whole-texts", "--rows", "3")
    assert found["texts"]["code"] == "3 rows of 64 tokens out of all 300"


@pytest.mark.parametrize("name", ["bam", "btx"])
def test_bam_and_baselines_store_the_same_numbers(job, name):
    found = numbers(job / f"{name}.json")
    assert set(found) == {"method", "settings", "experts", "steps", "cpu_seconds", "cost", "perplexity"}
    assert found["method"] == name
    assert found["settings"]["language"]["mix_steps"] == 2
    assert found["experts"] == ["seed", "code", "law"]
    assert found["steps"]["result"] == 2
    assert set(found["cpu_seconds"]["specialists"]) == {"code", "law"}
    assert all(seconds > 0 for seconds in found["cpu_seconds"]["specialists"].values())  # also of specialists that are given
    assert found["cpu_seconds"]["result"] > 0
    assert found["cost"]["dense"]["stored"] < found["cost"]["result"]["stored"]
    assert found["cost"]["dense"]["multiply_adds"] < found["cost"]["result"]["multiply_adds"]
    assert set(found["perplexity"]) == {"dense", "before", "after", "specialists"}
    assert set(found["perplexity"]["specialists"]["law"]) == {"code", "law"}


def test_names_of_experts_are_stored_and_shown(job, capsys):
    for name in ("bam", "btx"):
        assert load_language_model(job / name / "model", tokenizer=False).experts == ("seed", "code", "law")
        report(job, f"{name}/model")
        assert re.search(r"part\W+domain\W+seed\W+code\W+law", capsys.readouterr().out)
    names = job / "btx" / "model" / "experts.json"  # a Mixtral's own files have no place for them
    stored = names.read_text()
    try:
        names.write_text('["one"]')
        report(job, "btx/model")
        assert "no names of its experts, so they have numbers" in capsys.readouterr().out
    finally:
        names.write_text(stored)


def test_tables_hold_every_specialist_on_every_domain_and_the_result(job, tmp_path, capsys):
    words = [str(job / "llama"), "--out", str(tmp_path / "out"), *text_options(job), *SMALL]
    assert run_command(moe_bam.command, words) == 0
    said = capsys.readouterr().out
    assert "made: BAM of the seed and 2 specialists" in said
    assert re.search(r"perplexity of specialists\W+domain\W+seed\W+code\W+law", said)
    assert re.search(r"domain\W+dense\W+before training\W+after training", said)
    assert re.search(r"specialist code: step 1 of 2: loss [\d.]+, [\d.]+ CPU seconds", said)
    assert re.search(r"joint training: step 2 of 2: loss", said)
    assert re.search(r"CPU seconds: specialists code [\d.]+, law [\d.]+; making the result [\d.]+; training it [\d.]+", said)
    assert len(re.findall("parameters of the whole model", said)) == 2  # the plan and the result, which agree


def test_a_soup_is_of_the_seed_too_and_has_no_column_after_training(job, tmp_path, capsys):
    """`soup: the average of the specialists` was said, and the seed is in it."""
    words = ["soup", str(job / "llama"), "--out", str(tmp_path / "out"), *text_options(job), *APART]
    assert run_command(moe_baseline.command, words) == 0
    said = capsys.readouterr().out
    assert "soup of the seed and 2 specialists" in said
    assert "after training" not in said
    assert re.search(r"domain\W+dense\W+result", said)
    states = [load_language_model(tmp_path / "out" / "specialists" / name).model for name in ("code", "law")]
    states.append(load_language_model(job / "llama").model)
    mean = sum(model.state_dict()["model.norm.weight"] for model in states) / 3
    made = load_language_model(tmp_path / "out" / "model").model.state_dict()["model.norm.weight"]
    assert float((made - mean).abs().max()) < 1e-6


def test_nothing_is_trained_so_rows_may_be_longer_than_the_model_reads(job, tmp_path):
    """`soup` of specialists that are given was refused for the default `--length`, which it does not use."""
    given = ["--specialists", str(job / "bam" / "specialists" / "code")]
    words = ["soup", str(job / "llama"), "--out", str(tmp_path / "out"), *text_options(job), *given]
    assert run_command(moe_baseline.command, words) == 0


def test_a_report_opens_the_model_of_a_job_and_dense_results(job, tmp_path, capsys):
    assert run_command(moe_report.command, [str(job / "bam"), *text_options(job)]) == 0
    assert "bam is the folder of a job; this is a report on" in " ".join(capsys.readouterr().out.split())
    for method in ("continued", "wide"):
        words = [method, str(job / "llama"), "--out", str(tmp_path / method), "--mix-steps", "0"]
        assert run_command(moe_baseline.command, words) == 0
        assert run_command(moe_report.command, [str(tmp_path / method), "--dense", str(job / "llama"), *text_options(job)]) == 0
        said = capsys.readouterr().out
        assert "the model is dense: it has no experts" in said
        assert "use of experts" not in said
        assert "multiply-adds per token" in said


def test_the_joint_training_of_a_stopped_job_goes_on(job, tmp_path, capsys, monkeypatch):
    plain = phase_file.PhaseFile.__init__
    monkeypatch.setattr(phase_file.PhaseFile, "__init__", lambda self, path, depends: plain(self, path, depends, every=-1.0))
    monkeypatch.setattr(phase_file.time, "monotonic", lambda: 0.0)
    words = ["sparse", str(job / "llama"), *text_options(job), *JOINT[:-1], "10", "--experts", "2"]
    assert run_command(moe_baseline.command, [*words, "--out", str(tmp_path / "whole")]) == 0
    keep = phase_file.PhaseFile.keep

    def kept_until_four(self, model, optimizer, losses, seconds):
        keep(self, model, optimizer, losses, seconds)
        if len(losses) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(phase_file.PhaseFile, "keep", kept_until_four)
    again = [*words, "--out", str(tmp_path / "stopped")]
    assert run_command(moe_baseline.command, again) == 130
    assert (tmp_path / "stopped" / "mix.unfinished.safetensors").exists()
    monkeypatch.setattr(phase_file.PhaseFile, "keep", keep)
    assert run_command(moe_baseline.command, again) == 0
    assert "goes on after step 4 of 10" in " ".join(capsys.readouterr().out.split())
    both = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert both[0] == both[1]
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == [".lock", "model"]


def test_specialists_of_one_folder_name_are_told_apart(job, tmp_path):
    for name in ("code", "law"):
        shutil.copytree(job / "bam" / "specialists" / name, tmp_path / name / "model")
    given = ["--specialists", str(tmp_path / "code" / "model"), str(tmp_path / "law" / "model")]
    assert run_command(moe_bam.command, [str(job / "llama"), "--out", str(tmp_path / "out"), *given]) == 0
    assert load_language_model(tmp_path / "out" / "model").experts == ("seed", "code/model", "law/model")


def test_no_bar_of_the_library_is_printed_and_its_setting_is_kept(job, tmp_path, capfd):
    """Bars of the library stood in the middle of our tables."""
    setting = transformers.utils.logging
    setting.enable_progress_bar()
    words = ["sparse", str(job / "llama"), "--out", str(tmp_path / "out"), "--mix-steps", "0"]
    assert run_command(moe_baseline.command, words) == 0
    heard = capfd.readouterr()
    assert "%|" not in heard.out + heard.err
    assert setting.is_progress_bar_enabled()
    setting.disable_progress_bar()
    try:
        with without_progress_bars():
            pass
        assert not setting.is_progress_bar_enabled()
    finally:
        setting.enable_progress_bar()


def test_numbers_that_json_lacks_become_text():
    """A wrecked model's perplexity is infinite, and a strict reader refused the whole file."""
    assert finite({"a": {"b": math.inf, "c": math.nan}, "d": 1.5, "e": None}) == {
        "a": {"b": "inf", "c": "nan"},
        "d": 1.5,
        "e": None,
    }
