"""Simulated domains, trainings and costs that `moe_domains.py` compares; not a script.

All domains share the mounting height, so one encoder with one fingerprint serves them and their scenes lie in one store.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from upcycle3d.core.features import CutFeatures
from upcycle3d.core.files import write_atomically
from upcycle3d.core.frame import Frame, labels_of
from upcycle3d.core.structures import LossTerms, PointCloud
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.simulation.places import KITTI, LYFT, WAYMO, Domain
from upcycle3d.datasets.simulation.stand_in import prepared_stand_in
from upcycle3d.perception.evaluation.score import score_detector
from upcycle3d.perception.models.decoders.mixture import MixtureDecoder
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.recipes.assembly import feature_object_database, labeled_batches
from upcycle3d.perception.recipes.presets import DEMO, DEMO_PV_RCNN, Preset
from upcycle3d.perception.server.feature_object_database import FeatureObjectDatabase
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.server.trainer import upcycle
from upcycle3d.perception.training.detector_files import load_detector, save_detector
from upcycle3d.perception.training.loop import LoopConfig, run_steps
from upcycle3d.perception.training.optim import OneCycle
from upcycle3d.perception.vehicle.extractor import Extractor, extract

_SENSOR = WAYMO.sensor
DOMAINS: dict[str, Domain] = {
    "city": WAYMO,
    "town": Domain(
        name="town",
        sensor=replace(_SENSOR, name="16 of 64 beams", elevations=_SENSOR.elevations[::4]),
        place=KITTI.place,
    ),
    "fog": Domain(
        name="fog",
        sensor=replace(_SENSOR, name="in rain and fog", reach=25.0, max_range=40.0, range_noise=0.05, dropout=0.3),
        place=LYFT.place,
    ),
}
"""A clear city with dense beams; a small town with other cars and a quarter of the beams; a suburb in rain and fog that end at 40 m."""
PRESETS: dict[str, Preset] = {"second_iou": DEMO, "pv_rcnn": DEMO_PV_RCNN}
Labeled = Callable[[int], tuple[Frame, ...]]


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Numbers that decide every result of the study, besides the seed."""

    detector: str
    """Key of `PRESETS`."""
    train: int = 50
    """Labeled frames of each domain."""
    fleet: int = 50
    """Frames of each domain that the fleet smashes."""
    validation: int = 36
    """Frames of each domain to score on."""
    seed_steps: int = 220
    """Steps of the seed model, on the city alone."""
    specialist_steps: int = 64
    """Steps of each specialist."""
    mix_steps: int = 64
    """Steps of a mixture, or of its routers."""
    upcycle_steps: int = 90
    """Steps of the arms that learn from smashed scenes."""
    contrast_steps: int = 200
    """Steps of each contrastive stage, on cached features."""
    lr: float = 0.001
    """Highest learning rate of every training but the seed's."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A detector and what it cost beyond the seed model."""

    detector: Detector
    """The detector, in evaluation mode."""
    cpu: float
    """CPU seconds of this process for everything that this detector needed, without those of `parts`."""
    steps: int
    """Optimizer steps of its own training."""


class Bench:
    """The frames of one seed, and trainings whose results are kept in a folder."""

    def __init__(self, out: Path, plan: StudyPlan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.folder = out / plan.detector / f"seed{seed}"
        self.preset = PRESETS[plan.detector]
        sizes = {"train": plan.train, "fleet": plan.fleet, "val": plan.validation}
        self.roots = {
            name: prepared_stand_in(
                out / "data" / f"seed{seed}" / name, place, sizes, seed=5000 + 10 * seed + number, classes=("Car",), workers=1
            )
            for number, (name, place) in enumerate(DOMAINS.items())
        }

    def split(self, domain: str, name: str) -> DataSplit:
        """One split of one domain."""
        return DataSplit(root=self.roots[domain], name=name)

    def kept(self, name: str, make: Callable[[], tuple[Detector, int]]) -> Made:
        """Train a detector, or load it where that was done before."""
        folder = self.folder / "models" / name
        cost = folder / "cost.json"
        if not cost.exists():
            began = time.process_time()
            torch.manual_seed(self.seed)
            detector, steps = make()
            spent = {"cpu": time.process_time() - began, "steps": steps}
            save_detector(folder / "detector.safetensors", detector)
            write_atomically(cost, json.dumps(spent).encode())
        spent = json.loads(cost.read_text())
        return Made(detector=load_detector(folder / "detector.safetensors"), cpu=spent["cpu"], steps=spent["steps"])

    # ---- frames

    def labeled(self, domains: Sequence[str], batch: int = 2) -> Labeled:
        """Augmented labeled frames; with several domains, every batch takes them in turn."""
        single = []
        for domain in domains:
            data = self.split(domain, "train")
            data.ensure_gt_database()
            single.append(labeled_batches(self.preset, data, batch_size=1, seed=self.seed))

        def frames(step: int) -> tuple[Frame, ...]:
            places = range(batch * step, batch * (step + 1))
            return tuple(single[place % len(single)](place // len(single))[0] for place in places)

        return frames

    def scans(self, domains: Sequence[str], name: str = "train") -> Iterator[tuple[str, Frame]]:
        """Every frame of a split, as it is."""
        for domain in domains:
            frames = self.split(domain, name).open()
            for i in range(len(frames)):
                yield domain, frames[i]

    @torch.no_grad()
    def features(self, detector: Detector, domain: str, most: int = 30) -> list[CutFeatures]:
        """Features at the cut of some labeled frames of a domain."""
        frames = self.split(domain, "train").open()
        return [detector.encode([frames[i].points]) for i in range(min(most, len(frames)))]

    # ---- training

    def train(
        self, detector: Detector, labeled: Labeled, steps: int, *, lr: float, only: Sequence[nn.Parameter] = ()
    ) -> Detector:
        """Train the decoder on labels with a frozen encoder; `only` some parameters, then nothing else moves."""
        detector.freeze_encoder()
        for parameter in detector.decoder.parameters() if only else ():
            parameter.requires_grad_(False)
        for parameter in only:
            parameter.requires_grad_(True)
        self._run(detector, labeled, steps, lr, training_mode=not only)
        detector.decoder.requires_grad_(True)
        return detector.eval()

    def train_all(self, detector: Detector, labeled: Labeled, steps: int, *, lr: float) -> Detector:
        """Train encoder and decoder: the seed model."""
        self._run(detector, labeled, steps, lr, training_mode=True)
        return detector.eval()

    def _run(self, detector: Detector, labeled: Labeled, steps: int, lr: float, *, training_mode: bool) -> None:
        def loss(frames: tuple[Frame, ...], step: int) -> LossTerms:
            labels = labels_of(frames)
            return detector.loss(detector.decode(detector.encode([f.points for f in frames]), labels), labels)

        detector.train(training_mode)
        run_steps(
            modules={"student": detector},
            trainable=[p for p in detector.parameters() if p.requires_grad],
            batches=labeled,
            loss=loss,
            config=LoopConfig(seed=self.seed, optim=OneCycle(lr=lr, total_steps=steps), log_every=steps),
            progress=False,
        )

    # ---- the fleet

    def fleet_cost(self, detector: Detector) -> float:
        """Extract and ingest the fleet's scans and cut the objects to paste, once. Returns the CPU seconds that this took."""
        done = self.folder / "fleet.json"
        if not done.exists():
            began = time.process_time()
            extractor = Extractor(detector.encoder, self.split("city", "fleet").open().rig, "fp16")
            fleets = [self.split(domain, "fleet").open() for domain in DOMAINS]
            scans = [_sensor_scan(frames, i) for frames in fleets for i in range(len(frames))]
            shards, store = self.folder / "shards", self.folder / "store"
            for leftover in (shards, store, self.folder / "objects"):
                shutil.rmtree(leftover, ignore_errors=True)
            with extractor.shard_writer(shards) as writer:
                extract(scans, extractor, writer)
            ingest(shards, store, expected_fingerprint=extractor.fingerprint, expected_spec=extractor.spec, final=True)
            self._objects(detector)
            write_atomically(done, json.dumps({"cpu": time.process_time() - began}).encode())
        spent: float = json.loads(done.read_text())["cpu"]
        return spent

    def store(self, detector: Detector) -> SmashedStore:
        """Smashed scenes of all domains in one store."""
        self.fleet_cost(detector)
        return SmashedStore(self.folder / "store")

    def _objects(self, detector: Detector) -> FeatureObjectDatabase:
        data, config = self.split("city", "train").open(), self.preset.upcycle.f_gt
        return feature_object_database(self.folder / "objects", data, detector, config, codec="fp16")

    def upcycle(self, detector: Detector, source: Detector, steps: int) -> Detector:
        """Train on labels of the city and on smashed scenes of all domains."""
        base = self.preset.upcycle
        config = replace(
            base, loop=LoopConfig(seed=self.seed, optim=OneCycle(lr=self.plan.lr, total_steps=steps), log_every=steps)
        )
        data = self.split("city", "train")
        data.ensure_gt_database()
        upcycle(
            detector,
            method=METHODS["upcycling"],
            labeled=labeled_batches(self.preset, data, batch_size=config.labeled_batch, seed=self.seed),
            store=self.store(source),
            pasted_objects=self._objects(source),
            config=config,
            progress=False,
        )
        return detector.eval()

    # ---- scores

    def scores(self, detector: Detector, domain: str) -> dict[str, float]:
        """AP of one domain's validation frames, KITTI's protocol, moderate, R40."""
        found = score_detector(detector, self.split(domain, "val").open(), "kitti").headline()
        return {name: float(value) for name, value in found.items()}

    @torch.no_grad()
    def gate_table(self, detector: Detector) -> dict[str, list[float]]:
        """Share of each expert among 20 validation scenes of each domain, by the first choice; empty for a detector without a gate."""
        decoder = detector.decoder
        if not isinstance(decoder, MixtureDecoder):
            return {}
        shares: dict[str, list[float]] = {}
        for domain in DOMAINS:
            frames = self.split(domain, "val").open()
            chosen = [decoder.decide(detector.encode([frames[i].points])) for i in range(min(20, len(frames)))]
            first = torch.cat([routing.top1 for routing in chosen if routing is not None] or [torch.zeros(0, dtype=torch.int64)])
            shares[domain] = (torch.bincount(first, minlength=len(decoder.config.experts)) / max(1, len(first))).tolist()
        return shares


def _sensor_scan(frames: PreparedDataset, index: int) -> Callable[[], PointCloud]:
    return lambda: frames.rig.to_sensor(frames[index].points)


def purity(shares: dict[str, list[float]]) -> float:
    """Share of the scenes whose expert serves their domain more than the others: 1 for a gate that knows the domains."""
    if not shares:
        return float("nan")
    table: Tensor = torch.tensor(list(shares.values()))
    return float(table.amax(0).sum() / table.sum().clamp_min(1e-9))
