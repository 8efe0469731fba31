"""`upcycle3d moe bam|baseline|report` on a tiny Hugging Face Llama: texts in, models out that load and report."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from moe_llama import APART, JOINT, SIZES, SMALL, text_options, write_llama_job
from safetensors.torch import load_file, save_file

import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.files import locked_folder
from upcycle3d.perception.moe.checkpoints.checkpoint import BaseModel, save_mixture
from upcycle3d.perception.moe.language.language_models import load_language_model, named_texts
from upcycle3d.perception.moe.language.phases import TextPhase, train_on
from upcycle3d.perception.moe.language.text_scores import perplexity
from upcycle3d.perception.moe.language.text_training import TokenDomains
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, sparse_copy
from upcycle3d.tools import moe_bam, moe_baseline, moe_report
from upcycle3d.tools.console import run_command

transformers = pytest.importorskip("transformers", reason="transformers is not installed; language models need it")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, its tokenizer and two texts."""
    return write_llama_job(tmp_path_factory.mktemp("job"))


def test_bam_trains_branches_writes_a_mixture_and_reports(job, capsys):
    words = [
        str(job / "llama"),
        "--out",
        str(job / "bam"),
        "--general",
        "law",
        "--key-values",
        "shared",
        *text_options(job),
        *SMALL,
    ]
    assert run_command(moe_bam.command, words) == 0
    assert (job / "bam" / "specialists" / "code" / "config.json").exists()
    assert not (job / "bam" / "specialists" / "law").exists()
    found = load_language_model(job / "bam" / "model")
    assert found.model.model.layers[0].self_attn.mixture.key_values == "shared"
    report = ["--dense", str(job / "llama"), *text_options(job), "--json", str(job / "r.json"), "--layers"]
    assert run_command(moe_report.command, [str(job / "bam" / "model"), *report]) == 0
    said = capsys.readouterr().out
    assert "trainable" in said
    assert "balance 0.01" in said  # a loss that is silently off is a frequent complaint
    assert "attention: 2 mixtures" in said
    data = json.loads((job / "r.json").read_text())
    direct = perplexity(found.model, found.tokens(job / "code.txt")[-30:])
    assert data["scores"][0]["score"] == pytest.approx(direct)
    shutil.rmtree(job / "bam" / "model")
    assert run_command(moe_bam.command, [*words[:-1], "0"]) == 0  # finished specialists are read, not trained
    assert "is kept" in " ".join(capsys.readouterr().out.split())


def test_a_specialist_of_other_training_or_texts_is_refused(job, capsys):
    """It would be mixed in silently, and the report would be about another model than the options say."""
    words = [str(job / "llama"), "--out", str(job / "again"), *SMALL]
    assert run_command(moe_bam.command, [*words, *text_options(job)]) == 0
    shutil.rmtree(job / "again" / "model")
    assert run_command(moe_bam.command, [*words, *text_options(job), "--specialist-lr", "0.5"]) == 2
    assert "training.lr: stored 0.0001, now 0.5" in " ".join(capsys.readouterr().err.split())
    swapped = ["--texts", f"code={job / 'law.txt'}", f"law={job / 'code.txt'}"]
    assert run_command(moe_bam.command, [*words, *swapped]) == 2
    assert "texts.code" in capsys.readouterr().err
    (job / "again" / "specialists" / "code" / "origin.json").write_text("{")
    assert run_command(moe_bam.command, [*words, *text_options(job)]) == 2
    assert "origin.json" in capsys.readouterr().err


def test_training_in_bfloat16_gives_a_finite_mixture(job, capsys):
    words = [str(job / "llama"), "--out", str(job / "half"), "--precision", "bfloat16", *text_options(job), *SMALL]
    assert run_command(moe_bam.command, words) == 0, capsys.readouterr()
    found = load_language_model(job / "half" / "model")
    assert 1 < perplexity(found.model, found.tokens(job / "code.txt")) < 1000


@pytest.mark.parametrize("method", ["sparse", "drop", "cluster", "btx", "soup", "wide", "continued", "flexolmo"])
def test_every_baseline_is_made_and_loads(job, method, capsys):
    out = job / f"base_{method}"
    experts = ["--experts", "3"] if method in ("sparse", "drop", "cluster") else []
    steps = {"btx": SMALL, "soup": APART, "flexolmo": APART}.get(method, JOINT)
    words = [method, str(job / "llama"), "--out", str(out), *experts, *text_options(job), *steps]
    assert run_command(moe_baseline.command, words) == 0, capsys.readouterr()
    found = load_language_model(out / "model")
    kind = found.model.config.model_type
    assert kind == ("llama" if method in ("soup", "continued") else "mixtral") or (out / "model" / "mixture.safetensors").exists()
    assert perplexity(found.model, found.tokens(job / "law.txt"), length=8) > 1


def test_a_mixtral_of_copies_has_the_dense_perplexity(job, capsys):
    out = job / "copies"
    assert run_command(moe_baseline.command, ["sparse", str(job / "llama"), "--out", str(out), "--mix-steps", "0"]) == 0
    both = [load_language_model(folder) for folder in (job / "llama", out / "model")]
    values = [perplexity(m.model, m.tokens(job / "code.txt")) for m in both]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert "read back bit by bit" in capsys.readouterr().out
    assert run_command(moe_report.command, [str(out / "model"), "--dense", str(job / "llama"), *text_options(job)]) == 0
    assert "ffn: 2 mixtures" in capsys.readouterr().out


def test_the_five_lines_of_the_page_run(job, tmp_path, monkeypatch):
    """`docs/moe.md` upcycles a folder named smollm2; here it is the tiny Llama."""
    page = (Path(upcycle3d.__file__).parent / "docs/moe.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "load_language_model(" in b)
    (tmp_path / "smollm2").symlink_to(job / "llama")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    again = load_language_model(tmp_path / "smollm2-moe")
    assert again.model.config.model_type == "mixtral"


def test_what_is_missing_is_said(job, tmp_path, capsys):
    with pytest.raises(InvalidInput, match="holds no model"):
        load_language_model(tmp_path)
    with pytest.raises(InvalidInput, match="NAME=FILE"):
        named_texts(["code.txt"])
    (tmp_path / "mixture.safetensors").write_bytes(b"damaged")
    with pytest.raises(InvalidInput):
        load_language_model(tmp_path)


# ---- files and options that would give a wrong result without a word


def said_by(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["../model", ".", "a/b", ".hidden", "{tmp}/precious"])
def test_the_name_of_a_text_is_no_path(job, tmp_path, capsys, name):
    """A specialist replaced whatever folder stood at `specialists/NAME`: with a path as its name, any folder of the user."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    words = [
        str(job / "llama"),
        "--out",
        str(tmp_path / "out"),
        "--texts",
        f"{name.format(tmp=tmp_path)}={job / 'code.txt'}",
        *SMALL,
    ]
    assert run_command(moe_bam.command, words) == 2
    assert "cannot be a file name" in said_by(capsys)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_a_second_run_never_mixes_its_files_with_those_of_the_first(job, tmp_path, capsys):
    """The second of two runs wrote its own form beside the first one's Mixtral; a dense one deleted it."""
    words = [str(job / "llama"), "--out", str(tmp_path / "out"), "--mix-steps", "0"]
    assert run_command(moe_baseline.command, ["sparse", *words]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "model").iterdir()}
    for method in ("drop", "continued"):
        assert run_command(moe_baseline.command, [method, *words]) == 2
        assert "is not empty; move it away" in said_by(capsys)
    assert run_command(moe_baseline.command, ["continued", str(tmp_path / "out" / "model"), *words[1:]]) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "model").iterdir()} == before


def test_a_folder_that_is_no_specialist_is_not_replaced(job, tmp_path, capsys):
    (tmp_path / "out" / "specialists" / "code").mkdir(parents=True)
    (tmp_path / "out" / "specialists" / "code" / "notes.txt").write_text("mine")
    assert run_command(moe_bam.command, [str(job / "llama"), "--out", str(tmp_path / "out"), *text_options(job), *SMALL]) == 2
    assert "is not empty" in said_by(capsys)


def test_two_jobs_do_not_share_a_folder(job, tmp_path, capsys):
    with locked_folder(tmp_path / "out", "busy"):
        assert run_command(moe_baseline.command, ["sparse", str(job / "llama"), "--out", str(tmp_path / "out")]) == 2
    assert "another process works on the job" in said_by(capsys)


def test_specialists_may_stay_as_the_seed_is(job, tmp_path, capsys):
    words = [str(job / "llama"), "--out", str(tmp_path / "out"), *text_options(job), "--length", "8", "--specialist-steps", "0"]
    assert run_command(moe_bam.command, [*words, "--mix-steps", "0"]) == 0, capsys.readouterr()
    assert "no step" in capsys.readouterr().out


def changed_copy(job: Path, folder: Path, **config) -> Path:
    shutil.copytree(job / "llama", folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, "lack model.layers.2"),
        ({"num_hidden_layers": 1}, "also hold model.layers.1"),
        ({"vocab_size": 32}, "have other shapes of lm_head.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_refused(job, tmp_path, config, said):
    """The library draws missing weights at random and leaves out others, so a wrong `config.json` gave a wrong model."""
    with pytest.raises(InvalidInput, match=said):
        load_language_model(changed_copy(job, tmp_path / "changed", **config))


def test_damaged_weights_are_refused_by_a_sentence(job, tmp_path):
    folder = changed_copy(job, tmp_path / "changed")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InvalidInput, match="damaged or not complete"):
        load_language_model(folder)
    tensors = load_file(job / "llama" / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match=r"NaN or inf in model\.norm\.weight"):
        load_language_model(folder)


def test_a_tokenizer_of_another_model_is_refused(job, tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=5))
    folder = changed_copy(job, tmp_path / "changed")
    model.save_pretrained(folder)
    with pytest.raises(InvalidInput, match="the model knows 5"):
        load_language_model(folder).tokens(job / "code.txt")


def test_a_stored_configuration_cannot_name_other_code_or_fill_the_memory(job, tmp_path):
    """The description in a mixture's file may come from elsewhere: only language models of the library are built, no larger than the file."""
    source = load_language_model(job / "llama")
    plan = plan_replacement(source.model, experts=2)
    made = sparse_copy(source.model, plan, RandomRouters(experts=2, rule=TopKRule(k=2, norm="renorm")))
    config = json.loads(source.model.config.to_json_string(use_diff=False))

    def stored(model_class: str = "LlamaForCausalLM", text: str | None = None, **changed) -> Path:
        base = BaseModel(library="transformers", model_class=model_class, config=text or json.dumps({**config, **changed}))
        save_mixture(tmp_path / "mixture.safetensors", made.model, plan, base=base)
        return tmp_path

    assert load_language_model(stored(), tokenizer=False).model.config.hidden_size == 16
    assert load_language_model(stored(_attn_implementation="someone/kernels"), tokenizer=False).model is not None
    for model_class in ("os.system", "PreTrainedModel", "DetrForObjectDetection", "pipeline"):
        with pytest.raises(InvalidInput, match="no language model"):
            load_language_model(stored(model_class), tokenizer=False)
    for text in ("[]", "{", "null"):
        with pytest.raises(InvalidInput, match="stored configuration"):
            load_language_model(stored(text=text), tokenizer=False)
    with pytest.raises(InvalidInput, match="far more than the file holds"):
        load_language_model(stored(vocab_size=10**8), tokenizer=False)
    with pytest.raises(InvalidInput, match="cannot be used"):
        load_language_model(stored(hidden_size="x"), tokenizer=False)


def test_a_pattern_that_fits_no_attention_names_those_that_are_there(job, tmp_path, capsys):
    words = [str(job / "llama"), "--out", str(tmp_path / "out"), *text_options(job), *SMALL, "--only", "model.layers.1.mlp"]
    assert run_command(moe_bam.command, words) == 2
    assert "no attention fits 'model.layers.1.mlp'; there are model.layers.0.self_attn" in said_by(capsys)


def test_training_with_dropout_depends_on_its_seed_alone(job):
    """A job that was stopped and continued has drawn other numbers before, and must give the same model."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=31, attention_dropout=0.5))
    domains = TokenDomains({"a": torch.arange(60) % 31})
    losses = []
    for draw in (1, 2):
        torch.manual_seed(draw)
        losses.append(train_on(copy.deepcopy(model), domains, {"a": 1.0}, TextPhase(steps=3, length=16)).losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("words", [["--length", "1"], ["--length", "0"], ["--rows", "0"]])
def test_a_report_needs_rows_of_two_tokens(job, tmp_path, capsys, words):
    """Rows of one token have no next token: the perplexity was NaN without a word."""
    out = job / "for_report"
    if not out.exists():
        assert run_command(moe_baseline.command, ["sparse", str(job / "llama"), "--out", str(out), "--mix-steps", "0"]) == 0
    assert run_command(moe_report.command, [str(out / "model"), *text_options(job), *words]) == 2
    assert re.search("--(length|rows) must be", said_by(capsys))


def test_rows_longer_than_the_model_has_positions_are_refused(job, tmp_path, capsys):
    """Learned positions ended in an IndexError, computed ones in a silently worse score. Without a length, the model's own is taken."""
    out = job / "for_positions"
    assert run_command(moe_baseline.command, ["sparse", str(job / "llama"), "--out", str(out), "--mix-steps", "0"]) == 0
    assert run_command(moe_report.command, [str(out / "model"), *text_options(job), "--length", "65"]) == 2
    assert "longer than the model's 64 positions" in said_by(capsys)
    assert run_command(moe_report.command, [str(out / "model"), *text_options(job)]) == 0
    words = [
        "sparse",
        str(job / "llama"),
        "--out",
        str(tmp_path / "long"),
        *text_options(job),
        "--length",
        "100",
        "--mix-steps",
        "1",
    ]
    assert run_command(moe_baseline.command, words) == 2
    assert "longer than the model's 64 positions" in said_by(capsys)
    model = load_language_model(out / "model").model
    with pytest.raises(InvalidInput, match="64 positions"):
        perplexity(model, torch.zeros(200, dtype=torch.int64), length=100)


def test_a_report_compares_models_of_one_vocabulary(job, tmp_path, capsys):
    out = job / "for_vocabulary"
    assert run_command(moe_baseline.command, ["sparse", str(job / "llama"), "--out", str(out), "--mix-steps", "0"]) == 0
    other = changed_copy(job, tmp_path / "other")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=5)).save_pretrained(other)
    assert run_command(moe_report.command, [str(out / "model"), "--dense", str(other), *text_options(job)]) == 2
    assert "knows 31 tokens" in said_by(capsys)


def test_a_wrecked_model_has_a_perplexity(job):
    source = load_language_model(job / "llama")
    with torch.no_grad():
        source.model.lm_head.weight.mul_(1e6)
    assert perplexity(source.model, source.tokens(job / "code.txt")) == math.inf
