"""`upcycle3d moe simulate`: what policies, caches and fetching ahead do to a trace of requests, in simulated time.

It is the runtime that serves for real, with a clock that is moved by hand, so the same options give the same numbers on every machine.
Read next: `perception/moe/runtime/simulate.py`.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..core.errors import require
from ..perception.moe.runtime.engine import EngineConfig
from ..perception.moe.runtime.expert_memory import ExpertLayout
from ..perception.moe.runtime.recorded_decisions import read_decisions
from ..perception.moe.runtime.reports import side_by_side
from ..perception.moe.runtime.requests import Finished
from ..perception.moe.runtime.scheduling import BatchLimits
from ..perception.moe.runtime.simulate import Simulation, StepCost, simulate
from ..perception.moe.runtime.traces import TraceConfig, draw_trace
from ..perception.moe.runtime.transfers import TransferCost
from .console import console, print_warning, run_command, write_json
from .language_tables import finite
from .serving_options import CacheName, PolicyName, cache_of, policy_of, read_bytes


@dataclass(frozen=True, kw_only=True)
class MoeSimulate:
    """Serve one trace with every policy and cache that is named, and print the reports side by side."""

    budget: str = "40MB"
    """Experts that memory holds, such as 40MB."""
    expert: str = "10MB"
    """Size of one expert over all layers."""
    layers: int = 30
    """Layers whose weights are loaded apart; 1 loads experts as a whole, and the experts of a prompt must then fit into the budget."""
    policy: tuple[PolicyName, ...] = ("first_in_first_out", "expert_aware")
    """Policies to compare."""
    cache: tuple[CacheName, ...] = ("belady",)
    """Caches to compare."""
    control: bool = True
    """Also run the last policy and cache without fetching ahead."""
    tokens: int = 64
    """Tokens that a batch holds. Policies differ only where more waits than a batch holds."""
    age: int = 16
    """Batches after which a waiting work goes first."""
    foreseen: int = 1
    """Batches that are foreseen for fetching ahead and for `belady`."""
    most_requests: int = 256
    """Open requests that the queue holds; more are refused."""
    trace: TraceConfig = TraceConfig(rate=60.0)
    """The requests."""
    recorded: Path | None = None
    """File of decisions that a gate made for texts or drives; the requests are cut out of it instead of being drawn."""
    transfer: TransferCost = TransferCost()
    """Time of one transfer. Measure yours."""
    step: StepCost = StepCost()
    """Time of one step of the network. Measure yours."""
    json: Path | None = None
    """Also write the reports to this file as JSON."""


def command(config: MoeSimulate) -> None:
    """Simulate a runtime: upcycle3d moe simulate --budget 40MB --policy first_in_first_out expert_aware --cache lru belady."""
    require(bool(config.policy) and bool(config.cache), "there is nothing to simulate: give --policy and --cache a name each")
    whole = read_bytes(config.expert, "--expert")
    require(whole >= config.layers, f"--expert must have a byte for each of {config.layers} layers, found {whole}")
    layout = ExpertLayout(experts=config.trace.experts, layers=config.layers)
    limits = BatchLimits(tokens=config.tokens, age=config.age)
    arms: dict[str, Simulation] = {}
    for policy, cache in itertools.product(dict.fromkeys(config.policy), dict.fromkeys(config.cache)):
        engine = EngineConfig(policy=policy_of(policy), limits=limits, layout=layout, foreseen=config.foreseen)
        arms[f"{policy}, {cache}"] = Simulation(
            engine=engine,
            piece_bytes=whole // config.layers,
            budget=read_bytes(config.budget, "--budget"),
            eviction=cache_of(cache, config.trace.seed),
            transfer=config.transfer,
            step=config.step,
            most_requests=config.most_requests,
        )
    if config.control:
        name, last = list(arms.items())[-1]
        arms[f"{name}, nothing ahead"] = replace(last, fetch_ahead=False)
    trace = draw_trace(config.trace, None if config.recorded is None else read_decisions(config.recorded))
    ends: list[Finished] = []
    reports = {name: simulate(trace, arm, ended=ends.append) for name, arm in arms.items()}
    console.print(side_by_side(reports), soft_wrap=True)
    if lost := [end for end in ends if end.status == "failed"]:
        print_warning(f"{len(lost)} requests failed in all arms together, first: {lost[0].error}")
    write_json(config.json, finite({name: asdict(report) for name, report in reports.items()}))


if __name__ == "__main__":
    sys.exit(run_command(command))
