"""`upcycle3d moe dmu`: upcycle a Hugging Face CLIP to a mixture of experts by diversified multiplet upcycling.

Read next: `perception/moe/contrastive/dmu.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ..core.device import find_device
from ..core.errors import require
from ..perception.moe.contrastive.dmu import dmu, plan_dmu
from ..perception.moe.contrastive.expert_stages import DmuConfig, SmallClusters
from ..perception.moe.contrastive.hugging_face_clip import load_clip, save_clip_mixture
from ..perception.moe.contrastive.pair_training import PairTraining, Recall, encode_pairs, recall
from ..perception.moe.contrastive.pairs import PairData, PairTowers
from ..perception.moe.layers.losses import RouterLossConfig
from ..perception.moe.layers.precision import Precision
from ..perception.moe.layers.routing import TopKRule
from ..perception.moe.upcycling.clusters import ClusterConfig
from .console import console, print_table, print_warning, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class MoeDmu:
    """Upcycle a CLIP: train experts that tell apart what the base cannot, join them, and train only their routers. Resumable."""

    clip: tyro.conf.Positional[Path]
    """Folder of a Hugging Face CLIP. Nothing is downloaded."""
    captions: Path
    """CSV file with the columns `image` and `caption`."""
    out: Path
    """Folder of the job: finished stages, `mixture.safetensors` and `report.json`. Give the same command again to go on."""
    images: Path | None = None
    """Folder of the images; by default that of the CSV file."""
    validation: Path | None = None
    """CSV file of pairs that are not trained on, to measure recall before and after."""
    stages: int = 3
    """Number of contrastive stages; the mixture has one expert more."""
    steps: int | None = None
    """Steps per stage; by default one pass over the captions."""
    router_steps: int | None = None
    """Steps of the routers; by default one pass."""
    batch_size: int = 256
    """Pairs per step. CLIP-MoE uses 800."""
    lr: float = 1e-5
    """Learning rate of the stages."""
    router_lr: float = 1e-4
    """Learning rate of the routers. CLIP-MoE uses 1e-6, with which they hardly move."""
    k: int = 2
    """Experts per token."""
    balance: float = 0.01
    """Coefficient of the balance loss, which is 1 for a uniform router."""
    image_clusters: int = 3
    """Clusters of the images per stage."""
    text_clusters: int = 3
    """Clusters of the captions per stage."""
    small_clusters: SmallClusters = "merge"
    """What happens to clusters that do not fill a batch."""
    ordinary_batches: bool = False
    """Draw the batches of the stages from all pairs. It is the control to compare with: without it you do not know what clusters bring."""
    only: tuple[str, ...] = ()
    """Names or patterns of the FFNs to replace, such as `clip.vision_model.*`; all by default."""
    precision: Precision = "float32"
    """Type of the matrix products."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    seed: int = 0
    """Decides clusters, batches and the first routers."""
    plan_only: bool = False
    """Print what would be replaced and what it costs, and stop. No pair is read."""
    json: Path | None = None
    """Also write the report to this file as JSON."""


def command(config: MoeDmu) -> None:
    """Upcycle a CLIP: upcycle3d moe dmu CLIP --captions CSV --out DIR."""
    loaded = load_clip(config.clip)
    towers = loaded.towers.to(find_device(config.device))
    if config.plan_only:  # the plan depends on the model alone, so any number of pairs will do
        console.print(str(plan_dmu(towers, _settings(config, config.batch_size))))
        return
    data = loaded.pairs(config.captions, config.images)
    settings = _settings(config, len(data))
    console.print(str(plan_dmu(towers, settings)))
    held_out = None if config.validation is None else loaded.pairs(config.validation, config.images)
    before = None if held_out is None else _recall(towers, held_out, config)
    result = dmu(towers, data, settings, folder=config.out, say=console.print)
    mixture = result.upcycled.model
    assert isinstance(mixture, PairTowers)
    after = None if held_out is None else _recall(mixture, held_out, config)
    note = f"diversified multiplet upcycling, {settings.stages} stages, balance {config.balance:g}; {after or 'recall was not measured'}"
    said = save_clip_mixture(config.out / "mixture.safetensors", result.upcycled, note=note)
    rows = [(f"stage {n}", stage.report.last, stage.report.cpu_seconds) for n, stage in enumerate(result.stages, 1)]
    rows.append(("routers", result.router.last, result.router.cpu_seconds))
    print_table("upcycled", ("part", "last loss", "CPU seconds"), [(a, f"{b:.3f}", f"{c:.0f}") for a, b, c in rows])
    for name, found in (("before", before), ("after", after)):
        if found is not None:
            console.print(f"{name}: {found}")
    if before is not None and after is not None and after.image_to_text[1] < before.image_to_text[1]:
        print_warning(
            "the mixture finds fewer captions than the base; try more steps, another learning rate, or --ordinary-batches"
        )
    console.print(str(said))
    console.print(f"written to {config.out / 'mixture.safetensors'}")
    report = {
        "parts": [{"part": a, "last loss": b, "cpu_seconds": c} for a, b, c in rows],
        "cpu_seconds": result.cpu_seconds,
        "recall": {name: _plain(found) for name, found in (("before", before), ("after", after)) if found is not None},
        "experts": said.plan.experts,
        "active": said.plan.active,
        "parameters": {"before": said.plan.model_parameters, "after": said.plan.parameters_after},
    }
    write_json(config.out / "report.json", report)
    write_json(config.json, report)


def _settings(config: MoeDmu, pairs: int) -> DmuConfig:
    require(config.batch_size >= 2, f"--batch-size must be 2 or more, found {config.batch_size}: a pair alone has no negatives")
    require(
        pairs >= config.batch_size,
        f"{config.captions} has {pairs} pairs, fewer than one batch of {config.batch_size}; lower --batch-size or add pairs",
    )
    one_pass = pairs // config.batch_size
    stage = PairTraining(
        steps=one_pass if config.steps is None else config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        precision=config.precision,
    )
    router = PairTraining(
        steps=one_pass if config.router_steps is None else config.router_steps,
        batch_size=config.batch_size,
        lr=config.router_lr,
        weight_decay=0.01,
        precision=config.precision,
    )
    return DmuConfig(
        expert=stage,
        router=router,
        stages=config.stages,
        clusters=ClusterConfig(image_clusters=config.image_clusters, text_clusters=config.text_clusters),
        pure_batches=not config.ordinary_batches,
        small_clusters=config.small_clusters,
        rule=TopKRule(k=config.k, norm="renorm"),
        router_loss=RouterLossConfig(balance=config.balance),
        only=config.only or None,
        seed=config.seed,
    )


def _recall(towers: PairTowers, data: PairData, config: MoeDmu) -> Recall:
    with torch.no_grad():
        return recall(encode_pairs(towers, data, precision=config.precision), data.caption, (1, 5))


def _plain(found: Recall) -> dict[str, dict[str, float]]:
    return {
        "image_to_text": {f"R@{k}": share for k, share in found.image_to_text.items()},
        "text_to_image": {f"R@{k}": share for k, share in found.text_to_image.items()},
    }


if __name__ == "__main__":
    sys.exit(run_command(command))
