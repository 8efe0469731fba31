"""Batch norm that lives with small batches: a scene without points, a step without regions."""

from __future__ import annotations

from torch import Tensor, nn


class RowBatchNorm(nn.BatchNorm1d):
    """``BatchNorm1d`` of rows (M, C) or (M, C, L). Batch statistics of fewer than two rows do not exist; these use the running ones."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.numel() >= 2 * self.num_features:
            return super().forward(input)
        mean, variance = self.running_mean, self.running_var
        return nn.functional.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
