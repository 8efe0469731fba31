"""`upcycle3d moe detector`: make one detector with an upcycled head of detectors that were specialized on different domains.

Read next: `perception/recipes/upcycle_head.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..core.errors import InvalidInput, require
from ..core.foreign_text import shown
from ..perception.models.decoders.mixture import DecidesPer, HeadMixtureConfig, RegionMixtures
from ..perception.models.decoders.scene_blocks import BatchNormOfExperts
from ..perception.moe.detectors.head_cost import PartCost
from ..perception.moe.layers.losses import RouterLossConfig
from ..perception.moe.layers.routing import Norm
from ..perception.recipes.fleet_stores import rigs_of_options
from ..perception.recipes.gate_start import StoreStart
from ..perception.recipes.upcycle_head import HeadRun, make_upcycled_head
from ..perception.training.detector_files import load_detector
from .console import console, print_table, print_warning, run_command, warnings_so_far, write_json
from .expert_use import all_compute

CommandRouter = Literal["top_k", "soft", "frozen", "uniform"]
"""Routers of `HeadRouter` with which every command can run the detector. An oracle must be given the domain of each scene, in Python."""


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
    router: CommandRouter | None = None
    """`top_k` chooses experts and `soft` weighs all of them; both are learned. `frozen` and `uniform` are controls. By default `top_k`, and
    `soft` with two experts, because two of two is no choice. (docs/moe.md has the costs.)"""
    decides_per: DecidesPer = "scene"
    """Whether a `scene` or each `region` chooses its experts. BEV blocks always decide per scene."""
    k: int | None = None
    """Experts per scene or region of `top_k` and `frozen`, by default 2. 1 costs as much as the dense detector, but needs `--norm none`."""
    norm: Norm = "renorm"
    """Whether the weights of the chosen experts are divided by their sum. With `none` and `--k 1`, an output is multiplied by the gate's
    probability, so the detector starts with a wrong scale and must be trained."""
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
    """Stores of smashed scenes, one per specialist and in the order of `--specialists`: the gate begins by sending their scenes to that
    specialist's expert. One store of all domains only scales the description of scenes."""
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


def _require_effect(config: MoeDetector, router: CommandRouter) -> None:
    """Refuse options that would change nothing: whoever gives one believes that it does."""
    learns, chooses = router in ("top_k", "soft"), router in ("top_k", "frozen")
    per_scene = config.head != "roi" or config.decides_per == "scene"
    for option, given, used, where in (
        ("--wide", config.wide, config.head != "bev", "--head roi or both"),
        ("--bev-blocks", config.bev_blocks != (1,), config.head != "roi", "--head bev or both"),
        ("--decides-per region", config.decides_per == "region", config.head != "bev", "--head roi or both"),
        ("--k", config.k is not None, chooses, "--router top_k or frozen"),
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


def _names(config: MoeDetector) -> tuple[str, ...]:
    """Names of the experts."""
    given = len(config.specialists)
    if config.copies is not None and given != 1:
        raise InvalidInput(f"--copies copies one detector, and {given} were given; leave it out to take one expert of each")
    if given == 1 and (config.copies or 1) < 2:
        raise InvalidInput(
            f"one detector makes one expert, which is that detector again; give one specialist per domain, or --copies N (2 or more) for a head "
            f"of N copies of {config.specialists[0]} that training makes different"
        )
    number = config.copies or given
    copied = tuple(f"copy{i}" for i in range(number))
    names = config.names or (tuple(path.name for path in config.specialists) if config.copies is None else copied)
    if len(names) != number:
        raise InvalidInput(f"there are {number} experts, and {len(names)} names were given (--names)")
    if len(set(names)) != len(names):
        raise InvalidInput(f"two experts have one name ({', '.join(names)}); give other names with --names")
    return names


def _chosen_router(config: MoeDetector, number: int) -> CommandRouter:
    """The router: as given, or one whose weights can learn with this number of experts."""
    router = config.router or ("soft" if number == 2 and config.k is None and config.norm == "renorm" else "top_k")
    k = 2 if config.k is None else config.k
    if router == "top_k" and k == number:
        raise InvalidInput(
            f"the top {k} of {number} experts is no choice: all of them compute, and the balance loss has no effect, because every expert has "
            "the same share of the choices. Take --router soft (without --k), which weighs all experts in the same way and balances the "
            "weights, or --k 1 --norm none, which computes one expert and starts with a wrong scale"
        )
    if router == "top_k" and k == 1 and config.norm == "renorm":
        raise InvalidInput(
            "--k 1 with --norm renorm gives the one expert the weight 1 whatever the router computes, so the detection losses never train the "
            f"router; add --norm none (the detector then starts with a wrong scale), or take "
            f"{'--router soft without --k' if number == 2 else '--k 2'}"
        )
    return router


def head_of(config: MoeDetector) -> HeadMixtureConfig:
    """Read the structure of the head from the options.

    Args:
        config: The options.

    Returns:
        The structure.

    Raises:
        InvalidInput: The numbers of names, copies and specialists do not fit, nothing would be chosen, or an option would change nothing.
    """
    names = _names(config)
    router = _chosen_router(config, len(names))
    _require_effect(config, router)
    learns = router in ("top_k", "soft")
    regions: RegionMixtures = "none" if config.head == "bev" else "all" if config.wide else "branches"
    return HeadMixtureConfig(
        experts=names,
        regions=regions,
        bev_blocks=() if config.head == "roi" else config.bev_blocks,
        decides_per=config.decides_per,
        router=router,
        k=2 if config.k is None else config.k,
        norm=config.norm,
        batch_norm=config.batch_norm,
        losses=RouterLossConfig(balance=config.balance if learns else 0.0, z=config.z if learns else 0.0),
    )


def command(config: MoeDetector) -> None:
    """Make a detector with an upcycled head of specialists."""
    head = head_of(config)
    given = bool(config.z_shift or config.intensity_scale)
    trained = load_detector(config.seed_detector or config.specialists[0]).trained_on if given else None
    run = make_upcycled_head(
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
    losses = router_losses_in_words(head)
    _print(run, head, losses)
    console.print(
        f"detector: {config.out}. Its encoder is that of the specialists, so scenes that the fleet sent stay valid. Train it next: "
        f"upcycle3d upcycle PRESET --detector {config.out} --data DIR:train --store {' '.join(map(str, config.stores)) or 'STORE'} --out RUN",
        soft_wrap=True,
    )
    report = {
        "head": str(head),
        "decoder parameters": list(run.made.parameters),
        "parts": [asdict(part) for part in run.made.costs],
        "stores": [_start_json(start, head) for start in run.starts],
        "router losses": losses,
        "tensors": str(run.made.account).splitlines(),
        "warnings": warnings_so_far(),
    }
    write_json(config.json, report)


def _print(run: HeadRun, head: HeadMixtureConfig, losses: str) -> None:
    console.print(f"upcycled head: {head}", soft_wrap=True)
    print_cost(run.made.costs)
    if head.batch_norm == "fold":
        console.print(
            "an expert has fewer parameters than the layers that it replaces, because their batch norms are folded into its weights",
            soft_wrap=True,
        )
    if every := all_compute(head):
        console.print(every, soft_wrap=True)
    console.print(losses, soft_wrap=True)
    console.print(f"tensors: {'; '.join(line.strip() for line in str(run.made.account).splitlines())}", soft_wrap=True)
    if run.starts:
        rows = [
            (
                shown(str(start.store)),
                start.given_for or "-",
                start.use.scenes,
                *(f"{share:.0%} ({weight:.2f})" for share, weight in zip(start.use.largest, start.use.weights)),
            )
            for start in run.starts
        ]
        title = "where the gate begins: share of the scenes in which an expert has the largest weight (its mean weight)"
        print_table(title, ("store", "given for", "scenes", *head.experts), rows)
    for note in run.notes:
        print_warning(note)


def print_cost(parts: Sequence[PartCost]) -> None:
    """Print what an upcycled decoder costs, one row per part.

    Args:
        parts: The parts.
    """
    rows = [
        (
            part.part,
            _change(part.parameters),
            _change(part.active),
            "as before" if part.multiply_adds is None else f"{_change(part.multiply_adds)} per {part.per}",
        )
        for part in parts
    ]
    sums = [(sum(p.parameters[now] for p in parts), sum(p.active[now] for p in parts)) for now in (0, 1)]
    rows.append(("whole decoder", _change((sums[0][0], sums[1][0])), _change((sums[0][1], sums[1][1])), ""))
    header = ("part", "parameters: dense -> stored", "active parameters: dense -> now", "multiply-adds: dense -> now")
    print_table("what the head costs", header, rows)


def _change(values: tuple[int, int]) -> str:
    return f"{values[0]:,} -> {values[1]:,}" if values[0] != values[1] else f"{values[0]:,}"


def router_losses_in_words(head: HeadMixtureConfig) -> str:
    """Say what the router losses will do in a training.

    Args:
        head: Structure of the head.

    Returns:
        One sentence.
    """
    losses, experts = head.losses, len(head.experts)
    if head.router not in ("top_k", "soft"):
        return f"a {head.router} router learns nothing, so a training adds no router loss"
    parts = []
    if losses.balance:
        parts.append(
            f"{losses.balance:g} times the balance loss, which is 1 when all experts are used evenly and {experts} when one of them serves "
            "everything"
        )
    if losses.z:
        parts.append(f"{losses.z:g} times the z loss, which keeps the router's logits small")
    if not parts:
        return "a training adds no router loss, so nothing keeps an expert from never being used"
    return f"a training adds {' and '.join(parts)}"


def _start_json(start: StoreStart, head: HeadMixtureConfig) -> dict[str, object]:
    return {
        "store": str(start.store),
        "given for": start.given_for,
        "scenes": start.use.scenes,
        "largest weight": dict(zip(head.experts, start.use.largest, strict=True)),
        "mean weight": dict(zip(head.experts, start.use.weights, strict=True)),
    }


if __name__ == "__main__":
    sys.exit(run_command(command))
