"""One dense feed-forward network (FFN) as a value: the currency between surgery, upcyclers and the expert bank.

Surgery reads a `DenseFfn` out of a model, an upcycler makes several of them, and an expert bank stores them as experts. The value knows
nothing about modules or names. `DenseFfn.apply` is the plain reference that every fast path is compared with.

Read next: `bank.py`, which stacks several of these values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ....core.errors import InvalidInput, require

Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "silu"]
"""Non-linear functions that an FFN of this project may have. `gelu` is exact, `gelu_tanh` its approximation by tanh, and `quick_gelu` is
x * sigmoid(1.702 x), which the first CLIP models use."""

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation to each element. Each of them maps 0 to 0, so hidden units of zeros contribute nothing.

    Args:
        x: Tensor of any shape.
        activation: Name of the function.

    Returns:
        Tensor of the same shape.

    Raises:
        InvalidInput: The activation is unknown.
    """
    if activation == "relu":
        return functional.relu(x)
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "silu":
        return functional.silu(x)
    raise InvalidInput(f"an FFN's activation must be one of {ACTIVATIONS}, found {activation!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseFfn:
    """Weights of one FFN: y = down(act(gate x) * up x) with a gate, else y = down(act(up x)).

    The weights have the layout of `torch.nn.Linear`: (output width, input width).

    Example:
        >>> ffn = DenseFfn(up=torch.eye(2), down=torch.ones(1, 2), activation="relu")
        >>> ffn.apply(torch.tensor([[3.0, -1.0]])).tolist()
        [[3.0]]
    """

    up: Tensor
    """(F, D) weight of the first linear map; F is the hidden width and D the input width."""
    down: Tensor
    """(O, F) weight of the last linear map; O is the output width."""
    gate: Tensor | None = None
    """(F, D) weight of the gate, as in SwiGLU; None for an FFN without a gate."""
    up_bias: Tensor | None = None
    """(F,) bias of `up`."""
    gate_bias: Tensor | None = None
    """(F,) bias of `gate`."""
    down_bias: Tensor | None = None
    """(O,) bias of `down`."""
    activation: Activation
    """Function between the linear maps."""

    def __post_init__(self) -> None:
        require(self.activation in ACTIVATIONS, f"an FFN's activation must be one of {ACTIVATIONS}, found {self.activation!r}")
        require(
            self.up.dtype.is_floating_point,
            f"an FFN's weights must be floating-point numbers, found {self.up.dtype}; convert quantized weights first",
        )
        for name in ("up", "down"):
            shape = tuple(getattr(self, name).shape)
            require(
                len(shape) == 2,
                f"DenseFfn.{name} must be a matrix (output width, input width), found {shape}; squeeze the kernel of a 1x1 convolution",
            )
        hidden, width = self.up.shape
        wanted = {
            "down": (self.down.shape[0], hidden),
            "gate": (hidden, width),
            "up_bias": (hidden,),
            "gate_bias": (hidden,),
            "down_bias": (self.down.shape[0],),
        }
        for name, shape in wanted.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            require(
                tuple(tensor.shape) == shape,
                f"DenseFfn.{name} must have the shape {shape}, which fits `up` {tuple(self.up.shape)}, found {tuple(tensor.shape)}",
            )
            require(
                tensor.dtype == self.up.dtype and tensor.device == self.up.device,
                f"DenseFfn.{name} is {tensor.dtype} on {tensor.device}, but `up` is {self.up.dtype} on {self.up.device}",
            )
        require(self.gate is not None or self.gate_bias is None, "DenseFfn.gate_bias needs a gate")

    @property
    def width_in(self) -> int:
        """Input width D."""
        return self.up.shape[1]

    @property
    def width_hidden(self) -> int:
        """Hidden width F."""
        return self.up.shape[0]

    @property
    def width_out(self) -> int:
        """Output width O."""
        return self.down.shape[0]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token of the linear maps; biases and the activation are left out."""
        return self.up.numel() + self.down.numel() + (0 if self.gate is None else self.gate.numel())

    def tensors(self) -> dict[str, Tensor]:
        """Get the tensors that exist, by the names of their fields.

        Returns:
            Field name to tensor, in a fixed order.
        """
        names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def same_form(self, other: DenseFfn) -> str | None:
        """Say why two FFNs cannot be experts of one bank.

        Args:
            other: The FFN to compare with.

        Returns:
            The first difference in a sentence, or None if shapes, tensors and activations agree.
        """
        if self.activation != other.activation:
            return f"one FFN uses the activation {self.activation} and the other {other.activation}"
        mine, theirs = self.tensors(), other.tensors()
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in mine or name not in theirs:
                return f"only one of the two FFNs has `{name}`"
            if mine[name].shape != theirs[name].shape:
                return f"`{name}` has the shape {tuple(mine[name].shape)} in one FFN and {tuple(theirs[name].shape)} in the other"
        return None

    def clone(self) -> DenseFfn:
        """Copy the weights out of the model that they came from, without a history of gradients.

        Returns:
            An FFN with tensors of its own.
        """
        copies: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}
        return replace(self, **copies)

    def apply(self, x: Tensor) -> Tensor:
        """Compute the FFN with plain operators: the reference for every faster path.

        Args:
            x: (..., D) inputs.

        Returns:
            (..., O) outputs.
        """
        return functional.linear(self.hidden(x), self.down, self.down_bias)

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the hidden units: what the last linear map reads.

        Args:
            x: (..., D) inputs.

        Returns:
            (..., F) units after activation and gate.
        """
        hidden = functional.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return activate(hidden, self.activation)
        return activate(functional.linear(x, self.gate, self.gate_bias), self.activation) * hidden
