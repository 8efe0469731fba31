"""`upcycle3d moe carve`: cut a smaller detector for each driving context out of one, with a gate that knows the context before the network runs.

Read next: `perception/recipes/carve_contexts.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.errors import InvalidInput, require
from ..core.foreign_text import shown
from ..datasets.data_split import DataSplit
from ..perception.evaluation.score import Protocol
from ..perception.models.decoders.mixture import RegionMixtures
from ..perception.moe.driving.context_gate import Hysteresis
from ..perception.moe.driving.recovery import RecoveryConfig
from ..perception.recipes.carve_contexts import ContextCarvingConfig, ContextCarvingRun, carve_contexts
from .console import console, print_table, print_warning, run_command, write_json
from .language_tables import finite


@dataclass(frozen=True, kw_only=True)
class MoeCarve:
    """Carve a dense detector by driving context: measure channels, divide them, recover, and fit the gate. The encoder stays."""

    detector: tyro.conf.Positional[Path]
    """Run folder of a dense detector, or its file."""
    contexts: tuple[str, ...]
    """Contexts as NAME=DIR[:SPLIT], two or more: frames of prepared datasets."""
    out: Path
    """Folder to write. `moe serve` serves it, and each `contexts/NAME` in it is a detector for every other command."""
    ratio: float = 0.5
    """Share of the channels of each carved layer that a context keeps."""
    regions: RegionMixtures = "all"
    """What is carved in the region head: the chains that read score and box (`branches`), `all` chains, or `none`."""
    bev_blocks: tuple[int, ...] = (0, 1)
    """Blocks of the BEV backbone that are carved."""
    groups: int | None = None
    """Find this number of contexts among all frames by what their scans look like, instead of taking the named ones."""
    frames: int = 64
    """Frames of each context from which activity and gate are measured."""
    steps: int = 0
    """Steps of recovery on the labels of the frames, for the carved detector and for pooled pruning alike; 0 trains nothing."""
    lr: float = 0.001
    """Highest learning rate of the recovery."""
    batch: int = 2
    """Frames per step; contexts take turns."""
    validation: tuple[str, ...] = ()
    """Labeled frames to score on, as NAME=DIR[:SPLIT]."""
    protocol: Protocol = "cross_dataset"
    """Rules of the scores; `cross_dataset` fits every dataset."""
    agree: int = 3
    """Frames in a row for which another context must be the best one before a drive changes to it."""
    margin: float = 6.0
    """Difference of the gate's logits at which one frame is enough."""
    seed: int = 0
    """Decides groups and the order of frames."""
    json: Path | None = None
    """Also write the numbers to this file as JSON."""


def named_splits(texts: Sequence[str], option: str) -> dict[str, DataSplit]:
    """Read splits with names.

    Args:
        texts: Such as `city=data/city:train`.
        option: Name of the option, for the message.

    Returns:
        Name to split.

    Raises:
        InvalidInput: A text has another form, or a name occurs twice.
    """
    found: dict[str, DataSplit] = {}
    for text in texts:
        name, equals, split = text.partition("=")
        if not (name and equals and split):
            raise InvalidInput(f"{option} takes NAME={DataSplit.SYNTAX}, such as city=data/city:train, found {shown(text)!r}")
        require(name not in found, f"{option} has the name {shown(name)!r} twice")
        found[name] = DataSplit.parse(split)
    return found


def command(config: MoeCarve) -> None:
    """Carve a detector by driving context: upcycle3d moe carve RUN --contexts city=DIR:train fog=DIR:train --ratio 0.5 --out DIR."""
    settings = ContextCarvingConfig(
        ratio=config.ratio,
        regions=config.regions,
        bev_blocks=config.bev_blocks,
        frames=config.frames,
        groups=config.groups,
        recovery=RecoveryConfig(steps=config.steps, lr=config.lr, batch=config.batch, seed=config.seed) if config.steps else None,
        hysteresis=Hysteresis(frames=config.agree, margin=config.margin),
        protocol=config.protocol,
        seed=config.seed,
    )
    run = carve_contexts(
        config.detector,
        named_splits(config.contexts, "--contexts"),
        config.out,
        settings,
        validation=named_splits(config.validation, "--validation"),
        say=lambda text: console.print(text, soft_wrap=True),
    )
    _print(run)
    console.print(
        f"written to {config.out}: {run.description}; serve it: upcycle3d moe serve {config.out} --budget 100MB", soft_wrap=True
    )
    write_json(
        config.json,
        finite(
            {
                "contexts": dict(run.frames),
                "ratio": run.description.ratio,
                "parameters": dict(run.parameters),
                "multiply-adds": dict(run.multiply_adds),
                "shared share": run.carving.shared_share,
                "used share": run.carving.union_share,
                "scores": {name: {arm: dict(one) for arm, one in arms.items()} for name, arms in run.scores.items()},
                "gate": dict(run.gate),
                "detectors": list(run.description.detectors),
            }
        ),
    )


def _print(run: ContextCarvingRun) -> None:
    console.print(str(run.activity), soft_wrap=True)
    if run.activity.thin_domains:
        print_warning(f"few cells or regions were measured of {', '.join(run.activity.thin_domains)}; raise --frames")
    console.print(str(run.carving), soft_wrap=True)
    dense, carved = run.parameters["dense"], run.parameters["carved"]
    console.print(f"parameters of the decoder: {dense:,} dense, {carved:,} for one context ({carved / dense:.0%})")
    work, less = run.multiply_adds["dense"], run.multiply_adds["carved"]
    console.print(f"multiply-adds of the decoder per frame: {work:,} dense, {less:,} for one context ({less / work:.0%})")
    for name, arms in run.scores.items():
        metrics = list(arms["dense"])
        rows = [(metric, *(f"{arms[arm].get(metric, float('nan')):.1f}" for arm in arms)) for metric in metrics]
        print_table(f"{name}: the gate knows {run.gate[name]:.0%} of its scans", ("score", *arms), rows)


if __name__ == "__main__":
    sys.exit(run_command(command))
