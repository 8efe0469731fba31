"""Do experts help a detector that serves several domains? Upcycled heads against dense detectors of equal compute, on simulated domains.

    python benchmarks/studies/moe_domains.py --out runs/moe_domains --detector second_iou --seeds 0 1 2 3 4
    python benchmarks/studies/moe_domains.py --out runs/moe_domains --detector pv_rcnn --seeds 0 1 2 3 4

Three domains with one mounting height: a clear city, a small town with other cars and a quarter of the beams, and a suburb in rain and fog.
The seed model is trained on the city. Everything after it keeps its encoder. A head has three experts in the branches of the region head
and in the second BEV block; the gate decides per scene. Arms:

    seed                 the seed model as it is
    dense_continued      the dense decoder trained on labels of all domains, for the CPU seconds that `btx` took with its specialists
    specialists_oracle   one decoder per domain; each scores on its own domain alone
    soup                 the average of the specialists
    btx                  the specialists as experts, everything else averaged, the gate at the domains; then trained on all labels
    btx_frozen           the same with a gate that is drawn at random and never trained: a control of routing
    sparse               three copies of the seed with a random gate, trained on all labels for the CPU seconds of `btx`
    dmu_contrast         (a) the seed and two sets of branches trained by contrast of regions in two views; then the gate alone
    dmu_clusters         (b) layers trained with the detection losses on groups of scenes that look alike; then the gate alone. This is not
                         contrastive, so it is no reproduction of the paper
    mixture_raw          copies with the gate at groups of the fleet's scenes, trained on labels of all domains
    mixture_upcycled     the same start, trained by UpCycling: labels of the city, smashed scenes of all domains, no raw point of the fleet
    dense_upcycled       the dense decoder by UpCycling, for the CPU seconds of `mixture_upcycled`
    source_continued     the dense decoder on labels of the city alone, for the CPU seconds of `mixture_upcycled`: what its other half
                         brings without any scene of the fleet. This arm was added after the first results

All CPU seconds beyond the seed model are counted: specialists, encoding, clustering, extraction, pasted objects, gates. Main number: the
mean over the domains of Car 3D AP at an IoU of 0.5 (moderate, R40). With so few steps the AP at 0.7 is small; it is reported too.

Expected, written before the first run. `specialists_oracle` is above `dense_continued` in its domains. `btx` is above `dense_continued` by
1 to 3 points and within 1 point of each specialist. `btx_frozen` is below `btx`. `sparse` is near `dense_continued`. `dmu_contrast` is not
above `sparse`; `dmu_clusters` lies between `sparse` and `btx`. `mixture_upcycled` is above `seed` in the town and in the fog, below
`mixture_raw`, and not below `dense_upcycled`.

Falsified if, over the seeds: the paired mean difference of `btx` and `dense_continued` is not above 0, or a domain of `btx` is more than 1
point below its specialist (experts are not worth it); `btx_frozen` is not below `btx` (routing is not what helps); `mixture_upcycled` is
below `dense_upcycled` (experts cannot be trained from smashed scenes as well as a dense head).

Results are stored one by one, and trained detectors are kept, so the command can be stopped and given again. The last lines say what
was found against these expectations. `--quick` is a run of minutes that checks the program; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch
from moe_domain_bench import DOMAINS, PRESETS, Bench, Made, StudyPlan, purity
from paired import half_width

from upcycle3d.core.config_json import Json
from upcycle3d.core.frame import Frame
from upcycle3d.datasets.batches import LabeledBatches
from upcycle3d.perception.models.decoders.mixture import HeadMixtureConfig, MixtureDecoder, region_plan
from upcycle3d.perception.models.decoders.scene_decision import SceneDescriptor
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.moe.contrastive.expert_stages import DmuConfig
from upcycle3d.perception.moe.contrastive.pair_training import PairTraining
from upcycle3d.perception.moe.detectors.calibrate import cluster_scenes, fit_gate, fit_gate_to_groups, upcycled_decoder
from upcycle3d.perception.moe.detectors.region_pairs import contrastive_specialists, region_pairs
from upcycle3d.perception.moe.detectors.upcycle import upcycle_head
from upcycle3d.perception.moe.layers.losses import RouterLossConfig
from upcycle3d.perception.moe.upcycling.clusters import ClusterConfig
from upcycle3d.perception.recipes.result_cache import ResultCache
from upcycle3d.perception.recipes.result_csv import CsvRow, publish
from upcycle3d.perception.server.store import collate_scenes
from upcycle3d.tools.console import print_table

MAIN = "Car 3D 0.5"
QUICK = {"train": 12, "fleet": 8, "validation": 8, "seed_steps": 4, "specialist_steps": 3, "mix_steps": 3, "upcycle_steps": 2}
CPU_SECONDS = {"second_iou": 930, "pv_rcnn": 1500}
"""CPU seconds of one seed. SECOND-IoU's are extrapolated from a quick run (0.27 s per dense step of two frames, 0.4 s per step of a
mixture, 0.7 s per step with smashed scenes, 0.08 s per scored frame, 0.12 s per simulated frame); PV-RCNN's from these and the ratio of
the two in other studies."""


class Arms:
    """The arms of one seed. Each method gives a detector per domain, and the CPU seconds and steps beyond the seed model."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.plan = bench, bench.plan
        self.domains = tuple(DOMAINS)
        self.head = HeadMixtureConfig(experts=self.domains, decides_per="scene", bev_blocks=(1,))
        self.frozen = replace(self.head, router="frozen", losses=RouterLossConfig(balance=0.0))
        self.seed = bench.kept("seed", self._train_seed)

    def _train_seed(self) -> tuple[Detector, int]:
        detector, steps = self.bench.preset.detector.build(), self.plan.seed_steps
        return self.bench.train_all(detector, self.bench.labeled(["city"]), steps, lr=0.003), steps

    def specialists(self) -> list[Made]:
        def make(domain: str) -> Callable[[], tuple[Detector, int]]:
            steps, labeled = self.plan.specialist_steps, self.bench.labeled([domain])
            return lambda: (self.bench.train(self._fresh(), labeled, steps, lr=self.plan.lr), steps)

        return [self.bench.kept(f"specialist_{domain}", make(domain)) for domain in self.domains]

    def _fresh(self) -> Detector:
        return self.bench.kept("seed", self._train_seed).detector

    def _train(self, detector: Detector, steps: int, *, gate_only: bool = False) -> tuple[Detector, int]:
        only = list(upcycled_decoder(detector).gate.parameters()) if gate_only else []  # type: ignore[union-attr]
        return self.bench.train(detector, self.bench.labeled(self.domains), steps, lr=self.plan.lr, only=only), steps

    def _per_domain(self, detector: Detector) -> list[list]:
        return [self.bench.features(detector, domain) for domain in self.domains]

    # ---- mixtures of specialists

    def _btx(self, head: HeadMixtureConfig) -> tuple[Detector, int]:
        made = upcycle_head([s.detector for s in self.specialists()], head, draw=self.bench.seed).detector
        features = self._per_domain(made)
        fit_gate(made, features if head.router == "top_k" else [[f for d in features for f in d]])
        return self._train(made, self.plan.mix_steps)

    def btx(self) -> tuple[Made, float]:
        parts = self.specialists()  # before, so that no training is counted twice
        made = self.bench.kept("btx", lambda: self._btx(self.head))
        return made, made.cpu + sum(part.cpu for part in parts)

    def btx_frozen(self) -> tuple[Made, float]:
        parts = self.specialists()  # before, so that no training is counted twice
        made = self.bench.kept("btx_frozen", lambda: self._btx(self.frozen))
        return made, made.cpu + sum(part.cpu for part in parts)

    def soup(self) -> tuple[Made, float]:
        parts = self.specialists()

        def make() -> tuple[Detector, int]:
            detector, states = self._fresh(), [s.detector.state_dict() for s in parts]
            mean = {n: torch.stack([s[n].double() for s in states]).mean(0).to(v.dtype) for n, v in states[0].items()}
            detector.load_state_dict(mean)
            return detector.eval(), 0

        made = self.bench.kept("soup", make)
        return made, made.cpu + sum(s.cpu for s in parts)

    # ---- equal compute

    def dense_continued(self) -> tuple[Made, float]:
        per_step = sum(s.cpu for s in self.specialists()) / sum(s.steps for s in self.specialists())
        steps = max(1, round(self.btx()[1] / per_step))
        made = self.bench.kept("dense_continued", lambda: self._train(self._fresh(), steps))
        return made, made.cpu

    def sparse(self) -> tuple[Made, float]:
        joint, total = self.btx()

        def make() -> tuple[Detector, int]:
            detector = upcycle_head([self.seed.detector] * 3, self.head, draw=self.bench.seed).detector
            fit_gate(detector, [[f for d in self._per_domain(detector) for f in d]])
            return self._train(detector, max(1, round(total / (joint.cpu / joint.steps))))

        made = self.bench.kept("sparse", make)
        return made, made.cpu

    # ---- DMU

    def dmu_contrast(self) -> tuple[Made, float]:
        def make() -> tuple[Detector, int]:
            frames = [frame for _, frame in self.bench.scans(self.domains)]
            pairs = region_pairs(self.seed.detector, frames, self.bench.preset.train.augmentation, seed=self.bench.seed)
            stage = PairTraining(steps=self.plan.contrast_steps, batch_size=64, lr=1e-3, weight_decay=0.01, warmup=20)
            clusters = ClusterConfig(image_clusters=3, text_clusters=1)
            config = DmuConfig(expert=stage, router=stage, stages=2, clusters=clusters, seed=self.bench.seed)
            parts, stages = contrastive_specialists(self.seed.detector, pairs, config)
            for each in stages:
                print(f"    contrastive stage: {each}", flush=True)
            head = replace(self.head, experts=("base", "stage1", "stage2"))
            made = upcycle_head(parts, head, rest="seed", seed=self.seed.detector, draw=self.bench.seed).detector
            fit_gate(made, [[f for d in self._per_domain(made) for f in d]])
            return self._train(made, self.plan.mix_steps, gate_only=True)

        made = self.bench.kept("dmu_contrast", make)
        return made, made.cpu

    def dmu_clusters(self) -> tuple[Made, float]:
        def make() -> tuple[Detector, int]:
            seed, bench = self.seed.detector, self.bench
            frames = [frame for _, frame in bench.scans(self.domains)]
            described = SceneDescriptor(seed.spec)
            group = cluster_scenes(torch.cat([described.raw(seed.encode([f.points]).voxels) for f in frames]), 3, seed=bench.seed)
            parts, features = [], []
            for number in range(3):
                own = [frame for frame, g in zip(frames, group.tolist(), strict=True) if g == number]
                detector = self._fresh()
                labeled = _plain_batches(bench, own)
                trained = expert_parameters(detector, self.head)
                parts.append(bench.train(detector, labeled, self.plan.specialist_steps, lr=self.plan.lr, only=trained))
                with torch.no_grad():
                    features.append([seed.encode([frame.points]) for frame in own[:30]])
            made = upcycle_head(parts, self.head, rest="seed", seed=seed, draw=bench.seed).detector
            fit_gate(made, features)
            return self._train(made, self.plan.mix_steps, gate_only=True)

        made = self.bench.kept("dmu_clusters", make)
        return made, made.cpu

    # ---- labels of all domains, or smashed scenes

    def _clustered_copies(self) -> Detector:
        """Copies of the seed whose gate begins at groups of the fleet's scenes: what a server can make without a label or a raw point."""
        seed = self.seed.detector
        store = self.bench.store(seed)
        head = replace(self.head, experts=("group0", "group1", "group2"))
        made = upcycle_head([seed] * 3, head, draw=self.bench.seed).detector
        scenes = [collate_scenes([store.readable(i)]) for i in range(len(store))]
        print(f"    groups of the fleet's scenes: {fit_gate_to_groups(made, scenes, seed=self.bench.seed)}", flush=True)
        return made

    def mixture_raw(self) -> tuple[Made, float]:
        def make() -> tuple[Detector, int]:
            steps, labeled = self.plan.upcycle_steps, self.bench.labeled(self.domains, batch=4)
            return self.bench.train(self._clustered_copies(), labeled, steps, lr=self.plan.lr), steps

        shared = self.bench.fleet_cost(self.seed.detector)
        made = self.bench.kept("mixture_raw", make)
        return made, made.cpu + shared

    def mixture_upcycled(self) -> tuple[Made, float]:
        def make() -> tuple[Detector, int]:
            steps = self.plan.upcycle_steps
            return self.bench.upcycle(self._clustered_copies(), self.seed.detector, steps), steps

        shared = self.bench.fleet_cost(self.seed.detector)
        made = self.bench.kept("mixture_upcycled", make)
        return made, made.cpu + shared

    def dense_upcycled(self) -> tuple[Made, float]:
        """The steps follow from a short dense training, so that the CPU seconds are those of the mixture."""
        mixture, few = self.mixture_upcycled()[0], max(1, self.plan.upcycle_steps // 10)
        tried = self.bench.kept("dense_trial", lambda: (self.bench.upcycle(self._fresh(), self.seed.detector, few), few))
        steps = max(1, round(mixture.cpu / (tried.cpu / tried.steps)))
        made = self.bench.kept("dense_upcycled", lambda: (self.bench.upcycle(self._fresh(), self.seed.detector, steps), steps))
        return made, made.cpu + self.bench.fleet_cost(self.seed.detector)

    def source_continued(self) -> tuple[Made, float]:
        mixture = self.mixture_upcycled()[0]
        per_step = sum(s.cpu for s in self.specialists()) / sum(s.steps for s in self.specialists())
        steps, labeled = max(1, round(mixture.cpu / per_step)), self.bench.labeled(["city"])
        made = self.bench.kept(
            "source_continued", lambda: (self.bench.train(self._fresh(), labeled, steps, lr=self.plan.lr), steps)
        )
        return made, made.cpu


def expert_parameters(detector: Detector, head: HeadMixtureConfig) -> list[torch.nn.Parameter]:
    """The parameters of a dense detector that become experts of a head."""
    plan = region_plan(detector.decoder, head)
    names = {name for site in (plan.sites if plan else ()) for name in site.tensors}
    blocks = tuple(f"bev_backbone.blocks.{block}." for block in head.bev_blocks)
    return [p for name, p in detector.decoder.named_parameters() if name in names or name.startswith(blocks)]


def _plain_batches(bench: Bench, frames: Sequence[Frame]) -> LabeledBatches:
    """Augmented batches of given frames, without pasted objects."""
    return LabeledBatches(
        frames=frames,
        batch_size=2,
        seed=bench.seed,
        augmentation=bench.preset.train.augmentation,
        keep_range=bench.preset.detector.encoder.grid.range,
    )


ARMS = (
    "seed", "dense_continued", "specialists_oracle", "soup", "btx", "btx_frozen", "sparse", "dmu_contrast", "dmu_clusters", "mixture_raw",
    "mixture_upcycled", "dense_upcycled", "source_continued",
)  # fmt: skip


def measure(arms: Arms, name: str) -> Json:
    """Train what an arm needs, and score it on every domain."""
    bench = arms.bench
    if name == "specialists_oracle":
        parts = arms.specialists()
        ap = {domain: bench.scores(part.detector, domain) for domain, part in zip(DOMAINS, parts, strict=True)}
        return {"ap": ap, "cpu": sum(p.cpu for p in parts), "steps": sum(p.steps for p in parts), "gate": {}, "parameters": 0}
    made, cpu = (arms.seed, 0.0) if name == "seed" else getattr(arms, name)()
    detector = made.detector
    gate = bench.gate_table(detector) if isinstance(detector.decoder, MixtureDecoder) else {}
    return {
        "ap": {domain: bench.scores(detector, domain) for domain in DOMAINS},
        "cpu": cpu,
        "steps": made.steps,
        "gate": gate,
        "parameters": sum(p.numel() for p in detector.decoder.parameters()),
    }


def rows_of(name: str, seed: int, result: Json) -> Iterable[CsvRow]:
    """One row of the published table for each domain."""
    for domain, scores in result["ap"].items():
        gate = {f"expert {i}": share for i, share in enumerate(result["gate"].get(domain, []))}
        yield {"arm": name, "seed": seed, "domain": domain, **scores, "cpu": result["cpu"], "steps": result["steps"], **gate}


def report(cache: ResultCache) -> None:
    """Print means, paired differences from dense training, and what was found against the expectations."""
    found: dict[str, dict[int, Json]] = {}
    for (name, seed), stored in cache.stored().items():
        found.setdefault(name, {})[seed] = stored["result"]
    found = {name: found[name] for name in ARMS if name in found}
    rows = []
    for name, results in found.items():
        cells = [_spread([r["ap"][d].get(MAIN, float("nan")) for r in results.values()]) for d in DOMAINS]
        sure = [purity(r["gate"]) for r in results.values() if r["gate"]]
        rows.append(
            (
                name,
                _spread([_mean(r) for r in results.values()]),
                *cells,
                _spread(_paired(found, name, "dense_continued")),
                f"{statistics.fmean(r['cpu'] for r in results.values()):.0f}",
                f"{statistics.fmean(sure):.2f}" if sure else "-",
            )
        )
    header = ("arm", "mean", *DOMAINS, "minus dense_continued", "CPU s", "purity")
    print_table(f"{MAIN}, seeds {sorted({s for r in found.values() for s in r})}", header, rows)
    for one, other, claim in (
        ("btx", "dense_continued", "experts are worth it at equal compute"),
        ("btx", "btx_frozen", "routing is what helps"),
        ("mixture_upcycled", "dense_upcycled", "experts learn from smashed scenes as well as a dense head"),
        ("mixture_upcycled", "source_continued", "smashed scenes help a head with experts"),
        ("dense_upcycled", "source_continued", "smashed scenes help a dense head"),
    ):
        if values := _paired(found, one, other):
            verdict = "shown" if len(values) > 1 and statistics.fmean(values) > half_width(values) else "not shown"
            fired = "; the falsifier fired" if statistics.fmean(values) <= 0 else ""
            print(f"{claim}: {one} - {other} = {_spread(values)} (95 % half width {half_width(values):.1f}): {verdict}{fired}")
    for domain in DOMAINS if "btx" in found and "specialists_oracle" in found else ():
        values = _paired(found, "btx", "specialists_oracle", domain)
        fired = "; the falsifier fired" if statistics.fmean(values) < -1 else ""
        print(f"btx in {domain} minus its specialist: {_spread(values)}{fired}")


def _mean(result: Json, domain: str | None = None) -> float:
    return statistics.fmean(result["ap"][d].get(MAIN, float("nan")) for d in (DOMAINS if domain is None else (domain,)))


def _paired(found: dict[str, dict[int, Json]], one: str, other: str, domain: str | None = None) -> list[float]:
    if one not in found or other not in found:
        return []
    return [_mean(found[one][s], domain) - _mean(found[other][s], domain) for s in found[one] if s in found[other]]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    """Run what is missing, publish the table, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--detector", choices=PRESETS, default="second_iou")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--publish", type=Path, help="folder for results.csv; by default OUT/DETECTOR/published")
    parser.add_argument("--seed-steps", type=int, default=StudyPlan.seed_steps, help="steps of the seed model")
    parser.add_argument("--specialist-steps", type=int, default=StudyPlan.specialist_steps, help="steps of each specialist")
    parser.add_argument("--mix-steps", type=int, default=StudyPlan.mix_steps, help="steps of a mixture")
    parser.add_argument("--quick", action="store_true", help="a few steps and frames, to check the program")
    options = parser.parse_args()
    steps = {name: getattr(options, name) for name in ("seed_steps", "specialist_steps", "mix_steps")}
    torch.set_num_threads(1)
    plan = StudyPlan(detector=options.detector, **(QUICK if options.quick else steps))
    print(f"about {CPU_SECONDS[options.detector] / 60:.0f} CPU minutes of one thread per seed in a full run", flush=True)
    cache = ResultCache(options.out / options.detector / "results", {"plan": asdict(plan), "domains": list(DOMAINS)})
    for seed in options.seeds:
        if all(cache.has(name, seed) for name in options.arms):
            continue
        arms = Arms(Bench(options.out, plan, seed))
        for name in options.arms:
            began = time.process_time()
            result = cache.read_or_make(name, seed, partial(measure, arms, name))
            spent = time.process_time() - began
            print(
                f"seed {seed} {name}: {MAIN} {_mean(result):.1f}, cost {result['cpu']:.0f} CPU s, {spent:.0f} s now", flush=True
            )
            publish(options.publish or options.out / options.detector / "published", cache, rows_of)
    report(cache)


if __name__ == "__main__":
    main()
