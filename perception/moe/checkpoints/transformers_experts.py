"""The two ways between our expert bank and the expert interface of Hugging Face's transformers.

`experts_for_transformers` lets the library's kernels compute our bank: it is an adapter class, because the library's decorator wants a
configuration as the first argument and reads it in every forward pass, which a bank does not have. `register_backends` lets the library's
own models (Mixtral, Qwen-MoE and others) compute with our backends, which have a fall-back for every width and type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ..layers.backends import ExpertWeights, run_experts
from ..layers.bank import ExpertBank
from ..layers.dense_ffn import ACTIVATIONS, Activation, activate

IMPLEMENTATION = "upcycle3d"
"""Name under which our backends are registered: `model.set_experts_implementation("upcycle3d")`."""


def experts_for_transformers(bank: ExpertBank, config: Any) -> nn.Module:
    """Wrap a bank as an expert module of transformers. It holds the very same parameters.

    Args:
        bank: The bank.
        config: A model's configuration; its `_experts_implementation` chooses the kernel: eager (ours), grouped_mm, batched_mm.

    Returns:
        A module that is called with (hidden states (T, D), chosen experts (T, k), weights (T, k)).

    Raises:
        InvalidInput: Only one of the bank's two maps has a bias; the library's interface has both or none.
    """
    from transformers.integrations.moe import use_experts_implementation

    shape = bank.shape
    require(
        shape.hidden_bias == shape.out_bias,
        f"transformers' experts have two biases or none, and this bank has hidden_bias={shape.hidden_bias}, out_bias={shape.out_bias}",
    )
    require(shape.dropout == 0, f"transformers' experts have no dropout, and this bank has {shape.dropout:g}; build one without")

    @use_experts_implementation(has_gate=shape.gated, has_bias=shape.out_bias)
    class BankExperts(nn.Module):
        def __init__(self, config: Any, bank: ExpertBank) -> None:
            super().__init__()
            self.num_experts = bank.shape.experts
            self.up_proj, self.gate_up_proj, self.down_proj = bank.up_proj, bank.gate_up_proj, bank.down_proj
            if bank.shape.out_bias:
                name = "gate_up_proj_bias" if bank.shape.gated else "up_proj_bias"
                self.register_parameter(name, bank.hidden_proj_bias)
                self.down_proj_bias = bank.down_proj_bias
            self._bank = [bank]  # in a list, so that its parameters are not registered twice

        def act_fn(self, x: Tensor) -> Tensor:
            return activate(x, self._bank[0].shape.activation)

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return self._bank[0](hidden_states, top_k_index, top_k_weights)

    made: nn.Module = BankExperts(config, bank)
    return made


def register_backends() -> str:
    """Register our backends with transformers, for every model of the library that has experts.

    Returns:
        Name of the implementation, for `model.set_experts_implementation`.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    return IMPLEMENTATION


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute an expert module of the library with our backends."""
    if getattr(self, "is_transposed", False) or not getattr(self, "is_concatenated", True):
        raise InvalidInput(f"{type(self).__name__} stores its weights transposed or interleaved, which our backends do not read")
    if getattr(self, "has_post_expert_norm", False) or getattr(self, "_is_expert_parallel", False):
        raise InvalidInput(
            f"{type(self).__name__} has a norm after its experts or runs in parallel, which our backends do not do"
        )
    bias: Callable[[str], Tensor | None] = lambda name: getattr(self, name, None) if self.has_bias else None  # noqa: E731
    up = self.gate_up_proj if self.has_gate else self.up_proj
    weights = ExpertWeights(
        up=up,
        down=self.down_proj,
        up_bias=bias("gate_up_proj_bias" if self.has_gate else "up_proj_bias"),
        down_bias=bias("down_proj_bias"),
        gated=self.has_gate,
        activation=_activation_of(self.act_fn),
        dropout=0.0,
    )
    return run_experts(hidden_states, weights, top_k_index, top_k_weights.to(hidden_states.dtype), "auto").to(hidden_states.dtype)


def _activation_of(function: Callable[[Tensor], Tensor]) -> Activation:
    """Find the name of an activation by its values."""
    grid = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for name in ACTIVATIONS:
        if torch.allclose(function(grid), activate(grid, name), rtol=0, atol=1e-9):
            return name
    raise InvalidInput(f"the experts' activation is none of {', '.join(ACTIVATIONS)}")
