"""Adapt a classifier to an unlabeled target that has moved and holds a class nobody named (GLC).

    python examples/adapt_classes.py

The data are made up: four classes in the source; in the target the clusters have moved, one class is missing and one is new.
"""

import torch
from torch import nn

from upcycle3d.perception.adapt.glc.adapter import AdaptConfig, GLCAdapter

torch.manual_seed(0)
centers = 4 * torch.randn(5, 16)  # class 4 exists in the target only


def samples(classes: list[int], shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """200 samples of each class around its center, moved by `shift` along every axis."""
    numbers = torch.tensor(classes).repeat_interleave(200)
    return centers[numbers] + shift + torch.randn(len(numbers), 16), numbers


# The source model: trained with labels, in two parts.
features, labels = samples([0, 1, 2, 3], shift=0.0)
backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.BatchNorm1d(8))
head = nn.Linear(8, 4)
optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(head(backbone(features)), labels).backward()
    optimizer.step()

# The target: no class 3, a new class 4, and no labels. `truth` only measures the result.
target, truth = samples([0, 1, 2, 4], shift=0.7)
adapted = GLCAdapter(feature_module=backbone, classifier=head, config=AdaptConfig(epochs=3)).fit(target)
found = adapted.predict(target)

known = truth < 4
right = (found.classes[known] == truth[known]).float().mean()
unknown = (found.classes[~known] == 4).float().mean()  # 4 means "unknown"
print(f"{100 * right:.0f} % of the known samples have the right class, {100 * unknown:.0f} % of the new class are called unknown")
