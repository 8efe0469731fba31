"""Losses of routers: a uniform router scores 1 in every setting, padding has no part, and a coefficient without effect is an error."""

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.control_routers import FrozenRouter, UniformRouter
from upcycle3d.perception.moe.layers.losses import RouterLossConfig, balance_loss, describe_router_losses, router_losses, z_loss
from upcycle3d.perception.moe.layers.routers import SoftRouter, TopKRouter
from upcycle3d.perception.moe.layers.routing import Routing, TopKRule

pytestmark = pytest.mark.usefixtures("one_thread")


def routing_of(tokens: int = 12, experts: int = 4, k: int = 2, seed: int = 0, score: str = "softmax") -> Routing:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return TopKRule(k=k, norm="renorm" if k > 1 else "none", score=score).route(logits)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance_over", ["layer", "all_layers"])
@pytest.mark.parametrize("shares_from", ["top1", "topk"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_uniform_router_scores_1(k, shares_from, balance_over, score):
    """Whatever k is, and whichever of the equal experts the sort takes."""
    uniform = TopKRule(k=k, norm="none", score=score).route(torch.zeros(9, 4, requires_grad=True))
    config = RouterLossConfig(balance=0.01, shares_from=shares_from, balance_over=balance_over)
    losses = router_losses([uniform, uniform], config)
    assert losses.balance.item() == pytest.approx(1, abs=1e-6)
    assert losses.total.item() == pytest.approx(0.01, abs=1e-8)


def test_one_expert_that_takes_everything_scores_the_number_of_experts():
    logits = torch.tensor([[50.0, 0, 0, 0]]).expand(6, 4).clone().requires_grad_()
    routing = TopKRule(k=1, norm="none").route(logits)
    assert balance_loss(routing.probs, routing.index).item() == pytest.approx(4)


@pytest.mark.parametrize("shares_from", ["top1", "topk"])
def test_the_balance_loss_is_its_equation(shares_from):
    routing = routing_of()
    share, prob = [0.0] * 4, [0.0] * 4
    for t in range(12):
        chosen = routing.index[t].tolist()[: 1 if shares_from == "top1" else 2]
        for e in chosen:
            share[e] += 1 / (12 * len(chosen))
        for e in range(4):
            prob[e] += routing.probs[t, e].item() / 12
    found = balance_loss(routing.probs, routing.index, shares_from=shares_from)
    assert found.item() == pytest.approx(4 * sum(f * p for f, p in zip(share, prob)), rel=1e-5)
    found.backward()
    assert routing.logits.grad.abs().max() > 0


def test_layers_are_averaged_or_joined():
    a, b = routing_of(12, seed=1), routing_of(4, k=1, seed=2)
    per_layer = router_losses([a, b], RouterLossConfig(balance_over="layer")).balance
    alone = [balance_loss(r.probs, r.index) for r in (a, b)]
    assert per_layer.item() == pytest.approx((alone[0].item() + alone[1].item()) / 2, rel=1e-6)
    joined = router_losses([a, b], RouterLossConfig(balance_over="all_layers", shares_from="top1")).balance
    every = balance_loss(torch.cat([a.probs, b.probs]), torch.cat([a.index[:, :1], b.index]))
    assert joined.item() == pytest.approx(every.item(), rel=1e-6)
    with pytest.raises(InvalidInput, match=r"layers with \[3, 4\] experts cannot be balanced together"):
        router_losses([a, routing_of(experts=3)], RouterLossConfig(balance_over="all_layers"))


def test_the_z_loss_is_the_squared_logarithm_of_the_denominator():
    logits = torch.randn(5, 3)
    wanted = sum(float(torch.log(torch.exp(row).sum())) ** 2 for row in logits) / 5
    assert z_loss(logits).item() == pytest.approx(wanted, rel=1e-5)
    routing = routing_of()
    losses = router_losses([routing], RouterLossConfig(balance=0.0, z=0.5))
    assert losses.total.item() == pytest.approx(0.5 * z_loss(routing.logits).item())


def test_padding_has_no_part_in_losses():
    routing, padding = routing_of(6), torch.tensor([False, True, False, False, True, False])
    keep = ~padding
    for shares_from in ("top1", "topk"):
        found = balance_loss(routing.probs, routing.index, shares_from=shares_from, padding_mask=padding)
        assert found.item() == balance_loss(routing.probs[keep], routing.index[keep], shares_from=shares_from).item()
    assert z_loss(routing.logits, padding_mask=padding).item() == z_loss(routing.logits[keep]).item()
    with pytest.raises(InvalidInput, match=r"padding_mask must be \(6,\) bool"):
        balance_loss(routing.probs, routing.index, padding_mask=padding.int())


def test_no_tokens_cost_nothing_and_have_a_gradient_of_zeros():
    router = TopKRouter(8, 4, TopKRule(k=2, norm="renorm"))
    empty = router(torch.zeros(0, 8))
    losses = router_losses([empty], RouterLossConfig(z=1.0))
    losses.total.backward()
    assert losses.total.item() == 0
    assert (router.weight.grad == 0).all()
    full = routing_of()
    assert (
        router_losses([router(torch.zeros(0, 8)), full], RouterLossConfig()).balance.item()
        == balance_loss(full.probs, full.index).item()
    )


def test_a_coefficient_without_effect_is_an_error_that_says_why():
    config, x = RouterLossConfig(balance=0.01), torch.randn(5, 8)
    with pytest.raises(InvalidInput, match="no layer kept a routing"):
        router_losses([], config)
    with pytest.raises(InvalidInput, match="no router has logits"):
        router_losses([UniformRouter(4)(x)], config)
    with pytest.raises(InvalidInput, match="all routers are frozen"):
        router_losses([FrozenRouter(8, 4, TopKRule(k=1, norm="none"), seed=0)(x)], config)
    nothing = router_losses([UniformRouter(4)(x)], RouterLossConfig(balance=0.0))
    assert (nothing.total.item(), nothing.layers, nothing.left_out) == (0.0, 0, 1)
    with torch.no_grad():  # an evaluation may report them
        assert router_losses([TopKRouter(8, 4, TopKRule(k=2, norm="renorm"))(x)], config).layers == 1


def test_one_control_among_the_layers_does_not_stop_the_others():
    routing = routing_of()
    losses = router_losses([UniformRouter(4)(torch.randn(5, 8)), routing], RouterLossConfig())
    assert (losses.layers, losses.left_out) == (1, 1)
    assert losses.balance.item() == balance_loss(routing.probs, routing.index).item()


def test_soft_routing_is_balanced_by_its_best_expert():
    routing = SoftRouter(8, 4)(torch.randn(9, 8))
    for shares_from in ("top1", "topk"):
        found = balance_loss(routing.probs, routing.index, shares_from=shares_from)
        assert found.item() == balance_loss(routing.probs, routing.top1[:, None]).item()


def test_the_start_of_a_training_says_what_the_losses_do():
    text = describe_router_losses(RouterLossConfig(balance=0.01), [True, False, True])
    assert text == (
        "router losses: balance 0.01 (shares from topk, the mean over layers, uniform value 1), z 0, on 2 of 3 layers with experts"
    )
    assert "no router is trained" in describe_router_losses(RouterLossConfig(), [False])
    assert "both coefficients are 0" in describe_router_losses(RouterLossConfig(balance=0), [True])


@pytest.mark.parametrize("fields", [{"balance": -1.0}, {"z": float("nan")}, {"shares_from": "top2"}, {"balance_over": "model"}])
def test_settings_that_cannot_be_are_refused(fields):
    with pytest.raises(InvalidInput, match="RouterLossConfig"):
        RouterLossConfig(**fields)
