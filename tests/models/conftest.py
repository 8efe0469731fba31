"""What the comparisons with OpenPCDet's golden outputs share: weights made by a rule, so that they need not be stored."""

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

RuleWeights = Callable[[list[dict]], dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def rule_weights() -> RuleWeights:
    """Makes the weights that the golden outputs were computed with.

    Each entry of a state dict is drawn from a generator seeded with the CRC-32 of its name: kernels from a normal distribution scaled by
    their fan-in, biases and running means from one with deviation 0.1, the rest uniform in 0.5..1.5; counters are 0.
    """
    return _rule_weights


def _rule_weights(entries: list[dict]) -> dict[str, torch.Tensor]:
    state = {}
    for entry in entries:
        name, shape = entry["name"], tuple(entry["shape"])
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith(("num_batches_tracked", "global_step")):
            state[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        if len(shape) >= 2:
            output_axis = 1 if name.startswith("backbone_2d.deblocks") else 0
            fan_in = np.prod(shape) / shape[output_axis]
            values = rng.normal(0, np.sqrt(2 / fan_in), size=shape) * (entry.get("rule_scale") or 1.0)
        elif name.endswith(("running_mean", "bias")):
            values = rng.normal(0, 0.1, size=shape)
        else:
            values = rng.uniform(0.5, 1.5, size=shape)
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state
