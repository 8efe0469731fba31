"""Models that become one must have one structure and one origin; the message names the first difference, or the measure."""

import copy

import pytest
import torch
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.surgery.common_seed import alignment, require_common_seed, require_same_structure


def made(seed: int) -> nn.Module:
    return look.randomized(look.Stack(lambda: look.Block(look.ClipMlp())), seed)


def branch(model: nn.Module, step: float, seed: int = 1) -> nn.Module:
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += step * torch.randn(parameter.shape, generator=draw)
    return other


def test_the_cosine_is_one_for_copies_high_for_branches_and_low_for_strangers():
    seed = made(0)
    assert alignment(seed, copy.deepcopy(seed)).cosine == 1.0
    assert alignment(seed, branch(seed, 0.03)).cosine > 0.97
    assert abs(alignment(seed, made(7)).cosine) < 0.15


def test_the_measure_agrees_with_a_plain_loop():
    a, b = made(0), made(7)
    total, size = 0.0, 0
    for x, y in zip(a.parameters(), b.parameters()):
        if x.ndim > 1:
            total += torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0).item() * x.numel()
            size += x.numel()
    assert alignment(a, b).cosine == pytest.approx(total / size, abs=1e-6)


def test_ffns_may_differ_freely_where_the_rest_is_shared():
    """So experts of a stage that trains FFNs only are always accepted."""
    seed, other = made(0), made(7)
    names = [f"layers.{i}.mlp.fc{j}.{kind}" for i in (0, 1) for j in (1, 2) for kind in ("weight", "bias")]
    state = {**seed.state_dict(), **{name: other.state_dict()[name] for name in names}}
    twin = made(3)
    twin.load_state_dict(state)
    assert alignment(seed, twin, names).cosine == 1.0
    require_common_seed([seed, twin], names)


def test_strangers_are_refused_with_the_measure_and_far_branches_warned_about():
    seed = made(0)
    with pytest.raises(
        InvalidInput, match=r"models 0 and 2 do not come from one seed: mean cosine of the weight matrices -?0\.\d+"
    ):
        require_common_seed([seed, branch(seed, 0.01), made(7)])
    with pytest.warns(UserWarning, match="far from each other: mean cosine"):
        require_common_seed([seed, branch(seed, 0.35)])
    with pytest.warns(UserWarning, match="far from each other"):
        require_common_seed([seed, made(7)], allow_strangers=True)


def test_the_first_difference_of_structure_is_named():
    seed = made(0)
    require_same_structure([seed, made(1)])
    with pytest.raises(InvalidInput, match="found no model"):
        require_same_structure([])
    wider = copy.deepcopy(seed)
    wider.layers[1].mlp.fc1 = nn.Linear(12, 24)
    with pytest.raises(InvalidInput, match=r"model 1 .*'layers\.1\.mlp\.fc1' is Linear\(in_features=12, out_features=24"):
        require_same_structure([seed, wider])
    deeper = copy.deepcopy(seed)
    deeper.layers.append(look.Block(look.ClipMlp()))
    with pytest.raises(InvalidInput, match=r"'layers\.2' is Block"):
        require_same_structure([seed, deeper])
    epsilon = copy.deepcopy(seed)
    epsilon.layers[0].norm1.eps = 1e-3
    with pytest.raises(InvalidInput, match=r"eps=0\.001"):
        require_same_structure([seed, epsilon])
    with pytest.raises(InvalidInput, match="float16"):
        require_same_structure([seed, copy.deepcopy(seed).half()])
    extra = copy.deepcopy(seed)
    extra.scale = nn.Parameter(torch.ones(2))
    with pytest.raises(InvalidInput, match="only one of model 0 and model 1 has the tensor 'scale'"):
        require_same_structure([seed, extra])
