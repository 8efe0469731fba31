"""Not a script: the carvings and the trained arms that `moe_readme.py` compares, all made from one dense model of one seed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from moe_readme_reading import Reader
from moe_readme_tasks import CarvingTask, Sizes
from torch import Tensor, nn

from upcycle3d.perception.moe.carving.activity import Activity, found_domains, measure_activity, nearest_domains
from upcycle3d.perception.moe.carving.alternating import AlternatingConfig, AlternatingRecord, alternate
from upcycle3d.perception.moe.carving.carved_ffn import materialize
from upcycle3d.perception.moe.carving.distillation import (
    DistillLoss,
    OverlapConfig,
    Overlaps,
    layer_distill_loss,
    measure_overlaps,
)
from upcycle3d.perception.moe.carving.masked_ffn import layers_of_sites, mask_ffns
from upcycle3d.perception.moe.carving.pre_gate import LayerRouter, PreGateConfig, embedding_start
from upcycle3d.perception.moe.carving.shared_routed import UnitPatterns, shared_and_routed, unit_patterns
from upcycle3d.perception.moe.carving.splits import pooled_units, random_units, readme_split, wrong_domain
from upcycle3d.perception.moe.carving.units import Carving
from upcycle3d.perception.moe.language.text_training import next_token_loss
from upcycle3d.perception.moe.layers.control_routers import OracleRouter
from upcycle3d.perception.moe.layers.precision import Precision, products_in
from upcycle3d.perception.moe.layers.routing import Routing
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.clusters import ClusterConfig, cluster_features

RATIOS = (0.25, 0.5, 0.75, 0.9)
RATIO = 0.5
"""Ratio of the trained arms."""
UNTRAINED = ("own", "pooled", "wrong", "random", "found", "shared_routed")
TRAINED = ("dense", "pooled", "random", "oracle", "readme", "readme_once", "context_free", "layer_wise", "pooled_seconds")
GATED = ("readme", "readme_once", "context_free")
ROUTED = (*GATED, "layer_wise")
OVERLAP = OverlapConfig(sharpness=100.0)
SHARED_ROUTED = {0.25: (1 / 8, 7, 1), 0.5: (1 / 4, 6, 2), 0.75: (3 / 8, 5, 3), 0.9: (9 / 20, 11, 9)}
"""For each ratio the share of shared units, the number of groups and how many of them serve a token: half of a token's units are shared."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """An arm after its training."""

    reader: Reader
    """How it reads."""
    carving: Carving | None
    """Its units; None for the dense model."""
    record: AlternatingRecord
    """What the training did."""
    router_parameters: int
    """Parameters of its routers."""

    def seconds(self, kind: str) -> float:
        """CPU time of all phases of a kind."""
        return sum(phase.cpu_seconds for phase in self.record.phases if phase.phase.kind == kind)


class Bench:
    """The dense model of a seed, and what is measured on it once for all arms."""

    def __init__(self, task: CarvingTask, sizes: Sizes, seed: int) -> None:
        self.task, self.sizes, self.seed = task, sizes, seed
        self.plan = plan_replacement(task.dense, experts=len(task.domains), active=1)
        self.calibration_seconds = 0.0

    # ---- calibration

    def _measured(self, rows: list[Tensor]) -> Activity:
        """The activity of every row as a domain of its own."""
        named = {f"row {number}": [row[None]] for number, row in enumerate(rows)}
        with products_in(self.task.precision, "cpu"):
            return measure_activity(self.task.dense, self.plan, named, self.task.body, least_tokens=0)

    def _rows(self) -> list[list[Tensor]]:
        """The rows of each domain that calibrate, drawn by the seed."""
        sizes, seed = self.sizes, self.seed * 31 + 11
        return [
            list(self.task.train.batch({d: 1.0}, count=sizes.calibration, length=sizes.length, seed=seed, step=number))
            for number, d in enumerate(self.task.domains)
        ]

    @cached_property
    def items(self) -> Activity:
        """The activity of each row of the calibration."""
        start = time.process_time()
        found = self._measured([row for rows in self._rows() for row in rows])
        self.calibration_seconds = time.process_time() - start
        return found

    @cached_property
    def activity(self) -> Activity:
        """The activity of each domain."""
        groups = torch.arange(len(self.task.domains)).repeat_interleave(self.sizes.calibration)
        return replace(self.items.joined(groups.tolist(), self.task.domains), least_tokens=1024)

    @cached_property
    def found(self) -> Activity:
        """The activity of as many domains, found without their names."""

        def cluster(rows: Tensor, count: int) -> Tensor:
            return cluster_features(rows, count, ClusterConfig(), seed=self.seed).assignment

        return found_domains(self.items, len(self.task.domains), cluster)[0]

    @cached_property
    def patterns(self) -> UnitPatterns:
        """In which tokens of the calibration each unit was among the most active ones."""
        rows = [torch.stack(some) for some in zip(*self._rows())]  # the domains in turn
        with products_in(self.task.precision, "cpu"):
            return unit_patterns(self.task.dense, self.plan, rows, self.task.body)

    @cached_property
    def test_clusters(self) -> tuple[Tensor, ...]:
        """The found domain of each test row. It is an oracle: it looks at the whole row."""
        of_row = nearest_domains(self._measured([row for rows in self.task.tests for row in rows]), self.found)
        return of_row.split([len(rows) for rows in self.task.tests])

    # ---- arms without training

    def carving(self, name: str, ratio: float) -> Carving:
        """The units of an arm."""
        makers: dict[str, Callable[[], Carving]] = {
            "own": lambda: readme_split(self.activity, ratio),
            "pooled": lambda: pooled_units(self.activity, ratio),
            "wrong": lambda: wrong_domain(readme_split(self.activity, ratio)),
            "random": lambda: random_units(self.activity, ratio, seed=self.seed),
            "found": lambda: readme_split(self.found, ratio),
            "shared_routed": lambda: self._shared_and_routed(ratio),
        }
        return makers[name]()

    def _shared_and_routed(self, ratio: float) -> Carving:
        shared, groups, active = SHARED_ROUTED[ratio]
        return shared_and_routed(self.patterns, shared=shared, groups=groups, active=active)

    def untrained(self, name: str, ratio: float) -> tuple[Reader, Carving]:
        """A carved model in its form to serve, with the true domain of a text as the decision."""
        if name == "overlap":
            return self._by_overlap(ratio)
        carving = self.carving(name, ratio)
        model = materialize(mask_ffns(self.task.dense, carving), fuse=name not in ("pooled", "shared_routed"))
        decides = name not in ("pooled", "shared_routed")
        return Reader(model=model.eval(), decide=oracle(carving.experts) if decides else None), carving

    def _by_overlap(self, ratio: float) -> tuple[Reader, Carving]:
        carving = self.carving("own", ratio)

        def decide(ids: Tensor, _: Tensor) -> Routing:
            return OracleRouter(carving.experts).decide(self._overlaps(self.task.dense, carving, ids).best)

        return Reader(model=mask_ffns(self.task.dense, carving).eval(), decide=decide), carving

    def _overlaps(self, teacher: nn.Module, carving: Carving, ids: Tensor) -> Overlaps:
        return measure_overlaps(teacher, carving, lambda m: self.task.body(m, ids), OVERLAP)

    # ---- trained arms

    def trained(self, name: str, training: AlternatingConfig) -> Trained:
        """Train an arm of ratio 0.5."""
        dense, experts = self.task.dense, len(self.task.domains)
        if name == "dense":
            reader, carving = Reader(model=copy.deepcopy(dense)), None
        elif name in ("pooled", "pooled_seconds"):
            reader, carving = self.untrained("pooled", RATIO)
        else:
            carving = self.carving("random" if name == "random" else "own", RATIO)
            layers = (lambda site, ffn, units: LayerRouter(site.width_in, units.experts)) if name == "layer_wise" else None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                reader = Reader(model=mask_ffns(dense, carving, layers), decide=None if layers else oracle(experts))
        if name in GATED:
            return self._gated(reader, carving, training, context=name != "context_free")
        if name == "layer_wise":
            return self._layer_wise(reader, carving, training)
        return self._run(reader, carving, [], replace(training, router_steps=0), lambda ids: ids.sum())

    def _gated(self, reader: Reader, carving: Carving, training: AlternatingConfig, *, context: bool) -> Trained:
        embedding = self.task.embedding
        sizes = PreGateConfig(vocabulary=len(embedding), experts=carving.experts, width=self.sizes.gate_width, context=context)
        gate = sizes.build(self.seed, embedding=embedding_start(embedding, sizes.width))

        def router_loss(ids: Tensor) -> Tensor:
            overlaps = self._overlaps(reader.model, carving, ids)
            return DistillLoss()(gate(ids).logits.flatten(0, 1), overlaps.targets())

        asked = replace(reader, decide=lambda ids, _: gate.decide(ids))
        return self._run(asked, carving, [gate], training, router_loss)

    def _layer_wise(self, reader: Reader, carving: Carving, training: AlternatingConfig) -> Trained:
        def router_loss(ids: Tensor) -> Tensor:
            overlaps = self._overlaps(reader.model, carving, ids)
            self.task.body(reader.model, ids)
            return layer_distill_loss(reader.model, carving, overlaps, DistillLoss())

        routers = [layer.router for layer in layers_of_sites(reader.model, carving)]
        return self._run(reader, carving, routers, training, router_loss)

    def _run(
        self,
        reader: Reader,
        carving: Carving | None,
        routers: list[nn.Module],
        training: AlternatingConfig,
        router_loss: Callable[[Tensor], Tensor],
    ) -> Trained:
        domains, sizes = self.task.domains, self.sizes
        truth = torch.arange(len(domains)).repeat_interleave(sizes.batch // len(domains))

        def batch_of(kind: str, step: int) -> Tensor:
            seed = self.seed * 31 + (17 if kind == "router" else 7)
            shares = dict.fromkeys(domains, 1.0)
            return self.task.train.batch(shares, count=sizes.batch, length=sizes.train_length, seed=seed, step=step)

        record = alternate(
            reader.model, routers, training, batch_of, router_loss, lambda ids: next_token_loss(reader.logits(ids, truth), ids)
        )
        values = sum(p.numel() for router in routers for p in router.parameters())
        return Trained(reader=reader, carving=carving, record=record, router_parameters=values)


def oracle(experts: int) -> Callable[[Tensor, Tensor], Routing]:
    """Decide by the true domain of each text, or of each token."""
    return lambda ids, truth: OracleRouter(experts).decide(truth.flatten())


def alternating(sizes: Sizes, precision: Precision, seed: int) -> AlternatingConfig:
    """The training that all arms share."""
    return AlternatingConfig(
        rounds=sizes.rounds,
        router_steps=sizes.router_steps,
        expert_steps=sizes.expert_steps,
        router_lr=sizes.router_lr,
        expert_lr=sizes.expert_lr,
        warmup=max(1, sizes.expert_steps // 5),
        precision=precision,
        seed=seed,
    )
