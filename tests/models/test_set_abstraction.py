"""Set abstraction against OpenPCDet's padded arithmetic (`StackSAModuleMSG`), written here with its modules in float64.

There every ball has exactly n slots: too few neighbors repeat the first one, an empty ball is n rows of zeros. Values, batch
statistics, running statistics and gradients must be equal, although ours lists every neighbor once.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from upcycle3d.perception.models.encoders.set_abstraction import SetAbstraction, SetAbstractionConfig

CONFIG = SetAbstractionConfig(channels=(6, 5), radii=(0.5, 1.1), limits=(4, 9))
CHANNELS = 3


class Padded(nn.Module):
    """The reference. Same names of weights."""

    def __init__(self, in_channels: int, config: SetAbstractionConfig) -> None:
        super().__init__()
        self.config = config
        c1, c2 = config.channels
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 + in_channels, c1, 1, bias=False), nn.BatchNorm2d(c1), nn.ReLU(),
                nn.Conv2d(c1, c2, 1, bias=False), nn.BatchNorm2d(c2), nn.ReLU(),
            )
            for _ in config.radii
        )  # fmt: skip

    def forward(
        self, centers: Tensor, center_starts: list[int], points: Tensor, point_starts: list[int], features: Tensor
    ) -> Tensor:
        pooled = []
        for mlp, radius, limit in zip(self.mlps, self.config.radii, self.config.limits, strict=True):
            balls = []
            for (first, last), (low, high) in zip(pairwise(center_starts), pairwise(point_starts), strict=True):
                for center in centers[first:last]:
                    distance = (points[low:high] - center).square().sum(1)
                    rows = low + (distance < radius**2).nonzero().squeeze(1)[:limit]
                    if len(rows) == 0:
                        balls.append(features.new_zeros(limit, 3 + features.shape[1]).double())
                        continue
                    rows = torch.cat([rows, rows[:1].expand(limit - len(rows))])
                    balls.append(torch.cat([points[rows].double() - center.double(), features[rows].double()], 1))
            grouped = torch.stack(balls).permute(2, 0, 1)[None]  # (1, 3 + C, Q, n)
            pooled.append(mlp(grouped).amax(3)[0].T)
        return torch.cat(pooled, 1)


Case = tuple[Tensor, list[int], Tensor, list[int], Tensor]


def case(center_counts: tuple[int, ...], point_counts: tuple[int, ...], seed: int = 0) -> Case:
    """Points in a box of 4 m, tens of meters away from the origin; centers there too, some of them alone."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.tensor([50.0, -20.0, 1.0])
    centers, points = (torch.rand(sum(n), 3, generator=generator) * 4 + place for n in (center_counts, point_counts))
    centers[1::5] += torch.tensor([0.0, 30.0, 0.0])
    features = torch.randn(len(points), CHANNELS, generator=generator)
    starts = [[0, *torch.tensor(n).cumsum(0).tolist()] for n in (center_counts, point_counts)]
    return centers, starts[0], points, starts[1], features


CASES = pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(case((30, 20), (200, 150)), id="two scenes"),
        pytest.param(case((7, 5, 0, 6), (150, 0, 0, 150)), id="scenes without points or centers"),
        pytest.param(case((4, 3), (0, 0)), id="no points at all"),
        pytest.param(case((9,), (3000,)), id="full balls"),
        pytest.param(case((40,), (25,)), id="hardly any neighbor"),
    ],
)


def pair(seed: int = 0) -> tuple[SetAbstraction, Padded]:
    """Ours and the reference with the same weights, none of them at its usual start."""
    torch.manual_seed(seed)
    ours, theirs = SetAbstraction(CHANNELS, CONFIG), Padded(CHANNELS, CONFIG)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight, -0.5),
                (module.bias, -0.5),
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):
                tensor.data = torch.rand(tensor.shape) + low
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.double()


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def test_the_cases_hold_full_partial_and_empty_balls():
    centers, _, points, _, _ = case((30, 20), (200, 150))
    near = (torch.cdist(centers[:30], points[:200]) < 1.1).sum(1)
    assert (near == 0).any()
    assert ((near > 0) & (near < 9)).any()
    assert (near > 9).any()


@CASES
@pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])
def test_evaluation_is_that_of_the_padded_reference(inputs, gradient):
    ours, theirs = (m.eval() for m in pair())
    with torch.set_grad_enabled(gradient):
        found = ours(*inputs)
    assert found.shape == (len(inputs[0]), 10)
    close(found, theirs(*inputs))


@CASES
def test_training_has_the_batch_and_running_statistics_and_gradients_of_the_padded_reference(inputs):
    ours, theirs = (m.train() for m in pair(1))
    results = []
    for module in (ours, theirs):
        features = inputs[4].clone().requires_grad_()
        out = module(*inputs[:4], features)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        results.append((out, features.grad))
    (found, found_grad), (expected, expected_grad) = results
    close(found, expected)
    if len(inputs[2]):
        scale = float(expected_grad.abs().max())
        close(found_grad / scale, expected_grad / scale)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = max(1.0, float(b.grad.abs().max()))
        torch.testing.assert_close(
            a.grad.double() / scale, b.grad / scale, atol=5e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # What was learned from the step is also what evaluation uses afterwards.
    close(ours.eval()(*inputs), theirs.eval()(*inputs))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("points", [0, 10])
def test_no_center_gives_no_row_and_moves_no_statistics(training, points):
    module, _ = pair()
    module.train(training)
    before = {n: b.clone() for n, b in module.named_buffers()}
    features = torch.randn(points, CHANNELS, requires_grad=True)
    out = module(torch.zeros(0, 3), [0, 0], torch.zeros(points, 3), [0, points], features)
    assert out.shape == (0, 10)
    out.sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())


def test_one_ball_with_one_slot_does_not_divide_by_its_missing_variance():
    torch.manual_seed(0)
    module = SetAbstraction(1, SetAbstractionConfig(channels=(2, 2), radii=(1.0,), limits=(1,))).train()
    out = module(torch.zeros(1, 3), [0, 1], torch.zeros(1, 3), [0, 1], torch.ones(1, 1))
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(b).all() for b in module.buffers())


@pytest.mark.parametrize("training", [False, True])
def test_half_precision_does_not_lose_offsets_of_centimeters(training):
    """bfloat16 has steps of half a meter at 70 m."""
    inputs = case((30,), (300,))
    module, _ = pair()
    module.train(training)
    state = {n: b.clone() for n, b in module.state_dict().items()}
    expected = module(*inputs)
    module.load_state_dict(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(*inputs)
        assert found.dtype == torch.float32
        half = module(*inputs[:4], inputs[4].bfloat16())  # features come from layers under autocast
    assert torch.equal(found, expected)
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


def test_scenes_do_not_see_each_other():
    module, _ = pair()
    module.eval()
    centers, _, points, _, features = case((10, 10), (100, 100))
    centers[10:], points[100:] = centers[:10], points[:100] + 0.01  # at the same place in both scenes
    together = module(centers, [0, 10, 20], points, [0, 100, 200], features)
    for scene in (0, 1):
        c, p = slice(10 * scene, 10 * scene + 10), slice(100 * scene, 100 * scene + 100)
        alone = module(centers[c], [0, 10], points[p], [0, 100], features[p])
        assert torch.allclose(together[c], alone, atol=1e-5)
