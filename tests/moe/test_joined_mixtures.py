"""Mixtures of several owners are joined without a change of any number, and an owner who opts out leaves nothing behind."""

import copy

import pytest
import torch
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.joined_mixtures import join_mixtures
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, sparse_copy

TOP2 = TopKRule(k=2, norm="renorm")


def owner(number: int, *, trained: bool = True) -> nn.Module:
    """The seed as expert 0, and one expert with a router row that only this owner has."""
    seed = look.randomized(look.Stack(lambda: look.Block(look.ClipMlp())))
    made = sparse_copy(seed, plan_replacement(seed, experts=2), RandomRouters(experts=2, rule=TOP2, std=1.0)).model
    draw = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for _, layer in moe_layers(made):
            layer.router.weight[1] = torch.randn(12, generator=draw)
            for weight in layer.bank.parameters():
                weight[1] += trained * 0.1 * torch.randn(weight[1].shape, generator=draw)
    return made


def test_rows_and_experts_keep_their_numbers_and_their_order():
    owners = [owner(1), owner(2), owner(3)]
    made = join_mixtures(owners, TOP2)
    for name, layer in moe_layers(made.model):
        parts = [dict(moe_layers(model))[name] for model in owners]
        assert layer.bank.shape.experts == layer.router.num_experts == 4
        assert torch.equal(layer.bank.up_proj, torch.cat([parts[0].bank.up_proj[:1], *(p.bank.up_proj[1:] for p in parts)]))
        assert torch.equal(layer.router.weight, torch.cat([parts[0].router.weight[:1], *(p.router.weight[1:] for p in parts)]))
    assert torch.equal(made.model.head.weight, owners[0].head.weight)
    assert not any(value.isnan().any() for value in made.model.state_dict().values())
    assert "became experts and router rows" in str(made.account)


def test_equal_experts_compute_what_the_dense_model_computes():
    seed = look.randomized(look.Stack(lambda: look.Block(look.ClipMlp())))
    made = join_mixtures([owner(1, trained=False), owner(2, trained=False)], TOP2).model
    torch.testing.assert_close(made(look.tokens()), seed(look.tokens()), rtol=1e-4, atol=3e-5)


def test_joining_one_owner_again_changes_nothing_and_who_opts_out_is_not_there():
    one = owner(1)
    assert torch.equal(join_mixtures([one], TOP2).model(look.tokens()), one(look.tokens()))
    for name, layer in moe_layers(join_mixtures([owner(1), owner(3)], TOP2).model):
        second = dict(moe_layers(owner(2)))[name].bank.down_proj[1]
        assert not any(torch.equal(weight, second) for weight in layer.bank.down_proj)


def test_what_an_owner_had_to_leave_frozen_is_checked():
    moved = owner(2)
    with torch.no_grad():
        moved.layers[1].norm1.weight[3] += 1e-3
    with pytest.raises(InvalidInput, match=r"'layers\.1\.norm1\.weight' of model 1 differs"):
        join_mixtures([owner(1), moved], TOP2)
    tuned = owner(2)
    with torch.no_grad():
        tuned.layers[0].mlp.bank.down_proj[0] *= 1.01
    with pytest.raises(InvalidInput, match=r"expert 0 at 'layers\.0\.mlp' of model 1 has another `down`"):
        join_mixtures([owner(1), tuned], TOP2)
    with pytest.raises(InvalidInput, match="are equal"):
        join_mixtures([owner(1), copy.deepcopy(owner(1))], TOP2)
    with pytest.raises(InvalidInput, match=r"model 1 has mixtures at \[\]"):
        join_mixtures([owner(1), look.Stack(lambda: look.Block(look.ClipMlp()))], TOP2)
    with pytest.raises(InvalidInput, match="found no mixture"):
        join_mixtures([], TOP2)
