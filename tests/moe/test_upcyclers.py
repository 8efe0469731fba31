"""Upcyclers change no dense model, lose no tensor, and start where their equations say.

Step 0 is exact: copies with renormalized routing compute what the dense model computes, in every block that surgery knows.
"""

import copy

import pytest
import torch
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.bank import ExpertBank
from upcycle3d.perception.moe.layers.dense_ffn import DenseFfn
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.ffn_sites import tensors_of
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling import upcyclers
from upcycle3d.perception.moe.upcycling.ffn_changes import redraw_units, scaled, widened
from upcycle3d.perception.moe.upcycling.upcyclers import (
    RandomRouters,
    btx,
    drop_upcycling,
    saved_tensors,
    soup,
    sparse_copy,
    step_zero_difference,
    wider_dense,
)

TOP2 = RandomRouters(experts=4, rule=TopKRule(k=2, norm="renorm"))
each_model = pytest.mark.parametrize("name", look.MODELS)


def clip(seed: int = 0) -> nn.Module:
    return look.randomized(look.Stack(lambda: look.Block(look.ClipMlp())), seed)


def branch(model: nn.Module, seed: int, step: float = 0.03) -> nn.Module:
    """A model that learned something else: every parameter moved, and the running statistics with them."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in saved_tensors(other).values():
            if tensor.is_floating_point():
                tensor += step * torch.randn(tensor.shape, generator=draw).abs()
    return other


def expert(model: nn.Module, layer: int, number: int) -> DenseFfn:
    return moe_layers(model)[layer][1].bank.to_dense(number)


def same(a: DenseFfn, b: DenseFfn) -> bool:
    return a.same_form(b) is None and all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())


# ---- step 0


@each_model
@pytest.mark.parametrize("routing", ["top2", "soft"])
def test_copies_with_renormalized_routing_are_the_dense_model_in_values_and_gradients(name, routing):
    wanted = look.MODELS[name]
    model, x = look.randomized(wanted.make()), look.tokens(wanted.dims)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_replacement(model, experts=3, active=2 if routing == "top2" else 3)
    made = sparse_copy(model, plan, RandomRouters(experts=3, rule=TopKRule(k=2, norm="renorm") if routing == "top2" else None))
    assert len(moe_layers(made.model)) == wanted.count
    assert step_zero_difference(model, made.model, lambda m: m(x)) < 3e-5
    slopes = []
    for m in (model, made.model):
        given = x.clone().requires_grad_()
        m(given).square().sum().backward()
        slopes.append(given.grad)
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(value.isnan().any() for value in saved_tensors(made.model).values())
    assert not {v.data_ptr() for v in saved_tensors(model).values()} & {v.data_ptr() for v in saved_tensors(made.model).values()}


def test_the_plan_counts_the_parameters_that_are_there_afterwards():
    for name in ("clip", "llama", "bert", "region-head", "torch-encoder"):
        model = look.MODELS[name].make()
        plan = plan_replacement(model, experts=4)
        made = sparse_copy(model, plan, TOP2).model
        assert sum(p.numel() for p in made.parameters()) == plan.parameters_after


def test_an_unrenormalized_top_1_starts_smaller_by_its_probability_and_the_scale_corrects_it():
    model = look.randomized(nn.ModuleList([look.ClipMlp()]))
    plan = plan_replacement(model, experts=4, active=1)
    routers = RandomRouters(experts=4, rule=TopKRule(k=1, norm="none"), std=0.5)
    x = look.tokens()
    made = btx([copy.deepcopy(model) for _ in range(3)], plan, routers, seed=model).model
    probability = torch.softmax(x @ moe_layers(made)[0][1].router.weight.T, dim=-1).amax(-1, keepdim=True)
    torch.testing.assert_close(made[0](x), probability * model[0](x), rtol=1e-5, atol=1e-5)
    louder = btx([copy.deepcopy(model) for _ in range(3)], plan, routers, seed=model, expert_scale=4.0).model
    torch.testing.assert_close(louder[0](x), 4 * probability * model[0](x), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_passes_through():
    made = sparse_copy(clip(), plan_replacement(clip(), experts=4), TOP2).model
    assert made(torch.zeros(0, 3, 12)).shape == (0, 3, 5)


def test_a_replaced_encoder_layer_learns_with_dropout_of_its_hidden_units():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, dropout=0.4, batch_first=True), 1)
    made = sparse_copy(model, plan_replacement(model, experts=4), TOP2).model.train()
    assert moe_layers(made)[0][1].bank.shape.dropout == 0.4
    made(look.tokens()).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


# ---- drop-upcycling


def test_redrawn_units_are_a_share_of_whole_units_with_the_statistics_of_the_old_ones():
    draw = torch.Generator().manual_seed(0)
    ffn = DenseFfn(
        up=torch.randn(400, 30, generator=draw) * 2 + 1,
        gate=torch.randn(400, 30, generator=draw) * 0.5 - 3,
        down=torch.randn(20, 400, generator=draw) * 3 + 5,
        up_bias=torch.randn(400, generator=draw) + 7,
        gate_bias=torch.randn(400, generator=draw),
        down_bias=torch.randn(20, generator=draw),
        activation="silu",
    )
    made = redraw_units(ffn, 0.25, torch.Generator().manual_seed(1))
    moved = {
        "up": (made.up != ffn.up).all(1),
        "gate": (made.gate != ffn.gate).all(1),
        "down": (made.down != ffn.down).all(0),
        "up_bias": made.up_bias != ffn.up_bias,
        "gate_bias": made.gate_bias != ffn.gate_bias,
    }
    units = moved["up"]
    assert int(units.sum()) == 100
    assert all(torch.equal(rows, units) for rows in moved.values())
    assert torch.equal(made.up[~units], ffn.up[~units])
    assert torch.equal(made.down[:, ~units], ffn.down[:, ~units])
    assert torch.equal(made.down_bias, ffn.down_bias)
    for new, old in ((made.up, ffn.up), (made.gate, ffn.gate), (made.down.T, ffn.down.T)):
        assert float(new[units].mean()) == pytest.approx(float(old[units].mean()), abs=0.25)
        assert float(new[units].std()) == pytest.approx(float(old[units].std()), rel=0.05)
    assert same(redraw_units(ffn, 0.0, draw), ffn)
    assert not (redraw_units(ffn, 1.0, draw).up == ffn.up).any()


def test_drop_upcycling_makes_experts_that_differ_and_the_same_ones_again():
    model = clip()
    plan = plan_replacement(model, experts=4)
    made, again = (drop_upcycling(model, plan, TOP2, share=0.5).model for _ in range(2))
    assert all(torch.equal(v, saved_tensors(again)[k]) for k, v in saved_tensors(made).items())
    assert not torch.equal(expert(made, 0, 0).up, expert(made, 0, 1).up)
    assert not torch.equal(expert(made, 0, 0).up != tensors_of(model)["layers.0.mlp.fc1.weight"], expert(made, 1, 0).up)
    other = drop_upcycling(model, plan, TOP2, share=0.5, draw=1).model
    assert not torch.equal(expert(made, 0, 0).up, expert(other, 0, 0).up)
    unmoved = drop_upcycling(model, plan, TOP2, share=0.0).model
    assert step_zero_difference(model, unmoved, lambda m: m(look.tokens())) < 3e-5
    with pytest.raises(InvalidInput, match="share must be in"):
        drop_upcycling(model, plan, TOP2, share=1.5)


# ---- several models


def test_btx_takes_each_ffn_bit_by_bit_and_averages_everything_else():
    seed = clip()
    models = [seed, branch(seed, 1), branch(seed, 2)]
    plan = plan_replacement(seed, experts=3)
    made = btx(models[1:], plan, RandomRouters(experts=3, rule=TopKRule(k=2, norm="renorm")), seed=seed)
    for layer, site in enumerate(plan.sites):
        for number, model in enumerate(models):
            assert same(expert(made.model, layer, number), site.read(tensors_of(model)))
    ffn = {name for site in plan.sites for name in site.tensors}
    for name, value in saved_tensors(made.model).items():
        if "mlp" not in name:
            mean = sum(saved_tensors(model)[name].double() for model in models) / 3
            torch.testing.assert_close(value, mean.float(), rtol=0, atol=1e-7)
    assert {name for name, how in made.account.read if how == "became experts"} == {f"{i}:{n}" for i in range(3) for n in ffn}
    assert len(made.account.written) == len(saved_tensors(made.model))
    assert "became experts" in str(made.account)


def test_averages_of_equal_models_are_the_model_bit_by_bit():
    seed = clip()
    twins = [copy.deepcopy(seed) for _ in range(3)]
    melted = soup(twins).model
    assert all(torch.equal(value, saved_tensors(melted)[name]) for name, value in saved_tensors(seed).items())
    made = btx(twins, plan_replacement(seed, experts=3), RandomRouters(experts=3, rule=TopKRule(k=2, norm="renorm")))
    assert all(torch.equal(v, saved_tensors(seed)[n]) for n, v in saved_tensors(made.model).items() if "mlp" not in n)


def test_a_soup_is_the_mean_and_dense():
    seed = look.randomized(look.MODELS["bert"].make())
    other = branch(seed, 1)
    made = soup([seed, other])
    assert made.plan is None
    for name, value in saved_tensors(made.model).items():
        torch.testing.assert_close(value, (saved_tensors(seed)[name] + saved_tensors(other)[name]) / 2)


def test_every_expert_with_its_batch_norms_is_its_own_detectors_branch():
    """Each specialist's running statistics go into its expert, so routing to it gives the specialist's own output."""
    seed = look.randomized(look.region_head())
    models = [seed, branch(seed, 1, 0.2), branch(seed, 2, 0.2)]
    plan = plan_replacement(seed, experts=3, active=3)
    made = btx(models, plan, RandomRouters(experts=3, rule=None)).model
    x = look.tokens(1)
    flat = x.movedim(1, -1)
    for number, model in enumerate(models):
        wanted = model[:6](x).movedim(1, -1)  # up to the second batch norm
        torch.testing.assert_close(expert(made, 0, number).apply(flat), wanted, rtol=1e-4, atol=1e-4)


def test_shared_batch_norms_come_from_the_average_and_the_last_one_stays_in_the_model():
    seed = look.randomized(look.region_head())
    models = [seed, branch(seed, 1)]
    plan = plan_replacement(seed, experts=2, active=2, batch_norm="share")
    with pytest.warns(
        UserWarning, match=r"running statistics of 1 batch norms.*\('5' is the first\); call recalibrate_batch_norm"
    ):
        made = btx(models, plan, RandomRouters(experts=2, rule=None)).model
    norm = [(a + b) / 2 for a, b in zip(seed[1].state_dict().values(), models[1][1].state_dict().values())]
    weight, bias, mean, variance = norm[:4]
    for number, model in enumerate(models):
        scale = weight / (variance + seed[1].eps).sqrt()
        torch.testing.assert_close(expert(made, 0, number).up, model[0].weight[..., 0] * scale[:, None])
        torch.testing.assert_close(expert(made, 0, number).up_bias, bias - mean * scale)
    torch.testing.assert_close(made[5].running_var, (seed[5].running_var + models[1][5].running_var) / 2)


def test_the_seed_may_stay_as_it_is_outside_the_ffns():
    seed = look.randomized(look.region_head())
    other = branch(seed, 1)
    plan = plan_replacement(seed, experts=2, active=1, batch_norm="share")
    routers = RandomRouters(experts=2, rule=TopKRule(k=1, norm="none"))
    made = btx([other], plan, routers, seed=seed, rest="seed")  # and no warning of averaged statistics
    for name in ("5.running_mean", "5.weight", "7.weight"):
        assert torch.equal(saved_tensors(made.model)[name], saved_tensors(seed)[name])
    shared = {**tensors_of(other), **{n: v for n, v in tensors_of(seed).items() if n.startswith("1.")}}
    assert same(expert(made.model, 0, 0), plan.sites[0].read(tensors_of(seed)))
    assert same(expert(made.model, 0, 1), plan.sites[0].read(shared))
    assert ("1:7.weight", "left out for the seed's") in made.account.read
    with pytest.raises(InvalidInput, match="no seed was given"):
        btx([seed, other], plan, routers, rest="seed")


@each_model
def test_a_wider_dense_model_computes_the_same_and_costs_what_the_active_experts_cost(name):
    wanted = look.MODELS[name]
    model, x = look.randomized(wanted.make()), look.tokens(wanted.dims)
    plan = plan_replacement(model, experts=4, active=3)
    made = wider_dense(model, plan)
    assert step_zero_difference(model, made.model, lambda m: m(x)) < 3e-5
    wide = [layer.bank.to_dense(0) for _, layer in moe_layers(made.model)]
    assert [ffn.multiply_adds for ffn in wide] == [3 * site.multiply_adds for site in plan.sites]


def test_new_hidden_units_are_silent_but_not_copies():
    ffn = plan_replacement(clip(), experts=2).sites[0].read(tensors_of(clip()))
    wide = widened(ffn, 3, torch.Generator().manual_seed(0))
    assert len(torch.unique(wide.up, dim=0)) == 3 * ffn.width_hidden
    assert not wide.down[:, ffn.width_hidden :].any()
    assert same(widened(ffn, 1, torch.Generator()), ffn)


def test_a_scale_multiplies_the_outputs_exactly():
    ffn = plan_replacement(clip(), experts=2).sites[0].read(tensors_of(clip()))
    torch.testing.assert_close(scaled(ffn, 2.5).apply(look.tokens()), 2.5 * ffn.apply(look.tokens()))
    assert scaled(ffn, 1.0) is ffn


def test_tied_embeddings_stay_tied_and_shared_layers_stay_shared():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mlp, self.head = nn.Embedding(9, 12), look.ClipMlp(), nn.Linear(12, 9, bias=False)
            self.head.weight = self.embed.weight
            self.again = self.mlp

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.again(self.mlp(self.embed(ids))))

    model, ids = look.randomized(Tied()), torch.tensor([[1, 2, 8]])
    made = btx(
        [model, branch(model, 1)], plan_replacement(model, experts=2), RandomRouters(experts=2, rule=TopKRule(k=2, norm="renorm"))
    ).model
    assert made.head.weight is made.embed.weight
    assert made.again is made.mlp
    twin = sparse_copy(model, plan_replacement(model, experts=4), TOP2).model
    assert step_zero_difference(model, twin, lambda m: m(ids)) < 3e-5


# ---- what is refused


def test_models_that_do_not_fit_are_refused_by_name():
    seed = clip()
    plan = plan_replacement(seed, experts=2)
    routers = RandomRouters(experts=2, rule=TopKRule(k=2, norm="renorm"))
    with pytest.raises(InvalidInput, match="do not come from one seed: mean cosine"):
        btx([seed, clip(9)], plan, routers)
    with pytest.raises(InvalidInput, match="do not come from one seed"):
        soup([seed, clip(9)])
    wider = copy.deepcopy(seed)
    wider.layers[0].mlp.fc1, wider.layers[0].mlp.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)
    with pytest.raises(
        InvalidInput, match=r"model 1 has another architecture.*'layers\.0\.mlp\.fc1' is Linear\(in_features=12, out_features=24"
    ):
        btx([seed, wider], plan, routers)
    with pytest.raises(
        InvalidInput, match=r"plan has 2 experts for 'layers\.0\.mlp', and 3 models were given; plan with experts=3"
    ):
        btx([seed, seed, seed], plan, routers)
    with pytest.raises(InvalidInput, match="uses 1 of 2 experts, and the plan counted 2 of 2"):
        btx([seed, seed], plan, RandomRouters(experts=2, rule=TopKRule(k=1, norm="none")))
    with pytest.raises(InvalidInput, match="found no model"):
        soup([])
    with pytest.raises(InvalidInput, match=r"model 0 has no FFN 'layers\.0\.mlp'"):
        sparse_copy(look.Stack(look.BertLayer), plan, routers)


def test_an_activation_that_is_only_a_function_is_compared_too():
    """Nothing in the state or in the names of two such models differs."""
    plan = plan_replacement(look.Stack(lambda: look.Block(look.FunctionalMlp(torch.relu))), experts=2)
    other = look.Stack(lambda: look.Block(look.FunctionalMlp(torch.nn.functional.silu)))
    with pytest.raises(InvalidInput, match="has activation silu, and the plan has relu"):
        sparse_copy(other, plan, RandomRouters(experts=2, rule=TopKRule(k=2, norm="renorm")))


def test_whole_numbers_that_differ_cannot_be_averaged_but_counters_can():
    seed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    seed.register_buffer("table", torch.arange(3))
    other = copy.deepcopy(seed)
    other[1].num_batches_tracked += 5
    assert int(soup([seed, other]).model[1].num_batches_tracked) == 5
    other.table += 1
    with pytest.raises(InvalidInput, match="'table' holds whole numbers that differ"):
        soup([seed, other])


def test_a_bank_that_loses_an_expert_is_noticed(monkeypatch):
    """Fresh weights look like trained ones, so the bank is read back bit by bit."""
    kept = ExpertBank.set_expert

    def forgets_the_third(self, number, ffn):
        if number != 2:
            kept(self, number, ffn)

    monkeypatch.setattr(ExpertBank, "set_expert", forgets_the_third)
    with pytest.raises(InvalidInput, match=r"expert 2 of 'layers\.0\.mlp' lost `up` on its way into the bank"):
        sparse_copy(clip(), plan_replacement(clip(), experts=4), TOP2)


def test_a_tensor_that_nobody_writes_or_reads_is_noticed(monkeypatch):
    monkeypatch.setattr(upcyclers, "_write_rest", lambda ledger, rest: None)
    with pytest.raises(
        InvalidInput, match=r"tensor 'layers\.0\.norm1\.weight' \(12,\) float32 of the new model was never written"
    ):
        sparse_copy(clip(), plan_replacement(clip(), experts=4), TOP2)


def test_a_model_without_values_is_planned_but_not_upcycled():
    with torch.device("meta"):
        empty = look.Stack(lambda: look.Block(look.ClipMlp()))
    plan = plan_replacement(empty, experts=4)
    with pytest.raises(InvalidInput, match="device meta"):
        sparse_copy(empty, plan, TOP2)


def test_equal_router_rows_are_refused():
    model, plan = clip(), plan_replacement(clip(), experts=4)
    with pytest.raises(InvalidInput, match="are equal"):
        sparse_copy(model, plan, RandomRouters(experts=4, rule=TopKRule(k=2, norm="renorm"), std=0.0))
