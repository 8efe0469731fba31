"""Which backends run on this machine, each compared with its reference where there is one.

Read next: `doctor.py`, which prints them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from ..core.errors import InvalidInput
from ..ops.sparse_conv import SubmanifoldConv3d, sparse_conv_reference, submanifold_rulebook
from ..ops.spconv_backend import spconv_runs_on_cuda
from ..perception.export.vehicle_package import require_compiler
from ..perception.moe.layers.bank import BankShape, ExpertBank

WRONG = "WRONG"
"""How the result of a backend begins that computes something else than its reference."""
_AGREES = 1e-4


def check_backends() -> dict[str, str]:
    """Run every backend of this machine on a small problem.

    Returns:
        What came of it, by backend.
    """
    checks = {"sparse convolution, CPU": _check_sparse_conv(torch.device("cpu"))}
    if torch.cuda.is_available():
        checks["sparse convolution, CUDA"] = _check_sparse_conv(torch.device("cuda"))
    checks["sparse convolution by spconv"] = _spconv()
    checks |= {f"experts, {name}": _check_experts(name) for name in ("sorted", "grouped")}
    checks["several processes (torch.distributed)"] = _distributed()
    checks["C++ compiler, for export aoti"] = _compiler()
    checks["onnxruntime, for export onnx"] = _onnxruntime()
    return checks


def _verdict(error: float) -> str:
    return f"agrees with its reference to {error:.1e}" if error < _AGREES else f"{WRONG} by {error:.1e}"


def _check_sparse_conv(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    sites = torch.randperm(8 * 8 * 8, generator=generator)[:100].sort().values
    coords = torch.stack([torch.zeros_like(sites), sites // 64, sites // 8 % 8, sites % 8], 1).int().to(device)
    conv = SubmanifoldConv3d(4, 8, (3, 3, 3)).to(device)
    rulebook = submanifold_rulebook(coords, (8, 8, 8), 1, (3, 3, 3))
    features = torch.randn(100, 4, generator=generator).to(device)
    return _verdict((conv(features, rulebook) - sparse_conv_reference(features, conv.weight, rulebook)).abs().max().item())


def _spconv() -> str:
    if importlib.util.find_spec("spconv") is None:
        return "not installed (extra [spconv]); it is used on CUDA only"
    return "used on CUDA" if spconv_runs_on_cuda() else "installed without CUDA, so it is not used"


def _check_experts(backend: Any) -> str:
    generator = torch.Generator().manual_seed(0)
    bank = ExpertBank(BankShape(experts=4, width_in=16, width_hidden=32, width_out=16, activation="silu")).eval()
    tokens = torch.randn(24, 16, generator=generator)
    index = torch.randint(4, (24, 1), generator=generator)
    weight = torch.ones(24, 1)
    try:
        with torch.no_grad():
            return _verdict((bank(tokens, index, weight, backend) - bank(tokens, index, weight, "loop")).abs().max().item())
    except (InvalidInput, RuntimeError, AttributeError) as error:
        return f"does not run here: {error}"


def _distributed() -> str:
    if not torch.distributed.is_available():
        return "not in this build of torch"
    parts = [
        name
        for name, there in (("gloo", torch.distributed.is_gloo_available()), ("nccl", torch.distributed.is_nccl_available()))
        if there
    ]
    return ", ".join(parts) or "no backend in this build of torch"


def _compiler() -> str:
    try:
        return require_compiler()
    except InvalidInput:
        return "none"


def _onnxruntime() -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "not installed (extra [onnx])"
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        return f"installed, but it cannot be loaded: {error}"
    return ", ".join(name.removesuffix("ExecutionProvider") for name in runtime.get_available_providers())
