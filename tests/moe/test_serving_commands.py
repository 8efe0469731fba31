"""`upcycle3d moe readme|serve|simulate`: texts in, files to serve out, an answered request, and tables that are the same everywhere."""

import json
import urllib.error
import urllib.request

import pytest

from moe_served import listening
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.recorded_decisions import DecisionSource, RecordedDecisions, write_decisions
from upcycle3d.tools import moe_readme, moe_serve, moe_simulate
from upcycle3d.tools.console import run_command
from upcycle3d.tools.serving_options import cache_of, policy_of, read_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sizes_are_read_and_nonsense_is_refused():
    assert [read_bytes(text, "--budget") for text in ("200MB", "1.5 GB", "17", "2kB", "3B")] == [
        200_000_000,
        1_500_000_000,
        17,
        2000,
        3,
    ]
    for wrong in ("", "MB", "-1MB", "1 PB", "1e9"):
        with pytest.raises(InvalidInput, match="--budget takes a size"):
            read_bytes(wrong, "--budget")
    assert policy_of("prefill_first").__name__ == "prefill_first"
    assert cache_of("random", 3).seed == 3


def test_simulate_compares_arms_and_repeats_its_numbers(capsys, tmp_path):
    words = [
        "--trace.requests",
        "40",
        "--trace.rate",
        "300",
        "--trace.locality",
        "sticky",
        "--layers",
        "3",
        "--cache",
        "lru",
        "belady",
        "--json",
        str(tmp_path / "s.json"),
    ]
    said = []
    for _ in range(2):
        assert run_command(moe_simulate.command, words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    head = said[0].splitlines()[0]
    for arm in ("first_in_first_out, lru", "expert_aware, belady", "expert_aware, belady, nothing ahead"):
        assert arm in head
    reports = json.loads((tmp_path / "s.json").read_text())
    assert len(reports) == 5
    assert {report["served"] for report in reports.values()} == {40}
    assert reports["expert_aware, belady, nothing ahead"]["memory"]["ahead_bytes"] == 0


def test_simulate_shows_that_batches_by_expert_need_fewer_experts(capsys, tmp_path):
    """With more waiting than a batch holds, and decode steps, of which each needs one expert."""
    shape = ["--tokens", "12", "--trace.prompt", "1", "4", "--trace.new-tokens", "10", "20", "--layers", "1", "--budget", "70MB"]
    words = ["--trace.requests", "60", "--trace.rate", "1000", *shape, "--no-control", "--json", str(tmp_path / "s.json")]
    assert run_command(moe_simulate.command, words) == 0
    reports = json.loads((tmp_path / "s.json").read_text())
    fifo, aware = (reports[f"{name}, belady"]["unique_experts"] for name in ("first_in_first_out", "expert_aware"))
    assert aware < 0.75 * fifo


def test_simulate_takes_the_decisions_of_a_file(capsys, tmp_path):
    """Every token chose expert 1, so every batch needs one expert."""
    source = DecisionSource(name="drive", experts=(1,) * 30)
    write_decisions(tmp_path / "d.json", RecordedDecisions(experts=3, sources=(source,)))
    shape = ["--trace.experts", "3", "--trace.requests", "20", "--trace.prompt", "1", "4", "--trace.new-tokens", "2", "9"]
    words = [*shape, "--recorded", str(tmp_path / "d.json"), "--json", str(tmp_path / "s.json")]
    assert run_command(moe_simulate.command, words) == 0, capsys.readouterr().err
    reports = json.loads((tmp_path / "s.json").read_text())
    assert {report["unique_experts"] for report in reports.values()} == {1.0}


def test_simulate_says_what_does_not_fit(capsys):
    assert run_command(moe_simulate.command, ["--layers", "1", "--trace.requests", "10"]) == 0
    assert "need" in capsys.readouterr().err  # experts of a prompt do not fit together
    assert run_command(moe_simulate.command, ["--budget", "1kB"]) == 2
    assert "raise the budget" in " ".join(capsys.readouterr().err.split())
    assert run_command(moe_simulate.command, ["--budget", "much"]) == 2
    assert "takes a size" in capsys.readouterr().err


def test_serve_says_what_is_missing(capsys, tmp_path):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed; the extra `serve` brings it")
    assert run_command(moe_serve.command, [str(tmp_path), "--budget", "1MB"]) == 2
    assert "there is no backbone of a served model" in " ".join(capsys.readouterr().err.split())
    for words, message in (
        (["--port", "70000"], "0..65535"),
        (["--longest", "1"], "longest must be in"),
        (["--grace", "-1"], "grace"),
    ):
        assert run_command(moe_serve.command, [str(tmp_path), "--budget", "1MB", *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a tiny Llama, its tokenizer and two texts."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; `moe readme` carves its Llama")
    import torch
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
    config = transformers.LlamaConfig(**sizes, vocab_size=31, max_position_embeddings=64, eos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    for name, start in (("code", 0), ("law", 15)):
        (folder / f"{name}.txt").write_text(" ".join(words[start + (i * i) % 15] for i in range(400)))
    return folder


def readme_words(job, out: str) -> list[str]:
    texts = ["--texts", f"code={job / 'code.txt'}", f"law={job / 'law.txt'}"]
    small = ["--length", "16", "--batch", "2", "--gate-steps", "3", "--expert-steps", "2", "--gate-width", "8", "--rows", "20"]
    return [str(job / "llama"), "--out", str(job / out), *texts, *small]


def test_readme_carves_writes_and_the_result_answers_a_request_over_http(job, capsys):
    assert run_command(moe_readme.command, [*readme_words(job, "plan"), "--plan-only"]) == 0
    assert "12 of 24 units" in capsys.readouterr().out
    assert not (job / "plan").exists()
    assert run_command(moe_readme.command, [*readme_words(job, "out"), "--json", str(job / "n.json")]) == 0, (
        capsys.readouterr().err
    )
    said = capsys.readouterr().out
    assert "pooled" in said
    assert "shared" in said
    numbers = json.loads((job / "n.json").read_text())
    assert set(numbers["perplexity"]["law"]) == {"dense", "pooled", "carved"}
    assert run_command(moe_readme.command, readme_words(job, "out")) == 2  # a result is never overwritten
    assert {path.name for path in (job / "out" / "model").iterdir()} >= {
        "backbone.safetensors",
        "experts.safetensors",
        "carved.safetensors",
    }
    pytest.importorskip("uvicorn", reason="uvicorn is not installed; the extra `serve` brings it")
    from upcycle3d.perception.moe.serving.completion_server import CompletionServer
    from upcycle3d.perception.moe.serving.completions import completions_app
    from upcycle3d.perception.moe.serving.hugging_face_coder import HuggingFaceCoder
    from upcycle3d.perception.moe.serving.served_models import open_served

    config = moe_serve.MoeServe(folder=job / "out" / "model", budget="1MB", keys_values="1MB", tokens=64)
    served = open_served(config.folder)
    settings = moe_serve.serving_config(config)
    assert "always in memory" in moe_serve.describe(served, settings)
    server = CompletionServer(served, HuggingFaceCoder(config.folder), settings)
    with listening(completions_app(server)) as address:

        def post(body) -> dict:
            call = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
            with urllib.request.urlopen(call, timeout=20) as answer:
                return json.loads(answer.read())

        answer = post({"prompt": "w1 w2 w3", "max_tokens": 4, "temperature": 0})
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        assert len(answer["choices"][0]["text"].split()) == 4
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post({"prompt": "w1", "max_tokens": 100})
    assert not server.healthy


def test_readme_refuses_one_text_and_short_ones(job, capsys):
    words = [str(job / "llama"), "--out", str(job / "bad"), "--texts", f"code={job / 'code.txt'}"]
    assert run_command(moe_readme.command, words) == 2
    assert "two texts or more" in capsys.readouterr().err
    (job / "short.txt").write_text("w1 w2 w3")
    assert run_command(moe_readme.command, [*words, f"law={job / 'short.txt'}", "--length", "16"]) == 2
    assert "fills no row of 16" in " ".join(capsys.readouterr().err.split())
