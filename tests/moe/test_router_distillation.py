"""Targets of a router are counts that a plain loop gives; its losses have the minimum that they promise."""

import math

import pytest
import torch
from moe_carvings import carved, decision, domains_of

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.carving.distillation import (
    NESTED,
    PROGRAM_LOSS,
    DistillLoss,
    OverlapConfig,
    Overlaps,
    accuracy_by_position,
    layer_distill_loss,
    measure_overlaps,
    token_overlaps,
)
from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns, masked_layers
from upcycle3d.perception.moe.carving.pre_gate import LayerRouter
from upcycle3d.perception.moe.carving.units import SiteUnits
from upcycle3d.perception.moe.layers.control_routers import given_routing


def by_hand(hidden: list[float], units: SiteUnits, ratio: float, thresholds: tuple[float, ...], signed: bool) -> list[float]:
    """Overlap of one token with each expert, with Python's sets."""
    size = hidden if signed else [abs(value) for value in hidden]
    order = sorted((u for u in range(len(size)) if size[u] != 0), key=lambda u: -size[u])
    found, total = [0.0] * units.experts, 0
    for threshold in thresholds:
        count = max(1, round(len(hidden) * ratio * threshold))
        total += count
        for expert in range(units.experts):
            found[expert] += len(set(order[:count]) & set(units.own_units(expert).tolist()))
    return [value / total for value in found]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("thresholds", [(1.0,), NESTED, (0.5, 0.1)])
def test_overlaps_are_those_of_a_plain_loop(signed, thresholds):
    """Also for tokens whose units are mostly 0, as after a ReLU: a unit of 0 is nobody's top unit."""
    _, carving = carved("clip", 0.4)
    hidden = torch.randn(9, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden[3:6] = hidden[3:6].relu() * (torch.rand(3, 20) < 0.3)
    hidden[8] = 0
    config = OverlapConfig(thresholds=thresholds, signed=signed)
    found = token_overlaps(hidden, carving.units[0], 0.4, config)
    wanted = torch.tensor([by_hand(row.tolist(), carving.units[0], 0.4, thresholds, signed) for row in hidden])
    torch.testing.assert_close(found, wanted)
    assert found[8].tolist() == [0.0] * 3
    assert token_overlaps(hidden[:0], carving.units[0], 0.4, config).shape == (0, 3)


@pytest.mark.parametrize("name", ["llama", "clip", "region-head"])
def test_dense_and_masked_teachers_agree_before_training(name):
    """The paper's teacher is the dense model, the program's is the current model with all its units; scenes average their tokens."""
    model, carving = carved(name, 0.5)
    x = domains_of(name)["domain 1"][0].double()
    masked = mask_ffns(model, carving).train()
    one, other = (measure_overlaps(m, carving, lambda m: m(x)) for m in (model, masked))
    assert masked.training
    assert one.sites.shape == (len(carving.units), 6, 3)
    torch.testing.assert_close(one.sites, other.sites)
    scenes = measure_overlaps(model, carving, lambda m: m(x), scenes=2)
    torch.testing.assert_close(scenes.sites, one.sites.view(-1, 2, 3, 3).mean(2))
    mean = one.sites.mean(0)
    torch.testing.assert_close(one.targets(), torch.softmax(10 * mean, 1))
    assert torch.equal(one.best, one.targets().argmax(1))
    torch.testing.assert_close(one.layer_targets().sum(-1), torch.ones(len(carving.units), 6))
    with pytest.raises(InvalidInput, match="cannot be divided into 4 scenes"):
        measure_overlaps(model, carving, lambda m: m(x), scenes=4)
    with pytest.raises(InvalidInput, match="did not reach"):
        measure_overlaps(model, carving, lambda m: None)


def test_tokens_of_a_domain_overlap_most_with_its_expert():
    """What the whole method stands on: the experts' own calibration tokens prefer them."""
    model, carving = carved("llama", 0.4)
    right = tokens = 0
    for number, batches in enumerate(domains_of("llama").values()):
        for x in batches:
            best = measure_overlaps(model, carving, lambda m, x=x: m(x.double())).best
            right, tokens = right + int((best == number).sum()), tokens + len(best)
    assert right / tokens > 0.6


def test_losses_are_the_equations_and_leave_padding_out():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, generator=draw, dtype=torch.float64)
    target = torch.randn(2, 4, 3, generator=draw, dtype=torch.float64).softmax(-1)
    padding = torch.tensor([[False, False, True, True], [False, False, False, False]])
    forward = backward = hard = 0.0
    for b in range(2):
        for t in range(4):
            if padding[b, t]:
                continue
            p, q = target[b, t].tolist(), logits[b, t].softmax(0).tolist()
            forward += sum(x * math.log(x / y) for x, y in zip(p, q)) / 6
            backward += sum(y * math.log(y / x) for x, y in zip(p, q)) / 6
            best = max(range(3), key=lambda i: p[i])
            hard += sum(-(0.5 * (i == best) + 0.5 / 3) * math.log(q[i]) for i in range(3)) / 6
    noisy = logits.clone()
    noisy[0, 2:] = torch.nan
    assert float(DistillLoss()(noisy, target, padding)) == pytest.approx(forward, rel=1e-5)
    assert float(DistillLoss(direction="router_to_target")(noisy, target, padding)) == pytest.approx(backward, rel=1e-5)
    assert float(PROGRAM_LOSS(noisy, target, padding)) == pytest.approx(0.75 * hard + 0.25 * forward, rel=1e-5)
    assert float(DistillLoss()(target.log(), target)) == pytest.approx(0, abs=1e-6)
    assert float(DistillLoss()(logits, target, torch.ones(2, 4, dtype=torch.bool))) == 0
    with pytest.raises(InvalidInput, match="one shape"):
        DistillLoss()(logits, target[:1])


@pytest.mark.parametrize("direction", ["target_to_router", "router_to_target"])
def test_only_one_direction_has_its_minimum_at_the_mean_target(direction):
    """Two tokens that look alike to the router: 0.6 for expert 0, and 0.001. The mean target prefers expert 1."""
    targets = torch.tensor([[0.6, 0.4], [0.001, 0.999]])
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = DistillLoss(direction=direction)(logits.expand(2, 2), targets)
        loss.backward()
        return loss

    optimizer.step(step)
    found = logits.detach().softmax(0)[0]
    mean = float(targets[:, 0].mean())
    assert (abs(float(found) - mean) < 1e-3) == (direction == "target_to_router")


def test_layer_wise_routers_learn_from_the_overlaps_of_their_own_layer():
    """The loss is the mean over layers and tokens, its gradient reaches routers only, and decisions are forgotten afterwards."""
    model, carving = carved("llama", 0.5)
    x = domains_of("llama")["domain 0"][0].double()
    masked = mask_ffns(model, carving, lambda site, ffn, units: LayerRouter(site.width_in, units.experts).double())
    overlaps = measure_overlaps(masked, carving, lambda m: m(x))
    masked(x)
    kept = [layer.last_routing.logits for layer in masked_layers(masked)]
    loss = layer_distill_loss(masked, carving, overlaps, DistillLoss())
    wanted = sum(float(DistillLoss()(a.detach(), b)) for a, b in zip(kept, overlaps.layer_targets())) / 2
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    for layer in masked_layers(masked):
        assert float(layer.router.linear.weight.grad.abs().sum()) > 0
        assert layer.ffn.up.grad is None
    padding = torch.tensor([[False, True, True], [False, False, False]])
    masked(x)
    part = layer_distill_loss(masked, carving, overlaps, DistillLoss(), padding)
    kept_tokens = ~padding.flatten()
    wanted = (
        sum(float(DistillLoss()(a.detach()[kept_tokens], b[kept_tokens])) for a, b in zip(kept, overlaps.layer_targets())) / 2
    )
    assert float(part.detach()) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(InvalidInput, match="run the masked model with layer-wise routers first"):
        layer_distill_loss(masked, carving, overlaps, DistillLoss())
    given = mask_ffns(model, carving)
    with given_routing(given, decision(torch.tensor([0, 1]), 3)):
        given(x)
    with pytest.raises(InvalidInput, match="no logits of the layers"):
        layer_distill_loss(given, carving, overlaps, DistillLoss())


def test_accuracy_is_counted_by_position_without_padding():
    chosen = torch.tensor([[0, 1, 1, 0, 2], [9, 9, 1, 1, 1]])
    padding = torch.tensor([[False] * 5, [True, True, False, False, False]])
    found = accuracy_by_position(chosen, torch.tensor([1, 1]), bounds=(0, 1, 3), padding=padding)
    assert found.tokens == (2, 4, 2)
    assert found.hits == (1, 4, 0)
    assert found.total == 5 / 8
    assert "0..0       50.0% of 2 tokens" in str(found)
    other = accuracy_by_position(chosen[:1], torch.tensor([[0, 1, 1, 0, 0]]), bounds=(0, 4))
    assert other.shares == (1.0, 0.0)
    nothing = accuracy_by_position(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert math.isnan(nothing.total)
    with pytest.raises(InvalidInput, match="need a truth"):
        accuracy_by_position(chosen, torch.zeros(3))


def test_overlap_settings_are_checked():
    for wrong in ({"thresholds": ()}, {"thresholds": (2.0,)}, {"sharpness": -1.0}):
        with pytest.raises(InvalidInput):
            OverlapConfig(**wrong)
    assert Overlaps(sites=torch.zeros(1, 0, 3), config=OverlapConfig()).targets().shape == (0, 3)
