"""Alternating training: who trains in which phase, which batches it sees, and that a stopped job ends where an uninterrupted one does."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.carving.activity import measure_activity
from upcycle3d.perception.moe.carving.alternating import FILE_NAME, AlternatingConfig, alternate
from upcycle3d.perception.moe.carving.distillation import DistillLoss, Overlaps, layer_distill_loss, measure_overlaps
from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns, masked_layers
from upcycle3d.perception.moe.carving.pre_gate import LayerRouter, PreGateConfig
from upcycle3d.perception.moe.carving.splits import readme_split
from upcycle3d.perception.moe.language.small_lm import SmallLmConfig
from upcycle3d.perception.moe.language.text_training import next_token_loss
from upcycle3d.perception.moe.layers.control_routers import given_routing
from upcycle3d.perception.moe.serving.language_carving import LanguageCarving
from upcycle3d.perception.moe.surgery.replacement import plan_replacement

CONFIG = AlternatingConfig(rounds=2, router_steps=3, expert_steps=4, router_lr=5e-3, expert_lr=5e-3, warmup=2)


class Job:
    """A small language model with two domains, its masked form, a pre-gate, and the losses of both kinds of phases."""

    def __init__(self, layer_wise: bool = False) -> None:
        dense = SmallLmConfig(vocabulary=20, width=16, hidden=24, layers=2, heads=2, kv_heads=2).build(0).eval()
        plan = plan_replacement(dense, experts=2, active=1)
        texts = {"low": [self.batch("router", 0) % 10], "high": [10 + self.batch("router", 1) % 10]}
        self.carving = readme_split(measure_activity(dense, plan, texts, lambda m, ids: m(ids), least_tokens=0), 0.5)
        make = (lambda site, ffn, units: LayerRouter(site.width_in, units.experts)) if layer_wise else None
        self.model = mask_ffns(dense, self.carving, make)
        gate = PreGateConfig(vocabulary=20, experts=2, width=16, heads=2).build(1)
        self.gate = gate
        self.routers = [layer.router for layer in masked_layers(self.model)] if layer_wise else [gate]
        self.layer_wise = layer_wise
        self.seen = []

    @staticmethod
    def batch(kind: str, step: int) -> torch.Tensor:
        return torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1000 * (kind == "router") + step))

    def batch_of(self, kind: str, step: int) -> torch.Tensor:
        self.seen.append((kind, step))
        return self.batch(kind, step)

    def router_loss(self, ids: torch.Tensor) -> torch.Tensor:
        overlaps = measure_overlaps(self.model, self.carving, lambda m: m(ids))
        if self.layer_wise:
            self.model(ids)
            return layer_distill_loss(self.model, self.carving, overlaps, DistillLoss())
        return DistillLoss()(self.gate(ids).logits, overlaps.targets().view(2, 6, 2))

    def expert_loss(self, ids: torch.Tensor) -> torch.Tensor:
        if self.layer_wise:
            return next_token_loss(self.model(ids).logits, ids)
        with given_routing(self.model, self.gate.decide(ids)):
            return next_token_loss(self.model(ids).logits, ids)

    def run(self, config: AlternatingConfig = CONFIG, **more):
        return alternate(self.model, self.routers, config, self.batch_of, self.router_loss, self.expert_loss, **more)

    def state(self) -> dict[str, torch.Tensor]:
        both = {"model": self.model, "gate": self.gate}
        return {f"{n}.{k}": v.clone() for n, m in both.items() for k, v in m.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("layer_wise", [False, True])
def test_phases_alternate_and_each_trains_only_its_own(layer_wise):
    job = Job(layer_wise)
    states, said = [job.state()], []

    def say(line: str) -> None:
        said.append(line)
        if ": step " not in line:  # a finished phase
            states.append(job.state())

    record = job.run(say=say)
    assert [p.phase.kind for p in record.phases] == ["router", "experts"] * 2
    assert job.seen == [(k, s) for r in range(2) for k, n in (("router", 3), ("experts", 4)) for s in range(r * n, r * n + n)]
    for number, (before, after) in enumerate(pairwise(states)):
        changed = moved(before, after)
        routers = {name for name in changed if name.startswith("gate.") or ".router." in name}
        assert changed
        assert (changed == routers) if number % 2 == 0 else not routers
    assert moved(states[1], states[2]) >= {"model.embed_tokens.weight", "model.layers.0.mlp.ffn.up", "model.norm.weight"}
    assert [line for line in said if ": step " not in line] == str(record).splitlines()
    assert [line for line in said if "round 2, experts: step" in line] == [
        f"round 2, experts: step {step} of 4, loss {record.phases[3].losses[step - 1]:.4f}" for step in (1, 2, 3)
    ]
    assert not job.model.training
    assert all(p.requires_grad for p in (*job.model.parameters(), *job.gate.parameters()))
    assert record.phases[1].trained == sum(p.numel() for n, p in job.model.named_parameters() if ".router." not in n)
    assert record.phases[2].phase.lr == pytest.approx(0.8 * 5e-3)


def test_a_stopped_job_ends_where_an_uninterrupted_one_does(tmp_path):
    """It is stopped in the middle of the third phase; the finished phases are kept, and the third is computed again."""
    whole = Job()
    wanted = whole.run()
    stopped, count = Job(), [0]
    real = stopped.router_loss

    def fails(ids: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return real(ids)

    stopped.router_loss = fails
    with pytest.raises(KeyboardInterrupt):
        stopped.run(folder=tmp_path)
    again = Job()
    record = again.run(folder=tmp_path)
    assert again.seen == whole.seen[7:]
    assert [p.losses for p in record.phases] == [p.losses for p in wanted.phases]
    assert not moved(whole.state(), again.state())
    finished = Job()
    assert finished.run(folder=tmp_path).phases == record.phases
    assert finished.seen == []
    assert not moved(whole.state(), finished.state())


def test_a_folder_of_another_job_or_a_damaged_file_is_refused(tmp_path):
    Job().run(AlternatingConfig(rounds=1, router_steps=1, expert_steps=0), folder=tmp_path)
    for config, job in ((CONFIG, ""), (AlternatingConfig(rounds=1, router_steps=1, expert_steps=0), "other data")):
        with pytest.raises(InvalidInput, match="belongs to another training"):
            Job().run(config, folder=tmp_path, job=job)
    data = bytearray((tmp_path / FILE_NAME).read_bytes())
    data[-5] ^= 1
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(InvalidInput, match="SHA-256"):
        Job().run(AlternatingConfig(rounds=1, router_steps=1, expert_steps=0), folder=tmp_path)


def test_the_control_without_alternation_has_the_same_phases_in_another_order():
    """Rates, too: with one long phase of each kind a better schedule would look like a loss by alternation."""
    once, every = CONFIG.once().phases(), CONFIG.phases()
    assert once == (every[0], every[2], every[1], every[3])
    assert [p.kind for p in every] == ["router", "experts"] * 2
    only = AlternatingConfig(rounds=2, router_steps=0, expert_steps=5)
    assert [(p.kind, p.first) for p in only.phases()] == [("experts", 0), ("experts", 5)]
    phase = AlternatingConfig(router_steps=100, warmup=10).phases()[0]
    rates = [phase.rate(step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(5e-5, rel=0.01)
    assert max(rates) == pytest.approx(5e-4, rel=0.05)
    assert rates[50] == pytest.approx(2.5e-4)
    assert 0 < rates[-1] < 1e-6


def test_frozen_weights_stay_frozen_and_nothing_to_train_is_an_error():
    job = Job()
    job.model.embed_tokens.weight.requires_grad_(False)
    before = job.state()
    job.run()
    assert "model.embed_tokens.weight" not in moved(before, job.state())
    assert not job.model.embed_tokens.weight.requires_grad
    with pytest.raises(InvalidInput, match="no parameter is left to train in the router phase"):
        alternate(job.model, [], CONFIG, job.batch_of, job.router_loss, job.expert_loss)
    with pytest.raises(InvalidInput, match="the loss is nan at step 0"):
        alternate(job.model, [job.gate], CONFIG, job.batch_of, lambda b: job.gate.head.weight.sum() * math.nan, job.expert_loss)


def test_distillation_learns_the_overlap_that_the_tokens_tell():
    """After training, the pre-gate finds the better expert of most tokens; at random it finds half of them."""
    job = Job()
    ids = torch.randint(0, 20, (16, 6), generator=torch.Generator().manual_seed(9))
    truth = measure_overlaps(job.model, job.carving, lambda m: m(ids)).best
    config = AlternatingConfig(rounds=1, router_steps=60, expert_steps=0, router_lr=2e-2)
    batch = lambda kind, step: torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(step))  # noqa: E731
    record = alternate(job.model, [job.gate], config, batch, job.router_loss, job.expert_loss)
    assert record.phases[0].losses[-1] < record.phases[0].losses[0]
    assert float((job.gate.decide(ids).index[:, 0] == truth).double().mean()) > 0.8


def test_a_plain_module_trains_without_any_router():
    """The baselines: dense models and pooled units."""
    model = nn.Linear(3, 1)
    before = model.weight.clone()
    config = AlternatingConfig(rounds=1, router_steps=0, expert_steps=3, expert_lr=0.1)
    record = alternate(model, [], config, lambda k, s: torch.ones(1, 3), lambda b: b.sum(), lambda b: model(b).square().mean())
    assert not torch.equal(before, model.weight)
    assert len(record.phases) == 1


def test_a_few_steps_of_the_defaults_teach_a_gate_small_differences():
    """On SmolLM2 the overlaps of a token with four experts differ by about 0.02, and the share of right decisions decides the quality."""
    defaults = LanguageCarving()
    training = replace(defaults.training, router_steps=40)
    draw = torch.Generator().manual_seed(0)
    best = torch.randint(0, 4, (40,), generator=draw)
    base = 0.27 + 0.02 * torch.nn.functional.one_hot(best, 4) + 0.005 * torch.randn(40, 4, generator=draw)
    embedding = torch.randn(40, 64, generator=draw)
    gate = PreGateConfig(vocabulary=40, experts=4, width=64).build(0, embedding=embedding)

    def batch_of(kind: str, step: int) -> torch.Tensor:
        return torch.randint(0, 40, (4, 32), generator=torch.Generator().manual_seed(step))

    def loss(ids: torch.Tensor) -> torch.Tensor:
        target = Overlaps(sites=base[ids.flatten()][None], config=defaults.overlap).targets()
        return DistillLoss()(gate(ids).logits.flatten(0, 1), target)

    alternate(nn.Linear(1, 1), [gate], training, batch_of, loss, loss)
    ids = batch_of("router", 1000)
    assert float((gate.decide(ids).top1 == base[ids.flatten()].argmax(1)).double().mean()) > 0.9
