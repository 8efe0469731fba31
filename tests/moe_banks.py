"""What the tests of mixtures share: small banks, a reference that knows no sorting, and memory that is poisoned."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from upcycle3d.perception.moe.layers.bank import BankShape, ExpertBank


def bank_of(experts: int = 4, sizes: tuple[int, int, int] = (8, 12, 16), seed: int = 0, **fields) -> ExpertBank:
    """A bank with random weights and biases; no two sizes are equal, so a transposed weight cannot pass."""
    torch.manual_seed(seed)
    width, hidden, out = sizes
    fields = {"activation": "gelu"} | fields
    bank = ExpertBank(BankShape(experts=experts, width_in=width, width_hidden=hidden, width_out=out, **fields))
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return bank


def token_by_token(bank: ExpertBank, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The definition: for each token, for each choice, one dense FFN."""
    rows = []
    for t in range(len(x)):
        parts = [weight[t, j] * bank.to_dense(int(index[t, j])).apply(x[t]) for j in range(index.shape[1])]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows) if rows else x.new_zeros(0, bank.shape.width_out)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, so a row that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
