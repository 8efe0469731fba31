"""The form to train and the form to serve compute the same, and both are what the equation says."""

import copy

import pytest
import torch
from moe_carvings import carved, decision, domains_of, random_ffn
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.carving.carved_ffn import CarvedFfn, carved_layers, materialize, serve_ffns, take_units
from upcycle3d.perception.moe.carving.masked_ffn import FfnWeights, MaskedFfn, mask_ffns, masked_layers, run_dense
from upcycle3d.perception.moe.carving.shared_routed import RepresentativeRouter, shared_and_routed, unit_patterns
from upcycle3d.perception.moe.carving.units import SiteUnits, divided
from upcycle3d.perception.moe.layers.control_routers import GivenRouter, given_routing
from upcycle3d.perception.moe.layers.dense_ffn import DenseFfn
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routers import SoftRouter
from upcycle3d.perception.moe.surgery.ffn_sites import tensors_of
from upcycle3d.perception.moe.surgery.replacement import plan_replacement

FORMS = pytest.mark.parametrize(("gated", "bias"), [(False, True), (False, False), (True, False), (True, True)])


def units_of(*kept: list[int], width: int = 10) -> SiteUnits:
    masks = torch.zeros(len(kept), width, dtype=torch.bool)
    for expert, some in enumerate(kept):
        masks[expert, some] = True
    return divided("ffn", masks)


UNEQUAL = units_of([0, 1, 2, 9], [0, 1, 5], [0, 1, 2, 4, 5, 6, 7])
DISJOINT = units_of([3, 4], [1, 8, 9], [0])


def by_hand(ffn: DenseFfn, units: SiteUnits, x: torch.Tensor, expert: int) -> torch.Tensor:
    """One token through the units of one expert, unit by unit."""
    out = torch.zeros(ffn.width_out, dtype=x.dtype) if ffn.down_bias is None else ffn.down_bias.clone()
    for unit in units.with_shared[expert].nonzero()[:, 0].tolist():
        value = ffn.up[unit] @ x + (0 if ffn.up_bias is None else ffn.up_bias[unit])
        if ffn.gate is None:
            value = nn.functional.silu(value)
        else:
            value = value * nn.functional.silu(ffn.gate[unit] @ x + (0 if ffn.gate_bias is None else ffn.gate_bias[unit]))
        out = out + ffn.down[:, unit] * value
    return out


@FORMS
@pytest.mark.parametrize("units", [UNEQUAL, DISJOINT], ids=["unequal", "disjoint"])
def test_every_form_is_the_equation_token_by_token(gated, bias, units):
    """Plain loops are the oracle. Expert 1 gets no token in the first batch, and the second batch is empty."""
    ffn = random_ffn(gated=gated, bias=bias)
    layers = [MaskedFfn(ffn, units, GivenRouter(3))]
    layers += [CarvedFfn.from_units(ffn, units, GivenRouter(3), fuse=fuse) for fuse in (False, True)]
    for index in (torch.tensor([2, 0, 0, 2, 0]), torch.tensor([1]), torch.zeros(0, dtype=torch.int64)):
        x = torch.randn(len(index), 6, dtype=torch.float64)
        wanted = torch.stack([by_hand(ffn, units, t, int(i)) for t, i in zip(x, index)]) if len(x) else torch.zeros(0, 5)
        for layer in layers:
            with given_routing(layer, decision(index, 3)):
                torch.testing.assert_close(layer(x), wanted.double(), rtol=1e-12, atol=1e-12)


@FORMS
def test_gradients_of_tied_weights_are_those_of_the_loop(gated, bias):
    """A unit of several experts has one set of weights, so all its tokens train it; pruned units get a gradient of exactly 0."""
    ffn, index = random_ffn(gated=gated, bias=bias), torch.tensor([2, 0, 1, 2, 0])
    layer, x = MaskedFfn(ffn, UNEQUAL, GivenRouter(3)), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 5, dtype=torch.float64)
    with given_routing(layer, decision(index, 3)):
        (layer(x) * weight).sum().backward()
    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    twin = layer.ffn.value.clone()
    for tensor in twin.tensors().values():
        tensor.requires_grad_(True)
    y = x.detach().clone().requires_grad_(True)
    (torch.stack([by_hand(twin, UNEQUAL, t, int(i)) for t, i in zip(y, index)]) * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for name in names:
        own, wanted = getattr(layer.ffn, name), getattr(twin, name)
        assert (own is None) == (wanted is None)
        if own is not None:
            torch.testing.assert_close(own.grad, wanted.grad)
    assert torch.equal(layer.ffn.up.grad[[3, 8]], torch.zeros(2, 6, dtype=torch.float64))


def test_the_split_form_gives_each_part_the_gradient_of_its_units():
    """Summed over the copies, the gradients of the materialized experts are those of the tied weights."""
    ffn, index = random_ffn(gated=True), torch.tensor([2, 0, 2, 2, 0])  # expert 1 gets no token
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    masked = MaskedFfn(ffn, UNEQUAL, GivenRouter(3))
    split = CarvedFfn.from_units(ffn, UNEQUAL, GivenRouter(3))
    for layer in (masked, split):
        with given_routing(layer, decision(index, 3)):
            (layer(x) * weight).sum().backward()
    total = torch.zeros(10, 6, dtype=torch.float64)
    total[UNEQUAL.shared_units] += split.shared.up.grad
    up = split.own.bank.gate_up_proj.grad[:, split.own.bank.shape.width_hidden :]
    for expert in range(3):
        own = UNEQUAL.own_units(expert)
        total[own] += up[expert, : len(own)]
        assert torch.equal(up[expert, len(own) :], torch.zeros_like(up[expert, len(own) :]))
    assert torch.equal(up[1], torch.zeros_like(up[1]))
    torch.testing.assert_close(total, masked.ffn.up.grad)


@pytest.mark.parametrize("name", look.MODELS)
def test_masked_and_served_models_agree_in_every_kind_of_block(name):
    """To 1e-12 in float64 and 1e-5 in float32, with a decision per token and with one per scene; batch norms are folded in."""
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, carving = carved(name, 0.5, dtype=dtype)
        x = domains_of(name)["domain 1"][0].to(dtype)
        masked = mask_ffns(model, carving)
        served = [materialize(masked), serve_ffns(model, carving, fuse=True)]
        tokens = x.numel() // 12
        for index in (torch.arange(tokens) % 3, torch.tensor([2, 0])):
            chosen = decision(index, 3, dtype)
            with given_routing(masked, chosen), torch.no_grad():
                wanted = masked(x)
            for form in served:
                with given_routing(form, chosen), torch.no_grad():
                    torch.testing.assert_close(form(x), wanted, rtol=limit, atol=limit)
                assert len(carved_layers(form)) == len(carving.units)
                assert len(moe_layers(form)) == sum(bool(units.own.any()) for units in carving.units)


@pytest.mark.parametrize("name", look.MODELS)
def test_at_ratio_1_nothing_is_left_out(name):
    """All units are shared: every form is the dense model, whatever the decision, up to the rounding of products in another order."""
    model, carving = carved(name, 1.0)
    x = domains_of(name)["domain 0"][0].double()
    masked = mask_ffns(model, carving)
    plain = plan_replacement(model, experts=1, active=1)
    twin = copy.deepcopy(model)
    plain.apply(twin, {site.name: FfnWeights(site.read(tensors_of(twin))) for site in plain.sites})
    with torch.no_grad():
        dense, same = model(x), twin(x)
        torch.testing.assert_close(same, dense, rtol=1e-10, atol=1e-10)
        for form in (masked, materialize(masked), materialize(masked, fuse=True)):
            with given_routing(form, decision(torch.tensor([1, 2]), 3)):
                torch.testing.assert_close(form(x), same, rtol=1e-12, atol=1e-12)


def test_the_order_of_experts_does_not_matter():
    """Experts and decisions permuted together give the same outputs."""
    ffn, x = random_ffn(gated=True), torch.randn(7, 6, dtype=torch.float64)
    index, order = torch.tensor([0, 1, 2, 2, 1, 0, 0]), torch.tensor([2, 0, 1])
    turned = SiteUnits(site="ffn", shared=UNEQUAL.shared, own=UNEQUAL.own[order])
    for build in (MaskedFfn, CarvedFfn.from_units):
        one, other = build(ffn, UNEQUAL, GivenRouter(3)), build(ffn, turned, GivenRouter(3))
        with given_routing(one, decision(index, 3)), given_routing(other, decision(order.argsort()[index], 3)):
            torch.testing.assert_close(one(x), other(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_every_activation_and_soft_weights(act):
    """Also routers that weigh all experts serve both forms; units of two experts then count for each of them."""
    ffn, x = random_ffn(gated=False, act=act), torch.randn(7, 6, dtype=torch.float64)
    router = SoftRouter(6, 3).double()
    masked, split = MaskedFfn(ffn, UNEQUAL, router), CarvedFfn.from_units(ffn, UNEQUAL, router)
    torch.testing.assert_close(masked(x), split(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(InvalidInput, match="one expert only"):
        CarvedFfn.from_units(ffn, UNEQUAL, router, fuse=True)(x)


def test_an_analytic_router_chooses_the_groups_whose_representatives_are_largest():
    """The oracle computes the units of each token; masked and split forms agree, and no group is chosen twice."""
    for name in ("llama", "clip"):
        model = look.randomized(look.MODELS[name].make()).double()
        plan = plan_replacement(model, experts=2, active=1)
        xs = [x.double() for batches in domains_of(name).values() for x in batches]
        carving = shared_and_routed(unit_patterns(model, plan, xs, lambda m, x: m(x)), shared=0.25, groups=5, active=2)
        masked = mask_ffns(model, carving)
        with torch.no_grad():
            wanted = masked(xs[0])
            torch.testing.assert_close(materialize(masked)(xs[0]), wanted, rtol=1e-12, atol=1e-12)
        seen: list[torch.Tensor] = []
        layer = masked.layers[0].mlp
        layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            masked(xs[0])
        assert isinstance(layer.router, RepresentativeRouter)
        size = layer.ffn.value.hidden(seen[0].reshape(-1, 12)).abs()[:, list(carving.units[0].representatives)]
        found = layer.last_routing.index
        assert found.shape == (6, 2)
        assert [set(row) for row in found.tolist()] == [set(row.topk(2).indices.tolist()) for row in size]
        everything = shared_and_routed(unit_patterns(model, plan, xs, lambda m, x: m(x)), shared=0.25, groups=5, active=5)
        with torch.no_grad():
            torch.testing.assert_close(mask_ffns(model, everything)(xs[0]), model(xs[0]), rtol=1e-10, atol=1e-10)


def test_a_masked_model_runs_dense_as_a_teacher():
    """Inside the block it is the dense model with the current weights, needs no decision, and shows its hidden units."""
    model, carving = carved("llama", 0.3)
    masked, x = mask_ffns(model, carving), domains_of("llama")["domain 0"][0].double()
    seen = {}
    with run_dense(masked, carving, lambda site, inputs, hidden: seen.update({site: (inputs, hidden)})), torch.no_grad():
        torch.testing.assert_close(masked(x), model(x), rtol=1e-12, atol=1e-12)
    inputs, hidden = seen[1]
    torch.testing.assert_close(hidden, masked_layers(masked)[1].ffn.value.hidden(inputs))
    with pytest.raises(InvalidInput, match="was given no decision"):
        masked(x)


def test_models_are_copied_and_hidden_dropout_is_kept():
    """Carving changes no model, a copy after a training step works, and dropout of hidden units acts in training only."""
    model = look.randomized(look.MODELS["timm"].make())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    _, carving = carved("timm", dtype=torch.float32)
    masked, x = mask_ffns(model, carving), domains_of("timm")["domain 0"][0]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [layer.dropout for layer in masked_layers(masked)] == [site.dropout for site in carving.plan.sites]
    with given_routing(masked, decision(torch.tensor([0, 1]), 3, torch.float32)):
        assert torch.equal(masked(x), masked(x))
        masked.train()
        masked(x).sum().backward()
        assert not torch.equal(masked(x), masked(x))
    served = materialize(masked.eval())
    assert served.layers[0].mlp is not masked.layers[0].mlp
    for form in (served.train(), copy.deepcopy(masked).train()):
        with given_routing(form, decision(torch.tensor([0, 1]), 3, torch.float32)):
            assert not torch.equal(form(x), form(x))


def test_what_does_not_fit_is_refused():
    ffn = random_ffn(gated=True)
    with pytest.raises(InvalidInput, match="10 units and 3 experts in the carving"):
        MaskedFfn(ffn, UNEQUAL, GivenRouter(4))
    with pytest.raises(InvalidInput, match="8 in the FFN"):
        CarvedFfn.from_units(random_ffn(hidden=8, gated=True), UNEQUAL, GivenRouter(3))
    layer = MaskedFfn(ffn, UNEQUAL, GivenRouter(3))
    with pytest.raises(InvalidInput, match=r"takes tokens \(\.\.\., 6\)"):
        layer(torch.zeros(2, 5))
    with given_routing(layer, decision(torch.zeros(3, dtype=torch.int64), 3)), pytest.raises(InvalidInput, match="does not fit"):
        layer(torch.zeros(4, 6, dtype=torch.float64))
    model, carving = carved("llama")
    with pytest.raises(InvalidInput, match=r"no FFN 'layers\.0\.mlp'"):
        mask_ffns(look.region_head(), carving)
    with pytest.raises(InvalidInput, match="has no masked FFN"):
        materialize(model)


def test_units_that_are_taken_out_give_their_gradient_back():
    ffn = random_ffn(gated=True)
    for tensor in ffn.tensors().values():
        tensor.requires_grad_(True)
    part = take_units(ffn, torch.tensor([1, 4]), out_bias=False)
    assert part.width_hidden == 2
    assert part.down_bias is None
    part.apply(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    assert ffn.up.grad[[1, 4]].abs().sum() > 0
    assert float(ffn.up.grad[[0, 2, 3, 5]].abs().sum()) == 0
