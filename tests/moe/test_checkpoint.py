"""A checkpoint gives back the same model: all weights, the places of the mixtures, and the rule by which each router chooses."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.tensor_file import CorruptFile, read_tensors, write_tensors
from upcycle3d.perception.moe.checkpoints.checkpoint import (
    MIXTURE_FILE,
    BaseModel,
    describe_mixture,
    load_mixture,
    read_description,
    save_mixture,
)
from upcycle3d.perception.moe.checkpoints.mixture_forms import RouterForm
from upcycle3d.perception.moe.layers.bank import ExpertBank
from upcycle3d.perception.moe.layers.control_routers import FrozenRouter, GivenRouter, HashRouter, OracleRouter, UniformRouter
from upcycle3d.perception.moe.layers.moe_ffn import MoeFfn, moe_layers
from upcycle3d.perception.moe.layers.routers import SoftRouter, TopKRouter
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, drop_upcycling

TOP2 = TopKRule(k=2, norm="renorm")


def made(name: str = "clip", rule: TopKRule | None = TOP2, seed: int = 1):
    """A dense model, and a mixture of experts that differ."""
    wanted = look.MODELS[name]
    dense = look.randomized(wanted.make())
    plan = plan_replacement(dense, experts=3, active=3 if rule is None else rule.k)
    routers = RandomRouters(experts=3, rule=rule, std=0.5)
    return dense, drop_upcycling(dense, plan, routers, draw=seed), look.tokens(wanted.dims)


@pytest.mark.parametrize("name", look.MODELS)
def test_every_kind_of_block_comes_back_bit_by_bit(name, tmp_path):
    dense, upcycled, x = made(name)
    save_mixture(tmp_path / "m.safetensors", upcycled.model, upcycled.plan)
    strange = look.randomized(copy.deepcopy(dense), 5)  # its weights must not matter
    loaded = load_mixture(tmp_path / "m.safetensors", strange)
    before, after = upcycled.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    upcycled.model.eval()
    with torch.no_grad():
        assert torch.equal(upcycled.model(x), loaded.model(x))
    assert not moe_layers(strange)


@pytest.mark.parametrize(
    "rule",
    [TopKRule(k=1, norm="none"), TopKRule(k=2, norm="none"), TopKRule(k=2, norm="renorm", score="sigmoid"), None],
    ids=["top1", "top2", "sigmoid", "soft"],
)
def test_the_routing_rule_comes_from_the_file(rule, tmp_path):
    dense, upcycled, x = made(rule=rule)
    save_mixture(tmp_path / "m.safetensors", upcycled.model, upcycled.plan, note="top 5 of 7 were evaluated")
    loaded = load_mixture(tmp_path / "m.safetensors", dense)
    upcycled.model.eval()
    with torch.no_grad():
        assert torch.equal(upcycled.model(x), loaded.model(x))
    said = str(read_description(tmp_path / "m.safetensors"))
    assert "top 5 of 7 were evaluated" in said
    for part in ("soft",) if rule is None else (f"k = {rule.k}", f"norm = {rule.norm}", f"score = {rule.score}"):
        assert part in said


@pytest.mark.parametrize(
    "router",
    [
        TopKRouter(12, 3, TopKRule(k=2, norm="renorm"), bias=True),
        SoftRouter(12, 3, bias=True),
        FrozenRouter(12, 3, TopKRule(k=1, norm="none"), seed=4),
        UniformRouter(3),
        GivenRouter(3),
        OracleRouter(3),
        HashRouter(3, 2, seed=5, buckets=64),
    ],
    ids=lambda router: type(router).__name__,
)
def test_every_router_comes_back(router, tmp_path):
    dense, upcycled, _ = made()
    for _, layer in moe_layers(upcycled.model):
        layer.router = copy.deepcopy(router)
    save_mixture(tmp_path / "m.safetensors", upcycled.model, upcycled.plan)
    loaded = load_mixture(tmp_path / "m.safetensors", dense)
    for _, layer in moe_layers(loaded.model):
        assert type(layer.router) is type(router)
        state = router.state_dict()
        assert state.keys() == layer.router.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in layer.router.state_dict().items())


def test_experts_of_bfloat16_keep_their_type(tmp_path):
    dense, upcycled, _ = made()
    model = upcycled.model.to(torch.bfloat16)
    save_mixture(tmp_path / "m.safetensors", model, upcycled.plan)
    loaded = load_mixture(tmp_path / "m.safetensors", dense.to(torch.bfloat16))
    assert all(tensor.dtype == torch.bfloat16 for tensor in loaded.model.state_dict().values())


def test_a_function_may_build_the_dense_model_from_what_was_stored(tmp_path):
    dense, upcycled, _ = made()
    base = BaseModel(library="mine", model_class="Stack", config='{"layers": 2}')
    save_mixture(tmp_path / "m.safetensors", upcycled.model, upcycled.plan, base=base)
    seen = []
    load_mixture(tmp_path / "m.safetensors", lambda said: seen.append(said.base) or dense)
    assert seen == [base]


def test_a_model_of_another_structure_is_refused_by_name(tmp_path):
    _, upcycled, _ = made("clip")
    save_mixture(tmp_path / "m.safetensors", upcycled.model, upcycled.plan)
    with pytest.raises(InvalidInput, match=r"has no FFN|has (kind|up|gate|edits|activation|name)"):
        load_mixture(tmp_path / "m.safetensors", look.randomized(look.MODELS["llama"].make()))
    with pytest.raises(InvalidInput, match="holds a Stack, and the given dense model is a Linear"):
        load_mixture(tmp_path / "m.safetensors", nn.Linear(2, 2))


def test_experts_of_another_kind_than_the_plan_says_are_refused():
    """The same weights under another activation are another model, and nothing else in a file would show it."""
    _, upcycled, _ = made()
    said = describe_mixture(upcycled.model, upcycled.plan)
    first = said.layers[0]
    other = replace(first, bank=replace(first.bank, activation="relu"))
    with pytest.raises(InvalidInput, match=r"'relu'.* its plan says"):
        replace(said, layers=(other, *said.layers[1:]))


def test_a_damaged_file_is_refused(tmp_path):
    dense, upcycled, _ = made()
    path = tmp_path / "m.safetensors"
    save_mixture(path, upcycled.model, upcycled.plan)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match="SHA-256"):
        load_mixture(path, dense)


def test_nan_is_neither_written_nor_loaded(tmp_path):
    dense, upcycled, _ = made()
    path = tmp_path / "m.safetensors"
    save_mixture(path, upcycled.model, upcycled.plan)
    file = read_tensors(path, MIXTURE_FILE)
    tensors = {key: value.clone() for key, value in file.tensors.items()}
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
    write_tensors(tmp_path / "bad.safetensors", tensors, {"description": file.meta["description"]}, MIXTURE_FILE)
    with pytest.raises(InvalidInput, match="NaN"):
        load_mixture(tmp_path / "bad.safetensors", dense)
    with torch.no_grad():
        next(upcycled.model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(InvalidInput, match="was not written"):
        save_mixture(tmp_path / "new.safetensors", upcycled.model, upcycled.plan)
    assert not (tmp_path / "new.safetensors").exists()


def test_a_missing_expert_is_named(tmp_path):
    dense, upcycled, _ = made()
    save_mixture(tmp_path / "m.safetensors", upcycled.model, upcycled.plan)
    file = read_tensors(tmp_path / "m.safetensors", MIXTURE_FILE)
    name = next(key for key in file.tensors if "down_proj" in key and "bias" not in key)
    rest = {key: value for key, value in file.tensors.items() if key != name}
    write_tensors(tmp_path / "less.safetensors", rest, {"description": file.meta["description"]}, MIXTURE_FILE)
    with pytest.raises(InvalidInput, match=f"missing {name}"):
        load_mixture(tmp_path / "less.safetensors", dense)


def test_what_could_not_be_built_again_is_not_written(tmp_path):
    dense, upcycled, _ = made()

    class Mine(TopKRouter):
        pass

    layer = moe_layers(upcycled.model)[0][1]
    layer.router = Mine(12, 3, TopKRule(k=2, norm="renorm"))
    with pytest.raises(InvalidInput, match="class Mine"):
        save_mixture(tmp_path / "m.safetensors", upcycled.model, upcycled.plan)
    with pytest.raises(InvalidInput, match=r"nothing at|is not part of|has a .* at"):
        describe_mixture(dense, upcycled.plan)
    _, other, _ = made()
    bank = ExpertBank.from_dense([moe_layers(other.model)[0][1].bank.to_dense(0).clone()] * 2)
    other.model.extra = MoeFfn(bank, UniformRouter(2))
    with pytest.raises(InvalidInput, match="'extra' is not part of the plan"):
        save_mixture(tmp_path / "m.safetensors", other.model, other.plan)


def test_a_router_form_refuses_what_does_not_belong_to_it():
    with pytest.raises(InvalidInput, match="needs a rule"):
        RouterForm(kind="top_k")
    with pytest.raises(InvalidInput, match="has no rule"):
        RouterForm(kind="soft", rule=TopKRule(k=1, norm="none"))
    with pytest.raises(InvalidInput, match="belong to hash routers"):
        RouterForm(kind="uniform", k=2)
