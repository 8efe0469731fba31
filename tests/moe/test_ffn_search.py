"""FFNs are found by structure in every known block, read correctly, and what only looks like one is refused with the reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.surgery.ffn_search import find_ffns
from upcycle3d.perception.moe.surgery.ffn_sites import tensors_of

each_model = pytest.mark.parametrize("name", look.MODELS)


def reasons(model: nn.Module, **options) -> str:
    search = find_ffns(model, **options)
    assert search.sites == ()
    return "\n".join(str(refused) for refused in search.refused)


@each_model
def test_every_block_is_found_with_its_activation_gate_and_form(name):
    wanted = look.MODELS[name]
    sites = find_ffns(wanted.make()).sites
    assert len(sites) == wanted.count
    site = sites[0]
    found = (site.name, site.kind, site.activation, site.gate is not None)
    assert found == (wanted.first, wanted.kind, wanted.act, wanted.gated)
    assert site.channel_dim == (-1 - wanted.dims if wanted.dims else None)


@each_model
def test_a_search_leaves_the_model_as_it_was(name):
    model = look.randomized(look.MODELS[name].make()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shown, modes = repr(model), [m.training for m in model.modules()]
    find_ffns(model)
    assert repr(model) == shown
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("make", [look.LlamaMlp, look.SwishGluFfn])
def test_gate_and_up_are_never_swapped(make, gate_first):
    """A swap gives other numbers and no error, so unequal weights must reproduce the module's own output."""
    mlp = look.randomized(make(gate_first))
    model = nn.ModuleDict({"mlp": mlp})
    (site,) = find_ffns(model).sites
    x = look.tokens()
    torch.testing.assert_close(site.read(tensors_of(model)).apply(x), mlp(x))


def test_layers_that_differ_in_nothing_but_a_function_are_told_apart():
    """One probe serves all layers that look the same, so what looks the same must be the same."""
    model = nn.ModuleList([look.FunctionalMlp(F.silu), look.FunctionalMlp(F.relu), look.FunctionalMlp(F.silu)])
    assert [site.activation for site in find_ffns(model).sites] == ["silu", "relu", "silu"]


def test_dropouts_of_hidden_units_and_of_outputs_are_told_apart():
    (site,) = find_ffns(nn.ModuleList([look.TimmMlp(drop=(0.1, 0.2))])).sites
    assert (site.dropout, site.dropout_after) == (0.1, 0.2)
    (site,) = find_ffns(nn.ModuleList([look.Gpt2Mlp()])).sites
    assert (site.dropout, site.dropout_after) == (0.0, 0.3)
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.4)
    (site,) = find_ffns(nn.ModuleList([layer])).sites
    assert (site.dropout, site.dropout_after) == (0.4, 0.0)  # the layer keeps its second dropout itself


def test_a_folded_batch_norm_reproduces_the_chain():
    model = look.randomized(look.region_head())
    x = torch.randn(4, 12)
    (site,) = find_ffns(model).sites
    torch.testing.assert_close(site.read(tensors_of(model)).apply(x), model[:6](x[..., None])[..., 0], rtol=1e-5, atol=1e-5)
    assert len(site.tensors) == 2 + 2 * 5


def test_the_rules_for_batch_norms():
    head = look.region_head()
    assert find_ffns(head, batch_norm="refuse").sites == ()
    (shared,) = find_ffns(head, batch_norm="share").sites
    assert [edit.attribute for edit in shared.edits] == ["0", "1", "2", "3", "4"]  # the batch norm at 5 stays
    without = look.region_head(norm=lambda c: nn.BatchNorm1d(c, track_running_stats=False))
    assert "'1' keeps no running statistics" in reasons(nn.Sequential(*without[:5]))
    assert "batch_norm='refuse'" in reasons(look.linear_head(), batch_norm="refuse")
    with pytest.raises(InvalidInput, match="must be one of"):
        find_ffns(head, batch_norm="drop")


def test_a_wide_first_layer_stays_dense_unless_asked():
    head = nn.Sequential(nn.Linear(9000, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    search = find_ffns(head)
    assert [site.name for site in search.sites] == ["2"]
    assert "9,000 inputs" in search.refused[0].reason
    assert [site.name for site in find_ffns(head, widest_input=None).sites] == ["0"]


def test_what_lies_between_or_around_the_linear_maps_is_refused_with_the_reason():
    assert "layers.0.mlp.norm.weight" in reasons(look.Stack(lambda: look.Block(look.TimmMlp(norm=True))))
    assert "computes something else" in reasons(nn.ModuleList([look.ScaledMlp()]))
    assert "computes something else" in reasons(nn.ModuleList([look.FunctionalMlp(F.mish)]))
    assert "do not fit together" in reasons(nn.ModuleList([nn.Bilinear(3, 4, 5), _Unequal()]))
    chain = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.LayerNorm(20), nn.Linear(20, 12))
    assert "after its activation comes '2', LayerNorm" in reasons(chain)
    assert "the model itself" in reasons(look.ClipMlp())
    assert find_ffns(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).refused == ()


class _Unequal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(7, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def test_attention_is_never_taken_for_an_ffn():
    search = find_ffns(
        nn.ModuleDict({"attn": look.Attention(), "self": look.BertSelfAttention(), "mha": nn.MultiheadAttention(12, 2)})
    )
    assert search.sites == ()
    assert [refused.name for refused in search.refused] == ["self"]


def test_ties_hooks_and_parametrizations_are_refused():
    tied = look.Stack(lambda: look.Block(look.ClipMlp()))
    tied.layers[1].mlp.fc1.weight = tied.layers[0].mlp.fc1.weight
    assert "is also 'layers." in reasons(tied)
    hooked = nn.ModuleList([look.ClipMlp()])
    hooked[0].fc1.register_forward_hook(lambda *_: None)
    assert "'0.fc1' has forward hooks" in reasons(hooked)
    normed = nn.ModuleList([look.ClipMlp()])
    parametrizations.weight_norm(normed[0].fc1)
    assert "parametrizations" in reasons(normed)
    layer = nn.Linear(12, 12)
    assert "used in 2 places" in reasons(nn.Sequential(layer, nn.ReLU(), layer))


def test_a_module_that_is_used_twice_is_one_ffn_with_two_places():
    mlp = look.ClipMlp()
    (site,) = find_ffns(nn.ModuleList([look.Block(mlp), look.Block(mlp)])).sites
    assert [edit.path for edit in site.edits] == ["0.mlp", "1.mlp"]


def test_a_module_that_is_registered_under_two_names_is_given_back_unharmed():
    mlp = look.ClipMlp()
    mlp.same = mlp.fc1
    kept, shown = mlp.fc1.weight, mlp.fc1.weight.clone()
    assert len(find_ffns(nn.ModuleList([mlp])).sites) == 1
    assert mlp.fc1.weight is kept
    assert torch.equal(kept, shown)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantized_weights_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].register_buffer("qweight", torch.zeros(4, 1, dtype=torch.int32))
    with pytest.raises(InvalidInput, match=r"quantized: '2\.qweight' is stored as int32"):
        find_ffns(model)
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    with pytest.raises(InvalidInput, match="whose weight is packed"):
        find_ffns(dynamic)


def test_half_precision_and_weights_that_are_not_there_can_be_searched():
    assert len(find_ffns(look.Stack(lambda: look.Block(look.LlamaMlp())).bfloat16()).sites) == 2
    with torch.device("meta"):
        model = look.Stack(lambda: look.Block(look.LlamaMlp()))
    assert len(find_ffns(model).sites) == 2


def test_a_layer_that_computes_more_than_its_weight_says_is_named():
    """An adapter inside an FFN kept that FFN dense, and the plan said nothing about it."""

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    mlp = look.ClipMlp()
    mlp.fc1 = Adapted(mlp.fc1.in_features, mlp.fc1.out_features)
    assert "'mlp.fc1' is a Adapted" in reasons(nn.ModuleDict({"mlp": mlp}))
