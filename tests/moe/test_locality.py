"""Locality of decisions: what is kept along a text, and what one router's decisions say about another's."""

import math
from collections import Counter

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.carving.locality import kept_share, mutual_information


def decisions(*shape: int, seed: int = 0, experts: int = 3) -> torch.Tensor:
    return torch.randint(0, experts, shape, generator=torch.Generator().manual_seed(seed))


def test_kept_tokens_are_counted_within_texts_only():
    """The first token of a text keeps nothing, even where the text before it ended with the same expert."""
    assert kept_share(torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])) == 3 / 8
    chosen = decisions(2, 4, 7)
    pairs = [(int(row[i]), int(row[i + 1])) for row in chosen.flatten(0, 1) for i in range(6)]
    assert kept_share(chosen) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert math.isnan(kept_share(torch.zeros(3, 1, dtype=torch.int64)))
    assert math.isnan(kept_share(torch.zeros(0, 5, dtype=torch.int64)))
    with pytest.raises(InvalidInput, match="integers"):
        kept_share(torch.rand(2, 3))


def test_mutual_information_is_that_of_the_counted_pairs():
    """The oracle counts pairs and adds up entropies: I = H(a) + H(b) - H(a, b)."""
    first = decisions(4, 25)
    second = torch.where(decisions(4, 25, seed=1) == 0, decisions(4, 25, seed=2), first)

    def entropy(values) -> float:
        counts = Counter(values)
        return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())

    a, b = first.flatten().tolist(), second.flatten().tolist()
    wanted = entropy(a) + entropy(b) - entropy(zip(a, b))
    assert wanted > 0.05
    assert mutual_information(first, second, 3) == pytest.approx(wanted, rel=1e-9)
    assert mutual_information(second, first, 5) == pytest.approx(wanted, rel=1e-9)
    assert mutual_information(first, first, 3) == pytest.approx(entropy(a), rel=1e-9)
    assert mutual_information(first, (first + 1) % 3, 3) == pytest.approx(entropy(a), rel=1e-9)  # other names, the same decision
    assert mutual_information(first, torch.zeros_like(first), 3) == 0
    assert mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 2) == pytest.approx(0, abs=1e-12)


def test_decisions_that_do_not_fit_are_refused_and_no_token_has_no_value():
    assert math.isnan(mutual_information(decisions(0), decisions(0), 3))
    for first, second in ((decisions(3), decisions(4)), (decisions(3), decisions(3).float())):
        with pytest.raises(InvalidInput, match="one shape"):
            mutual_information(first, second, 3)
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(InvalidInput, match="there are 3 experts"):
            mutual_information(torch.tensor([0, 0]), wrong, 3)
