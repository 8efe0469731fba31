"""`upcycle3d moe bam|baseline|report|dmu` refuse what cannot work before a model is loaded, and leave no folder behind."""

import json
import re
import shutil
from pathlib import Path

import pytest
from moe_llama import SIZES, SMALL, text_options, write_llama_job

from upcycle3d.tools import language_job, moe_bam, moe_baseline, moe_report
from upcycle3d.tools.console import run_command

transformers = pytest.importorskip("transformers", reason="transformers is not installed; language models need it")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, its tokenizer and two texts."""
    return write_llama_job(tmp_path_factory.mktemp("job"))


def said_by(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def never(*_: object, **__: object) -> None:
    raise AssertionError("a model was loaded before the options were checked")


CODE = "code={job}/code.txt"
BAM = [
    (["--batch", "0"], "--batch must be a whole number from 1"),
    (["--length", "1"], "--length must be a whole number from 2"),
    (["--mix-steps", "-1"], "--mix-steps must be a whole number from 0"),
    (["--mix-lr", "nan"], "--mix-lr must be a number from 0"),
    (["--seed", "-1"], "--seed must be a whole number from 0"),
    (["--uncorrected", "--ffn", "soft"], "--uncorrected changes nothing"),
    (["--general", "law", "--specialists", "x"], "--general belongs to the training"),
    (["--general", "laws"], "--general names 'laws', and the texts are code, law"),
    (["--texts", "{job}/code.txt"], "texts are given as NAME=FILE, found"),
    (["--texts", CODE, CODE], "two texts have the name 'code'"),
    (["--texts", "code={job}/missing.txt"], "missing.txt, which --texts gives as 'code'"),
    (["--texts", CODE, "--general", "code"], "bam mixes specialists, and there are none"),
    (["--specialists", "{job}/missing"], "missing holds no model: there is no such folder"),
    (["--specialists", "{job}/llama", "{job}/llama"], "names one folder twice"),
    (["--specialists", "{job}/llama", "--specialist-steps", "3"], "--specialist-steps changes nothing"),
]


@pytest.mark.parametrize(("words", "said"), BAM, ids=[" ".join(words) for words, _ in BAM])
def test_bam_refuses_mistakes_in_the_command_line_first(job, tmp_path, capsys, monkeypatch, words, said):
    """A large model loaded for minutes before a misspelt name was found, and an empty folder was left."""
    monkeypatch.setattr(language_job, "load_language_model", never)
    given = [word.format(job=job) for word in words]
    texts = [] if "--texts" in given else text_options(job)
    assert run_command(moe_bam.command, [str(job / "llama"), "--out", str(tmp_path / "out"), *texts, *given]) == 2
    assert said in said_by(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [moe_bam, moe_baseline], ids=["bam", "baseline"])
def test_a_missing_model_is_named(job, tmp_path, capsys, command):
    method = ["sparse"] if command is moe_baseline else []
    words = [*method, str(job / "nowhere"), "--out", str(tmp_path / "out"), *text_options(job)]
    assert run_command(command.command, words) == 2
    assert "nowhere holds no model: there is no such folder" in said_by(capsys)
    assert not (tmp_path / "out").exists()


def test_nothing_to_mix_is_said_without_texts(job, tmp_path, capsys):
    for words in ([moe_bam], [moe_baseline, "btx"]):
        command, *method = words
        assert run_command(command.command, [*method, str(job / "llama"), "--out", str(tmp_path / "x")]) == 2
        assert "mixes specialists, and there are none: give --specialists" in said_by(capsys)


BASELINES = [
    (["continued", "--ffn", "top1"], "--ffn changes nothing for continued"),
    (["flexolmo", "--ffn", "soft"], "--ffn changes nothing for flexolmo"),
    (["btx", "--experts", "7"], "--experts changes nothing for btx"),
    (["sparse", "--specialists", "x"], "--specialists changes nothing for sparse"),
    (["sparse", "--general", "law"], "--general changes nothing for sparse"),
    (["soup", "--only", "x"], "--only changes nothing for soup"),
    (["soup", "--format", "mixture"], "--format changes nothing for soup"),
    (["sparse", "--format", "mixture", "--layout", "fused"], "--layout changes nothing for sparse"),
    (["soup", "--mix-steps", "3"], "--mix-steps changes nothing for soup"),
    (["flexolmo", "--mix-lr", "0.5"], "--mix-lr changes nothing for flexolmo"),
    (["sparse", "--specialist-steps", "3"], "--specialist-steps changes nothing for sparse"),
    (["sparse", "--texts", "--mix-steps", "3"], "--mix-steps changes nothing for sparse with these options without --texts"),
    (["sparse", "--texts", "--precision", "bfloat16"], "--precision changes nothing for sparse"),
    (["sparse", "--format", "mixtral", "--ffn", "soft"], "give --format mixture, or take --ffn top2"),
    (["wide", "--format", "mixtral"], "wide is no Mixtral: it has one expert per block; give --format mixture"),
    (
        ["sparse", "--experts", "1"],
        "--ffn top2 needs 2 experts or more, found --experts 1; give --experts 2 or more, or .* (--ffn top1)",
    ),
    (["drop", "--experts", "0", "--ffn", "top1"], "--ffn top1 needs 1 experts or more"),
    (["cluster", "--ffn", "soft"], "use --ffn top1 or --ffn top2"),
    (["flexolmo", "--texts"], "flexolmo looks at texts"),
]


@pytest.mark.parametrize(("words", "said"), BASELINES, ids=[" ".join(words) for words, _ in BASELINES])
def test_baselines_refuse_options_that_have_no_effect_or_do_not_fit(job, tmp_path, capsys, monkeypatch, words, said):
    """Whoever gives an option believes that the result depends on it."""
    monkeypatch.setattr(language_job, "load_language_model", never)
    method, *rest = words
    texts = [] if "--texts" in rest else text_options(job)
    rest = [word for word in rest if word != "--texts"]
    words = [method, str(job / "llama"), "--out", str(tmp_path / "out"), *texts, *rest]
    assert run_command(moe_baseline.command, words) == 2
    assert re.search(re.escape(said).replace(r"\.\*", ".*"), said_by(capsys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bam", "--only", "model.layers.1.mlp"], "no attention fits 'model.layers.1.mlp'; there are model.layers.0.self_attn"),
        (["bam", "--only", "nothing"], "no FFN fits 'nothing'; there are model.layers.0.mlp"),
        (["bam", "--length", "1000"], "fill no row of 1000; lower --length"),
        (["btx", "--only", "nothing"], "no FFN fits 'nothing'"),
        (
            ["btx", "--format", "mixtral", "--only", "model.layers.1.mlp"],
            "layers.0.mlp stays dense.*leave out --only, or .*--format mixture",
        ),
    ],
)
def test_what_the_structure_decides_is_said_before_anything_is_trained(job, tmp_path, capsys, words, said):
    """A pattern that fits nothing was found after hours of training specialists."""
    method, *rest = words
    command = moe_bam if method == "bam" else moe_baseline
    given = [
        *([] if method == "bam" else [method]),
        str(job / "llama"),
        "--out",
        str(tmp_path / "out"),
        *text_options(job),
        *rest,
    ]
    assert run_command(command.command, given) == 2
    assert re.search(said, said_by(capsys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["bam"], ["soup"], ["wide"], ["flexolmo"], ["sparse", "--experts", "3"], ["btx", "--ffn", "soft"]]
)
def test_a_plan_alone_trains_and_writes_nothing_and_counts_what_comes_out(job, tmp_path, capsys, words):
    method, *rest = words
    command = moe_bam if method == "bam" else moe_baseline
    out = tmp_path / "out"
    given = [*([] if method == "bam" else [method]), str(job / "llama"), "--out", str(out), *rest]
    assert run_command(command.command, [*given, *text_options(job), "--plan-only"]) == 0
    planned = capsys.readouterr().out
    assert "nothing was trained or written" in planned
    assert not out.exists()
    steps = (
        ["--mix-steps", "0"] if method in ("wide", "sparse") else ["--specialist-steps", "0", "--mix-steps", "0", "--length", "8"]
    )
    assert run_command(command.command, [*given, *text_options(job), *steps, "--length", "8"]) == 0
    said = capsys.readouterr().out
    for what in ("parameters of the whole model: .*", "multiply-adds per token with 256 keys: .*"):
        first, last = re.findall(what, said)
        assert first == last
        assert first in planned


def test_models_of_other_kinds_and_damaged_ones_are_named_in_our_words(job, tmp_path, capsys):
    """The library answered with a list of all its classes, or with what its reader of headers thought."""
    clip = tmp_path / "clip"
    shutil.copytree(job / "llama", clip)
    (clip / "config.json").write_text(json.dumps({"model_type": "clip"}))
    words = [str(job / "llama"), "--out", str(tmp_path / "out"), "--specialists", str(clip)]
    assert run_command(moe_bam.command, words) == 2
    said = said_by(capsys)
    assert "the specialist clip cannot be used" in said
    assert "holds a model of type 'clip', which is no language model" in said
    (clip / "config.json").write_text("{")
    assert run_command(moe_bam.command, words) == 2
    assert "config.json is damaged" in said_by(capsys)
    other = tmp_path / "other"
    shutil.copytree(job / "llama", other)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, vocab_size=31)).save_pretrained(
        other
    )
    assert run_command(moe_bam.command, [*words[:-1], str(other)]) == 2
    assert re.search(r"the specialist other in \S+ was not trained from the seed", said_by(capsys))
    (other / "model.safetensors").rename(tmp_path / "moved")
    assert run_command(moe_bam.command, [*words[:-1], str(other)]) == 2
    assert "has a config.json and no weights" in said_by(capsys)
    (other / "tokenizer.json").unlink()
    (tmp_path / "moved").rename(other / "model.safetensors")
    assert run_command(moe_report.command, [str(other), *text_options(job)]) == 2
    assert "the tokenizer in" in said_by(capsys)


def test_a_damaged_specialist_of_a_job_says_which_folder_to_delete(job, tmp_path, capsys):
    """It is found before the other specialists are trained."""
    words = [str(job / "llama"), "--out", str(tmp_path / "out"), *text_options(job), *SMALL]
    assert run_command(moe_bam.command, words) == 0
    shutil.rmtree(tmp_path / "out" / "model")
    shutil.rmtree(tmp_path / "out" / "specialists" / "code")
    weights = tmp_path / "out" / "specialists" / "law" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    assert run_command(moe_bam.command, words) == 2
    said = said_by(capsys)
    assert "the specialist law cannot be used" in said
    assert "damaged or not complete" in said
    assert "delete this folder, and the specialist is trained again" in said
    assert not (tmp_path / "out" / "specialists" / "code").exists()
    shutil.rmtree(weights.parent)
    assert run_command(moe_bam.command, words) == 0
