"""One step of training: the norm of the gradient is limited, and a gradient that is not finite never reaches a weight."""

import pytest
import torch

from upcycle3d.core.errors import NonFiniteValue
from upcycle3d.perception.moe.layers.descent import descend


def test_the_gradient_is_limited_over_all_groups():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    descend(3 * a.sum() + 4 * b.sum(), optimizer, clip=1.0, step=0)
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor([-0.6, -0.8]))


def test_a_gradient_that_is_not_finite_changes_no_weight():
    """The loss is finite here, so only the step after it would have shown that every weight became NaN."""
    weight = torch.zeros(3, requires_grad=True)
    loss = weight.sqrt().sum()
    assert loss.isfinite()
    with pytest.raises(NonFiniteValue, match=r"inf at step 7; lower the learning rate \(now 0.5\)"):
        descend(loss, torch.optim.AdamW([weight], lr=0.5), clip=1.0, step=7)
    assert torch.equal(weight.detach(), torch.zeros(3))
