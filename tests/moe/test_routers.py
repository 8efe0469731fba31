"""Routers decide in float32, refuse what cannot work, and the controls do what their names say."""

import warnings

import pytest
import torch

from moe_banks import bank_of
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.bank import ExpertBank
from upcycle3d.perception.moe.layers.control_routers import (
    FrozenRouter,
    GivenRouter,
    HashRouter,
    OracleRouter,
    UniformRouter,
    given_domains,
    given_ids,
    given_routing,
)
from upcycle3d.perception.moe.layers.moe_ffn import MoeFfn
from upcycle3d.perception.moe.layers.routers import SceneGate, SoftRouter, TopKRouter, equal_rows
from upcycle3d.perception.moe.layers.routing import TopKRule

pytestmark = pytest.mark.usefixtures("one_thread")
RENORM = TopKRule(k=2, norm="renorm")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", ["none", "renorm"])
def test_top_k_follows_its_equation(norm, score):
    torch.manual_seed(0)
    router, x = TopKRouter(8, 5, TopKRule(k=3, norm=norm, score=score)), torch.randn(7, 8)
    routing = router(x)
    for t, logits in enumerate((x @ router.weight.T).tolist()):
        values = torch.tensor(logits)
        scores = values.softmax(0) if score == "softmax" else 1 / (1 + torch.exp(-values))
        best = sorted(range(5), key=lambda e: -scores[e])[:3]
        weight = scores[best] if norm == "none" else scores[best] / scores[best].sum()
        assert routing.index[t].tolist() == best
        torch.testing.assert_close(routing.weight[t], weight)
        torch.testing.assert_close(routing.probs[t], scores / scores.sum())
    if norm == "renorm":
        torch.testing.assert_close(routing.weight.sum(1), torch.ones(7))
    if (norm, score) == ("renorm", "softmax"):  # the same as a softmax over the top k logits
        torch.testing.assert_close(routing.weight, routing.logits.topk(3).values.softmax(1))


@pytest.mark.parametrize("rule", [TopKRule(k=1, norm="none"), TopKRule(k=2, norm="renorm", score="sigmoid")])
def test_extreme_logits_give_no_nan(rule):
    routing = rule.route(torch.tensor([[-1e4, -2e4, -3e4], [1e4, 0.0, -1e4]], requires_grad=True))
    routing.weight.sum().backward()
    assert routing.weight.isfinite().all()
    assert routing.probs.isfinite().all()
    assert routing.logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["top k", "soft", "frozen"])
def test_routers_compute_in_float32_under_autocast_and_in_half_precision_models(kind):
    """In bfloat16 these logits would be equal: the choice of experts would change."""
    routers = {"top k": TopKRouter(4, 2, RENORM), "soft": SoftRouter(4, 2), "frozen": FrozenRouter(4, 2, RENORM, seed=0)}
    router = routers[kind]
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [1.0, 2e-4, 0, 0]]))
    x = torch.ones(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.logits.dtype == routing.probs.dtype == routing.weight.dtype == torch.float32
    assert (routing.top1 == 1).all()
    assert router.bfloat16()(x.bfloat16()).logits.dtype == torch.float32
    assert router.double()(x.double()).logits.dtype == torch.float64


def test_near_ties_get_the_experts_of_float64_under_autocast():
    torch.manual_seed(0)
    base = torch.randn(1, 64)
    router = TopKRouter.from_rows(base + 2e-3 * torch.randn(8, 64), RENORM)
    x = torch.randn(500, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x).index
        coarse = torch.nn.functional.linear(x, router.weight).float().topk(2, dim=1).indices
    exact = (x.double() @ router.weight.double().T).topk(2, dim=1).indices
    assert (found == exact).float().mean() > 0.995
    assert (coarse == exact).float().mean() < 0.9  # what routing in bfloat16 would have cost


def test_more_experts_than_there_are_cannot_be_chosen():
    for make in (
        lambda: TopKRouter(4, 2, TopKRule(k=3, norm="none")),
        lambda: FrozenRouter(4, 2, TopKRule(k=3, norm="none"), seed=0),
        lambda: SceneGate(4, 2, TopKRule(k=3, norm="none")),
        lambda: HashRouter(2, 3, seed=0),
    ):
        with pytest.raises(InvalidInput, match="cannot choose k = 3 of 2 experts"):
            make()
    with pytest.raises(InvalidInput, match=r"TopKRule\.k"):
        TopKRule(k=0, norm="none")
    with pytest.raises(InvalidInput, match="norm must be none or renorm"):
        TopKRule(k=1, norm="l2")
    with pytest.raises(InvalidInput, match=r"takes tokens of shape \(T, 4\), found \(3, 5\)"):
        TopKRouter(4, 2, RENORM)(torch.zeros(3, 5))


def test_equal_rows_are_refused_where_a_router_is_made_and_warned_of_where_it_is_loaded():
    torch.manual_seed(0)
    rows = torch.randn(4, 8)
    rows[3] = rows[1] * (1 + 1e-8)
    assert equal_rows(rows) == [(1, 3)]
    with pytest.raises(InvalidInput, match="rows of experts 1 and 3 are equal, so no token can ever tell these experts apart"):
        TopKRouter.from_rows(rows, RENORM)
    with pytest.raises(InvalidInput, match="equal"):
        TopKRouter.from_rows(torch.zeros(2, 8), RENORM)
    with pytest.warns(UserWarning, match="1 and 3 are equal"):
        TopKRouter(8, 4, RENORM).load_state_dict({"weight": rows})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKRouter(8, 4, RENORM).load_state_dict({"weight": torch.randn(4, 8)})
        TopKRouter.from_rows(rows[:3], RENORM)


def test_a_router_that_the_task_cannot_train_is_warned_of():
    with pytest.warns(UserWarning, match="the task gives it no gradient"):
        router = TopKRouter(8, 4, TopKRule(k=1, norm="renorm"))
    layer = MoeFfn(bank_of(), router)
    layer(torch.randn(5, 8)).square().sum().backward()
    assert router.weight.grad.abs().max() < 1e-6


def test_a_router_of_centroids_starts_with_the_division_of_k_means():
    torch.manual_seed(0)
    centroids, x = torch.randn(5, 8) * torch.tensor([[1.0], [3.0], [0.5], [2.0], [4.0]]), torch.randn(200, 8) * 2
    nearest = torch.cdist(x, centroids).argmin(1)
    assert torch.equal(TopKRouter.from_centroids(centroids, RENORM)(x).top1, nearest)
    soft = TopKRouter.from_centroids(centroids, RENORM, temperature=10.0)(x)
    assert torch.equal(soft.top1, nearest)
    assert soft.weight[:, 0].mean() < TopKRouter.from_centroids(centroids, RENORM)(x).weight[:, 0].mean()
    assert torch.equal(TopKRouter.from_centroids(centroids, RENORM, match="inner")(x).top1, (x @ centroids.T).argmax(1))
    with pytest.raises(InvalidInput, match="equal"):
        TopKRouter.from_centroids(centroids[[0, 1, 1]], RENORM)
    with pytest.raises(InvalidInput, match="temperature"):
        TopKRouter.from_centroids(centroids, RENORM, temperature=0.0)


# ---- what a mixture equals


@pytest.mark.parametrize(
    "router", [TopKRouter(8, 4, RENORM), SoftRouter(8, 4), UniformRouter(4), FrozenRouter(8, 4, RENORM, seed=1)]
)
def test_equal_experts_are_one_dense_ffn_for_any_router_whose_weights_sum_to_1(router):
    ffn, x = bank_of(1).to_dense(0), torch.randn(3, 5, 8)
    layer = MoeFfn(ExpertBank.from_dense([ffn] * 4), router)
    torch.testing.assert_close(layer(x), ffn.apply(x), atol=1e-5, rtol=1e-5)


def test_without_renorm_a_top_1_mixture_of_equal_experts_is_smaller_by_the_probability():
    ffn, x = bank_of(1).to_dense(0), torch.randn(6, 8)
    layer = MoeFfn(ExpertBank.from_dense([ffn] * 4), TopKRouter(8, 4, TopKRule(k=1, norm="none")))
    y = layer(x)
    largest = layer.last_routing.probs.amax(1, keepdim=True)
    assert largest.max() < 0.9
    torch.testing.assert_close(y, largest * ffn.apply(x), atol=1e-5, rtol=1e-5)


def test_experts_may_be_permuted_together_with_the_rows_of_the_router():
    bank, x, order = bank_of(), torch.randn(6, 8), [2, 0, 3, 1]
    router = TopKRouter(8, 4, RENORM)
    moved = MoeFfn(ExpertBank.from_dense([bank.to_dense(e) for e in order]), TopKRouter.from_rows(router.weight[order], RENORM))
    torch.testing.assert_close(moved(x), MoeFfn(bank, router)(x), atol=1e-5, rtol=1e-5)


# ---- controls


def test_a_frozen_router_has_nothing_to_train_and_is_the_same_for_a_seed():
    a, b, c = (FrozenRouter(8, 4, RENORM, seed=seed) for seed in (1, 1, 2))
    assert list(a.parameters()) == []
    assert "weight" in a.state_dict()
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight, c.weight)
    x = torch.randn(5, 8, requires_grad=True)
    assert not a(x).logits.requires_grad


def test_a_uniform_router_averages_the_experts():
    bank, x = bank_of(), torch.randn(5, 8)
    wanted = torch.stack([bank.to_dense(e).apply(x) for e in range(4)]).mean(0)
    torch.testing.assert_close(MoeFfn(bank, UniformRouter(4))(x), wanted, atol=1e-5, rtol=1e-5)


def test_an_oracle_sends_each_scene_to_the_expert_of_its_domain():
    bank, x = bank_of(), torch.randn(3, 5, 8)
    layer = MoeFfn(bank, OracleRouter(4))
    with given_domains(layer, torch.tensor([2, 0, 2])):
        y = layer(x)
    for scene, domain in enumerate((2, 0, 2)):
        torch.testing.assert_close(y[scene], bank.to_dense(domain).apply(x[scene]), atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidInput, match="was given no decision"):
        layer(x)
    with (
        given_domains(layer, torch.tensor([0, 1])),
        pytest.raises(InvalidInput, match="2 scenes does not fit a batch of 15 tokens"),
    ):
        layer(x)
    with (
        pytest.raises(InvalidInput, match=r"domains lie in 0\.\.4, and there are 4 experts"),
        given_domains(layer, torch.tensor([0, 4])),
    ):
        pass
    with pytest.raises(InvalidInput, match="no layer of this Linear has a OracleRouter"), given_domains(torch.nn.Linear(1, 1), x):
        pass


def test_padding_does_not_shift_what_was_given_for_each_scene_or_token():
    bank, x = bank_of(), torch.randn(2, 3, 8)
    mask = torch.tensor([[False, True, False], [True, False, False]])
    layer = MoeFfn(bank, OracleRouter(4))
    for domain in (torch.tensor([1, 3]), torch.tensor([1, 1, 1, 3, 3, 3])):
        with given_domains(layer, domain):
            y = layer(x, mask)
        torch.testing.assert_close(y[0, 2], bank.to_dense(1).apply(x[0, 2]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(y[1, 1], bank.to_dense(3).apply(x[1, 1]), atol=1e-5, rtol=1e-5)


def test_a_hash_router_gives_an_id_the_same_experts_everywhere_and_spreads_the_ids():
    router, ids = HashRouter(4, 2, seed=0), torch.arange(4000)
    decision = router.decide(ids)
    assert torch.equal(decision.index, HashRouter(4, 2, seed=0).decide(ids).index)
    assert not torch.equal(decision.index, HashRouter(4, 2, seed=1).decide(ids).index)
    assert (decision.index[:, 0] != decision.index[:, 1]).all()
    assert torch.bincount(decision.index.reshape(-1), minlength=4).min() > 1800  # of 2000
    layer = MoeFfn(bank_of(), router)
    with given_ids(layer, torch.tensor([7, 8, 7])):
        layer(torch.randn(3, 8))
    index = layer.last_routing.index
    assert index[0].tolist() == index[2].tolist() == decision.index[7].tolist()


@pytest.mark.parametrize("rule", [RENORM, None])
def test_the_decision_of_a_gate_is_the_routing_of_every_layer_and_trains_the_gate(rule):
    torch.manual_seed(0)
    gate = SceneGate(6, 4, rule)
    layers = torch.nn.Sequential(
        MoeFfn(bank_of(4, (8, 12, 8)), GivenRouter(4)), MoeFfn(bank_of(4, (8, 12, 8), seed=1), GivenRouter(4))
    )
    x, descriptor = torch.randn(3, 5, 8), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        decision = gate(descriptor)
    assert decision.logits.dtype == torch.float32
    with given_routing(layers, decision):
        y = layers(x)
    alone = gate(descriptor[1:2])
    for layer in layers:
        routing = layer.last_routing
        torch.testing.assert_close(routing.probs, decision.probs.repeat_interleave(5, 0))
        torch.testing.assert_close(routing.weight[5:10], alone.weight.expand(5, -1))
        assert (routing.index is None) == (rule is None)
        if rule is not None:
            assert torch.equal(routing.index[5:10], alone.index.expand(5, -1))
    y.square().sum().backward()
    assert gate.out.weight.grad.abs().max() > 0
    with (
        pytest.raises(InvalidInput, match="the decision is for 3 experts"),
        given_routing(layers, SceneGate(6, 3, rule)(descriptor)),
    ):
        pass
