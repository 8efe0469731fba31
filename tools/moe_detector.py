"""`upcycle3d moe detector`: make one detector with an upcycled head of detectors that were specialized on different domains.

Read next: `perception/recipes/upcycle_head.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.errors import InvalidInput, require
from ..perception.models.decoders.mixture import DecidesPer, HeadMixtureConfig, HeadRouter, RegionMixtures
from ..perception.models.decoders.scene_blocks import BatchNormOfExperts
from ..perception.moe.detectors.calibrate import upcycled_decoder
from ..perception.moe.layers.losses import RouterLossConfig, describe_router_losses
from ..perception.moe.layers.routing import Norm
from ..perception.recipes.fleet_stores import rigs_of_options
from ..perception.recipes.upcycle_head import make_upcycled_head
from ..perception.training.detector_files import load_detector
from .console import console, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class MoeDetector:
    """Make a detector with an upcycled head: layers of the specialists become experts, and their common encoder stays as it is."""

    specialists: tuple[Path, ...]
    """Run folder of one detector per domain, fine-tuned from one detector with a frozen encoder (`upcycle --method source_continued`). A
    single one with `--copies` is copied into every expert: sparse upcycling."""
    out: Path
    """Run folder to write."""
    head: Literal["roi", "bev", "both"] = "roi"
    """What becomes a mixture: the branches of the region head (`roi`), blocks of the BEV backbone (`bev`), or both."""
    names: tuple[str, ...] = ()
    """Names of the experts; by default those of the folders."""
    copies: int | None = None
    """Number of experts, where one detector is copied."""
    wide: bool = False
    """Also replace the very wide first layers of the region head. Their experts outweigh the rest of the head."""
    bev_blocks: tuple[int, ...] = (1,)
    """Blocks of the BEV backbone that become mixtures, with `--head bev` or `both`."""
    router: HeadRouter = "top_k"
    """`top_k` and `soft` are learned; `frozen` and `uniform` are controls."""
    decides_per: DecidesPer = "scene"
    """Whether a `scene` or each `region` chooses its experts. BEV blocks always decide per scene."""
    k: int = 2
    """Experts per scene or region."""
    norm: Norm = "renorm"
    """Whether the weights of the chosen experts are divided by their sum."""
    batch_norm: BatchNormOfExperts = "fold"
    """`fold` joins each specialist's batch norms with its weights; `share` keeps one for all experts, which learns on."""
    balance: float = 0.01
    """Coefficient of the balance loss."""
    z: float = 0.0
    """Coefficient of the z loss."""
    rest: Literal["average", "seed"] = "average"
    """Where all other layers of the decoder come from: the mean of the specialists, or the `seed`."""
    seed_detector: Path | None = None
    """Run folder of the detector that the specialists started from, for `--rest seed`."""
    stores: tuple[Path, ...] = ()
    """Stores of smashed scenes, one per specialist: the gate begins by sending their scenes to that specialist's expert. One store of all
    domains only scales the description of scenes."""
    z_shift: tuple[float, ...] = ()
    """Z shift of the fleets, where `extract` got another one than the detector's training data: one value for all stores, or one per store
    in the order of `--stores`."""
    intensity_scale: tuple[float, ...] = ()
    """Intensity scale of the fleets, likewise: one value, or one per store."""
    group_scenes: bool = False
    """With one store of all domains: the gate begins with groups of scenes that look alike, one for each expert. No domain needs a name."""
    recalibrate: bool = False
    """Measure the batch norms of the decoder again on scenes of the stores."""
    draw: int = 0
    """Number that the rows of the routers depend on."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def _require_effect(config: MoeDetector) -> None:
    """Refuse options that would change nothing: whoever gives one believes that it does."""
    learns, chooses = config.router in ("top_k", "soft"), config.router in ("top_k", "frozen")
    per_scene = config.head != "roi" or config.decides_per == "scene"
    for option, given, used, where in (
        ("--wide", config.wide, config.head != "bev", "--head roi or both"),
        ("--bev-blocks", config.bev_blocks != (1,), config.head != "roi", "--head bev or both"),
        ("--decides-per region", config.decides_per == "region", config.head != "bev", "--head roi or both"),
        ("--k", config.k != 2, chooses, "--router top_k or frozen"),
        ("--norm", config.norm != "renorm", chooses, "--router top_k or frozen"),
        ("--balance", config.balance not in (0.0, 0.01), learns, "--router top_k or soft"),
        ("--z", bool(config.z), learns, "--router top_k or soft"),
        ("--seed-detector", config.seed_detector is not None, config.rest == "seed", "--rest seed"),
        ("--stores", bool(config.stores), per_scene or config.recalibrate, "a gate per scene or --recalibrate"),
        ("--z-shift", bool(config.z_shift), bool(config.stores), "--stores"),
        ("--intensity-scale", bool(config.intensity_scale), bool(config.stores), "--stores"),
        ("--group-scenes", config.group_scenes, per_scene and learns, "a learned gate per scene"),
    ):
        require(used or not given, f"{option} changes nothing here: it belongs to {where}; leave it out, or change that")
    require(config.copies is None or config.copies >= 1, f"--copies must be 1 or more, found {config.copies}")


def head_of(config: MoeDetector) -> HeadMixtureConfig:
    """Read the structure of the head from the options.

    Args:
        config: The options.

    Returns:
        The structure.

    Raises:
        InvalidInput: The numbers of names, copies and specialists do not fit, or an option would change nothing.
    """
    _require_effect(config)
    given = len(config.specialists)
    if config.copies is not None and given != 1:
        raise InvalidInput(f"--copies copies one detector, and {given} were given; leave it out to take one expert of each")
    number = config.copies or given
    names = config.names or (
        tuple(path.name for path in config.specialists) if config.copies is None else tuple(f"copy{i}" for i in range(number))
    )
    if len(names) != number:
        raise InvalidInput(f"there are {number} experts, and {len(names)} names were given (--names)")
    if len(set(names)) != len(names):
        raise InvalidInput(f"two experts have one name ({', '.join(names)}); give other names with --names")
    learns = config.router in ("top_k", "soft")
    regions: RegionMixtures = "none" if config.head == "bev" else "all" if config.wide else "branches"
    return HeadMixtureConfig(
        experts=names,
        regions=regions,
        bev_blocks=() if config.head == "roi" else config.bev_blocks,
        decides_per=config.decides_per,
        router=config.router,
        k=min(config.k, number) if number == 1 else config.k,
        norm=config.norm,
        batch_norm=config.batch_norm,
        losses=RouterLossConfig(balance=config.balance if learns else 0.0, z=config.z if learns else 0.0),
    )


def command(config: MoeDetector) -> None:
    """Make a detector with an upcycled head of specialists."""
    head = head_of(config)
    given = bool(config.z_shift or config.intensity_scale)
    trained = load_detector(config.seed_detector or config.specialists[0]).trained_on if given else None
    made = make_upcycled_head(
        config.specialists,
        config.out,
        head,
        rest=config.rest,
        seed_detector=config.seed_detector,
        stores=config.stores,
        rig=rigs_of_options(config.z_shift, config.intensity_scale, config.stores, trained),
        group_scenes=config.group_scenes,
        recalibrate=config.recalibrate,
        draw=config.draw,
    )
    before, after = made.parameters
    routers = upcycled_decoder(made.detector).routers()
    rows = [
        ("head", str(head)),
        ("decoder", f"{before:,} -> {after:,} parameters"),
        ("replaced layers, for one region or scene", f"{made.active[0]:,} -> {made.active[1]:,} parameters"),
        ("router losses in training", describe_router_losses(head.losses, [head.router in ("top_k", "soft")] * len(routers))),
        ("tensors", "; ".join(line.strip() for line in str(made.account).splitlines())),
    ]
    print_table("upcycled head", ("what", "value"), rows)
    console.print(
        f"detector: {config.out}. Its encoder is that of the specialists, so scenes that the fleet sent stay valid. Train it next: "
        f"upcycle3d upcycle PRESET --detector {config.out} --data DIR:train --store STORE --out RUN",
        soft_wrap=True,
    )
    write_json(config.json, dict(rows))


if __name__ == "__main__":
    sys.exit(run_command(command))
