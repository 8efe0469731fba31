"""A phase of training that was stopped: weights, optimizer and random numbers on disk, so that it goes on as if nothing had happened.

The file is written now and then while the phase runs, whole or not at all, and holds a hash of everything that decides the result. The
batch of a step follows from its number, so no other state is needed. Read next: `text_training.py`, which runs the phase.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ....core.config_json import Json, config_from_json, config_to_json
from ....core.errors import InvalidInput
from ....core.tensor_file import TensorFileKind, fill_module, read_tensors, write_tensors

PHASE_FILE = TensorFileKind(
    name="unfinished phase of training",
    format="upcycle3d phase 1",
    advice="delete it, and the phase begins again",
    max_bytes=1 << 40,
)
_RANDOM = "random numbers"


@dataclass(frozen=True, kw_only=True)
class PhaseProgress:
    """How far a phase came."""

    depends: str
    """Hash of what decides the result."""
    losses: tuple[float, ...]
    """Loss of each step that was done."""
    cpu_seconds: float
    """CPU time in these steps."""


class PhaseFile:
    """The file of one phase.

    Args:
        path: Where it is. Remove it with `path.unlink` when the result of the phase is on disk.
        depends: What decides the result, as JSON values: the weights at the start, the data, the options.
        every: Seconds between two writes. It grows where a write takes more than a twentieth of that.
    """

    def __init__(self, path: Path, depends: Json, *, every: float = 300.0) -> None:
        self.path, self.every = path, every
        self._depends = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        self._wrote, self._cost = time.monotonic(), 0.0

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> PhaseProgress | None:
        """Put model, optimizer and random numbers where the stopped phase had them.

        Args:
            model: The model at the start of the phase. It is changed.
            optimizer: The fresh optimizer of its parameters. It is changed.

        Returns:
            How far the phase came; None if there is no file.

        Raises:
            InvalidInput: The file is damaged, or belongs to a phase with other weights, data or options.
        """
        if not self.path.exists():
            return None
        file = read_tensors(self.path, PHASE_FILE)
        found = config_from_json(PhaseProgress, file.described("progress"))
        if found.depends != self._depends:
            raise InvalidInput(
                f"{self.path} holds a training that was stopped after {len(found.losses)} steps, with other weights, texts or options; "
                "give the same ones to go on, or delete the file to begin again"
            )
        fill_module(model, _under("model.", file.tensors), self.path)
        for name, parameter in model.named_parameters():
            state = _under(f"optimizer.{name}/", file.tensors)
            if state:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
        torch.set_rng_state(file.named(_RANDOM)[0])
        return found

    def keep(self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: Sequence[float], cpu_seconds: float) -> None:
        """Write the state after a step, if the last write was long enough ago.

        Args:
            model: The model.
            optimizer: Its optimizer.
            losses: Loss of each step so far.
            cpu_seconds: CPU time so far.

        Raises:
            OSError: The file cannot be written.
        """
        start = time.monotonic()
        if start - self._wrote < max(self.every, 20 * self._cost):
            return
        tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}/{key}"] = value
        tensors[_RANDOM] = torch.get_rng_state()
        progress = PhaseProgress(depends=self._depends, losses=tuple(losses), cpu_seconds=cpu_seconds)
        write_tensors(self.path, tensors, {"progress": json.dumps(config_to_json(progress))}, PHASE_FILE)
        self._wrote = time.monotonic()
        self._cost = self._wrote - start


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
