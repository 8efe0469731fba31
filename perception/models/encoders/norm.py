"""Batch norm that works with small batches: a scene without points, a step without regions. All heads and encoders use it."""

from __future__ import annotations

from torch import Tensor, nn


class RowBatchNorm(nn.BatchNorm1d):
    """`BatchNorm1d` of rows that may be few. Batch statistics of fewer than two rows do not exist; these use the running ones."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize rows.

        Args:
            input: (M, C) or (M, C, L); M may be 0.

        Returns:
            Normalized rows of the same shape.
        """
        if not self.training or input.numel() >= 2 * self.num_features:
            return super().forward(input)
        mean, variance = self.running_mean, self.running_var
        return nn.functional.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
