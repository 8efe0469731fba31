"""A mixture in the place of an FFN: shapes, padding, exact counts, routings that hold no memory, and unused experts that stay."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_banks import bank_of
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.control_routers import UniformRouter
from upcycle3d.perception.moe.layers.losses import RouterLossConfig, balance_loss, router_losses
from upcycle3d.perception.moe.layers.moe_ffn import MoeFfn, moe_layers, padding_left_out, take_routings
from upcycle3d.perception.moe.layers.routers import SoftRouter, TopKRouter
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.layers.unused_experts import keep_unused_experts
from upcycle3d.perception.moe.layers.usage import ExpertUsage

pytestmark = pytest.mark.usefixtures("one_thread")
RENORM = TopKRule(k=2, norm="renorm")


def layer_of(seed: int = 0, **fields) -> MoeFfn:
    bank = bank_of(seed=seed, sizes=(8, 12, 8))
    return MoeFfn(bank, TopKRouter(8, 4, RENORM), **fields)


def model_of() -> nn.Sequential:
    """Mixtures in some blocks only, as after a surgery of every second layer."""
    return nn.Sequential(layer_of(), nn.Linear(8, 8), nn.GELU(), layer_of(1))


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (2, 0, 8)])
def test_any_leading_shape_is_kept(shape):
    layer, x = layer_of(), torch.randn(shape)
    y = layer(x)
    assert y.shape == shape
    flat = x.reshape(-1, 8)
    routing = layer.last_routing
    torch.testing.assert_close(y.reshape(-1, 8), layer.bank(flat, routing.index, routing.weight, "loop"), atol=1e-5, rtol=1e-5)
    (y.sum() + routing.probs.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_step_without_tokens_gives_gradients_of_zeros():
    """A rank of a distributed training whose batch has no tokens must still take part in the sum of gradients."""
    layer = layer_of()
    layer(torch.zeros(0, 8)).sum().backward()
    assert all((p.grad == 0).all() for p in layer.parameters())


def test_outputs_losses_and_counts_do_not_change_when_padding_is_added():
    layer, x = layer_of(), torch.randn(2, 3, 8)
    y = layer(x)
    loss, usage = router_losses(take_routings(layer), RouterLossConfig(z=0.1)).total, layer.usage.reset()
    padded = torch.cat([x, torch.full((2, 4, 8), torch.nan)], dim=1).requires_grad_()  # not even NaN may come through
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 3:] = True
    z = layer(padded, mask)
    torch.testing.assert_close(z[:, :3], y)
    assert (z[:, 3:] == 0).all()
    assert router_losses([layer.last_routing], RouterLossConfig(z=0.1)).total.item() == pytest.approx(loss.item(), rel=1e-6)
    assert layer.usage.reset() == usage
    with padding_left_out(layer, mask):
        assert torch.equal(layer(padded), z)
    (z.sum() + router_losses(take_routings(layer), RouterLossConfig()).total).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert (padded.grad[:, 3:] == 0).all()
    everything = layer(x, torch.ones(2, 3, dtype=torch.bool))
    assert (everything == 0).all()
    with pytest.raises(InvalidInput, match="an attention mask with 1 for tokens is its opposite"):
        layer(x, torch.ones(2, 3))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_usage_counts_each_forward_pass_once_under_accumulation_and_recomputation(reentrant):
    model = model_of()
    x = torch.randn(3, 2, 5, 8)
    for part in x:  # three micro-batches of one step
        part = part.clone().requires_grad_()
        y = model(part) if reentrant is None else checkpoint(model, part, use_reentrant=reentrant)
        y.sum().backward()
    assert [name for name, _ in moe_layers(model)] == ["0", "3"]
    found = [layer.usage.reset() for _, layer in moe_layers(model)]
    use, unique = torch.zeros(2, 4), [0, 0]
    weight, largest = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.int64)
    for part in x:
        for number in range(2):
            layer = model[3 * number]
            routing = layer.router(part.reshape(-1, 8))
            index = routing.index
            use[number] += torch.bincount(index.reshape(-1), minlength=4)
            for experts, weights in zip(index.tolist(), routing.weight.tolist(), strict=True):
                largest[number, experts[0]] += 1
                for expert, value in zip(experts, weights, strict=True):
                    weight[number, expert] += value
            unique[number] += len(index.unique())
            part = model[2](model[1](layer(part))).detach()
    for number in range(2):
        assert (found[number].use, found[number].largest) == (tuple(use[number].tolist()), tuple(largest[number].tolist()))
        assert (found[number].tokens, found[number].batches, found[number].unique) == (30, 3, unique[number])
        assert found[number].weight == pytest.approx(weight[number].tolist())


def test_recomputation_changes_neither_the_losses_nor_the_gradient_of_the_router():
    found = []
    for recompute in (False, True):
        layer, x = layer_of(), torch.ones(6, 8).cumsum(0).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        loss = y.square().mean() + router_losses(take_routings(layer), RouterLossConfig(balance=1.0)).total
        loss.backward()
        assert layer.last_routing is None  # the repeated forward pass keeps nothing
        found.append([loss.detach(), *[p.grad for p in layer.parameters()]])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_a_recomputation_that_cuts_the_router_off_is_an_error_and_not_silence():
    layer = layer_of()
    checkpoint(layer, torch.randn(4, 8, requires_grad=True), use_reentrant=True)
    with pytest.raises(InvalidInput, match="use_reentrant=False"):
        router_losses(take_routings(layer), RouterLossConfig())


def test_usage_tells_entropy_dead_experts_and_experts_per_batch():
    weights = {"weight": (3.0, 0.0, 1.0, 0.0), "largest": (3, 0, 1, 0)}
    usage = ExpertUsage(use=(6.0, 0.0, 2.0, 0.0), tokens=4, batches=2, unique=3, **weights)
    assert usage.shares == (0.75, 0.0, 0.25, 0.0)
    assert usage.dead == (1, 3)
    assert usage.unique_per_batch == 1.5
    assert usage.entropy == pytest.approx(0.5623 / 1.3863, abs=1e-4)
    assert (usage + usage).tokens == 8
    assert (usage + usage).mean_weights == usage.mean_weights == (0.75, 0.0, 0.25, 0.0) == usage.largest_shares
    even = ExpertUsage(use=(1.0,) * 4, tokens=4, batches=1, unique=4, weight=(1.0,) * 4, largest=(1,) * 4)
    assert even.entropy == pytest.approx(1)
    assert layer_of().usage.value.shares == (0.0,) * 4
    soft = MoeFfn(bank_of(), SoftRouter(8, 4))
    with torch.inference_mode():
        soft(torch.randn(2, 8))
    soft(torch.randn(3, 8))
    assert sum(soft.usage.value.mean_weights) == pytest.approx(1)
    assert sum(soft.usage.value.largest) == 5
    assert sum(soft.usage.value.use) == pytest.approx(5, abs=1e-4)
    assert soft.usage.value.unique_per_batch == 4


def test_the_kept_routing_carries_gradients_for_the_losses_and_then_lets_the_graph_go():
    layer, x = layer_of(), torch.randn(5, 8)
    loss = layer(x).square().mean()
    routing = layer.last_routing
    assert routing.logits.requires_grad
    (loss + balance_loss(routing.probs, routing.index)).backward()
    assert not layer.last_routing.logits.requires_grad
    assert torch.equal(layer.last_routing.index, routing.index)
    layer.eval()(x)
    assert not layer.last_routing.logits.requires_grad


def test_no_step_holds_the_activations_of_another():
    layer = layer_of()
    loss = layer(torch.randn(5, 8)).square().mean()
    alive = weakref.ref(layer.last_routing)
    loss.backward()
    gc.collect()
    assert alive() is None
    assert layer.last_routing.probs.grad_fn is None
    first = layer(torch.randn(5, 8)).sum()
    layer(torch.randn(5, 8))
    first.backward()  # the backward pass of an older batch leaves the newer decision alone
    assert layer.last_routing.logits.requires_grad
    gone = weakref.ref(layer)
    del layer, first, loss
    gc.collect()
    assert gone() is None


def test_a_layer_can_be_copied_after_a_forward_pass_and_its_counts_are_no_weights():
    layer, x = layer_of(), torch.randn(5, 8)
    y = layer(x)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), y)
    assert twin.last_routing is not layer.last_routing
    names = ["bank.down_proj", "bank.down_proj_bias", "bank.hidden_proj_bias", "bank.up_proj", "router.weight"]
    assert sorted(layer.state_dict()) == names
    other = layer_of(7)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), y)


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped", "dense_all"])
def test_mixed_precision_trains_all_weights(backend):
    layer, x = layer_of(backend=backend), torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = y.float().square().mean() + router_losses(take_routings(layer), RouterLossConfig()).total
    loss.backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in layer.parameters())


def test_half_precision_models_run_whole():
    layer = layer_of().bfloat16()
    layer(torch.randn(5, 8).bfloat16()).sum().backward()
    assert layer.router.weight.grad.dtype == torch.bfloat16


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInput, match="the router chooses among 3 experts, and the bank has 4"):
        MoeFfn(bank_of(), UniformRouter(3))
    with pytest.raises(InvalidInput, match=r"takes tokens \(\.\.\., 8\), found \(2, 9\)"):
        layer_of()(torch.zeros(2, 9))


@pytest.mark.parametrize("guarded", [False, True])
def test_unused_experts_are_left_alone_by_decay_and_momentum_when_asked(guarded):
    bank = bank_of()
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.5)
    guard = keep_unused_experts(optimizer, bank) if guarded else None
    index, x, ones = torch.tensor([[0], [1], [2]]), torch.randn(3, 8), torch.ones(3, 1)

    def step(used):
        optimizer.zero_grad()
        for part in used.split(1):  # accumulated over micro-batches
            bank(x[: len(part)], part, ones[: len(part)]).square().sum().backward()
        optimizer.step()

    step(index)  # experts 0 to 2 get moments; 3 was never used
    before = [p.detach().clone() for p in bank.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in bank.parameters()]
    step(torch.tensor([[1]]))
    for parameter, old, moment in zip(bank.parameters(), before, moments):
        changed = (parameter != old).flatten(1).any(1).tolist()
        assert changed[1]
        assert changed[0] is changed[2] is (not guarded)
        assert torch.equal(optimizer.state[parameter]["exp_avg"][0], moment[0]) is guarded
    never = [p.detach()[3].clone() for p in bank.parameters()]
    if guard is not None:
        step(torch.tensor([[0]]))
        assert all(torch.equal(p[3], old) for p, old in zip(bank.parameters(), never))
        guard.remove()
        step(torch.tensor([[0]]))
        assert not torch.equal(bank.down_proj[3], never[1])
