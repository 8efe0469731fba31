"""TensorAccount for every tensor when one model is made of others: each one that is read, and each one that is written, exactly once.

Converters that lose all experts without a word are a common fault: a name does not match, and the fresh weights stay. Here the target is
filled with NaN first, every write and every read is recorded by name, and `close` names the first tensor that is left over.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput
from ....core.tensor_value import shape_of


@dataclass(frozen=True, kw_only=True)
class TensorAccount:
    """What became of every tensor. `print(account)` shows the sums."""

    written: tuple[tuple[str, str], ...]
    """Name of each tensor of the new model, and where its values come from."""
    read: tuple[tuple[str, str], ...]
    """Name of each tensor of the sources with its source's number in front (`2:layers.0.fc1.weight`), and what became of it."""

    def __str__(self) -> str:
        lines = [f"{len(self.written)} tensors written, {len(self.read)} read, each once"]
        lines += [f"  written: {number} {how}" for how, number in Counter(how for _, how in self.written).items()]
        return "\n".join(lines + [f"  read: {number} {how}" for how, number in Counter(how for _, how in self.read).items()])


class TensorLedger:
    """Writes tensors into a target and keeps count of what was read and written."""

    def __init__(self, sources: Sequence[Mapping[str, Tensor]], target: Mapping[str, Tensor]) -> None:
        self.sources, self.target = sources, target
        self._read: dict[tuple[int, str], str] = {}
        self._written: dict[str, str] = {}

    @property
    def written(self) -> frozenset[str]:
        """Names of the tensors that are written."""
        return frozenset(self._written)

    def read(self, source: int, name: str, how: str) -> Tensor:
        """Take a tensor out of a source.

        Args:
            source: Number of the source.
            name: Name of the tensor.
            how: What becomes of it, for the account.

        Returns:
            The tensor.

        Raises:
            InvalidInput: There is no such tensor, or it was taken already.
        """
        if name not in self.sources[source]:
            raise InvalidInput(f"model {source} has no tensor {name!r}, which is needed ({how})")
        if (source, name) in self._read:
            raise InvalidInput(f"tensor {name!r} of model {source} is used twice: {self._read[source, name]}, and {how}")
        self._read[source, name] = how
        return self.sources[source][name]

    def write(self, name: str, value: Tensor, how: str) -> None:
        """Write a tensor of the target.

        Args:
            name: Name of the tensor.
            value: Its values, of the same shape and type.
            how: Where they come from, for the account.

        Raises:
            InvalidInput: There is no such tensor, it was written already, or the shape or type differs.
        """
        self.mark_written(name, how)
        place = self.target[name]
        if place.shape != value.shape or place.dtype != value.dtype:
            raise InvalidInput(f"tensor {name!r} is {shape_of(place)} in the new model, and {how} gives {shape_of(value)}")
        with torch.no_grad():
            place.copy_(value)

    def mark_written(self, name: str, how: str) -> None:
        """Record a tensor of the target that got its values in another way.

        Args:
            name: Name of the tensor.
            how: Where its values come from.

        Raises:
            InvalidInput: There is no such tensor, or it was written already.
        """
        if name not in self.target:
            raise InvalidInput(f"the new model has no tensor {name!r} to write ({how})")
        if name in self._written:
            raise InvalidInput(f"tensor {name!r} of the new model is written twice: {self._written[name]}, and {how}")
        self._written[name] = how

    def close(self) -> TensorAccount:
        """Check that nothing is left.

        Returns:
            What became of every tensor.

        Raises:
            InvalidInput: A tensor of a source was not read, or one of the target was not written; the message names the first.
        """
        for name, place in self.target.items():
            if name not in self._written:
                raise InvalidInput(
                    f"tensor {name!r} {shape_of(place)} of the new model was never written: no expert, router or common part has it"
                )
        for number, source in enumerate(self.sources):
            for name, tensor in source.items():
                if (number, name) not in self._read:
                    raise InvalidInput(
                        f"tensor {name!r} {shape_of(tensor)} of model {number} was never read, so the new model would lose it"
                    )
        read = tuple((f"{number}:{name}", how) for (number, name), how in self._read.items())
        return TensorAccount(written=tuple(self._written.items()), read=read)


def poisoned_copy(model: nn.Module) -> nn.Module:
    """Copy a model and fill its saved tensors with NaN (whole numbers with their smallest value): what is not written then shows.

    Args:
        model: Any model. It is not changed.

    Returns:
        The copy. Tensors that are not saved, such as tables of positions, keep their values.
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype == torch.bool:
                tensor.fill_(False)
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).min)
    return twin
