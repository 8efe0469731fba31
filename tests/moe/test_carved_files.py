"""A file of a carved model gives back the same model, the same units and the same decisions, or says why not."""

import copy
from dataclasses import replace

import pytest
import torch
from moe_carvings import activity_of, carved, decision, domains_of
from torch import nn

import moe_lookalikes as look
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.tensor_file import CorruptFile, read_tensors, write_tensors
from upcycle3d.perception.moe.carving.carved_ffn import materialize
from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns
from upcycle3d.perception.moe.carving.pre_gate import LayerRouter, PreGateConfig
from upcycle3d.perception.moe.carving.shared_routed import shared_and_routed, unit_patterns
from upcycle3d.perception.moe.carving.splits import pooled_units, readme_split
from upcycle3d.perception.moe.checkpoints.carved_models import CARVED_FILE, load_carved, read_carved_description, save_carved
from upcycle3d.perception.moe.layers.control_routers import given_routing
from upcycle3d.perception.moe.layers.routers import SoftRouter


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def strange(model: nn.Module) -> nn.Module:
    """The same structure with other weights: loading must not depend on them."""
    return look.randomized(copy.deepcopy(model), 7)


@pytest.mark.parametrize("form", ["masked", "split", "fused"])
@pytest.mark.parametrize("name", ["llama", "clip", "region-head", "timm-conv", "torch-encoder", "bert"])
def test_models_units_and_pre_gates_come_back_bit_by_bit(name, form, tmp_path):
    model, carving = carved(name, 0.4, dtype=torch.float32)
    made = mask_ffns(model, carving)
    made = made if form == "masked" else materialize(made, fuse=form == "fused")
    gate = PreGateConfig(vocabulary=9, experts=3, width=8, heads=2).build(4)
    said = save_carved(tmp_path / "m.safetensors", made, carving, pre_gate=gate, note="ratio 0.4 was evaluated")
    assert said == read_carved_description(tmp_path / "m.safetensors")
    loaded = load_carved(tmp_path / "m.safetensors", strange(model))
    assert equal_states(made, loaded.model)
    assert equal_states(gate, loaded.pre_gate)
    assert loaded.description.form == form
    assert (loaded.carving.ratio, loaded.carving.method, loaded.carving.domains) == (0.4, "readme", carving.domains)
    for one, other in zip(carving.units, loaded.carving.units):
        assert torch.equal(one.shared, other.shared)
        assert torch.equal(one.own, other.own)
    assert loaded.carving.unique_parameters == carving.unique_parameters
    x = domains_of(name)["domain 0"][0]
    with torch.no_grad():
        outputs = []
        for some in (made.eval(), loaded.model):
            with given_routing(some, decision(torch.tensor([2, 1]), 3, torch.float32)):
                outputs.append(some(x))
    assert torch.equal(*outputs)
    assert "ratio 0.4 was evaluated" in str(loaded.description)


def test_analytic_and_layer_wise_routers_come_back(tmp_path):
    model = look.randomized(look.MODELS["llama"].make())
    x = domains_of("llama")["domain 0"][0]
    plan = activity_of(model, "llama").plan
    groups = shared_and_routed(unit_patterns(model, plan, [x], lambda m, b: m(b)), shared=0.2, groups=4, active=2)
    layer_wise = readme_split(activity_of(model, "llama"), 0.5)
    arms = [(groups, None), (layer_wise, lambda site, ffn, units: LayerRouter(site.width_in, units.experts))]
    for carving, routers in arms:
        masked = mask_ffns(model, carving, routers)
        for made in (masked, materialize(masked)):
            save_carved(tmp_path / "m.safetensors", made, carving)
            loaded = load_carved(tmp_path / "m.safetensors", strange(model))
            with torch.no_grad():
                assert torch.equal(made(x), loaded.model(x))
            assert loaded.pre_gate is None


def test_models_without_experts_and_of_other_types_come_back(tmp_path):
    """Pooled pruning has nothing to choose; bfloat16 stays bfloat16 in the carved FFNs."""
    model = look.randomized(look.MODELS["llama"].make())
    pooled = pooled_units(activity_of(model, "llama"), 0.5)
    made = materialize(mask_ffns(model, pooled))
    save_carved(tmp_path / "m.safetensors", made, pooled)
    loaded = load_carved(tmp_path / "m.safetensors", strange(model))
    x = domains_of("llama")["domain 0"][0]
    with torch.no_grad():
        assert torch.equal(made(x), loaded.model(x))
    assert loaded.description.form == "split"
    _, carving = carved("llama", dtype=torch.float32)
    low = materialize(mask_ffns(model, carving)).to(torch.bfloat16)
    save_carved(tmp_path / "low.safetensors", low, carving)
    loaded = load_carved(tmp_path / "low.safetensors", strange(model).to(torch.bfloat16))
    assert equal_states(low, loaded.model)


def test_what_is_not_the_carved_model_is_not_written(tmp_path):
    model, carving = carved("llama", 0.4, dtype=torch.float32)
    path, masked = tmp_path / "m.safetensors", mask_ffns(model, carving)
    _, other = carved("llama", 0.6, dtype=torch.float32)
    cases = [
        (model, carving, "and the carving puts a carved FFN there"),
        (masked, other, "other units than the carving"),
        (materialize(masked), other, "other units than the carving"),
        (mask_ffns(model, carving, lambda site, ffn, units: SoftRouter(12, 3)), carving, "class SoftRouter"),
    ]
    for made, which, message in cases:
        with pytest.raises(InvalidInput, match=message):
            save_carved(path, made, which)
    with pytest.raises(InvalidInput, match="does not choose among the 3 experts"):
        save_carved(path, masked, carving, pre_gate=PreGateConfig(vocabulary=9, experts=2, width=8, heads=2).build(0))
    with torch.no_grad():
        masked.layers[0].mlp.ffn.up[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match="hold NaN"):
        save_carved(path, masked, carving)
    assert not path.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model, carving = carved("llama", 0.4, dtype=torch.float32)
    path = tmp_path / "m.safetensors"
    save_carved(path, materialize(mask_ffns(model, carving)), carving)
    data = path.read_bytes()
    (tmp_path / "damaged.safetensors").write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    (tmp_path / "short.safetensors").write_bytes(data[:-100])
    for name in ("damaged", "short"):
        with pytest.raises(CorruptFile):
            load_carved(tmp_path / f"{name}.safetensors", model)
    write_tensors(tmp_path / "foreign.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(InvalidInput, match="is not a carved model"):
        load_carved(tmp_path / "foreign.safetensors", model)
    with pytest.raises(InvalidInput, match="build the class that"):
        load_carved(path, look.region_head())
    with pytest.raises(InvalidInput, match="the given dense model"):
        load_carved(path, look.randomized(look.MODELS["clip"].make()))
    file = read_tensors(path, CARVED_FILE)
    description = file.meta["description"]
    for change, message in (
        (lambda t: t.pop("units.1"), "needs the units of"),
        (lambda t: t.update({"units.0": t["units.0"] + 1}), "as 0 and 1"),
        (lambda t: t.update({"units.0": torch.ones_like(t["units.0"])}), "shared and an expert's own"),
        (lambda t: t.pop("model.head.weight"), "missing head.weight"),
        (lambda t: t.update({"model.head.weight": t["model.head.weight"] * torch.nan}), "hold NaN"),
    ):
        tensors = dict(file.tensors)
        change(tensors)
        write_tensors(tmp_path / "changed.safetensors", tensors, {"description": description}, CARVED_FILE)
        with pytest.raises(InvalidInput, match=message):
            load_carved(tmp_path / "changed.safetensors", model)
    write_tensors(tmp_path / "odd.safetensors", dict(file.tensors), {"description": "[]"}, CARVED_FILE)
    with pytest.raises(InvalidInput, match="not an object"):
        load_carved(tmp_path / "odd.safetensors", model)


def test_a_file_can_build_its_dense_model_itself(tmp_path):
    model, carving = carved("llama", 0.4, dtype=torch.float32)
    save_carved(tmp_path / "m.safetensors", materialize(mask_ffns(model, carving)), replace(carving, ratio=0.4))
    loaded = load_carved(tmp_path / "m.safetensors", lambda said: look.MODELS["llama"].make())
    assert loaded.carving.experts == 3
