"""A plan tells what it will do, does that and nothing else, and takes it back bit by bit."""

import copy

import pytest
import torch
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.dense_ffn import DenseFfn
from upcycle3d.perception.moe.surgery.ffn_sites import tensors_of
from upcycle3d.perception.moe.surgery.replacement import MixtureSpot, plan_replacement

each_model = pytest.mark.parametrize("name", look.MODELS)


class Frozen(nn.Module):
    """Stands for a mixture: computes one dense FFN."""

    def __init__(self, ffn: DenseFfn) -> None:
        super().__init__()
        self.ffn, self.up = ffn, nn.Parameter(ffn.up.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == self.ffn.width_in
        return self.ffn.apply(x)


def stand_ins(model, plan):
    return {site.name: Frozen(site.read(tensors_of(model)).clone()) for site in plan.sites}


@each_model
def test_a_replacement_by_the_same_ffn_changes_nothing_and_is_undone_bit_by_bit(name):
    wanted = look.MODELS[name]
    model, x = look.randomized(wanted.make()), look.tokens(wanted.dims)
    before, keys, attributes = model(x), list(model.state_dict()), dict(model.__dict__)
    state = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    plan = plan_replacement(model, experts=4)
    applied = plan.apply(model, stand_ins(model, plan))
    assert sum(isinstance(module, Frozen) for module in model.modules()) == wanted.count
    torch.testing.assert_close(model(x), before, rtol=2e-5, atol=2e-6)
    assert not set(tensors_of(model)) & {tensor for site in plan.sites for tensor in site.tensors}
    applied.reverse()
    assert list(model.state_dict()) == keys
    assert dict(model.__dict__).keys() == attributes.keys()
    for key, value in model.state_dict(keep_vars=True).items():
        assert value is state[key][0]
        assert torch.equal(value, state[key][1])
    assert torch.equal(model(x), before)
    with pytest.raises(InvalidInput, match="reversed already"):
        applied.reverse()


def test_an_encoder_with_padding_leaves_torchs_fused_evaluation_while_replaced():
    """In evaluation mode torch reads `linear1.weight` itself, without calling the layer."""
    model = look.randomized(nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2))
    x, padding = look.tokens(), torch.tensor([[False, False, True], [False, True, True]])
    kept = ~padding
    before = model(x, src_key_padding_mask=padding)
    plan = plan_replacement(model, experts=2)
    applied = plan.apply(model, stand_ins(model, plan))
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], before[kept], rtol=2e-5, atol=2e-6)
    applied.reverse()
    assert model.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == 1


def test_parameters_and_compute_are_counted_as_they_will_be():
    model = look.Stack(lambda: look.Block(look.ClipMlp()))
    plan = plan_replacement(model, experts=4, active=2)
    ffn = 12 * 20 + 20 + 20 * 12 + 12
    assert plan.site_parameters == plan.expert_parameters == (ffn, ffn)
    assert plan.model_parameters == sum(p.numel() for p in model.parameters())
    assert plan.parameters_after == plan.model_parameters + 2 * (3 * ffn + 4 * 12)
    assert plan.multiply_adds_before == 2 * 2 * 12 * 20
    assert plan.multiply_adds_after == 2 * (2 * 2 * 12 * 20 + 4 * 12)


def test_a_folded_batch_norm_counts_as_a_bias_of_every_expert():
    plan = plan_replacement(look.region_head(), experts=3, active=1)
    assert plan.site_parameters == (12 * 16 + 16 * 16 + 4 * 16,)
    assert plan.expert_parameters == (12 * 16 + 16 * 16 + 2 * 16,)
    assert plan.parameters_after == plan.model_parameters - plan.site_parameters[0] + 3 * (plan.expert_parameters[0] + 12)


def test_a_stage_that_trains_ffns_only_learns_from_the_plan_where_they_are():
    assert plan_replacement(look.OldVitLayer(), experts=2).ffn_modules == ("intermediate.dense", "output.dense")
    assert plan_replacement(look.region_head(), experts=2).ffn_modules == ("0", "1", "4", "5")


def test_the_table_shows_names_forms_widths_costs_and_what_stays_dense():
    text = str(plan_replacement(nn.ModuleList([look.Block(look.LlamaMlp()), look.ScaledMlp()]), experts=4))
    lines = text.splitlines()
    assert lines[0] == "1 FFNs become mixtures of 4 experts, 2 active per token"
    assert lines[1].split("  ")[0] == "FFN"
    assert "0.mlp" in lines[2]
    assert "module, gated silu" in lines[2]
    assert "12 -> 20 -> 12" in lines[2]
    assert f"{3 * 12 * 20:,}" in lines[2]
    assert f"{4 * (3 * 12 * 20 + 12):,}" in lines[2]
    assert any(line.startswith("stays dense: 1: its linear maps fit together, but") for line in lines)
    assert len({len(line) for line in lines[1:4]}) == 1


def test_some_ffns_may_be_chosen():
    model = look.Stack(lambda: look.Block(look.ClipMlp()))
    assert [s.name for s in plan_replacement(model, experts=2, only=["layers.1.*"]).sites] == ["layers.1.mlp"]
    assert [s.name for s in plan_replacement(model, experts=2, choose=lambda s: "0" in s.name).sites] == ["layers.0.mlp"]
    with pytest.raises(InvalidInput, match=r"no FFN fits 'blocks\.0'; there are layers\.0\.mlp, layers\.1\.mlp"):
        plan_replacement(model, experts=2, only=["blocks.0"])
    with pytest.raises(InvalidInput, match="none of the 2 FFNs was chosen"):
        plan_replacement(model, experts=2, choose=lambda site: False)
    with pytest.raises(InvalidInput, match="cannot use 3 of 2 experts"):
        plan_replacement(model, experts=2, active=3)


def test_a_model_without_an_ffn_is_refused_with_all_that_was_looked_at():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), look.ScaledMlp(), look.BertSelfAttention())
    with pytest.raises(InvalidInput, match=r"found no FFN to replace") as error:
        plan_replacement(model, experts=2)
    text = str(error.value)
    assert "5 x Linear, 1 x Conv2d" in text
    assert "2: its linear maps fit together, but it computes something else" in text
    assert "\n  3: " in text
    with pytest.raises(InvalidInput, match=r"1 x Conv2d[^|]*nothing looked like one"):
        plan_replacement(nn.Conv2d(3, 4, 3), experts=2)


def test_another_model_is_refused_before_anything_is_changed():
    model = look.Stack(lambda: look.Block(look.ClipMlp()))
    plan = plan_replacement(model, experts=2)
    modules = stand_ins(model, plan)
    other = look.Stack(lambda: look.Block(look.TimmMlp(norm=True)))
    shown = repr(other)
    with pytest.raises(InvalidInput, match=r"no FFN 'layers\.0\.mlp'.*layers\.0\.mlp\.norm\.weight"):
        plan.check(other, "model 1")
    with pytest.raises(InvalidInput, match="activation gelu, and the plan has quick_gelu"):
        plan.check(look.Stack(lambda: look.Block(look.ClipMlp(nn.GELU()))), "model 1")
    plan.check(copy.deepcopy(model))
    with pytest.raises(InvalidInput, match=r"needs the tensor 'layers\.0\.mlp\.fc1\.weight', which is not there"):
        plan.apply(look.Stack(look.BertLayer), modules)
    with pytest.raises(InvalidInput, match=r"missing \['layers\.1\.mlp'\]"):
        plan.apply(other, {"layers.0.mlp": modules["layers.0.mlp"]})
    assert repr(other) == shown


def test_a_place_that_changed_since_is_not_overwritten():
    model = look.Stack(lambda: look.Block(look.ClipMlp()))
    plan = plan_replacement(model, experts=2)
    applied = plan.apply(model, stand_ins(model, plan))
    model.layers[1].mlp = nn.Identity()
    with pytest.raises(InvalidInput, match=r"'layers\.1\.mlp': it was changed since and is now Identity"):
        applied.reverse()
    assert isinstance(model.layers[0].mlp, Frozen)


def test_a_spot_moves_channels_and_drops_outputs_only_in_training():
    spot = MixtureSpot(nn.Linear(12, 5), channel_dim=-3, dropout_after=0.9)
    assert spot(torch.randn(2, 12, 4, 3)).shape == (2, 5, 4, 3)
    x = torch.randn(1, 12, 30, 30)
    assert (spot.train()(x) == 0).float().mean() > 0.8
    assert (spot.eval()(x) == 0).sum() == 0
    assert spot(torch.zeros(0, 12, 4, 3)).shape == (0, 5, 4, 3)


def test_modes_follow_the_model_in_both_directions():
    model = look.Stack(lambda: look.Block(look.TimmMlp())).eval()
    plan = plan_replacement(model, experts=2)
    applied = plan.apply(model, stand_ins(model, plan))
    assert not any(module.training for module in model.modules())
    model.train()
    applied.reverse()
    assert all(module.training for module in model.modules())
