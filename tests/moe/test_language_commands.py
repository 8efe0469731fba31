"""`upcycle3d moe bam|baseline|report` on a tiny Hugging Face Llama: texts in, models out that load and report."""

import json
import re
from pathlib import Path

import pytest
import torch

import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.language.language_models import load_language_model, named_texts, perplexity
from upcycle3d.tools import moe_bam, moe_baseline, moe_report
from upcycle3d.tools.console import run_command

transformers = pytest.importorskip("transformers", reason="transformers is not installed; language models need it")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--batch", "2", "--length", "8", "--specialist-steps", "2", "--mix-steps", "2"]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, its tokenizer and two texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("job")
    words = [f"w{i}" for i in range(30)]
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder / "llama")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=31, max_position_embeddings=64))
    model.save_pretrained(folder / "llama")
    for name, start in (("code", 0), ("law", 15)):
        (folder / f"{name}.txt").write_text(" ".join(words[start + (i * i) % 15] for i in range(300)))
    return folder


def texts(job: Path) -> list[str]:
    return ["--texts", f"code={job / 'code.txt'}", f"law={job / 'law.txt'}"]


def test_bam_trains_branches_writes_a_mixture_and_reports(job, capsys):
    words = [str(job / "llama"), "--out", str(job / "bam"), "--general", "law", "--key-values", "shared", *texts(job), *SMALL]
    assert run_command(moe_bam.command, words) == 0
    assert (job / "bam" / "specialists" / "code" / "config.json").exists()
    assert not (job / "bam" / "specialists" / "law").exists()
    found = load_language_model(job / "bam" / "model")
    assert found.model.model.layers[0].self_attn.mixture.key_values == "shared"
    report = ["--dense", str(job / "llama"), *texts(job), "--json", str(job / "r.json"), "--layers"]
    assert run_command(moe_report.command, [str(job / "bam" / "model"), *report]) == 0
    said = capsys.readouterr().out
    assert "trainable" in said
    assert "balance 0.01" in said  # a loss that is silently off is a frequent complaint
    assert "attention: 2 mixtures" in said
    data = json.loads((job / "r.json").read_text())
    direct = perplexity(found.model, found.tokens(job / "code.txt"))
    assert data["scores"][0]["score"] == pytest.approx(direct)
    assert run_command(moe_bam.command, [*words[:-1], "0"]) == 0  # finished specialists are read, not trained
    assert "is kept" in " ".join(capsys.readouterr().out.split())


def test_a_specialist_of_other_training_or_texts_is_refused(job, capsys):
    """It would be mixed in silently, and the report would be about another model than the options say."""
    words = [str(job / "llama"), "--out", str(job / "again"), *SMALL]
    assert run_command(moe_bam.command, [*words, *texts(job)]) == 0
    assert run_command(moe_bam.command, [*words, *texts(job), "--specialist-lr", "0.5"]) == 2
    assert "training.lr: stored 0.0001, now 0.5" in " ".join(capsys.readouterr().err.split())
    swapped = ["--texts", f"code={job / 'law.txt'}", f"law={job / 'code.txt'}"]
    assert run_command(moe_bam.command, [*words, *swapped]) == 2
    assert "texts.code" in capsys.readouterr().err
    (job / "again" / "specialists" / "code" / "origin.json").write_text("{")
    assert run_command(moe_bam.command, [*words, *texts(job)]) == 2
    assert "origin.json" in capsys.readouterr().err


def test_training_in_bfloat16_gives_a_finite_mixture(job, capsys):
    words = [str(job / "llama"), "--out", str(job / "half"), "--precision", "bfloat16", *texts(job), *SMALL]
    assert run_command(moe_bam.command, words) == 0, capsys.readouterr()
    found = load_language_model(job / "half" / "model")
    assert 1 < perplexity(found.model, found.tokens(job / "code.txt")) < 1000


@pytest.mark.parametrize("method", ["sparse", "drop", "cluster", "btx", "soup", "wide", "continued", "flexolmo"])
def test_every_baseline_is_made_and_loads(job, method, capsys):
    out = job / f"base_{method}"
    words = [method, str(job / "llama"), "--out", str(out), "--experts", "3", *texts(job), *SMALL]
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
    assert run_command(moe_report.command, [str(out / "model"), "--dense", str(job / "llama"), *texts(job)]) == 0
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
    assert run_command(moe_bam.command, [str(job / "llama"), "--out", str(tmp_path / "x")]) == 2
    assert "nothing to mix" in " ".join(capsys.readouterr().err.split())
    assert run_command(moe_baseline.command, ["btx", str(job / "llama"), "--out", str(tmp_path / "x")]) == 2
    assert "btx mixes specialists" in " ".join(capsys.readouterr().err.split())
    assert run_command(moe_report.command, [str(job / "llama"), "--texts", f"a={job / 'code.txt'}"]) == 2
    assert "has no mixture to report on" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InvalidInput, match="holds no model"):
        load_language_model(tmp_path)
    with pytest.raises(InvalidInput, match="NAME=FILE"):
        named_texts(["code.txt"])
    (tmp_path / "mixture.safetensors").write_bytes(b"damaged")
    with pytest.raises(InvalidInput):
        load_language_model(tmp_path)
