"""Reports, checkpoints of attention mixtures, training phases and owners: what they say is what happened."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle3d.core.config_json import config_from_json, config_to_json
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.short_numbers import score_text, seconds_text
from upcycle3d.perception.moe.attention.attention_sites import plan_attentions
from upcycle3d.perception.moe.attention.model_cost import model_cost
from upcycle3d.perception.moe.checkpoints.checkpoint import MixtureDescription, load_mixture, read_description, save_mixture
from upcycle3d.perception.moe.language.small_lm import SmallLm, SmallLmConfig
from upcycle3d.perception.moe.language.text_training import (
    TextTraining,
    TokenDomains,
    draw_rows,
    mean_loss,
    next_token_loss,
    train_phase,
)
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routers import TopKRouter
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.report import report_on
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.bam import AttentionRouting, bam
from upcycle3d.perception.moe.upcycling.joined_mixtures import join_mixtures
from upcycle3d.perception.moe.upcycling.owner_training import freeze_for_owner
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, Upcycled, sparse_copy, wider_dense

TOP2 = TopKRule(k=2, norm="renorm")
pytestmark = pytest.mark.usefixtures("one_thread")


def small(seed: int = 1) -> SmallLm:
    return SmallLmConfig(vocabulary=20, width=16, hidden=24, layers=2, heads=2, kv_heads=1).build(seed).eval()


def branch(model: nn.Module, seed: int, step: float = 0.02) -> nn.Module:
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor += step * torch.randn(tensor.shape, generator=draw)
    return other


def mixed(scale: float = 3.0, **routing) -> tuple[SmallLm, Upcycled]:
    seed = small()
    made = bam(
        [branch(seed, 1), branch(seed, 2)],
        plan_replacement(seed, experts=3, active=1),
        plan_attentions(seed, experts=3, key_values="shared"),
        RandomRouters(experts=3, rule=TopKRule(k=1, norm="none"), std=0.3),
        seed=seed,
        routing=AttentionRouting(**routing),
        expert_scale=scale,
    )
    return seed, made


def tokens(domain: int) -> Tensor:
    return torch.randint(10 * domain, 10 * domain + 10, (4, 12), generator=torch.Generator().manual_seed(domain))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return next_token_loss(model(ids).logits, ids)


SCORES = {f"domain{d}": (lambda m, d=d: math.exp(mean_loss(m, [tokens(d)], loss))) for d in (0, 1)}


# ---- report


def test_a_report_counts_use_cost_and_quality():
    seed, made = mixed()
    report = report_on(made.model.eval(), SCORES, dense=seed)
    assert report.parameters == sum(p.numel() for p in made.model.parameters())
    idle = sum(p.numel() for _, layer in moe_layers(made.model) for p in layer.bank.parameters()) * 2 // 3
    assert report.active == report.parameters - idle
    assert report.dense_parameters == sum(p.numel() for p in seed.parameters())
    assert [s.domain for s in report.scores] == ["domain0", "domain1"]
    assert report.scores[0].dense == pytest.approx(SCORES["domain0"](seed))
    assert len(report.layers) == 4
    assert all(sum(shares) == pytest.approx(1) for layer in report.layers for shares in layer.shares)
    assert report.trained_banks == 2
    assert "domain0: perplexity" in str(report)


def test_the_domain_tells_everything_where_each_has_its_own_expert_and_nothing_where_routing_is_blind():
    seed = small()
    made = sparse_copy(
        seed, plan_replacement(seed, experts=2, active=1), RandomRouters(experts=2, rule=TopKRule(k=1, norm="none"))
    ).model

    class OfPart(TopKRouter):
        def forward(self, x, places=None):
            logits = torch.full((len(x), 2), 9.0)
            logits[:, 1 - self.part] = -9.0
            return self.rule.route(logits)

    for _, layer in moe_layers(made):
        layer.router = OfPart(16, 2, layer.router.rule)

    def run(model, part):
        for _, layer in moe_layers(model):
            layer.router.part = part
        return math.exp(mean_loss(model, [tokens(0)], loss))

    told = report_on(made.eval(), {"a": lambda m: run(m, 0), "b": lambda m: run(m, 1)})
    blind = report_on(made, {"a": lambda m: run(m, 0), "b": lambda m: run(m, 0)})
    assert told.layers[0].information == pytest.approx(1.0)
    assert blind.layers[0].information == pytest.approx(0.0)
    assert blind.layers[0].dead == (1,)
    assert any("served no token" in text for text in blind.warnings)


def test_a_bad_start_dead_experts_and_equal_rows_are_warned_of():
    """Fresh gates on split experts once raised a perplexity from 5 to 314,616 unseen; here twice the dense one is enough for a warning."""
    seed, made = mixed()
    calm = report_on(made.model.eval(), SCORES, dense=seed)
    assert not [w for w in calm.warnings if "dense model" in w]
    bad = report_on(made.model, {"x": lambda m: 40.0 if m is made.model else 9.0}, dense=seed)
    assert "perplexity of x is 40, and 9 for the dense model" in bad.warnings[0]
    recall = report_on(made.model, {"x": lambda m: 0.1 if m is made.model else 0.5}, dense=seed, quality="recall")
    assert "recall of x" in recall.warnings[0]
    with torch.no_grad():
        router = moe_layers(made.model)[0][1].router
        router.weight[1] = router.weight[0]
    assert any("are equal" in text for text in report_on(made.model, SCORES).warnings)


def test_a_dense_model_gets_scores_and_cost_without_use_of_experts():
    """A soup and a wider model are results too; a refusal left them without a comparison."""
    seed = small()
    dense = report_on(seed, SCORES)
    assert dense.layers == ()
    assert dense.active == dense.parameters
    wide = wider_dense(seed, plan_replacement(seed, experts=3, active=2)).model
    report = report_on(wide.eval(), SCORES, dense=seed)
    assert report.layers == ()
    assert report.scores[0].score == pytest.approx(report.scores[0].dense)


def test_a_report_names_what_is_wrong_with_its_scores_and_its_measure():
    """A bare function ended in an AttributeError, and recall was printed as perplexity."""
    model = mixed()[1].model.eval()
    for wrong, said in ((lambda m: 0.5, "found a function"), ({"x": 0.5}, "found a float"), (None, "found a NoneType")):
        with pytest.raises(InvalidInput, match=f"mapping of names of domains.*{said}"):
            report_on(model, wrong)
    with pytest.raises(InvalidInput, match="at least one domain"):
        report_on(model, {})
    with pytest.raises(InvalidInput, match="more_is_better=True or"):
        report_on(model, SCORES, quality="R@5")
    report = report_on(model, {"x": lambda m: 0.1 if m is model else 0.5}, dense=small(), quality="R@5", more_is_better=True)
    assert "x: R@5 0.1" in str(report)
    assert "R@5 of x is 0.1, and 0.5" in report.warnings[0]


def test_a_report_shows_the_names_of_experts():
    model = mixed()[1].model.eval()
    report = report_on(model, SCORES, experts=("seed", "code", "law"))
    assert "experts: 0 seed, 1 code, 2 law" in str(report)


def test_the_cost_of_a_model_is_what_its_maps_multiply():
    """Counted by hand: every matrix once per token, k of E experts, every attention expert, two products with the keys per head."""
    seed, made = mixed()
    before, after = model_cost(seed, context=10), model_cost(made.model, context=10)
    head, attention, ffn, attend = 20 * 16, 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 24, 2 * 10 * 16
    assert before.multiply_adds == head + 2 * (attention + ffn + attend)
    shared = (
        3 * (2 * 16 * 16 + attend) + 2 * 16 * 8 + 3 * 16
    )  # three query and output maps and a router, one map of keys and values
    assert after.multiply_adds == head + 2 * (shared + ffn + 3 * 16)
    assert before.active == before.stored == sum(p.numel() for p in seed.parameters())
    assert after.stored - after.active == 2 * 2 * ffn
    assert [model_cost(nn.MultiheadAttention(8, 2), context=5).multiply_adds] == [4 * 8 * 8 + 2 * 5 * 8]


def test_a_result_prints_in_one_line():
    """Its default form was the whole model and its account, thousands of characters."""
    made = mixed()[1]
    assert str(made) == "Upcycled(SmallLm, 2 FFNs with 3 experts, 2 attentions with 3 experts)"
    assert len(repr(sparse_copy(small(), plan_replacement(small(), experts=2), RandomRouters(experts=2, rule=TOP2)))) < 100


def test_short_numbers():
    """A wrecked model's perplexity filled the table with digits, and seconds below 1 were all 0."""
    assert [score_text(x) for x in (3.14159, 10_000.0, 912345678.0, math.inf, None)] == [
        "3.142",
        "10000.000",
        "9.1e+08",
        "inf",
        "-",
    ]
    assert [seconds_text(x) for x in (0.04, 9.94, 9.96, 123.4, None)] == ["0.0", "9.9", "10", "123", "?"]


# ---- checkpoints with attentions


def test_a_checkpoint_keeps_attention_mixtures_and_their_rule(tmp_path):
    made = mixed(top_k=2, renormalize=True)[1]
    path = tmp_path / "mixture.safetensors"
    save_mixture(path, made.model, made.plan, attentions=made.attentions, note="tiny")
    assert "keys and values shared, the 2 largest weights, renormalized" in str(read_description(path))
    again = load_mixture(path, small(7)).model
    assert torch.equal(again(tokens(0)).logits, made.model.eval()(tokens(0)).logits)
    assert again.layers[0].self_attn.mixture.top_k == 2


def test_a_checkpoint_keeps_the_names_of_experts_and_older_ones_have_none(tmp_path):
    made, path = mixed()[1], tmp_path / "mixture.safetensors"
    save_mixture(path, made.model, made.plan, attentions=made.attentions, experts=("seed", "code", "law"))
    assert read_description(path).experts == ("seed", "code", "law")
    with pytest.raises(InvalidInput, match="2 names of experts"):
        save_mixture(path, made.model, made.plan, attentions=made.attentions, experts=("seed", "code"))
    older = config_to_json(read_description(path))
    del older["experts"]
    assert config_from_json(MixtureDescription, older).experts == ()


def test_attention_mixtures_cannot_get_lost_on_the_way_to_a_file(tmp_path):
    seed, made = mixed()
    with pytest.raises(InvalidInput, match="has a mixture of attentions at"):
        save_mixture(tmp_path / "x", made.model, made.plan)
    plain = sparse_copy(seed, plan_replacement(seed, experts=3, active=2), RandomRouters(experts=3, rule=TOP2))
    with pytest.raises(InvalidInput, match="lacks a mixture of attentions at"):
        save_mixture(tmp_path / "x", plain.model, plain.plan, attentions=made.attentions)


# ---- training phases


def test_batches_are_a_function_of_seed_and_step_and_keep_the_shares():
    domains = TokenDomains({"a": torch.zeros(50).long(), "b": torch.ones(50).long()})
    first = domains.batch({"a": 3, "b": 1}, count=8, length=5, seed=1, step=2)
    assert torch.equal(first, domains.batch({"a": 3, "b": 1}, count=8, length=5, seed=1, step=2))
    assert int(first[:, 0].sum()) == 2
    many = [row for step in range(200) for row in draw_rows({"a": 0.9, "b": 0.1}, 2, torch.Generator().manual_seed(step))]
    assert 0.05 < sum(many) / len(many) < 0.15
    with pytest.raises(InvalidInput, match="at least 60 tokens"):
        domains.batch({"a": 1}, count=1, length=60, seed=0, step=0)


def test_the_loss_is_the_textbook():
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    wanted = -sum(float(F.log_softmax(logits[b, t], -1)[ids[b, t + 1]]) for b in range(2) for t in range(4)) / 8
    assert float(next_token_loss(logits, ids)) == pytest.approx(wanted, rel=1e-5)


def test_a_phase_trains_marks_and_counts_seconds():
    model, seen = small(), []
    record = train_phase(
        model,
        lambda step: tokens(0),
        loss,
        TextTraining(steps=6, lr=1e-2),
        marks=(2, 6),
        at_mark=lambda s, cpu: seen.append((s, cpu)),
    )
    assert record.losses[-1] < record.losses[0]
    assert [s for s, _ in seen] == [2, 6]
    assert 0 < seen[0][1] < seen[1][1] == record.cpu_seconds
    with pytest.raises(InvalidInput, match="loss is nan"):
        train_phase(small(), lambda step: tokens(0), lambda m, b: loss(m, b) * math.nan, TextTraining(steps=1))
    with pytest.raises(InvalidInput, match="nothing to train"):
        train_phase(small().requires_grad_(False), lambda step: tokens(0), loss, TextTraining(steps=1))


def test_an_expert_that_no_token_chose_does_not_stop_a_phase():
    """Its gradient is zero and not None; a hang or an error here has ended trainings elsewhere."""
    seed = small()
    made = sparse_copy(
        seed, plan_replacement(seed, experts=4, active=1), RandomRouters(experts=4, rule=TopKRule(k=1, norm="none"))
    ).model
    record = train_phase(made, lambda step: tokens(0)[:1, :2], loss, TextTraining(steps=2))
    assert all(math.isfinite(value) for value in record.losses)
    assert all(p.grad is not None for _, layer in moe_layers(made) for p in layer.bank.parameters())


# ---- owners


def test_owners_change_their_own_expert_only_and_join():
    seed, owners = small(), []
    for number in range(2):
        made = sparse_copy(seed, plan_replacement(seed, experts=2), RandomRouters(experts=2, rule=TOP2, seed=number)).model
        before = {name: value.clone() for name, value in made.state_dict().items()}
        held = freeze_for_owner(made)
        train_phase(made, lambda step, n=number: tokens(n), loss, TextTraining(steps=3, lr=1e-2))
        held.restore(made)
        for name, value in made.state_dict().items():
            if ".bank." in name:
                assert torch.equal(value[0], before[name][0])
                assert not torch.equal(value[1], before[name][1])
            elif "router" in name:
                assert not value[0].any()
            else:
                assert torch.equal(value, before[name])
        owners.append(made)
    joined = join_mixtures(owners, TOP2).model
    assert moe_layers(joined)[0][1].bank.shape.experts == 3
    with pytest.raises(InvalidInput, match="no mixture"):
        freeze_for_owner(seed)
