"""The contrastive loss against sums written out, with masked pairs, smoothing, empty batches and low precision."""

import math

import pytest
import torch
from torch import Tensor

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.contrastive.loss import LogitScale, contrastive_loss, equal_captions


def pairs(batch: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, batch, 4, generator=generator, dtype=torch.float64).unbind()
    return image.requires_grad_(), text.requires_grad_()


def written_out(image: Tensor, text: Tensor, scale: float, ignored: set[tuple[int, int]], smoothing: float) -> Tensor:
    """Row by row and column by column, from cosines."""
    count, total = len(image), torch.zeros((), dtype=image.dtype)

    def logit(i: int, j: int) -> Tensor:
        return scale * (image[i] @ text[j]) / (image[i].norm() * text[j].norm())

    for a in range(count):
        row = [logit(a, j) for j in range(count) if j == a or (a, j) not in ignored]
        column = [logit(i, a) for i in range(count) if i == a or (i, a) not in ignored]
        for logits in (row, column):
            norm = torch.stack(logits).logsumexp(0)
            spread = sum(norm - value for value in logits) / len(logits)
            total = total + (1 - smoothing) * (norm - logit(a, a)) + smoothing * spread
    return total / (2 * count)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("caption", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [7, 7, 7, 7, 7]], ids=str)
def test_the_loss_and_its_gradient_are_those_written_out(caption, smoothing):
    """Equal captions are neither positive nor negative, and smoothing spreads over the pairs that are left."""
    ignore = equal_captions(torch.tensor(caption))
    ignored = {(i, j) for i in range(5) for j in range(5) if i != j and caption[i] == caption[j]}
    assert {(i, j) for i, j in ignore.nonzero().tolist()} == ignored
    image, text = pairs()
    loss = contrastive_loss(image, text, 10.0, ignore=ignore, label_smoothing=smoothing)
    expected = written_out(image, text, 10.0, ignored, smoothing)
    torch.testing.assert_close(loss, expected)
    for found, own in zip(torch.autograd.grad(loss, (image, text)), torch.autograd.grad(expected, (image, text))):
        torch.testing.assert_close(found, own)


def test_a_mask_without_equal_captions_changes_nothing():
    image, text = pairs()
    none = torch.zeros(5, 5, dtype=torch.bool)
    for smoothing in (0.0, 0.1):
        plain = contrastive_loss(image, text, label_smoothing=smoothing)
        torch.testing.assert_close(contrastive_loss(image, text, ignore=none, label_smoothing=smoothing), plain)
    diagonal = torch.eye(5, dtype=torch.bool)  # a caption is never ignored for its own image
    torch.testing.assert_close(contrastive_loss(image, text, ignore=diagonal), contrastive_loss(image, text))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_exact_in_float32_and_finite_in_bfloat16(smoothing):
    """At scale 100 and features of any length: float32 agrees with float64, and autocast does not lower the precision."""
    image, text = pairs(16)
    ignore = equal_captions(torch.arange(16) // 2)
    exact = contrastive_loss(image, text, ignore=ignore, label_smoothing=smoothing)
    single = [(1e4 * x.detach().float()).requires_grad_() for x in (image, text)]
    loss = contrastive_loss(*single, ignore=ignore, label_smoothing=smoothing)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(*single, ignore=ignore, label_smoothing=smoothing)
        features = [x @ torch.eye(4) for x in single]  # a layer under autocast gives bfloat16
        assert features[0].dtype == torch.bfloat16
        rounded = contrastive_loss(*features, ignore=ignore, label_smoothing=smoothing)
    assert inside.dtype == rounded.dtype == torch.float32
    assert torch.equal(inside, loss)
    torch.testing.assert_close(rounded, loss, rtol=0.05, atol=0.05)
    rounded.backward()
    assert all(x.grad.isfinite().all() for x in single)


def test_empty_single_and_all_ignored_batches_are_zero_with_zero_gradients():
    for batch in (0, 1, 3):
        image, text = pairs(batch)
        ignore = equal_captions(torch.zeros(batch, dtype=torch.int64))
        loss = contrastive_loss(image, text, ignore=ignore, label_smoothing=0.1)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
        assert float(image.grad.abs().sum() + text.grad.abs().sum()) == pytest.approx(0.0, abs=1e-12)


def test_the_temperature_is_fixed_or_learned_and_has_a_limit():
    fixed = LogitScale()
    assert list(fixed.parameters()) == []
    assert float(fixed()) == pytest.approx(100.0)
    assert "log_scale" in fixed.state_dict()
    learned = LogitScale(1 / 0.07, learned=True)
    assert float(learned().detach()) == pytest.approx(1 / 0.07)
    image, text = pairs()
    contrastive_loss(image, text, learned()).backward()
    assert learned.log_scale.grad is not None
    learned.log_scale.data.fill_(math.log(500.0))
    learned.zero_grad()
    learned().backward()
    assert float(learned().detach()) == pytest.approx(100.0)
    assert float(learned.log_scale.grad) == pytest.approx(100.0)  # not stuck beyond the limit
    with pytest.raises(InvalidInput, match="at most 100"):
        LogitScale(101.0)


def test_bad_input_is_refused():
    image, text = pairs()
    with pytest.raises(InvalidInput, match=r"both be \(B, D\)"):
        contrastive_loss(image, text[:4])
    with pytest.raises(InvalidInput, match="image by text"):
        contrastive_loss(image, text, ignore=torch.zeros(5, 5))
    with pytest.raises(InvalidInput, match="label_smoothing"):
        contrastive_loss(image, text, label_smoothing=1.0)
    with pytest.raises(InvalidInput, match=r"captions must be \(B,\)"):
        equal_captions(torch.zeros(2, 2))
