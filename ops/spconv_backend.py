"""Sparse convolution on CUDA with spconv's kernels, driven by our rulebook.

spconv's native algorithm takes the pairs as a table, so our rulebook enters as it is and rows keep our order: no spconv tensor, no
second search for neighbors. It needs the extra `[spconv]`; the weight has the same layout in both.

What has been run: forward and gradients on the CPU with spconv 2.3.8's CPU wheel in a process with `OMP_NUM_THREADS=1`, against
`sparse_conv` (tests). **Nothing here has been run on a GPU.** On the CPU it is a check, not a backend: with several threads
spconv's CPU code gives wrong sums, and its backward pass needs a stub for the CUDA stream that it asks for.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from .rulebook import Rulebook


@functools.cache
def spconv_runs_on_cuda() -> bool:
    """Whether spconv is installed and built with CUDA (its CPU wheel has the same name)."""
    if importlib.util.find_spec("spconv") is None:
        return False
    from spconv.cppconstants import CPU_ONLY_BUILD

    return not CPU_ONLY_BUILD


def sparse_conv_spconv(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    """Compute `sparse_conv` by spconv's native algorithm.

    Args:
        features: (num_in, in) rows, float32 or float16.
        weight: (out, kz, ky, kx, in), same type and device.
        rulebook: The pairs, on the same device.

    Returns:
        (num_out, out) rows.

    Raises:
        ImportError: spconv is not installed.
    """
    try:
        from spconv.pytorch import ConvAlgo
        from spconv.pytorch.functional import indice_conv
    except ImportError as error:
        raise ImportError("sparse_conv_spconv needs spconv: install the extra upcycle3d[spconv]") from error
    if rulebook.starts[-1] == 0:  # spconv refuses empty input; the sum keeps the graph connected
        return features.new_zeros(rulebook.num_out, weight.shape[0]) + 0 * (features.sum() + weight.sum())
    pairs, counts = _pair_table(rulebook)
    return indice_conv(features.contiguous(), weight.contiguous(), pairs, counts, rulebook.num_out, ConvAlgo.Native)


def _pair_table(rulebook: Rulebook) -> tuple[Tensor, Tensor]:
    """spconv's form of the pairs: (2, K, longest) int32 input and output rows of each offset padded with -1, and (K,) int32 counts."""
    device = rulebook.pairs_in.device
    starts = torch.tensor(rulebook.starts, device=device)
    counts = starts.diff()
    offset = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    place = torch.arange(len(offset), device=device) - starts[offset]
    table = torch.full((2, len(counts), int(counts.max())), -1, dtype=torch.int32, device=device)
    table[0, offset, place], table[1, offset, place] = rulebook.pairs_in, rulebook.pairs_out
    return table, counts.int()
