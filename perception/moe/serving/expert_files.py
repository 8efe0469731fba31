"""Experts on disk: one file with a piece for each expert and layer, of which a runtime holds in memory what its budget allows.

A piece is one vector: the rows of gate and up, their biases, and the last linear map. Copying it into memory is one read of the disk, and
its matrices are views. The pieces of an expert lie next to each other, so an expert that is loaded as a whole is one read, too.

Every piece has at least one unit: an expert without own units in a layer gets one of zeros, which contributes exactly 0.
Read next: `served_models.py`, which writes these files from carved models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.config_json import config_stored_in, config_to_json
from ....core.errors import InvalidInput, require, require_counts
from ....core.mapped_tensors import MappedTensors, map_tensors
from ....core.tensor_file import CorruptFile, TensorFileKind, not_finite, write_tensors
from ....core.tensor_value import shape_of
from ..layers.dense_ffn import ACTIVATIONS, Activation, DenseFfn, activate
from ..runtime.expert_memory import ExpertLayout

EXPERTS_FILE = TensorFileKind(
    name="file of experts",
    format="upcycle3d experts 1",
    advice="write it again with write_experts, or copy it again from its source",
    max_bytes=1 << 40,  # it is mapped and never in memory as a whole
)

PieceNumbers = Literal["float32", "float64", "bfloat16", "float16"]
"""Type of the numbers of all pieces."""


@dataclass(frozen=True, kw_only=True)
class PieceForm:
    """What the pieces of one layer have in common."""

    width_in: int
    """Input width D."""
    width_out: int
    """Output width O."""
    gated: bool
    """Whether there is a gate."""
    bias: bool
    """Whether hidden units have biases. A gated layer then has both."""
    activation: Activation
    """Function between the linear maps."""

    def __post_init__(self) -> None:
        require_counts("PieceForm", most=2**24, width_in=self.width_in, width_out=self.width_out)
        require(self.activation in ACTIVATIONS, f"PieceForm.activation must be one of {ACTIVATIONS}, found {self.activation!r}")

    @classmethod
    def of(cls, ffns: Sequence[DenseFfn]) -> PieceForm:
        """Describe the experts of one layer.

        Args:
            ffns: The experts.

        Returns:
            Their form.

        Raises:
            InvalidInput: They differ in more than their hidden widths, or one has a bias of the outputs, which belongs to the shared part.
        """
        first = ffns[0]
        forms = {(f.width_in, f.width_out, f.gate is not None, f.activation) for f in ffns}
        require(len(forms) == 1, f"the experts of one layer must have one form, found {sorted(forms)}")
        require(
            all(f.down_bias is None for f in ffns),
            "an expert has a bias of the outputs; give it to the part that all tokens share",
        )
        bias = any(f.up_bias is not None or f.gate_bias is not None for f in ffns)
        return cls(
            width_in=first.width_in,
            width_out=first.width_out,
            gated=first.gate is not None,
            bias=bias,
            activation=first.activation,
        )

    @property
    def rows(self) -> int:
        """Rows of the first linear map per unit: 2 with a gate."""
        return 2 if self.gated else 1

    def count(self, units: int) -> int:
        """Count the numbers of a piece.

        Args:
            units: Its hidden units.

        Returns:
            Its length as a vector.
        """
        return units * (self.rows * (self.width_in + self.bias) + self.width_out)

    def flat(self, ffn: DenseFfn) -> Tensor:
        """Write an expert as one vector.

        Args:
            ffn: The expert, without a bias of the outputs.

        Returns:
            (count,) numbers.
        """
        if not ffn.width_hidden:
            return ffn.down.new_zeros(self.count(1))
        maps = [ffn.up] if ffn.gate is None else [ffn.gate, ffn.up]
        parts = [weight.reshape(-1) for weight in maps]
        if self.bias:
            biases = [ffn.up_bias] if ffn.gate is None else [ffn.gate_bias, ffn.up_bias]
            parts += [ffn.up.new_zeros(ffn.width_hidden) if b is None else b for b in biases]
        return torch.cat([*parts, ffn.down.reshape(-1)])

    def piece(self, flat: Tensor, units: int) -> ExpertPiece:
        """Read a vector as an expert.

        Args:
            flat: (count,) numbers.
            units: Its hidden units.

        Returns:
            The expert, whose matrices are views.

        Raises:
            InvalidInput: The vector has another length.
        """
        if flat.shape != (self.count(units),):
            raise InvalidInput(f"a piece of {units} units has {self.count(units)} numbers, found {shape_of(flat)}")
        rows = self.rows * units
        sizes = [rows * self.width_in, rows * self.bias, self.width_out * units]
        first, bias, down = flat.split(sizes)
        return ExpertPiece(
            first=first.view(rows, self.width_in),
            first_bias=bias if self.bias else None,
            down=down.view(self.width_out, units),
            gated=self.gated,
            activation=self.activation,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertPiece:
    """The own units of one expert in one layer, in memory. Gate and up are one matrix, so both are one product."""

    first: Tensor
    """(2 P, D) rows of the gate, then those of up; (P, D) without a gate. P is the number of units."""
    first_bias: Tensor | None
    """(2 P,) or (P,) biases of these rows, or None."""
    down: Tensor
    """(O, P) last linear map."""
    gated: bool
    """Whether there is a gate."""
    activation: Activation
    """Function between the linear maps."""

    def apply(self, x: Tensor) -> Tensor:
        """Compute the units.

        Args:
            x: (T, D) tokens.

        Returns:
            (T, O) their part of the outputs.
        """
        hidden = F.linear(x, self.first, self.first_bias)
        if self.gated:
            gate, up = hidden.chunk(2, -1)
            hidden = activate(gate, self.activation) * up
        else:
            hidden = activate(hidden, self.activation)
        return F.linear(hidden, self.down)


@dataclass(frozen=True, kw_only=True)
class ExpertFileForm:
    """What a file of experts says about itself."""

    forms: tuple[PieceForm, ...]
    """Form of the pieces of each of L layers."""
    units: tuple[tuple[int, ...], ...]
    """Hidden units of each of E experts, for each layer; at least 1."""
    numbers: PieceNumbers
    """Type of all numbers."""
    model: str
    """Hash of the backbone that the experts belong to: both files must come from one model."""

    def __post_init__(self) -> None:
        require(self.numbers in get_args(PieceNumbers), f"ExpertFileForm.numbers: unknown type {self.numbers!r}")
        require_counts("ExpertFileForm", layers=len(self.forms))
        require(
            len(self.units) == len(self.forms) and len({len(row) for row in self.units}) == 1,
            f"{len(self.forms)} layers of experts need the units of the same experts, found {[len(row) for row in self.units][:5]}",
        )
        require_counts("ExpertFileForm", experts=self.experts)
        for row in self.units:
            require_counts("ExpertFileForm", most=2**24, units=row)

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return len(self.forms)

    @property
    def experts(self) -> int:
        """Number of experts, E."""
        return len(self.units[0])

    @property
    def dtype(self) -> torch.dtype:
        """Type of all numbers."""
        found: torch.dtype = getattr(torch, self.numbers)
        return found

    def layout(self, *, whole: bool) -> ExpertLayout:
        """Number the pieces for a runtime.

        Args:
            whole: Whether experts are loaded as a whole; else layer by layer.

        Returns:
            The layout.
        """
        return ExpertLayout(experts=self.experts, layers=1 if whole else self.layers)

    def count(self, expert: int, layer: int) -> int:
        """Count the numbers of a piece.

        Args:
            expert: Number of the expert.
            layer: Number of the layer.

        Returns:
            Its length as a vector.
        """
        return self.forms[layer].count(self.units[layer][expert])

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        """Bytes of each expert over all layers."""
        return tuple(
            sum(self.count(expert, layer) for layer in range(self.layers)) * self.dtype.itemsize for expert in range(self.experts)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertFile:
    """A file of experts that was opened and checked."""

    form: ExpertFileForm
    """What it holds."""
    file: MappedTensors
    """The mapped file."""


def piece_name(expert: int, layer: int) -> str:
    """Name the tensor of a piece. Names in order are the order in the file: expert by expert.

    Args:
        expert: Number of the expert.
        layer: Number of the layer.

    Returns:
        The name.
    """
    return f"expert {expert:05d} layer {layer:05d}"


def write_experts(path: str | Path, experts: Sequence[Sequence[DenseFfn]], *, model: str) -> ExpertFileForm:
    """Write experts as one file of pieces.

    Args:
        path: The file.
        experts: For each layer the own units of each expert, without a bias of the outputs; an expert may have none.
        model: Hash of the backbone that they belong to.

    Returns:
        What the file holds.

    Raises:
        InvalidInput: Experts of a layer differ in form, types differ, or a number is NaN or infinite; nothing is written then.
        OSError: The file cannot be written.
    """
    require(bool(experts) and all(experts), "a file of experts needs at least one layer with one expert")
    numbers = {str(ffn.up.dtype).removeprefix("torch.") for layer in experts for ffn in layer}
    require(len(numbers) == 1, f"all experts must have numbers of one type, found {sorted(numbers)}")
    form = ExpertFileForm(
        forms=tuple(PieceForm.of(layer) for layer in experts),
        units=tuple(tuple(max(1, ffn.width_hidden) for ffn in layer) for layer in experts),
        numbers=numbers.pop(),  # type: ignore[arg-type]
        model=model,
    )
    with torch.no_grad():
        tensors = {
            piece_name(expert, number): form.forms[number].flat(ffn)
            for number, layer in enumerate(experts)
            for expert, ffn in enumerate(layer)
        }
    if bad := not_finite(tensors):
        raise InvalidInput(f"{len(bad)} pieces hold NaN or inf, first that of {bad[0]}, so the experts were not written")
    write_tensors(path, tensors, {"description": json.dumps(config_to_json(form))}, EXPERTS_FILE)
    return form


def open_experts(path: str | Path) -> ExpertFile:
    """Open a file of experts and check all of it: hash, description, and the place and length of every piece.

    Args:
        path: The file.

    Returns:
        The opened file; nothing of it is in memory.

    Raises:
        InvalidInput: The file is missing, of another kind or damaged, or its pieces are not those that it describes.
    """
    file = map_tensors(path, EXPERTS_FILE)
    try:
        form = config_stored_in(file.path, ExpertFileForm, file.described("description"), EXPERTS_FILE.advice)
        _check_pieces(file, form)
    except BaseException:
        file.close()
        raise
    return ExpertFile(form=form, file=file)


def _check_pieces(file: MappedTensors, form: ExpertFileForm) -> None:
    number = form.experts * form.layers
    require(
        len(file.spans) == number, f"{file.path} describes {number} pieces and holds {len(file.spans)}; {EXPERTS_FILE.advice}"
    )
    for expert in range(form.experts):
        end: int | None = None
        for layer in range(form.layers):
            span = file.span(piece_name(expert, layer))
            good = span.dtype == form.dtype and span.shape == (form.count(expert, layer),) and end in (None, span.start)
            if not good:
                raise CorruptFile(
                    f"{file.path}: the piece of expert {expert} in layer {layer} must have {form.count(expert, layer)} numbers of "
                    f"{form.numbers} behind the piece before it, found {span}; {EXPERTS_FILE.advice}"
                )
            end = span.start + span.size
