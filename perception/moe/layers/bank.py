"""The expert bank: E feed-forward networks with stacked weights, and nothing that decides who uses them.

The layout (E, out, in) and the call (tokens, chosen experts, weights) are those of Hugging Face's experts, so checkpoints convert by
renaming. Read next: `routers.py`, which decides, and `moe_ffn.py`, which joins the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.tensor_value import shape_of
from .backends import Backend, ExpertWeights, run_experts
from .dense_ffn import Activation, DenseFfn
from .dispatch import DispatchPlan


@dataclass(frozen=True, kw_only=True)
class BankShape:
    """Sizes of an expert bank: all that is needed to build it again before its weights are loaded."""

    experts: int
    """Number of experts, E."""
    width_in: int
    """Input width, D."""
    width_hidden: int
    """Hidden width of one expert, F."""
    width_out: int
    """Output width, O."""
    activation: Activation
    """Function of the hidden units."""
    gated: bool = False
    """Whether the experts have a gate, as in SwiGLU."""
    hidden_bias: bool = True
    """Whether the hidden units (and the gate) have biases."""
    out_bias: bool = True
    """Whether the outputs have biases."""
    dropout: float = 0.0
    """Share of hidden units that is set to zero in training. CLIP-MoE uses 0.1; keep 0 to compare with a dense model."""

    def __post_init__(self) -> None:
        require_counts("BankShape", experts=self.experts)
        require_counts("BankShape", most=2**24, width_in=self.width_in, width_hidden=self.width_hidden, width_out=self.width_out)
        require(self.activation in get_args(Activation), f"BankShape.activation: unknown activation {self.activation!r}")
        require_numbers("BankShape", least=0.0, most=0.99, dropout=self.dropout)


class ExpertBank(nn.Module):
    """E experts of one shape. With a gate, the first F rows of `gate_up_proj` are the gate and the others are `up`.

    Example:
        bank = ExpertBank.from_dense([ffn, ffn.clone()])
        y = bank(x, torch.tensor([[0], [1]]), torch.ones(2, 1))  # x (2, D): the first token uses expert 0, the second expert 1
    """

    up_proj: nn.Parameter | None
    gate_up_proj: nn.Parameter | None
    down_proj: nn.Parameter
    hidden_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(self, shape: BankShape) -> None:
        super().__init__()
        self.shape = shape
        rows = shape.width_hidden * (2 if shape.gated else 1)
        up = nn.Parameter(torch.empty(shape.experts, rows, shape.width_in))
        self.register_parameter("gate_up_proj" if shape.gated else "up_proj", up)
        self.register_parameter("up_proj" if shape.gated else "gate_up_proj", None)
        self.down_proj = nn.Parameter(torch.empty(shape.experts, shape.width_out, shape.width_hidden))
        self.hidden_proj_bias = nn.Parameter(torch.zeros(shape.experts, rows)) if shape.hidden_bias else None
        self.down_proj_bias = nn.Parameter(torch.zeros(shape.experts, shape.width_out)) if shape.out_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights like those of `torch.nn.Linear`, and set the biases to 0."""
        for weight in (self._up, self.down_proj):
            nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[2]), 1 / math.sqrt(weight.shape[2]))
        for bias in (self.hidden_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @classmethod
    def from_dense(cls, ffns: Sequence[DenseFfn], *, dropout: float = 0.0, pad_hidden: bool = False) -> Self:
        """Stack dense FFNs as experts. The weights are copied; type and device are those of the first FFN.

        Args:
            ffns: The experts, in order.
            dropout: `BankShape.dropout`.
            pad_hidden: Give narrower experts hidden units of zeros instead of refusing them. Such units contribute exactly 0, and
                stay 0 in training, because no gradient reaches them.

        Returns:
            The bank.

        Raises:
            InvalidInput: There is no FFN, or two differ; the message names the first difference.
        """
        if not ffns:
            raise InvalidInput("an expert bank needs at least one FFN, found none")
        widest = max(ffn.width_hidden for ffn in ffns)
        if pad_hidden:
            ffns = [_padded(ffn, widest) for ffn in ffns]
        for number, ffn in enumerate(ffns):
            if difference := ffns[0].same_form(ffn):
                hint = "; pass pad_hidden=True to fill up narrower experts" if ffn.width_hidden != widest or ffns[0].width_hidden != widest else ""  # fmt: skip
                raise InvalidInput(f"FFN {number} cannot be an expert beside FFN 0: {difference}{hint}")
        first = ffns[0]
        shape = BankShape(
            experts=len(ffns),
            width_in=first.width_in,
            width_hidden=widest,
            width_out=first.width_out,
            activation=first.activation,
            gated=first.gate is not None,
            hidden_bias=first.up_bias is not None or first.gate_bias is not None,
            out_bias=first.down_bias is not None,
            dropout=dropout,
        )
        with torch.device("meta"):
            bank = cls(shape)
        bank = bank.to(first.up.dtype).to_empty(device=first.up.device)
        for number, ffn in enumerate(ffns):
            bank.set_expert(number, ffn)
        return bank

    @torch.no_grad()
    def set_expert(self, expert: int, ffn: DenseFfn) -> None:
        """Overwrite the weights of one expert with a copy of an FFN's.

        Args:
            expert: Number of the expert.
            ffn: The new weights, of the bank's shape. Of two biases of a gated FFN one may be missing: it becomes 0.

        Raises:
            InvalidInput: There is no such expert, or the FFN has another shape.
        """
        self._check_number(expert)
        hidden_bias = ffn.up_bias
        if ffn.gate is not None and (ffn.up_bias is not None or ffn.gate_bias is not None):
            zeros = ffn.up.new_zeros(ffn.width_hidden)
            hidden_bias = torch.cat([zeros if b is None else b for b in (ffn.gate_bias, ffn.up_bias)])
        up = ffn.up if ffn.gate is None else torch.cat([ffn.gate, ffn.up])
        pairs = (
            ("up", self._up, up),
            ("down", self.down_proj, ffn.down),
            ("hidden bias", self.hidden_proj_bias, hidden_bias),
            ("down_bias", self.down_proj_bias, ffn.down_bias),
        )
        for name, target, source in pairs:
            if (target is None) != (source is None) or (
                target is not None and source is not None and target[0].shape != source.shape
            ):
                raise InvalidInput(
                    f"expert {expert}: the bank wants {name} of {'no shape' if target is None else tuple(target.shape[1:])}, "
                    f"and the FFN has {'none' if source is None else shape_of(source)} (with a gate, gate and up are joined)"
                )
        for _, target, source in pairs:
            if target is not None and source is not None:
                target[expert] = source

    def to_dense(self, expert: int) -> DenseFfn:
        """Get one expert as a dense FFN.

        Args:
            expert: Number of the expert.

        Returns:
            Views of the bank's weights: gradients reach the bank, and `DenseFfn.clone` makes them independent.

        Raises:
            InvalidInput: There is no such expert.
        """
        self._check_number(expert)
        up, down = self._up[expert], self.down_proj[expert]
        bias = None if self.hidden_proj_bias is None else self.hidden_proj_bias[expert]
        down_bias = None if self.down_proj_bias is None else self.down_proj_bias[expert]
        activation = self.shape.activation
        if not self.shape.gated:
            return DenseFfn(up=up, down=down, up_bias=bias, down_bias=down_bias, activation=activation)
        gate, up = up.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return DenseFfn(
            up=up, gate=gate, down=down, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias, activation=activation
        )

    def forward(self, x: Tensor, choice: DispatchPlan | Tensor | None, weight: Tensor, backend: Backend = "auto") -> Tensor:
        """Compute y_t = sum over j of weight_tj * expert_(choice_tj)(x_t). No token is dropped.

        Args:
            x: (T, D) tokens; T may be 0.
            choice: (T, k) int64 experts of each token; or their plan, where several layers share a decision; or None for soft
                routing, in which every expert serves every token.
            weight: (T, k) weights; (T, E) for soft routing.
            backend: How to compute. `auto` chooses; `loop` is the plain reference.

        Returns:
            (T, O) tokens, in the type of autocast where it is on.

        Raises:
            InvalidInput: Shapes or types that do not fit.
        """
        if x.ndim != 2 or x.shape[1] != self.shape.width_in:
            raise InvalidInput(f"the experts take tokens of shape (T, {self.shape.width_in}), found {shape_of(x)}")
        index = choice.index if isinstance(choice, DispatchPlan) else choice
        wanted = (len(x), self.shape.experts) if index is None else (len(x), *index.shape[1:])
        if tuple(weight.shape) != wanted or (index is not None and tuple(index.shape) != wanted):
            raise InvalidInput(
                f"{len(x)} tokens need weights of shape {wanted} and as many chosen experts, found {shape_of(weight)} and "
                f"{'soft routing' if index is None else shape_of(index)}"
            )
        if isinstance(choice, DispatchPlan) and choice.num_experts != self.shape.experts:
            raise InvalidInput(f"the plan is for {choice.num_experts} experts, and the bank has {self.shape.experts}")
        return run_experts(x, self._weights(), choice, weight, backend)

    def extra_repr(self) -> str:
        """Describe the sizes, for `print`.

        Returns:
            The fields of the shape.
        """
        s = self.shape
        kind = f"{s.activation}, gated" if s.gated else s.activation
        return f"{s.experts} experts {s.width_in} -> {s.width_hidden} -> {s.width_out}, {kind}"

    @property
    def _up(self) -> nn.Parameter:
        up = self.gate_up_proj if self.shape.gated else self.up_proj
        assert up is not None
        return up

    def _weights(self) -> ExpertWeights:
        return ExpertWeights(
            up=self._up,
            down=self.down_proj,
            up_bias=self.hidden_proj_bias,
            down_bias=self.down_proj_bias,
            gated=self.shape.gated,
            activation=self.shape.activation,
            dropout=self.shape.dropout if self.training else 0.0,
        )

    def _check_number(self, expert: int) -> None:
        require(
            0 <= expert < self.shape.experts, f"there is no expert {expert}: the bank has experts 0..{self.shape.experts - 1}"
        )


def _padded(ffn: DenseFfn, hidden: int) -> DenseFfn:
    """The same FFN with hidden units of zeros behind its own."""
    missing = hidden - ffn.width_hidden
    if not missing:
        return ffn

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else F.pad(tensor, (0, 0, 0, missing) if tensor.ndim == 2 else (0, missing))

    return replace(
        ffn,
        up=F.pad(ffn.up, (0, 0, 0, missing)),
        gate=rows(ffn.gate),
        down=F.pad(ffn.down, (0, missing)),
        up_bias=rows(ffn.up_bias),
        gate_bias=rows(ffn.gate_bias),
    )
