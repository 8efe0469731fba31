"""BAM loses no tensor, starts where its equations say, and leaves every given model alone; the same holds for its neighbors."""

import copy

import pytest
import torch
from torch import Tensor, nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.attention.attention_calls import given_attention_weights, mixed_attentions
from upcycle3d.perception.moe.attention.attention_readers import attention_of
from upcycle3d.perception.moe.attention.attention_sites import plan_attentions
from upcycle3d.perception.moe.language.small_lm import SmallLm, SmallLmConfig
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.bam import AttentionRouting, Ensemble, bam, oracle_domain, with_oracle
from upcycle3d.perception.moe.upcycling.cluster_aware import cluster_aware, collect_inputs
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, saved_tensors, soup, step_zero_difference

TOP1 = RandomRouters(experts=3, rule=TopKRule(k=1, norm="none"))
SOFT = RandomRouters(experts=3, rule=None)
pytestmark = pytest.mark.usefixtures("one_thread")


def seed_model(layout: str = "parallel", kv_heads: int = 2) -> SmallLm:
    config = SmallLmConfig(vocabulary=20, width=16, hidden=24, layers=2, heads=4, kv_heads=kv_heads, layout=layout)
    return config.build(seed=1).eval()


def branch(model: nn.Module, seed: int, step: float = 0.02) -> nn.Module:
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor += step * torch.randn(tensor.shape, generator=draw)
    return other


def ids() -> Tensor:
    return torch.arange(14).view(2, 7) * 3 % 20


def logits(model: nn.Module) -> Tensor:
    return model(ids()).logits


def mixed(models, key_values="expert", routers=SOFT, **options):
    active = 1 if routers is TOP1 else 3
    plan = plan_replacement(models[0], experts=len(models), active=active)
    return bam(
        models[1:],
        plan,
        plan_attentions(models[0], experts=len(models), key_values=key_values),
        routers,
        seed=models[0],
        **options,
    )


def plain_bam(models: list[SmallLm], made: nn.Module, tokens: Tensor, key_values: str, top1: bool) -> Tensor:
    """The equations by loops over the models' own modules; only the routers come from the mixture."""
    mean = soup(models).model
    x = mean.embed_tokens(tokens)
    positions = mean._angles(tokens.shape[1], x)
    for i, layer in enumerate(made.layers):
        block = mean.layers[i]

        def attend(read: Tensor, i=i, layer=layer) -> Tensor:
            gate = (read @ layer.self_attn.mixture.router.T).softmax(-1)
            parts = []
            for model in models:
                own = copy.deepcopy(model.layers[i].self_attn)
                if key_values == "shared":
                    own.k_proj, own.v_proj = mean.layers[i].self_attn.k_proj, mean.layers[i].self_attn.v_proj
                parts.append(own(hidden_states=read, position_embeddings=positions)[0])
            return sum(gate[..., n : n + 1] * part for n, part in enumerate(parts))

        def feed(read: Tensor, i=i, layer=layer) -> Tensor:
            p = (read @ layer.mlp.router.weight.T).softmax(-1)
            if top1:
                p = p * (p == p.max(-1, keepdim=True).values)
            return sum(p[..., n : n + 1] * model.layers[i].mlp(read) for n, model in enumerate(models))

        read = block.input_layernorm(x)
        if block.post_attention_layernorm is None:
            x = x + attend(read) + feed(read)
        else:
            x = x + attend(read)
            x = x + feed(block.post_attention_layernorm(x))
    return mean.lm_head(mean.norm(x))


@pytest.mark.parametrize("layout", ["parallel", "sequential"])
@pytest.mark.parametrize("key_values", ["expert", "shared"])
@pytest.mark.parametrize("top1", [True, False])
def test_the_mixture_is_the_equations(layout, key_values, top1):
    """Branches whose every tensor differs; loops over the models give the same logits and the same gradients."""
    seed = seed_model(layout)
    models = [seed, branch(seed, 1), branch(seed, 2)]
    made = mixed(models, key_values, TOP1 if top1 else SOFT).model
    wanted = plain_bam(models, made, ids(), key_values, top1)
    torch.testing.assert_close(logits(made), wanted, rtol=1e-4, atol=1e-5)
    slope = torch.autograd.grad(logits(made).square().sum(), made.layers[0].self_attn.mixture.router)[0]
    expected = torch.autograd.grad(wanted.square().sum(), made.layers[0].self_attn.mixture.router)[0]
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key_values", ["expert", "shared"])
def test_equal_models_are_the_dense_model_for_any_router(key_values):
    """Soft mixing of copies changes nothing; averaging copies is the identity, bit by bit."""
    seed = seed_model()
    models = [seed, copy.deepcopy(seed), copy.deepcopy(seed)]
    made = mixed(models, key_values)
    assert step_zero_difference(seed, made.model, logits) < 1e-5
    assert torch.equal(made.model.embed_tokens.weight, seed.embed_tokens.weight)
    assert torch.equal(made.model.norm.weight, seed.norm.weight)


def test_a_top_1_ffn_starts_weaker_by_its_probability_and_the_scale_corrects_it():
    """With near-uniform routers each probability is about 1/3: three times the output is the dense model's again."""
    seed = seed_model()
    models = [seed, copy.deepcopy(seed), copy.deepcopy(seed)]
    weak, corrected = (step_zero_difference(seed, mixed(models, routers=TOP1, expert_scale=s).model, logits) for s in (1.0, 3.0))
    assert corrected < 0.3 * weak


def test_every_tensor_is_accounted_for_and_no_model_changes():
    seed = seed_model()
    models = [seed, branch(seed, 1), branch(seed, 2)]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    made = mixed(models)
    assert len(made.account.read) == 3 * len(seed.state_dict())
    assert len(made.account.written) == len(made.model.state_dict())
    assert not any(v.isnan().any() for v in saved_tensors(made.model).values())
    for model, old in zip(models, before):
        assert all(torch.equal(old[k], v) for k, v in model.state_dict().items())
    for name, attention in mixed_attentions(made.model):
        for number, model in enumerate(models):
            source = attention_of(model.get_submodule(name))
            assert all(torch.equal(t, source.tensors()[key]) for key, t in attention.mixture.to_dense(number).tensors().items())


def test_experts_routers_and_shared_parts_all_get_gradients():
    """A layout in which some experts stay frozen without a word is the commonest fault of fine-tuning mixtures."""
    seed = seed_model()
    made = mixed([seed, branch(seed, 1), branch(seed, 2)], routers=TOP1, expert_scale=3.0).model.train()
    for step in range(4):
        tokens = torch.randint(0, 20, (4, 16), generator=torch.Generator().manual_seed(step))
        made(tokens).logits.logsumexp(-1).mean().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        per_expert = parameter.grad.flatten(1) if ".bank." in name or ".mixture." in name else parameter.grad.flatten()[None]
        assert (per_expert.abs().amax(1) > 0).all(), name


def test_the_plan_counts_what_is_built():
    for key_values in ("expert", "shared"):
        seed = seed_model()
        plan = plan_attentions(seed, experts=3, key_values=key_values)
        made = mixed([seed, branch(seed, 1), branch(seed, 2)], key_values).model
        built = sum(p.numel() for _, a in mixed_attentions(made) for p in a.parameters())
        assert plan.parameters_after == built
        assert plan.parameters_before == sum(p.numel() for layer in seed.layers for p in layer.self_attn.parameters())
    assert "shared" in str(plan)


def test_numbers_that_do_not_fit_and_strangers_are_refused():
    seed = seed_model()
    with pytest.raises(InvalidInput, match=r"2 models .* plans for 2 experts; the FFN plan has 3"):
        bam([branch(seed, 1)], plan_replacement(seed, experts=3, active=3), plan_attentions(seed, experts=3), SOFT, seed=seed)
    stranger = SmallLmConfig(vocabulary=20, width=16, hidden=24, layers=2, kv_heads=2).build(seed=9)
    with pytest.raises(InvalidInput, match="one seed"):
        mixed([seed, stranger, branch(seed, 1)])
    with pytest.raises(InvalidInput, match="another architecture"):
        mixed([seed, seed_model("sequential"), branch(seed, 1)])
    with pytest.raises(InvalidInput, match="nothing looked like one"):
        plan_attentions(nn.Linear(2, 2), experts=2)


def test_an_attention_that_computes_something_else_is_refused():
    """Its four maps look right, but it scales the queries: the trial on random tokens tells."""

    class Odd(type(seed_model().layers[0].self_attn)):
        def forward(self, hidden_states, position_embeddings, attention_mask=None):
            return super().forward(2 * hidden_states, position_embeddings, attention_mask)

    model = seed_model()
    odd = Odd(model.config)
    odd.load_state_dict(model.layers[1].self_attn.state_dict())
    model.layers[1].self_attn = odd
    plan = plan_attentions(model, experts=2)
    assert [site.name for site in plan.sites] == ["layers.0.self_attn"]
    assert "is not that of its four linear maps" in plan.refused[0].reason


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_of_torch_becomes_a_mixture(batch_first):
    """Equal experts in `nn.TransformerEncoder` with padding and a causal mask are the dense encoder, in both modes."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=batch_first)
    seed = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in seed.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 12)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def run(model: nn.Module) -> Tensor:
        given = x if batch_first else x.transpose(0, 1)
        out = model(given, mask=hidden, src_key_padding_mask=padding)
        return out if batch_first else out.transpose(0, 1)

    made = mixed([seed, copy.deepcopy(seed), copy.deepcopy(seed)]).model
    assert len(mixed_attentions(made)) == 2
    torch.testing.assert_close(run(made.eval())[~padding], run(seed)[~padding], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(made.train())[~padding], run(seed)[~padding], rtol=1e-4, atol=1e-4)


def test_an_oracle_uses_one_model_and_given_weights_replace_the_router():
    """Where the rest is equal, sending everything to expert 1 is model 1."""
    seed = seed_model()
    other = copy.deepcopy(seed)
    with torch.no_grad():
        for layer in other.layers:
            for part in (layer.self_attn, layer.mlp):
                for parameter in part.parameters():
                    parameter += 0.02
    made = with_oracle(mixed([seed, other, branch(seed, 1, 0.0)]).model)
    with oracle_domain(made, 1, 3):
        torch.testing.assert_close(logits(made), logits(other), rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match=r"weights must be \(3,\)"), given_attention_weights(made, torch.ones(2) / 2):
        logits(made)


def test_the_use_of_attention_experts_is_counted_in_evaluation():
    made = mixed([seed_model(), branch(seed_model(), 1), branch(seed_model(), 2)]).model.eval()
    _, layer = mixed_attentions(made)[0]
    logits(made)
    use = layer.take_use()
    assert sum(use) == pytest.approx(1.0)
    assert layer.take_use() == (0.0, 0.0, 0.0)


def test_routing_options_begin_as_they_say():
    models = [seed_model(), branch(seed_model(), 1), branch(seed_model(), 2)]
    uniform = mixed(models, routing=AttentionRouting(std=0.0)).model
    assert all(not a.mixture.router.any() for _, a in mixed_attentions(uniform))
    drawn = [mixed(models, routing=AttentionRouting(seed=s)).model.layers[0].self_attn.mixture.router for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_an_ensemble_averages_probabilities():
    models = [seed_model(), branch(seed_model(), 1)]
    found = Ensemble(models).log_probabilities(logits).exp()
    torch.testing.assert_close(found, torch.stack([logits(m).softmax(-1) for m in models]).mean(0))


# ---- cluster-aware upcycling


@pytest.mark.parametrize("name", look.MODELS)
def test_inputs_are_collected_from_every_known_block_and_the_model_stays(name):
    wanted = look.MODELS[name]
    model, x = look.randomized(wanted.make()), look.tokens(wanted.dims)
    model.eval()
    before = model(x)
    plan = plan_replacement(model, experts=2, batch_norm="fold")
    found = collect_inputs(model, plan, lambda m: m(x), most=5)
    assert {k: v.shape[1] for k, v in found.items()} == {site.name: site.width_in for site in plan.sites}
    assert all(len(v) == 5 for v in found.values())
    assert torch.equal(model(x), before)


def test_with_all_energy_cluster_experts_are_copies_and_with_less_they_serve_their_own_cluster_best():
    seed = seed_model()
    plan = plan_replacement(seed, experts=3, active=2)
    inputs = collect_inputs(seed, plan, lambda m: [m(torch.randint(0, 20, (8, 16))) for _ in range(4)])
    rule = TopKRule(k=2, norm="renorm")
    whole = cluster_aware(seed, plan, inputs, rule, energy=1.0)
    assert step_zero_difference(seed, whole.model, logits) < 1e-5
    made = cluster_aware(seed, plan, inputs, rule, energy=0.8).model
    site, (_, layer) = plan.sites[0], moe_layers(made)[0]
    tokens, dense = inputs[site.name], seed.layers[0].mlp
    nearest = layer.router(tokens).top1
    losses = [(layer.bank.to_dense(e).apply(tokens) - dense(tokens)).square().sum(1) for e in range(3)]
    own = torch.stack(losses, 1).gather(1, nearest[:, None]).mean()
    assert own < torch.stack(losses, 1).mean()


def test_cluster_aware_refuses_missing_tokens():
    seed = seed_model()
    plan = plan_replacement(seed, experts=3, active=2)
    with pytest.raises(InvalidInput, match="needs tokens"):
        cluster_aware(seed, plan, {}, TopKRule(k=2, norm="renorm"))
    with pytest.raises(InvalidInput, match="no token arrived"):
        collect_inputs(seed, plan, lambda m: None)
