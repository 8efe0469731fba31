"""Where an FFN lies in a model, as a value: names of tensors, how to read them, and what is taken out when it is replaced.

A site holds names and no tensors, so the site that was found in one model reads the experts out of every model of the same structure,
or out of a file of weights. Read next: `ffn_search.py`, which finds sites; `replacement.py`, which replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput
from ..layers.dense_ffn import Activation, DenseFfn

WeightLayout = Literal["rows", "columns", "kernel"]
"""How a weight is stored: `rows` (out, in) as in `torch.nn.Linear`, `columns` (in, out) as in GPT-2, `kernel` (out, in, 1, ...) as in a
convolution of kernel size 1."""

SiteKind = Literal["module", "layer", "pair", "chain"]
"""How an FFN is packed: a `module` of its own; two linear maps of a transformer `layer`; a `pair` of modules, as in BERT; or a `chain` of
layers in a `torch.nn.Sequential`."""

Becomes = Literal["mixture", "identity", "zero", "false"]


@dataclass(frozen=True, kw_only=True)
class NormSpot:
    """Names of the tensors of a batch norm that follows a linear map."""

    mean: str
    """Running mean."""
    variance: str
    """Running variance."""
    weight: str | None
    """Scale, or None."""
    bias: str | None
    """Shift, or None."""
    counter: str | None
    """Number of batches seen; it plays no part in the arithmetic."""
    eps: float
    """Number that is added to the variance."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        every = (self.weight, self.bias, self.mean, self.variance, self.counter)
        return tuple(name for name in every if name is not None)


@dataclass(frozen=True, kw_only=True)
class MapSpot:
    """Names of the tensors of one linear map."""

    weight: str
    """Weight."""
    bias: str | None
    """Bias, or None."""
    layout: WeightLayout
    """How the weight is stored."""
    half: Literal["all", "first", "second"] = "all"
    """Which half of the outputs belongs to this map; gate and up often lie in one weight."""
    norm: NormSpot | None = None
    """Batch norm that is folded into this map."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        own = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return own if self.norm is None else (*own, *self.norm.names)

    def read(self, tensors: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Read the linear map, with its batch norm folded in.

        Args:
            tensors: Tensors of the model by name.
            norms: Where the batch norm is read from: the same tensors, or those of a shared batch norm.

        Returns:
            (out, in) weight and (out,) bias or None. Without a batch norm they are views.
        """
        weight = tensors[self.weight]
        weight = weight.flatten(1) if self.layout == "kernel" else weight.T if self.layout == "columns" else weight
        bias = None if self.bias is None else tensors[self.bias]
        if self.half != "all":
            part = 0 if self.half == "first" else 1
            weight = weight.chunk(2)[part]
            bias = None if bias is None else bias.chunk(2)[part]
        return (weight, bias) if self.norm is None else fold_batch_norm(weight, bias, self.norm, norms)


def fold_batch_norm(weight: Tensor, bias: Tensor | None, norm: NormSpot, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Join a linear map and the batch norm after it into one linear map. It is exact for a batch norm in evaluation mode.

    Args:
        weight: (out, in) weight.
        bias: (out,) bias, or None.
        norm: Names of the batch norm's tensors.
        tensors: Tensors by name.

    Returns:
        (out, in) weight and (out,) bias. The arithmetic is done in float64.
    """
    mean, variance = tensors[norm.mean].double(), tensors[norm.variance].double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * tensors[norm.weight].double()
    shift = (0 if bias is None else bias.double()) - mean
    shift = shift * scale + (0 if norm.bias is None else tensors[norm.bias].double())
    return (weight.double() * scale[:, None]).to(weight.dtype), shift.to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One attribute of one module that changes when the FFN is replaced."""

    owner: str
    """Name of the module that holds the attribute; empty for the model itself."""
    attribute: str
    """Name of the attribute."""
    becomes: Becomes
    """What takes its place: the mixture, a function that changes nothing, 0 or False."""

    @property
    def path(self) -> str:
        """Name of the attribute from the model on."""
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute


@dataclass(frozen=True, kw_only=True)
class FfnSite:
    """One FFN of a model."""

    name: str
    """Name of the module that the mixture takes the place of."""
    kind: SiteKind
    """How the FFN is packed."""
    up: MapSpot
    """First linear map."""
    gate: MapSpot | None
    """Gate, or None."""
    down: MapSpot
    """Last linear map."""
    activation: Activation
    """Function between the linear maps."""
    width_in: int
    """Input width D."""
    width_hidden: int
    """Hidden width F."""
    width_out: int
    """Output width O."""
    dropout: float = 0.0
    """Dropout of the hidden units in training."""
    dropout_after: float = 0.0
    """Dropout of the outputs in training, where it lies inside the module that is replaced."""
    channel_dim: int | None = None
    """Dimension of the channels where it is not the last one: -2 for (B, C, N), -3 for (B, C, H, W)."""
    edits: tuple[Edit, ...]
    """What changes in the model. Exactly one kind of place gets the mixture; a module that is used in several places has several."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors of the FFN, each once."""
        spots = (self.up, self.gate, self.down)
        return tuple(dict.fromkeys(name for spot in spots if spot is not None for name in spot.names))

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token of the dense FFN."""
        return self.width_hidden * (self.width_in * (1 if self.gate is None else 2) + self.width_out)

    def read(self, tensors: Mapping[str, Tensor], norms: Mapping[str, Tensor] | None = None) -> DenseFfn:
        """Read the FFN.

        Args:
            tensors: Tensors of the model by name, as `tensors_of` gives them; a state dict of the same model fits as well.
            norms: Where batch norms are read from; None for `tensors`.

        Returns:
            The FFN. Its tensors are views of the model's where no batch norm is folded in.

        Raises:
            InvalidInput: A tensor is missing or has another shape; the message names the first.
        """
        missing = [name for name in self.tensors if name not in tensors]
        if missing:
            raise InvalidInput(
                f"the FFN {self.name!r} needs the tensor {missing[0]!r}, which is not there; the model has another structure than "
                "the one that was searched"
            )
        norms = tensors if norms is None else norms
        up, up_bias = self.up.read(tensors, norms)
        down, down_bias = self.down.read(tensors, norms)
        gate, gate_bias = (None, None) if self.gate is None else self.gate.read(tensors, norms)
        try:
            ffn = DenseFfn(
                up=up,
                down=down,
                gate=gate,
                up_bias=up_bias,
                gate_bias=gate_bias,
                down_bias=down_bias,
                activation=self.activation,
            )
        except InvalidInput as error:
            raise InvalidInput(f"the FFN {self.name!r} cannot be read: {error}") from error
        found, wanted = (ffn.width_in, ffn.width_hidden, ffn.width_out), (self.width_in, self.width_hidden, self.width_out)
        if found != wanted:
            raise InvalidInput(
                f"the FFN {self.name!r} has the widths {' -> '.join(map(str, found))} here and {' -> '.join(map(str, wanted))} in "
                "the model that was searched; experts need equal shapes"
            )
        return ffn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Get all parameters and buffers by every name that they have, tied and unsaved ones included.

    Args:
        model: Any model.

    Returns:
        Name to tensor, without gradients, sharing memory with the model.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in (named | dict(model.named_buffers(remove_duplicate=False))).items()}


def first_quantized_tensor(model: nn.Module) -> str | None:
    """Find a weight that is not stored as ordinary floating-point numbers.

    Args:
        model: Any model.

    Returns:
        What was found, in words; None if there is nothing.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if ".quantized" in kind.__module__ and hasattr(module, "_packed_params"):
            return f"{name!r} is a {kind.__module__}.{kind.__name__}, whose weight is packed"
    for name, tensor in tensors_of(model).items():
        last = name.rpartition(".")[2]
        odd = tensor.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        if tensor.is_quantized or ("weight" in last and odd and tensor.dtype != torch.bool):
            return f"{name!r} is stored as {str(tensor.dtype).removeprefix('torch.')}"
    return None
