"""A `DenseFfn` computes what its equation says, and refuses weights that do not fit together."""

import math
from dataclasses import replace

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.layers.dense_ffn import ACTIVATIONS, DenseFfn


def scalar_activation(name: str, v: float) -> float:
    if name == "relu":
        return max(v, 0.0)
    if name == "gelu":
        return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    return v / (1 + math.exp(-(1.702 if name == "quick_gelu" else 1.0) * v))


def by_loops(ffn: DenseFfn, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for token in x.tolist():
        hidden = []
        for f in range(ffn.width_hidden):
            up = sum(a * b for a, b in zip(ffn.up[f].tolist(), token)) + (0 if ffn.up_bias is None else float(ffn.up_bias[f]))
            if ffn.gate is None:
                hidden.append(scalar_activation(ffn.activation, up))
            else:
                gate = sum(a * b for a, b in zip(ffn.gate[f].tolist(), token))
                gate += 0 if ffn.gate_bias is None else float(ffn.gate_bias[f])
                hidden.append(scalar_activation(ffn.activation, gate) * up)
        out = [sum(a * b for a, b in zip(row.tolist(), hidden)) for row in ffn.down]
        rows.append([v + (0 if ffn.down_bias is None else float(ffn.down_bias[o])) for o, v in enumerate(out)])
    return torch.tensor(rows, dtype=x.dtype)


def random_ffn(activation="gelu", *, gated=False, bias=True, dtype=torch.float64) -> DenseFfn:
    make = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=dtype)

    return DenseFfn(
        up=draw(7, 3),
        down=draw(4, 7),
        gate=draw(7, 3) if gated else None,
        up_bias=draw(7) if bias else None,
        gate_bias=draw(7) if bias and gated else None,
        down_bias=draw(4) if bias else None,
        activation=activation,
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_agrees_with_plain_loops(activation, gated, bias):
    ffn = random_ffn(activation, gated=gated, bias=bias)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ffn.apply(x), by_loops(ffn, x), rtol=1e-10, atol=1e-10)


def test_gradients_reach_every_tensor_and_an_empty_input_gives_an_empty_output():
    ffn = random_ffn(gated=True)
    leaves = {name: t.requires_grad_() for name, t in ffn.tensors().items()}
    assert torch.autograd.gradcheck(ffn.apply, (torch.randn(2, 3, dtype=torch.float64, requires_grad=True),))
    ffn.apply(torch.randn(6, 3, dtype=torch.float64)).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in leaves.values())
    assert ffn.apply(torch.zeros(0, 3, dtype=torch.float64)).shape == (0, 4)


def test_weights_that_do_not_fit_are_refused_by_name():
    ffn = random_ffn()
    with pytest.raises(InvalidInput, match=r"DenseFfn\.down must have the shape \(4, 7\).*found \(4, 6\)"):
        replace(ffn, down=torch.zeros(4, 6, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="gate_bias needs a gate"):
        replace(ffn, gate_bias=torch.zeros(7, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="float32"):
        replace(ffn, down=torch.zeros(4, 7))
    with pytest.raises(InvalidInput, match="activation must be one of"):
        replace(ffn, activation="mish")
    with pytest.raises(InvalidInput, match="floating-point"):
        DenseFfn(up=torch.zeros(2, 2, dtype=torch.int8), down=torch.zeros(2, 2, dtype=torch.int8), activation="relu")


def test_the_form_names_the_first_difference_and_a_copy_shares_no_memory():
    ffn = random_ffn()
    assert ffn.same_form(ffn.clone()) is None
    assert "activation" in ffn.same_form(replace(ffn, activation="relu"))
    assert "`up_bias`" in ffn.same_form(replace(ffn, up_bias=None))
    copy = ffn.clone()
    copy.up.zero_()
    assert ffn.up.abs().sum() > 0
    assert ffn.multiply_adds == 7 * 3 + 4 * 7
