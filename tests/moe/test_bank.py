"""A bank holds what it was made from, and what must not matter does not: the order of hidden units and of experts."""

import pytest
import torch

from moe_banks import bank_of
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.bank import ExpertBank
from upcycle3d.perception.moe.layers.dense_ffn import DenseFfn
from upcycle3d.perception.moe.layers.dispatch import DispatchPlan

pytestmark = pytest.mark.usefixtures("one_thread")


def ffn_of(hidden: int = 5, seed: int = 0, gated: bool = False, **fields) -> DenseFfn:
    torch.manual_seed(seed)
    extra = {"gate": torch.randn(hidden, 3), "gate_bias": torch.randn(hidden)} if gated else {}
    weights = {"up": torch.randn(hidden, 3), "up_bias": torch.randn(hidden), "down": torch.randn(2, hidden)}
    return DenseFfn(**({"down_bias": torch.randn(2), "activation": "relu"} | weights | extra | fields))


@pytest.mark.parametrize("gated", [False, True])
def test_experts_come_out_as_they_went_in(gated):
    ffns = [ffn_of(seed=seed, gated=gated) for seed in range(3)]
    bank = ExpertBank.from_dense(ffns)
    for number, ffn in enumerate(ffns):
        out = bank.to_dense(number)
        assert ffn.same_form(out) is None
        assert all(torch.equal(out.tensors()[name], tensor) for name, tensor in ffn.tensors().items())
    assert bank.down_proj.shape == (3, 2, 5)
    assert (bank.gate_up_proj.shape == (3, 10, 3)) if gated else (bank.up_proj.shape == (3, 5, 3))
    assert set(dict(bank.named_parameters())) == {"gate_up_proj" if gated else "up_proj", "down_proj", "hidden_proj_bias", "down_proj_bias"}  # fmt: skip
    again = ExpertBank(bank.shape)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.to_dense(2).up, ffns[2].up)


def test_type_of_the_weights_is_kept_and_gradients_flow_to_the_bank_alone():
    ffn = ffn_of()
    half = DenseFfn(**{k: v.double() for k, v in ffn.tensors().items()}, activation="relu")
    bank = ExpertBank.from_dense([half, half])
    assert bank.down_proj.dtype == torch.float64
    bank.to_dense(1).down.sum().backward()
    assert bank.down_proj.grad[0].sum() == 0
    assert half.down.grad is None


def test_experts_that_differ_are_refused_with_the_first_difference():
    with pytest.raises(InvalidInput, match=r"FFN 1 cannot be an expert beside FFN 0: .*down.*\(2, 5\).*\(2, 7\).*pad_hidden"):
        ExpertBank.from_dense([ffn_of(5), ffn_of(7)])
    with pytest.raises(InvalidInput, match="the activation relu and the other gelu"):
        ExpertBank.from_dense([ffn_of(), ffn_of(activation="gelu")])
    with pytest.raises(InvalidInput, match="only one of the two FFNs has `down_bias`"):
        ExpertBank.from_dense([ffn_of(), ffn_of(down_bias=None)])
    with pytest.raises(InvalidInput, match="at least one FFN"):
        ExpertBank.from_dense([])
    with pytest.raises(InvalidInput, match=r"there is no expert 2"):
        ExpertBank.from_dense([ffn_of(), ffn_of()]).to_dense(2)
    with pytest.raises(InvalidInput, match=r"expert 0: the bank wants up of \(5, 3\)"):
        ExpertBank.from_dense([ffn_of()]).set_expert(0, ffn_of(7))


@pytest.mark.parametrize("gated", [False, True])
def test_padded_hidden_units_contribute_nothing_and_stay_zero(gated):
    narrow, wide = ffn_of(5, gated=gated), ffn_of(7, seed=1, gated=gated)
    bank, x = ExpertBank.from_dense([narrow, wide], pad_hidden=True), torch.randn(4, 3)
    index = torch.zeros(4, 1, dtype=torch.int64)
    y = bank(x, index, torch.ones(4, 1))
    torch.testing.assert_close(y, narrow.apply(x))
    y.square().sum().backward()
    gradient = bank.to_dense(0)
    bank_of_gradients = bank.down_proj.grad[0, :, 5:], (bank.gate_up_proj if gated else bank.up_proj).grad[0, 5:7]
    assert all((g == 0).all() for g in bank_of_gradients)
    assert (gradient.down[:, 5:] == 0).all()


def test_one_missing_bias_of_a_gated_ffn_becomes_zero():
    ffn, x = ffn_of(gated=True, up_bias=None), torch.randn(4, 3)
    bank = ExpertBank.from_dense([ffn])
    torch.testing.assert_close(bank(x, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)), ffn.apply(x))


def test_the_order_of_hidden_units_and_of_experts_does_not_matter():
    bank, x = bank_of(gated=True, activation="silu"), torch.randn(6, 8)
    index, weight = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]]), torch.rand(6, 2)
    y = bank(x, index, weight)
    torch.manual_seed(5)
    units, experts = torch.randperm(12), torch.randperm(4)
    moved = ExpertBank.from_dense(
        [
            DenseFfn(
                up=ffn.up[units],
                gate=ffn.gate[units],
                down=ffn.down[:, units],
                up_bias=ffn.up_bias[units],
                gate_bias=ffn.gate_bias[units],
                down_bias=ffn.down_bias,
                activation="silu",
            )
            for ffn in (bank.to_dense(int(e)) for e in experts)
        ]
    )
    torch.testing.assert_close(moved(x, experts.argsort()[index], weight), y, atol=1e-5, rtol=1e-5)


def test_dropout_works_in_training_only():
    bank, x = bank_of(dropout=0.5), torch.randn(4, 8)
    index, weight = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    assert not torch.equal(bank(x, index, weight), bank(x, index, weight))
    assert torch.equal(bank.eval()(x, index, weight), bank(x, index, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9)}, r"take tokens of shape \(T, 8\), found \(2, 9\)"),
        ({"weight": torch.ones(2, 2)}, r"2 tokens need weights of shape \(2, 1\)"),
        ({"choice": None}, r"need weights of shape \(2, 4\).*soft routing"),
        ({"choice": DispatchPlan.of(torch.zeros(2, 1, dtype=torch.int64), 3)}, "the plan is for 3 experts"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, r"tokens are torch\.float64 and experts are torch\.float32"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
    ],
)
def test_calls_that_do_not_fit_are_refused(change, message):
    good = {"x": torch.zeros(2, 8), "choice": torch.zeros(2, 1, dtype=torch.int64), "weight": torch.ones(2, 1)}
    with pytest.raises(InvalidInput, match=message):
        bank_of()(**(good | change))
