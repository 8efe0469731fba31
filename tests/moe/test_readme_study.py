"""The study of Read-ME: every arm runs and is kept, arms differ where they must, splices compare the same tokens, and verdicts follow numbers."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.language.small_lm import SmallLmConfig
from upcycle3d.perception.moe.language.text_training import TokenDomains
from upcycle3d.perception.recipes.result_csv import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
STUDIES = Path(upcycle3d.__file__).parent / "benchmarks" / "studies"


@pytest.fixture
def study(monkeypatch):
    """The module of the study, imported as a script does; its tiny task has two domains of random tokens and no file is read."""
    monkeypatch.syspath_prepend(str(STUDIES))
    before = set(sys.modules)
    import moe_readme

    monkeypatch.setattr(moe_readme, "task_of", lambda model, sizes, folder, seed: task(seed))
    monkeypatch.setattr(moe_readme, "text_digests", lambda model: {})
    yield moe_readme
    for name in set(sys.modules) - before:
        if name.startswith(("moe_", "paired")):
            del sys.modules[name]


def task(seed: int = 0):
    from moe_readme_tasks import CarvingTask

    model = SmallLmConfig(vocabulary=20, width=16, hidden=40, layers=2, heads=2, kv_heads=2).build(seed).eval()
    model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    draw = torch.Generator().manual_seed(1)

    def tokens(domain: int, *shape: int) -> torch.Tensor:
        return torch.randint(10 * domain, 10 * domain + 10, shape, generator=draw)

    return CarvingTask(
        domains=("low", "high"),
        dense=model,
        embedding=model.embed_tokens.weight,
        body=lambda m, ids: m(ids),
        train=TokenDomains({"low": tokens(0, 400), "high": tokens(1, 400)}),
        tests=(tokens(0, 3, 16), tokens(1, 3, 16)),
        precision="float32",
    )


SIZES = {"calibration": 3, "length": 16, "train_length": 16, "batch": 4, "gate_width": 16, "router_steps": 2, "expert_steps": 2}


def test_every_arm_runs_once_and_the_table_holds_its_numbers(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.QUICK, "tiny", replace(study.QUICK["tiny"], **SIZES))
    words = ["moe_readme.py", "--model", "tiny", "--quick", "--out", str(tmp_path), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", words)
    study.main()
    printed = capsys.readouterr().out
    assert "the falsifier" in printed
    rows = read_rows(tmp_path / "results.csv")
    assert {(row["arm"], row["seed"]) for row in rows} == {(arm, seed) for arm in study.ARMS for seed in "0"}
    values = {(row["arm"], row["measure"], row.get("of", "")): float(row["value"]) for row in rows if row["seed"] == "0"}
    for arm in study.ARMS:
        parts = [math.log(values[arm, "perplexity", domain]) for domain in ("low", "high")]
        assert values[arm, "perplexity", "mean"] == pytest.approx(math.exp(sum(parts) / 2))
    trained = [f"tuned-{name}" for name in study.TRAINED]
    for arm in set(trained) - {"tuned-pooled_seconds"}:  # equal training
        assert values[arm, "steps", "experts"] == 4
        assert values[arm, "cpu", "experts"] > 0
        assert (values[arm, "cpu", "router"] > 0) == (arm.removeprefix("tuned-") in study.ROUTED)
    assert values["tuned-pooled_seconds", "steps", "experts"] >= 4
    assert len({values[arm, "perplexity", "mean"] for arm in trained}) == len(trained)  # no arm is another one by mistake
    assert values["own-50", "parameters", "active"] == values["wrong-50", "parameters", "active"]
    assert values["own-50", "perplexity", "mean"] != values["wrong-50", "perplexity", "mean"]
    assert ("tuned-layer_wise", "adjacent_information", "") in values
    assert ("tuned-readme", "adjacent_information", "") not in values
    study.main()
    assert "CPU-s\nseed" not in capsys.readouterr().out  # nothing is computed twice
    monkeypatch.setattr(sys, "argv", [*words, "--estimate"])
    study.main()
    assert "seeds: 1, together" in capsys.readouterr().out


def test_training_leaves_the_dense_model_its_embedding_and_its_output_alone(study):
    from moe_readme_arms import Bench, alternating

    made = task()
    sizes = replace(study.QUICK["tiny"], **SIZES)
    before = {name: tensor.clone() for name, tensor in made.dense.state_dict().items()}
    bench = Bench(made, sizes, 0)
    for name in ("dense", "pooled", "readme", "layer_wise"):
        arm = bench.trained(name, alternating(sizes, "float32", 0))
        after = arm.reader.model.state_dict()
        assert torch.equal(after["embed_tokens.weight"], before["embed_tokens.weight"])
        assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
        assert not torch.equal(after["norm.weight"], before["norm.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.dense.state_dict().items())


def test_a_splice_compares_the_same_tokens_behind_other_texts(study):
    """The oracle reads with the true expert on each side; the unspliced losses are those of the whole rows."""
    from moe_readme_arms import Bench, oracle
    from moe_readme_reading import Reader, read, read_tests, splice_measures

    made = task()
    bench = Bench(made, replace(study.QUICK["tiny"], **SIZES), 0)
    carving = bench.carving("own", 0.5)
    from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns

    reader = Reader(model=mask_ffns(made.dense, carving).eval(), decide=oracle(2))
    whole = read_tests(reader, made.tests, "float32")
    found = splice_measures(reader, reader, made.tests, whole, "float32")
    assert found["spliced"] == found["oracle"]
    later = torch.cat([whole[0].losses[:2, 7:], whole[1].losses[:2, 7:]])
    assert found["unspliced"]["0"] == pytest.approx(float(later[:, 0].mean()))
    assert found["unspliced"]["4"] == pytest.approx(float(later[:, 4:].mean()), rel=1e-5)
    row = torch.cat([made.tests[1][:1, :8], made.tests[0][:1, 8:]], 1)
    truth = torch.tensor([[1] * 8 + [0] * 8])
    alone = read(reader, row, truth, "float32")
    first = [read(reader, torch.cat([made.tests[1 - d][i : i + 1, :8], made.tests[d][i : i + 1, 8:]], 1),
                  torch.tensor([[1 - d] * 8 + [d] * 8]), "float32").losses[0, 7] for d in (0, 1) for i in (0, 1)]  # fmt: skip
    assert torch.equal(alone.losses[0, 7], first[0])
    assert found["spliced"]["0"] == pytest.approx(float(torch.stack(first).mean()), rel=1e-5)
    assert alone.chosen is not None
    assert torch.equal(alone.chosen, truth.expand(len(alone.chosen), 1, 16))


def test_the_readers_forms_agree_and_wrong_experts_are_other_experts(study):
    """The form to serve with the true domain reads as the masked form does."""
    from moe_readme_arms import Bench, oracle
    from moe_readme_reading import Reader, mean_losses, read_tests

    from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns

    made = task()
    bench = Bench(made, replace(study.QUICK["tiny"], **SIZES), 0)
    for name in ("own", "wrong", "random", "pooled"):
        served, carving = bench.untrained(name, 0.5)
        masked = Reader(model=mask_ffns(made.dense, carving).eval(), decide=None if name == "pooled" else oracle(2))
        one, other = (mean_losses(read_tests(reader, made.tests, "float32")) for reader in (served, masked))
        assert one == pytest.approx(other, rel=1e-5)


def test_a_study_that_is_divided_among_machines_ends_in_one_table(study, tmp_path):
    """Rows of seeds that are not here stay, those that are here are replaced, and rows of other settings are refused."""
    from upcycle3d.perception.recipes.result_cache import ResultCache

    def result(loss: float) -> dict:
        return {"loss": {"a": loss, "b": loss}, "cpu": {"experts": 2.0}}

    table, one, other = tmp_path / "results.csv", *(ResultCache(tmp_path / f"{n}", {"x": 1}) for n in range(2))
    for cache, seed, loss in ((one, 1, 1.0), (other, 0, 2.0), (one, 2, 3.0)):
        cache.write("dense", seed, result(loss))
        study.write_table(table, cache)
    one.write("dense", 1, result(1.5))
    study.write_table(table, one)
    found = study.read_table(table)["dense"]
    assert [found[seed]["loss"]["b"] for seed in (0, 1, 2)] == pytest.approx([2.0, 1.5, 3.0])
    assert [row["seed"] for row in read_rows(table) if row["measure"] == "cpu"] == ["0", "1", "2"]
    with pytest.raises(InvalidInput, match="other settings"):
        study.write_table(table, ResultCache(tmp_path / "2", {"x": 2}))


def test_verdicts_follow_the_intervals(study):
    """Read-ME is 0.1 below pooled pruning with a spread that matters or does not, and above the parent."""

    def found(spread: float) -> dict:
        noise = (-1.0, 0.5, 0.0, 1.0, -0.5)
        means = {"dense": 1.0, "tuned-dense": 0.9, "tuned-pooled": 1.5}
        every = {name: {s: {"loss": {"a": mean}} for s in range(5)} for name, mean in means.items()}
        return every | {"tuned-readme": {s: {"loss": {"a": 1.4 + spread * n}} for s, n in enumerate(noise)}}

    sure, unsure = study.verdicts(found(0.01)), study.verdicts(found(0.2))
    assert any("equal training" in line and line.endswith(": shown") for line in sure)
    assert "the falsifier did not fire" in sure
    assert [line.endswith("yes") for line in sure if "strictly" in line] == [True, True]
    assert any("falsifier fired" in line for line in unsure)
    assert [line.endswith("yes") for line in unsure if "strictly" in line] == [False, False]
    json.dumps(sure)
