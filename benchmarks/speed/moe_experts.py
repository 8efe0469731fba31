"""What routed experts cost on a CPU, beside a dense FFN of equal active compute and beside each backend of the expert bank.

    python benchmarks/speed/moe_experts.py [--threads 2] [--repeats 15] [--json FILE]

Top-2 of 4 and 8 experts, GELU, float32. The large size is a language model's batch (8,192 tokens, width 256, 1,024 hidden units), the small
one is a detector's regions (200 tokens, width 128, 256 hidden units). The routed layer includes its router and the dispatch of tokens; the
dense FFN has twice the hidden units, as many as a token's two experts have together. Forward alone, and forward with backward. The calls
take turns, and the backends are compared within one run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch
from torch import Tensor, nn

from upcycle3d.perception.moe.layers.backends import Backend
from upcycle3d.perception.moe.layers.bank import BankShape, ExpertBank
from upcycle3d.perception.moe.layers.moe_ffn import MoeFfn, take_routings
from upcycle3d.perception.moe.layers.routers import TopKRouter
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.recipes.speed import machine, measure_in_turns
from upcycle3d.tools.console import print_table, write_json

BACKENDS: tuple[Backend, ...] = ("auto", "loop", "sorted", "grouped", "dense_all")
SIZES = {"8,192 tokens": (8192, 256, 1024), "200 tokens": (200, 128, 256)}
"""Tokens, width, hidden units."""


def routed(width: int, hidden: int, experts: int, backend: Backend) -> MoeFfn:
    """A layer with a top-2 router and a backend."""
    torch.manual_seed(0)
    shape = BankShape(experts=experts, width_in=width, width_hidden=hidden, width_out=width, activation="gelu")
    return MoeFfn(ExpertBank(shape), TopKRouter(width, experts, TopKRule(k=2, norm="renorm")), backend=backend)


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def both(layer: nn.Module, x: Tensor) -> None:
    layer(x.detach().requires_grad_()).sum().backward()
    take_routings(layer)
    layer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, record = [], {}
    for name, (tokens, width, hidden) in SIZES.items():
        x = torch.randn(tokens, width)
        dense = nn.Sequential(nn.Linear(width, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, width))
        for experts in (4, 8):
            for pass_name, run in (("forward", forward), ("forward and backward", both)):
                calls: dict[str, Callable[[], None]] = {"dense": partial(run, dense, x)}
                calls |= {b: partial(run, routed(width, hidden, experts, b), x) for b in BACKENDS}
                times = measure_in_turns(calls, arguments.repeats)
                found = {b: time.median_ms for b, time in times.items()}
                best = min(found[b] for b in BACKENDS)
                rows.append(
                    (
                        f"{name}, {experts} experts, {pass_name}",
                        *(f"{found[b]:.2f}" for b in ("dense", *BACKENDS)),
                        f"{found['auto'] / best:.2f}",
                        f"{found['auto'] / found['dense']:.2f}",
                    )
                )
                record[f"{name}, {experts} experts, {pass_name}"] = found
    header = ("what", "dense, equal active", *(f"{b}" for b in BACKENDS), "auto / best", "auto / dense")
    print_table("milliseconds, median, and ratios", header, rows)
    print(f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    write_json(arguments.json, {"ms": record, "environment": machine()})


if __name__ == "__main__":
    main()
