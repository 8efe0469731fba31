"""One decision per scene, shared by all mixtures of a head: what the scene looks like, which experts serve it, and whose regions are whose.

The description is computed from the features at the cut alone. So a vehicle and a server, which has nothing but a smashed scene, decide
alike, and before the network runs. Read next: `mixture.py`, which makes the decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.cut import CutSpec
from ....core.errors import InvalidInput, require
from ....core.features import SparseVoxels
from ....core.tensor_value import shape_of
from ...moe.layers.routers import Router
from ...moe.layers.routing import Routing, TokenPlaces

RANGE_BANDS = (10.0, 20.0, 30.0, 40.0)
"""Distances from the sensor, in meters, between the bands whose shares of the cells describe a scene."""
FARTHEST = 5.0
"""Largest absolute value of a description, in standard deviations: a scene unlike all others must not decide by its size."""


class SceneDescriptor(nn.Module):
    """Describes each scene of a batch by numbers that tell sensors, places and weather apart.

    They are the number of cells, their shares in bands of distance and at each height, and the mean and the root mean square of each channel.
    `fit` scales them to zero mean and unit variance; the scale is stored with the weights.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, spec: CutSpec) -> None:
        """Describe scenes of one cut.

        Args:
            spec: The cut.
        """
        super().__init__()
        self.spec = spec
        self.width = 1 + len(RANGE_BANDS) + 1 + spec.shape[0] + 2 * spec.channels
        self.register_buffer("center", torch.zeros(self.width))
        self.register_buffer("spread", torch.ones(self.width))

    def raw(self, voxels: SparseVoxels) -> Tensor:
        """Describe scenes without scaling.

        Args:
            voxels: Features at the cut.

        Returns:
            (S, width) float32, without gradient.
        """
        with torch.no_grad(), torch.autocast(voxels.features.device.type, enabled=False):
            scene, features = voxels.coords[:, 0].long(), voxels.features.float()
            cells = torch.bincount(scene, minlength=voxels.batch_size).to(features.dtype)[:, None]
            (x0, y0), (dx, dy) = self.spec.grid.range[:2], self.spec.cell_size()
            x = x0 + (voxels.coords[:, 3].to(features.dtype) + 0.5) * dx
            y = y0 + (voxels.coords[:, 2].to(features.dtype) + 0.5) * dy
            band = torch.bucketize(torch.hypot(x, y), features.new_tensor(RANGE_BANDS))
            columns = [
                F.one_hot(band, len(RANGE_BANDS) + 1).to(features.dtype),
                F.one_hot(voxels.coords[:, 1].long(), self.spec.shape[0]).to(features.dtype),
                features,
                features.square(),
            ]
            sums = features.new_zeros(voxels.batch_size, self.width - 1).index_add(0, scene, torch.cat(columns, 1))
            means = sums / cells.clamp_min(1)
            shares, mean, square = means.split([means.shape[1] - 2 * features.shape[1], *[features.shape[1]] * 2], 1)
            return torch.cat([torch.log1p(cells) / 8, shares, mean, square.sqrt()], 1)

    @torch.no_grad()
    def fit(self, described: Tensor) -> None:
        """Scale descriptions to zero mean and unit variance over some scenes.

        Args:
            described: (N, width) what `raw` returned for scenes of all domains.

        Raises:
            InvalidInput: There are fewer than two scenes, or the width is another one.
        """
        require(
            described.ndim == 2 and len(described) > 1 and described.shape[1] == self.width,
            f"a description of scenes is fitted to (N, {self.width}) values of two scenes or more, found {shape_of(described)}",
        )
        self.center.copy_(described.mean(0))
        self.spread.copy_(described.std(0).clamp_min(1e-3))

    def forward(self, voxels: SparseVoxels) -> Tensor:
        """Describe scenes.

        Args:
            voxels: Features at the cut.

        Returns:
            (S, width) float32, without gradient, within `FARTHEST`.
        """
        return self.scaled(self.raw(voxels))

    def scaled(self, described: Tensor) -> Tensor:
        """Scale descriptions as `fit` found.

        Args:
            described: (S, width) what `raw` returned.

        Returns:
            (S, width), within `FARTHEST`.
        """
        return ((described - self.center) / self.spread).clamp(-FARTHEST, FARTHEST)


class SceneDecision:
    """Holds the decision for the scenes of the batch that is being computed, and nothing outside of a forward pass."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.scene_of_region: Tensor | None = None

    @contextmanager
    def given(self, routing: Routing | None) -> Iterator[None]:
        """Hold a decision inside a `with` block.

        Args:
            routing: The decision for the S scenes; None where nothing is decided per scene.

        Yields:
            Nothing.
        """
        self.routing = routing
        try:
            yield
        finally:
            self.routing = self.scene_of_region = None

    def note_regions(self, valid: Tensor) -> None:
        """Remember which scene each region belongs to.

        Args:
            valid: (S, R) bool; the region head gets the valid ones, scene by scene.
        """
        self.scene_of_region = valid.nonzero()[:, 0]


class SceneRouter(Router):
    """Gives a mixture the decision of the whole scene: for each scene of a BEV block, or for each region of a region head."""

    def __init__(self, num_experts: int, shared: SceneDecision, tokens: Literal["scenes", "regions"]) -> None:
        """Make the router.

        Args:
            num_experts: Number of experts.
            shared: Where the decision is held during a forward pass.
            tokens: What the mixture's tokens are.
        """
        super().__init__()
        self.num_experts, self.shared, self.tokens = num_experts, shared, tokens

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Spread the decision over the tokens.

        Args:
            x: (T, D) tokens, one per scene or per region.
            places: Not used.

        Returns:
            The decision for the T tokens.

        Raises:
            InvalidInput: Nothing was decided, or for another number of scenes or regions.
        """
        routing, regions = self.shared.routing, self.shared.scene_of_region
        if routing is None or (self.tokens == "regions" and regions is None):
            raise InvalidInput(
                "this head decides once per scene, and its mixtures run only inside the forward pass of its decoder"
            )
        if self.tokens == "regions" and regions is not None:
            routing = routing.rows(regions)
        if len(routing.probs) != len(x):
            raise InvalidInput(f"the decision is for {len(routing.probs)} {self.tokens}, and the layer got {len(x)}")
        return routing
