"""Activity and units: exact counts, honest parameters, and controls that differ from Read-ME in one thing only."""

from dataclasses import replace

import pytest
import torch
from moe_carvings import activity_of, carved, domains_of
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.carving.activity import found_domains, measure_activity, nearest_domains
from upcycle3d.perception.moe.carving.carved_ffn import serve_ffns
from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns
from upcycle3d.perception.moe.carving.shared_routed import UnitPatterns, shared_and_routed, unit_patterns
from upcycle3d.perception.moe.carving.splits import pooled_units, random_units, readme_split, wrong_domain
from upcycle3d.perception.moe.carving.units import Carving, SiteUnits, top_units, units_of_ratio
from upcycle3d.perception.moe.surgery.ffn_sites import tensors_of
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.clusters import ClusterConfig, cluster_features

KINDS = ["llama", "clip", "region-head", "image-head", "gpt2", "dinov2-giant"]


# ---- activity


@pytest.mark.parametrize("gated", [False, True])
def test_activity_is_the_mean_size_of_what_the_last_map_reads(gated):
    """The oracle is a loop over tokens with the module's own layers; padding does not count."""
    mlp = look.randomized(look.LlamaMlp() if gated else look.ClipMlp())
    model = nn.Sequential(nn.LayerNorm(12), mlp)
    plan = plan_replacement(model, experts=2, active=1)
    x = look.tokens()
    padding = torch.tensor([[False, False, True], [False, True, True]])
    seen = {"some": [(x, padding)], "all": [(x, None), (2 * x, None)]}
    found = measure_activity(model, plan, seen, lambda m, b: m(b[0]), padding_of=lambda b: b[1])
    for number, batches in enumerate(seen.values()):
        total, count = torch.zeros(20, dtype=torch.float64), 0
        for batch, mask in batches:
            for i in range(2):
                for j in range(3):
                    if mask is None or not mask[i, j]:
                        token = model[0](batch[i, j])
                        if gated:
                            hidden = nn.functional.silu(mlp.gate_proj(token)) * mlp.up_proj(token)
                        else:
                            hidden = mlp.activation_fn(mlp.fc1(token))
                        total, count = total + hidden.detach().abs().double(), count + 1
        assert int(found.sites[0].tokens[number]) == count
        torch.testing.assert_close(found.sites[0].mean[number], total / count, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", look.MODELS)
def test_measuring_changes_no_model(name):
    """Every kind of FFN is measured, and the model is the same object with the same modules, modes and outputs."""
    model = look.randomized(look.MODELS[name].make()).train()
    modules, x = list(model.modules()), look.tokens(look.MODELS[name].dims)
    modes = [module.training for module in modules]
    activity = activity_of(model, name)
    assert [site.site for site in activity.sites] == [site.name for site in activity.plan.sites]
    assert all(int(site.tokens.sum()) > 0 and float(site.mean.min()) >= 0 for site in activity.sites)
    assert [module.training for module in modules] == modes
    assert all(a is b for a, b in zip(model.modules(), modules))
    assert model.eval()(x).shape[0] == 2


def test_dead_units_and_domains_with_few_tokens_are_reported():
    model = look.randomized(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)))
    with torch.no_grad():
        model[0].weight[[3, 7]] = 0
        model[0].bias[[3, 7]] = -1
    plan = plan_replacement(model, experts=2, active=1)
    batches = {"big": [torch.randn(50, 12)], "thin": [torch.randn(4, 12)]}
    activity = measure_activity(model, plan, batches, lambda m, x: m(x), least_tokens=10)
    assert activity.never_active == {"0": 2}
    assert activity.thin_domains == ("thin",)
    assert "too few tokens (below 10): thin" in str(activity)
    assert "never active: 2 of 20 units" in str(activity)
    kept = readme_split(activity, 0.9).units[0].with_shared.any(0)
    assert not kept[3]
    assert not kept[7]
    with pytest.raises(InvalidInput, match=r"no token of the domains \['none'\]"):
        measure_activity(model, plan, {"none": [torch.zeros(0, 12)]}, lambda m, x: m(x))
    with pytest.raises(InvalidInput, match="NaN"):
        measure_activity(model, plan, {"bad": [torch.full((2, 12), torch.nan)]}, lambda m, x: m(x))
    with pytest.raises(InvalidInput, match="padding must be bool of shape"):
        measure_activity(model, plan, {"a": [torch.zeros(2, 12)]}, lambda m, x: m(x), padding_of=lambda x: torch.zeros(3).bool())


def test_domains_are_found_where_documents_activate_the_same_units():
    """Documents of two hidden domains, in mixed order: clustering recovers them, and their activity is that of the true domains."""
    model = look.randomized(look.MODELS["llama"].make())
    plan = plan_replacement(model, experts=2, active=1)
    shift = torch.randn(2, 12, generator=torch.Generator().manual_seed(1)) * 3
    truth = [0, 1, 1, 0, 1, 0, 0, 1]
    items = {f"document {i}": [look.tokens(seed=i) * 0.3 + shift[d]] for i, d in enumerate(truth)}
    measured = measure_activity(model, plan, items, lambda m, x: m(x))
    found, groups = found_domains(measured, 2, lambda rows, k: cluster_features(rows, k, ClusterConfig()).assignment)
    assert len({(t, g) for t, g in zip(truth, groups.tolist())}) == 2
    true = {str(d): [x for i, (x,) in enumerate(items.values()) if truth[i] == d] for d in (0, 1)}
    known = measure_activity(model, plan, true, lambda m, x: m(x))
    order = [int(groups[truth.index(d)]) for d in (0, 1)]
    torch.testing.assert_close(found.sites[1].mean[order], known.sites[1].mean)
    new = {f"new {i}": [look.tokens(seed=50 + i) * 0.3 + shift[d]] for i, d in enumerate(truth)}
    fresh = measure_activity(model, plan, new, lambda m, x: m(x))
    assert nearest_domains(fresh, found).tolist() == groups.tolist()  # an unseen document has the domain of its kind
    one = plan_replacement(model, experts=2, active=1, only=[plan.sites[0].name])
    less = measure_activity(model, one, new, lambda m, x: m(x))
    with pytest.raises(InvalidInput, match="different FFNs"):
        nearest_domains(less, found)
    with pytest.raises(InvalidInput, match="9 domains cannot be found among 8"):
        found_domains(measured, 9, lambda rows, k: torch.zeros(len(rows)))


# ---- units


def test_exactly_n_units_and_ties_go_to_the_smaller_index():
    values = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    chosen = top_units(values, 2)
    assert chosen.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    assert [units_of_ratio(10, r) for r in (0.01, 0.25, 0.5, 0.9, 1.0)] == [1, 2, 5, 9, 10]
    with pytest.raises(InvalidInput, match=r"in \(0, 1\]"):
        units_of_ratio(10, 0.0)
    with pytest.raises(InvalidInput, match="NaN"):
        top_units(torch.tensor([1.0, torch.nan]), 1)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_a_readme_split_keeps_the_most_active_units_of_each_domain(name, ratio):
    """The oracle sorts in plain Python. Permanent units are those of all domains, and each expert has exactly N units."""
    model, carving = carved(name, ratio)
    activity = activity_of(model, name)
    for measured, units in zip(activity.sites, carving.units):
        number = max(1, round(units.width * ratio))
        tops = [set(sorted(range(units.width), key=lambda u: (-float(row[u]), u))[:number]) for row in measured.mean]
        permanent = set.intersection(*tops)
        assert set(units.shared_units.tolist()) == permanent
        assert [set(units.own_units(i).tolist()) for i in range(3)] == [top - permanent for top in tops]
        assert units.with_shared.sum(1).tolist() == [number] * 3
        assert units.union == len(set.union(*tops))


def test_units_and_carvings_refuse_what_is_not_true():
    off = torch.zeros(4, dtype=torch.bool)
    some = torch.tensor([[True, False, False, False], [False, True, False, False]])
    SiteUnits(site="a", shared=off, own=some)
    with pytest.raises(InvalidInput, match=r"units \[0\] of 'a' are shared and an expert's own"):
        SiteUnits(site="a", shared=some[0], own=some)
    with pytest.raises(InvalidInput, match=r"experts \[1\] of 'a' have no unit"):
        SiteUnits(site="a", shared=off, own=some & torch.tensor([[True], [False]]))
    with pytest.raises(InvalidInput, match="must be bool"):
        SiteUnits(site="a", shared=off.float(), own=some)
    _, carving = carved("llama")
    with pytest.raises(InvalidInput, match="needs their names"):
        replace(carving, domains=("one",))
    with pytest.raises(InvalidInput, match="the carving describes"):
        replace(carving, units=carving.units[::-1])


# ---- honest counts


def brute_force(model: nn.Module, carving: Carving) -> tuple[int, int]:
    """Unique and active parameters, counted number by number: a number counts if some expert's output depends on it."""
    unique = active = 0
    for site, units in zip(carving.plan.sites, carving.units):
        ffn = site.read(tensors_of(model))
        marks = []
        for expert in range(carving.experts):
            on = units.with_shared[expert]
            mark = [on[:, None].expand_as(ffn.up), on[None].expand_as(ffn.down)]
            mark += [] if ffn.gate is None else [on[:, None].expand_as(ffn.gate)]
            mark += [on for bias in (ffn.up_bias, ffn.gate_bias) if bias is not None]
            mark += [] if ffn.down_bias is None else [torch.ones(len(ffn.down_bias), dtype=torch.bool)]
            marks.append(torch.cat([m.flatten() for m in mark]))
        unique += int(torch.stack(marks).any(0).sum())
        active += max(int(mark.sum()) for mark in marks)
    return unique, active


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_parameters_are_counted_as_they_are(name, ratio):
    """Unique parameters are the union of the masks, stored ones are those of the modules that serve."""
    model, carving = carved(name, ratio)
    assert (carving.unique_parameters, carving.active_parameters) == brute_force(model, carving)
    assert carving.dense_parameters == sum(carving.plan.expert_parameters)
    assert carving.unique_parameters <= carving.dense_parameters
    rest = carving.plan.model_parameters - sum(carving.plan.site_parameters)
    if not any(site.up.norm or site.down.norm for site in carving.plan.sites):
        masked = mask_ffns(model, carving)
        assert sum(p.numel() for p in masked.parameters()) == carving.plan.model_parameters
    for fuse in (False, True):
        served = serve_ffns(model, carving, fuse=fuse)
        own = sum(p.numel() for p in served.parameters()) - rest
        assert own == carving.stored_parameters(fuse=fuse)
    assert carving.stored_parameters(fuse=True) == carving.dense_parameters or ratio < 1
    assert carving.shared_parameters + max(carving.expert_parameters) >= carving.active_parameters


def test_the_table_says_what_is_shared_pruned_and_stored():
    _, carving = carved("llama")
    text = str(carving)
    assert text.startswith("readme: 3 experts (domain 0, domain 1, domain 2), 1 per token, ratio 0.5")
    assert "layers.0.mlp" in text
    assert f"unique {carving.unique_parameters:,}" in text
    assert f"shared {carving.shared_share:.1%}" in text


# ---- controls


def test_pooled_units_are_one_expert_in_which_each_domain_counts_the_same():
    """A domain with values a thousand times larger must not decide alone."""
    model = look.randomized(look.MODELS["clip"].make())
    activity = activity_of(model, "clip")
    loud = replace(
        activity, sites=tuple(replace(s, total=s.total * torch.tensor([1000.0, 1, 1])[:, None]) for s in activity.sites)
    )
    one, other = pooled_units(activity, 0.5), pooled_units(loud, 0.5)
    assert one.experts == one.active == 1
    for a, b, site in zip(one.units, other.units, activity.sites):
        assert torch.equal(a.shared, b.shared)
        assert int(a.shared.sum()) == 10
        assert not a.own.any()
        relative = sum(row / row.mean() for row in site.mean)
        assert set(a.shared_units.tolist()) == set(relative.argsort(descending=True)[:10].tolist())
    assert one.unique_parameters == one.active_parameters == one.stored_parameters()


def test_random_and_wrong_experts_cost_what_readmes_cost():
    model, carving = carved("llama", 0.5)
    activity = activity_of(model, "llama")
    drawn, again, wrong = random_units(activity, 0.5, seed=1), random_units(activity, 0.5, seed=1), wrong_domain(carving)
    assert drawn.active_parameters == carving.active_parameters == wrong.active_parameters
    assert all(torch.equal(a.own, b.own) for a, b in zip(drawn.units, again.units))
    for right, turned in zip(carving.units, wrong.units):
        assert [turned.own_units(i).tolist() for i in range(3)] == [right.own_units(i).tolist() for i in (1, 2, 0)]
        assert torch.equal(right.shared, turned.shared)
    with pytest.raises(InvalidInput, match="its own units"):
        wrong_domain(carving, shift=3)


# ---- shared and routed units


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_shared_and_routed_units_are_the_most_often_active_and_groups_that_act_together(name):
    """Every unit belongs to somebody exactly once; groups have equal sizes; the shared ones are most often marked."""
    model = look.randomized(look.MODELS[name].make())
    plan = plan_replacement(model, experts=2, active=1)
    batches = [x for xs in domains_of(name).values() for x in xs]
    patterns = unit_patterns(model, plan, batches, lambda m, x: m(x), share=0.2, tokens=30)
    assert [tuple(m.shape) for m in patterns.marks] == [(30, 20)] * 2
    assert all(m.sum(1).tolist() == [4] * 30 for m in patterns.marks)
    carving = shared_and_routed(patterns, shared=0.25, groups=4, active=2)
    assert carving.experts == 4
    assert carving.ratio == pytest.approx(0.25 + 0.5 * 0.75)
    for units, marks in zip(carving.units, patterns.marks):
        assert sorted(units.own_widths) == [3, 4, 4, 4]
        assert units.own.sum(0).add(units.shared).tolist() == [1] * 20
        often = marks.sum(0)
        assert int(often[units.shared].min()) >= int(often[~units.shared].max())
        assert all(bool(units.own[i, unit]) for i, unit in enumerate(units.representatives))
    assert carving.unique_parameters == carving.dense_parameters
    with pytest.raises(InvalidInput, match="belong to no domain"):
        wrong_domain(carving)
    with pytest.raises(InvalidInput, match=r"2 units left|units left for 30 groups"):
        shared_and_routed(patterns, shared=0.25, groups=30, active=2)


def test_groups_find_units_that_are_active_in_the_same_tokens():
    """Planted: units 0-3, 4-7 and 8-11 are each active in their own third of the tokens."""
    marks = torch.zeros(30, 12, dtype=torch.bool)
    for third in range(3):
        marks[10 * third : 10 * third + 10, 4 * third : 4 * third + 4] = True
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    plan = plan_replacement(model, experts=2, active=1)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    patterns = UnitPatterns(plan=plan, marks=(marks[:, shuffled],), share=1 / 3)
    units = shared_and_routed(patterns, shared=0.0, groups=3, active=1).units[0]
    found = {frozenset(shuffled[units.own_units(i)].tolist()) for i in range(3)}
    assert found == {frozenset(range(4 * t, 4 * t + 4)) for t in range(3)}
