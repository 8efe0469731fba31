"""What routed experts cost on a CPU, beside a dense FFN of equal active compute and beside each backend of the expert bank.

    python benchmarks/speed/moe_experts.py [--threads 2] [--repeats 15] [--precision bfloat16] [--json FILE]

Top-2 of 4 and 8 experts, GELU. The large size is a language model's batch (8,192 tokens, width 256, 1,024 hidden units), the small
one is a detector's regions (200 tokens, width 128, 256 hidden units). The routed layer includes its router and the dispatch of tokens; the
dense FFN has twice the hidden units, as many as a token's two experts have together. Forward alone, and forward with backward. The calls
take turns, and the backends are compared within one run. In float32 every call gets the same tokens. In bfloat16 every call gets new ones,
and each backend others: products of 16 bits are compiled for each number of rows, and in training the router gives new numbers all the time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch
from torch import Tensor, nn

from upcycle3d.perception.moe.layers.backends import Backend
from upcycle3d.perception.moe.layers.bank import BankShape, ExpertBank
from upcycle3d.perception.moe.layers.moe_ffn import MoeFfn, take_routings
from upcycle3d.perception.moe.layers.precision import Precision, products_in
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


def tokens_of(count: int, width: int, precision: Precision, seed: int) -> Callable[[], Tensor]:
    """Give the tokens of each call: the same ones in float32, new ones in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randn(count, width, generator=draw)
    return lambda: first if precision == "float32" else torch.randn(count, width, generator=draw)


def forward(layer: nn.Module, tokens: Callable[[], Tensor], precision: Precision) -> None:
    with torch.no_grad(), products_in(precision, "cpu"):
        layer(tokens())


def both(layer: nn.Module, tokens: Callable[[], Tensor], precision: Precision) -> None:
    with products_in(precision, "cpu"):
        loss = layer(tokens().requires_grad_()).float().sum()
    loss.backward()
    take_routings(layer)
    layer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    precision: Precision = arguments.precision
    rows, record = [], {}
    for name, (tokens, width, hidden) in SIZES.items():
        dense = nn.Sequential(nn.Linear(width, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, width))
        for experts in (4, 8):
            for pass_name, run in (("forward", forward), ("forward and backward", both)):
                layers = {"dense": dense} | {b: routed(width, hidden, experts, b) for b in BACKENDS}
                calls: dict[str, Callable[[], None]] = {
                    arm: partial(run, layer, tokens_of(tokens, width, precision, seed), precision)
                    for seed, (arm, layer) in enumerate(layers.items())
                }
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
    print(f"{precision}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    write_json(arguments.json, {"ms": record, "environment": machine()})


if __name__ == "__main__":
    main()
