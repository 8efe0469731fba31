"""The studies of BAM: cells are computed once, marks cost the same seconds, all compute is counted, and the table says what the cells say."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import upcycle3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.language.small_lm import SmallLmConfig
from upcycle3d.perception.moe.language.text_training import TokenDomains, next_token_loss

STUDIES = Path(upcycle3d.__file__).parent / "benchmarks" / "studies"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def studies(monkeypatch):
    """Imports the studies as a script does: their folder is the first on the path."""
    monkeypatch.syspath_prepend(str(STUDIES))
    before = set(sys.modules)
    import moe_arms
    import moe_cells

    yield moe_arms, moe_cells
    for name in set(sys.modules) - before:
        if name.startswith("moe_"):
            del sys.modules[name]


def tiny_task(moe_arms):
    class Tiny(moe_arms.Task):
        domains, specialties, precision = ("a", "b", "c"), ("b", "c"), "float32"

        def __init__(self):
            draw = torch.Generator().manual_seed(0)
            rows = {d: torch.randint(5 * i, 5 * i + 5, (200,), generator=draw) for i, d in enumerate(self.domains)}
            self.train = TokenDomains(rows)
            self.held = {d: [torch.randint(5 * i, 5 * i + 5, (2, 8), generator=draw)] for i, d in enumerate(self.domains)}

        def seed_model(self, seed):
            return SmallLmConfig(vocabulary=15, width=8, hidden=8, layers=1, heads=2, kv_heads=1).build(seed)

        def batch(self, shares, seed, step):
            return self.train.batch(shares, count=2, length=8, seed=seed, step=step)

        def loss(self, model, batch):
            return next_token_loss(model(batch).logits, batch)

        def log_probabilities(self, model, batch):
            return model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()

        def tests(self, domain):
            return self.held[domain]

    return Tiny


def test_every_arm_runs_is_kept_and_is_counted(studies, tmp_path, capsys):
    moe_arms, moe_cells = studies
    budget = moe_arms.Budget(branch_steps=3, mix_steps=6, branch_lr=1e-2, mix_lr=1e-2, longest=2.0)
    study = moe_cells.Study(tmp_path / "out", tiny_task(moe_arms), budget, {"x": 1}, cost_steps=1)
    costs = dict.fromkeys(moe_arms.ARMS, 1.0) | {"bam_scaled": 3.0, "bam_soft_ffn": 6.0, "dense": 0.25, "dense_all_compute": 0.25}
    (tmp_path / "out" / "seed0").mkdir()
    (tmp_path / "out" / "seed0" / "costs.json").write_text(json.dumps({"costs": costs}))
    arms = [*moe_arms.UNTRAINED, *moe_arms.ARMS]
    moe_cells.run_study(study, [0], arms, tmp_path / "results.csv", ("a", "b", "c"))
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == set(arms)
    steps = {(row["arm"], row["mark"]): int(row["steps"]) for row in rows}
    assert steps["btx_soft", "data"] == steps["btx_soft", "seconds"] == steps["bam_scaled", "data"] == 6
    assert steps["bam_scaled", "seconds"] == 2  # three times as expensive
    assert steps["bam_soft_ffn", "seconds"] == 1
    assert steps["dense", "seconds"] == 12  # four times cheaper, and not more than twice the steps
    assert steps["dense_all_compute", "data"] >= steps["dense", "data"]
    for row in rows:
        mean = math.exp(sum(math.log(float(row[f"perplexity_{d}"])) for d in "abc") / 3)
        assert float(row["perplexity"]) == pytest.approx(mean, rel=1e-4)
        assert (float(row["branch_cpu_seconds"]) > 0) == row["arm"].startswith(("bam", "btx", "soup", "ensemble", "specialist"))
    capsys.readouterr()
    moe_cells.run_study(study, [0], arms, tmp_path / "results.csv", ("a", "b", "c"))
    assert "CPU-s  {" not in capsys.readouterr().out  # nothing is computed twice
    with pytest.raises(SystemExit, match="other settings"):
        moe_cells.Study(tmp_path / "out", tiny_task(moe_arms), budget, {"x": 2}, cost_steps=1)


def test_the_oracle_is_each_domains_own_model_and_costs_are_measured(studies, tmp_path):
    moe_arms, moe_cells = studies
    budget = moe_arms.Budget(branch_steps=8, mix_steps=2, branch_lr=3e-2, mix_lr=1e-2)
    study = moe_cells.Study(tmp_path, tiny_task(moe_arms), budget, {}, cost_steps=1)
    found = study.branches(0)
    oracle, _ = moe_arms.untrained_losses(study.task, found, "specialist_oracle")
    assert oracle["a"] == moe_arms.evaluate(study.task, found.seed)["a"]
    assert (
        oracle["b"] == moe_arms.evaluate(study.task, found.specialists[0])["b"] < moe_arms.evaluate(study.task, found.seed)["b"]
    )
    again = study.branches(0)
    assert all(torch.equal(p, q) for p, q in zip(found.specialists[1].parameters(), again.specialists[1].parameters()))
    costs = study.costs(found)
    assert set(costs) == set(moe_arms.ARMS)
    assert all(cost > 0 for cost in costs.values())


def test_intervals_are_of_paired_differences(studies, tmp_path):
    _, moe_cells = studies
    lines = ["seed,arm,mark,perplexity"]
    for seed, base in enumerate((10.0, 20.0, 15.0)):
        lines += [f"{seed},btx_soft,data,{base}", f"{seed},bam,data,{base * 0.9}"]
    (tmp_path / "r.csv").write_text("\n".join(lines))
    rows = {row[0]: row for row in moe_cells.summary(tmp_path / "r.csv")}
    assert rows["bam"][3] == "-10.00 ± 0.00 %"


def test_a_study_that_is_divided_among_machines_ends_in_one_table(studies, tmp_path):
    """Rows of seeds that are not run here stay in the table; those that are run here are replaced."""
    _, moe_cells = studies

    class Folder:
        folder = tmp_path

        def branch_seconds(self, seed):
            return 5.0

    for seed in (0, 1):
        cell = {"marks": {"none": {"steps": 0, "cpu_seconds": 0.0, "loss": {"a": 1.0 + seed}}}, "parameters": 3}
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "soup.json").write_text(json.dumps(cell | {"start_loss": {"a": 2.0}}))
    table = tmp_path / "results.csv"
    for seeds in ([1], [0], [1]):
        moe_cells.write_csv(table, Folder(), seeds, ["soup"], ["a"])
    rows = list(csv.DictReader(table.open()))
    assert [(int(row["seed"]), float(row["perplexity"])) for row in rows] == [
        (0, pytest.approx(math.e, rel=1e-4)),
        (1, pytest.approx(math.e**2, rel=1e-4)),
    ]
    with pytest.raises(InvalidInput, match="other columns"):
        moe_cells.write_csv(table, Folder(), [0], [], ["b"])
